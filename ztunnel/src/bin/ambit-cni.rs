//! The CNI plugin's program: one call; see `ztunnel::cni::plugin`.

use std::io::Read;
use std::process::ExitCode;

use ztunnel::cni::plugin;

fn main() -> ExitCode {
    let mut stdin = String::new();
    let env = std::env::vars().collect();
    let outcome = match std::io::stdin().read_to_string(&mut stdin) {
        Ok(_) => plugin::run(&env, &stdin),
        Err(error) => Err(plugin::PluginError::Config(error.to_string())),
    };
    match outcome {
        Ok(answer) => {
            println!("{answer}");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("ambit-cni: {error}");
            println!("{}", error.to_json("1.0.0"));
            ExitCode::FAILURE
        }
    }
}
