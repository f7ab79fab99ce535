//! The capture rules, written into a real network namespace. Needs the right to make one; says so where it has none.

use ambit_net::Netns;
use ambit_net::capture::Capture;

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
