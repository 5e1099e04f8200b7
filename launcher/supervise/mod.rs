//! Starts the ranks of a run and watches them to the end: rendezvous, deadlines, progress, deaths, signals.
//!
//! One thread decides. Connections and signals only send it what they hear, so every decision sees one consistent state.

mod deadlines;
mod display;
mod member;
mod rate;
#[cfg(test)]
mod tests;
mod verdict;

use std::fs;
use std::io;
use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use jiff::{SignedDuration, Timestamp};
use nemotron_engine::engine::EngineStats;
use nemotron_engine::report::Phase;
use nix::sys::signal::{SigSet, Signal};

pub(crate) use self::display::{Display, is_quiet, line, narrate, span};
use self::member::{Death, Member};
use self::rate::Rate;
use self::verdict::{Fault, Verdict, cause};
use crate::env::Environment;
use crate::events::{Event, Journal, now};
use crate::fabric;
use crate::process::ProcessId;
use crate::ranks::{self, Ranks};
use crate::rendezvous::{Arrival, Down, Hello, Identity, Link, NETWORK_HINT, RankEnd, Reception, Up, run_key};
use crate::report::{Exit, Outcome};
use crate::rundir::{RunDir, write_json};
use crate::spec::{RunSpec, Task};
use crate::state::{Endpoint, PhaseSpan, Report, RunPhase, Status, record_end};
use crate::tail::last_lines;

/// How often processes and clocks are looked at when nothing happens.
const TICK: Duration = Duration::from_millis(50);
/// How often `status.json` is replaced at most.
const SNAPSHOT: Duration = Duration::from_millis(500);
/// Faults that follow from the same cause arrive within this time.
const COLLECT: Duration = Duration::from_millis(300);
/// Within this time, the same signal again is an echo and not impatience.
const ECHO: Duration = Duration::from_millis(300);
/// A scheduler that signals ranks because one of them died must not be taken for one that wants the run to end; this is for how long the
/// death may come to light after the signal.
const SETTLE: Duration = Duration::from_secs(1);
/// Lines of a failed rank's log that are shown.
const LOG_LINES: usize = 10;

/// Called once, when a serving run answers.
pub(crate) type OnReady = Box<dyn FnOnce(&Endpoint)>;

/// Runs an attempt to its end, in the thread that must outlive its ranks. [`block_signals`] was called before.
///
/// # Errors
/// The run failed or was stopped: the cause, with its exit code.
pub(crate) fn supervise(run_dir: &RunDir, attempt: u32, on_ready: OnReady) -> Outcome<Status> {
    let (sender, inputs) = channel();
    forward_signals(sender.clone())?;
    let display = Display::stderr(is_quiet());
    let supervisor = ranks::of_run(run_dir)
        .and_then(|ranks| Supervisor::new(run_dir, attempt, ranks, sender, inputs, display, on_ready));
    match supervisor {
        Ok(supervisor) => supervisor.run(),
        Err(failure) => {
            // Nobody else would say why the run never began.
            _ = record_end(run_dir, RunPhase::Failed, failure.exit, &format!("{:#}", failure.error));
            Err(failure)
        }
    }
}

/// The signals that ask a run to end. Whoever started us with `nohup` does not mean SIGHUP.
fn signals() -> SigSet {
    let all = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGQUIT, Signal::SIGUSR1, Signal::SIGUSR2];
    let mut signals: SigSet = all.into_iter().collect();
    if !is_ignored(Signal::SIGHUP) {
        signals.add(Signal::SIGHUP);
    }
    signals
}

/// Keeps signals waiting for [`supervise`]. Threads inherit it, so it comes before anything that may start one.
pub(crate) fn block_signals() -> Outcome {
    Ok(signals().thread_block().context("cannot block signals")?)
}

/// For a command that supervises nothing after all.
pub(crate) fn unblock_signals() -> Outcome {
    Ok(signals().thread_unblock().context("cannot unblock signals")?)
}

/// What the supervisor reacts to.
pub(crate) enum Input {
    Arrival(Arrival),
    Signal(Signal),
}

impl From<Arrival> for Input {
    fn from(arrival: Arrival) -> Self {
        Self::Arrival(arrival)
    }
}

/// Turns signals to this process into inputs.
fn forward_signals(sender: Sender<Input>) -> Outcome {
    let forward = move || {
        while let Ok(signal) = signals().wait() {
            if sender.send(Input::Signal(signal)).is_err() {
                break;
            }
        }
    };
    std::thread::Builder::new().name("signals".into()).spawn(forward).context("cannot start a thread")?;
    Ok(())
}

