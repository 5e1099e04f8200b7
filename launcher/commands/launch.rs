use serde_json::json;

use crate::cli::{EventsArgs, LaunchArgs, WaitFor};
use crate::cluster::Site;
use crate::env::Environment;
use crate::fabric;
use crate::host::Host;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::resolve::{self, Resolved};
use crate::rundir::RunDir;
use crate::start::{Output, detached, foreground, launched};
use crate::state::Endpoint;
use crate::submit;
use crate::supervise::{block_signals, narrate, unblock_signals};

use super::cancel::cancel;
use super::wait::{attend_replicas, wait_for};

pub(crate) fn run(args: &LaunchArgs) -> Outcome {
    let environment = Environment::of_process();
    let host = Host::probe()?;
    let stays = !args.detach && args.wait.is_none();
    if stays && !args.dry_run {
        // Before resolving, which may start threads.
        block_signals()?;
    }
    let mut resolved = resolve::launch(args, &environment, &host)?;
    if !args.dry_run {
        submit::check_only_writer(&resolved)?;
    }
    if let (Some(count), false) = (args.replicas, args.dry_run || args.test_only) {
        return launch_replicas(args, &mut resolved, count, &environment);
    }
    match resolved.spec.site.clone() {
        Some(site) if args.test_only => return test_only(&resolved, &site, &environment, args.json),
        Some(site) if !args.dry_run => {
            // What is in a queue does not depend on this process.
            unblock_signals()?;
            say_not_passed(&site, &environment);
            let (run_dir, job) = submit::submit(&mut resolved, &site, &environment)?;
            return follow(args, &run_dir, Some(job.id));
        }
        _ => {}
    }
    if args.dry_run || args.test_only {
        return dry_run(&resolved, args.json);
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
    follow(args, &run_dir, None)
}

fn say_not_passed(site: &Site, environment: &Environment) {
    let left = fabric::not_passed(site, environment);
    if !left.is_empty() {
        let key = "env.pass in the cluster file passes them on";
        narrate(&format!("set in this shell, but not for the job: {} ({key})", left.join(", ")));
    }
}

/// Each is a run of its own within the run, in a process or a job that does not depend on this one. Either all of them start or none.
fn launch_replicas(args: &LaunchArgs, resolved: &mut Resolved, count: u32, environment: &Environment) -> Outcome {
    if let Some(site) = &resolved.spec.site {
        say_not_passed(site, environment);
    }
    let stays = resolved.spec.site.is_none() && !args.detach && args.wait.is_none();
    if !stays {
        unblock_signals()?;
    }
    let (run_dir, parts) = replicas::divide(resolved, count)?;
    let mut started = Vec::new();
    for part in parts {
        let name = part.spec.name.clone();
        match start_replica(part, environment) {
            Ok((part, how)) => {
                narrate(&format!("{name}: {how}"));
                started.push(part);
            }
            Err(failure) => return Err(undo(&run_dir, &name, failure, &started)),
        }
    }
    follow(args, &run_dir, None)?;
    if stays { attend_replicas(&run_dir) } else { Ok(()) }
}

fn start_replica(mut part: Resolved, environment: &Environment) -> Outcome<(RunDir, String)> {
    Ok(match part.spec.site.clone() {
        Some(site) => {
            let (run_dir, job) = submit::submit(&mut part, &site, environment)?;
            (run_dir, format!("job {}", job.id))
        }
        None => (detached(part)?, "started here".into()),
    })
}

/// Ends the replicas that were `started` before one could not be; the run's name can be used again.
fn undo(run_dir: &RunDir, name: &str, failure: Failure, started: &[RunDir]) -> Failure {
    let Failure { exit, error, hints } = failure;
    let error = error.context(format!("replica {name} cannot be started, so none of run {} is", run_dir.name()));
    let failure = hints.into_iter().fold(Failure::new(exit, error), Failure::hint);
    let left: Vec<&str> = started.iter().filter(|part| cancel(part, true).is_err()).map(RunDir::name).collect();
    if !left.is_empty() {
        return failure.hint(format!("what was started could not be cancelled: nemotron cancel {}", left.join(" ")));
    }
    // Slurm may have taken a job without saying so.
    if exit != Exit::SchedulerSilent {
        _ = std::fs::remove_dir_all(run_dir.path());
    }
    failure
}

/// Says what was started, and stays as long as was asked.
fn follow(args: &LaunchArgs, run_dir: &RunDir, job: Option<u64>) -> Outcome {
    let name = run_dir.name();
    if !args.json {
        match job {
            Some(job) if !args.parsable => print_line(format!("{name} {job}"))?,
            _ => print_line(name)?,
        };
    }
    if !args.parsable {
        narrate(&format!(
            "run {name} in {}\nnext: nemotron status {name}, nemotron logs -f {name}, nemotron cancel {name}",
            run_dir.path().display()
        ));
    }
    let waited = match args.wait {
        Some(target) => wait_for(run_dir, target, None),
        None if args.follow && args.replicas.is_some() => wait_for(run_dir, WaitFor::Done, None),
        None if args.follow => {
            super::events::run(&EventsArgs { run: name.into(), follow: true, json: args.json })?;
            wait_for(run_dir, WaitFor::Done, None)
        }
        None => Ok(()),
    };
    if args.json {
        let endpoint = if args.wait == Some(WaitFor::Ready) { Endpoint::of(run_dir)? } else { None };
        let mut launched = launched(run_dir, endpoint.as_ref());
        launched["job"] = job.into();
        print_json(&launched)?;
    }
    waited
}

/// What Slurm says to the run, which is not submitted.
fn test_only(resolved: &Resolved, site: &Site, environment: &Environment, json: bool) -> Outcome {
    let words = submit::test(resolved, site, environment)?;
    if json { print_json(&json!({ "schema": 1, "accepted": true, "scheduler": words })) } else { print_line(words) }
        .map(drop)
}

/// Shows what would be started, and starts nothing.
pub(super) fn dry_run(resolved: &Resolved, json: bool) -> Outcome {
    if json {
        print_json(&json!({ "schema": 1, "spec": resolved.spec, "plan": resolved.plan }))?;
    } else {
        let spec = toml::to_string(&resolved.spec).map_err(anyhow::Error::new)?;
        print_line(spec.trim_end())?;
    }
    Ok(())
}
