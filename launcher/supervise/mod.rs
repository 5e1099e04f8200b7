//! Attempts at a run, one after another, until it is done or going on is pointless.

mod attempt;
mod deadlines;
mod display;
mod member;
mod next;
mod rate;
mod record;
#[cfg(test)]
mod tests;
mod verdict;
mod warnings;

use std::fs;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};

use self::attempt::{Ended, Supervisor};
pub(crate) use self::display::{Display, is_quiet, line, narrate, span};
use self::next::{Next, Situation};
use self::record::Record;
use self::verdict::Verdict;
use crate::attempts;
use crate::ranks::{self, Notice};
use crate::rendezvous::Arrival;
use crate::report::{Exit, Outcome};
use crate::rundir::RunDir;
use crate::slurm::env::Allocation;
use crate::spec::{RunSpec, Task};
use crate::state::{Endpoint, RunPhase, Status};
use crate::summary::record_end;

/// How long Slurm may take to end this process after it was asked to start the job again.
const REQUEUED: Duration = Duration::from_secs(60);
/// What a start needs at least, beyond what the last one took.
const START: Duration = Duration::from_secs(30);

/// Called once, when a serving run answers.
pub(crate) type OnReady = Box<dyn FnOnce(&Endpoint)>;

/// Runs attempts until the run is over or another job goes on, in the thread that must outlive the ranks. [`block_signals`] was called before.
///
/// # Errors
/// The run failed or was stopped, or this job's part of it has: the cause, with its exit code.
pub(crate) fn supervise(run_dir: &RunDir, on_ready: OnReady) -> Outcome<Status> {
    let signals = Signals::forward()?;
    let spec = run_dir.spec()?;
    let mut on_ready = Some(on_ready);
    let mut channel = signals.channel();
    loop {
        let supervisor = match prepare(run_dir, &spec, channel, &mut on_ready) {
            Ok(supervisor) => supervisor,
            Err(failure) => {
                // Nobody else would say why the attempt never began.
                _ = record_end(run_dir, RunPhase::Failed, failure.exit, &format!("{:#}", failure.error));
                return Err(failure);
            }
        };
        let mut ended = supervisor.run();
        channel = signals.channel();
        let next = choose(&spec, &mut ended);
        let Ended { mut record, members, ranks, mut verdict, .. } = ended;
        match next {
            Next::Over => {}
            Next::Stuck => verdict = verdict.stuck(matches!(spec.task, Task::Job { .. })),
            Next::Restart { pause } => {
                let how = format!("the ranks start again in {}", span(pause.as_secs_f64()));
                record.hand_on(&verdict, &how, true);
                match wait(&channel.1, pause) {
                    None => continue,
                    Some(signal) => verdict = Verdict::stopped(signal.into(), "it was about to start again"),
                }
            }
            Next::Successor => {
                let avoid = attempts::avoided(&record.attempts);
                match ranks.submit_successor(&avoid) {
                    Ok(job) => {
                        let away =
                            if avoid.is_empty() { String::new() } else { format!(", away from {}", avoid.join(", ")) };
                        record.hand_on(&verdict, &format!("job {job} goes on{away}"), false);
                        return verdict.failure(run_dir.name()).map_or(Ok(record.status), Err);
                    }
                    Err(failure) => {
                        record.note(&format!("no job could be submitted that goes on: {:#}", failure.error));
                        if requeue(&mut record, &verdict, ranks.as_ref(), &channel.1) {
                            return verdict.failure(run_dir.name()).map_or(Ok(record.status), Err);
                        }
                    }
                }
            }
            Next::Requeue => {
                if requeue(&mut record, &verdict, ranks.as_ref(), &channel.1) {
                    return verdict.failure(run_dir.name()).map_or(Ok(record.status), Err);
                }
            }
        }
        hint(&mut verdict, &spec, &record);
        return record.conclude(&verdict, &members);
    }
}

/// Begins the next attempt.
fn prepare<'a>(
    run_dir: &'a RunDir,
    spec: &'a RunSpec,
    channel: (Sender<Input>, Receiver<Input>),
    on_ready: &mut Option<OnReady>,
) -> Outcome<Supervisor<'a>> {
    let job = Allocation::of_process()?.and_then(|allocation| allocation.job_id.parse().ok());
    let attempts = attempts::begin(run_dir, spec.mesh.world_size(), job)?;
    let record = Record::open(run_dir, spec, attempts, Display::stderr(is_quiet()))?;
    Supervisor::new(run_dir, spec, record, ranks::of_run(run_dir)?, channel, on_ready.take())
}

/// Puts the job back into the queue unless Slurm has, and waits until this process is to end. Whether that worked.
fn requeue(record: &mut Record<'_>, verdict: &Verdict, ranks: &dyn ranks::Ranks, inputs: &Receiver<Input>) -> bool {
    let before = record.status.clone();
    // Written first, as there may be no time after it.
    record.hand_on(verdict, "Slurm starts the job again", false);
    let asked = if ranks.is_requeued() { Ok(()) } else { ranks.requeue() };
    match asked {
        Ok(()) => _ = wait(inputs, REQUEUED),
        Err(failure) => {
            record.status = before;
            record.note(&format!("the job could not be put back into the queue: {:#}", failure.error));
            return false;
        }
    }
    true
}

