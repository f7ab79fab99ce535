//! The controller's two services, asked by everybody who should and should not.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::time::Duration;

use ambit_e2e::shop;
use ambit_model::Identity;
use ambit_testing::mesh::{Mesh, Options};
use ambit_testing::tokens::{Claims, Issuer};
use ambit_testing::{Doing, Failure, sandbox};
use ambit_xds::ca::CaClient;
use ambit_xds::channel::ControlPlane;
use ambit_xds::proto::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Status};
use ambit_xds::{ADDRESS, AUTHORIZATION, NODE_POD, WAYPOINT_SERVICE, service};
use tokio::sync::mpsc;

fn control_plane(mesh: &Mesh, name: &str, token: &str) -> Result<ControlPlane, Failure> {
    let token_file: PathBuf = mesh.files.join(format!("token-{name}"));
    std::fs::write(&token_file, token).doing("write a token")?;
    Ok(ControlPlane {
        address: format!("https://{}:15012", mesh.control.ip),
        root_file: mesh.files.join("state/root-cert.pem"),
        alt_hostname: Some("istiod.istio-system.svc".into()),
        token_file,
        cluster_id: "Kubernetes".into(),
        headers: Vec::new(),
    })
}

fn as_node(mesh: &Mesh, node: &str) -> Result<ControlPlane, Failure> {
    control_plane(mesh, node, &mesh.issuer.issue(&Claims::ztunnel(node))?)
}

/// A stream, driven by hand.
struct Stream {
    requests: mpsc::Sender<DeltaDiscoveryRequest>,
    responses: ambit_e2e::Responses,
}

impl Stream {
    async fn open(control_plane: &ControlPlane) -> Result<Self, Failure> {
        let (requests, receiver) = mpsc::channel(8);
        let stream = ambit_e2e::requests(receiver);
        let call = control_plane.authorize(stream).await.doing("authorize")?;
        let channel = control_plane.channel().doing("channel")?;
        let answer =
            service::delta(channel, call).await.map_err(|s| Failure(format!("{}: {}", s.code(), s.message())))?;
        Ok(Self { requests, responses: answer.into_inner() })
    }

    async fn send(&self, request: DeltaDiscoveryRequest) -> Result<(), Failure> {
        self.requests.send(request).await.doing("send")
    }

    async fn next(&mut self) -> Result<DeltaDiscoveryResponse, Failure> {
        let next = tokio::time::timeout(Duration::from_secs(10), self.responses.message()).await;
        let next = next.doing("no response in ten seconds")?;
        next.map_err(|s| Failure(format!("{}: {}", s.code(), s.message())))?
            .ok_or_else(|| Failure::new("the stream has ended"))
    }

    /// Asks for all of a type and acknowledges the answer.
    async fn all(&mut self, type_url: &str, held: HashMap<String, String>) -> Result<DeltaDiscoveryResponse, Failure> {
        let request = DeltaDiscoveryRequest {
            type_url: type_url.into(),
            initial_resource_versions: held,
            ..DeltaDiscoveryRequest::default()
        };
        self.send(request).await?;
        let response = self.next().await?;
        self.ack(&response, None).await?;
        Ok(response)
    }

    async fn ack(&self, response: &DeltaDiscoveryResponse, error: Option<&str>) -> Result<(), Failure> {
        self.send(DeltaDiscoveryRequest {
            type_url: response.type_url.clone(),
            response_nonce: response.nonce.clone(),
            error_detail: error.map(|message| Status { code: 3, message: message.into() }),
            ..DeltaDiscoveryRequest::default()
        })
        .await
    }
}

fn refused<T>(result: Result<T, impl ToString>, expected: &str) -> Result<(), Failure> {
    match result {
        Ok(_) => Err(Failure(format!("not refused; expected {expected:?}"))),
        Err(error) if error.to_string().contains(expected) => Ok(()),
        Err(error) => Err(Failure(format!("expected {expected:?}, got {:?}", error.to_string()))),
    }
}

