//! What a name means to a pod: a pure decision on a snapshot (reference/ztunnel.md 1.8).
//!
//! Owns search-list expansion and answers. Never asks anybody.

use std::net::IpAddr;

use ambit_model::service::IpFamilies;
use ambit_model::{Service, Workload};
use ambit_store::Snapshot;
use hickory_proto::op::{Message, MessageType, ResponseCode};
use hickory_proto::rr::rdata::{A, AAAA, CNAME};
use hickory_proto::rr::{Name, RData, Record, RecordType};

const TTL: u32 = 30;

/// What to do with a query.
pub(super) enum Outcome {
    /// Answer this.
    Answer(Box<Message>),
    /// Ask the upstream.
    Forward,
}

/// Decides on a query of `client`.
pub(super) fn resolve(
    snapshot: &Snapshot,
    client: &Workload,
    domain: &str,
    searches: &[String],
    query: &Message,
) -> Outcome {
    let [question] = &query.queries[..] else { return Outcome::Forward };
    let kind = question.query_type();
    if !matches!(kind, RecordType::A | RecordType::AAAA) {
        return Outcome::Forward;
    }
    let asked = question.name().to_lowercase().to_string();
    let asked = asked.trim_end_matches('.');
    if let Some((service, candidate, searched)) = find(snapshot, client, &candidates(asked, client, domain, searches)) {
        let Some(mut ips) = addresses(snapshot, client, service, domain) else { return Outcome::Forward };
        let wanted = |ip: &IpAddr| ip.is_ipv4() == (kind == RecordType::A) && allowed(service, ip);
        ips.retain(wanted);
        fastrand::shuffle(&mut ips);
        let mut answer = Message::response(query.metadata.id, query.metadata.op_code);
        answer.metadata.message_type = MessageType::Response;
        answer.metadata.authoritative = true;
        answer.metadata.recursion_desired = query.metadata.recursion_desired;
        answer.metadata.recursion_available = true;
        answer.metadata.response_code = ResponseCode::NoError;
        answer.add_query(question.clone());
        let mut owner = question.name().clone();
        if searched && let Ok(target) = Name::from_ascii(format!("{candidate}.")) {
            answer.add_answer(Record::from_rdata(owner, TTL, RData::CNAME(CNAME(target.clone()))));
            owner = target;
        }
        for ip in ips {
            let data = match ip {
                IpAddr::V4(ip) => RData::A(A(ip)),
                IpAddr::V6(ip) => RData::AAAA(AAAA(ip)),
            };
            answer.add_answer(Record::from_rdata(owner.clone(), TTL, data));
        }
        return Outcome::Answer(Box::new(answer));
    }
    Outcome::Forward
}

/// Names that a query may mean, in order, and whether a search domain was taken off.
fn candidates(asked: &str, client: &Workload, domain: &str, searches: &[String]) -> Vec<(String, bool)> {
    let own = [format!("{}.svc.{domain}", client.namespace), format!("svc.{domain}"), domain.to_owned()];
    let searches: Vec<&str> = if searches.is_empty() {
        own.iter().map(String::as_str).collect()
    } else {
        searches.iter().map(String::as_str).collect()
    };
    let mut all: Vec<(String, bool)> = Vec::new();
    let mut add = |name: String, searched: bool| {
        if !all.iter().any(|(n, _)| *n == name) {
            all.push((name, searched));
        }
    };
    let expand = |name: &str| -> Vec<String> {
        let labels: Vec<&str> = name.split('.').collect();
        match labels[..] {
            [_] => vec![format!("{name}.{}.svc.{domain}", client.namespace)],
            [_, _] => vec![format!("{name}.svc.{domain}"), format!("{name}.{}.svc.{domain}", client.namespace)],
            [.., "svc"] => vec![format!("{name}.{domain}")],
            _ => vec![],
        }
    };
    add(asked.to_owned(), false);
    for name in expand(asked) {
        add(name, false);
    }
    for search in searches {
        if let Some(stripped) = asked.strip_suffix(search).and_then(|s| s.strip_suffix('.')) {
            add(stripped.to_owned(), true);
            for name in expand(stripped) {
                add(name, true);
            }
        }
    }
    all
}

