//! The checks, in the order in which a user comes to them. Each leaves the cluster as the next expects it.

use ambit_testing::Failure;

use super::{Cluster, has, now, outages, status, traffic, trouble, wire, workloads};

/// A check: what it shows, and how.
pub type Check = (&'static str, fn(&Cluster) -> Result<String, Failure>);

/// All of them.
pub const CHECKS: &[Check] = &[
    ("kubectl apply -k installs the mesh", install),
    ("two namespaces without the label talk as before", before),
    ("without it, requests can be read on the wire between the nodes", wire::plain),
    ("labelling brings running pods in, without a restart", label),
    ("in it, the wire between the nodes holds only TLS to port 15008", wire::encrypted),
    ("a service by IPv6", wire::other_family),
    ("both identities are named on both sides", identities),
    ("the server sees the client's own address", address),
    ("a client outside the mesh still reaches it", outside),
    ("a policy refuses by identity, and says so", policy),
    ("STRICT refuses plaintext and lets kubelet probes through", strict),
    ("a masqueraded client from the node's address is refused under STRICT", masqueraded),
    ("a new pod's first packet is in the mesh", first_packet),
    ("the agent away: pods inside wait, pods outside start", agent_away),
    ("a tunnel that is killed comes back, and nothing is plaintext meanwhile", killed),
    ("kubectl logs, exec and port-forward work inside the mesh", tools),
    ("a rolling update under load loses no request", rolling),
    ("the CRDs of Gateway API appear, and waypoints can be had without a restart", gateway_api),
    ("what is said of objects is in their status", status::objects),
    ("check finds nothing wrong, and then what is", status::check),
    ("a pod that cannot be enrolled has an Event that says why, and holds up nobody", trouble::event),
    ("a pod whose network namespace vanishes comes back into the mesh", trouble::vanished),
    ("two agents on each node: one answers, nothing fails, and the first takes over again", trouble::two_agents),
    ("every kind of pod", workloads::kinds),
    ("pods that start are known to every tunnel at once", workloads::acknowledgement),
    ("a hundred pods come and go under load", workloads::churn),
    ("controller and tunnels restarted under load", outages::restarts),
    ("the API server hangs and dies under load", outages::api_server),
    ("a node reboots", outages::reboot),
    ("everything dies at once and comes back", outages::all_dead),
    ("the controller away: the mesh goes on, pods outside start, pods inside wait", controller_away),
    ("a Gateway gives a namespace a waypoint, which routes and protects", waypoint),
    ("a waypoint comes, grows, is restarted and goes under load", traffic::under_load),
    ("a waypoint is run as its parameters say", traffic::parameters),
    ("policies of traffic are validated, in force, and told of", traffic::policies),
    ("the label off takes pods out, without a restart", unlabel),
    ("uninstall leaves pods running and nothing of ours", uninstall),
];

/// A waypoint for the shop, a route and a policy.
const WAYPOINT: &str = include_str!("waypoint.yaml");

pub(super) const CLIENT: &str = "front/client";
const OUTSIDER: &str = "outside/client";
pub(super) const URL: &str = "http://web.shop/";
pub(super) const HELLO: &str = "hello from web";

fn install(c: &Cluster) -> Result<String, Failure> {
    c.kubectl(&["apply", "-k", &c.manifests])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod-lite", "--timeout=90s"])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=90s"])?;
    let difference = c.try_kubectl(&["diff", "-k", &c.manifests])?;
    if !difference.status.success() {
        return Err(Failure(format!("kubectl diff is not empty: {}", String::from_utf8_lossy(&difference.stdout))));
    }
    Ok("ready; kubectl diff is empty".into())
}

fn before(c: &Cluster) -> Result<String, Failure> {
    c.kubectl(&["apply", "-f", &c.apps])?;
    for pod in ["front", "outside"] {
        c.kubectl(&["-n", pod, "wait", "--for=condition=Ready", "pod/client", "--timeout=60s"])?;
    }
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    let start = now();
    c.wait("an answer", || has(&c.get(CLIENT, URL)?, HELLO))?;
    match c.access_log(&start)?.len() {
        0 => Ok("plain, and no tunnel saw it".into()),
        n => Err(Failure(format!("{n} connections passed a tunnel"))),
    }
}

