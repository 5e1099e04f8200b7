//! One attempt: starts the ranks and watches them to their end: rendezvous, deadlines, progress, deaths, signals.
//!
//! One thread decides. Connections and signals only send it what they hear, so every decision sees one consistent state.

use std::net::SocketAddr;
use std::sync::mpsc::{Receiver, Sender};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nemotron_engine::engine::EngineStats;
use nemotron_engine::job::JobProgress;
use nemotron_engine::report::{Load, Phase};
use nix::sys::signal::Signal;

use super::display::span;
use super::member::{Death, Member};
use super::rate::Rate;
use super::record::Record;
use super::verdict::{Fault, Verdict, Wish, cause};
use super::warnings::Pace;
use super::{Input, OnReady};
use crate::env::Environment;
use crate::events::Event;
use crate::fabric;
use crate::process::ProcessId;
use crate::ranks::Ranks;
use crate::rendezvous::{Arrival, Down, Hello, Identity, Link, NETWORK_HINT, RankEnd, Reception, Up, run_key};
use crate::report::{Exit, Outcome};
use crate::rundir::{RunDir, write_json};
use crate::spec::{RunSpec, Task};
use crate::state::{Endpoint, RunPhase};

/// What to do when a node's memory, or the job's share of it, was too small.
const MEMORY_HINT: &str =
    "give the job more of its nodes' memory (slurm.quirks.mem; \"0\" is all of it), or make limits.kv_tokens smaller";
/// How often processes and clocks are looked at when nothing happens.
const TICK: Duration = Duration::from_millis(50);
/// Faults that follow from the same cause arrive within this time.
const COLLECT: Duration = Duration::from_millis(300);
/// Within this time, the same signal again is an echo and not impatience.
const ECHO: Duration = Duration::from_millis(300);
/// A scheduler that signals ranks because one of them died must not be taken for one that wants the run to end; this is for how long the
/// death may come to light after the signal.
const SETTLE: Duration = Duration::from_secs(1);

/// Where the run stands between its start and its end.
#[derive(Clone, Copy)]
pub(super) enum Course {
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

/// What is left of an attempt when its ranks have gone.
pub(super) struct Ended<'a> {
    pub(super) record: Record<'a>,
    pub(super) members: Vec<Member>,
    pub(super) ranks: Box<dyn Ranks>,
    /// Signals may still arrive here.
    pub(super) inputs: Receiver<Input>,
    pub(super) verdict: Verdict,
}

pub(super) struct Supervisor<'a> {
    run_dir: &'a RunDir,
    pub(super) spec: &'a RunSpec,
    identity: Identity,
    pub(super) ranks: Box<dyn Ranks>,
    inputs: Receiver<Input>,
    /// Open until everybody is here.
    reception: Option<Reception>,
    addresses: Vec<SocketAddr>,
    pub(super) record: Record<'a>,
    on_ready: Option<OnReady>,
    pub(super) members: Vec<Member>,
    pub(super) course: Course,
    faults: Vec<Fault>,
    pub(super) verdict: Option<Verdict>,
    /// What asked for the end.
    wish: Option<Wish>,
    /// A rank was signalled by the scheduler; it counts from this moment on.
    signalled_at: Option<Instant>,
    /// When the step that holds all ranks ended, and how.
    pub(super) collapsed: Option<(Instant, String)>,
    peers_sent: bool,
    /// Rank 0 works.
    leads: bool,
    /// When a step completed last, or nothing was queued.
    pub(super) moved: Instant,
    /// When a server was used last.
    pub(super) used: Instant,
    /// When work must have ended, because the scheduler takes the nodes back soon after.
    pub(super) closes: Option<Instant>,
    /// Until when the rows of a job may run, by its user's wish.
    pub(super) job_deadline: Option<Instant>,
    rate: Rate,
    pub(super) pace: Pace,
}

