//! Checks of what users are told of their objects.

use ambit_testing::Failure;

use super::{Cluster, has};

/// Objects that can be used, in part, or not at all.
const OBJECTS: &str = "\
apiVersion: networking.istio.io/v1
kind: ServiceEntry
metadata: {name: away, namespace: shop}
spec: {hosts: [away.example], resolution: DNS, ports: [{number: 80, name: http, protocol: HTTP}]}
---
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: partly, namespace: outside}
spec: {action: DENY, rules: [{to: [{operation: {methods: [GET], ports: ['9999']}}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: HTTPRoute
metadata: {name: nowhere, namespace: shop}
spec: {parentRefs: [{group: '', kind: Service, name: nobody, port: 80}], rules: [{backendRefs: [{name: web, port: 80}]}]}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: foreign, namespace: shop}
spec: {gatewayClassName: somebody-elses, listeners: [{name: l, port: 80, protocol: HTTP}]}
";

/// A policy that says nothing that we understand.
const WRONG: &str = "\
apiVersion: security.istio.io/v1
kind: AuthorizationPolicy
metadata: {name: wrong, namespace: outside}
spec: {action: DENY, rules: [{from: [{source: {ipBlocks: [10.0.0.0/99]}}]}]}
";

/// What is said of objects is in their status.
pub(super) fn objects(c: &Cluster) -> Result<String, Failure> {
    c.apply(OBJECTS)?;
    let said = |what: &[&str], path: &str, part: &str| -> Result<String, Failure> {
        c.wait(&format!("{what:?} to say {part:?}"), || {
            let text = c.field(what, path)?;
            has(&text, part).map(|()| text)
        })
    };
    let condition =
        "{range .status.conditions[*]}{.type}={.status} {.reason} {.observedGeneration}: {.message}{\"\\n\"}{end}";
    let partly = ["-n", "outside", "authorizationpolicy", "partly"];
    said(&partly, condition, "ZtunnelAccepted=True PartiallyInvalid 1: ")?;
    let parents = "{range .status.parents[*]}{.controllerName} {.conditions[0].type}={.conditions[0].status} {.conditions[0].message}{end}";
    let route = said(&["-n", "shop", "httproute", "nowhere"], parents, "Accepted=False")?;
    has(&route, "no Service shop/nobody")?;
    let address = said(&["-n", "shop", "serviceentry", "away"], "{.status.addresses[*].value}", "240.240.")?;
    // A wrong value is refused by the API server where the CRD can tell, else in status.
    let refused = c.apply(WRONG).map_or_else(
        |refused| Ok(refused.0),
        |()| said(&["-n", "outside", "authorizationpolicy", "wrong"], condition, "Accepted=False Invalid"),
    )?;
    has(&refused, "10.0.0.0/99")?;
    if c.field(&["-n", "shop", "gateway", "foreign"], "{.status.conditions[*].message}")?.contains("waypoint") {
        return Err(Failure::new("the status of somebody else's Gateway was written"));
    }
    // Addresses stay over a change of the replica that writes.
    let leader = || c.field(&["-n", "istio-system", "lease", "ambit-istiod-lite"], "{.spec.holderIdentity}");
    let old = leader()?;
    c.kubectl(&["-n", "istio-system", "delete", "pod", &old])?;
    c.wait("another replica to lead", || match leader()? {
        new if new != old && !new.is_empty() => Ok(()),
        other => Err(Failure(other)),
    })?;
    c.kubectl(&["-n", "istio-system", "rollout", "status", "deployment/istiod-lite", "--timeout=90s"])?;
    let now = c.field(&["-n", "shop", "serviceentry", "away"], "{.status.addresses[*].value}")?;
    if now != address {
        return Err(Failure(format!("the address was {address}, and is {now}")));
    }
    c.kubectl(&["-n", "shop", "delete", "serviceentry/away", "httproute/nowhere", "gateway/foreign"])?;
    c.kubectl(&["-n", "outside", "delete", "authorizationpolicy", "--all"])?;
    Ok(format!("policy, route, address {address}; kept when {old} led no more"))
}

/// `istiod-lite check` finds nothing, and then what is wrong.
pub(super) fn check(c: &Cluster) -> Result<String, Failure> {
    let Some(program) = &c.check else { return Ok("not run: CHECK names no program".into()) };
    let run = || -> Result<(Option<i32>, String), Failure> {
        let output = std::process::Command::new(program).output().map_err(|e| Failure(format!("{program}: {e}")))?;
        let text = [output.stdout, output.stderr].concat();
        Ok((output.status.code(), String::from_utf8_lossy(&text).into_owned()))
    };
    c.wait("a mesh with nothing wrong", || match run()? {
        (Some(0), _) => Ok(()),
        (code, text) => Err(Failure(format!("{code:?}: {text}"))),
    })?;
    c.kubectl(&["label", "namespace", "outside", "istio.io/data-plane-mode=ambient"])?;
    c.apply(
        "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: closed, namespace: shop}\n\
         spec: {podSelector: {matchLabels: {app: web}}, ingress: [{ports: [{port: 8080}]}]}\n",
    )?;
    let (code, text) = run()?;
    c.kubectl(&["label", "namespace", "outside", "istio.io/data-plane-mode-"])?;
    c.kubectl(&["-n", "shop", "delete", "networkpolicy", "closed"])?;
    has(
        &text,
        "Namespace outside: label istio.io/data-plane-mode means nothing; did you mean istio.io/dataplane-mode?",
    )?;
    has(&text, "NetworkPolicy shop/closed: lets nothing to port 15008")?;
    if code == Some(1) {
        Ok("nothing at first; then a typing mistake and a closed port, exit status 1".into())
    } else {
        Err(Failure(format!("exit status {code:?}")))
    }
}
