use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::cli::CancelArgs;
use crate::observe::Observer;
use crate::process::ProcessId;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, find_run};
use crate::slurm::client::PATIENCE;
use crate::slurm::job::Job;
use crate::start::POLL;
use crate::state::{RunPhase, Status};
use crate::summary::record_end;
use crate::supervise::narrate;

/// What a supervisor needs beyond the time for draining.
const MARGIN: Duration = Duration::from_secs(10);
/// For how long ranks may outlive their supervisor.
const ORPHANED: Duration = Duration::from_secs(5);
/// For how long Slurm may take to end the processes of a job.
const CLEANUP: Duration = Duration::from_secs(120);

pub(crate) fn run(args: &CancelArgs) -> Outcome {
    // All are found before the first is touched.
    let runs = args.runs.iter().map(|selector| find_run(selector)).collect::<Outcome<Vec<_>>>()?;
    runs.iter().try_for_each(|run_dir| cancel(run_dir, args.now))
}

pub(super) fn cancel(run_dir: &RunDir, now: bool) -> Outcome {
    let name = run_dir.name();
    let spec = run_dir.spec()?;
    let parts = replicas::of(run_dir, &spec);
    if !parts.is_empty() {
        return parts.iter().try_for_each(|part| cancel(part, now));
    }
    let ended_before = Status::of(run_dir)?.phase.is_end();
    let limit = if now { MARGIN } else { spec.deadlines.drain + MARGIN };
    if spec.site.is_some() {
        cancel_job(run_dir, now, limit)?;
    } else {
        cancel_processes(run_dir, now, limit)?;
    }
    match std::fs::remove_file(run_dir.endpoint_file()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(anyhow::Error::new(error).into()),
        _ => {}
    }
    let phase = Status::of(run_dir)?.phase;
    narrate(&format!("run {name} {} {phase}; nothing of it is left", if ended_before { "was already" } else { "is" }));
    Ok(())
}

fn cancel_processes(run_dir: &RunDir, now: bool, limit: Duration) -> Outcome {
    let name = run_dir.name();
    if let Some(supervisor) = &Status::of(run_dir)?.supervisor {
        let signal = if now { Signal::SIGQUIT } else { Signal::SIGTERM };
        end(supervisor, signal, limit).map_err(|error| {
            Failure::new(Exit::Internal, anyhow::Error::new(error).context(format!("cannot end run {name}")))
        })?;
    }
    // The ranks that the last snapshot knows; they end by themselves when their supervisor has.
    for rank in Status::of(run_dir)?.ranks.iter().filter_map(|rank| rank.process.as_ref()) {
        if !rank.wait_gone(ORPHANED) {
            rank.signal(Signal::SIGKILL).map_err(anyhow::Error::new)?;
        }
        if !rank.wait_gone(ORPHANED) {
            let text = format!("process {} of run {name} cannot be killed", rank.pid);
            return Err(Failure::msg(Exit::Internal, text));
        }
    }
    Ok(())
}

/// Asks the supervisor, waits, then lets Slurm end the job, and sees that it has.
fn cancel_job(run_dir: &RunDir, now: bool, limit: Duration) -> Outcome {
    let Some(job) = Job::of(run_dir)? else { return cancelled(run_dir, "it was never submitted") };
    let mut observer = Observer::new(run_dir)?;
    let queued = job.look(PATIENCE)?.filter(|queued| !queued.state.is_end());
    let running = queued.as_ref().is_some_and(|queued| !queued.state.is_waiting());
    if running && Status::of(run_dir)?.supervisor.is_some() {
        // SIGTERM would be Slurm's own way to end a job, ranks and all.
        job.signal(if now { "QUIT" } else { "USR2" })?;
        let deadline = Instant::now() + limit;
        while !observer.look()?.phase.is_end() && Instant::now() < deadline {
            std::thread::sleep(POLL);
        }
    }
    if queued.is_some() && !observer.look()?.phase.is_end() {
        job.cancel()?;
    }
    if !job.wait_gone(CLEANUP)? {
        let text = format!("Slurm has not ended job {} of run {} yet", job.id, run_dir.name());
        return Err(Failure::msg(Exit::Internal, text).hint("`squeue` shows where it hangs; cancel it again later"));
    }
    if Status::of(run_dir)?.phase.is_end() {
        return Ok(());
    }
    let when = if running { "before its supervisor could say so" } else { "while it was pending" };
    cancelled(run_dir, &format!("job {} was cancelled {when}", job.id))
}

fn cancelled(run_dir: &RunDir, cause: &str) -> Outcome {
    record_end(run_dir, RunPhase::Cancelled, Exit::Terminated, cause)
}

/// Asks, waits, then kills.
fn end(process: &ProcessId, signal: Signal, limit: Duration) -> std::io::Result<()> {
    process.signal(signal)?;
    if !process.wait_gone(limit) {
        process.signal(Signal::SIGKILL)?;
        process.wait_gone(MARGIN);
    }
    Ok(())
}
