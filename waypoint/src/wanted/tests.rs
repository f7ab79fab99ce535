use ambit_model::l7::{Backend, Mirror, Route};
use ambit_model::{Service, Workload};
use ambit_store::Store;
use std::cell::Cell;

use super::*;

fn key(name: &str) -> NamespacedHostname {
    NamespacedHostname::new("ns", name)
}

#[test]
fn a_service_leads_to_backends_mirrors_authorizers_and_key_sets() {
    let to = |name: &str| Backend { target: BackendTarget::Service(key(name), 80), ..Backend::default() };
    let mirror = |name: &str| Filter::Mirror(Mirror { backend: to(name), denominator: 1, numerator: 1 });
    let mut backend = to("blue");
    backend.filters.push(mirror("copy"));
    let rule = RouteRule {
        filters: vec![mirror("shadow")],
        backends: vec![backend, Backend::default()],
        ..RouteRule::default()
    };
    let mut config = ServiceConfig {
        routes: vec![Route { rules: vec![rule.into()], ..Route::default() }],
        ..ServiceConfig::default()
    };
    config.tokens = serde_json::from_str(r#"[{"name":"ns/t","issuer":"i","jwksUri":"http://keys.idp:8000/jwks"}]"#)
        .expect("tokens");
    config.policies =
        serde_json::from_str(r#"[{"name":"ns/p","action":"CUSTOM","authorizer":{"service":"ns/guard","port":1}}]"#)
            .expect("policies");
    let leads = Leads::of(&key("web"), &config);
    assert_eq!(leads.services, ["web", "blue", "copy", "shadow", "guard"].map(key).into());
    assert_eq!(leads.hosts, ["keys.idp".to_owned()].into());
}

fn workload(uid: &str, ip: [u8; 4], services: &[&str]) -> Change {
    Change::Workload(Box::new(Workload {
        uid: uid.into(),
        workload_ips: vec![ip.into()],
        services: services.iter().map(|s| (key(s), [(80, 80)].into())).collect(),
        ..Workload::default()
    }))
}

#[test]
fn what_only_a_dropped_name_asked_for_goes_with_it() {
    let store = Store::default();
    let service = |name: &str| {
        Change::Service(Box::new(Service { namespace: "ns".into(), hostname: name.into(), ..Service::default() }))
    };
    store.apply([
        service("a"),
        service("b"),
        workload("only-a", [10, 0, 0, 1], &["a"]),
        workload("both", [10, 0, 0, 2], &["a", "b"]),
        workload("unknown-too", [10, 0, 0, 3], &["a", "elsewhere"]),
        workload("self", [10, 0, 0, 4], &["a"]),
    ]);
    let still = Names::from(["ns/b".to_owned(), "/10.0.0.4".to_owned()]);
    let gone = |names: &[&str]| {
        let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
        let of = |change| match change {
            Change::RemoveAddress(name) => name.to_string(),
            other => panic!("{other:?}"),
        };
        dropped(&store.load(), &names, &still).into_iter().map(of).collect::<BTreeSet<_>>()
    };
    assert_eq!(gone(&["ns/a"]), ["only-a", "unknown-too", "ns/a"].map(ToOwned::to_owned).into());
    assert_eq!(gone(&["ns/b"]), BTreeSet::new(), "needed again before it was dropped");
    assert_eq!(gone(&["ns/none", "host", "bound:ns/x"]), BTreeSet::new());
}

#[tokio::test(start_paused = true)]
async fn a_name_stays_a_while_and_as_long_as_it_is_busy() {
    let names = |all: &[&str]| all.iter().map(|n| (*n).to_owned()).collect::<Names>();
    let (needs, needed) = watch::channel(names(&["a", "b"]));
    let (wanted, now) = watch::channel(Names::new());
    let busy = Cell::new(true);
    let test = async {
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(*now.borrow(), names(&["a", "b"]));
        needs.send_replace(names(&["c"]));
        tokio::time::sleep(Duration::from_millis(1)).await;
        assert_eq!(*now.borrow(), names(&["a", "b", "c"]), "what is new is asked for at once");
        tokio::time::sleep(LINGERS + LOOKS).await;
        assert_eq!(*now.borrow(), names(&["b", "c"]), "b is busy");
        busy.set(false);
        tokio::time::sleep(LINGERS / 2).await;
        assert_eq!(*now.borrow(), names(&["b", "c"]));
        needs.send_replace(names(&["b", "c"]));
        tokio::time::sleep(LINGERS * 2).await;
        assert_eq!(*now.borrow(), names(&["b", "c"]), "it is needed again");
        needs.send_replace(names(&["c"]));
        tokio::time::sleep(LINGERS + LOOKS * 2).await;
        assert_eq!(*now.borrow(), names(&["c"]));
    };
    tokio::select! {
        () = lingering(needed, wanted, |name| name == "b" && busy.get()) => unreachable!("it ends with the test"),
        () = test => {}
    }
}