/// Layer 4 is there without Gateway API; its watches start when the CRDs appear.
fn gateway_api(c: &Cluster) -> Result<String, Failure> {
    let controllers = || c.field(&["-n", "istio-system", "pods", "-l", "app=istiod-lite"], "{.items[*].metadata.uid}");
    let before = controllers()?;
    c.run_rig("gateway-api", &[])?;
    c.kubectl(&["apply", "-k", &c.with_waypoints])?;
    // A kind that is not there is asked for once a minute.
    c.wait_for(std::time::Duration::from_secs(120), "the class to be accepted", || {
        let path = "{.status.conditions[?(@.type==\"Accepted\")].status}";
        match c.field(&["gatewayclass", "istio-waypoint"], path)?.as_str() {
            "True" => Ok(()),
            other => Err(Failure(format!("Accepted={other}"))),
        }
    })?;
    if controllers()? == before {
        Ok("the class is accepted by the controllers that ran before".into())
    } else {
        Err(Failure::new("a controller was restarted"))
    }
}

/// Uids of pods, to see that none was restarted; but those of waypoints, which may be on their way out.
fn uids(c: &Cluster) -> Result<String, Failure> {
    const APPLICATIONS: &str = "!gateway.networking.k8s.io/gateway-name";
    let of = |ns: &str| c.field(&["-n", ns, "pods", "-l", APPLICATIONS], "{.items[*].metadata.uid}");
    Ok(of("shop")? + &of("front")?)
}

fn label(c: &Cluster) -> Result<String, Failure> {
    let before = uids(c)?;
    c.kubectl(&["label", "namespace", "shop", "front", "istio.io/dataplane-mode=ambient", "--overwrite"])?;
    enrolled(c, &["shop", "front"], "enabled")?;
    if uids(c)? != before {
        return Err(Failure::new("a pod was restarted"));
    }
    tunnelled(c, CLIENT)
}

/// Waits until all pods of namespaces are annotated so.
pub(super) fn enrolled(c: &Cluster, namespaces: &[&str], value: &str) -> Result<(), Failure> {
    c.wait("the annotation on the pods", || {
        for namespace in namespaces {
            let path = "{range .items[*]}{.metadata.annotations.ambient\\.istio\\.io/redirection};{end}";
            let values = c.field(&["-n", namespace, "pods"], path)?;
            if !values.split_terminator(';').all(|v| v == value) {
                return Err(Failure(format!("{namespace}: {values:?}")));
            }
        }
        Ok(())
    })
}

/// A request that goes by HBONE: both tunnels have it in their logs.
pub(super) fn tunnelled(c: &Cluster, pod: &str) -> Result<String, Failure> {
    c.wait("a request by HBONE", || {
        let start = now();
        has(&c.get(pod, URL)?, HELLO)?;
        let lines = c.access_log(&start)?;
        let hbone = lines.iter().filter(|l| l["dst.hbone_addr"].is_string()).count();
        if hbone >= 2 { Ok(format!("{hbone} log lines with HBONE")) } else { Err(Failure(format!("{lines:?}"))) }
    })
}

fn identities(c: &Cluster) -> Result<String, Failure> {
    let start = now();
    has(&c.get(CLIENT, URL)?, HELLO)?;
    c.wait("both identities in both logs", || {
        let lines = c.access_log(&start)?;
        for direction in ["outbound", "inbound"] {
            let named = lines.iter().any(|l| {
                l["direction"] == direction
                    && l["src.identity"] == "spiffe://cluster.local/ns/front/sa/client"
                    && l["dst.identity"] == "spiffe://cluster.local/ns/shop/sa/web"
            });
            if !named {
                return Err(Failure(format!("{direction}: {lines:?}")));
            }
        }
        Ok("spiffe://cluster.local/ns/front/sa/client -> .../ns/shop/sa/web".into())
    })
}

