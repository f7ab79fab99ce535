//! Runs the checks on a real Kubernetes; see `e2e/kubernetes/run`.
//!
//! ```text
//! KUBECTL=kubectl MANIFESTS=DIR WITH_WAYPOINTS=DIR APPS=FILE [RIG=DIR] [CHECK=PROGRAM] kubernetes [PART-OF-A-NAME,...]
//! ```

use std::process::ExitCode;
use std::time::Instant;

use ambit_e2e::kubernetes::Cluster;
use ambit_e2e::kubernetes::checks::CHECKS;

/// Where all lines of a log were looked at in vain, the last ones say enough.
fn short(text: &str) -> String {
    const START: usize = 600;
    const END: usize = 2_000;
    let chars: Vec<char> = text.chars().collect();
    if chars.len() <= START + END {
        return text.to_owned();
    }
    let part = |chars: &[char]| chars.iter().collect::<String>();
    format!("{} ... {}", part(&chars[..START]), part(&chars[chars.len() - END..]))
}

fn main() -> ExitCode {
    let var = |name: &str, default: &str| std::env::var(name).unwrap_or_else(|_| default.to_owned());
    let cluster = Cluster {
        kubectl: var("KUBECTL", "kubectl"),
        manifests: var("MANIFESTS", "e2e/kubernetes/overlays/layer4"),
        with_waypoints: var("WITH_WAYPOINTS", "e2e/kubernetes/overlays/waypoints"),
        apps: var("APPS", "e2e/kubernetes/apps.yaml"),
        rig: std::env::var("RIG").ok(),
        check: std::env::var("CHECK").ok(),
    };
    let only = std::env::args().nth(1).unwrap_or_default();
    let (mut passed, mut failed) = (0, 0);
    for (name, check) in CHECKS.iter().filter(|(name, _)| only.split(',').any(|part| name.contains(part))) {
        let start = Instant::now();
        match check(&cluster) {
            Ok(evidence) => {
                passed += 1;
                println!("ok   {:5.1}s {name}: {evidence}", start.elapsed().as_secs_f64());
            }
            Err(failure) => {
                failed += 1;
                println!("FAIL {:5.1}s {name}: {}", start.elapsed().as_secs_f64(), short(&failure.to_string()));
            }
        }
    }
    println!("{passed} passed, {failed} failed");
    if failed == 0 && passed > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
