//! Checks in which something of the mesh or of the cluster goes away and comes back.

use ambit_testing::Failure;

use super::checks::{CLIENT, HELLO, URL, enrolled, tunnelled};
use super::{Cluster, NO_RIG, has, now};

fn load(c: &Cluster, seconds: &str) -> Result<std::process::Child, Failure> {
    c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", URL, seconds])
}

fn end(load: std::process::Child) -> Result<String, Failure> {
    let output = load.wait_with_output().map_err(|e| Failure(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    let last = text.lines().find(|l| l.contains(" failed="));
    last.map(str::to_owned).ok_or_else(|| Failure(format!("no figures: {text}")))
}

/// Connections to the server since a time that came in plaintext and were no probes.
fn plaintext(c: &Cluster, since: &str) -> Result<Vec<serde_json::Value>, Failure> {
    let lines = c.access_log(since)?.into_iter();
    let plain = |l: &serde_json::Value| {
        l["direction"] == "inbound"
            && !l["src.identity"].is_string()
            && l["policy"] != "kubelet probe"
            && l["error"].is_null()
    };
    Ok(lines.filter(plain).collect())
}

/// The controller and then the tunnels are restarted while a client asks.
pub(super) fn restarts(c: &Cluster) -> Result<String, Failure> {
    let start = now();
    let asking = load(c, "10")?;
    c.kubectl(&["-n", "istio-system", "rollout", "restart", "deployment/istiod-lite"])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod-lite", "--timeout=90s"])?;
    let controller = end(asking)?;
    has(&controller, " failed=0")?;
    let asking = load(c, "45")?;
    c.kubectl(&["-n", "istio-system", "rollout", "restart", "daemonset/ztunnel"])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=90s"])?;
    let tunnels = end(asking)?;
    // The next tunnel of a node takes over before the old one lets go.
    has(&tunnels, " failed=0")?;
    let plain = plaintext(c, &start)?;
    if !plain.is_empty() {
        return Err(Failure(format!("plaintext: {plain:?}")));
    }
    c.wait("requests by HBONE again", || tunnelled(c, CLIENT))?;
    Ok(format!("controller: {controller}; tunnels: {tunnels}, none in plaintext"))
}

/// A kubelet takes most of a minute before it starts pods again; the mesh is there a second or two after that.
const REBOOT: std::time::Duration = std::time::Duration::from_secs(180);

/// The API server hangs, then is killed; the mesh goes on and catches up.
pub(super) fn api_server(c: &Cluster) -> Result<String, Failure> {
    if c.rig.is_none() {
        return Ok(NO_RIG.into());
    }
    // kubectl exec needs the API server: the client asks in the background, and says afterwards how it went.
    let ask = "ambit-app load http://web.shop/ 20 > /tmp/load.txt 2>&1 &";
    c.kubectl(&["-n", "front", "exec", "client", "--", "/bin/sh", "-c", ask])?;
    c.run_rig("api-server", &["stop"])?;
    std::thread::sleep(std::time::Duration::from_secs(12));
    c.run_rig("api-server", &["go"])?;
    c.run_rig("api-server", &["kill"])?;
    c.wait("the API server to be back", || c.kubectl(&["get", "--raw", "/readyz"]).map(drop))?;
    let said = c.wait("the load to end", || {
        let text = c.kubectl(&["-n", "front", "exec", "client", "--", "/bin/cat", "/tmp/load.txt"])?;
        has(&text, " failed=").map(|()| text)
    })?;
    has(&said, " failed=0")?;
    // It converges: a change made now is seen.
    c.kubectl(&["label", "namespace", "outside", "istio.io/dataplane-mode=ambient", "--overwrite"])?;
    enrolled(c, &["outside"], "enabled")?;
    c.kubectl(&["label", "namespace", "outside", "istio.io/dataplane-mode-"])?;
    enrolled(c, &["outside"], "")?;
    Ok(format!("12 s of silence and a restart: {}; a label set afterwards is obeyed", said.trim()))
}

/// A node loses all its processes at once and starts again.
pub(super) fn reboot(c: &Cluster) -> Result<String, Failure> {
    if c.rig.is_none() {
        return Ok(NO_RIG.into());
    }
    c.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    let start = now();
    c.run_rig("reboot", &["b"])?;
    c.wait("the node to be ready", || {
        match c.field(&["node", "node-b"], "{.status.conditions[?(@.type==\"Ready\")].status}")?.as_str() {
            "True" => Ok(()),
            other => Err(Failure(other.to_owned())),
        }
    })?;
    c.wait_for(REBOOT, "an answer after it", || has(&c.get(CLIENT, URL)?, HELLO))?;
    let plain = plaintext(c, &start)?;
    if !plain.is_empty() {
        return Err(Failure(format!("plaintext: {plain:?}")));
    }
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=180s"])?;
    c.kubectl(&["-n", "shop", "delete", "peerauthentication", "strict"])?;
    tunnelled(c, CLIENT)
}

/// Everything dies at once: both nodes and the control plane.
pub(super) fn all_dead(c: &Cluster) -> Result<String, Failure> {
    if c.rig.is_none() {
        return Ok(NO_RIG.into());
    }
    let start = std::time::Instant::now();
    c.run_rig("api-server", &["kill"])?;
    c.run_rig("reboot", &["a", "b"])?;
    c.wait("the API server to be back", || c.kubectl(&["get", "--raw", "/readyz"]).map(drop))?;
    c.wait_for(REBOOT, "an answer", || has(&c.get(CLIENT, URL)?, HELLO))?;
    let by = c.wait("a request by HBONE", || tunnelled(c, CLIENT))?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod-lite", "--timeout=180s"])?;
    Ok(format!("{by} after {:.0} s", start.elapsed().as_secs_f32()))
}
