//! What is known about a run: written to `status.json` while it runs and to `report.json` when it ends.

use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;

use jiff::Timestamp;
use nemotron_engine::engine::EngineStats;
use nemotron_engine::job::JobProgress;
use nemotron_engine::report::{Load, Phase};
use serde::{Deserialize, Serialize};

use crate::events::now;
use crate::observe::Observer;
use crate::process::ProcessId;
use crate::replicas;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, read_json};
use crate::spec::{RunSpec, Task};

/// Where a run is on its way.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub(crate) enum RunPhase {
    Pending,
    Preflight,
    Rendezvous,
    CommInit,
    Loading,
    Warmup,
    Ready,
    Busy,
    Draining,
    Done,
    Failed,
    Cancelled,
}

impl RunPhase {
    pub(crate) fn is_end(self) -> bool {
        matches!(self, Self::Done | Self::Failed | Self::Cancelled)
    }

    /// Start-up is over and the end has not come.
    pub(crate) fn is_up(self) -> bool {
        matches!(self, Self::Ready | Self::Busy)
    }
}

impl From<Phase> for RunPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Preflight => Self::Preflight,
            Phase::Rendezvous => Self::Rendezvous,
            Phase::CommInit => Self::CommInit,
            Phase::Loading => Self::Loading,
            Phase::Warmup => Self::Warmup,
            Phase::Ready => Self::Ready,
            Phase::Draining => Self::Draining,
            Phase::Done => Self::Done,
        }
    }
}

impl fmt::Display for RunPhase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Pending => "PENDING",
            Self::Preflight => "PREFLIGHT",
            Self::Rendezvous => "RENDEZVOUS",
            Self::CommInit => "COMM_INIT",
            Self::Loading => "LOADING",
            Self::Warmup => "WARMUP",
            Self::Ready => "READY",
            Self::Busy => "BUSY",
            Self::Draining => "DRAINING",
            Self::Done => "DONE",
            Self::Failed => "FAILED",
            Self::Cancelled => "CANCELLED",
        })
    }
}

/// A snapshot of a run, as its supervisor sees it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) schema: u32,
    pub(crate) run: String,
    pub(crate) attempt: u32,
    pub(crate) profile: String,
    pub(crate) cluster: String,
    /// `serve` or `job`.
    pub(crate) task: String,
    pub(crate) phase: RunPhase,
    /// Since when the run is in this phase.
    pub(crate) since: Timestamp,
    /// When this phase must be over.
    pub(crate) deadline: Option<Timestamp>,
    /// When this attempt began.
    pub(crate) started: Timestamp,
    pub(crate) updated: Timestamp,
    pub(crate) url: Option<String>,
    pub(crate) supervisor: Option<ProcessId>,
    pub(crate) ranks: Vec<RankStatus>,
    pub(crate) stats: EngineStats,
    /// Generated tokens per second, lately; over the whole job once it has ended.
    pub(crate) tokens_per_second: f64,
    pub(crate) job: Option<JobProgress>,
    /// Seconds until the job is done, if it goes on like this.
    pub(crate) eta_s: Option<f64>,
    /// When the scheduler takes the nodes back.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) until: Option<Timestamp>,
    /// Of a run that holds some.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) replicas: Vec<Self>,
    /// What is not as it should be, now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) warnings: Vec<String>,
    /// What the scheduler adds; never in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) note: Option<String>,
    pub(crate) end: Option<End>,
}

/// One line of the table of ranks.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct RankStatus {
    pub(crate) rank: usize,
    pub(crate) device: String,
    pub(crate) process: Option<ProcessId>,
    /// `None` until it has connected.
    pub(crate) phase: Option<Phase>,
    /// Share of the phase that is done, 0..=1.
    pub(crate) progress: f64,
    /// Its weights.
    #[serde(default)]
    pub(crate) load: Load,
    pub(crate) steps: u64,
    /// For how long it has computed in them, without waiting for other ranks as far as that is seen.
    #[serde(default)]
    pub(crate) busy_s: f64,
    /// How its process ended.
    pub(crate) ended: Option<String>,
}

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct End {
    /// `None` is success.
    pub(crate) exit: Option<Exit>,
    pub(crate) exit_code: u8,
    pub(crate) cause: Option<String>,
    /// What to do about it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) hints: Vec<String>,
    pub(crate) rank: Option<usize>,
    /// Where it went wrong, as the scheduler names them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) nodes: Vec<String>,
    /// The engine itself broke, perhaps over a row.
    #[serde(default)]
    pub(crate) crashed: bool,
}

impl End {
    /// Of something that could not say how it ended.
    pub(crate) fn lost(cause: &str) -> Self {
        Self::because(Exit::RankLost, cause)
    }

    pub(crate) fn because(exit: Exit, cause: &str) -> Self {
        let cause = Some(cause.to_owned());
        Self {
            exit: Some(exit),
            exit_code: exit as u8,
            cause,
            hints: Vec::new(),
            rank: None,
            nodes: Vec::new(),
            crashed: false,
        }
    }
}

/// Where a serving run answers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Endpoint {
    pub(crate) schema: u32,
    pub(crate) url: String,
    /// `None` when the run asks for no token.
    pub(crate) token_file: Option<PathBuf>,
    /// The process that answers.
    pub(crate) pid: i32,
    pub(crate) host: String,
    pub(crate) attempt: u32,
}

