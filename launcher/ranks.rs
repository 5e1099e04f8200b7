//! What a supervisor needs from whatever starts its ranks: child processes on this machine, or a step of Slurm.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitStatus;
use std::time::Duration;

/// The processes of a run's ranks. Dropping it ends them.
pub(crate) trait Ranks {
    /// The address of this host at which ranks reach their supervisor.
    fn meeting_point(&self) -> IpAddr;

    /// Starts ranks 0 to `count` - 1, from a thread that lives as long as they do.
    fn start(&mut self, count: usize, supervisor: SocketAddr, attempt: u32) -> anyhow::Result<()>;

    /// Ranks whose process has ended since the last call, as far as this is known, and how.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)>;

    /// Where the rank is or must be, such as `host n042, pid 4711`.
    fn place(&self, rank: usize) -> Option<String>;

    fn any_left(&self) -> bool;

    fn kill_all(&mut self);

    /// From "stop" to [`Self::kill_all`].
    fn grace(&self) -> Duration;

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
