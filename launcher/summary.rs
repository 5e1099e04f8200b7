//! What a run was, once it is over: `report.json`, and `REPORT.md` for people.

use std::fmt::Write as _;
use std::io;

use anyhow::Context as _;
use jiff::Timestamp;
use nemotron_engine::job::JobProgress;
use serde::Serialize;

use crate::attempts::{self, Attempt, Suspect, suspects};
use crate::events::{Event, Journal, now};
use crate::replicas;
use crate::report::{Exit, Outcome};
use crate::rundir::{RunDir, write_atomic, write_json};
use crate::state::{End, PhaseSpan, RankStatus, RunPhase, Status};
use crate::supervise::span;

#[derive(Debug, Serialize)]
pub(crate) struct Report<'a> {
    schema: u32,
    run: &'a str,
    /// `serve` or `job`.
    task: &'a str,
    /// The last one.
    attempt: u32,
    /// DONE, FAILED or CANCELLED.
    outcome: RunPhase,
    exit_code: u8,
    cause: Option<&'a str>,
    /// Of the first attempt.
    started: Timestamp,
    ended: Timestamp,
    /// Of the last attempt.
    phases: &'a [PhaseSpan],
    ranks: &'a [RankStatus],
    /// How those of a run with replicas ended.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    replicas: Vec<ReplicaEnd<'a>>,
    /// Of all attempts, as all that follows.
    prompt_tokens: u64,
    generated_tokens: u64,
    /// Of the time in which ranks worked.
    tokens_per_second: f64,
    rows: Option<JobProgress>,
    device_hours: DeviceHours,
    attempts: Vec<Entry<'a>>,
    nodes_blamed: Vec<Suspect>,
}

/// An attempt of the run or of one of its replicas.
#[derive(Debug, Serialize)]
struct Entry<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    replica: Option<&'a str>,
    #[serde(flatten)]
    attempt: &'a Attempt,
}

#[derive(Debug, Serialize)]
struct ReplicaEnd<'a> {
    run: &'a str,
    outcome: RunPhase,
    exit_code: u8,
    cause: Option<&'a str>,
    rows_done: u64,
}

/// Devices times hours from the start of each attempt to its end.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct DeviceHours {
    /// From READY on, in attempts that completed rows.
    useful: f64,
    /// Starting, stopping, and attempts that completed none.
    wasted: f64,
}

impl DeviceHours {
    fn of<'a>(attempts: impl Iterator<Item = &'a Attempt> + Clone) -> Self {
        let hours = |attempt: &Attempt, seconds: f64| attempt.ranks as f64 * seconds / 3600.0;
        let useful = |attempt: &&Attempt| attempt.rows > 0;
        let useful = attempts.clone().filter(useful).map(|attempt| hours(attempt, attempt.worked()));
        // A sum of nothing is -0.
        let useful = useful.sum::<f64>() + 0.0;
        let total: f64 = attempts.map(|attempt| hours(attempt, attempt.seconds())).sum();
        Self { useful, wasted: (total - useful).max(0.0) }
    }
}

/// Generated tokens of all attempts per second in which their ranks worked.
pub(crate) fn tokens_per_second(attempts: &[Attempt]) -> f64 {
    let worked: f64 = attempts.iter().map(Attempt::worked).sum();
    let tokens: u64 = attempts.iter().map(|attempt| attempt.generated_tokens).sum();
    if worked > 0.0 { tokens as f64 / worked } else { 0.0 }
}

impl<'a> Report<'a> {
    /// `status` has ended, and the last of `attempts` with it.
    pub(crate) fn new(status: &'a Status, phases: &'a [PhaseSpan], attempts: &'a [Attempt]) -> Self {
        Self::over(status, phases, &[(None, attempts)])
    }

