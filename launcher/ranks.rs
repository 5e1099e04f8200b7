//! What a supervisor needs from whatever starts its ranks: child processes on this machine, or a step of Slurm.

use std::net::{IpAddr, SocketAddr};
use std::process::ExitStatus;
use std::time::Duration;

use crate::local::LocalRanks;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::RunDir;
use crate::slurm::env::Allocation;
use crate::slurm::step::Step;

/// Why a scheduler takes nodes back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Notice {
    /// Somebody cancelled the job.
    Cancelled,
    TimeOver,
    Preempted,
    NodeFailure,
    /// Somebody put the job back into the queue.
    Requeued,
}

impl Notice {
    /// For people.
    pub(crate) fn words(self) -> &'static str {
        match self {
            Self::Cancelled => "the job was cancelled",
            Self::TimeOver => "the time of the allocation is over",
            Self::Preempted => "the scheduler gives the nodes to another job",
            Self::NodeFailure => "the scheduler lost a node of the job",
            Self::Requeued => "the job was put back into the queue",
        }
    }
}

/// The processes of a run's ranks, and who gave the nodes that they run on. Dropping it ends them.
pub(crate) trait Ranks {
    /// Addresses of this host at which ranks may reach their supervisor, the likeliest first.
    fn meeting_points(&self) -> &[IpAddr];

    /// Starts ranks 0 to `count` - 1, from a thread that lives as long as they do. They find their supervisor at one of the addresses.
    fn start(&mut self, count: usize, supervisor: &[SocketAddr], attempt: u32) -> anyhow::Result<()>;

    /// Ranks whose process has ended since the last call, as far as this is known, and how.
    fn reap(&mut self) -> Vec<(usize, ExitStatus)>;

    /// Where the rank is or must be, such as `host n042, pid 4711`.
    fn place(&self, rank: usize) -> Option<String>;

    /// Its node, as the scheduler names it.
    fn node(&self, rank: usize) -> Option<String>;

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

    /// The port on which the scheduler's daemon listens on the rank's node.
    fn daemon_port(&self, _rank: usize) -> Option<u16> {
        None
    }

    /// For how long a run does well to go on while that daemon is gone.
    fn daemon_patience(&self) -> Option<Duration> {
        None
    }

    /// Until the scheduler takes the nodes back, if it does and can be asked.
    fn time_left(&self) -> Option<Duration> {
        None
    }

    /// Why the scheduler has begun to end the ranks.
    fn notice(&self) -> Option<Notice> {
        None
    }

    /// The scheduler starts the job again by itself.
    fn is_requeued(&self) -> bool {
        false
    }

    /// All nodes work, as far as the scheduler knows.
    fn are_nodes_up(&self) -> bool {
        true
    }

    /// Submits the job that goes on when this one has ended, away from some nodes if that is possible. Its id.
    fn submit_successor(&self, _avoid: &[String]) -> Outcome<u64> {
        Err(Failure::msg(Exit::Internal, "there is no scheduler"))
    }

    /// Puts this job back into the queue, which ends this process.
    fn requeue(&self) -> Outcome {
        Err(Failure::msg(Exit::Internal, "there is no scheduler"))
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
