use super::*;

fn connection(principal: Option<&str>, port: u16) -> Connection {
    Connection {
        source: principal.map(|p| format!("spiffe://{p}").parse().expect("identity")),
        source_ip: "10.0.0.7".parse().expect("ip"),
        destination_ip: "10.0.1.1".parse().expect("ip"),
        destination_port: port,
    }
}

fn policy(name: &str, action: Action, matches: Vec<Match>) -> Arc<Policy> {
    Arc::new(Policy {
        name: name.into(),
        namespace: "ns".into(),
        scope: PolicyScope::Namespace,
        action,
        dry_run: false,
        rules: vec![Rule { clauses: vec![Clause { matches }] }],
    })
}

fn principals(p: &str) -> Match {
    Match { principals: vec![StringMatch::Exact(p.into())], ..Match::default() }
}

const WEB: &str = "cluster.local/ns/default/sa/web";

#[test]
fn deny_wins_over_allow() {
    let set = PolicySet::new(
        [policy("a", Action::Allow, vec![principals(WEB)]), policy("d", Action::Deny, vec![principals(WEB)])],
        vec![],
    );
    assert_eq!(set.decide(&connection(Some(WEB), 80)), Decision::Deny(Denial::Policy("ns/d".into())));
}

#[test]
fn allow_policies_close_the_door_to_others() {
    let set = PolicySet::new([policy("a", Action::Allow, vec![principals(WEB)])], vec![]);
    assert_eq!(set.decide(&connection(Some(WEB), 80)), Decision::Allow(Some("ns/a".into())));
    let refused = set.decide(&connection(Some("cluster.local/ns/default/sa/other"), 80));
    assert_eq!(refused, Decision::Deny(Denial::NoAllow(vec!["ns/a".into()])));
    assert_eq!(set.decide(&connection(None, 80)), Decision::Deny(Denial::NoAllow(vec!["ns/a".into()])));
}

#[test]
fn strict_mtls_is_a_deny_of_no_principal() {
    let strict = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let set = PolicySet::new([policy("strict", Action::Deny, vec![strict])], vec![]);
    assert_eq!(set.decide(&connection(Some(WEB), 80)), Decision::Allow(None));
    assert_eq!(set.decide(&connection(None, 80)), Decision::Deny(Denial::Policy("ns/strict".into())));
}

#[test]
fn a_missing_policy_refuses() {
    let set = PolicySet::new([policy("a", Action::Allow, vec![principals(WEB)])], vec!["ns/gone".into()]);
    assert_eq!(set.decide(&connection(Some(WEB), 80)), Decision::Deny(Denial::Missing(vec!["ns/gone".into()])));
}

#[test]
fn empty_rules_clauses_and_matches() {
    let with = |rules: Vec<Rule>| {
        let p = Policy { rules, ..(*policy("d", Action::Deny, vec![])).clone() };
        matches!(PolicySet::new([Arc::new(p)], vec![]).decide(&connection(Some(WEB), 80)), Decision::Deny(_))
    };
    assert!(!with(vec![]), "no rule never matches");
    assert!(with(vec![Rule { clauses: vec![Clause { matches: vec![] }] }]), "an empty clause matches");
    assert!(
        !with(vec![Rule { clauses: vec![Clause { matches: vec![Match::default()] }] }]),
        "an empty match is skipped"
    );
}

#[test]
fn each_attribute() {
    let ip = |s: &str| vec![s.parse::<Cidr>().expect("cidr")];
    let cases: Vec<(&str, Match, bool)> = vec![
        ("namespace", Match { namespaces: vec![StringMatch::Exact("default".into())], ..Match::default() }, true),
        ("namespace prefix", Match { namespaces: vec![StringMatch::Prefix("def".into())], ..Match::default() }, true),
        (
            "not namespace",
            Match { not_namespaces: vec![StringMatch::Suffix("ault".into())], ..Match::default() },
            false,
        ),
        ("account", Match { service_accounts: vec![("default".into(), "web".into())], ..Match::default() }, true),
        ("account elsewhere", Match { service_accounts: vec![("x".into(), "web".into())], ..Match::default() }, false),
        (
            "not account",
            Match { not_service_accounts: vec![("default".into(), "web".into())], ..Match::default() },
            false,
        ),
        ("source ip", Match { source_ips: ip("10.0.0.0/24"), ..Match::default() }, true),
        ("not source ip", Match { not_source_ips: ip("10.0.0.0/24"), ..Match::default() }, false),
        ("destination ip", Match { destination_ips: ip("10.0.1.1"), ..Match::default() }, true),
        ("not destination ip", Match { not_destination_ips: ip("10.9.0.0/16"), ..Match::default() }, true),
        ("port", Match { destination_ports: vec![80, 81], ..Match::default() }, true),
        ("not port", Match { not_destination_ports: vec![80], ..Match::default() }, false),
        ("and of two", Match { destination_ports: vec![80], source_ips: ip("1.1.1.1"), ..Match::default() }, false),
    ];
    for (name, m, expected) in cases {
        let set = PolicySet::new([policy("d", Action::Deny, vec![m])], vec![]);
        let denied = matches!(set.decide(&connection(Some(WEB), 80)), Decision::Deny(_));
        assert_eq!(denied, expected, "{name}");
    }
}

#[test]
fn dry_run_is_only_reported() {
    let mut p = (*policy("d", Action::Deny, vec![principals(WEB)])).clone();
    p.dry_run = true;
    let set = PolicySet::new([Arc::new(p)], vec![]);
    let c = connection(Some(WEB), 80);
    assert_eq!(set.decide(&c), Decision::Allow(None));
    assert_eq!(set.dry_run_matches(&c).count(), 1);
}
