//! What a supervisor needs from whatever starts its ranks: child processes on this machine, or a step of Slurm.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitStatus;
use std::time::Duration;

use crate::local::LocalRanks;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::RunDir;
use crate::slurm::env::Allocation;
use crate::slurm::step::Step;

/// The processes of a run's ranks. Dropping it ends them.
pub(crate) trait Ranks {
    /// Addresses of this host at which ranks may reach their supervisor, the likeliest first.
    fn meeting_points(&self) -> &[IpAddr];

    /// Starts ranks 0 to `count` - 1, from a thread that lives as long as they do. They find their supervisor at one of the addresses.
    fn start(&mut self, count: usize, supervisor: &[SocketAddr], attempt: u32) -> anyhow::Result<()>;

    /// Ranks whose process has ended since the last call, as far as this is known, and how.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)>;

    /// Where the rank is or must be, such as `host n042, pid 4711`.
    fn place(&self, rank: usize) -> Option<String>;

    fn any_left(&self) -> bool;

    fn kill_all(&mut self);

    /// From "stop" to [`Self::kill_all`].
    fn grace(&self) -> Duration;

    /// Ranks of which a scheduler has reported that they never became one, with the exit code and why; each rank once.
    fn refused(&mut self) -> Vec<(usize, Exit, String)> {
        Vec::new()
    }

    /// What a scheduler has reported about the end of a rank.
    fn report_on(&self, _rank: usize) -> Option<String> {
        None
    }

    /// That all ranks have ended at once, and how; said once, and only by a scheduler's step.
    fn collapse(&mut self) -> Option<String> {
        None
    }

    /// A scheduler ends ranks when it ends the supervisor, and signals them by itself.
    fn are_scheduled(&self) -> bool {
        false
    }
}

/// What starts the run's ranks.
pub(crate) fn of_run(run_dir: &RunDir) -> Outcome<Box<dyn Ranks>> {
    let spec = run_dir.spec()?;
    match (&spec.site, Allocation::of_process()?) {
        (Some(site), Some(allocation)) => Ok(Box::new(Step::new(run_dir, &spec, site, allocation)?)),
        (Some(_), None) => Err(Failure::msg(Exit::Usage, "this run is for Slurm, but there is no allocation here")
            .hint("`nemotron launch` submits it; `nemotron supervise` is for the batch script")),
        (None, _) => Ok(Box::new(LocalRanks::new(run_dir))),
    }
}
