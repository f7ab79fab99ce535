//! The waypoint's program: reads its configuration, runs, and maps failures to exit codes.

use std::process::ExitCode;

use waypoint::app;
use waypoint::config::{Config, HELP};

#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    if let Some(arg) = std::env::args().nth(1) {
        match arg.as_str() {
            "version" | "--version" => println!("ambit waypoint {}", env!("CARGO_PKG_VERSION")),
            "help" | "--help" => println!("{HELP}"),
            other => {
                eprintln!("waypoint: unknown argument {other:?}; try `waypoint help`");
                return ExitCode::from(64);
            }
        }
        return ExitCode::SUCCESS;
    }
    let config = match Config::load() {
        Ok(config) => config,
        Err(error) => {
            eprintln!("waypoint: {error}");
            return ExitCode::from(64);
        }
    };
    match app::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("waypoint: {error}");
            ExitCode::FAILURE
        }
    }
}
