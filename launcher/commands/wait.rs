use std::time::{Duration, Instant};

use crate::cli::{WaitArgs, WaitFor};
use crate::observe::Observer;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, find_run};
use crate::start::POLL;
use crate::state::{RunPhase, Status};
use crate::supervise::{Display, PendingSignals, is_quiet};

pub(crate) fn run(args: &WaitArgs) -> Outcome {
    wait_for(&find_run(&args.run)?, args.target, args.timeout)
}

/// Blocks until the run has come so far, or has ended.
pub(super) fn wait_for(run_dir: &RunDir, target: WaitFor, timeout: Option<Duration>) -> Outcome {
    watch(run_dir, target, timeout, |_| Ok(()))
}

/// Blocks until all replicas of this machine have ended; signals, which are blocked, go to them.
pub(super) fn attend_replicas(run_dir: &RunDir) -> Outcome {
    let signals = PendingSignals::new()?;
    watch(run_dir, WaitFor::Done, None, |status| {
        let Some(signal) = signals.next()? else { return Ok(()) };
        let supervisors =
            status.replicas.iter().filter(|part| !part.phase.is_end()).filter_map(|part| part.supervisor.as_ref());
        // One that has ended just now needs none.
        supervisors.for_each(|supervisor| _ = supervisor.signal(signal));
        Ok(())
    })
}

fn watch(
    run_dir: &RunDir,
    target: WaitFor,
    timeout: Option<Duration>,
    mut between: impl FnMut(&Status) -> Outcome,
) -> Outcome {
    let deadline = timeout.and_then(|timeout| Instant::now().checked_add(timeout));
    let mut observer = Observer::new(run_dir)?;
    let mut display = Display::stderr(is_quiet());
    let outcome = loop {
        let status = observer.look()?;
        display.show(&status);
        between(&status)?;
        if status.phase.is_end() {
            break status.outcome();
        }
        if target == WaitFor::Ready && (status.phase.is_up() || status.phase == RunPhase::Draining) {
            break Ok(());
        }
        if deadline.is_some_and(|deadline| Instant::now() >= deadline) {
            let text = format!("the time is over: run {} is still {}", run_dir.name(), status.phase);
            break Err(Failure::msg(Exit::WaitTimedOut, text));
        }
        std::thread::sleep(POLL);
    };
    display.finish();
    outcome
}