/// The service that the first of these names means exactly, else the first that a wildcard covers, the most specific one
/// first. A wildcard of anybody comes after all exact names: a search list asks for `api.example.NAMESPACE.svc.DOMAIN` before
/// `api.example`.
fn find<'a, 'n>(
    snapshot: &'a Snapshot,
    client: &Workload,
    candidates: &'n [(String, bool)],
) -> Option<(&'a Service, &'n str, bool)> {
    let named = |name: &str| snapshot.service_named(&name.into(), &client.namespace).map(|s| &**s);
    let exact = candidates.iter().find_map(|(name, searched)| Some((named(name)?, name.as_str(), *searched)));
    exact.or_else(|| {
        candidates.iter().find_map(|(name, searched)| {
            let parents = std::iter::successors(name.split_once('.'), |(_, rest)| rest.split_once('.'));
            let service = parents.into_iter().find_map(|(_, parent)| named(&format!("*.{parent}")))?;
            Some((service, name.as_str(), *searched))
        })
    })
}

/// Addresses of a service for a client: its virtual ones, or for a headless service those of its endpoints. `None`
/// where the mesh has no say (a name outside the cluster without an address).
fn addresses(snapshot: &Snapshot, client: &Workload, service: &Service, domain: &str) -> Option<Vec<IpAddr>> {
    let vips: Vec<IpAddr> = service.vips.iter().filter(|v| v.network == client.network).map(|v| v.address).collect();
    if !service.vips.is_empty() {
        return Some(vips);
    }
    if !service.hostname.ends_with(&format!(".svc.{domain}")) {
        return None;
    }
    let all = service.load_balancing.allow_unhealthy;
    let healthy = |w: &&std::sync::Arc<Workload>| all || w.status == ambit_model::workload::Health::Healthy;
    let endpoints = snapshot.endpoints(&service.key());
    Some(
        endpoints
            .into_iter()
            .flat_map(|e| e.iter().filter(healthy))
            .filter(|w| w.network == client.network)
            .flat_map(|w| w.workload_ips.iter().copied())
            .collect(),
    )
}

