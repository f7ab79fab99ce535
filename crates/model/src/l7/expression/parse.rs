//! Text to expression. Bounded in length and depth.

use regex::RegexBuilder;

use super::{Attribute, Constant, Expression, Order, Question};

const LONGEST: usize = 4096;
const DEEPEST: usize = 32;
/// Memory of a compiled regular expression.
const REGEX: usize = 256 * 1024;

/// Where an expression cannot be read, and what was expected there.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("at character {at}: expected {expected}, found {found:?}")]
pub struct ExpressionError {
    /// Character, from 1.
    pub at: usize,
    /// What was expected.
    pub expected: &'static str,
    /// What is there.
    pub found: String,
}

/// Reads an expression.
pub fn parse(text: &str) -> Result<Expression, ExpressionError> {
    if text.len() > LONGEST {
        let found = format!("{} bytes", text.len());
        return Err(ExpressionError { at: 1, expected: "at most 4096 bytes", found });
    }
    let mut reader = Reader { text, at: 0, depth: 0 };
    let expression = reader.either()?;
    match reader.rest() {
        "" => Ok(expression),
        _ => Err(reader.wrong("&&, || or the end")),
    }
}

struct Reader<'a> {
    text: &'a str,
    at: usize,
    depth: usize,
}

impl<'a> Reader<'a> {
    /// What is left, after spaces.
    fn rest(&mut self) -> &'a str {
        let rest = &self.text[self.at..];
        let trimmed = rest.trim_start();
        self.at += rest.len() - trimmed.len();
        trimmed
    }

    fn wrong(&mut self, expected: &'static str) -> ExpressionError {
        let found = self.rest().chars().take(20).collect();
        ExpressionError { at: self.text[..self.at].chars().count() + 1, expected, found }
    }

    fn take(&mut self, symbol: &str) -> bool {
        let there = self.rest().starts_with(symbol);
        if there {
            self.at += symbol.len();
        }
        there
    }

    fn need(&mut self, symbol: &'static str) -> Result<(), ExpressionError> {
        if self.take(symbol) { Ok(()) } else { Err(self.wrong(symbol)) }
    }

    fn either(&mut self) -> Result<Expression, ExpressionError> {
        let mut left = self.both()?;
        while self.take("||") {
            left = Expression::Or(Box::new(left), Box::new(self.both()?));
        }
        Ok(left)
    }

    fn both(&mut self) -> Result<Expression, ExpressionError> {
        let mut left = self.one()?;
        while self.take("&&") {
            left = Expression::And(Box::new(left), Box::new(self.one()?));
        }
        Ok(left)
    }

    fn one(&mut self) -> Result<Expression, ExpressionError> {
        self.depth += 1;
        if self.depth > DEEPEST {
            return Err(self.wrong("no more than 32 parentheses and negations in each other"));
        }
        let one = if self.take("!") {
            Expression::Not(Box::new(self.one()?))
        } else if self.take("(") {
            let inner = self.either()?;
            self.need(")")?;
            inner
        } else {
            self.term()?
        };
        self.depth -= 1;
        Ok(one)
    }

    fn term(&mut self) -> Result<Expression, ExpressionError> {
        for (word, truth) in [("true", true), ("false", false)] {
            if self.word() == word {
                self.at += word.len();
                return Ok(Expression::Truth(Err(truth)));
            }
        }
        if self.word() == "has" {
            self.at += "has".len();
            self.need("(")?;
            let attribute = self.attribute()?;
            self.need(")")?;
            return Ok(Expression::Has(attribute));
        }
        let attribute = self.attribute()?;
        if self.take(".") {
            let question = self.question()?;
            return match kind_of(&attribute) {
                Constant::Text(_) => Ok(Expression::Ask(attribute, question)),
                _ => Err(self.wrong("an attribute that is a text before such a question")),
            };
        }
        let orders = [
            ("==", Order::Is),
            ("!=", Order::IsNot),
            ("<=", Order::AtMost),
            (">=", Order::AtLeast),
            ("<", Order::Below),
            (">", Order::Above),
        ];
        for (symbol, order) in orders {
            if self.take(symbol) {
                let before = self.at;
                let constant = self.constant()?;
                if std::mem::discriminant(&constant) == std::mem::discriminant(&kind_of(&attribute)) {
                    return Ok(Expression::Compare(attribute, order, constant));
                }
                self.at = before;
                return Err(self.wrong(match kind_of(&attribute) {
                    Constant::Number(_) => "a number",
                    Constant::Text(_) => "a text in quotes",
                    Constant::Truth(_) => "true or false",
                }));
            }
        }
        match kind_of(&attribute) {
            Constant::Truth(_) => Ok(Expression::Truth(Ok(attribute))),
            _ => Err(self.wrong("a comparison")),
        }
    }

    /// The name at this place: letters, digits, `_` and dots before more of them.
    fn word(&mut self) -> &'a str {
        let rest = self.rest();
        let end = rest.find(|c: char| !c.is_ascii_alphanumeric() && c != '_').unwrap_or(rest.len());
        &rest[..end]
    }

    fn attribute(&mut self) -> Result<Attribute, ExpressionError> {
        const KNOWN: &[(&str, &str, Attribute)] = &[
            ("response", "code", Attribute::ResponseCode),
            ("response", "grpc_status", Attribute::GrpcStatus),
            ("response", "flags", Attribute::ResponseFlags),
            ("request", "method", Attribute::Method),
            ("request", "url_path", Attribute::Path),
            ("request", "path", Attribute::Path),
            ("request", "host", Attribute::Host),
            ("request", "duration", Attribute::Duration),
            ("connection", "mtls", Attribute::Mtls),
            ("source", "principal", Attribute::Principal),
        ];
        const EXPECTED: &str = "response.code, .grpc_status or .flags, request.method, .url_path, .path, .host, \
                                .duration or .headers['name'], connection.mtls or source.principal";
        let begin = self.at;
        let of = self.word();
        self.at += of.len();
        if !of.is_empty() && self.take(".") {
            let name = self.word();
            if (of, name) == ("request", "headers") {
                self.at += name.len();
                self.need("[")?;
                let name = self.quoted()?;
                self.need("]")?;
                return Ok(Attribute::Header(name.to_ascii_lowercase()));
            }
            if let Some((.., attribute)) = KNOWN.iter().find(|(o, n, _)| (*o, *n) == (of, name)) {
                self.at += name.len();
                return Ok(attribute.clone());
            }
        }
        self.at = begin;
        Err(self.wrong(EXPECTED))
    }

    fn question(&mut self) -> Result<Question, ExpressionError> {
        let name = self.word();
        let begin = self.at;
        if !["contains", "startsWith", "endsWith", "matches"].contains(&name) {
            return Err(self.wrong("contains, startsWith, endsWith or matches"));
        }
        self.at += name.len();
        self.need("(")?;
        let text = self.quoted()?;
        self.need(")")?;
        Ok(match name {
            "contains" => Question::Contains(text),
            "startsWith" => Question::StartsWith(text),
            "endsWith" => Question::EndsWith(text),
            _ => match RegexBuilder::new(&text).size_limit(REGEX).build() {
                Ok(regex) => Question::Matches(regex),
                Err(_) => {
                    self.at = begin;
                    return Err(self.wrong("a regular expression that is valid and not too large"));
                }
            },
        })
    }

    fn constant(&mut self) -> Result<Constant, ExpressionError> {
        let rest = self.rest();
        if rest.starts_with(['\'', '"']) {
            return self.quoted().map(Constant::Text);
        }
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '-').unwrap_or(rest.len());
        if let Ok(number) = rest[..digits].parse() {
            self.at += digits;
            return Ok(Constant::Number(number));
        }
        match self.word() {
            word @ ("true" | "false") => {
                self.at += word.len();
                Ok(Constant::Truth(word == "true"))
            }
            "duration" => {
                self.at += "duration".len();
                self.need("(")?;
                let begin = self.at;
                let text = self.quoted()?;
                let parts = [("ms", 1.0), ("s", 1e3), ("m", 6e4), ("h", 3.6e6)];
                let part =
                    parts.iter().find_map(|(unit, ms)| Some((text.strip_suffix(unit)?.parse::<f64>().ok()?, ms)));
                let Some((number, ms)) = part.filter(|(n, _)| n.is_finite() && n.abs() < 1e9) else {
                    self.at = begin;
                    return Err(self.wrong("a duration such as '100ms' or '1.5s'"));
                };
                self.need(")")?;
                Ok(Constant::Number((number * ms) as i64))
            }
            _ => Err(self.wrong("a number, a text in quotes, true, false or duration('...')")),
        }
    }

    /// A text in single or double quotes; a backslash before a quote or a backslash takes its meaning away.
    fn quoted(&mut self) -> Result<String, ExpressionError> {
        const EXPECTED: &str = "a text in quotes";
        let rest = self.rest();
        let Some(quote) = rest.chars().next().filter(|c| matches!(c, '\'' | '"')) else {
            return Err(self.wrong(EXPECTED));
        };
        let mut text = String::new();
        let mut chars = rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                c if c == quote => {
                    self.at += at + 1;
                    return Ok(text);
                }
                '\\' => text.extend(chars.next().map(|(_, c)| c)),
                c => text.push(c),
            }
        }
        Err(self.wrong("the end of a text in quotes"))
    }
}

/// A constant of the kind that an attribute's values are of.
fn kind_of(attribute: &Attribute) -> Constant {
    match attribute {
        Attribute::ResponseCode | Attribute::GrpcStatus | Attribute::Duration => Constant::Number(0),
        Attribute::Mtls => Constant::Truth(false),
        _ => Constant::Text(String::new()),
    }
}
