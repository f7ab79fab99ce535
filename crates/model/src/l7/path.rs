//! One form of each path, so that what a policy has evaluated is what the application gets.
//!
//! Owns the form: dot segments resolved, runs of slashes made one, unreserved characters not escaped (RFC 3986 section
//! 6.2.2). An escaped slash stays escaped, for to many applications it is not a slash.

use std::borrow::Cow;

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
pub fn normalise(path: &str) -> Result<Cow<'_, str>, PathError> {
    if !path.starts_with('/') {
        return Err(PathError::Relative);
    }
    if !path.contains(['%', '\\']) && !path.contains("//") && !path.contains("/.") {
        return Ok(Cow::Borrowed(path));
    }
    let unescaped = unescape(path)?;
    let mut segments: Vec<&str> = Vec::new();
    let mut directory = false;
    for segment in unescaped.split('/').skip(1) {
        directory = matches!(segment, "" | "." | "..");
        match segment {
            "" | "." => {}
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

/// Whether a path has an escaped slash or backslash, which an application may take for a real one.
pub fn has_hidden_slash(path: &str) -> bool {
    let hidden = |at: usize| {
        let code = path.get(at + 1..at + 3);
        code.is_some_and(|c| c.eq_ignore_ascii_case("2f") || c.eq_ignore_ascii_case("5c"))
    };
    path.match_indices('%').any(|(at, _)| hidden(at))
}

/// Undoes escapes that need not be, writes the others in one way, and takes a backslash for a slash.
fn unescape(path: &str) -> Result<String, PathError> {
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
        if byte.is_ascii_alphanumeric() || b"-._~".contains(&byte) {
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