fn address(c: &Cluster) -> Result<String, Failure> {
    let ip = c.field(&["-n", "front", "pod", "client"], "{.status.podIP}")?;
    let answer = c.get(CLIENT, URL)?;
    has(&answer, &format!("you are {ip}")).map(|()| ip)
}

fn outside(c: &Cluster) -> Result<String, Failure> {
    has(&c.get(OUTSIDER, URL)?, HELLO).map(|()| "plaintext, PERMISSIVE".into())
}

/// A request that is refused; what the client saw.
fn refused(c: &Cluster, pod: &str) -> Result<String, Failure> {
    c.wait("a refusal", || match c.get(pod, URL) {
        Ok(answer) => Err(Failure(format!("was answered: {answer}"))),
        Err(failure) => Ok(failure.0),
    })
}

fn policy(c: &Cluster) -> Result<String, Failure> {
    c.apply(
        "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: no-clients, namespace: shop}\n\
         spec: {action: DENY, rules: [{from: [{source: {principals: [cluster.local/ns/front/sa/client]}}]}]}\n",
    )?;
    let start = now();
    refused(c, CLIENT)?;
    let named = c.wait("the policy's name in the log", || {
        let lines = c.access_log(&start)?;
        let line = lines.iter().find_map(|l| l["error"].as_str().filter(|e| e.contains("shop/no-clients")));
        line.map(str::to_owned).ok_or_else(|| Failure(format!("{lines:?}")))
    })?;
    c.kubectl(&["-n", "shop", "delete", "authorizationpolicy", "no-clients"])?;
    c.wait("an answer after the policy is gone", || has(&c.get(CLIENT, URL)?, HELLO))?;
    Ok(named)
}

fn strict(c: &Cluster) -> Result<String, Failure> {
    c.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    refused(c, OUTSIDER)?;
    has(&c.get(CLIENT, URL)?, HELLO)?;
    // Probes run every second and three failures would restart it: HTTP and TCP to one port, gRPC to another, and exec.
    let restarts =
        || c.field(&["-n", "shop", "pods", "-l", "app=web"], "{.items[*].status.containerStatuses[*].restartCount}");
    let ready = || c.field(&["-n", "shop", "deployment", "web"], "{.status.readyReplicas}");
    let before = restarts()?;
    let passed = probes(c)?;
    // One a second by HTTP and one by gRPC; a probe by TCP is answered by its connection alone.
    c.wait("probes under STRICT", || match probes(c)?.saturating_sub(passed) {
        12.. => Ok(()),
        few => Err(Failure(format!("{few} probes were let in"))),
    })?;
    match (restarts()? == before, ready()?.as_str()) {
        (true, "1") => Ok("plaintext refused, mTLS goes on, probes pass".into()),
        (same, ready) => Err(Failure(format!("no restart: {same}; ready replicas {ready:?}"))),
    }
}

/// Probes of pods of the shop that the tunnels have let in.
fn probes(c: &Cluster) -> Result<u64, Failure> {
    let pods = c.field(&["-n", "istio-system", "pods", "-l", "app=ztunnel"], "{.items[*].metadata.name}")?;
    let mut sum = 0;
    for pod in pods.split_whitespace() {
        let page = format!("/api/v1/namespaces/istio-system/pods/{pod}:15020/proxy/metrics");
        let text = c.kubectl(&["get", "--raw", &page])?;
        let of_shop = |l: &&str| l.starts_with("ambit_kubelet_probes_total{") && l.contains("namespace=\"shop\"");
        let counts = text.lines().filter(of_shop).filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok());
        sum += counts.sum::<f64>() as u64;
    }
    Ok(sum)
}