    /// Of a run with replicas: `status` is that of the whole, and `attempts` has those of each.
    pub(crate) fn of_replicas(status: &'a Status, attempts: &'a [Vec<Attempt>]) -> Self {
        let names = status.replicas.iter().map(|part| Some(part.run.as_str()));
        let groups: Vec<_> = names.zip(attempts.iter().map(Vec::as_slice)).collect();
        Self::over(status, &[], &groups)
    }

    fn over(status: &'a Status, phases: &'a [PhaseSpan], groups: &[(Option<&'a str>, &'a [Attempt])]) -> Self {
        let end = status.end.as_ref();
        let attempts = groups.iter().flat_map(|(_, attempts)| attempts.iter());
        Self {
            schema: 1,
            run: &status.run,
            task: &status.task,
            attempt: status.attempt,
            outcome: status.phase,
            exit_code: end.map_or(0, |end| end.exit_code),
            cause: end.and_then(|end| end.cause.as_deref()),
            started: attempts.clone().map(|attempt| attempt.started).min().unwrap_or(status.started),
            ended: attempts.clone().filter_map(|attempt| attempt.ended).fold(status.since, Timestamp::max),
            phases,
            ranks: &status.ranks,
            replicas: status.replicas.iter().map(ReplicaEnd::of).collect(),
            prompt_tokens: attempts.clone().map(|attempt| attempt.prompt_tokens).sum(),
            generated_tokens: attempts.clone().map(|attempt| attempt.generated_tokens).sum(),
            tokens_per_second: groups.iter().map(|(_, attempts)| tokens_per_second(attempts)).sum(),
            rows: status.job,
            device_hours: DeviceHours::of(attempts),
            attempts: groups
                .iter()
                .flat_map(|&(replica, attempts)| attempts.iter().map(move |attempt| Entry { replica, attempt }))
                .collect(),
            nodes_blamed: groups.iter().flat_map(|(_, attempts)| suspects(attempts)).collect(),
        }
    }

    pub(crate) fn write(&self, run_dir: &RunDir) -> io::Result<()> {
        write_json(&run_dir.report_file(), self)?;
        write_atomic(&run_dir.report_text_file(), self.text().as_bytes())
    }

    /// Why the nodes are given back, and what they were used for: the last words of a batch script.
    pub(crate) fn last_words(&self) -> String {
        let mut words = format!("run {} is {}", self.run, self.outcome);
        if let Some(cause) = self.cause {
            _ = write!(words, " (exit code {}): {cause}", self.exit_code);
        }
        words += "\n";
        if let Some(rows) = self.rows {
            _ = write!(words, "{} of {} rows are done, {} failed; ", rows.rows_done, rows.rows_total, rows.rows_failed);
        }
        let hours = self.device_hours;
        _ = write!(
            words,
            "{} tokens, {:.1} tokens/s, {} attempts, {:.2} device-hours useful and {:.2} wasted",
            self.generated_tokens,
            self.tokens_per_second,
            self.attempts.len(),
            hours.useful,
            hours.wasted
        );
        words
    }

    fn text(&self) -> String {
        let mut text = format!("# Run {}\n\n{}\n", self.run, self.last_words());
        if !self.replicas.is_empty() {
            text += "\n| replica | outcome | rows | exit code | cause |\n|---|---|---|---|---|\n";
        }
        for ReplicaEnd { run, outcome, exit_code, cause, rows_done } in &self.replicas {
            _ = writeln!(text, "| {run} | {outcome} | {rows_done} | {exit_code} | {} |", cell(cause.unwrap_or("-")));
        }
        text += "\n| attempt | job | started | took | at work | rows | tokens | exit code | cause |\n|---|---|---|---|---|---|---|---|---|\n";
        for Entry { replica, attempt } in &self.attempts {
            let end = attempt.end.as_ref();
            _ = writeln!(
                text,
                "| {}{} | {} | {} | {} | {} | {} | {} | {} | {} |",
                replica.map_or_else(String::new, |replica| format!("{replica}, ")),
                attempt.attempt,
                attempt.job.map_or_else(|| "-".into(), |job| job.to_string()),
                attempt.started,
                span(attempt.seconds()),
                span(attempt.worked()),
                attempt.rows,
                attempt.generated_tokens,
                end.map_or(0, |end| end.exit_code),
                cell(end.and_then(|end| end.cause.as_deref()).unwrap_or("-")),
            );
        }
        if !self.nodes_blamed.is_empty() {
            text += "\n| node blamed | avoided until | by attempt | exit code | evidence |\n|---|---|---|---|---|\n";
        }
        for suspect in &self.nodes_blamed {
            let Suspect { node, until, attempt, exit_code, evidence } = suspect;
            _ = writeln!(text, "| {node} | {until} | {attempt} | {exit_code} | {} |", cell(evidence));
        }
        text
    }
}

