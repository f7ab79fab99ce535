//! A file of YAML as its documents, each read by itself: one that is broken costs only itself.

/// A document of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Document<'a> {
    /// Its text, without the separator.
    pub text: &'a str,
    /// Line of the file on which it starts, from 1.
    pub line: usize,
}

/// Splits a file at its document markers. A line that starts with `---` always is one (YAML 1.2, 9.1.2), also inside
/// a block scalar.
pub fn split(text: &str) -> Vec<Document<'_>> {
    let mut documents = Vec::new();
    let (mut start, mut first_line) = (0, 1);
    let mut push = |from: usize, to: usize, line: usize| {
        let part = &text[from..to];
        let blank = |l: &str| l.trim().is_empty() || l.trim_start().starts_with('#') || l.trim() == "...";
        if !part.lines().all(blank) {
            documents.push(Document { text: part, line });
        }
    };
    let mut at = 0;
    for (n, line) in text.split_inclusive('\n').enumerate() {
        let marker = line.trim_end();
        if marker == "---" || marker.starts_with("--- ") {
            push(start, at, first_line);
            // What follows the marker on its line belongs to the document only if it is more than a comment.
            let rest = marker[3..].trim_start();
            let inline = !rest.is_empty() && !rest.starts_with('#');
            start = if inline { at + 3 } else { at + line.len() };
            first_line = if inline { n + 1 } else { n + 2 };
        }
        at += line.len();
    }
    push(start, text.len(), first_line);
    documents
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_and_their_lines() {
        let text = "# head\n---\na: 1\n---\n\n--- # note\nb: |\n  x\n  ---\n---\n# only a comment\n---\nc: 3";
        let found: Vec<(usize, &str)> = split(text).iter().map(|d| (d.line, d.text.trim())).collect();
        assert_eq!(found, [(3, "a: 1"), (7, "b: |\n  x\n  ---"), (13, "c: 3")]);
        assert_eq!(split(""), []);
        assert_eq!(split("a: 1").len(), 1);
    }
}
