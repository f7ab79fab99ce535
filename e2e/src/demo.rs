//! The demo: one line of evidence for each thing that a mesh must do, and a status that says whether all of it held.

use std::io::Write;
use std::os::fd::AsFd;
use std::time::Instant;

use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::wire::{self, Capture};
use ambit_testing::{Doing, Failure, topology};
use serde_json::Value;

mod layer7;
mod stress;

use crate::{CLIENT, OUTSIDER, SHOP, WEB, exec, expect, shop};

/// Short, so that a rotation happens while one watches.
const CERTIFICATE_TTL: std::time::Duration = std::time::Duration::from_secs(16);

const DENY: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: no-front
  namespace: shop
spec:
  action: DENY
  rules:
  - from:
    - source:
        namespaces: [front]
";

const BROKEN: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata:
  name: typing-mistake
  namespace: shop
spec:
  action: DENY
  rules:
  - from:
    - source:
        ipBlocks: [10.0.0.0/99]
";

/// Runs the demo; the exit status.
pub async fn run(stay: bool) -> Result<u8, Failure> {
    let work = async {
        let started = Instant::now();
        progress("starting a controller, two nodes and three pods");
        let mut mesh = shop(Options { certificate_ttl: CERTIFICATE_TTL, traces: true, ..Options::default() }).await?;
        shown(
            true,
            &format!(
                "ready after {:.1} s: istiod-lite, a ztunnel on each of two nodes, three pods",
                started.elapsed().as_secs_f64()
            ),
        );
        let all = show(&mut mesh).await;
        let took = started.elapsed().as_secs_f64();
        if all {
            println!("\nEverything held, in {took:.0} s.");
        } else {
            println!("\nNot everything held.");
        }
        if stay {
            remain(&mesh).await?;
        }
        Ok::<bool, Failure>(all)
    };
    tokio::select! {
        all = work => Ok(u8::from(!all?)),
        _ = tokio::signal::ctrl_c() => {
            println!("\nending");
            Ok(if stay { 0 } else { 130 })
        }
    }
}

fn progress(text: &str) {
    println!("   ... {text}");
    // Progress is for whoever watches; nobody may.
    let _ = std::io::stdout().flush();
}

fn shown(good: bool, text: &str) {
    println!("{} {text}", if good { "[ok]" } else { "[FAILED]" });
    let _ = std::io::stdout().flush();
}

async fn show(mesh: &mut Mesh) -> bool {
    let mut all = true;
    macro_rules! step {
        ($what:literal, $step:expr) => {
            progress($what);
            match $step.await {
                Ok(evidence) => shown(true, &evidence),
                Err(failure) => {
                    all = false;
                    shown(false, &format!("{}: {failure}", $what));
                }
            }
        };
    }
    step!("a client asks for a service by name, while the wire between the nodes is captured", by_name(mesh));
    step!("reading both proxies' logs", identities(mesh));
    step!("a client outside the mesh asks", outside(mesh));
    step!("labelling its namespace while it holds a connection", label(mesh));
    step!("dropping an AuthorizationPolicy into the directory while a connection is held", policy(mesh));
    step!("deleting it", policy_gone(mesh));
    step!("writing a policy with a typing mistake", broken(mesh));
    step!("waiting for a certificate to be rotated under load", rotation(mesh));
    println!("\nAct two: layer 7");
    step!("applying a Gateway and labelling the namespace with it", layer7::waypoint(mesh));
    step!("a canary: nine in ten to the old version, one to the new", layer7::canary(mesh));
    step!("A and B by a header", layer7::by_header(mesh));
    step!("guarding a path with a policy", layer7::guarded(mesh));
    step!("guarding a path with tokens", layer7::tokens(mesh));
    step!("following one request", layer7::trace(mesh));
    step!("blue to green by one edit, under load", layer7::blue_green(mesh));
    println!("\nAct three: trouble");
    step!("a pod that fails every request", stress::failing(mesh));
    step!("a fault made on purpose", stress::fault(mesh));
    step!("more requests at once than the service may have", stress::circuit(mesh));
    step!("more requests of one user than he may send", stress::rate(mesh));
    step!("replacing the waypoint, under load", stress::replaced(mesh));
    step!("taking the waypoint away again, under load", layer7::without(mesh));
    all
}

type Evidence = Result<String, Failure>;

