//! A run with several replicas: a folder that holds one run a replica, each with its own job of Slurm's, attempts, logs and journal, and the
//! queue of rows that they share. What is asked about the whole is answered from what its replicas say.

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context as _;
use nemotron_engine::job::{JobProgress, Share};

use crate::attempts;
use crate::observe::Observer;
use crate::report::{Exit, Failure, Outcome};
use crate::resolve::Resolved;
use crate::rundir::RunDir;
use crate::spec::{Replicas, RunSpec};
use crate::state::{RunPhase, Status};
use crate::summary::Report;

/// More would only wait for each other's files.
const MAX_REPLICAS: u32 = 256;

/// Makes the folder of the whole and says what each replica is.
pub(crate) fn divide(resolved: &mut Resolved, count: u32) -> Outcome<(RunDir, Vec<Resolved>)> {
    if resolved.job.is_none() || !(1..=MAX_REPLICAS).contains(&count) {
        let text = format!("--replicas shares a job file among 1 to {MAX_REPLICAS} replicas");
        return Err(Failure::msg(Exit::Usage, text).hint("give it with --job FILE"));
    }
    let lease = resolved.settings.duration("deadlines.lease").unwrap_or(Duration::from_secs(60));
    let replicas = Replicas { count, index: None, lease_s: lease.as_secs_f64().max(0.1) };
    let spec = &mut resolved.spec;
    spec.replicas = Some(replicas);
    let run_dir = RunDir::create(&resolved.run_root, spec)?;
    if resolved.spec.site.is_none() {
        // They share the cores of this machine.
        resolved.spec.threads = (resolved.spec.threads / count as usize).max(1);
    }
    let parts = (0..count).map(|index| {
        let mut part = resolved.clone();
        part.spec.name = name(run_dir.name(), index);
        part.spec.replicas = Some(Replicas { index: Some(index), ..replicas });
        part.run_root = run_dir.path().to_owned();
        part
    });
    Ok((run_dir.clone(), parts.collect()))
}

fn name(run: &str, index: u32) -> String {
    format!("{run}-{index}")
}

/// The replicas of a run that holds some and is none itself; those that were started.
pub(crate) fn of(run_dir: &RunDir, spec: &RunSpec) -> Vec<RunDir> {
    let count = spec.replicas.filter(|replicas| replicas.index.is_none()).map_or(0, |replicas| replicas.count);
    let path = |index| run_dir.path().join(name(run_dir.name(), index));
    (0..count).filter_map(|index| RunDir::open(&path(index)).ok()).collect()
}

/// The runs to look at for what each run has of its own, such as logs: the run, or its replicas.
pub(crate) fn each(run_dir: &RunDir) -> Outcome<Vec<RunDir>> {
    let parts = of(run_dir, &run_dir.spec()?);
    Ok(if parts.is_empty() { vec![run_dir.clone()] } else { parts })
}

/// Writes the report of the whole if it is over, now that `part`, which may be a replica, has ended.
pub(crate) fn report(part: &RunDir) {
    if let Err(failure) = try_report(part) {
        tracing::warn!(%failure, "cannot write the report of all replicas");
    }
}

fn try_report(part: &RunDir) -> Outcome {
    if part.spec()?.replicas.is_none_or(|replicas| replicas.index.is_none()) {
        return Ok(());
    }
    let run_dir = RunDir::open(part.path().parent().unwrap_or(part.path()))?;
    let spec = run_dir.spec()?;
    let parts = of(&run_dir, &spec);
    let mut reported = Vec::new();
    loop {
        // One that was killed has not said that it ended.
        let look = |part| Observer::new(part)?.look();
        let statuses = parts.iter().map(look).collect::<Outcome<Vec<_>>>()?;
        let phases: Vec<RunPhase> = statuses.iter().map(|status| status.phase).collect();
        let is_done = phases.contains(&RunPhase::Done);
        // Others that ended meanwhile may have read an older state; the last word is that of whoever sees no change any more.
        if phases == reported || !(is_done || phases.iter().all(|phase| phase.is_end())) {
            return Ok(());
        }
        let mut status = whole(&spec, statuses);
        if is_done {
            (status.phase, status.end) = (RunPhase::Done, None);
        }
        let attempts = parts.iter().map(attempts::read).collect::<Outcome<Vec<_>>>()?;
        Report::of_replicas(&status, &attempts).write(&run_dir).context("cannot write report.json")?;
        reported = phases;
    }
}

/// Where the rows of a run's job are: of all its replicas, and of all others if it is one.
pub(crate) fn journals(run_dir: &RunDir, spec: &RunSpec) -> Vec<PathBuf> {
    match spec.replicas {
        None => vec![run_dir.journal()],
        Some(Replicas { index: None, .. }) => of(run_dir, spec).iter().map(RunDir::journal).collect(),
        Some(_) => share(run_dir, spec).map_or_else(Vec::new, |share| share.journals),
    }
}