#[test]
fn wrong_callers_are_refused_for_every_resource() {
    sandbox::test("wrong_callers_are_refused_for_every_resource", || async {
        let mesh = shop(Options::default()).await?;
        let web = Identity::new("cluster.local", "shop", "web");
        let stranger = Issuer::new()?;
        let node1 = Claims::ztunnel("node1");
        let pod = Claims { namespace: "shop".into(), account: "web".into(), ..node1.clone() };
        let expired = Claims { lifetime: Duration::ZERO, expired: Duration::from_secs(5), ..node1.clone() };
        let audience = Claims { audience: "vault".into(), ..node1.clone() };
        let unbound = Claims { node: None, ..node1.clone() };
        for (name, token, expected) in [
            ("none", String::new(), "no token"),
            ("rubbish", "rubbish".into(), "not a JWT"),
            ("stranger", stranger.issue(&node1)?, "not known"),
            ("expired", mesh.issuer.issue(&expired)?, "ExpiredSignature"),
            ("audience", mesh.issuer.issue(&audience)?, "InvalidAudience"),
            ("unbound", mesh.issuer.issue(&unbound)?, "no node claim"),
            ("pod", mesh.issuer.issue(&pod)?, "shop/web is neither a node account nor that of a waypoint"),
        ] {
            let control_plane = control_plane(&mesh, name, &token)?;
            let named = |f: Failure| Failure(format!("{name}: {f}"));
            refused(Stream::open(&control_plane).await, expected).map_err(named)?;
            let ca = CaClient::new(control_plane, Duration::from_secs(60)).doing("client")?;
            refused(ca.fetch(&web).await, expected).map_err(named)?;
        }
        // A node account gets certificates for pods of its own node only.
        let one = CaClient::new(as_node(&mesh, "node1")?, Duration::from_secs(60)).doing("client")?;
        let two = CaClient::new(as_node(&mesh, "node2")?, Duration::from_secs(60)).doing("client")?;
        two.fetch(&web).await.doing("node2 for its own pod")?;
        refused(one.fetch(&web).await, "no pod with account shop/web is known on node node1")?;
        refused(
            two.fetch(&Identity::new("other.domain", "shop", "web")).await,
            "another trust domain; expected cluster.local",
        )?;
        refused(two.fetch(&Identity::new("cluster.local", "shop", "nobody")).await, "no pod with account shop/nobody")?;
        // And sees the pods of its own node only.
        let mut stream = Stream::open(&as_node(&mesh, "node2")?).await?;
        let pods = stream.all(NODE_POD, HashMap::new()).await?;
        let expected = mesh.kubelet.pod("shop", "web").map(|p| p.uid);
        let names: Vec<String> = pods.resources.iter().map(|r| r.name.clone()).collect();
        if Some(names.clone()) != expected.map(|uid| vec![uid]) {
            return Err(Failure(format!("node2 sees {names:?}")));
        }
        stream
            .send(DeltaDiscoveryRequest {
                type_url: "type.googleapis.com/unknown".into(),
                ..DeltaDiscoveryRequest::default()
            })
            .await?;
        refused(stream.next().await, "is not served")
    });
}

#[test]
fn a_waypoint_sees_its_own_services_and_has_its_own_identity() {
    sandbox::test("a_waypoint_sees_its_own_services_and_has_its_own_identity", || async {
        let mesh = shop(Options::default()).await?;
        // A second Gateway, to which nothing is bound.
        let other =
            ambit_e2e::WAYPOINT.split("---").next().unwrap_or_default().replace("name: waypoint", "name: other");
        mesh.apply("other.yaml", &other)?;
        ambit_e2e::layer7(&mesh).await?;
        let of = |account: &str| -> Result<ControlPlane, Failure> {
            let claims = Claims { namespace: "shop".into(), account: account.into(), ..Claims::ztunnel("node1") };
            control_plane(&mesh, account, &mesh.issuer.issue(&claims)?)
        };
        let (own, other) = (of("waypoint")?, of("other")?);
        let names = |response: DeltaDiscoveryResponse| -> Vec<String> {
            response.resources.into_iter().map(|r| r.name).collect()
        };
        let mut stream = Stream::open(&own).await?;
        let bound = names(stream.all(WAYPOINT_SERVICE, HashMap::new()).await?);
        if bound != ["shop/web-v2.shop.svc.cluster.local", "shop/web.shop.svc.cluster.local"] {
            return Err(Failure(format!("the waypoint is told of {bound:?}")));
        }
        let bound = names(Stream::open(&other).await?.all(WAYPOINT_SERVICE, HashMap::new()).await?);
        if !bound.is_empty() {
            return Err(Failure(format!("another waypoint is told of {bound:?}")));
        }
        // Neither sees what is for nodes, and no node what is for waypoints.
        for (who, type_url) in [(&own, AUTHORIZATION), (&own, NODE_POD), (&as_node(&mesh, "node1")?, WAYPOINT_SERVICE)]
        {
            let mut stream = Stream::open(who).await?;
            refused(stream.all(type_url, HashMap::new()).await, "is not served to")?;
        }
        let ca = CaClient::new(own, Duration::from_secs(60)).doing("client")?;
        ca.fetch(&Identity::new("cluster.local", "shop", "waypoint")).await.doing("its own identity")?;
        for stolen in ["web", "other"] {
            let asked = ca.fetch(&Identity::new("cluster.local", "shop", stolen)).await;
            refused(asked, "it asks for its own identity only")?;
        }
        Ok(())
    });
}

