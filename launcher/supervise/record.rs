//! What others see of an attempt: its record, `status.json`, the event journal, the display.

use std::fs;
use std::io;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};

use super::display::Display;
use super::member::Member;
use super::verdict::{Fault, Verdict};
use crate::attempts::Attempt;
use crate::events::{Event, Journal, now};
use crate::process::ProcessId;
use crate::replicas;
use crate::report::Outcome;
use crate::rundir::{RunDir, write_json};
use crate::spec::RunSpec;
use crate::state::{PhaseSpan, RunPhase, Status};
use crate::summary::{Report, tokens_per_second};
use crate::tail::last_lines;

/// How often `status.json` is replaced at most.
const SNAPSHOT: Duration = Duration::from_millis(500);
/// Lines of a failed rank's log that are shown.
const LOG_LINES: usize = 10;

pub(super) struct Record<'a> {
    run_dir: &'a RunDir,
    journal: Journal,
    display: Display,
    pub(super) status: Status,
    /// All attempts so far; the last is this one.
    pub(super) attempts: Vec<Attempt>,
    phases: Vec<PhaseSpan>,
    pub(super) phase_began: Instant,
    /// When this phase must be over.
    pub(super) phase_deadline: Option<Instant>,
    written: Instant,
    /// `status.json` shall be written soon.
    pub(super) changed: bool,
    /// Tenths of the weights that the journal knows of.
    loaded: u32,
}

impl<'a> Record<'a> {
    pub(super) fn open(
        run_dir: &'a RunDir,
        spec: &RunSpec,
        attempts: Vec<Attempt>,
        display: Display,
    ) -> anyhow::Result<Self> {
        let attempt = attempts.last().map_or(0, |attempt| attempt.attempt);
        let journal = Journal::open(run_dir, attempt).context("cannot open the event journal")?;
        let status = Status { supervisor: Some(ProcessId::current()), ..Status::pending(spec, attempt) };
        let start = Instant::now();
        Ok(Self {
            run_dir,
            journal,
            display,
            status,
            attempts,
            phases: Vec::new(),
            phase_began: start,
            phase_deadline: None,
            written: start,
            changed: true,
            loaded: 0,
        })
    }

    pub(super) fn attempt(&mut self) -> &mut Attempt {
        self.attempts.last_mut().expect("an attempt is recorded when it is begun")
    }

    pub(super) fn event(&mut self, event: Event) {
        self.journal.write(event);
    }

    /// Says something that stays, to whoever looks and in the journal.
    pub(super) fn note(&mut self, text: &str) {
        self.display.say(text);
        self.event(Event::new("note").text(text));
    }

    /// Shows a warning until it is withdrawn, or the attempt ends.
    pub(super) fn warn(&mut self, event: Event) {
        let text = event.text.clone().unwrap_or_default();
        self.status.warnings.push(text);
        self.event(event);
        self.changed = true;
    }

    /// The warnings that begin like this hold no longer; `event` says so.
    pub(super) fn withdraw(&mut self, subject: &str, event: Event) {
        self.status.warnings.retain(|warning| !warning.starts_with(subject));
        self.display.say(event.text.as_deref().unwrap_or_default());
        self.event(event);
        self.changed = true;
    }

    pub(super) fn fault(&mut self, fault: &Fault, host: Option<String>) {
        let mut event = Event::new("fault").phase(self.status.phase).text(fault.error.join(": "));
        event.exit_code = Some(fault.exit as u8);
        event.rank = fault.rank;
        event.host = host;
        self.event(event);
    }

    pub(super) fn enter(&mut self, phase: RunPhase, limit: Option<Duration>) {
        let now_instant = Instant::now();
        if self.status.phase != RunPhase::Pending {
            let phase = if self.status.phase == RunPhase::Busy { RunPhase::Ready } else { self.status.phase };
            self.phases.push(PhaseSpan { phase, seconds: (now_instant - self.phase_began).as_secs_f64() });
        }
        self.phase_began = now_instant;
        self.phase_deadline = limit.map(|limit| now_instant + limit);
        self.status.since = now();
        self.status.phase = phase;
        self.status.deadline = limit.and_then(|limit| later(self.status.since, limit));
        self.event(Event::new("phase").phase(phase));
        if phase == RunPhase::Ready {
            self.attempt().ready = Some(now());
            self.write_attempt();
        }
        self.changed = true;
    }

