//! A job of Slurm's, from its own batch script: how long it has, why it is ended, and what goes on after it.

use std::path::PathBuf;
use std::time::Duration;

use crate::cluster::Site;
use crate::env::Environment;
use crate::events::now;
use crate::ranks::Notice;
use crate::report::Outcome;
use crate::rundir::RunDir;
use crate::slurm::client::{PATIENCE, Request, SlurmError, arguments, ask};
use crate::slurm::env::Allocation;
use crate::slurm::job;
use crate::slurm::parse::{self, SQUEUE_FORMAT};
use crate::tail::last_lines;

/// How long a question may take whose answer is waited for while Slurm ends the job.
pub(super) const URGENT: Duration = Duration::from_secs(2);
/// Lines of the batch script's log that are looked at.
const LOG_LINES: usize = 100;

/// The job that this process is the batch script of.
pub(super) struct OwnJob {
    run_dir: RunDir,
    site: Site,
    allocation: Allocation,
}

impl OwnJob {
    pub(super) fn new(run_dir: &RunDir, site: &Site, allocation: &Allocation) -> Self {
        Self { run_dir: run_dir.clone(), site: site.clone(), allocation: allocation.clone() }
    }

    /// Until the time limit: by Slurm's word, which follows later changes, else by what it said at the start.
    pub(super) fn time_left(&self) -> Option<Duration> {
        let mut options = arguments(["--noheader", "--format", SQUEUE_FORMAT]);
        options.push(format!("--jobs={}", self.allocation.job_id));
        let answer = ask("squeue", &options, &Request::within(URGENT)).ok();
        let queued = answer.and_then(|answer| answer.stdout.lines().find_map(parse::queued));
        let told = || {
            let left = self.allocation.end_time?.duration_since(now());
            Some(Duration::try_from(left).unwrap_or_default())
        };
        // A job without a limit has no time left to speak of.
        queued.map_or_else(told, |queued| queued.left)
    }

    /// Why Slurm is ending this job. What `slurmstepd` writes before it signals needs no controller; a warning ahead of preemption does.
    pub(super) fn notice(&self) -> Option<Notice> {
        let log: PathBuf = self.run_dir.path().join(format!("slurm-{}.log", self.allocation.job_id));
        let said = last_lines(&log, LOG_LINES);
        if let Some(notice) = said.iter().rev().find_map(|line| cancelled(line, &self.allocation.job_id)) {
            return Some(notice);
        }
        let fields = self.show()?;
        let is_set = |key| parse::job_fields(&fields).get(key).is_some_and(|&value| value != "None");
        is_set("PreemptTime").then_some(Notice::Preempted)
    }

    /// Slurm counts a restart as soon as it has decided on it.
    pub(super) fn is_requeued(&self) -> bool {
        let restarts = self.show().and_then(|fields| parse::job_fields(&fields).get("Restarts")?.parse::<u32>().ok());
        restarts.is_some_and(|restarts| restarts > self.allocation.restarts)
    }

    fn show(&self) -> Option<String> {
        let options = arguments(["--oneliner", "show", "job", &self.allocation.job_id]);
        Some(ask("scontrol", &options, &Request::within(URGENT)).ok()?.stdout)
    }

    /// Whether Slurm has heard from all nodes and calls none of them down.
    pub(super) fn are_nodes_up(&self) -> bool {
        let mut options = arguments(["--noheader", "--Node", "--format=%T"]);
        options.push(format!("--nodes={}", self.allocation.nodes.join(",")));
        let Ok(answer) = ask("sinfo", &options, &Request::within(URGENT)) else { return true };
        let is_up =
            |state: &str| !state.contains(['*', '$']) && !state.starts_with("down") && !state.starts_with("fail");
        answer.stdout.lines().map(str::trim).all(is_up)
    }

    pub(super) fn submit_successor(&self, avoid: &[String]) -> Outcome<u64> {
        let after = format!("--dependency=afterany:{}", self.allocation.job_id);
        Ok(job::submit_again(&self.run_dir, &self.site, vec![after], avoid, &Environment::of_process())?.id)
    }

    pub(super) fn requeue(&self) -> Result<(), SlurmError> {
        ask("scontrol", &arguments(["requeue", &self.allocation.job_id]), &Request::within(PATIENCE)).map(drop)
    }
}

/// What a line such as `slurmstepd: error: *** JOB 5 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***` says about the job.
fn cancelled(line: &str, job: &str) -> Option<Notice> {
    let (_, rest) = line.split_once(&format!("*** JOB {job} ON "))?;
    let (_, rest) = rest.split_once(" CANCELLED AT ")?;
    let reason = rest.split_once(" DUE TO ").map_or("", |(_, reason)| reason);
    Some(match reason.trim_end_matches(['*', ' ']) {
        "TIME LIMIT" | "DEADLINE" => Notice::TimeOver,
        "PREEMPTION" => Notice::Preempted,
        "JOB REQUEUE" => Notice::Requeued,
        reason if reason.contains("NODE") => Notice::NodeFailure,
        _ => Notice::Cancelled,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slurm_says_why_it_ends_a_job() {
        let line = |reason: &str| {
            format!("slurmstepd-n1: error: *** JOB 5 ON n1 CANCELLED AT 2026-11-24T15:13:21{reason} ***")
        };
        for (reason, notice) in [
            ("", Notice::Cancelled),
            (" DUE TO TIME LIMIT", Notice::TimeOver),
            (" DUE TO PREEMPTION", Notice::Preempted),
            (" DUE TO JOB REQUEUE", Notice::Requeued),
            (" DUE TO NODE FAILURE, SEE SLURMCTLD LOG FOR DETAILS", Notice::NodeFailure),
        ] {
            assert_eq!(cancelled(&line(reason), "5"), Some(notice), "{reason}");
        }
        assert_eq!(cancelled(&line(""), "15"), None);
        assert_eq!(cancelled("*** STEP 5.0 ON n1 CANCELLED AT 2026-11-24T15:13:21 ***", "5"), None);
    }
}