fn allowed(service: &Service, ip: &IpAddr) -> bool {
    match service.ip_families {
        IpFamilies::Automatic | IpFamilies::Dual => true,
        IpFamilies::Ipv4Only => ip.is_ipv4(),
        IpFamilies::Ipv6Only => ip.is_ipv6(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ambit_model::{NamespacedHostname, NetworkAddress};
    use ambit_store::{Change, Store};
    use hickory_proto::op::{OpCode, Query};

    fn ask(name: &str, kind: RecordType) -> Option<Vec<String>> {
        ask_beside(&[], name, kind)
    }

    /// Asks where there are more services: host and address.
    fn ask_beside(more: &[(&str, &str)], name: &str, kind: RecordType) -> Option<Vec<String>> {
        let store = Store::default();
        let service = |name: &str, namespace: &str, host: &str, vips: &[&str]| {
            Change::Service(Box::new(Service {
                name: name.into(),
                namespace: namespace.into(),
                hostname: host.into(),
                vips: vips
                    .iter()
                    .map(|v| NetworkAddress { network: "".into(), address: v.parse().expect("ip") })
                    .collect(),
                canonical: true,
                ..Service::default()
            }))
        };
        let key = NamespacedHostname::new("shop", "db.shop.svc.cluster.local");
        store.apply([
            service("web", "shop", "web.shop.svc.cluster.local", &["10.96.0.1", "fd00:96::1"]),
            service("only4", "shop", "only4.shop.svc.cluster.local", &["10.96.0.2"]),
            service("db", "shop", "db.shop.svc.cluster.local", &[]),
            service("ext", "shop", "api.example.com", &["240.240.0.1"]),
            service("wild", "shop", "*.wild.example.com", &["240.240.0.2"]),
            service("bare", "shop", "bare.example.com", &[]),
            Change::Workload(Box::new(Workload {
                uid: "db-0".into(),
                workload_ips: vec!["10.244.0.7".parse().expect("ip")],
                services: [(key, Default::default())].into(),
                ..Workload::default()
            })),
        ]);
        store.apply(more.iter().map(|(host, vip)| service("more", "mallory", host, &[vip])));
        let client = Workload { namespace: "client".into(), ..Workload::default() };
        let mut query = Message::new(7, MessageType::Query, OpCode::Query);
        query.add_query(Query::query(Name::from_ascii(name).expect("name"), kind));
        match resolve(&store.load(), &client, "cluster.local", &[], &query) {
            Outcome::Forward => None,
            Outcome::Answer(m) => {
                assert_eq!((m.metadata.id, m.metadata.response_code), (7, ResponseCode::NoError));
                Some(m.answers.iter().map(|r| r.data.to_string().trim_end_matches('.').to_owned()).collect())
            }
        }
    }

    #[test]
    fn names() {
        let web = "web.shop.svc.cluster.local";
        for (name, expected) in [
            ("web.shop.svc.cluster.local.", vec!["10.96.0.1"]),
            ("WEB.shop.svc.cluster.local.", vec!["10.96.0.1"]),
            ("web.shop.svc.", vec!["10.96.0.1"]),
            ("web.shop.", vec!["10.96.0.1"]),
            // What a resolver with ndots:5 asks first: a search domain appended.
            ("web.shop.client.svc.cluster.local.", vec![web, "10.96.0.1"]),
            ("db.shop.", vec!["10.244.0.7"]),
            ("api.example.com.", vec!["240.240.0.1"]),
            ("a.b.wild.example.com.", vec!["240.240.0.2"]),
        ] {
            let expected: Vec<String> = expected.into_iter().map(str::to_owned).collect();
            assert_eq!(ask(name, RecordType::A), Some(expected), "{name}");
        }
        assert_eq!(ask("web.shop.", RecordType::AAAA), Some(vec!["fd00:96::1".into()]));
        assert_eq!(ask("only4.shop.", RecordType::AAAA), Some(vec![]), "known, but no such family");
        for forwarded in
            ["example.com.", "bare.example.com.", "nope.shop.svc.cluster.local.", "web.", "wild.example.com."]
        {
            assert_eq!(ask(forwarded, RecordType::A), None, "{forwarded}");
        }
        assert_eq!(ask("web.shop.", RecordType::MX), None);
    }

    #[test]
    fn exact_names_of_all_candidates_come_before_wildcards_of_any() {
        // It covers what a search list makes of any name.
        let trap =
            [("*.svc.cluster.local", "240.241.1.1"), ("*.example.com", "240.241.1.2"), ("*.shop", "240.241.1.3")];
        let answer = |name: &str| ask_beside(&trap, name, RecordType::A).unwrap_or_default().pop();
        for (name, expected) in [
            ("web.shop.", "10.96.0.1"),
            ("web.shop.client.svc.cluster.local.", "10.96.0.1"),
            ("web.shop.svc.cluster.local.", "10.96.0.1"),
            ("api.example.com.client.svc.cluster.local.", "240.240.0.1"),
            ("api.example.com.svc.cluster.local.", "240.240.0.1"),
            ("api.example.com.", "240.240.0.1"),
            ("a.b.wild.example.com.", "240.240.0.2"),
            ("other.example.com.", "240.241.1.2"),
        ] {
            assert_eq!(answer(name).as_deref(), Some(expected), "{name}");
        }
    }
}
