use std::time::Duration;

use nix::sys::signal::Signal;

use crate::cli::CancelArgs;
use crate::process::ProcessId;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, find_run};
use crate::state::Status;
use crate::supervise::narrate;

/// What a supervisor needs beyond the time for draining.
const MARGIN: Duration = Duration::from_secs(10);
/// For how long ranks may outlive their supervisor.
const ORPHANED: Duration = Duration::from_secs(5);

pub(crate) fn run(args: &CancelArgs) -> Outcome {
    // All are found before the first is touched.
    let runs = args.runs.iter().map(|selector| find_run(selector)).collect::<Outcome<Vec<_>>>()?;
    runs.iter().try_for_each(|run_dir| cancel(run_dir, args.now))
}

fn cancel(run_dir: &RunDir, now: bool) -> Outcome {
    let name = run_dir.name();
    let status = Status::of(run_dir)?;
    let ended_before = status.phase.is_end();
    if let Some(supervisor) = &status.supervisor {
        let signal = if now { Signal::SIGQUIT } else { Signal::SIGTERM };
        let limit = if now { MARGIN } else { run_dir.spec()?.deadlines.drain + MARGIN };
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
    match std::fs::remove_file(run_dir.endpoint_file()) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(anyhow::Error::new(error).into()),
        _ => {}
    }
    let phase = Status::of(run_dir)?.phase;
    narrate(&format!("run {name} {} {phase}; nothing of it is left", if ended_before { "was already" } else { "is" }));
    Ok(())
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