/// Where the run stands between its start and its end.
#[derive(Clone, Copy)]
enum Course {
    Running,
    /// A fault was seen; others of the same cause may still arrive.
    Collecting {
        until: Instant,
    },
    /// Rank 0 finishes what runs.
    Draining {
        until: Instant,
    },
    /// The verdict stands; ranks that are left at `kill_at` are killed.
    Ending {
        kill_at: Option<Instant>,
    },
}

struct Supervisor<'a> {
    run_dir: &'a RunDir,
    spec: RunSpec,
    identity: Identity,
    ranks: Box<dyn Ranks>,
    inputs: Receiver<Input>,
    /// Open until everybody is here.
    reception: Option<Reception>,
    addresses: Vec<SocketAddr>,
    journal: Journal,
    display: Display,
    on_ready: Option<OnReady>,
    members: Vec<Member>,
    status: Status,
    course: Course,
    faults: Vec<Fault>,
    verdict: Option<Verdict>,
    /// The signal that asked for the end.
    asked_by: Option<Signal>,
    /// A rank was signalled by the scheduler; it counts from this moment on.
    signalled_at: Option<Instant>,
    /// When the step that holds all ranks ended, and how.
    collapsed: Option<(Instant, String)>,
    peers_sent: bool,
    /// Rank 0 works.
    leads: bool,
    phases: Vec<PhaseSpan>,
    phase_began: Instant,
    phase_deadline: Option<Instant>,
    /// When a step completed last, or nothing was queued.
    moved: Instant,
    rate: Rate,
    written: Instant,
    changed: bool,
}

impl<'a> Supervisor<'a> {
    fn new(
        run_dir: &'a RunDir,
        attempt: u32,
        ranks: Box<dyn Ranks>,
        sender: Sender<Input>,
        inputs: Receiver<Input>,
        display: Display,
        on_ready: OnReady,
    ) -> Outcome<Self> {
        let spec = run_dir.spec()?;
        let identity = Identity::current(run_dir, attempt)?;
        let key = run_key(&run_dir.token()?);
        let reception = Reception::open(ranks.meeting_points(), key, sender).context("cannot listen for ranks")?;
        run_dir.make_attempt(attempt).context("cannot make the attempt's directory")?;
        let journal = Journal::open(run_dir, attempt).context("cannot open the event journal")?;
        let world_size = spec.mesh.world_size();
        let device = format!("{:?}", spec.device).to_lowercase();
        let members: Vec<_> = (0..world_size).map(|rank| Member::new(rank, format!("{device} {rank}"))).collect();
        let status = Status {
            supervisor: Some(ProcessId::current()),
            ranks: members.iter().map(|member| member.status.clone()).collect(),
            ..Status::pending(&spec, attempt)
        };
        let start = Instant::now();
        Ok(Self {
            run_dir,
            identity,
            ranks,
            inputs,
            addresses: reception.addresses().to_vec(),
            reception: Some(reception),
            journal,
            display,
            on_ready: Some(on_ready),
            members,
            status,
            course: Course::Running,
            faults: Vec::new(),
            verdict: None,
            asked_by: None,
            signalled_at: None,
            collapsed: None,
            peers_sent: false,
            leads: false,
            phases: Vec::new(),
            phase_began: start,
            phase_deadline: None,
            moved: start,
            rate: Rate::new(),
            written: start,
            changed: true,
            spec,
        })
    }

    fn run(mut self) -> Outcome<Status> {
        self.journal.write(Event::new("started").text(format!("{} ranks", self.members.len())));
        if let Some(site) = &self.spec.site
            && let Some(settings) = fabric::in_force(site, &Environment::of_process())
        {
            self.journal.write(Event::new("note").text(settings));
        }
        self.start_ranks();
        while !self.is_over() {
            let waited = Instant::now();
            let mut input = self.inputs.recv_timeout(TICK).ok();
            while let Some(heard) = input {
                self.take(heard);
                // After each message, so that no phase passes unseen.
                self.follow_phases();
                input = self.inputs.try_recv().ok();
            }
            self.reap();
            self.forgive_pause(waited);
            self.follow_clock(Instant::now());
            self.publish();
        }
        self.conclude()
    }

    fn is_over(&self) -> bool {
        matches!(self.course, Course::Ending { .. }) && !self.ranks.any_left()
    }

