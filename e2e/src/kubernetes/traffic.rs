//! Checks of what holds for the traffic of a namespace with a waypoint.

use ambit_testing::Failure;

use super::checks::CLIENT;
use super::{Cluster, has};

/// A waypoint, a fault for those who ask for it, and a rule of which a part is refused.
const OBJECTS: &str = "\
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: waypoint, namespace: shop}
spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}
---
apiVersion: ambit.dev/v1alpha1
kind: TrafficPolicy
metadata: {name: web, namespace: shop}
spec:
  targetRefs: [{group: '', kind: Service, name: web}]
  rateLimits: [{requests: 5, per: 1h, by: Client}]
---
apiVersion: networking.istio.io/v1
kind: DestinationRule
metadata: {name: web, namespace: shop}
spec: {host: web, trafficPolicy: {loadBalancer: {simple: ROUND_ROBIN}}, subsets: [{name: v1}]}
";

/// The Gateway's waypoint as these say, and then without them.
const PARAMETERS: &str = "\
apiVersion: ambit.dev/v1alpha1
kind: WaypointParameters
metadata: {name: busy, namespace: shop}
spec:
  resources: {requests: {memory: 40Mi}}
  autoscaling: {minReplicas: 2, maxReplicas: 3}
  disruptionBudget: {maxUnavailable: 1}
---
apiVersion: gateway.networking.k8s.io/v1
kind: Gateway
metadata: {name: run, namespace: shop}
spec:
  gatewayClassName: istio-waypoint
  listeners: [{name: mesh, port: 15008, protocol: HBONE}]
  infrastructure:
    labels: {team: shop}
    parametersRef: {group: ambit.dev, kind: WaypointParameters, name: busy}
";

/// Parameters are validated, and in force in the objects of a waypoint; what they asked for goes with them.
pub(super) fn parameters(c: &Cluster) -> Result<String, Failure> {
    match c.apply(&PARAMETERS.replace("minReplicas: 2", "minReplicas: 9")) {
        Ok(()) => return Err(Failure::new("more at least than at most was taken")),
        Err(refused) => has(&refused.0, "maxReplicas is at least minReplicas")?,
    }
    let field = |what: &[&str], path: &str| c.field(&[&["-n", "shop"], what].concat(), path);
    let deployment = ["deployment", "run"];
    // A number first, and then an autoscaler in its place: nobody sees one pod in between.
    c.apply(&PARAMETERS.replace("autoscaling: {minReplicas: 2, maxReplicas: 3}", "replicas: 3"))?;
    c.wait("three replicas", || has(&field(&deployment, "{.spec.replicas}")?, "3"))?;
    c.apply(PARAMETERS)?;
    c.wait("the autoscaler", || has(&field(&["hpa", "run"], "{.spec.maxReplicas}")?, "3"))?;
    let start = std::time::Instant::now();
    while start.elapsed() < std::time::Duration::from_secs(3) {
        let replicas = field(&deployment, "{.spec.replicas}")?;
        if !matches!(replicas.as_str(), "2" | "3") {
            return Err(Failure(format!("{replicas} replicas where the autoscaler took over from 3")));
        }
    }
    c.wait("the deployment as its parameters say", || {
        let path = "{.spec.template.spec.containers[0].resources.requests.memory} {.metadata.labels.team}";
        has(&field(&deployment, path)?, "40Mi shop")
    })?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/run", "--timeout=60s"])?;
    c.wait("the budget to count them", || has(&field(&["pdb", "run"], "{.status.expectedPods}")?, "3"))?;
    // What the API server refuses is said on the Gateway, and what runs goes on.
    c.apply(&PARAMETERS.replace("memory: 40Mi}}", "memory: 40Mi}, limits: {memory: 20Mi}}"))?;
    c.wait("the refusal in status", || {
        let path = "{.status.conditions[?(@.type==\"Programmed\")].message}";
        has(&field(&["gateway", "run"], path)?, "must be less than or equal to memory limit")
    })?;
    c.apply(PARAMETERS)?;
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/run", "--timeout=60s"])?;
    c.kubectl(&["-n", "shop", "patch", "gateway", "run", "--type=json", "-p", REMOVE])?;
    c.wait("autoscaler and budget to go", || match field(&["hpa,pdb"], "{.items[*].metadata.name}")?.as_str() {
        "" => Ok(()),
        left => Err(Failure(left.to_owned())),
    })?;
    c.kubectl(&["-n", "shop", "patch", "gateway", "run", "--type=merge", "-p", UNKNOWN])?;
    let path = "{.status.conditions[?(@.type==\"Accepted\")].message}";
    c.wait("a name that is not there to be told", || has(&field(&["gateway", "run"], path)?, "no WaypointParameters"))?;
    c.kubectl(&["-n", "shop", "delete", "gateway/run", "waypointparameters/busy"])?;
    Ok("an autoscaler and a budget, gone with what asked for them; a missing name in status".into())
}

const REMOVE: &str = r#"[{"op": "remove", "path": "/spec/infrastructure/parametersRef"}]"#;
const UNKNOWN: &str = r#"{"spec":{"infrastructure":{"parametersRef":{"group":"ambit.dev","kind":"WaypointParameters","name":"nobody"}}}}"#;

