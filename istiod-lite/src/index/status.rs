//! What is said of an object to its owner.

use serde::Serialize;

/// A condition, in the form of Kubernetes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Condition {
    /// Such as `ZtunnelAccepted`.
    pub r#type: &'static str,
    /// Whether it holds.
    pub status: bool,
    /// One word.
    pub reason: &'static str,
    /// In words, with the field and what was done about it.
    pub message: String,
}

impl Condition {
    /// A condition that holds.
    pub fn yes(r#type: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { r#type, status: true, reason, message: message.into() }
    }

    /// A condition that does not hold.
    pub fn no(r#type: &'static str, reason: &'static str, message: impl Into<String>) -> Self {
        Self { r#type, status: false, reason, message: message.into() }
    }
}