async fn by_name(mesh: &mut Mesh) -> Evidence {
    let secret = format!("secret-{:016x}", std::process::id() as u64 ^ 0x5eed_5eed_5eed_5eed);
    let link = topology::link_name(mesh.nodes[0].host.number);
    let capture = Capture::start(&link)?;
    let output = mesh.exec(CLIENT, &["ambit-app", "get", &format!("http://web.shop/{secret}")]).await?;
    let frames = capture.finish();
    expect(&output, true, &format!("you asked for /{secret}"))?;
    let client = mesh.kubelet.pod("front", "client").map(|p| p.net.ips[0].to_string()).unwrap_or_default();
    expect(&output, true, &format!("you are {client};"))?;
    let segments = wire::segments(&frames);
    // What goes to the controller is not part of the request.
    let between: Vec<_> = segments.iter().filter(|s| s.to != 15012 && s.from != 15012).collect();
    let payload: usize = between.iter().map(|s| s.payload.len()).sum();
    let other = between.iter().find(|s| s.to != 15008 && s.from != 15008);
    if let Some(other) = other {
        return Err(Failure(format!("something else crossed the wire: port {} to {}", other.from, other.to)));
    }
    let first = between.iter().find(|s| s.to == 15008 && !s.payload.is_empty());
    let tls = first.is_some_and(|s| s.payload.starts_with(&[22, 3]) || s.payload.starts_with(&[23, 3]));
    if !tls || payload == 0 {
        return Err(Failure(format!("no TLS to port 15008 among {} frames", frames.len())));
    }
    if wire::holds(&frames, secret.as_bytes()) || wire::holds(&frames, b"hello from") {
        return Err(Failure::new("the payload can be read on the wire"));
    }
    Ok(format!(
        "{CLIENT} reached web.shop on the other node, which saw the client's own address {client}\n     \
         on the wire: {} TCP segments with {payload} bytes, all TLS to or from port 15008, {secret:?} in none of them",
        between.len()
    ))
}

/// The last line of a node's access log about a connection to the shop that satisfies a test.
fn line(mesh: &Mesh, node: usize, test: impl Fn(&Value) -> bool) -> Option<Value> {
    mesh.access_log(node).into_iter().rev().find(|l| test(l))
}

