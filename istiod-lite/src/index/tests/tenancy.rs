//! What a namespace can claim by its entries: names, addresses, endpoints, and how much (docs/security.md).

use super::*;
use crate::index::ownership::{MAX_BLOCKS, MAX_HOSTS};

const SHOP: &str = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop}\n---\n\
    apiVersion: v1\nkind: Namespace\nmetadata: {name: mallory}\n---\n\
    apiVersion: v1\nkind: Node\nmetadata: {name: n1}\nspec: {podCIDR: 10.0.0.0/24, podCIDRs: [10.0.0.0/24]}\n\
    status: {addresses: [{type: InternalIP, address: 172.18.0.9}]}\n---\n\
    apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\nspec: {clusterIP: 10.96.0.7, selector: {app: web}, ports: [{port: 80}]}\n---\n";

/// An entry of a namespace, with a part of its spec.
fn entry(name: &str, namespace: &str, age: &str, spec: &str) -> String {
    format!(
        "apiVersion: networking.istio.io/v1\nkind: ServiceEntry\nmetadata: {{name: {name}, namespace: {namespace}, \
         creationTimestamp: \"{age}\"}}\nspec: {{resolution: STATIC, ports: [{{number: 80, name: http}}], {spec}}}\n---\n"
    )
}

fn granted(namespace: &str, grants: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Namespace\nmetadata: {{name: {namespace}, annotations: {{ambit.dev/grants: \"{grants}\"}}}}\n---\n"
    )
}

const OLD: &str = "2026-01-01T00:00:00Z";
const NEW: &str = "2026-02-01T00:00:00Z";

fn condition(mesh: &Mesh, kind: &'static str, namespace: &str, name: &str) -> Condition {
    let key = Key { kind, namespace: namespace.into(), name: name.into() };
    let all = mesh.statuses.get(&key).unwrap_or_else(|| panic!("no status of {key}"));
    all.iter().find(|c| c.r#type == "Accepted" || c.r#type == "EndpointsAccepted").expect("a condition").clone()
}

#[test]
fn names_and_addresses_of_the_cluster_cannot_be_claimed() {
    let web = pod("web", "shop", ", labels: {app: web}", "", "");
    let ip = "10.0.0.68"; // of that pod
    for (spec, reason) in [
        ("hosts: [web.shop.svc.cluster.local]", "is a name of the cluster"),
        ("hosts: [WEB.shop.svc.cluster.local.]", "is a name of the cluster"),
        ("hosts: [nothing.there.svc.cluster.local]", "is a name of the cluster"),
        ("hosts: [web.shop.svc]", "is a name of the cluster"),
        ("hosts: [web.shop]", "is a name of the cluster"),
        ("hosts: [cluster.local]", "is a name of the cluster"),
        ("hosts: ['*.svc.cluster.local']", "is a name of the cluster"),
        ("hosts: ['*.shop.svc.cluster.local']", "is a name of the cluster"),
        ("hosts: ['*.cluster.local']", "is a name of the cluster"),
        ("hosts: ['*.local']", "is a name of the cluster"),
        ("hosts: ['*']", "is a name of the cluster"),
        ("hosts: ['*.example.com']", "has not been granted"),
        ("hosts: [a.example], addresses: [10.96.0.7]", "is an address of Service shop/web"),
        ("hosts: [a.example], addresses: ['::ffff:10.96.0.7']", "is an address of Service shop/web"),
        ("hosts: [a.example], addresses: [10.0.0.68]", "is the address of Pod shop/web"),
        ("hosts: [a.example], addresses: [172.18.0.9]", "is an address of Node n1"),
        ("hosts: [a.example], addresses: [10.0.0.200]", "is in 10.0.0.0/24"),
        ("hosts: [a.example], addresses: [127.0.0.1]", "loopback"),
        ("hosts: [a.example], addresses: [0.0.0.0/0]", "has not been granted"),
        ("hosts: [a.example], addresses: [10.96.0.0/12]", "has not been granted"),
        ("hosts: [a.example], endpoints: [{address: 127.0.0.1}]", "loopback"),
        ("hosts: [a.example], endpoints: [{address: '::1'}]", "loopback"),
        ("hosts: [a.example], endpoints: [{address: 169.254.169.254}]", "link-local"),
        ("hosts: [a.example], endpoints: [{address: 0.0.0.0}]", "unspecified"),
        ("hosts: [a.example], endpoints: [{address: 224.0.0.5}]", "multicast"),
        ("hosts: [a.example], endpoints: [{address: 10.0.0.68}]", "is the address of Pod shop/web"),
        ("hosts: [a.example], endpoints: [{address: 10.0.0.201}]", "is in 10.0.0.0/24"),
        ("hosts: [a.example], endpoints: [{address: 172.18.0.9}]", "is an address of Node n1"),
    ] {
        let m = mesh(&[SHOP, &web, &entry("trap", "mallory", OLD, spec)].concat());
        let said = condition(&m, "ServiceEntry", "mallory", "trap");
        assert!(!said.status && said.message.contains(reason), "{spec}: {said:?}");
        // Whatever else of it holds, the Service keeps its own, and nothing leads where it must not.
        assert_eq!(of(&m, "shop/web.shop.svc.cluster.local").vips[0].address.to_string(), "10.96.0.7");
        let theirs = m.services.values().filter(|s| &*s.namespace == "mallory");
        assert!(theirs.clone().all(|s| s.cidr_vips.is_empty() && s.namespace_visibility), "{spec}");
        assert!(theirs.flat_map(|s| &s.vips).all(|v| v.address.to_string() != "10.96.0.7"), "{spec}");
        assert!(!m.workloads.values().any(|w| &*w.namespace == "mallory" && !w.workload_ips.is_empty()), "{spec}");
        let _ = ip;
    }
    let own = entry("own", "shop", OLD, "hosts: [web.shop.svc.cluster.local]");
    let said = condition(&mesh(&[SHOP, &own].concat()), "ServiceEntry", "shop", "own");
    assert!(!said.status, "not even its own namespace takes a Service's name: {said:?}");
}

#[test]
fn a_workload_entry_is_where_nobody_else_is() {
    let web = pod("web", "shop", ", labels: {app: web}", "", "");
    let at = |address: &str, namespace: &str| {
        let entry = format!(
            "apiVersion: networking.istio.io/v1\nkind: WorkloadEntry\nmetadata: {{name: we, namespace: {namespace}}}\n\
             spec: {{address: {address:?}, labels: {{app: web}}}}\n---\n"
        );
        mesh(&[SHOP, &web, &entry].concat())
    };
    for address in ["10.96.0.7", "10.0.0.68", "10.0.0.9", "172.18.0.9", "127.0.0.1", "169.254.169.254", "::"] {
        let m = at(address, "mallory");
        assert!(!condition(&m, "WorkloadEntry", "mallory", "we").status, "{address}");
        assert_eq!(m.workloads.len(), 1, "{address}: the pod alone");
    }
    assert_eq!(at("192.0.2.5", "mallory").workloads.len(), 2);
    // Of its own namespace's pod it is another name: the pod keeps its identity.
    let m = at("10.0.0.68", "shop");
    assert_eq!(m.workloads.len(), 1);
    assert_eq!(workload(&m, "shop", "web").services.len(), 1);
}

#[test]
fn what_is_exported_is_decided_by_the_platform_team() {
    let plain = entry("e", "mallory", OLD, "hosts: [a.example]");
    let asking = entry("e", "mallory", OLD, "hosts: [a.example], exportTo: ['*']");
    let config = |list: &str| {
        format!(
            "apiVersion: v1\nkind: ConfigMap\nmetadata: {{name: istio, namespace: istio-system}}\n\
             data: {{mesh: \"defaultServiceExportTo: {list}\"}}\n---\n"
        )
    };
    let private = |yaml: &str| {
        let m = mesh(&[SHOP, yaml].concat());
        let said = condition(&m, "ServiceEntry", "mallory", "e");
        assert!(said.status, "{said:?}");
        (of(&m, "mallory/a.example").namespace_visibility, said.message)
    };
    let (hidden, said) = private(&plain);
    assert!(
        hidden && said.contains("only clients of namespace mallory") && said.contains("defaultServiceExportTo"),
        "{said}"
    );
    let (hidden, said) = private(&asking);
    assert!(hidden && said.contains("has not been granted") && said.contains("export"), "{said}");
    assert!(!private(&[granted("mallory", "wildcard-hosts, export"), asking.clone()].concat()).0);
    assert!(private(&[granted("mallory", "export"), plain.clone()].concat()).0, "it does not ask for it");
    assert!(!private(&[config("['*']"), plain].concat()).0, "Istio's default");
    assert!(!private(&[config("['*']"), asking].concat()).0);
    let own = entry("e", "mallory", OLD, "hosts: [a.example], exportTo: ['.']");
    assert!(private(&[config("['*']"), own].concat()).0);
    let named = entry("e", "mallory", OLD, "hosts: [a.example], exportTo: [shop]");
    assert!(private(&[granted("mallory", "export"), named].concat()).1.contains("not with other namespaces"));
    let root = entry("e", "istio-system", OLD, "hosts: ['*.example'], addresses: [203.0.113.0/24]");
    let m = mesh(&[SHOP, &root].concat());
    assert!(!of(&m, "istio-system/*.example").namespace_visibility, "entries of the root namespace are for all");
}

#[test]
fn of_two_that_ask_for_the_same_the_older_has_it_and_both_hear_of_it() {
    let grants = [granted("a", "export"), granted("b", "export")].concat();
    let one = |name: &str, namespace: &str, age: &str| {
        entry(name, namespace, age, "hosts: [api.example], addresses: [203.0.113.9], exportTo: ['*']")
    };
    for (young, old) in [("a", "b"), ("b", "a")] {
        let yaml = [grants.clone(), one("e", young, NEW), one("e", old, OLD)].concat();
        let m = mesh(&yaml);
        assert!(of(&m, &format!("{old}/api.example")).canonical && !of(&m, &format!("{young}/api.example")).canonical);
        assert_eq!(of(&m, &format!("{old}/api.example")).vips.len(), 1);
        assert!(of(&m, &format!("{young}/api.example")).vips.is_empty());
        let (theirs, ours) = (condition(&m, "ServiceEntry", young, "e"), condition(&m, "ServiceEntry", old, "e"));
        assert!(!theirs.status && theirs.reason == "Conflicted" && theirs.message.contains(old), "{theirs:?}");
        assert!(ours.status && ours.message.contains(&format!("younger ServiceEntry {young}/e")), "{ours:?}");
    }
}

#[test]
fn there_is_a_bound_for_everything_and_the_status_says_so() {
    let hosts = |n: usize| (0..n).map(|n| format!("h{n}.example")).collect::<Vec<_>>().join(", ");
    let many = |n: usize| mesh(&entry("e", "mallory", OLD, &format!("hosts: [{}]", hosts(n))));
    assert_eq!(many(MAX_HOSTS).services.len(), MAX_HOSTS);
    let m = many(MAX_HOSTS + 1);
    let said = condition(&m, "ServiceEntry", "mallory", "e");
    assert!(m.services.is_empty() && !said.status && said.reason == "TooMany", "{said:?}");
    let blocks: Vec<String> = (0..200).map(|n| format!("203.0.{n}.0/24")).collect();
    let two = |name: &str, age: &str| {
        entry(name, "mallory", age, &format!("hosts: [{name}.example], addresses: [{}]", blocks.join(", ")))
    };
    let m = mesh(&[granted("mallory", "address-blocks"), two("a", OLD), two("b", NEW)].concat());
    let all: usize = m.services.values().map(|s| s.cidr_vips.len()).sum();
    assert_eq!(all, MAX_BLOCKS);
    let said = condition(&m, "ServiceEntry", "mallory", "b");
    assert!(!said.status && said.reason == "TooMany" && said.message.contains("more"), "{said:?}");
}

#[test]
fn thousands_of_hosts_cost_what_they_are_and_not_their_square() {
    let entries = |n: usize| -> String {
        (0..n)
            .map(|e| {
                let hosts: Vec<String> = (0..MAX_HOSTS).map(|h| format!("h{h}.e{e}.example")).collect();
                entry(&format!("e{e}"), &format!("tenant{}", e / 30), OLD, &format!("hosts: [{}]", hosts.join(", ")))
            })
            .collect()
    };
    let took = |n: usize| {
        let all = objects(&entries(n));
        let start = std::time::Instant::now();
        let made = build(&all, &Enrolled::new(), &settings());
        assert_eq!(made.services.len(), n * MAX_HOSTS);
        start.elapsed().as_secs_f64()
    };
    took(4);
    let (few, many) = (took(15).max(0.001), took(120));
    assert!(many < few * 8.0 * 5.0, "8 times as many hosts took {many} s in place of {few} s");
}

#[test]
fn a_slice_brings_no_pod_of_another_namespace() {
    let web = pod("web", "shop", ", labels: {app: web}", "", "");
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: evil, namespace: mallory}\nspec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}\n---\n";
    let slice = |endpoint: &str| {
        let slice = format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: evil-1, namespace: mallory, labels: \
             {{kubernetes.io/service-name: evil}}}}\naddressType: IPv4\nports: [{{port: 8080}}]\nendpoints: [{endpoint}]\n---\n"
        );
        mesh(&[SHOP, &web, service, &slice].concat())
    };
    for endpoint in [
        "{addresses: [10.0.0.68], targetRef: {kind: Pod, name: web, namespace: shop}}",
        "{addresses: [10.0.0.68]}",
        "{addresses: [10.96.0.7]}",
        "{addresses: [127.0.0.1]}",
        "{addresses: [169.254.169.254]}",
    ] {
        let m = slice(endpoint);
        let key = NamespacedHostname::new("mallory", "evil.mallory.svc.cluster.local");
        assert!(!m.workloads.values().any(|w| w.services.contains_key(&key)), "{endpoint}");
        assert!(!condition(&m, "Service", "mallory", "evil").status, "{endpoint}");
    }
    // An API server's endpoint is its node's address.
    let m = slice("{addresses: [172.18.0.9]}");
    assert!(m.workloads.values().any(|w| &*w.namespace == "mallory"));
}

#[test]
fn a_pod_that_comes_to_have_an_address_takes_it_from_who_named_it_before() {
    let trap = entry("trap", "mallory", OLD, "hosts: [a.example], endpoints: [{address: 192.0.2.68}]");
    let before = objects(&[SHOP, &trap].concat());
    let later = pod("web", "shop", ", labels: {app: web}", "", "").replace("10.0.0.68", "192.0.2.68");
    let after = objects(&[SHOP, &trap, &later].concat());
    let mut index = Index::new(settings());
    let first = index.update(&before, &Enrolled::new());
    assert!(condition(&first, "ServiceEntry", "mallory", "trap").status);
    let second = index.update(&after, &Enrolled::new());
    let said = condition(&second, "ServiceEntry", "mallory", "trap");
    assert!(!said.status && said.message.contains("Pod shop/web"), "{said:?}");
    assert_eq!(second.workloads.len(), 1);
}
