//! How a run ends: from what went wrong on its ranks to the one cause that is reported.

use std::fmt;
use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nix::sys::signal::Signal;

use crate::ranks::Notice;
use crate::rendezvous::RankEnd;
use crate::report::{Blame, Exit, Failure};
use crate::state::{End, RunPhase};

/// Something that ends the run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) rank: Option<usize>,
    pub(super) exit: Exit,
    /// The error, its causes below it.
    pub(super) error: Vec<String>,
    pub(super) hints: Vec<String>,
    /// In the rank's own words, which know more than what is seen of it.
    pub(super) told: bool,
    /// Ranks whose nodes may be to blame.
    pub(super) blamed: Vec<usize>,
    /// The engine itself broke, so that a row it was working on may be the cause. A rank that was killed from outside proves nothing.
    pub(super) crashed: bool,
}

impl Fault {
    pub(super) fn new(rank: Option<usize>, exit: Exit, text: impl Into<String>) -> Self {
        let blamed = rank.into_iter().filter(|_| exit.blame() != Blame::Nothing).collect();
        Self { rank, exit, error: vec![text.into()], hints: Vec::new(), told: false, blamed, crashed: false }
    }

    /// What the rank reported about itself; `who` names it.
    pub(super) fn reported(rank: usize, who: &str, exit: Exit, end: RankEnd) -> Self {
        let mut fault = Self::new(Some(rank), exit, format!("{who} failed"));
        fault.error.extend(end.error);
        fault.hints = end.hints;
        fault.told = true;
        fault.crashed = matches!(exit, Exit::Internal | Exit::OutOfMemory);
        fault
    }

    /// A process that ended without a report.
    pub(super) fn died(rank: usize, who: &str, status: ExitStatus) -> Self {
        let (exit, text) = match (status.signal(), status.code()) {
            (Some(signal), _) => (Exit::RankLost, format!("{who} was killed by {}", signal_name(signal))),
            (None, Some(0)) => (Exit::RankLost, format!("{who} left before the end")),
            (None, code) => {
                let code = code.unwrap_or(-1);
                (Exit::Internal, format!("{who} ended with exit code {code} and without a report"))
            }
        };
        let mut fault = Self::new(Some(rank), exit, text);
        let own_fault = [Signal::SIGABRT, Signal::SIGBUS, Signal::SIGFPE, Signal::SIGILL, Signal::SIGSEGV];
        fault.crashed = match status.signal() {
            Some(signal) => own_fault.iter().any(|&fault| fault as i32 == signal),
            None => status.code() != Some(0),
        };
        if status.signal() == Some(Signal::SIGKILL as i32) {
            fault.hints.push("if nobody killed it, the host may have run out of memory: see dmesg".into());
        }
        fault
    }
}

/// The fault that the others follow from: a rank that only lost a connection lost it to the rank that failed.
pub(super) fn cause(faults: &[Fault]) -> Option<&Fault> {
    let first = faults.iter().find(|fault| fault.exit != Exit::Communication).or(faults.first())?;
    faults.iter().find(|fault| fault.told && fault.rank == first.rank).or(Some(first))
}

/// Why a run shall end before its work is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Ctrl-C.
    Interrupt,
    /// Of whoever may end it.
    Terminate(Signal),
    /// The scheduler takes the nodes back, because their time is over or for another reason.
    Withdrawn(Notice),
    /// Nobody uses the server.
    Idle,
}

impl From<Signal> for Wish {
    fn from(signal: Signal) -> Self {
        if signal == Signal::SIGINT { Self::Interrupt } else { Self::Terminate(signal) }
    }
}

impl fmt::Display for Wish {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Interrupt => f.write_str("SIGINT stopped it"),
            // The signal of `nemotron cancel` in a batch script.
            Self::Terminate(Signal::SIGUSR2) => f.write_str("it was cancelled"),
            Self::Terminate(signal) => write!(f, "{signal} stopped it"),
            Self::Withdrawn(notice) => f.write_str(notice.words()),
            Self::Idle => f.write_str("no request came for serve.idle_timeout"),
        }
    }
}

/// How an attempt ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    /// DONE, FAILED or CANCELLED.
    pub(super) phase: RunPhase,
    pub(super) exit: Option<Exit>,
    pub(super) rank: Option<usize>,
    pub(super) error: Vec<String>,
    pub(super) hints: Vec<String>,
    /// As the scheduler names them.
    pub(super) nodes: Vec<String>,
    pub(super) crashed: bool,
}

impl Verdict {
    pub(super) fn done() -> Self {
        Self {
            phase: RunPhase::Done,
            exit: None,
            rank: None,
            error: Vec::new(),
            hints: Vec::new(),
            nodes: Vec::new(),
            crashed: false,
        }
    }

    /// `node` names the node of a rank.
    pub(super) fn failed(fault: &Fault, node: impl Fn(usize) -> Option<String>) -> Self {
        let mut nodes: Vec<String> = fault.blamed.iter().filter_map(|&rank| node(rank)).collect();
        nodes.dedup();
        Self {
            phase: RunPhase::Failed,
            exit: Some(fault.exit),
            rank: fault.rank,
            error: fault.error.clone(),
            hints: fault.hints.clone(),
            nodes,
            crashed: fault.crashed,
        }
    }