async fn identities(mesh: &Mesh) -> Evidence {
    let good = |l: &Value| {
        l["src.identity"] == "spiffe://cluster.local/ns/front/sa/client"
            && l["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/web"
    };
    mesh.wait("both access logs to name both identities", |m| {
        line(m, 0, |l| l["direction"] == "outbound" && good(l)).is_some()
            && line(m, 1, |l| l["direction"] == "inbound" && good(l)).is_some()
    })
    .await?;
    Ok("both proxies name spiffe://cluster.local/ns/front/sa/client and spiffe://cluster.local/ns/shop/sa/web".into())
}

fn web_address(mesh: &Mesh) -> String {
    mesh.kubelet.pod("shop", "web").map(|p| p.net.ips[0].to_string()).unwrap_or_default()
}

async fn outside(mesh: &Mesh) -> Evidence {
    let web = web_address(mesh);
    let output = mesh.exec(OUTSIDER, &["ambit-app", "get", &format!("http://{web}:8080/")]).await?;
    expect(&output, true, "hello from web")?;
    let outsider = mesh.kubelet.pod("outside", "client").map(|p| p.net.ips[0].to_string()).unwrap_or_default();
    let from = |l: &Value| l["src.addr"].as_str().is_some_and(|a| a.starts_with(&format!("{outsider}:")));
    mesh.wait("the server's proxy to log it", |m| line(m, 1, from).is_some()).await?;
    let there = line(mesh, 1, from).unwrap_or_default();
    if there.get("src.identity").is_some() || line(mesh, 0, from).is_some() {
        return Err(Failure(format!("it was not left alone: {there}")));
    }
    Ok(format!("{OUTSIDER}, whose namespace has no label, is not captured and has no identity ({outsider}, plain TCP)"))
}

async fn label(mesh: &Mesh) -> Evidence {
    let web = web_address(mesh);
    let mut held = mesh.exec_start(OUTSIDER, &["ambit-app", "hold", &format!("{web}:9000")])?;
    mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
    let labelled =
        SHOP.replace("  name: outside\n---", "  name: outside\n  labels:\n    istio.io/dataplane-mode: ambient\n---");
    let start = Instant::now();
    mesh.apply("shop.yaml", &labelled)?;
    mesh.in_mesh(&[OUTSIDER]).await?;
    let took = start.elapsed().as_millis();
    let output = mesh.exec(OUTSIDER, &["ambit-app", "get", "http://web.shop/"]).await?;
    expect(&output, true, "hello from web")?;
    let identity = "spiffe://cluster.local/ns/outside/sa/default";
    mesh.wait("its identity in the log", |m| line(m, 1, |l| l["src.identity"] == identity).is_some()).await?;
    let before = held.text().lines().count();
    mesh.wait("the held connection to go on", |_| held.text().lines().count() > before + 3).await?;
    if held.ended().is_some() {
        return Err(Failure(format!("the connection from before was lost: {}", held.text())));
    }
    Ok(format!("with the label it was in the mesh {took} ms later as {identity}; its old connection goes on"))
}

async fn policy(mesh: &Mesh) -> Evidence {
    let mut held = mesh.exec_start(CLIENT, &["ambit-app", "hold", "web.shop:9000"])?;
    mesh.wait("the connection to be held", |_| held.text().contains("held 3")).await?;
    let start = Instant::now();
    mesh.apply("policies/no-front.yaml", DENY)?;
    mesh.wait("the live connection to be cut", |_| held.ended().is_some()).await?;
    let took = start.elapsed().as_millis();
    let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
    expect(&output, false, "")?;
    let named = |l: &Value| l["error"].as_str().is_some_and(|e| e.contains("shop/no-front"));
    mesh.wait("both proxies to name the policy", |m| line(m, 0, named).is_some() && line(m, 1, named).is_some())
        .await?;
    let error = line(mesh, 0, named).unwrap_or_default()["error"].as_str().unwrap_or_default().to_owned();
    Ok(format!("the policy cut the live connection {took} ms later and refused the next one: {error}"))
}

async fn policy_gone(mesh: &Mesh) -> Evidence {
    mesh.delete("policies/no-front.yaml")?;
    let start = Instant::now();
    loop {
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        if output.success {
            return Ok(format!("without the policy traffic passes again, {} ms later", start.elapsed().as_millis()));
        }
        if start.elapsed() > ambit_testing::mesh::PATIENCE {
            return Err(Failure(output.text));
        }
    }
}

async fn broken(mesh: &Mesh) -> Evidence {
    mesh.apply("policies/broken.yaml", BROKEN)?;
    let problem = |m: &Mesh| m.debug("/debug/problems").ok().and_then(|p| p.as_array()?.first().cloned());
    mesh.wait("the controller to refuse it", |m| problem(m).is_some()).await?;
    let problem = problem(mesh).unwrap_or_default();
    let place = problem["place"].as_str().unwrap_or_default();
    let reason = problem["reason"].as_str().unwrap_or_default();
    if place != "policies/broken.yaml:11" || !reason.contains("10.0.0.0/99") {
        return Err(Failure(format!("told wrongly: {problem}")));
    }
    // Nobody knows whom it was to refuse.
    until(mesh, false, "").await?;
    mesh.delete("policies/broken.yaml")?;
    until(mesh, true, "hello from web").await?;
    Ok(format!("what it covers is closed until it is mended or gone: {place}: {reason}"))
}

/// Asks until the answer is this one.
async fn until(mesh: &Mesh, passes: bool, text: &str) -> Result<(), Failure> {
    let start = std::time::Instant::now();
    loop {
        let output = mesh.exec(CLIENT, &["ambit-app", "get", "http://web.shop/"]).await?;
        if (output.success, output.text.contains(text)) == (passes, true) {
            return Ok(());
        }
        if start.elapsed() > ambit_testing::mesh::PATIENCE {
            return expect(&output, passes, text);
        }
    }
}

async fn rotation(mesh: &Mesh) -> Evidence {
    let serial = |m: &Mesh| -> Option<String> {
        let dump = m.dump(1).ok()?;
        let all = dump["certificates"].as_array()?;
        let web = all.iter().find(|c| c["identity"] == "spiffe://cluster.local/ns/shop/sa/web")?;
        Some(web["certChain"][0]["serialNumber"].as_str()?.to_owned())
    };
    let before = serial(mesh).ok_or_else(|| Failure::new("no certificate is shown"))?;
    let load = mesh.exec(CLIENT, &["ambit-app", "load", "http://web.shop/", "12"]);
    let output = load.await?;
    let after = serial(mesh).ok_or_else(|| Failure::new("no certificate is shown"))?;
    if before == after {
        return Err(Failure(format!("serial {before} did not change within 12 s")));
    }
    expect(&output, true, " failed=0")?;
    let short = |s: &str| s.chars().take(8).collect::<String>();
    let counted = output.text.trim().to_owned();
    Ok(format!(
        "certificate {} of {WEB} became {} under load, each request a new connection: {counted}",
        short(&before),
        short(&after)
    ))
}

async fn remain(mesh: &Mesh) -> Result<(), Failure> {
    let pid = std::env::var(exec::PID).unwrap_or_else(|_| "PID".into());
    let listener = std::io::stdin().as_fd().try_clone_to_owned().doing("take the socket")?;
    exec::serve(listener.into(), mesh);
    println!(
        "\nThe mesh stays until Ctrl-C. The directory that the first line names holds\n  \
           mesh/            the YAML; edit it, add files, delete them\n  \
           overlay/         what the cluster would write: addresses, status\n  \
           logs/            of istiod-lite and each ztunnel; pods' own in kubelet/logs/\n\
         Run a command in a pod, from another terminal:\n  \
           cargo demo -- exec {pid} {CLIENT} ambit-app get http://web.shop/\n\
         Metrics, the configuration dump and the controller's view, likewise from a pod's node or the controller:\n  \
           cargo demo -- exec {pid} node1 ambit-app get http://127.0.0.1:15020/metrics\n  \
           cargo demo -- exec {pid} node1 ambit-app get http://127.0.0.1:15000/config_dump\n  \
           cargo demo -- exec {pid} control ambit-app get http://127.0.0.1:8080/debug/"
    );
    std::future::pending().await
}
