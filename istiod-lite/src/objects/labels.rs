//! Labels of an object, in one piece of memory: there is a set for each of ten thousands of pods.

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Error, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};

/// Labels: names and values. A name that is given twice has the value that was given last.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Labels {
    /// `name NUL value NUL`, for each.
    text: Box<str>,
}

impl Labels {
    /// A label's value.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.iter().find(|(n, _)| *n == name).map(|(_, value)| value)
    }

    /// All labels.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        let mut parts = self.text.split_terminator('\0');
        std::iter::from_fn(move || Some((parts.next()?, parts.next()?)))
    }

    /// With others; theirs count where both have one.
    pub fn with(&self, others: &BTreeMap<String, String>) -> Self {
        let own = self.iter().filter(|(name, _)| !others.contains_key(*name));
        own.chain(others.iter().map(|(n, v)| (&**n, &**v))).collect()
    }
}

impl<'a> FromIterator<(&'a str, &'a str)> for Labels {
    fn from_iter<I: IntoIterator<Item = (&'a str, &'a str)>>(all: I) -> Self {
        let mut text = String::new();
        for (name, value) in all {
            text.extend([name, "\0", value, "\0"]);
        }
        Self { text: text.into() }
    }
}

impl fmt::Debug for Labels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_map().entries(self.iter()).finish()
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of texts")
            }

            fn visit_unit<E: Error>(self) -> Result<Labels, E> {
                Ok(Labels::default())
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut all = BTreeMap::new();
                while let Some((name, value)) = map.next_entry::<String, String>()? {
                    if name.contains('\0') || value.contains('\0') {
                        return Err(A::Error::custom(format!("label {name:?}: expected a text without NUL")));
                    }
                    all.insert(name, value);
                }
                Ok(all.iter().map(|(n, v)| (&**n, &**v)).collect())
            }
        }
        deserializer.deserialize_map(Map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_found_and_joined() {
        let labels: Labels = serde_json::from_str(r#"{"app": "a", "empty": "", "version": "v1"}"#).expect("labels");
        assert_eq!((labels.get("app"), labels.get("empty"), labels.get("a")), (Some("a"), Some(""), None));
        assert_eq!(labels.iter().count(), 3);
        let more = BTreeMap::from([("app".to_owned(), "b".to_owned()), ("new".to_owned(), "n".to_owned())]);
        let joined = labels.with(&more);
        assert_eq!((joined.get("app"), joined.get("new"), joined.get("version")), (Some("b"), Some("n"), Some("v1")));
        assert_eq!(format!("{joined:?}"), r#"{"empty": "", "version": "v1", "app": "b", "new": "n"}"#);
        assert!(Labels::default().iter().next().is_none());
        let twice: Labels = serde_json::from_str(r#"{"app": "a", "app": "b"}"#).expect("labels");
        assert_eq!(twice.iter().collect::<Vec<_>>(), [("app", "b")]);
        let wrong = serde_json::from_str::<Labels>(r#"{"a": "\u0000"}"#).expect_err("NUL");
        assert!(wrong.to_string().contains("without NUL"), "{wrong}");
        assert!(serde_json::from_str::<Labels>(r#"{"a": 1}"#).is_err());
    }
}
