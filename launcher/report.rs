//! What a command ends with: an exit code from the documented table, and a text that says what failed, where, why, and what to do.

use std::fmt;

/// Documented exit codes. Scripts branch on them; a batch script passes on the cause's code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[repr(u8)]
pub enum Exit {
    Internal = 1,
    Usage = 2,
    DoesNotFit = 10,
    Preflight = 11,
    SchedulerRefused = 12,
    SchedulerSilent = 13,
    Deadline = 20,
    Rendezvous = 21,
    Checkpoint = 22,
    DeviceUnhealthy = 23,
    Communication = 24,
    RankLost = 25,
    NoProgress = 26,
    OutOfMemory = 27,
    Numerical = 28,
    Resumable = 30,
    TooManyFailedRows = 31,
    OutputStorage = 32,
    AttemptsWithoutProgress = 33,
    WaitTimedOut = 124,
    Interrupted = 130,
    Terminated = 143,
}

/// A command's failure.
#[derive(Debug)]
pub struct Failure {
    pub exit: Exit,
    /// What failed, then `caused by:` lines.
    pub error: anyhow::Error,
    /// What to do, one `help:` line each.
    pub hints: Vec<String>,
}

impl Failure {
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self { exit, error: error.into(), hints: Vec::new() }
    }

    pub fn msg(exit: Exit, message: impl fmt::Display + fmt::Debug + Send + Sync + 'static) -> Self {
        Self::new(exit, anyhow::Error::msg(message))
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "error: {}", self.error)?;
        for cause in self.error.chain().skip(1) {
            write!(f, "\n  caused by: {cause}")?;
        }
        for hint in &self.hints {
            write!(f, "\n  help: {hint}")?;
        }
        Ok(())
    }
}

/// Anything that was not given a code of its own is our bug.
impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::new(Exit::Internal, error)
    }
}

pub type Outcome<T = ()> = Result<T, Failure>;
