//! The capture rules, written into a real network namespace. Needs the right to make one; says so where it has none.

use ambit_net::Netns;
use ambit_net::capture::{Capture, TABLE};
use ambit_net::nft::{self, Chain, ChainKind, Hook, Step};

#[test]
fn install_twice_verify_remove() {
    let Ok(netns) = Netns::create() else {
        // The end-to-end tests run the same rules inside a user namespace; this one is for a quick look as root.
        eprintln!("not run here: making a network namespace needs CAP_SYS_ADMIN");
        return;
    };
    let capture = Capture::detect(&netns, true).expect("detect");
    assert!(!capture.verify(&netns).expect("verify before"));
    capture.install(&netns).expect("install");
    assert!(capture.verify(&netns).expect("verify"));
    capture.install(&netns).expect("install again");
    assert!(capture.verify(&netns).expect("verify again"));
    let other = Capture { dns: false, ..capture };
    assert!(!other.verify(&netns).expect("another version of the rules is not this one"));
    if std::process::Command::new("nft").arg("--version").output().is_ok() {
        let shown = netns.run(|| std::process::Command::new("nft").args(["list", "ruleset"]).output());
        eprintln!("{}", String::from_utf8_lossy(&shown.expect("run").expect("nft").stdout));
    }
    capture.remove(&netns).expect("remove");
    capture.remove(&netns).expect("remove again");
    assert!(!capture.verify(&netns).expect("verify after"));
}

#[test]
fn other_rules_of_the_same_number_are_seen() {
    let Ok(netns) = Netns::create() else {
        eprintln!("not run here: making a network namespace needs CAP_SYS_ADMIN");
        return;
    };
    let capture = Capture::detect(&netns, false).expect("detect");
    capture.install(&netns).expect("install");
    let table = || netns.run(|| nft::read_table(TABLE)).expect("enter").expect("read").expect("there");
    let difference = || capture.inspect(&netns).expect("inspect").difference;
    assert_eq!(difference(), None);
    let tag = table().tag;
    let replace =
        |chains: &[Chain]| netns.run(|| nft::replace_table(TABLE, &tag, chains)).expect("enter").expect("write");
    // One rule for one rule, in a chain of the same name.
    let accept = |n: usize| vec![vec![Step::Accept]; n];
    let chain = |name, kind, hook, priority, rules| Chain { name, kind, hook, priority, rules };
    let n = if capture.ipv6 { 2 } else { 1 };
    let forged = |last: Vec<Vec<Step>>| {
        vec![
            chain("mangle-pre", ChainKind::Filter, Hook::Prerouting, -150, accept(1)),
            chain("mangle-out", ChainKind::Route, Hook::Output, -150, accept(1)),
            chain("nat-pre", ChainKind::Nat, Hook::Prerouting, -100, accept(n)),
            chain("nat-out", ChainKind::Nat, Hook::Output, -100, accept(1 + 2 * n)),
            chain("guard-in", ChainKind::Filter, Hook::Input, 0, last.clone()),
            chain("guard-out", ChainKind::Filter, Hook::Output, 0, last),
        ]
    };
    replace(&forged(accept(2)));
    let said = difference().expect("another rule is seen");
    assert!(said.contains("chain"), "{said}");
    replace(&[]);
    assert!(difference().is_some_and(|d| d.contains("missing")));
    capture.install(&netns).expect("install");
    assert_eq!(difference(), None);
    // A chain at another place in the packet's way.
    let mut moved = forged(accept(2));
    moved[4].hook = Hook::Output;
    replace(&moved);
    assert!(difference().is_some_and(|d| d.contains("guard-in")));
}

#[test]
fn the_way_out_is_known_and_is_part_of_the_rules() {
    let Ok(netns) = Netns::create() else {
        eprintln!("not run here: making a network namespace needs CAP_SYS_ADMIN");
        return;
    };
    assert_eq!(Capture::detect(&netns, false).expect("detect").uplink, None, "no route, no way out");
    let made = netns.run(|| -> std::io::Result<()> {
        let peer = Netns::create()?;
        ambit_net::route::add_veth("eth0", "peer0", &peer)?;
        ambit_net::route::add_address("eth0", [192, 0, 2, 2].into(), 24)?;
        ambit_net::route::set_up("eth0")?;
        ambit_net::route::add_route([0, 0, 0, 0].into(), 0, "eth0", Some([192, 0, 2, 1].into()))
    });
    made.expect("enter").expect("link");
    let capture = Capture::detect(&netns, true).expect("detect");
    assert!(capture.uplink.is_some_and(|index| index > 1), "{capture:?}");
    capture.install(&netns).expect("install");
    assert_eq!(capture.inspect(&netns).expect("inspect").difference, None);
    let other = Capture { uplink: capture.uplink.map(|n| n + 1), ..capture };
    assert!(other.inspect(&netns).expect("inspect").difference.is_some());
}
