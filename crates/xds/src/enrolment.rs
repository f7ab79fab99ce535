//! What a node says of its pods: names of the type [`crate::ENROLMENT`].
//!
//! Owns the form of these names. A name is the uid of a pod that is enrolled, or a uid, a space and what is wrong with
//! that pod.

/// Begins what is wrong with a pod that is not enrolled.
pub const NOT_ENROLLED: &str = "not enrolled: ";
/// Begins what was wrong with a pod that is enrolled.
pub const REPAIRED: &str = "repaired: ";
/// Begins what is wrong with a pod that was enrolled and of which nobody knows whether it still is.
pub const UNVERIFIED: &str = "not verified: ";
/// Begins what was dropped because it went past the redirection of a pod that is enrolled.
pub const DROPPED: &str = "dropped: ";
/// Longer words are cut.
const LONGEST: usize = 512;

/// What a name says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said<'a> {
    /// The pod of this uid is enrolled.
    Enrolled(&'a str),
    /// Something is wrong with the pod of this uid.
    Trouble(&'a str, &'a str),
}

/// The name that says what is wrong with a pod.
pub fn trouble(uid: &str, what: &str) -> String {
    format!("{uid} {}", cut(what))
}

fn cut(what: &str) -> &str {
    let end = what.char_indices().map(|(at, c)| at + c.len_utf8()).take_while(|end| *end <= LONGEST).last();
    &what[..end.unwrap_or(0)]
}

/// Reads a name.
pub fn read(name: &str) -> Said<'_> {
    match name.split_once(' ') {
        // A peer may not have cut it.
        Some((uid, what)) => Said::Trouble(uid, cut(what)),
        None => Said::Enrolled(name),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_say_what_they_are_made_of() {
        assert_eq!(read("uid-1"), Said::Enrolled("uid-1"));
        assert_eq!(read(&trouble("uid-1", "not enrolled: no room")), Said::Trouble("uid-1", "not enrolled: no room"));
        let long = trouble("u", &"ä".repeat(400));
        assert_eq!(long.len(), "u ".len() + LONGEST);
        assert_eq!(read(&format!("u {}", "x".repeat(4000))), Said::Trouble("u", &"x".repeat(LONGEST)));
    }
}
