//! What is told where something of a pod or its node is wrong.

use ambit_testing::Failure;

use super::{Cluster, has};

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