    fn start_ranks(&mut self) {
        self.enter(RunPhase::Preflight);
        self.publish();
        if let Err(error) = self.ranks.start(self.members.len(), &self.addresses, self.status.attempt) {
            let mut fault = Fault::new(None, Exit::Internal, "cannot start the ranks");
            fault.error.extend(error.chain().map(ToString::to_string));
            self.fail_now(fault);
        }
    }

    // What is heard.

    fn take(&mut self, input: Input) {
        match input {
            Input::Signal(signal) => self.signalled(signal),
            Input::Arrival(Arrival::Hello { hello, address, link }) => self.introduced(hello, address, link),
            Input::Arrival(Arrival::Closed { rank }) => self.members[rank].closed(),
            Input::Arrival(Arrival::Message { rank, message }) => {
                self.members[rank].heard = Instant::now();
                self.told(rank, message);
            }
        }
    }

    fn introduced(&mut self, hello: Hello, address: Result<SocketAddr, String>, link: Link) {
        let rank = hello.rank;
        let who = format!("rank {rank} (host {}, pid {})", hello.process.host, hello.process.pid);
        let difference = self.identity.difference(&hello.identity);
        let Some(member) = self.members.get_mut(rank) else {
            return self.fail(Fault::new(None, Exit::Rendezvous, format!("{who} does not belong to this run")));
        };
        if let Some(difference) = difference {
            let mut fault = Fault::new(Some(rank), Exit::Rendezvous, format!("{who} does not match this supervisor"));
            fault.error.push(difference);
            return self.fail(fault);
        }
        if let Some(first) = &member.status.process {
            let first = format!("host {}, pid {}", first.host, first.pid);
            return self.fail(Fault::new(
                Some(rank),
                Exit::Rendezvous,
                format!("{who} is a second one besides {first}"),
            ));
        }
        self.journal
            .write(Event::new("joined").rank(rank, &hello.process.host).text(format!("pid {}", hello.process.pid)));
        if matches!(self.course, Course::Ending { .. }) {
            // It missed the call to stop.
            _ = link.send(&Down::Stop);
        }
        let unreachable = address.as_ref().err().filter(|_| !hello.addresses.is_empty()).cloned();
        member.introduce(hello, address.ok(), link);
        self.changed = true;
        if let Some(tried) = unreachable {
            let mut fault = Fault::new(Some(rank), Exit::Rendezvous, format!("{who} cannot be reached from this host"));
            fault.error.push(tried);
            fault.hints.push(NETWORK_HINT.into());
            self.fail(fault);
        }
    }

    fn told(&mut self, rank: usize, message: Up) {
        let member = &mut self.members[rank];
        match message {
            Up::Phase { phase } => {
                member.status.phase = Some(phase);
                member.status.progress = 0.0;
                let host = member.status.process.as_ref().map_or("", |process| &process.host);
                self.journal.write(Event::new("phase").rank(rank, host).phase(phase.into()));
                self.changed = true;
            }
            Up::Heartbeat { progress, steps } => {
                if member.status.steps != steps {
                    self.moved = Instant::now();
                }
                member.status.progress = progress;
                member.status.steps = steps;
            }
            Up::Stats { stats, job } => self.measured(stats, job),
            Up::Ready { url } => {
                self.leads = true;
                self.status.url = url;
            }
            // A scheduler signals all ranks at once; only the first counts, and none as the impatient second signal.
            Up::Signalled { .. } if !matches!(self.course, Course::Running) => {}
            Up::Signalled { .. } if self.ranks.are_scheduled() => {
                self.signalled_at.get_or_insert(Instant::now() + SETTLE);
            }
            Up::Signalled { interrupt } => {
                self.signalled(if interrupt { Signal::SIGINT } else { Signal::SIGTERM });
            }
            Up::End(end) => self.ended(rank, end),
        }
    }

    fn measured(&mut self, stats: EngineStats, job: Option<nemotron_engine::job::JobProgress>) {
        if stats.waiting + stats.running == 0 {
            self.moved = Instant::now();
        }
        let rate = self.rate.of(Instant::now(), stats.generated_tokens);
        self.status.eta_s = job.and_then(|job| self.rate.time_left(job.rows_done, job.rows_total));
        self.status.tokens_per_second = rate;
        self.status.stats = stats;
        self.status.job = job.or(self.status.job);
        let busy = self.status.stats.waiting + self.status.stats.running > 0;
        if self.status.phase.is_up() {
            self.status.phase = if busy { RunPhase::Busy } else { RunPhase::Ready };
        }
    }

