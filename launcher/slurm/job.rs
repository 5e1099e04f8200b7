//! A job of Slurm's, from the login node: submitted once, asked about, ended.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::{Deserialize, Serialize};

use crate::cluster::Site;
use crate::env::Environment;
use crate::render::{submission_environment, submission_token};
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, read_json, write_json};
use crate::slurm::client::{BRIEF, PATIENCE, Request, SlurmError, arguments, ask};
use crate::slurm::parse::{self, Queued, SQUEUE_FORMAT, State};
use crate::supervise::narrate;

/// For how long a job is looked for whose submission was not answered.
const SEARCH: Duration = Duration::from_secs(60);

/// For how long Slurm is asked why a job waits, when there is a doubt whether it can start at all, and when there is none.
const VERDICT: (Duration, Duration) = (Duration::from_secs(5), Duration::from_secs(1));
/// How Slurm says that no nodes can be had.
pub(crate) const NO_NODES: &str = "Requested node configuration is not available";

/// What `job.json` holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Job {
    pub(crate) schema: u32,
    pub(crate) id: u64,
}

impl Job {
    /// The job of a run; `None` if it was never submitted, as far as Slurm knows.
    pub(crate) fn of(run_dir: &RunDir) -> Outcome<Option<Self>> {
        if let Some(job) = Self::recorded(run_dir)? {
            return Ok(Some(job));
        }
        let found = search(run_dir, 0, BRIEF)?;
        found.map(|id| Self::record(run_dir, id)).transpose()
    }

    /// The job as `job.json` has it, without asking Slurm.
    pub(crate) fn recorded(run_dir: &RunDir) -> Outcome<Option<Self>> {
        Ok(read_json(&run_dir.job_file())?)
    }

    fn record(run_dir: &RunDir, id: u64) -> Outcome<Self> {
        let job = Self { schema: 1, id };
        write_json(&run_dir.job_file(), &job).map_err(anyhow::Error::new)?;
        Ok(job)
    }

