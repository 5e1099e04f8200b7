use anyhow::Context as _;
use nix::unistd::setsid;

use crate::cli::SuperviseArgs;
use crate::env::Environment;
use crate::report::Outcome;
use crate::rundir::RunDir;
use crate::slurm::env::Allocation;
use crate::slurm::job::Job;
use crate::start::DETACHED;
use crate::supervise;

pub(crate) fn run(args: &SuperviseArgs) -> Outcome {
    if Environment::of_process().get(DETACHED).is_some() {
        setsid().context("cannot leave the terminal's session")?;
    }
    supervise::block_signals()?;
    let run_dir = RunDir::open(&args.run_dir)?;
    let attempt = attempt(&run_dir)?;
    let status = supervise::supervise(&run_dir, attempt, Box::new(|_| ()))?;
    supervise::narrate(&format!("run {} is {}", run_dir.name(), status.phase));
    Ok(())
}

/// Each time that Slurm starts the job again is another attempt.
fn attempt(run_dir: &RunDir) -> Outcome<u32> {
    let Some(allocation) = Allocation::of_process()? else { return Ok(run_dir.last_attempt()) };
    // The job may start before whoever submitted it has written down which attempt it is.
    let first = Job::recorded(run_dir)?.map_or(0, |job| job.first_attempt);
    Ok(first + allocation.restarts)
}