    fn ended(&mut self, rank: usize, end: RankEnd) {
        let who = self.name(rank);
        self.members[rank].end = Some(end.clone());
        match (rank, end.exit, self.asked_by) {
            (0, None, Some(Signal::SIGUSR1)) if matches!(self.spec.task, Task::Serve { .. }) => {
                self.finish(Verdict::stopped(Signal::SIGUSR1, "what was asked has been answered"));
            }
            (0, None, _) => self.finish(Verdict::done()),
            (0, Some(Exit::Resumable), Some(signal)) => {
                self.finish(Verdict::stopped(signal, format!("{signal} stopped it; what is done is kept")));
            }
            (0, Some(Exit::Resumable), None) => {
                self.finish(Verdict::cancelled(Exit::Resumable, end.error.join(": ")));
            }
            (_, Some(exit), _) => self.fail(Fault::reported(rank, &who, exit, end)),
            (_, None, _) => {}
        }
    }

    fn signalled(&mut self, signal: Signal) {
        self.journal.write(Event::new("signal").text(signal.as_str()));
        match self.course {
            Course::Running if self.status.phase.is_up() && signal != Signal::SIGQUIT => {
                self.asked_by = Some(signal);
                let limit = self.spec.deadlines.drain;
                self.course = Course::Draining { until: Instant::now() + limit };
                self.enter(RunPhase::Draining);
                if let Some(leader) = &self.members[0].link {
                    // If rank 0 has just died, that is noticed by itself.
                    _ = leader.send(&Down::Drain);
                }
            }
            // `timeout` signals its command and then the command's process group: the same wish, heard twice.
            Course::Draining { .. } if self.asked_by == Some(signal) && self.phase_began.elapsed() < ECHO => {}
            Course::Running => self.finish(Verdict::stopped(signal, format!("{signal} stopped it"))),
            Course::Draining { .. } => {
                self.finish(Verdict::stopped(signal, format!("a second signal ({signal}) cut it short")));
            }
            // The scheduler may end the ranks a moment before it signals us.
            Course::Collecting { .. } if self.ranks.are_scheduled() => _ = self.asked_by.get_or_insert(signal),
            Course::Collecting { .. } => {}
            Course::Ending { .. } => self.course = Course::Ending { kill_at: Some(Instant::now()) },
        }
    }

    // What is seen.

    fn reap(&mut self) {
        for (rank, status) in self.ranks.reap() {
            self.members[rank].exited(status);
            self.changed = true;
        }
        let now = Instant::now();
        for rank in 0..self.members.len() {
            let Some(death) = self.members[rank].bury(now) else { continue };
            if self.members[rank].end.is_some() {
                continue;
            }
            let who = self.name(rank);
            let fault = match death {
                Death::Exited(status) => Fault::died(rank, &who, status),
                Death::Vanished => {
                    let mut fault =
                        Fault::new(Some(rank), Exit::RankLost, format!("{who} lost its connection to the supervisor"));
                    fault.error.extend(self.ranks.report_on(rank));
                    fault
                }
            };
            self.fail(fault);
        }
        for (rank, exit, how) in self.ranks.refused() {
            // A rank that is connected tells more itself.
            if self.members[rank].link.is_none() {
                let mut fault = Fault::new(Some(rank), exit, format!("{} could not be started", self.name(rank)));
                fault.error.push(how);
                self.fail(fault);
            }
        }
        if let Some(how) = self.ranks.collapse() {
            self.collapsed = Some((now, how));
        }
    }

    /// When this process itself stood still (a suspended machine), the ranks' silence proves nothing.
    fn forgive_pause(&mut self, waited: Instant) {
        if waited.elapsed() > Duration::from_secs(1) {
            let now = Instant::now();
            self.moved = now;
            self.members.iter_mut().for_each(|member| member.heard = now);
        }
    }

    fn follow_phases(&mut self) {
        if !matches!(self.course, Course::Running) || self.status.phase.is_up() {
            return;
        }
        if !self.peers_sent && self.members.iter().all(Member::has_joined) {
            self.peers_sent = true;
            self.reception = None;
            let addresses: Vec<SocketAddr> = self.members.iter().filter_map(|member| member.address).collect();
            for link in self.members.iter().filter_map(|member| member.link.as_ref()) {
                _ = link.send(&Down::Peers { addresses: addresses.clone() });
            }
        }
        let phase = self.startup_phase();
        if phase == RunPhase::Ready {
            self.enter(RunPhase::Ready);
            self.moved = Instant::now();
            self.announce();
        } else if phase > self.status.phase {
            self.enter(phase);
        }
    }