    /// What Slurm says about it; `None` when it does not know it any more.
    pub(crate) fn look(&self, limit: Duration) -> Result<Option<Queued>, SlurmError> {
        let mut options = arguments(["--noheader", "--states=all", "--format", SQUEUE_FORMAT]);
        options.push(format!("--jobs={}", self.id));
        match ask("squeue", &options, &Request::within(limit)) {
            Ok(answer) => Ok(answer.stdout.lines().find_map(parse::queued)),
            Err(SlurmError::Refused { reason, .. }) if reason.contains("Invalid job id") => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How a job ended that Slurm's queue has forgotten, where there is accounting.
    pub(crate) fn accounted(&self) -> Option<State> {
        let mut options = arguments(["--noheader", "--parsable2", "--allocations", "--format", parse::SACCT_FORMAT]);
        options.push(format!("--jobs={}", self.id));
        let answer = ask("sacct", &options, &Request::within(BRIEF)).ok()?;
        answer.stdout.lines().find_map(parse::accounted).map(|row| row.state)
    }

    /// Asks the supervisor to end the run. Only the batch script is signalled, so that the ranks can finish what they do.
    pub(crate) fn signal(&self, name: &str) -> Result<(), SlurmError> {
        let options = ["--batch".into(), format!("--signal={name}"), self.id.to_string()];
        ask("scancel", &options, &Request::within(PATIENCE)).map(drop)
    }

    pub(crate) fn cancel(&self) -> Result<(), SlurmError> {
        ask("scancel", &[self.id.to_string()], &Request::within(PATIENCE)).map(drop)
    }

    /// Whether the job, which was just submitted, waits for what may come. One that would wait for ever is cancelled. `refusal` is what
    /// `--test-only` gave: it says the same of nodes that are only down or drained for now.
    pub(crate) fn check_can_start(&self, refusal: Option<Failure>) -> Outcome {
        let deadline = Instant::now() + if refusal.is_some() { VERDICT.0 } else { VERDICT.1 };
        loop {
            let queued = self.look(BRIEF)?.filter(|queued| queued.state.is_waiting());
            let Some(reason) = queued.map(|queued| parse::reason(&queued.reason)) else { return Ok(()) };
            // Who holds a job means to let it go.
            if reason.stuck && !reason.held {
                self.cancel()?;
                self.wait_gone(SEARCH)?;
                let text = format!("Slurm would never start the job: {}", reason.words);
                let refusal = refusal.unwrap_or_else(|| {
                    Failure::msg(Exit::SchedulerRefused, "it was submitted, looked at and cancelled").hint(
                        "ask for less, or by another account, --qos or --partition; \
                         `sacctmgr show associations user=$USER` and `sacctmgr show qos` list the limits",
                    )
                });
                let error = Failure::new(Exit::SchedulerRefused, refusal.error.context(text));
                return Err(refusal.hints.into_iter().fold(error, Failure::hint));
            }
            let over = Instant::now() >= deadline;
            if reason.decided || over && refusal.is_some() {
                narrate(&format!("job {} waits: {}", self.id, reason.words));
            }
            if reason.decided || over {
                return Ok(());
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Waits until nothing of the job is left; false when something still is after `limit`.
    pub(crate) fn wait_gone(&self, limit: Duration) -> Result<bool, SlurmError> {
        let deadline = Instant::now() + limit;
        let mut pause = Duration::from_millis(100);
        while self.look(PATIENCE)?.is_some_and(|job| !job.state.is_end()) {
            if Instant::now() >= deadline {
                return Ok(false);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(2));
        }
        Ok(true)
    }
}

/// Asks Slurm whether it would take the script. Its words, such as when the job would start.
pub(crate) fn test(script: &str, environment: &[(String, String)]) -> Outcome<String> {
    let request = Request { input: script, environment: Some(environment), limit: PATIENCE };
    let answer = ask("sbatch", &arguments(["--test-only"]), &request).map_err(explain)?;
    Ok(answer.stderr.trim().trim_start_matches("sbatch: ").to_owned())
}

/// Submits the run's script, with options that go before its own. It happens at most once: when Slurm does not answer, the job is
/// looked for, never submitted again.
pub(crate) fn submit(
    run_dir: &RunDir,
    script: &str,
    options: &[String],
    environment: &[(String, String)],
) -> Outcome<Job> {
    let request = Request { input: script, environment: Some(environment), limit: PATIENCE };
    let before = Job::recorded(run_dir)?.map_or(0, |job| job.id);
    let silence = match ask("sbatch", &[&arguments(["--parsable"])[..], options].concat(), &request) {
        Ok(answer) => match parse::submitted(&answer.stdout) {
            Some(submitted) => return Job::record(run_dir, submitted.job),
            None => {
                SlurmError::Silent { program: "sbatch", reason: format!("it printed no job id: {}", answer.stdout) }
            }
        },
        Err(error @ SlurmError::Silent { .. }) => error,
        Err(error) => return Err(explain(error)),
    };
    tracing::warn!(%silence, "the submission was not answered; looking for the job");
    match search(run_dir, before, SEARCH) {
        Ok(Some(id)) => Job::record(run_dir, id),
        Ok(None) => Err(Failure::from(silence).hint("the job was not submitted")),
        Err(_) => Err(Failure::from(silence).hint(format!(
            "the job may have been submitted all the same: `nemotron status {}` finds it",
            run_dir.name()
        ))),
    }
}

/// Submits the run's script once more, away from nodes that are to blame, if there are others.
pub(crate) fn submit_again(
    run_dir: &RunDir,
    site: &Site,
    options: Vec<String>,
    avoid: &[String],
    environment: &Environment,
) -> Outcome<Job> {
    let file = run_dir.script_file();
    let script = std::fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let variables = submission_environment(site, environment);
    if !avoid.is_empty() {
        let excluded: Vec<&str> = site.exclude.iter().chain(avoid).map(String::as_str).collect();
        let away = [&options[..], &[format!("--exclude={}", excluded.join(","))]].concat();
        match submit(run_dir, &script, &away, &variables) {
            Err(failure) if failure.exit == Exit::SchedulerRefused => {}
            submitted => return submitted,
        }
    }
    submit(run_dir, &script, &options, &variables)
}

/// The newest job with the run's token after job `before`, by name; asked again until Slurm answers or the time is over.
fn search(run_dir: &RunDir, before: u64, limit: Duration) -> Result<Option<u64>, SlurmError> {
    let token = submission_token(run_dir.name(), run_dir.path());
    let mut options = arguments(["--noheader", "--states=all", "--format", SQUEUE_FORMAT]);
    options.push(format!("--name={}", run_dir.name()));
    let deadline = Instant::now() + limit;
    loop {
        match ask("squeue", &options, &Request::within(limit)) {
            Err(SlurmError::Silent { .. }) if Instant::now() < deadline => std::thread::sleep(Duration::from_secs(1)),
            Err(error) => return Err(error),
            Ok(answer) => {
                let ours = answer.stdout.lines().filter_map(parse::queued).filter(|job| job.comment == token);
                return Ok(ours.filter_map(|job| job.id.parse().ok()).filter(|&id| id > before).max());
            }
        }
    }
}

/// What to do about a refusal, by Slurm's own words.
fn explain(error: SlurmError) -> Failure {
    const CURES: [(&str, &str); 15] = [
        ("partition name", "`sinfo -s` lists the partitions; choose one with --partition (slurm.partition)"),
        (
            "partition not available",
            "the partition takes no jobs now; choose another with --partition (slurm.partition)",
        ),
        ("not permitted to use this partition", "choose another --partition (slurm.partition), or ask for access"),
        (
            "Invalid account",
            "`sacctmgr show associations user=$USER` lists your accounts; choose one with --account (slurm.account)",
        ),
        ("Invalid qos", "choose another --qos (slurm.qos), or none"),
        (
            "policy",
            "a limit of the account or of the quality of service is passed: a shorter --time (slurm.time) or fewer nodes may do; \
             `squeue --me` shows your jobs",
        ),
        ("time limit", "choose a shorter --time (slurm.time); `sinfo -o '%P %l'` shows the limits"),
        (
            "Invalid node name",
            "`sinfo -N` lists the nodes; see --nodelist (slurm.nodelist) and --exclude (slurm.exclude)",
        ),
        ("Node count", "the partition gives fewer nodes to a job; choose another --partition or profile"),
        ("CPU count", "the nodes have fewer processors; see slurm.quirks.cpus_per_task"),
        ("emory specification", "the nodes have less memory; see slurm.quirks.mem"),
        (
            "node configuration",
            "no nodes of the partition have what is asked for; `sinfo -o '%P %D %G %f %c %m'` shows what they have \
             (slurm.partition, slurm.constraint, slurm.quirks.gres_type)",
        ),
        (
            "feature specification",
            "choose another --constraint (slurm.constraint); `sinfo -o '%P %f'` shows the features",
        ),
        (
            "generic resource",
            "the site counts devices otherwise; see slurm.quirks.gpu_request and slurm.quirks.gres_type",
        ),
        (
            "reservation",
            "choose another --reservation (slurm.reservation), or none; `scontrol show reservation` lists them",
        ),
    ];
    let text = error.to_string();
    let is_refusal = matches!(error, SlurmError::Refused { .. });
    let failure = match error {
        SlurmError::Refused { .. } => {
            Failure::new(Exit::SchedulerRefused, anyhow::Error::new(error).context("Slurm does not take the job"))
        }
        silent => Failure::from(silent),
    };
    match CURES.iter().find(|(words, _)| is_refusal && text.contains(words)) {
        Some((_, cure)) => failure.hint(*cure),
        None if text.contains("unrecognized option") => {
            failure.hint("this site's Slurm has no such option; see slurm.extra")
        }
        None => failure,
    }
}
