//! The variables that Slurm sets, read once.

use jiff::Timestamp;

use crate::env::Environment;
use crate::report::{Exit, Failure, Outcome};
use crate::slurm::hostlist;

/// The nodes that this batch script was given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Allocation {
    pub(crate) job_id: String,
    /// In Slurm's order, which is that of the ranks.
    pub(crate) nodes: Vec<String>,
    /// How often the job was started again.
    pub(crate) restarts: u32,
    /// When the time limit comes, where Slurm says so (from 23.02 on).
    pub(crate) end_time: Option<Timestamp>,
}

impl Allocation {
    /// `None` outside of an allocation.
    pub(crate) fn of_process() -> Outcome<Option<Self>> {
        Self::of(&Environment::of_process())
    }

    fn of(environment: &Environment) -> Outcome<Option<Self>> {
        let Some(job_id) = environment.get("SLURM_JOB_ID") else { return Ok(None) };
        let list = environment.get("SLURM_JOB_NODELIST").unwrap_or_default();
        let nodes = hostlist::expand(list).map_err(|error| {
            let text = format!("SLURM_JOB_NODELIST={list:?} is no list of nodes");
            Failure::new(Exit::Rendezvous, anyhow::Error::new(error).context(text))
        })?;
        let restarts = environment.get("SLURM_RESTART_COUNT").and_then(|count| count.parse().ok()).unwrap_or(0);
        let end_time = environment.get("SLURM_JOB_END_TIME").and_then(|seconds| seconds.parse().ok());
        let end_time = end_time.and_then(|seconds| Timestamp::from_second(seconds).ok());
        Ok(Some(Self { job_id: job_id.into(), nodes, restarts, end_time }))
    }
}

/// Which of `world_size` ranks Slurm made this process; `None` when it is not one of such a step.
pub(crate) fn rank(environment: &Environment, world_size: usize) -> Option<usize> {
    // The batch script has SLURM_PROCID too, but no step.
    let number = |name| environment.get(name).and_then(|text| text.parse::<usize>().ok());
    let rank = number("SLURM_PROCID")?;
    (number("SLURM_STEP_NUM_TASKS") == Some(world_size) && rank < world_size).then_some(rank)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    fn environment(variables: &[(&str, &str)]) -> Environment {
        Environment::new(variables.iter().map(|&(name, value)| (name.into(), value.into())), "/")
    }

    #[test]
    fn an_allocation_is_known_by_its_job() {
        assert_eq!(Allocation::of(&environment(&[])).unwrap(), None);
        let variables = [("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[1-2]"), ("SLURM_RESTART_COUNT", "2")];
        let allocation = Allocation::of(&environment(&variables)).unwrap().unwrap();
        assert_eq!((allocation.nodes.len(), allocation.restarts), (2, 2));
        let broken = environment(&[("SLURM_JOB_ID", "7"), ("SLURM_JOB_NODELIST", "n[1")]);
        assert_eq!(Allocation::of(&broken).unwrap_err().exit, Exit::Rendezvous);
    }

    #[test]
    fn a_rank_is_a_task_of_a_step_of_the_right_size() {
        let batch = [("SLURM_PROCID", "0")];
        assert_eq!(rank(&environment(&batch), 4), None);
        let task = [("SLURM_PROCID", "3"), ("SLURM_STEP_NUM_TASKS", "4")];
        assert_eq!(rank(&environment(&task), 4), Some(3));
        assert_eq!(rank(&environment(&task), 2), None);
    }
}