    /// The phase of the rank that is furthest behind. While some are still missing, the others wait in RENDEZVOUS.
    fn startup_phase(&self) -> RunPhase {
        let slowest = self.members.iter().map(|member| member.status.phase).min().flatten();
        match slowest {
            None | Some(Phase::Preflight) if self.members.iter().any(Member::has_joined) => RunPhase::Rendezvous,
            None => RunPhase::Preflight,
            Some(phase) if phase >= Phase::Ready && !self.leads => RunPhase::Warmup,
            Some(phase) if phase >= Phase::Ready => RunPhase::Ready,
            Some(phase) => phase.into(),
        }
    }

    fn announce(&mut self) {
        self.journal.write(Event::new("ready").text(self.status.url.clone().unwrap_or_default()));
        let (Some(url), Some(process)) = (self.status.url.clone(), self.members[0].status.process.clone()) else {
            return;
        };
        let token_file = match &self.spec.task {
            Task::Serve { no_auth: false, token_file, .. } => {
                Some(token_file.clone().unwrap_or_else(|| self.run_dir.token_file()))
            }
            _ => None,
        };
        let ProcessId { pid, host, .. } = process;
        let endpoint = Endpoint { schema: 1, url, token_file, pid, host, attempt: self.status.attempt };
        if let Err(error) = write_json(&self.run_dir.endpoint_file(), &endpoint) {
            let mut fault = Fault::new(None, Exit::OutputStorage, "cannot write endpoint.json");
            fault.error.push(error.to_string());
            return self.fail_now(fault);
        }
        // Whoever is told the URL finds READY in status.json.
        self.publish();
        if let Some(on_ready) = self.on_ready.take() {
            on_ready(&endpoint);
        }
    }

    fn follow_clock(&mut self, now: Instant) {
        match self.course {
            Course::Running if self.signalled_at.is_some_and(|at| now >= at) => self.signalled(Signal::SIGTERM),
            Course::Running | Course::Draining { .. } if self.has_collapsed(now) => self.fail_collapsed(),
            Course::Running => self.check_deadlines(now),
            Course::Collecting { until } if now >= until => {
                let lost = |fault: &Fault| matches!(fault.exit, Exit::RankLost | Exit::Communication);
                let asked = self.asked_by.filter(|_| self.ranks.are_scheduled() && self.faults.iter().all(lost));
                let verdict = match (asked, cause(&self.faults)) {
                    (Some(signal), _) => Verdict::stopped(signal, format!("{signal} came, and the ranks were ended")),
                    (None, Some(cause)) => Verdict::failed(cause),
                    (None, None) => Verdict::done(),
                };
                self.finish(verdict);
            }
            Course::Draining { until } if now >= until => {
                let signal = self.asked_by.unwrap_or(Signal::SIGTERM);
                let limit = span(self.spec.deadlines.drain.as_secs_f64());
                self.finish(Verdict::stopped(signal, format!("what ran was not finished within {limit}")));
            }
            Course::Ending { kill_at: Some(kill_at) } if now >= kill_at => {
                self.ranks.kill_all();
                self.course = Course::Ending { kill_at: None };
            }
            _ => {}
        }
    }

    // What is decided.

    fn fail(&mut self, fault: Fault) {
        if !matches!(self.course, Course::Ending { .. }) {
            self.record(&fault);
            self.faults.push(fault);
            if !matches!(self.course, Course::Collecting { .. }) {
                self.course = Course::Collecting { until: Instant::now() + COLLECT };
            }
        }
    }

    /// For faults that are a cause by themselves.
    fn fail_now(&mut self, fault: Fault) {
        self.record(&fault);
        self.finish(Verdict::failed(&fault));
    }

    fn record(&mut self, fault: &Fault) {
        let mut event = Event::new("fault").phase(self.status.phase).text(fault.error.join(": "));
        event.exit_code = Some(fault.exit as u8);
        event.rank = fault.rank;
        let process = fault.rank.and_then(|rank| self.members.get(rank)?.status.process.as_ref());
        event.host = process.map(|process| process.host.clone());
        self.journal.write(event);
    }

    fn finish(&mut self, verdict: Verdict) {
        self.verdict.get_or_insert(verdict);
        self.course = Course::Ending { kill_at: Some(Instant::now() + self.ranks.grace()) };
        for link in self.members.iter().filter_map(|member| member.link.as_ref()) {
            // Whoever cannot be told is killed.
            _ = link.send(&Down::Stop);
        }
    }

