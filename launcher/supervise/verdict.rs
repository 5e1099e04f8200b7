//! How a run ends: from what went wrong on its ranks to the one cause that is reported.

use std::os::unix::process::ExitStatusExt as _;
use std::process::ExitStatus;

use nix::sys::signal::Signal;

use crate::rendezvous::RankEnd;
use crate::report::{Exit, Failure};
use crate::state::{End, RunPhase};

/// Something that ends the run.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Fault {
    pub(super) rank: Option<usize>,
    pub(super) exit: Exit,
    /// The error, its causes below it.
    pub(super) error: Vec<String>,
    pub(super) hints: Vec<String>,
    /// The engine itself broke, so that a row it was working on may be the cause. A rank that was killed from outside proves nothing.
    pub(super) crashed: bool,
}

impl Fault {
    pub(super) fn new(rank: Option<usize>, exit: Exit, text: impl Into<String>) -> Self {
        Self { rank, exit, error: vec![text.into()], hints: Vec::new(), crashed: false }
    }

    /// What the rank reported about itself; `who` names it.
    pub(super) fn reported(rank: usize, who: &str, exit: Exit, end: RankEnd) -> Self {
        let mut error = vec![format!("{who} failed")];
        error.extend(end.error);
        let crashed = matches!(exit, Exit::Internal | Exit::OutOfMemory);
        Self { rank: Some(rank), exit, error, hints: end.hints, crashed }
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
    faults.iter().find(|fault| fault.exit != Exit::Communication).or(faults.first())
}

/// How the run ended.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Verdict {
    /// DONE, FAILED or CANCELLED.
    pub(super) phase: RunPhase,
    pub(super) exit: Option<Exit>,
    pub(super) rank: Option<usize>,
    pub(super) error: Vec<String>,
    pub(super) hints: Vec<String>,
    pub(super) crashed: bool,
}

impl Verdict {
    pub(super) fn done() -> Self {
        Self { phase: RunPhase::Done, exit: None, rank: None, error: Vec::new(), hints: Vec::new(), crashed: false }
    }

    pub(super) fn failed(fault: &Fault) -> Self {
        Self {
            phase: RunPhase::Failed,
            exit: Some(fault.exit),
            rank: fault.rank,
            error: fault.error.clone(),
            hints: fault.hints.clone(),
            crashed: fault.crashed,
        }
    }

    pub(super) fn cancelled(exit: Exit, text: impl Into<String>) -> Self {
        let error = vec![text.into()];
        Self { phase: RunPhase::Cancelled, exit: Some(exit), rank: None, error, hints: Vec::new(), crashed: false }
    }

    /// A signal asked for the end. SIGUSR1 is the scheduler's warning that the time of the allocation is nearly over.
    pub(super) fn stopped(signal: Signal, text: impl Into<String>) -> Self {
        let text = text.into();
        match signal {
            Signal::SIGUSR1 => {
                let error = vec!["the time of the allocation is over".into(), text];
                let exit = Some(Exit::Resumable);
                Self { phase: RunPhase::Failed, exit, rank: None, error, hints: Vec::new(), crashed: false }
            }
            Signal::SIGINT => Self::cancelled(Exit::Interrupted, text),
            _ => Self::cancelled(Exit::Terminated, text),
        }
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
        let failure = Verdict::failed(&fault).failure("r").unwrap();
        assert_eq!(failure.exit, Exit::Checkpoint);
        let text =
            "error: run r failed\n  caused by: rank 3 failed\n  caused by: outer\n  caused by: inner\n  help: try";
        assert_eq!(failure.to_string(), text);
        assert!(Verdict::done().failure("r").is_none());
    }
}
