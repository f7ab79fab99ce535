use super::*;

struct Request;

impl Attributes for Request {
    fn get(&self, attribute: &Attribute) -> Option<Value<'_>> {
        Some(match attribute {
            Attribute::ResponseCode => Value::Number(503),
            Attribute::Method => Value::Text("GET"),
            Attribute::Path => Value::Text("/api/v1/items"),
            Attribute::Host => Value::Text("web.shop"),
            Attribute::Duration => Value::Number(1200),
            Attribute::Mtls => Value::Truth(true),
            Attribute::Header(name) if name == "x-user" => Value::Text("it's \"me\""),
            _ => return None,
        })
    }
}

#[test]
fn expressions_hold_or_do_not() {
    for (text, expected) in [
        ("response.code >= 500", true),
        ("response.code<500", false),
        (" response.code == 503 && request.method == 'GET' ", true),
        ("response.code == 200 || request.url_path.startsWith('/api')", true),
        ("!(response.code == 503)", false),
        ("!response.code == 200 && true", true),
        ("request.path.contains(\"v1\") && !request.path.endsWith('s')", false),
        ("request.url_path.matches('^/api/v[0-9]+/')", true),
        ("has(response.grpc_status)", false),
        ("!has(response.grpc_status)", true),
        // What is not there is neither equal nor unequal.
        ("response.grpc_status == 0 || response.grpc_status != 0", false),
        ("request.headers['X-User'] == 'it\\'s \"me\"'", true),
        ("request.headers['x-other'] != ''", false),
        ("connection.mtls", true),
        ("connection.mtls == false", false),
        ("request.duration > duration('1s') && request.duration < duration('1.5s')", true),
        ("request.duration >= 1200", true),
        // && binds closer than ||.
        ("true || false && false", true),
        ("(true || false) && false", false),
    ] {
        let expression = parse(text).unwrap_or_else(|e| panic!("{text}: {e}"));
        assert_eq!(expression.holds(&Request), expected, "{text}");
    }
    let headers = parse("request.headers['A'] == '1' || !has(request.headers['b'])").expect("parses");
    assert_eq!(headers.headers(), ["a", "b"]);
}

#[test]
fn what_cannot_be_read_is_told_with_its_place() {
    for (text, at, expected) in [
        ("", 1, "response.code"),
        ("response.code", 14, "a comparison"),
        ("response.code == '200'", 18, "a number"),
        ("request.method == 5", 19, "a text in quotes"),
        ("response.code >= 500 and true", 22, "&&, || or the end"),
        ("response.size > 1", 1, "response.code"),
        ("request.method.size() > 1", 16, "contains, startsWith"),
        ("response.code.contains('5')", 28, "an attribute that is a text"),
        ("(response.code == 1", 20, ")"),
        ("request.host == 'web", 17, "the end of a text"),
        ("request.host.matches('(')", 14, "a regular expression"),
        ("request.host.matches('(a{1000}){1000}')", 14, "a regular expression"),
        ("request.duration > duration('soon')", 29, "a duration"),
        ("ü", 1, "response.code"),
    ] {
        let error = parse(text).expect_err(text);
        assert_eq!(error.at, at, "{text}: {error}");
        assert!(error.expected.contains(expected), "{text}: {error}");
    }
    assert!(parse(&"!".repeat(1000)).is_err());
    assert!(parse(&format!("{}true{}", "(".repeat(1000), ")".repeat(1000))).is_err());
    assert!(parse(&" ".repeat(5000)).is_err());
}

#[test]
fn no_text_makes_it_panic() {
    let mut random = fastrand::Rng::with_seed(7);
    let pieces = [
        "response.code",
        "request.headers[",
        "'",
        "\"",
        "]",
        "(",
        ")",
        "!",
        "&&",
        "||",
        "==",
        ">=",
        "-",
        "9",
        "has",
        ".",
        "matches",
        "duration('1s')",
        "ä",
        "\\",
        " ",
        "true",
        "request.host",
    ];
    for _ in 0..20_000 {
        let text: String = (0..random.usize(..12)).map(|_| pieces[random.usize(..pieces.len())]).collect();
        if let Ok(expression) = parse(&text) {
            expression.holds(&Request);
        }
    }
}
