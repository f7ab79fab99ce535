//! Expressions that choose requests for the access log: a part of CEL (the filter of Istio's Telemetry).
//!
//! Owns the grammar: comparisons of a request's attributes with constants, `has(...)`, `contains`, `startsWith`,
//! `endsWith`, `matches`, joined by `&&`, `||`, `!` and parentheses. Whatever else CEL has is refused by name and place.
//! A comparison with an attribute that is not there does not hold.

use regex::Regex;

mod parse;

pub use parse::{ExpressionError, parse};

/// What is known of a request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Attribute {
    /// `response.code`
    ResponseCode,
    /// `response.grpc_status`
    GrpcStatus,
    /// `response.flags`: as the log writes them, such as `UF`.
    ResponseFlags,
    /// `request.method`
    Method,
    /// `request.url_path` and `request.path`: without query.
    Path,
    /// `request.host`
    Host,
    /// `request.duration`, in milliseconds.
    Duration,
    /// `request.headers['name']`
    Header(String),
    /// `connection.mtls`
    Mtls,
    /// `source.principal`
    Principal,
}

/// A value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// A number.
    Number(i64),
    /// A text.
    Text(&'a str),
    /// Yes or no.
    Truth(bool),
}

/// Where values come from; `None` where a request has no such attribute.
pub trait Attributes {
    /// Its value.
    fn get(&self, attribute: &Attribute) -> Option<Value<'_>>;
}

/// A constant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Constant {
    /// A number.
    Number(i64),
    /// A text.
    Text(String),
    /// Yes or no.
    Truth(bool),
}

/// How an attribute is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// `==`
    Is,
    /// `!=`
    IsNot,
    /// `<`
    Below,
    /// `<=`
    AtMost,
    /// `>`
    Above,
    /// `>=`
    AtLeast,
}

/// What is asked of a text.
#[derive(Clone, Debug)]
pub enum Question {
    /// `contains('...')`
    Contains(String),
    /// `startsWith('...')`
    StartsWith(String),
    /// `endsWith('...')`
    EndsWith(String),
    /// `matches('...')`: somewhere in it.
    Matches(Regex),
}

/// An expression.
#[derive(Clone, Debug)]
pub enum Expression {
    /// Both hold.
    And(Box<Self>, Box<Self>),
    /// One of them holds.
    Or(Box<Self>, Box<Self>),
    /// It does not hold.
    Not(Box<Self>),
    /// The attribute is there.
    Has(Attribute),
    /// An attribute that is yes or no, or a constant.
    Truth(Result<Attribute, bool>),
    /// A comparison.
    Compare(Attribute, Order, Constant),
    /// A question.
    Ask(Attribute, Question),
}

impl Expression {
    /// Whether it holds.
    pub fn holds(&self, of: &impl Attributes) -> bool {
        match self {
            Self::And(a, b) => a.holds(of) && b.holds(of),
            Self::Or(a, b) => a.holds(of) || b.holds(of),
            Self::Not(a) => !a.holds(of),
            Self::Has(attribute) => of.get(attribute).is_some(),
            Self::Truth(Err(constant)) => *constant,
            Self::Truth(Ok(attribute)) => of.get(attribute) == Some(Value::Truth(true)),
            Self::Compare(attribute, order, constant) => {
                of.get(attribute).is_some_and(|value| compare(&value, *order, constant))
            }
            Self::Ask(attribute, question) => match of.get(attribute) {
                Some(Value::Text(text)) => question.of(text),
                _ => false,
            },
        }
    }

    /// Headers that it looks at.
    pub fn headers(&self) -> Vec<&str> {
        match self {
            Self::And(a, b) | Self::Or(a, b) => [a.headers(), b.headers()].concat(),
            Self::Not(a) => a.headers(),
            Self::Has(a) | Self::Truth(Ok(a)) | Self::Compare(a, ..) | Self::Ask(a, _) => match a {
                Attribute::Header(name) => vec![name],
                _ => Vec::new(),
            },
            Self::Truth(Err(_)) => Vec::new(),
        }
    }
}

impl Question {
    fn of(&self, text: &str) -> bool {
        match self {
            Self::Contains(part) => text.contains(part),
            Self::StartsWith(part) => text.starts_with(part),
            Self::EndsWith(part) => text.ends_with(part),
            Self::Matches(regex) => regex.is_match(text),
        }
    }
}

fn compare(value: &Value<'_>, order: Order, constant: &Constant) -> bool {
    let ordering = match (value, constant) {
        (Value::Number(a), Constant::Number(b)) => a.cmp(b),
        (Value::Text(a), Constant::Text(b)) => (*a).cmp(b.as_str()),
        (Value::Truth(a), Constant::Truth(b)) => a.cmp(b),
        // Kinds were compared when it was read; values of one attribute are always of one kind.
        _ => return order == Order::IsNot,
    };
    match order {
        Order::Is => ordering.is_eq(),
        Order::IsNot => ordering.is_ne(),
        Order::Below => ordering.is_lt(),
        Order::AtMost => ordering.is_le(),
        Order::Above => ordering.is_gt(),
        Order::AtLeast => ordering.is_ge(),
    }
}

#[cfg(test)]
mod tests;