impl<'a> Supervisor<'a> {
    /// `record` is that of an attempt that was just begun.
    pub(super) fn new(
        run_dir: &'a RunDir,
        spec: &'a RunSpec,
        record: Record<'a>,
        ranks: Box<dyn Ranks>,
        (sender, inputs): (Sender<Input>, Receiver<Input>),
        on_ready: Option<OnReady>,
    ) -> Outcome<Self> {
        let identity = Identity::current(run_dir, record.status.attempt)?;
        let key = run_key(&run_dir.token()?);
        let reception = Reception::open(ranks.meeting_points(), key, sender).context("cannot listen for ranks")?;
        let device = format!("{:?}", spec.device).to_lowercase();
        let member = |rank| Member::new(rank, format!("{device} {rank}"));
        let start = Instant::now();
        let job_deadline = match spec.task {
            Task::Job { deadline_s: Some(seconds), .. } => Some(start + Duration::from_secs_f64(seconds)),
            _ => None,
        };
        Ok(Self {
            run_dir,
            identity,
            ranks,
            inputs,
            addresses: reception.addresses().to_vec(),
            reception: Some(reception),
            record,
            on_ready,
            members: (0..spec.mesh.world_size()).map(member).collect(),
            course: Course::Running,
            faults: Vec::new(),
            verdict: None,
            wish: None,
            signalled_at: None,
            collapsed: None,
            peers_sent: false,
            leads: false,
            moved: start,
            used: start,
            closes: None,
            job_deadline,
            rate: Rate::new(),
            pace: Pace::new(),
            spec,
        })
    }