impl<'a> ReplicaEnd<'a> {
    fn of(part: &'a Status) -> Self {
        let end = part.end.as_ref();
        Self {
            run: &part.run,
            outcome: part.phase,
            exit_code: end.map_or(0, |end| end.exit_code),
            cause: end.and_then(|end| end.cause.as_deref()),
            rows_done: part.job.map_or(0, |job| job.rows_done),
        }
    }
}

/// As a cell of a table.
fn cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

/// The final record of a run whose supervisor can write none.
pub(crate) fn record_end(run_dir: &RunDir, phase: RunPhase, exit: Exit, cause: &str) -> Outcome {
    let mut status = Status::of(run_dir)?;
    status.phase = phase;
    (status.url, status.deadline, status.eta_s, status.until) = (None, None, None, None);
    (status.since, status.updated) = (now(), now());
    status.end = Some(End::because(exit, cause));
    let mut attempts = attempts::read(run_dir)?;
    if let Some(last) = attempts.last_mut().filter(|last| last.ended.is_none()) {
        (last.ended, last.end) = (Some(status.since), status.end.clone());
        last.count(&status);
        last.write(run_dir).context("cannot complete the record of the attempt")?;
    }
    let write = || -> io::Result<()> {
        let mut event = Event::new("ended").phase(status.phase).text(cause);
        event.exit_code = Some(exit as u8);
        Journal::open(run_dir, status.attempt)?.write(event);
        Report::new(&status, &[], &attempts).write(run_dir)?;
        write_json(&run_dir.status_file(), &status)
    };
    write().map_err(anyhow::Error::new)?;
    replicas::report(run_dir);
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use jiff::SignedDuration;

    use super::*;
    use crate::attempts::testing::ended;
    use crate::report::Exit;
    use crate::spec::testing::serve_spec;
    use crate::state::End;

    #[test]
    fn hours_and_rates_are_those_of_all_attempts() {
        let earlier = |attempt: &Attempt, seconds| attempt.ended.unwrap() - SignedDuration::from_secs(seconds);
        let mut lost = ended(0, Some(Exit::RankLost), 0, &["n|1"]);
        lost.started = earlier(&lost, 1800);
        let mut useful = ended(1, None, 5, &[]);
        (useful.started, useful.ready) = (earlier(&useful, 3600), Some(earlier(&useful, 1800)));
        useful.generated_tokens = 3600;
        let attempts = [lost, useful];
        let mut status = Status::pending(&serve_spec("run"), 1);
        status.phase = RunPhase::Failed;
        status.end = Some(End::because(Exit::RankLost, "a | b"));
        let report = Report::new(&status, &[], &attempts);
        assert_eq!(report.device_hours, DeviceHours { useful: 1.0, wasted: 2.0 });
        assert_eq!(report.tokens_per_second, 2.0);
        let text = report.text();
        assert!(text.contains("(exit code 25): a | b"), "{text}");
        assert!(text.contains("| n|1 |") && text.contains("| 25 | the evidence |"), "{text}");
    }
}
