//! The controller's program: reads its configuration, runs, and maps failures to exit codes.

use std::process::ExitCode;

use istiod_lite::{app, config::Config};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

/// The other thing this program does.
const CHECK: &str = "istiod-lite check [NAMESPACE]\n\nSays what is wrong with the mesh on the cluster that KUBECONFIG names, a line each. \
                     Exit status 0: nothing; 1: something; 2: no cluster.";

fn main() -> ExitCode {
    let mut file = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            "--config" => file = args.next().map(std::path::PathBuf::from),
            "check" => {
                let namespace = args.next().or_else(|| std::env::var("POD_NAMESPACE").ok());
                return istiod_lite::check::run(namespace.as_deref().unwrap_or("istio-system"));
            }
            "help" | "--help" => {
                println!("{}\n{}", istiod_lite::config::HELP, CHECK);
                return ExitCode::SUCCESS;
            }
            "version" | "--version" => {
                println!("ambit istiod-lite {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("istiod-lite: unknown argument {other:?}; try `istiod-lite help`");
                return ExitCode::from(64);
            }
        }
    }
    let config = match Config::load(file.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("istiod-lite: {error}");
            return ExitCode::from(64);
        }
    };
    match app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("istiod-lite: {error}");
            ExitCode::FAILURE
        }
    }
}
