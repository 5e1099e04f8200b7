use anyhow::Context as _;
use serde_json::json;

use crate::cli::ResumeArgs;
use crate::cluster;
use crate::env::Environment;
use crate::events::{Event, Journal};
use crate::host::Host;
use crate::job_file::load_job;
use crate::observe::Observer;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::resolve;
use crate::rundir::{RunDir, find_run, write_atomic, write_json};
use crate::slurm::client::{BRIEF, PATIENCE};
use crate::slurm::job::Job;
use crate::slurm::parse;
use crate::spec::{RunSpec, Task};
use crate::start::{Output, attend, detach, launched};
use crate::state::{RunPhase, Status};
use crate::submit;
use crate::supervise::{block_signals, narrate, unblock_signals};

use super::wait::{attend_replicas, wait_for};

pub(crate) fn run(args: &ResumeArgs) -> Outcome {
    if !args.detach {
        block_signals()?;
    }
    let run_dir = find_run(&args.run)?;
    let parts = replicas::of(&run_dir, &run_dir.spec()?);
    if !parts.is_empty() {
        return resume_replicas(args, &run_dir, &parts);
    }
    let name = run_dir.name();
    let spec = run_dir.spec()?;
    let Task::Job { file, overrides, .. } = &spec.task else {
        return Err(Failure::msg(Exit::Usage, format!("run {name} serves; only jobs are resumed")));
    };
    check_ended(&run_dir)?;
    let environment = Environment::of_process();
    let changed = resolve::resume(args, &spec, &environment, &Host::probe()?)?;
    let output = load_job(file, overrides)?.file.output.path;
    let scheduled = changed.as_ref().unwrap_or(&spec).site.is_some();
    if let (Some(changed), false) = (&changed, scheduled) {
        run_dir.write_spec(changed).context("cannot write run.lock.toml")?;
    }
    let attempt = begin(&run_dir, changed.as_ref().unwrap_or(&spec), args.allow_changed)?;
    narrate(&format!("run {name}, attempt {attempt}"));
    if scheduled {
        unblock_signals()?;
        return submit(args, &run_dir, attempt, changed.as_ref(), &environment);
    }
    if !args.detach {
        return attend(&run_dir, attempt, Some(&output), if args.json { Output::Json } else { Output::Url });
    }
    detach(&run_dir, attempt)?;
    if args.json { print_json(&launched(&run_dir, None)) } else { print_line(name) }.map(drop)
}

/// Those that have ended before the whole was done; none of them depends on this process.
fn resume_replicas(args: &ResumeArgs, run_dir: &RunDir, parts: &[RunDir]) -> Outcome {
    let name = run_dir.name();
    let status = Observer::new(run_dir)?.look()?;
    if status.phase == RunPhase::Done {
        let failure = Failure::msg(Exit::Usage, format!("run {name} is done"));
        return Err(failure.hint(format!("nemotron results {name} verify")));
    }
    let ended: Vec<&RunDir> =
        parts.iter().zip(&status.replicas).filter(|(_, part)| part.phase.is_end()).map(|(part, _)| part).collect();
    if ended.is_empty() {
        return Err(Failure::msg(Exit::Usage, format!("all replicas of run {name} go on"))
            .hint(format!("nemotron status {name}")));
    }
    let is_local = status.replicas.iter().all(|part| part.cluster == cluster::LOCAL);
    let stays = is_local && !args.detach && args.wait.is_none();
    if !stays {
        unblock_signals()?;
    }
    for part in ended {
        let part = part.path().strip_prefix(run_dir.path()).unwrap_or(part.path()).display().to_string();
        run(&ResumeArgs { run: part, detach: true, wait: None, ..args.clone() })?;
    }
    match args.wait {
        Some(target) => wait_for(run_dir, target, None),
        None if stays => attend_replicas(run_dir),
        None => Ok(()),
    }
}

/// Refuses a run that is done or goes on. A job that Slurm holds will not: it is cancelled.
fn check_ended(run_dir: &RunDir) -> Outcome {
    let name = run_dir.name();
    let status = Observer::new(run_dir)?.look()?;
    if status.phase == RunPhase::Done {
        let failure = Failure::msg(Exit::Usage, format!("run {name} is done"));
        return Err(failure.hint(format!("nemotron results {name} verify")));
    }
    let goes_on = || {
        let failure = Failure::msg(Exit::Usage, format!("run {name} is {}", status.phase));
        Err(failure.hint(format!("nemotron status {name}")))
    };
    if run_dir.spec()?.site.is_none() {
        return if status.phase.is_end() || status.supervisor.is_none() { Ok(()) } else { goes_on() };
    }
    let Some(job) = Job::of(run_dir)? else { return Ok(()) };
    match job.look(BRIEF)? {
        Some(queued) if queued.state.is_waiting() && parse::reason(&queued.reason).stuck => {
            narrate(&format!("job {} {}, and is cancelled", job.id, queued.state.words()));
            job.cancel()?;
        }
        Some(queued) if !queued.state.is_end() && !status.phase.is_end() => return goes_on(),
        _ => {}
    }
    // An attempt that is about to end would go on writing.
    if job.wait_gone(PATIENCE)? { Ok(()) } else { goes_on() }
}

fn begin(run_dir: &RunDir, spec: &RunSpec, allow_changed: bool) -> Outcome<u32> {
    let attempt = run_dir.next_attempt()?;
    let job = Status::of(run_dir)?.job;
    let write = || -> anyhow::Result<()> {
        write_atomic(&run_dir.resumed_file(attempt), b"")?;
        if allow_changed {
            write_atomic(&run_dir.allow_changed_file(attempt), b"")?;
        }
        // Whoever waits for the run must not find how the attempt before ended.
        write_json(&run_dir.status_file(), &Status { job, ..Status::pending(spec, attempt) })?;
        Ok(())
    };
    write().with_context(|| format!("cannot begin attempt {attempt}"))?;
    Ok(attempt)
}

fn submit(
    args: &ResumeArgs,
    run_dir: &RunDir,
    attempt: u32,
    changed: Option<&RunSpec>,
    environment: &Environment,
) -> Outcome {
    let name = run_dir.name();
    let before = Status::of(run_dir)?;
    let job = submit::resume(run_dir, changed, environment).inspect_err(|failure| {
        // It is as if it had not been tried.
        let cause = format!("attempt {attempt} could not be submitted: {:#}", failure.error);
        _ = crate::summary::record_end(run_dir, RunPhase::Failed, failure.exit, &cause);
    })?;
    let event = Event::new("submitted").text(format!("job {}", job.id));
    // Without its line the journal still serves.
    _ = Journal::open(run_dir, before.attempt).map(|mut journal| journal.write(event));
    if args.json {
        let mut launched = launched(run_dir, None);
        launched["job"] = json!(job.id);
        print_json(&launched)?;
    } else {
        print_line(format!("{name} {}", job.id))?;
    }
    args.wait.map_or(Ok(()), |target| wait_for(run_dir, target, None))
}