    pub(super) fn publish(&mut self, members: &[Member]) {
        if !self.changed && self.written.elapsed() < SNAPSHOT {
            return;
        }
        self.status.ranks = members.iter().map(|member| member.status.clone()).collect();
        if self.status.phase == RunPhase::Loading {
            let tenths = (self.status.progress() * 10.0) as u32;
            if let Some(text) = self.status.loading().filter(|_| tenths > self.loaded) {
                self.loaded = tenths;
                self.event(Event::new("loading").text(text));
            }
        }
        self.write_status();
    }

    /// At the end of the ranks, before it is known whether the run goes on.
    pub(super) fn end_attempt(&mut self, verdict: &Verdict) {
        if let Err(error) = fs::remove_file(self.run_dir.endpoint_file())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "cannot remove endpoint.json");
        }
        let status = self.status.clone();
        let attempt = self.attempt();
        attempt.count(&status);
        attempt.ended = Some(now());
        attempt.end = Some(verdict.end());
        self.write_attempt();
    }

    /// The run goes on with another attempt, which `how` describes; `here` is whether this process makes it.
    pub(super) fn hand_on(&mut self, verdict: &Verdict, how: &str, here: bool) {
        let next = self.status.attempt + 1;
        let end = verdict.end();
        let mut event = Event::new("handed_on").text(format!("{}; {how}", end.cause.unwrap_or_default()));
        (event.exit_code, event.rank) = (Some(end.exit_code), end.rank);
        self.event(event);
        self.enter(RunPhase::Pending, None);
        let status = &mut self.status;
        (status.attempt, status.url, status.eta_s, status.until) = (next, None, None, None);
        status.warnings.clear();
        self.loaded = 0;
        // Whoever cancels the run in between finds this process.
        status.supervisor = status.supervisor.take().filter(|_| here);
        self.write_status();
        self.display.finish();
        self.display.say(&how_it_goes_on(verdict, how));
    }

    /// The final record of the run.
    pub(super) fn conclude(mut self, verdict: &Verdict, members: &[Member]) -> Outcome<Status> {
        self.enter(verdict.phase, None);
        let end = verdict.end();
        self.status.end = Some(end.clone());
        (self.status.eta_s, self.status.until) = (None, None);
        self.status.warnings.clear();
        if self.status.job.is_some() {
            self.status.tokens_per_second = tokens_per_second(&self.attempts);
        }
        self.status.ranks = members.iter().map(|member| member.status.clone()).collect();
        let report = Report::new(&self.status, &self.phases, &self.attempts);
        if let Err(error) = report.write(self.run_dir) {
            tracing::warn!(%error, "cannot write the report");
        }
        tracing::info!("{}", report.last_words());
        let mut event = Event::new("ended").phase(verdict.phase);
        event.exit_code = Some(end.exit_code);
        event.rank = end.rank;
        event.text = end.cause;
        self.event(event);
        // Last, so that whoever waits for it finds everything else.
        self.write_status();
        replicas::report(self.run_dir);
        self.display.finish();
        // A rank that could say why it failed has said it.
        if let (RunPhase::Failed, Some(rank)) = (verdict.phase, verdict.rank)
            && members.get(rank).is_some_and(|member| member.end.is_none())
        {
            self.show_log(rank);
        }
        verdict.failure(&self.status.run).map_or(Ok(self.status), Err)
    }

    fn write_attempt(&mut self) {
        let run_dir = self.run_dir;
        if let Err(error) = self.attempt().write(run_dir) {
            tracing::warn!(%error, "cannot write the record of the attempt");
        }
    }

    fn write_status(&mut self) {
        self.changed = false;
        self.written = Instant::now();
        self.status.updated = now();
        self.display.show(&self.status);
        if let Err(error) = write_json(&self.run_dir.status_file(), &self.status) {
            tracing::warn!(%error, "cannot write status.json");
        }
    }

    fn show_log(&self, rank: usize) {
        let path = self.run_dir.rank_log(self.status.attempt, rank);
        let lines = last_lines(&path, LOG_LINES);
        if !lines.is_empty() {
            self.display.say(&format!("the end of {}:\n  {}", path.display(), lines.join("\n  ")));
        }
    }
}

fn how_it_goes_on(verdict: &Verdict, how: &str) -> String {
    format!("{}\n{how}", verdict.text().unwrap_or_else(|| "the attempt ended".into()))
}

pub(super) fn later(since: Timestamp, by: Duration) -> Option<Timestamp> {
    since.checked_add(SignedDuration::try_from(by).ok()?).ok()
}