    /// Until no rank is left.
    pub(super) fn run(mut self) -> Ended<'a> {
        self.record.event(Event::new("started").text(format!("{} ranks", self.members.len())));
        if let Some(site) = &self.spec.site
            && let Some(settings) = fabric::in_force(site, &Environment::of_process())
        {
            self.record.event(Event::new("note").text(settings));
        }
        if let Some(left) = self.ranks.time_left() {
            self.must_end_within(left);
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
            self.record.publish(&self.members);
        }
        let verdict = self.verdict.take().unwrap_or_else(Verdict::done);
        self.record.end_attempt(&verdict);
        Ended { record: self.record, members: self.members, ranks: self.ranks, inputs: self.inputs, verdict }
    }

    fn is_over(&self) -> bool {
        matches!(self.course, Course::Ending { .. }) && !self.ranks.any_left()
    }

    fn start_ranks(&mut self) {
        self.enter(RunPhase::Preflight);
        self.record.publish(&self.members);
        if let Err(error) = self.ranks.start(self.members.len(), &self.addresses, self.record.status.attempt) {
            let mut fault = Fault::new(None, Exit::Internal, "cannot start the ranks");
            fault.error.extend(error.chain().map(ToString::to_string));
            self.fail_now(fault);
        }
    }

    // What is heard.

    fn take(&mut self, input: Input) {
        match input {
            Input::Signal(signal) => {
                // A scheduler may signal because of what has just happened.
                self.reap();
                self.signalled(signal);
            }
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
        self.record
            .event(Event::new("joined").rank(rank, &hello.process.host).text(format!("pid {}", hello.process.pid)));
        if matches!(self.course, Course::Ending { .. }) {
            // It missed the call to stop.
            _ = link.send(&Down::Stop);
        }
        let unreachable = address.as_ref().err().filter(|_| !hello.addresses.is_empty()).cloned();
        member.introduce(hello, address.ok(), link);
        self.record.changed = true;
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
                let before = member.status.phase.replace(phase);
                member.status.progress = 0.0;
                let host = member.status.process.as_ref().map_or("", |process| &process.host);
                let Load { bytes_read, read_seconds, seconds, .. } = member.status.load;
                if before == Some(Phase::Loading) && read_seconds > 0.0 {
                    let rate = bytes_read as f64 / 1e9 / read_seconds;
                    let text = format!(
                        "{bytes_read} bytes read in {read_seconds:.3} s, {rate:.2} GB/s; in place after {seconds:.3} s"
                    );
                    self.record.event(Event::new("loaded").rank(rank, host).text(text));
                }
                self.record.event(Event::new("phase").rank(rank, host).phase(phase.into()));
                self.record.changed = true;
            }
            Up::Heartbeat { progress, steps, busy_s, load } => {
                if member.status.steps != steps {
                    self.moved = Instant::now();
                }
                member.status.progress = progress;
                (member.status.steps, member.status.busy_s) = (steps, busy_s);
                member.status.load = load;
            }
            Up::Stats { stats, job } => {
                self.measured(stats, job);
                let steps = self.members.iter().map(|member| member.status.steps).collect();
                if let Some(leader) = &self.members[0].link {
                    _ = leader.send(&Down::Steps { steps });
                }
            }
            Up::Ready { url } => {
                self.leads = true;
                self.record.status.url = url;
            }
            Up::Daemon { there } => self.daemon_changed(rank, there),
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

    fn measured(&mut self, stats: EngineStats, job: Option<JobProgress>) {
        if stats.waiting + stats.running == 0 {
            self.moved = Instant::now();
        }
        let rate = self.rate.of(Instant::now(), stats.generated_tokens);
        let status = &mut self.record.status;
        if stats.waiting + stats.running > 0 || stats.finished_rows != status.stats.finished_rows {
            self.used = Instant::now();
        }
        status.eta_s = job.and_then(|job| self.rate.time_left(job.rows_done, job.rows_total));
        status.tokens_per_second = rate;
        status.stats = stats;
        status.job = job.or(status.job);
        let busy = status.stats.waiting + status.stats.running > 0;
        if status.phase.is_up() {
            status.phase = if busy { RunPhase::Busy } else { RunPhase::Ready };
        }
    }

    fn ended(&mut self, rank: usize, end: RankEnd) {
        let who = self.name(rank);
        self.members[rank].end = Some(end.clone());
        match (rank, end.exit, self.wish) {
            (0, None, Some(wish @ (Wish::Withdrawn(_) | Wish::Idle))) if !self.is_job() => {
                self.finish(Verdict::stopped(wish, "what was asked has been answered"));
            }
            // Why it came to an end, which is none of its own.
            (0, None, Some(wish)) if !self.is_job() => {
                self.finish(Verdict::drained(wish, "what was asked has been answered"));
            }
            (0, None, _) => self.finish(Verdict::done()),
            (0, Some(Exit::Resumable), Some(wish)) => self.finish(Verdict::stopped(wish, "what is done is kept")),
            (0, Some(Exit::Resumable), None) => self.finish(Verdict::out_of_time(end.error)),
            (_, Some(exit), _) => self.fail(Fault::reported(rank, &who, exit, end)),
            (_, None, _) => {}
        }
    }

    fn signalled(&mut self, signal: Signal) {
        self.record.event(Event::new("signal").text(signal.as_str()));
        match (self.course, signal) {
            (Course::Running, Signal::SIGUSR1) => self.warned(),
            (Course::Draining { .. }, Signal::SIGUSR1) => {}
            (Course::Running, Signal::SIGQUIT) => self.finish(Verdict::stopped(signal.into(), "")),
            (Course::Running, _) => self.stop(self.wish_behind(signal)),
            // `timeout` signals its command and then the command's process group: the same wish, heard twice.
            (Course::Draining { .. }, _)
                if self.wish == Some(signal.into()) && self.record.phase_began.elapsed() < ECHO => {}
            (Course::Draining { .. }, _) => {
                let wish = self.wish_behind(signal);
                self.finish(Verdict::stopped(wish, format!("a second signal ({signal}) cut it short")));
            }
            // The scheduler may end the ranks a moment before it signals us.
            (Course::Collecting { .. }, _) if self.ranks.are_scheduled() => {
                let wish = self.wish_behind(signal);
                self.wish.get_or_insert(wish);
            }
            (Course::Collecting { .. }, _) => {}
            (Course::Ending { .. }, _) => self.course = Course::Ending { kill_at: Some(Instant::now()) },
        }
    }

    /// A scheduler signals for many reasons, and knows which.
    fn wish_behind(&self, signal: Signal) -> Wish {
        let notice = if signal == Signal::SIGTERM { self.ranks.notice() } else { None };
        notice.map_or_else(|| signal.into(), Wish::Withdrawn)
    }

    /// What runs is finished if the ranks are ready; else there is nothing to finish.
    pub(super) fn stop(&mut self, wish: Wish) {
        if !self.record.status.phase.is_up() {
            return self.finish(Verdict::stopped(wish, "the ranks were still starting"));
        }
        self.wish = Some(wish);
        self.course = Course::Draining { until: Instant::now() + self.spec.deadlines.drain };
        self.enter(RunPhase::Draining);
        if let Some(leader) = &self.members[0].link {
            // If rank 0 has just died, that is noticed by itself.
            _ = leader.send(&Down::Drain);
        }
    }

    pub(super) fn is_job(&self) -> bool {
        matches!(self.spec.task, Task::Job { .. })
    }

    // What is seen.

    fn reap(&mut self) {
        for (rank, status) in self.ranks.reap() {
            self.members[rank].exited(status);
            self.record.changed = true;
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
                    let report = self.ranks.report_on(rank);
                    if report.as_ref().is_some_and(|report| report.contains("Out Of Memory")) {
                        fault.hints.push(MEMORY_HINT.into());
                    }
                    fault.error.extend(report);
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
        if !matches!(self.course, Course::Running) || self.record.status.phase.is_up() {
            return;
        }
        if !self.peers_sent && self.members.iter().all(Member::has_joined) {
            self.peers_sent = true;
            self.reception = None;
            let addresses: Vec<SocketAddr> = self.members.iter().filter_map(|member| member.address).collect();
            let ends = [self.job_deadline, self.closes].into_iter().flatten().min();
            let seconds_left = ends.map(|ends| ends.saturating_duration_since(Instant::now()).as_secs_f64());
            for member in &self.members {
                let rank = member.status.rank;
                // One rank looks for all of its node.
                let daemon_port = self.ranks.daemon_port(rank).filter(|_| self.spec.local_rank(rank) == 0);
                let peers = Down::Peers { addresses: addresses.clone(), seconds_left, daemon_port };
                _ = member.link.as_ref().map(|link| link.send(&peers));
            }
        }
        let phase = self.startup_phase();
        if phase == RunPhase::Ready {
            self.enter(RunPhase::Ready);
            (self.moved, self.used) = (Instant::now(), Instant::now());
            self.announce();
        } else if phase > self.record.status.phase {
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
        self.record.event(Event::new("ready").text(self.record.status.url.clone().unwrap_or_default()));
        let (Some(url), Some(process)) = (self.record.status.url.clone(), self.members[0].status.process.clone())
        else {
            return;
        };
        let token_file = match &self.spec.task {
            Task::Serve { no_auth: false, token_file, .. } => {
                Some(token_file.clone().unwrap_or_else(|| self.run_dir.token_file()))
            }
            _ => None,
        };
        let ProcessId { pid, host, .. } = process;
        let endpoint = Endpoint { schema: 1, url, token_file, pid, host, attempt: self.record.status.attempt };
        if let Err(error) = write_json(&self.run_dir.endpoint_file(), &endpoint) {
            let mut fault = Fault::new(None, Exit::OutputStorage, "cannot write endpoint.json");
            fault.error.push(error.to_string());
            return self.fail_now(fault);
        }
        // Whoever is told the URL finds READY in status.json.
        self.record.changed = true;
        self.record.publish(&self.members);
        if let Some(on_ready) = self.on_ready.take() {
            on_ready(&endpoint);
        }
    }

    fn follow_clock(&mut self, now: Instant) {
        match self.course {
            Course::Running if self.signalled_at.is_some_and(|at| now >= at) => self.signalled(Signal::SIGTERM),
            Course::Running | Course::Draining { .. } if self.has_collapsed(now) => self.fail_collapsed(),
            Course::Running => {
                self.follow_pace(now);
                self.check_deadlines(now);
            }
            Course::Collecting { until } if now >= until => {
                let lost = |fault: &Fault| matches!(fault.exit, Exit::RankLost | Exit::Communication);
                let wish = self.wish.filter(|_| self.ranks.are_scheduled() && self.faults.iter().all(lost));
                let verdict = match (wish, cause(&self.faults)) {
                    (Some(wish), _) => Verdict::stopped(wish, "the ranks were ended"),
                    (None, Some(cause)) => Verdict::failed(cause, |rank| self.ranks.node(rank)),
                    (None, None) => Verdict::done(),
                };
                self.finish(verdict);
            }
            Course::Draining { until } if now >= until => {
                let wish = self.wish.unwrap_or(Wish::Terminate(Signal::SIGTERM));
                let limit = span(self.spec.deadlines.drain.as_secs_f64());
                self.finish(Verdict::stopped(wish, format!("what ran was not finished within {limit}")));
            }
            Course::Ending { kill_at: Some(kill_at) } if now >= kill_at || self.is_deserted(now) => {
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
    pub(super) fn fail_now(&mut self, fault: Fault) {
        self.record(&fault);
        let verdict = Verdict::failed(&fault, |rank| self.ranks.node(rank));
        self.finish(verdict);
    }

    fn record(&mut self, fault: &Fault) {
        let process = fault.rank.and_then(|rank| self.members.get(rank)?.status.process.as_ref());
        self.record.fault(fault, process.map(|process| process.host.clone()));
    }

    pub(super) fn finish(&mut self, verdict: Verdict) {
        self.verdict.get_or_insert(verdict);
        self.course = Course::Ending { kill_at: Some(Instant::now() + self.ranks.grace()) };
        for link in self.members.iter().filter_map(|member| member.link.as_ref()) {
            // Whoever cannot be told is killed.
            _ = link.send(&Down::Stop);
        }
    }

    fn enter(&mut self, phase: RunPhase) {
        let limit = self.limit(phase);
        self.record.enter(phase, limit);
    }

    pub(super) fn name(&self, rank: usize) -> String {
        self.members[rank].name(self.ranks.place(rank))
    }
}
