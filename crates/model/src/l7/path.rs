//! One form of each path, so that what a policy has evaluated is what the application gets.
//!
//! Owns the form, which the mesh configuration chooses as Istio's `pathNormalization` does: by default dot segments are
//! resolved, a backslash is a slash and unreserved characters are not escaped (RFC 3986 section 6.2.2). Empty segments are
//! segments, and an escaped slash is data, unless more is asked for.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

/// How paths are normalised before anybody looks at them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum PathNormalization {
    /// As they come.
    None,
    /// RFC 3986, and a backslash is a slash.
    #[serde(alias = "DEFAULT")]
    #[default]
    Base,
    /// Runs of slashes are one as well.
    MergeSlashes,
    /// Escaped slashes and backslashes are slashes before that.
    DecodeAndMergeSlashes,
}

/// Why a path has no such form.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    /// It climbs above the root.
    #[error("the path climbs above its root")]
    AboveRoot,
    /// An escape that is none, or of a control character.
    #[error("the path has an escape that is not one of a printable character")]
    Escape,
    /// It does not begin with a slash.
    #[error("the path does not begin with a slash")]
    Relative,
}

/// The form of a path without query.
pub fn normalise(path: &str, how: PathNormalization) -> Result<Cow<'_, str>, PathError> {
    use PathNormalization::*;
    if !path.starts_with('/') {
        return Err(PathError::Relative);
    }
    let merge = matches!(how, MergeSlashes | DecodeAndMergeSlashes);
    let special = path.contains(['%', '\\']) || path.contains("/.") || (merge && path.contains("//"));
    if how == None || !special {
        return Ok(Cow::Borrowed(path));
    }
    let unescaped = unescape(path, how == DecodeAndMergeSlashes)?;
    let mut segments: Vec<&str> = Vec::new();
    let mut directory = false;
    let mut all = unescaped.split('/').skip(1).peekable();
    while let Some(segment) = all.next() {
        directory = matches!(segment, "" | "." | "..");
        match segment {
            "" if merge || all.peek().is_none() => {}
            "." => {}
            ".." => drop(segments.pop().ok_or(PathError::AboveRoot)?),
            _ => segments.push(segment),
        }
    }
    let mut out = String::with_capacity(unescaped.len());
    for segment in &segments {
        out.push('/');
        out.push_str(segment);
    }
    if directory || segments.is_empty() {
        out.push('/');
    }
    Ok(Cow::Owned(out))
}

/// Undoes escapes that need not be, writes the others in one way, and takes a backslash for a slash.
fn unescape(path: &str, slashes: bool) -> Result<String, PathError> {
    let mut out = String::with_capacity(path.len());
    let mut rest = path;
    while let Some(at) = rest.find(['%', '\\']) {
        out.push_str(&rest[..at]);
        if rest.as_bytes()[at] == b'\\' {
            out.push('/');
            rest = &rest[at + 1..];
            continue;
        }
        let code = rest.get(at + 1..at + 3).filter(|c| c.bytes().all(|b| b.is_ascii_hexdigit()));
        let code = code.ok_or(PathError::Escape)?;
        let byte = u8::from_str_radix(code, 16).map_err(|_| PathError::Escape)?;
        if byte < 0x20 || byte == 0x7f {
            return Err(PathError::Escape);
        }
        if slashes && matches!(byte, b'/' | b'\\') {
            out.push('/');
        } else if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push('%');
            out.push_str(&code.to_ascii_uppercase());
        }
        rest = &rest[at + 3..];
    }
    out.push_str(rest);
    Ok(out)
}