/// A waypoint comes, grows, is restarted and goes while a client asks: no request fails.
pub(super) fn under_load(c: &Cluster) -> Result<String, Failure> {
    const GATEWAY: &str = "apiVersion: gateway.networking.k8s.io/v1\nkind: Gateway\nmetadata: {name: busy, namespace: shop}\n\
                           spec: {gatewayClassName: istio-waypoint, listeners: [{name: mesh, port: 15008, protocol: HBONE}]}\n";
    c.apply(GATEWAY)?;
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/busy", "--timeout=60s"])?;
    let load = c.start(&["-n", "front", "exec", "client", "--", "ambit-app", "load", super::checks::URL, "45"])?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint=busy", "--overwrite"])?;
    let passed = || -> Result<usize, Failure> {
        let lines = c.kubectl(&["-n", "shop", "logs", "deployment/busy", "--tail=2000"])?;
        Ok(lines.lines().filter(|l| l.contains("request complete")).count())
    };
    c.wait("requests through it", || if passed()? > 20 { Ok(()) } else { Err(Failure::new("none yet")) })?;
    c.kubectl(&["-n", "shop", "scale", "deployment/busy", "--replicas=2"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/busy", "--timeout=60s"])?;
    c.kubectl(&["-n", "shop", "rollout", "restart", "deployment/busy"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/busy", "--timeout=60s"])?;
    c.wait("requests through the new ones", || if passed()? > 20 { Ok(()) } else { Err(Failure::new("none yet")) })?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint-"])?;
    c.kubectl(&["-n", "shop", "delete", "gateway/busy"])?;
    let output = load.wait_with_output().map_err(|e| Failure(e.to_string()))?;
    let said = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    has(&said, " failed=0").map(|()| said)
}

const SERVICE: &str = "{group: '', kind: Service, name: web}";
const ROUTE: &str = "{group: gateway.networking.k8s.io, kind: HTTPRoute, name: web}";

/// What the schema and its rules refuse: a target, a field, and what is said.
const WRONG: &[(&str, &str, &str)] = &[
    (SERVICE, "faults: [{abort: {httpStatus: 503, grpcStatus: 14}}]", "one of httpStatus and grpcStatus is needed"),
    (SERVICE, "faults: [{}]", "a delay or an abort is needed"),
    (SERVICE, "rateLimits: [{requests: 1, by: Header}]", "by Header needs header"),
    (SERVICE, "retries: {attempts: 99}", "should be less than or equal to 10"),
    (SERVICE, "limits: {connections: -1}", "should be greater than or equal to 0"),
    (SERVICE, "", "at least one of faults, rateLimits, retries, retryBudget, limits and ejection is needed"),
    (ROUTE, "limits: {connections: 1}", "limits, retryBudget and ejection hold for endpoints"),
    ("{group: '', kind: Service, name: web, sectionName: main}", "retries: {attempts: 1}", "sectionName names a rule"),
    ("{group: '', kind: HTTPRoute, name: web}", "retries: {attempts: 1}", "group is empty for a Service"),
];

/// A policy is validated by the API server, in force at the waypoint, and told of in its status.
pub(super) fn policies(c: &Cluster) -> Result<String, Failure> {
    for (target, field, said) in WRONG {
        let yaml = format!(
            "apiVersion: ambit.dev/v1alpha1\nkind: TrafficPolicy\nmetadata: {{name: wrong, namespace: shop}}\n\
             spec: {{targetRefs: [{target}], {field}}}\n"
        );
        match c.apply(&yaml) {
            Ok(()) => return Err(Failure(format!("{field:?} of {target} was taken"))),
            Err(refused) => has(&refused.0, said)?,
        }
    }
    c.apply(OBJECTS)?;
    c.kubectl(&["-n", "shop", "wait", "--for=condition=Programmed", "gateway/waypoint", "--timeout=60s"])?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint=waypoint", "--overwrite"])?;
    let said = |what: &str, part: &str| {
        let path = "{range .status.conditions[*]}{.type}={.status} {.message}{end}";
        c.wait(&format!("{what} to say {part:?}"), || has(&c.field(&["-n", "shop", what, "web"], path)?, part))
    };
    said("trafficpolicy", "WaypointAccepted=True Service web: rateLimits in force")?;
    said("destinationrule", "spec.subsets: not supported")?;
    c.wait("the limit to be reached", || match c.get(CLIENT, "http://web.shop/") {
        Err(refused) => has(&refused.0, "429"),
        Ok(answer) => Err(Failure(answer)),
    })?;
    // A pod of the waypoint more, by kubectl: the controller leaves the number to whoever sets it.
    c.kubectl(&["-n", "shop", "scale", "deployment/waypoint", "--replicas=2"])?;
    c.kubectl(&["-n", "shop", "rollout", "status", "deployment/waypoint", "--timeout=60s"])?;
    let replicas = c.field(&["-n", "shop", "deployment", "waypoint"], "{.status.readyReplicas}")?;
    c.kubectl(&["label", "namespace", "shop", "istio.io/use-waypoint-"])?;
    c.kubectl(&["-n", "shop", "delete", "gateway/waypoint", "trafficpolicy/web", "destinationrule/web"])?;
    c.wait("traffic without a limit", || c.get(CLIENT, "http://web.shop/"))?;
    match replicas.as_str() {
        "2" => Ok(format!("{} wrong ones refused; a rate limited; two replicas by kubectl scale", WRONG.len())),
        other => Err(Failure(format!("{other} replicas of the waypoint"))),
    }
}
