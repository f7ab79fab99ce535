//! Asking the node's agent, as a CNI plugin would.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::Duration;

use ambit_net::{Netns, fdpass};
use serde_json::{Value, json};

use crate::{Doing, Failure};

/// Longer than the agent itself waits for the controller and the certificate.
const DEADLINE: Duration = Duration::from_secs(30);

/// Tells of a pod; whether it is in the mesh. An error means that it must not start.
pub(super) fn add(socket: &Path, pod: &Value, netns: &Netns) -> Result<bool, Failure> {
    let answer = ask(socket, &json!({ "version": 1, "command": { "add": pod } }), Some(netns))?;
    Ok(answer["enrolled"] == true)
}

/// Tells that a pod is gone.
pub(super) fn del(socket: &Path, uid: &str) -> Result<(), Failure> {
    ask(socket, &json!({ "version": 1, "command": { "del": { "uid": uid } } }), None).map(drop)
}

/// Uids that the agent knows.
pub(super) fn list(socket: &Path) -> Result<Vec<String>, Failure> {
    let answer = ask(socket, &json!({ "version": 1, "command": { "list": {} } }), None)?;
    let uids = answer["pods"].as_array().cloned().unwrap_or_default();
    Ok(uids.iter().filter_map(|u| u.as_str().map(str::to_owned)).collect())
}

fn ask(socket: &Path, request: &Value, netns: Option<&Netns>) -> Result<Value, Failure> {
    let what = "node agent";
    let fds: Vec<_> = netns.iter().map(|n| n.as_fd()).collect();
    let text = fdpass::ask(socket, request.to_string().as_bytes(), &fds, DEADLINE).doing(what)?;
    let answer: Value = serde_json::from_slice(&text).doing(what)?;
    match answer["error"].as_str() {
        Some(error) => Err(Failure(error.to_owned())),
        None => Ok(answer),
    }
}
