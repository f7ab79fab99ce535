//! The node tunnel's program: reads its configuration, runs, and maps failures to exit codes.

use std::process::ExitCode;

use ztunnel::{app, config::Config};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    let mut file = None;
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        match arg.as_str() {
            // What Istio's chart passes.
            "proxy" | "ztunnel" => {}
            "version" | "--version" => {
                println!("ambit ztunnel {}", env!("CARGO_PKG_VERSION"));
                return ExitCode::SUCCESS;
            }
            "--config" => file = args.next().map(std::path::PathBuf::from),
            "help" | "--help" => {
                println!("{}", ztunnel::config::HELP);
                return ExitCode::SUCCESS;
            }
            other => {
                eprintln!("ztunnel: unknown argument {other:?}; try `ztunnel help`");
                return ExitCode::from(64);
            }
        }
    }
    let config = match Config::load(file.as_deref()) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("ztunnel: {error}");
            return ExitCode::from(64);
        }
    };
    match app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("ztunnel: {error}");
            ExitCode::FAILURE
        }
    }
}