    fn ended(phase: RunPhase, exit: Exit, error: Vec<String>) -> Self {
        Self { phase, exit: Some(exit), error, ..Self::done() }
    }

    /// The work did not fit into the time.
    pub(super) fn out_of_time(error: Vec<String>) -> Self {
        Self::ended(RunPhase::Failed, Exit::Resumable, error)
    }

    /// The end came as it was wished; `state` says how it found the run.
    pub(super) fn stopped(wish: Wish, state: impl Into<String>) -> Self {
        let error = [wish.to_string(), state.into()].into_iter().filter(|text| !text.is_empty()).collect();
        match wish {
            Wish::Interrupt => Self::ended(RunPhase::Cancelled, Exit::Interrupted, error),
            Wish::Terminate(_) | Wish::Withdrawn(Notice::Cancelled) => {
                Self::ended(RunPhase::Cancelled, Exit::Terminated, error)
            }
            Wish::Withdrawn(Notice::NodeFailure) => Self::ended(RunPhase::Failed, Exit::RankLost, error),
            Wish::Withdrawn(_) => Self::out_of_time(error),
            Wish::Idle => Self { error, ..Self::done() },
        }
    }

    /// A server that ended well because somebody wanted it to.
    pub(super) fn drained(wish: Wish, state: &str) -> Self {
        Self { error: vec![wish.to_string(), state.into()], ..Self::done() }
    }

    /// The cause of an end that another attempt would only repeat.
    pub(super) fn stuck(self, is_job: bool) -> Self {
        let what = if is_job { "completed no row" } else { "were never ready" };
        let mut error = vec![format!("two attempts in a row {what}")];
        error.extend(self.error);
        Self { exit: Some(Exit::AttemptsWithoutProgress), error, ..self }
    }

    /// The cause in one line.
    pub(super) fn text(&self) -> Option<String> {
        (!self.error.is_empty()).then(|| self.error.join(": "))
    }

    pub(super) fn end(&self) -> End {
        End {
            exit: self.exit,
            exit_code: self.exit.map_or(0, |exit| exit as u8),
            cause: self.text(),
            hints: self.hints.clone(),
            rank: self.rank,
            nodes: self.nodes.clone(),
            crashed: self.crashed,
        }
    }

    /// The command's failure; `None` when the run succeeded.
    pub(super) fn failure(&self, run: &str) -> Option<Failure> {
        let exit = self.exit?;
        let innermost = self.error.last().cloned().unwrap_or_default();
        let outer = self.error.iter().rev().skip(1);
        let error = outer.fold(anyhow::Error::msg(innermost), |error, text| error.context(text.clone()));
        let how = match (self.phase, exit) {
            (RunPhase::Cancelled, _) => "was stopped",
            (_, Exit::Resumable) => "ended before its work was done",
            _ => "failed",
        };
        let failure = Failure::new(exit, error.context(format!("run {run} {how}")));
        Some(self.hints.iter().cloned().fold(failure, Failure::hint))
    }
}

fn signal_name(signal: i32) -> String {
    Signal::try_from(signal).map_or_else(|_| format!("signal {signal}"), |signal| signal.as_str().to_owned())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn a_lost_connection_is_a_consequence() {
        let lost = |rank| Fault::new(Some(rank), Exit::Communication, "lost the connection");
        let killed = Fault::died(1, "rank 1 (host h, pid 7)", ExitStatus::from_raw(9));
        assert_eq!(killed.exit, Exit::RankLost);
        assert_eq!(killed.error, ["rank 1 (host h, pid 7) was killed by SIGKILL"]);
        assert_eq!(cause(&[lost(0), killed.clone(), lost(2)]), Some(&killed));
        assert_eq!(cause(&[lost(2), lost(0)]).unwrap().rank, Some(2));
        let unreachable = Fault::new(Some(1), Exit::Rendezvous, "cannot be reached");
        let told = Fault { told: true, ..Fault::new(Some(1), Exit::Preflight, "the port is in use") };
        assert_eq!(cause(&[unreachable, told.clone()]), Some(&told));
        assert_eq!(cause(&[]), None);
    }

    #[test]
    fn a_process_without_a_report_is_judged_by_its_status() {
        let exit = |raw| Fault::died(0, "rank 0", ExitStatus::from_raw(raw)).exit;
        assert_eq!(exit(0), Exit::RankLost);
        assert_eq!(exit(101 << 8), Exit::Internal);
        assert_eq!(exit(11), Exit::RankLost);
    }

    #[test]
    fn a_failure_keeps_the_chain() {
        let end = RankEnd {
            exit: Some(Exit::Checkpoint),
            error: vec!["outer".into(), "inner".into()],
            hints: vec!["try".into()],
        };
        let fault = Fault::reported(3, "rank 3", Exit::Checkpoint, end);
        let failure = Verdict::failed(&fault, |_| None).failure("r").unwrap();
        assert_eq!(failure.exit, Exit::Checkpoint);
        let text =
            "error: run r failed\n  caused by: rank 3 failed\n  caused by: outer\n  caused by: inner\n  help: try";
        assert_eq!(failure.to_string(), text);
        assert!(Verdict::done().failure("r").is_none());
    }
}