    fn enter(&mut self, phase: RunPhase) {
        let now_instant = Instant::now();
        if self.status.phase != RunPhase::Pending {
            let phase = if self.status.phase == RunPhase::Busy { RunPhase::Ready } else { self.status.phase };
            self.phases.push(PhaseSpan { phase, seconds: (now_instant - self.phase_began).as_secs_f64() });
        }
        let limit = self.limit(phase);
        self.phase_began = now_instant;
        self.phase_deadline = limit.map(|limit| now_instant + limit);
        self.status.since = now();
        self.status.phase = phase;
        self.status.deadline = limit.and_then(|limit| deadline(self.status.since, limit));
        self.journal.write(Event::new("phase").phase(phase));
        self.changed = true;
    }

    fn name(&self, rank: usize) -> String {
        self.members[rank].name(self.ranks.place(rank))
    }

    // What others see.

    fn publish(&mut self) {
        if !self.changed && self.written.elapsed() < SNAPSHOT {
            return;
        }
        self.changed = false;
        self.written = Instant::now();
        self.status.updated = now();
        self.status.ranks = self.members.iter().map(|member| member.status.clone()).collect();
        self.display.show(&self.status);
        if let Err(error) = write_json(&self.run_dir.status_file(), &self.status) {
            tracing::warn!(%error, "cannot write status.json");
        }
    }

    fn conclude(mut self) -> Outcome<Status> {
        let mut verdict = self.verdict.take().unwrap_or_else(Verdict::done);
        let is_job = matches!(self.spec.task, Task::Job { .. });
        if is_job && verdict.exit.is_some_and(Exit::is_resumable) {
            verdict.hints.push(format!("to go on from where it ended: nemotron resume {}", self.status.run));
        }
        if let Err(error) = fs::remove_file(self.run_dir.endpoint_file())
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, "cannot remove endpoint.json");
        }
        self.enter(verdict.phase);
        let end = verdict.end();
        self.status.end = Some(end.clone());
        if let Err(error) = write_json(&self.run_dir.end_file(self.status.attempt), &end) {
            tracing::warn!(%error, "cannot write how the attempt ended");
        }
        self.status.eta_s = None;
        let up = [RunPhase::Ready, RunPhase::Draining];
        let worked: f64 = self.phases.iter().filter(|span| up.contains(&span.phase)).map(|span| span.seconds).sum();
        if self.status.job.is_some() && worked > 0.0 {
            self.status.tokens_per_second = self.status.stats.generated_tokens as f64 / worked;
        }
        self.changed = true;
        self.publish();
        let report = Report {
            schema: 1,
            run: &self.status.run,
            attempt: self.status.attempt,
            outcome: verdict.phase,
            exit_code: end.exit_code,
            cause: end.cause.as_deref(),
            started: self.status.started,
            ended: self.status.since,
            phases: &self.phases,
            ranks: &self.status.ranks,
            prompt_tokens: self.status.stats.prompt_tokens,
            generated_tokens: self.status.stats.generated_tokens,
            rows: self.status.job,
        };
        if let Err(error) = write_json(&self.run_dir.report_file(), &report) {
            tracing::warn!(%error, "cannot write report.json");
        }
        let mut event = Event::new("ended").phase(verdict.phase);
        event.exit_code = Some(end.exit_code);
        event.rank = end.rank;
        event.text = end.cause;
        self.journal.write(event);
        self.display.finish();
        // A rank that could say why it failed has said it.
        if let (RunPhase::Failed, Some(rank)) = (verdict.phase, verdict.rank)
            && self.members[rank].end.is_none()
        {
            self.show_log(rank);
        }
        verdict.failure(&self.status.run).map_or(Ok(self.status), Err)
    }

    fn show_log(&self, rank: usize) {
        let path = self.run_dir.rank_log(self.status.attempt, rank);
        let lines = last_lines(&path, LOG_LINES);
        if !lines.is_empty() {
            self.display.say(&format!("the end of {}:\n  {}", path.display(), lines.join("\n  ")));
        }
    }
}

fn deadline(since: Timestamp, limit: Duration) -> Option<Timestamp> {
    since.checked_add(SignedDuration::try_from(limit).ok()?).ok()
}

/// Whether this process was started with the signal ignored.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal as i32 - 1) & 1 == 1
}