/// How long a phase took.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct PhaseSpan {
    pub(crate) phase: RunPhase,
    pub(crate) seconds: f64,
}

impl Status {
    /// A run that nobody has started yet.
    pub(crate) fn pending(spec: &RunSpec, attempt: u32) -> Self {
        let now = now();
        let task = match spec.task {
            Task::Serve { .. } => "serve",
            Task::Job { .. } => "job",
        };
        Self {
            schema: 1,
            run: spec.name.clone(),
            attempt,
            profile: spec.profile.clone(),
            cluster: spec.cluster.clone(),
            task: task.into(),
            phase: RunPhase::Pending,
            since: now,
            deadline: None,
            started: now,
            updated: now,
            url: None,
            supervisor: None,
            ranks: Vec::new(),
            stats: EngineStats::default(),
            tokens_per_second: 0.0,
            job: None,
            eta_s: None,
            until: None,
            replicas: Vec::new(),
            warnings: Vec::new(),
            note: None,
            end: None,
        }
    }

    /// The state of a run: the last snapshot, or what follows from its supervisor being dead.
    pub(crate) fn of(run_dir: &RunDir) -> Outcome<Self> {
        let Some(mut status) = read_json::<Self>(&run_dir.status_file())? else {
            let spec = run_dir.spec()?;
            let parts = replicas::of(run_dir, &spec);
            if !parts.is_empty() {
                return Ok(replicas::whole(&spec, parts.iter().map(Self::of).collect::<Outcome<_>>()?));
            }
            return Ok(Self::pending(&spec, run_dir.last_attempt()));
        };
        let supervisor_gone = status.supervisor.as_ref().and_then(ProcessId::is_running) == Some(false);
        if supervisor_gone && !status.phase.is_end() {
            // It may have ended properly between the two looks.
            status = read_json(&run_dir.status_file())?.unwrap_or(status);
            if !status.phase.is_end() {
                status.abandon();
            }
        }
        Ok(status)
    }

    /// The supervisor was killed before it could write how the run ended.
    fn abandon(&mut self) {
        self.phase = RunPhase::Failed;
        self.url = None;
        self.deadline = None;
        self.eta_s = None;
        self.end = Some(End::lost("the supervisor is gone"));
    }

    /// The run's failure, if it has ended with one.
    pub(crate) fn outcome(&self) -> Outcome {
        let Some((exit, end)) = self.end.as_ref().and_then(|end| Some((end.exit?, end))) else { return Ok(()) };
        let cause = end.cause.as_deref().unwrap_or("for an unknown cause");
        let failure = Failure::msg(exit, format!("run {} is {}: {cause}", self.run, self.phase));
        let failure = end.hints.iter().cloned().fold(failure, Failure::hint);
        Err(failure.hint(format!("nemotron logs {}", self.run)))
    }

    /// How far the weights are, in words: bytes and rate of all ranks together, time left, and the rank that is behind.
    pub(crate) fn loading(&self) -> Option<String> {
        let sum = |of: fn(&Load) -> u64| self.ranks.iter().map(|rank| of(&rank.load)).sum::<u64>() as f64;
        let (read, total) = (sum(|load| load.bytes_read), sum(|load| load.bytes_total));
        let seconds = self.ranks.iter().map(|rank| rank.load.read_seconds).fold(0.0, f64::max);
        if total == 0.0 || seconds == 0.0 {
            return None;
        }
        let mut text = format!("{:.1}/{:.1} GB, {:.2} GB/s", read / 1e9, total / 1e9, read / 1e9 / seconds);
        let loading = self.ranks.iter().filter(|rank| rank.phase == Some(Phase::Loading));
        let slowest = loading.min_by(|a, b| a.progress.total_cmp(&b.progress))?;
        if slowest.progress > 0.0 {
            let left = slowest.load.seconds * (1.0 - slowest.progress) / slowest.progress;
            text += &format!(", {left:.0} s left");
        }
        if self.ranks.len() > 1 {
            text += &format!(", rank {} is slowest at {:.0} %", slowest.rank, slowest.progress * 100.0);
        }
        Some(text)
    }

    /// Mean progress of the ranks that are in the run's phase; ranks ahead of it have finished it.
    pub(crate) fn progress(&self) -> f64 {
        let share = |rank: &RankStatus| match rank.phase {
            Some(phase) if RunPhase::from(phase) > self.phase => 1.0,
            Some(phase) if RunPhase::from(phase) == self.phase => rank.progress,
            _ => 0.0,
        };
        self.ranks.iter().map(share).sum::<f64>() / self.ranks.len().max(1) as f64
    }
}

impl Endpoint {
    /// The endpoint of a run that is alive.
    pub(crate) fn of(run_dir: &RunDir) -> Outcome<Option<Self>> {
        if Observer::new(run_dir)?.look()?.phase.is_end() {
            return Ok(None);
        }
        Ok(read_json(&run_dir.endpoint_file())?)
    }
}

/// The URL of a server bound to `address`, as this machine reaches it.
pub(crate) fn url_of(address: SocketAddr) -> String {
    let host = match address {
        SocketAddr::V4(v4) if v4.ip().is_unspecified() => "127.0.0.1".into(),
        SocketAddr::V4(v4) => v4.ip().to_string(),
        SocketAddr::V6(v6) if v6.ip().is_unspecified() => "[::1]".into(),
        SocketAddr::V6(v6) => format!("[{}]", v6.ip()),
    };
    format!("http://{host}:{}", address.port())
}
