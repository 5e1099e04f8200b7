use nemotron_engine::checkpoint::BUILTIN_NAME;
use serde_json::json;

use crate::cli::VersionArgs;
use crate::report::{Outcome, print_json, print_line};

pub(crate) fn run(args: &VersionArgs) -> Outcome {
    let version = env!("CARGO_PKG_VERSION");
    if args.json {
        print_json(&json!({
            "schema": 1,
            "version": version,
            "target": format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            "builtin_model": BUILTIN_NAME,
        }))?;
    } else {
        print_line(format!("nemotron {version}"))?;
    }
    Ok(())
}