fn choose(spec: &RunSpec, ended: &mut Ended<'_>) -> Next {
    // Whoever wants the end while the ranks end means the run, and not this attempt of it.
    let late = ended.inputs.try_iter().find_map(|input| match input {
        Input::Signal(signal) if signal != Signal::SIGUSR1 => Some(signal),
        _ => None,
    });
    if let (Some(signal), RunPhase::Failed) = (late, ended.verdict.phase)
        && ended.ranks.notice().is_none_or(|notice| notice == Notice::Cancelled)
    {
        ended.verdict = Verdict::stopped(signal.into(), ended.verdict.text().unwrap_or_default());
    }
    let scheduled = ended.ranks.are_scheduled();
    let failed = ended.verdict.phase == RunPhase::Failed;
    let preempted = scheduled && failed && ended.ranks.notice() == Some(Notice::Preempted);
    let situation = Situation {
        continuation: spec.continuation,
        is_job: matches!(spec.task, Task::Job { .. }),
        phase: ended.verdict.phase,
        requeued: scheduled && failed && ended.ranks.is_requeued(),
        may_requeue: preempted && spec.site.as_ref().is_some_and(|site| site.requeue),
        scheduled,
        can_stay: !scheduled || !failed || ended.ranks.are_nodes_up() && has_time(ended),
    };
    next::next(&ended.record.attempts, &situation)
}

/// Whether the ranks could be ready again before the time of the allocation is over.
fn has_time(ended: &Ended<'_>) -> bool {
    let Some(left) = ended.ranks.time_left() else { return true };
    let took = ended.record.attempts.last().map_or(0.0, |attempt| attempt.seconds() - attempt.worked());
    left > START + Duration::try_from_secs_f64(took).unwrap_or_default()
}

/// What its user can do about the end of a job.
fn hint(verdict: &mut Verdict, spec: &RunSpec, record: &Record<'_>) {
    let Some(exit) = verdict.exit.filter(|exit| exit.is_resumable()) else { return };
    if !matches!(spec.task, Task::Job { .. }) {
        return;
    }
    verdict.hints.push(format!("to go on from where it ended: nemotron resume {}", spec.name));
    let (Some(job), Some(attempt)) = (record.status.job, record.attempts.last()) else { return };
    if exit == Exit::Resumable && attempt.rows > 0 && spec.site.is_some() {
        let more = job.rows_total.saturating_sub(job.rows_done).div_ceil(attempt.rows);
        let jobs = if more == 1 { "another job".into() } else { format!("about {more} more jobs") };
        verdict.hints.push(format!(
            "the rows that are left need {jobs} like this one; --chain N lets jobs follow by themselves"
        ));
    }
}

/// Waits, unless somebody wants the end.
fn wait(inputs: &Receiver<Input>, pause: Duration) -> Option<Signal> {
    let until = Instant::now() + pause;
    loop {
        match inputs.recv_timeout(until.saturating_duration_since(Instant::now())) {
            Ok(Input::Signal(signal)) if signal != Signal::SIGUSR1 => return Some(signal),
            Ok(_) => {}
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return None,
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

/// Signals that came since [`block_signals`], for a command that waits for other processes.
pub(crate) struct PendingSignals(SignalFd);

impl PendingSignals {
    pub(crate) fn new() -> Outcome<Self> {
        let flags = SfdFlags::SFD_NONBLOCK | SfdFlags::SFD_CLOEXEC;
        Ok(Self(SignalFd::with_flags(&signals(), flags).context("cannot watch for signals")?))
    }

    pub(crate) fn next(&self) -> Outcome<Option<Signal>> {
        let signal = self.0.read_signal().context("cannot read a signal")?;
        Ok(signal.and_then(|signal| Signal::try_from(signal.ssi_signo as i32).ok()))
    }
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

/// Signals to this process, for whichever attempt goes on.
struct Signals(Arc<Mutex<Option<Sender<Input>>>>);

impl Signals {
    /// Turns signals into inputs from here on.
    fn forward() -> Outcome<Self> {
        let current = Arc::new(Mutex::new(None::<Sender<Input>>));
        let target = Arc::clone(&current);
        let forward = move || {
            while let Ok(signal) = signals().wait() {
                let sender = target.lock().unwrap_or_else(PoisonError::into_inner);
                // Without a receiver the process is about to end.
                if let Some(sender) = sender.as_ref() {
                    _ = sender.send(Input::Signal(signal));
                }
            }
        };
        std::thread::Builder::new().name("signals".into()).spawn(forward).context("cannot start a thread")?;
        Ok(Self(current))
    }

    /// A channel of its own for each attempt, so that none hears the ranks of the one before.
    fn channel(&self) -> (Sender<Input>, Receiver<Input>) {
        let (sender, receiver) = channel();
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(sender.clone());
        (sender, receiver)
    }
}

/// Whether this process was started with the signal ignored.
fn is_ignored(signal: Signal) -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let mask = mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0);
    mask >> (signal as i32 - 1) & 1 == 1
}
