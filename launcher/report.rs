//! What a command ends with: an exit code from the documented table, and a text that says what failed, where, why, and what to do.

use std::fmt;
use std::io::{self, Write as _};

use nemotron_engine::backend::BackendError;
use nemotron_engine::checkpoint::CheckpointError;
use nemotron_engine::config::MeshError;
use nemotron_engine::job::JobError;
use nemotron_engine::rank::EngineError;
use nemotron_engine::request::RowError;

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

/// What another start of the ranks is worth after an attempt that ended with a code.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Retry {
    /// It would end the same way, or nobody wants it.
    Never,
    /// As if by chance: if it happens again, it is no chance.
    Once,
    /// As often as `--retries` says.
    Counted,
    /// The run is not to blame: as long as it gets on.
    Free,
}

/// What an ended attempt proves about the nodes that its cause names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Blame {
    Nothing,
    Suspect,
    Unhealthy,
}

impl Exit {
    /// The column "retry" of the documented table.
    pub fn retry(self) -> Retry {
        match self {
            Self::Internal
            | Self::Deadline
            | Self::Rendezvous
            | Self::Communication
            | Self::NoProgress
            | Self::OutputStorage => Retry::Counted,
            Self::DeviceUnhealthy | Self::RankLost | Self::Resumable => Retry::Free,
            Self::Numerical => Retry::Once,
            Self::Usage
            | Self::DoesNotFit
            | Self::Preflight
            | Self::SchedulerRefused
            | Self::SchedulerSilent
            | Self::Checkpoint
            | Self::OutOfMemory
            | Self::TooManyFailedRows
            | Self::AttemptsWithoutProgress
            | Self::WaitTimedOut
            | Self::Interrupted
            | Self::Terminated => Retry::Never,
        }
    }

    /// The same column: whether the node is suspect or to be avoided.
    pub fn blame(self) -> Blame {
        match self {
            Self::DeviceUnhealthy => Blame::Unhealthy,
            Self::Rendezvous | Self::Communication | Self::RankLost => Blame::Suspect,
            _ => Blame::Nothing,
        }
    }

    /// Whether a job that ended so can go on from its journal when its user wants it.
    pub fn is_resumable(self) -> bool {
        !matches!(
            self,
            Self::Usage
                | Self::DoesNotFit
                | Self::Preflight
                | Self::Checkpoint
                | Self::OutOfMemory
                | Self::TooManyFailedRows
        )
    }
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

impl Failure {
    /// Says it on stderr, where it does not matter if nobody listens.
    pub fn print(&self, color: bool) {
        let text = self.to_string();
        let text = match text.strip_prefix("error:") {
            Some(rest) if color => format!("\x1b[1;31merror:\x1b[0m{rest}"),
            _ => text,
        };
        _ = writeln!(io::stderr(), "{text}");
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

impl From<CheckpointError> for Failure {
    fn from(error: CheckpointError) -> Self {
        let hint = match &error {
            CheckpointError::Mesh { path, wanted, .. } => format!(
                "nemotron convert {} NEW-DIRECTORY --to shards --tp {} --pp {}",
                path.display(),
                wanted.tp,
                wanted.pp
            ),
            CheckpointError::Corrupt { .. } => {
                "copy the file again; `nemotron inspect --verify` compares all files".into()
            }
            CheckpointError::Damaged { .. } | CheckpointError::MissingTensor { .. } => {
                "copy the checkpoint again, whole; `nemotron inspect` tells at once whether its files fit together"
                    .into()
            }
            CheckpointError::Link { .. } => "copy the file into the directory of the checkpoint".into(),
            _ => {
                "a model is a Hugging Face or NeMo directory, a .nemo or .gguf file, or `builtin` (docs/checkpoints.md)"
                    .into()
            }
        };
        Self::new(Exit::Checkpoint, anyhow::Error::new(error).context("the checkpoint cannot be used")).hint(hint)
    }
}

impl From<MeshError> for Failure {
    fn from(error: MeshError) -> Self {
        Self::new(Exit::DoesNotFit, anyhow::Error::new(error).context("the model cannot be split this way"))
            .hint("--tp and --pp set the layout")
    }
}

impl From<EngineError> for Failure {
    fn from(error: EngineError) -> Self {
        let exit = match error.cause() {
            EngineError::Checkpoint(_) => Exit::Checkpoint,
            EngineError::Mesh(_) => Exit::DoesNotFit,
            EngineError::Backend(BackendError::OutOfMemory { .. } | BackendError::NoRoom { .. }) => Exit::OutOfMemory,
            EngineError::Backend(_) => Exit::DeviceUnhealthy,
            EngineError::Connect(_)
            | EngineError::Collective(_)
            | EngineError::Control { .. }
            | EngineError::Aborted(_) => Exit::Communication,
            EngineError::Desync(_) => Exit::Rendezvous,
            EngineError::Warmup(RowError::NotFinite) => Exit::Numerical,
            EngineError::Warmup(_) | EngineError::Thread(_) | EngineError::Running(_) => Exit::Internal,
        };
        Self::new(exit, error)
    }
}

impl From<JobError> for Failure {
    fn from(error: JobError) -> Self {
        let exit = match &error {
            JobError::Input { .. } | JobError::Changed { .. } => Exit::Usage,
            JobError::KvTooSmall { .. } => Exit::DoesNotFit,
            // Whoever comes too late has nothing to try again.
            JobError::Fenced { .. } => Exit::Preflight,
            JobError::Output { .. } => Exit::OutputStorage,
            JobError::TooManyFailed { .. } => Exit::TooManyFailedRows,
            JobError::Engine(_) => Exit::Internal,
            JobError::Stopped | JobError::Deadline { .. } => Exit::Resumable,
        };
        let hint = match &error {
            JobError::Changed { .. } => Some(
                "`nemotron resume RUN --allow-changed` generates the rows anew that are now others, and keeps the rest",
            ),
            JobError::KvTooSmall { .. } => Some("make rows shorter, or the KV cache larger: --set limits.kv_tokens=…"),
            _ => None,
        };
        hint.map(String::from).into_iter().fold(Self::new(exit, error), Self::hint)
    }
}

/// Writes a line of data to stdout; `false` when nobody reads any more, which is no failure.
pub fn print_line(line: impl fmt::Display) -> Outcome<bool> {
    print(format_args!("{line}\n"))
}

/// Writes data to stdout at once; `false` when nobody reads any more.
pub fn print(text: impl fmt::Display) -> Outcome<bool> {
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}").and_then(|()| stdout.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => {
            Err(Failure::new(Exit::OutputStorage, anyhow::Error::new(error).context("cannot write to stdout")))
        }
    }
}

/// Writes a value as one line of JSON to stdout; `false` when nobody reads any more.
pub fn print_json(value: &impl serde::Serialize) -> Outcome<bool> {
    print_line(serde_json::to_string(value).map_err(anyhow::Error::new)?)
}

pub type Outcome<T = ()> = Result<T, Failure>;