/// What a replica has in common with the others.
pub(crate) fn share(run_dir: &RunDir, spec: &RunSpec) -> Option<Share> {
    let Replicas { count, index, lease_s } = spec.replicas?;
    let whole = run_dir.path().parent()?;
    let run = whole.file_name()?.to_str()?;
    Some(Share {
        dir: whole.join("queue"),
        replica: index?,
        journals: (0..count).map(|index| whole.join(name(run, index)).join("journal")).collect(),
        lease: Duration::from_secs_f64(lease_s),
    })
}

/// The state of the whole.
pub(crate) fn whole(spec: &RunSpec, parts: Vec<Status>) -> Status {
    let mut whole = Status::pending(spec, 0);
    let ended = !parts.is_empty() && parts.iter().all(|part| part.phase.is_end());
    // Whoever is done has seen that all rows are.
    let decisive = parts.iter().filter(|part| ended || !part.phase.is_end()).max_by_key(|part| match part.phase {
        RunPhase::Done => (2, part.phase),
        RunPhase::Failed => (1, part.phase),
        phase => (0, phase),
    });
    if let Some(part) = decisive {
        (whole.phase, whole.since, whole.end) = (part.phase, part.since, part.end.clone());
    }
    whole.attempt = parts.iter().map(|part| part.attempt).max().unwrap_or(0);
    whole.started = parts.iter().map(|part| part.started).min().unwrap_or(whole.started);
    whole.updated = parts.iter().map(|part| part.updated).max().unwrap_or(whole.updated);
    whole.tokens_per_second = parts.iter().map(|part| part.tokens_per_second).sum();
    for stats in parts.iter().map(|part| &part.stats) {
        whole.stats.waiting += stats.waiting;
        whole.stats.running += stats.running;
        whole.stats.prompt_tokens += stats.prompt_tokens;
        whole.stats.generated_tokens += stats.generated_tokens;
        whole.stats.finished_rows += stats.finished_rows;
    }
    whole.job = parts.iter().filter_map(|part| part.job).reduce(|a, b| JobProgress {
        rows_total: a.rows_total.max(b.rows_total),
        rows_done: (a.rows_done + b.rows_done).min(a.rows_total.max(b.rows_total)),
        rows_failed: a.rows_failed + b.rows_failed,
        rows_kept: a.rows_kept + b.rows_kept,
        paused: a.paused || b.paused,
        prompt_tokens: a.prompt_tokens + b.prompt_tokens,
        completion_tokens: a.completion_tokens + b.completion_tokens,
    });
    if let Some(job) = whole.job.as_mut().filter(|_| parts.iter().any(|part| part.phase == RunPhase::Done)) {
        // One that was killed did not tell of its last rows.
        job.rows_done = job.rows_total;
    }
    // Each expects to do alone what is left.
    let rate = |part: &Status| {
        Some((part.job?.rows_total - part.job?.rows_done) as f64 / part.eta_s.filter(|&eta| eta > 0.0)?)
    };
    let rate: f64 = parts.iter().filter_map(rate).sum();
    whole.eta_s = whole.job.filter(|_| rate > 0.0 && !ended).map(|job| (job.rows_total - job.rows_done) as f64 / rate);
    let notes: Vec<_> =
        parts.iter().filter_map(|part| Some(format!("{}: {}", part.run, part.note.as_ref()?))).collect();
    whole.note = (!notes.is_empty()).then(|| notes.join("; "));
    whole.warnings =
        parts.iter().flat_map(|part| part.warnings.iter().map(|warning| format!("{}: {warning}", part.run))).collect();
    whole.replicas = parts;
    whole
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::spec::testing::serve_spec;
    use crate::state::End;

    fn part(phase: RunPhase, rows_done: u64, eta_s: Option<f64>) -> Status {
        let mut status = Status::pending(&serve_spec("part"), 0);
        status.phase = phase;
        status.job = Some(JobProgress { rows_total: 100, rows_done, ..JobProgress::default() });
        status.eta_s = eta_s;
        status.end = (phase == RunPhase::Failed).then(|| End::lost("it was killed"));
        status
    }

    #[test]
    fn the_whole_is_done_when_the_last_one_is_and_lives_as_long_as_one_does() {
        let whole = |parts: Vec<Status>| whole(&serve_spec("whole"), parts);
        let both = whole(vec![part(RunPhase::Busy, 20, Some(80.0)), part(RunPhase::Loading, 30, Some(70.0))]);
        assert_eq!((both.phase, both.job.map(|job| job.rows_done), both.eta_s), (RunPhase::Busy, Some(50), Some(25.0)));
        let one_left = whole(vec![part(RunPhase::Failed, 20, None), part(RunPhase::Loading, 0, None)]);
        assert_eq!((one_left.phase, one_left.end), (RunPhase::Loading, None));
        let survived = whole(vec![part(RunPhase::Failed, 20, None), part(RunPhase::Done, 70, None)]);
        assert_eq!(
            (survived.phase, survived.end, survived.job.map(|job| job.rows_done)),
            (RunPhase::Done, None, Some(100))
        );
        let lost = whole(vec![part(RunPhase::Cancelled, 20, None), part(RunPhase::Failed, 3, None)]);
        assert_eq!((lost.phase, lost.end), (RunPhase::Failed, Some(End::lost("it was killed"))));
        assert_eq!(whole(Vec::new()).phase, RunPhase::Pending);
    }
}
