use crate::cli::{LaunchArgs, WaitFor};
use crate::env::Environment;
use crate::host::Host;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::resolve::{self, Resolved};
use crate::start::{Output, detached, foreground, launched};
use crate::state::Endpoint;
use crate::supervise::{block_signals, narrate};

use super::wait::wait_for;

pub(crate) fn run(args: &LaunchArgs) -> Outcome {
    let stays = !args.detach && args.wait.is_none();
    if stays && !args.dry_run {
        block_signals()?;
    }
    let resolved = resolve::launch(args, &Environment::of_process(), &Host::probe()?)?;
    if args.dry_run || args.test_only {
        return dry_run(&resolved, args.json);
    }
    if resolved.spec.site.is_some() {
        return Err(Failure::msg(Exit::Usage, "this version renders batch scripts but does not submit them")
            .hint("nemotron render"));
    }
    if stays {
        let output = match (args.json, args.parsable) {
            (true, _) => Output::Json,
            (_, true) => Output::Name,
            _ => Output::Url,
        };
        return foreground(resolved, output);
    }
    let run_dir = detached(resolved)?;
    if !args.json {
        print_line(run_dir.name())?;
    }
    let waited = args.wait.map_or(Ok(()), |target| wait_for(&run_dir, target, None));
    if args.json {
        let endpoint = if args.wait == Some(WaitFor::Ready) { Endpoint::of(&run_dir)? } else { None };
        print_json(&launched(&run_dir, endpoint.as_ref()))?;
    }
    if !args.parsable {
        narrate(&format!("run {0} in {1}\nnext: nemotron status {0}", run_dir.name(), run_dir.path().display()));
    }
    waited
}

/// Shows what would be started, and starts nothing.
pub(super) fn dry_run(resolved: &Resolved, json: bool) -> Outcome {
    if json {
        print_json(&serde_json::json!({ "schema": 1, "spec": resolved.spec, "plan": resolved.plan }))?;
    } else {
        let spec = toml::to_string(&resolved.spec).map_err(anyhow::Error::new)?;
        print_line(spec.trim_end())?;
    }
    Ok(())
}