#[test]
fn streams_resume_without_resending_and_tell_removals() {
    sandbox::test("streams_resume_without_resending_and_tell_removals", || async {
        let mesh = shop(Options::default()).await?;
        let node = as_node(&mesh, "node1")?;
        let mut stream = Stream::open(&node).await?;
        let empty = stream.all(AUTHORIZATION, HashMap::new()).await?;
        if !empty.resources.is_empty() {
            return Err(Failure::new("policies out of nowhere"));
        }
        let first = stream.all(ADDRESS, HashMap::new()).await?;
        let held: BTreeMap<String, String> =
            first.resources.iter().map(|r| (r.name.clone(), r.version.clone())).collect();
        if held.len() < 4 || held.values().any(String::is_empty) {
            return Err(Failure(format!("first answer: {held:?}")));
        }
        drop(stream);

        // Nothing has changed: the answer is empty. What is no longer there, and what never was, is told as removed.
        let mut stream = Stream::open(&node).await?;
        let mut claimed: HashMap<String, String> = held.clone().into_iter().collect();
        claimed.insert("Kubernetes//Pod/shop/ghost".into(), "1".into());
        let stale = claimed.keys().find(|k| k.contains("Pod/shop/web")).cloned().unwrap_or_default();
        claimed.insert(stale.clone(), "old".into());
        let again = stream.all(ADDRESS, claimed).await?;
        let sent: Vec<&String> = again.resources.iter().map(|r| &r.name).collect();
        if sent != [&stale] || again.removed_resources != ["Kubernetes//Pod/shop/ghost"] {
            return Err(Failure(format!("resumed with {sent:?}, removed {:?}", again.removed_resources)));
        }
        // A change is one resource, and its end one name.
        let entry = "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {name: vm, namespace: shop}\nspec: {address: 192.0.2.9}\n";
        mesh.apply("vm.yaml", entry)?;
        let change = stream.next().await?;
        stream.ack(&change, Some("no thanks")).await?;
        let name = "Kubernetes/networking.istio.io/WorkloadEntry/shop/vm";
        if change.resources.iter().map(|r| r.name.as_str()).collect::<Vec<_>>() != [name] {
            return Err(Failure(format!("the change: {change:?}")));
        }
        mesh.wait("the refusal on the debug page", |m| {
            m.debug("/debug/clients").is_ok_and(|c| c.to_string().contains("no thanks"))
        })
        .await?;
        mesh.delete("vm.yaml")?;
        let removal = stream.next().await?;
        if removal.removed_resources != [name] {
            return Err(Failure(format!("the removal: {removal:?}")));
        }
        Ok(())
    });
}

#[test]
fn policies_go_before_the_workloads_that_name_them() {
    sandbox::test("policies_go_before_the_workloads_that_name_them", || async {
        let mesh = shop(Options::default()).await?;
        let mut stream = Stream::open(&as_node(&mesh, "node1")?).await?;
        stream.all(AUTHORIZATION, HashMap::new()).await?;
        stream.all(ADDRESS, HashMap::new()).await?;
        let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
                      spec: {selector: {matchLabels: {app: web}}, rules: [{}]}\n";
        mesh.apply("p.yaml", policy)?;
        let (first, second) = (stream.next().await?, stream.next().await?);
        if (first.type_url.as_str(), second.type_url.as_str()) != (AUTHORIZATION, ADDRESS) {
            return Err(Failure(format!("added in the order {}, {}", first.type_url, second.type_url)));
        }
        mesh.delete("p.yaml")?;
        let (first, second) = (stream.next().await?, stream.next().await?);
        if (first.type_url.as_str(), second.type_url.as_str()) != (ADDRESS, AUTHORIZATION)
            || second.removed_resources != ["shop/p"]
        {
            return Err(Failure(format!("removed in the order {}, {second:?}", first.type_url)));
        }
        Ok(())
    });
}

