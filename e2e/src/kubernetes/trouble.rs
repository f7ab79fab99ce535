//! Checks in which something of a pod or its node is wrong, and what is told of it.

use ambit_testing::{Doing, Failure};
use serde_json::{Value, json};

use super::checks::{CLIENT, HELLO, URL, enrolled, once, phase, tunnelled};
use super::{Cluster, NO_RIG, has, now};

const PODS: &str = r#"
apiVersion: v1
kind: Namespace
metadata: {name: trouble}
---
apiVersion: v1
kind: Pod
metadata: {name: occupied, namespace: trouble}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: c
      image: localhost/app:local
      args: [serve, --port, "15008", --name, occupied]
      readinessProbe: {httpGet: {path: /, port: 15008}, periodSeconds: 1}
---
apiVersion: v1
kind: Pod
metadata: {name: fine, namespace: trouble}
spec:
  terminationGracePeriodSeconds: 1
  containers:
    - name: c
      image: localhost/app:local
      args: [serve, --port, "8080", --name, fine]
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
"#;

/// A pod that has taken a port of the tunnel cannot be enrolled: an Event on it says why, and its neighbour is enrolled.
pub(super) fn event(c: &Cluster) -> Result<String, Failure> {
    c.apply(PODS)?;
    for pod in ["pod/occupied", "pod/fine"] {
        c.kubectl(&["-n", "trouble", "wait", "--for=condition=Ready", pod, "--timeout=60s"])?;
    }
    c.kubectl(&["label", "namespace", "trouble", "istio.io/dataplane-mode=ambient"])?;
    let of = ["-n", "trouble", "events", "--field-selector", "involvedObject.name=occupied"];
    let message = c.wait("an Event", || {
        let reasons = c.field(&of, "{.items[*].reason}")?;
        has(&reasons, "MeshNotEnrolled")?;
        let messages = c.field(&of, r#"{.items[?(@.reason=="MeshNotEnrolled")].message}"#)?;
        has(&messages, ":15008").map(|()| messages)
    })?;
    const ENROLLED: &str = r"{.metadata.annotations.ambient\.istio\.io/redirection}";
    c.wait("its neighbour to be enrolled", || has(&c.field(&["-n", "trouble", "pod/fine"], ENROLLED)?, "enabled"))?;
    c.kubectl(&["delete", "namespace", "trouble", "--wait=false"])?;
    Ok(message)
}

const LOST: &str = r#"
apiVersion: v1
kind: Pod
metadata: {name: lost, namespace: shop}
spec:
  nodeName: node-b
  terminationGracePeriodSeconds: 1
  containers:
    - name: c
      image: localhost/app:local
      args: [serve, --port, "8080", --name, lost]
      readinessProbe: {httpGet: {path: /, port: 8080}, periodSeconds: 1}
"#;

/// A connection to a pod as the tunnel of its node saw it, with the identity of who called.
fn named(c: &Cluster, pod: &str, ip: &str) -> Result<(), Failure> {
    let start = now();
    has(&c.get(CLIENT, &format!("http://{ip}:8080/"))?, "hello from")?;
    let lines = c.access_log(&start)?;
    let by = |l: &Value| l["direction"] == "inbound" && l["dst.workload"] == pod && l["src.identity"].is_string();
    if lines.iter().any(by) { Ok(()) } else { Err(Failure(format!("{lines:?}"))) }
}

/// The network namespace of a pod is gone with all that ran in it, and no CNI plugin was told. Its neighbours notice nothing, the
/// namespace is not kept alive by us, and the pod that is made in its place is in the mesh.
pub(super) fn vanished(c: &Cluster) -> Result<String, Failure> {
    if c.rig.is_none() {
        return Ok(NO_RIG.into());
    }
    c.apply(LOST)?;
    let lost = ["-n", "shop", "pod", "lost"];
    let address = || c.field(&lost, "{.status.podIP}");
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Ready", "pod/lost", "--timeout=60s"])?;
    enrolled(c, &["shop"], "enabled")?;
    let old = address()?;
    c.wait("the pod by HBONE", || named(c, "lost", &old))?;
    let load = c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", URL, "15"])?;
    let namespace = c.run_rig("netns", &["b", "vanish", &old])?;
    let new = c.wait("the pod with another network", || {
        let ready = c.field(&lost, "{.status.conditions[?(@.type==\"Ready\")].status}")?;
        match address()? {
            new if new != old && !new.is_empty() && ready == "True" => Ok(new),
            same => Err(Failure(format!("{same}, Ready={ready}"))),
        }
    })?;
    c.wait("the new one by HBONE", || named(c, "lost", &new))?;
    c.wait("the old namespace to be let go of", || {
        match c.run_rig("netns", &["b", "held", &namespace, &old])?.as_str() {
            "0" => Ok(()),
            held => Err(Failure(format!("held by {held} processes"))),
        }
    })?;
    let output = load.wait_with_output().doing("load")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    has(&said, " failed=0")?;
    c.kubectl(&["-n", "shop", "delete", "pod", "lost", "--wait=false"])?;
    Ok(format!("{old} vanished, {new} is in the mesh; its neighbour meanwhile: {said}"))
}

/// A pod of the mesh that asks once, as a whole.
fn one_more(c: &Cluster, name: &str) -> Result<(), Failure> {
    c.apply(&once(name, "front"))?;
    c.wait("a new pod to ask", || match phase(c, "front", name)?.as_str() {
        "Succeeded" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    has(&c.kubectl(&["-n", "front", "logs", name])?, HELLO)?;
    c.kubectl(&["-n", "front", "delete", "pod", name, "--wait=false"]).map(drop)
}

/// Somebody installs the tunnels a second time beside the first.
pub(super) fn two_agents(c: &Cluster) -> Result<String, Failure> {
    const SECOND: &str = "ztunnel-two";
    let there = c.kubectl(&["-n", "istio-system", "get", "daemonset", "ztunnel", "-o", "json"])?;
    let mut second: Value = serde_json::from_str(&there).doing("the DaemonSet")?;
    second["metadata"] = json!({ "name": SECOND, "namespace": "istio-system" });
    second["spec"]["selector"]["matchLabels"]["app"] = json!(SECOND);
    second["spec"]["template"]["metadata"]["labels"]["app"] = json!(SECOND);
    if let Some(object) = second.as_object_mut() {
        object.remove("status");
    }
    let load = c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", URL, "50"])?;
    c.apply(&second.to_string())?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset", SECOND, "--timeout=60s"])?;
    one_more(c, "with-two")?;
    c.kubectl(&["-n", "istio-system", "delete", "daemonset", SECOND, "--cascade=foreground"])?;
    one_more(c, "with-one")?;
    let output = load.wait_with_output().doing("load")?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    has(&said, " failed=0")?;
    tunnelled(c, CLIENT)?;
    Ok(format!("pods start beside two and after the second has gone; {said}"))
}
