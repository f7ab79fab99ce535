//! Regular expressions as RE2 has them, written for the regex crate.
//!
//! Owns the differences: `\w`, `\d`, `\s` and `\b` are ASCII, `\Q...\E` quotes, and in a class `[`, `--`, `&&` and `~~` are
//! what they look like. Never compiles.

/// The same expression in the syntax of the regex crate.
pub fn translate(expression: &str) -> String {
    let mut out = String::with_capacity(expression.len() + 16);
    let mut rest = expression;
    while let Some(c) = rest.chars().next() {
        rest = &rest[c.len_utf8()..];
        match c {
            '\\' => rest = escape(rest, &mut out),
            '[' => rest = class(rest, &mut out),
            c => out.push(c),
        }
    }
    out
}

/// What a class of ASCII holds.
fn ascii(c: char) -> Option<&'static str> {
    Some(match c {
        'w' | 'W' => "0-9A-Za-z_",
        'd' | 'D' => "0-9",
        's' | 'S' => r"\t\n\f\r ",
        _ => return None,
    })
}

/// An escape outside a class; what comes after it.
fn escape<'a>(rest: &'a str, out: &mut String) -> &'a str {
    let Some(c) = rest.chars().next() else {
        out.push('\\');
        return rest;
    };
    let after = &rest[c.len_utf8()..];
    if c == 'Q' {
        let (quoted, after) = after.split_once(r"\E").unwrap_or((after, ""));
        out.push_str(&regex::escape(quoted));
        return after;
    }
    match (ascii(c), c) {
        (Some(set), c) => out.push_str(&format!("[{}{set}]", if c.is_ascii_uppercase() { "^" } else { "" })),
        (None, 'b') => out.push_str(r"(?-u:\b)"),
        (None, c) => out.extend(['\\', c]),
    }
    after
}

/// A class, from after its `[`; what comes after it. One that does not end is left for the compiler to refuse.
fn class<'a>(mut rest: &'a str, out: &mut String) -> &'a str {
    out.push('[');
    if let Some(after) = rest.strip_prefix('^') {
        out.push('^');
        rest = after;
    }
    let mut first = true;
    loop {
        match rest.chars().next() {
            None => return rest,
            Some(']') if !first => {
                out.push(']');
                return &rest[1..];
            }
            Some(_) => {}
        }
        first = false;
        rest = atom(rest, out);
        // A range: from one to another.
        if let Some(after) = rest.strip_prefix('-')
            && !after.is_empty()
            && !after.starts_with(']')
        {
            out.push('-');
            rest = atom(after, out);
        }
    }
}

/// One element of a class.
fn atom<'a>(rest: &'a str, out: &mut String) -> &'a str {
    if rest.starts_with("[:")
        && let Some(end) = rest.find(":]")
    {
        out.push_str(&rest[..end + 2]);
        return &rest[end + 2..];
    }
    let Some(c) = rest.chars().next() else { return rest };
    let after = &rest[c.len_utf8()..];
    match c {
        '\\' => {
            let Some(escaped) = after.chars().next() else {
                out.push('\\');
                return after;
            };
            match (ascii(escaped), escaped.is_ascii_uppercase()) {
                (Some(set), false) => out.push_str(set),
                (Some(set), true) => out.push_str(&format!("[^{set}]")),
                (None, _) => out.extend(['\\', escaped]),
            }
            &after[escaped.len_utf8()..]
        }
        '[' | ']' | '-' | '&' | '~' | '^' => {
            out.extend(['\\', c]);
            after
        }
        c => {
            out.push(c);
            after
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_mean_what_they_mean_in_re2() {
        let long = "a".repeat(64);
        for (expression, yes, no) in [
            (r"/u/\w{1,64}", &["/u/abc_9", &format!("/u/{long}")][..], &["/u/\u{e9}", "/u/"][..]),
            (r"/u/[\w-]{1,128}", &["/u/a-b"], &["/u/a.b"]),
            (r"/u/[^/]{1,256}", &["/u/a b"], &["/u/a/b"]),
            (r"/u/.{1,255}", &["/u/a/b"], &["/u/"]),
            (r"/u/\pL{1,20}", &["/u/\u{e9}a"], &["/u/9"]),
            (r"/u/\Qa.b\E", &["/u/a.b"], &["/u/axb"]),
            (r"/u/\Qa.b", &["/u/a.b"], &["/u/axb"]),
            (r"/u/[[]x", &["/u/[x"], &["/u/x"]),
            (r"/u/[a-z--x]", &["/u/-", "/u/5"], &["/u/!"]),
            (r"/u/[]a]", &["/u/]", "/u/a"], &["/u/b"]),
            (r"/u/[^]a]", &["/u/b"], &["/u/]"]),
            (r"/u/[a&&b]", &["/u/&", "/u/a"], &["/u/c"]),
            (r"/u/[[:alpha:]_]+", &["/u/a_b"], &["/u/1"]),
            (r"/u/[\d.]+", &["/u/1.2"], &["/u/\u{665}"]),
            (r"/u/[^\s]+", &["/u/a"], &["/u/ "]),
            (r"/u/\D", &["/u/a"], &["/u/1"]),
            (r"/u/[a-]", &["/u/-"], &["/u/b"]),
            (r"(?i)/u/[a-z0-9-]{1,63}", &["/U/A-9"], &["/u/_"]),
            (r"/u/\bx\b", &["/u/x"], &["/u/xy"]),
            (r"/(api|v\d+)/[^?]*", &["/v12/x"], &["/w/x"]),
            (r"/u/a\.b", &["/u/a.b"], &["/u/axb"]),
        ] {
            let translated = translate(expression);
            let compiled = regex::Regex::new(&format!("^(?:{translated})$"));
            let compiled = compiled.unwrap_or_else(|e| panic!("{expression} as {translated}: {e}"));
            for text in yes {
                assert!(compiled.is_match(text), "{expression} as {translated} has {text:?}");
            }
            for text in no {
                assert!(!compiled.is_match(text), "{expression} as {translated} has not {text:?}");
            }
        }
        for broken in ["[", "[a", "(", r"\", "a{2", "[z-a]", "x**"] {
            // Whatever it is, it does not panic; what is wrong stays wrong for the compiler.
            let _ = translate(broken);
        }
        assert!(regex::Regex::new(&translate("[a")).is_err() && regex::Regex::new(&translate("[z-a]")).is_err());
    }
}