#[test]
fn on_demand_clients_get_what_they_name() {
    sandbox::test("on_demand_clients_get_what_they_name", || async {
        let mesh = shop(Options::default()).await?;
        let mut stream = Stream::open(&as_node(&mesh, "node1")?).await?;
        let star = || vec!["*".to_owned()];
        stream
            .send(DeltaDiscoveryRequest {
                type_url: ADDRESS.into(),
                resource_names_subscribe: star(),
                resource_names_unsubscribe: star(),
                ..DeltaDiscoveryRequest::default()
            })
            .await?;
        let empty = stream.next().await?;
        if !empty.resources.is_empty() {
            return Err(Failure(format!("asked for nothing, got {} resources", empty.resources.len())));
        }
        let vip = mesh.kubelet.service("shop", "web").unwrap_or_default().join("");
        let subscribe = |names: &[&str]| DeltaDiscoveryRequest {
            type_url: ADDRESS.into(),
            resource_names_subscribe: names.iter().map(|n| (*n).to_owned()).collect(),
            ..DeltaDiscoveryRequest::default()
        };
        stream.send(subscribe(&[&format!("/{vip}"), "/192.0.2.99"])).await?;
        let answer = stream.next().await?;
        let names: Vec<&str> = answer.resources.iter().map(|r| r.name.as_str()).collect();
        // The service brings its endpoints along; a name that does not exist is told as removed.
        if !names.contains(&"shop/web.shop.svc.cluster.local") || !names.contains(&"Kubernetes//Pod/shop/web") {
            return Err(Failure(format!("asked for {vip}, got {names:?}")));
        }
        if answer.removed_resources != ["/192.0.2.99"] {
            return Err(Failure(format!("removed: {:?}", answer.removed_resources)));
        }
        // A host that nobody has yet, and then a service has it.
        const HOST: &str = "late.shop.svc.cluster.local";
        stream.send(subscribe(&[HOST])).await?;
        let answer = stream.next().await?;
        if answer.removed_resources != [HOST] {
            return Err(Failure(format!("removed: {:?}", answer.removed_resources)));
        }
        mesh.apply(
            "late.yaml",
            "apiVersion: v1\nkind: Service\nmetadata: {name: late, namespace: shop}\n\
             spec: {selector: {app: web}, ports: [{port: 80, targetPort: 8080}]}\n",
        )?;
        let whole = |seen: &[String]| {
            ["shop/late.shop.svc.cluster.local", "Kubernetes//Pod/shop/web"].iter().all(|n| seen.iter().any(|s| s == n))
        };
        let mut seen = Vec::new();
        while !whole(&seen) {
            seen.extend(stream.next().await?.resources.into_iter().map(|r| r.name));
        }
        // One that comes back, or comes later, gets both at once.
        let mut stream = Stream::open(&as_node(&mesh, "node1")?).await?;
        stream.send(subscribe(&[HOST])).await?;
        let seen: Vec<String> = stream.next().await?.resources.into_iter().map(|r| r.name).collect();
        if !whole(&seen) {
            return Err(Failure(format!("asked for {HOST}, got {seen:?}")));
        }
        Ok(())
    });
}

#[test]
fn a_stream_ends_with_its_token() {
    sandbox::test("a_stream_ends_with_its_token", || async {
        let mesh = shop(Options::default()).await?;
        let short = Claims { lifetime: Duration::from_secs(2), ..Claims::ztunnel("node1") };
        let mut stream = Stream::open(&control_plane(&mesh, "short", &mesh.issuer.issue(&short)?)?).await?;
        stream.all(ADDRESS, HashMap::new()).await?;
        refused(stream.next().await, "the token has expired")
    });
}
