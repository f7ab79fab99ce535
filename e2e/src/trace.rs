//! Spans that were told, as a tree.

use serde_json::Value;

fn text<'a>(span: &'a Value, field: &str) -> &'a str {
    span[field].as_str().unwrap_or_default()
}

/// A trace as lines, each span below its parent; empty where nothing of it was told.
pub fn tree(spans: &[Value], trace: &str) -> Vec<String> {
    let of: Vec<&Value> = spans.iter().filter(|s| text(s, "trace") == trace).collect();
    let root = |s: &&Value| !of.iter().any(|o| text(o, "id") == text(s, "parent"));
    let mut lines = Vec::new();
    for span in of.iter().copied().filter(root) {
        below(&of, span, 0, &mut lines);
    }
    lines
}

fn below(of: &[&Value], span: &Value, depth: usize, lines: &mut Vec<String>) {
    let (service, name, us) = (text(span, "service"), text(span, "name"), span["us"].as_u64().unwrap_or(0));
    lines.push(format!("{}{service}: {name} ({us} us)", "  ".repeat(depth)));
    // As deep as any trace of ours can be, should somebody tell a circle.
    if depth < 8 {
        for child in of.iter().copied().filter(|s| text(s, "parent") == text(span, "id")) {
            below(of, child, depth + 1, lines);
        }
    }
}

/// The trace of a request over client tunnel, waypoint and server tunnel, each below the one before.
pub fn whole(spans: &[Value]) -> Option<Vec<String>> {
    let traces: std::collections::BTreeSet<&str> = spans.iter().map(|s| text(s, "trace")).collect();
    traces.into_iter().map(|t| tree(spans, t)).find(|lines| {
        let begins = ["ztunnel: ", "  waypoint: ", "    ztunnel: "];
        lines.len() == begins.len() && lines.iter().zip(begins).all(|(line, begin)| line.starts_with(begin))
    })
}