fn masqueraded(c: &Cluster) -> Result<String, Failure> {
    let node = c.field(&["-n", "shop", "pods", "-l", "app=web"], "{.items[0].status.hostIP}")?;
    let url = format!("http://{node}:30080/");
    match c.get(OUTSIDER, &url) {
        Ok(answer) => return Err(Failure(format!("a NodePort client was answered: {answer}"))),
        Err(failure) => drop(failure),
    }
    c.kubectl(&["-n", "shop", "delete", "peerauthentication", "strict"])?;
    // The same way works without STRICT: it was the policy that refused.
    c.wait("the NodePort without STRICT", || has(&c.get(OUTSIDER, &url)?, HELLO))?;
    Ok(format!("refused at {url}, admitted without STRICT"))
}

/// A pod that sends one request as the first thing it does, and never again.
pub(super) fn once(name: &str, namespace: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, namespace: {namespace}}}\n\
         spec: {{restartPolicy: Never, nodeName: node-a, terminationGracePeriodSeconds: 1, containers: [{{name: c, \
         image: localhost/app:local, args: [get, \"{URL}\"]}}]}}\n"
    )
}

pub(super) fn phase(c: &Cluster, namespace: &str, name: &str) -> Result<String, Failure> {
    c.field(&["-n", namespace, "pod", name], "{.status.phase}")
}

fn first_packet(c: &Cluster) -> Result<String, Failure> {
    c.apply(
        "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: strict, namespace: shop}\n\
         spec: {mtls: {mode: STRICT}}\n",
    )?;
    refused(c, OUTSIDER)?;
    for n in 0..5 {
        let name = format!("once-{n}");
        c.apply(&once(&name, "front"))?;
        c.wait("the pod to end", || match phase(c, "front", &name)?.as_str() {
            "Succeeded" | "Failed" => Ok(()),
            other => Err(Failure(other.to_owned())),
        })?;
        let log = c.kubectl(&["-n", "front", "logs", &name])?;
        has(&log, HELLO).map_err(|f| Failure(format!("pod {n}: {f}")))?;
        c.kubectl(&["-n", "front", "delete", "pod", &name, "--wait=false"])?;
    }
    c.kubectl(&["-n", "shop", "delete", "peerauthentication", "strict"])?;
    Ok("5 pods, one request each at start, all by mutual TLS".into())
}

fn agent_away(c: &Cluster) -> Result<String, Failure> {
    // The plugin stays; nobody answers it.
    let absent = "{\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":{\"ambit.dev/absent\":\"true\"}}}}}";
    c.kubectl(&["-n", "istio-system", "patch", "daemonset", "ztunnel", "--type=merge", "-p", absent])?;
    c.wait("the tunnels to be gone", || {
        let left = c.field(&["-n", "istio-system", "pods", "-l", "app=ztunnel"], "{.items[*].metadata.name}")?;
        if left.is_empty() { Ok(()) } else { Err(Failure(left)) }
    })?;
    c.apply(&once("outsider", "outside"))?;
    c.apply(&once("insider", "front"))?;
    c.wait("the pod outside to run", || match phase(c, "outside", "outsider")?.as_str() {
        "Succeeded" | "Failed" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    let event = c.wait("an event that says why", || {
        let events = c.kubectl(&["-n", "front", "get", "events", "--field-selector=involvedObject.name=insider"])?;
        has(&events, "node agent does not answer").map(|()| "an event names the agent".to_owned())
    })?;
    if phase(c, "front", "insider")? != "Pending" {
        return Err(Failure::new("a pod of the mesh started without it"));
    }
    let present = "{\"spec\":{\"template\":{\"spec\":{\"nodeSelector\":null}}}}";
    c.kubectl(&["-n", "istio-system", "patch", "daemonset", "ztunnel", "--type=merge", "-p", present])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=90s"])?;
    c.wait("the pod inside to run", || match phase(c, "front", "insider")?.as_str() {
        "Succeeded" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    c.kubectl(&["-n", "front", "delete", "pod", "insider", "--wait=false"])?;
    c.kubectl(&["-n", "outside", "delete", "pod", "outsider", "--wait=false"])?;
    Ok(event)
}

fn killed(c: &Cluster) -> Result<String, Failure> {
    c.kubectl(&["-n", "istio-system", "delete", "pod", "-l", "app=ztunnel", "--grace-period=0", "--force"])?;
    // Straight to the pod, past any name: what is not in the mesh would be answered.
    let ip = c.field(&["-n", "shop", "pods", "-l", "app=web"], "{.items[0].status.podIP}")?;
    let mut refusals = 0;
    let start = now();
    c.wait("the tunnels to be back", || match c.get(CLIENT, &format!("http://{ip}:8080/")) {
        Ok(answer) => has(&answer, HELLO),
        Err(failure) => {
            refusals += 1;
            Err(failure)
        }
    })?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "daemonset/ztunnel", "--timeout=90s"])?;
    let lines = c.wait("the log of the new tunnels", || {
        let lines = c.access_log(&start)?;
        let found = lines.iter().any(|l| l["direction"] == "inbound" && l["src.identity"].is_string());
        if found { Ok(lines.len()) } else { Err(Failure(format!("{lines:?}"))) }
    })?;
    Ok(format!("{refusals} requests refused meanwhile, then by HBONE ({lines} log lines)"))
}

fn tools(c: &Cluster) -> Result<String, Failure> {
    has(&c.kubectl(&["-n", "front", "exec", "client", "--", "/bin/echo", "hi"])?, "hi")?;
    c.kubectl(&["-n", "shop", "logs", "deployment/web", "-c", "web"])?;
    let mut forward = c.start(&["-n", "shop", "port-forward", "deployment/web", ":8080"])?;
    let mut line = String::new();
    if let Some(out) = forward.stdout.as_mut() {
        let _ = std::io::BufRead::read_line(&mut std::io::BufReader::new(out), &mut line);
    }
    let _ = forward.kill();
    let _ = forward.wait();
    has(&line, "Forwarding from")?;
    Ok(line.trim().to_owned())
}

fn unlabel(c: &Cluster) -> Result<String, Failure> {
    let before = uids(c)?;
    c.kubectl(&["label", "namespace", "shop", "front", "istio.io/dataplane-mode-"])?;
    enrolled(c, &["shop", "front"], "")?;
    if uids(c)? != before {
        return Err(Failure::new("a pod was restarted"));
    }
    c.wait("plain requests", || {
        let start = now();
        has(&c.get(CLIENT, URL)?, HELLO)?;
        match c.access_log(&start)?.iter().filter(|l| l["policy"] != "kubelet probe").count() {
            0 => Ok("plain, and no tunnel saw it".into()),
            n => Err(Failure(format!("{n} connections passed a tunnel"))),
        }
    })
}

fn rolling(c: &Cluster) -> Result<String, Failure> {
    c.kubectl(&["-n", "shop", "scale", "deployment", "web", "--replicas=2"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    enrolled(c, &["shop"], "enabled")?;
    let load = c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", URL, "12"])?;
    c.kubectl(&["-n", "shop", "set", "env", "deployment/web", "VERSION=2"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/web", "--timeout=90s"])?;
    let output = load.wait_with_output().map_err(|e| Failure(e.to_string()))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    c.kubectl(&["-n", "shop", "scale", "deployment", "web", "--replicas=1"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/web", "--timeout=60s"])?;
    has(&text, " failed=0").map(|()| text.trim().to_owned())
}

fn controller_away(c: &Cluster) -> Result<String, Failure> {
    c.kubectl(&["-n", "istio-system", "scale", "deployment", "istiod-lite", "--replicas=0"])?;
    c.wait("the controller to be gone", || {
        let left = c.field(&["-n", "istio-system", "pods", "-l", "app=istiod-lite"], "{.items[*].metadata.name}")?;
        if left.is_empty() { Ok(()) } else { Err(Failure(left)) }
    })?;
    let goes_on = tunnelled(c, CLIENT)?;
    c.apply(&once("outsider", "outside"))?;
    c.apply(&once("insider", "front"))?;
    c.wait("the pod outside to run", || match phase(c, "outside", "outsider")?.as_str() {
        "Succeeded" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    c.wait("an event that says why", || {
        let events = c.kubectl(&["-n", "front", "get", "events", "--field-selector=involvedObject.name=insider"])?;
        has(&events, "the controller does not know it on this node")
    })?;
    if phase(c, "front", "insider")? != "Pending" {
        return Err(Failure::new("a pod of the mesh started though nobody could say what it may do"));
    }
    c.kubectl(&["-n", "istio-system", "scale", "deployment", "istiod-lite", "--replicas=2"])?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod-lite", "--timeout=90s"])?;
    c.wait("the pod inside to run", || match phase(c, "front", "insider")?.as_str() {
        "Succeeded" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    c.kubectl(&["-n", "front", "delete", "pod", "insider", "--wait=false"])?;
    c.kubectl(&["-n", "outside", "delete", "pod", "outsider", "--wait=false"])?;
    Ok(goes_on)
}

fn uninstall(c: &Cluster) -> Result<String, Failure> {
    // From inside the mesh, so that there is something to leave behind.
    c.kubectl(&["label", "namespace", "shop", "front", "istio.io/dataplane-mode=ambient", "--overwrite"])?;
    enrolled(c, &["shop", "front"], "enabled")?;
    tunnelled(c, CLIENT)?;
    let before = uids(c)?;
    c.kubectl(&["-n", "istio-system", "delete", "daemonset", "ztunnel", "--cascade=foreground"])?;
    let waypoints = c.try_kubectl(&["get", "gatewayclass", "istio-waypoint"])?.status.success();
    let applied = if waypoints { &c.with_waypoints } else { &c.manifests };
    c.kubectl(&["delete", "-k", applied, "--ignore-not-found"])?;
    c.wait("plain requests", || has(&c.get(CLIENT, URL)?, HELLO))?;
    if uids(c)? != before {
        return Err(Failure::new("a pod was restarted"));
    }
    // A conflist that was left behind would keep it from starting.
    c.apply(&once("after", "front"))?;
    c.wait("a new pod to run", || match phase(c, "front", "after")?.as_str() {
        "Succeeded" => Ok(()),
        other => Err(Failure(other.to_owned())),
    })?;
    let left = c.try_kubectl(&["get", "namespace", "istio-system"])?;
    if left.status.success() {
        return Err(Failure::new("the namespace is still there"));
    }
    Ok("pods go on in plaintext, new ones start".into())
}

/// What a request answers, also where it is refused.
fn answer(c: &Cluster, url: &str) -> String {
    c.get(CLIENT, url).unwrap_or_else(|refused| refused.0)
}

fn waypoint(c: &Cluster) -> Result<String, Failure> {
    c.apply(WAYPOINT)?;
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=60s"])?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint=waypoint", "--overwrite"])?;
    c.wait("the route to answer", || has(&answer(c, "http://web.shop/moved"), "301 Moved"))?;
    c.wait("the policy to refuse", || has(&answer(c, "http://web.shop/private"), "403 Forbidden"))?;
    has(&c.get(CLIENT, URL)?, HELLO)?;
    let lines = c.kubectl(&["-n", "shop", "logs", "deployment/waypoint"])?;
    has(&lines, "explicitly denied by: shop/no-private")?;
    has(&lines, "spiffe://cluster.local/ns/front/sa/client")?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint-"])?;
    c.kubectl(&["-n", "shop", "delete", "gateway/waypoint", "httproute/web", "authorizationpolicy/no-private"])?;
    c.wait("the waypoint to go with its Gateway", || {
        let left = c.field(&["-n", "shop", "deployments"], "{.items[*].metadata.name}")?;
        if left == "web" { Ok(()) } else { Err(Failure(format!("still there: {left}"))) }
    })?;
    c.wait("the server without it", || has(&c.get(CLIENT, "http://web.shop/private")?, HELLO))?;
    Ok("programmed, routed (301) and refused (403) by it; it went with its Gateway".into())
}
