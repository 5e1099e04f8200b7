//! How a rank tells whoever started it where it is. The launcher implements [`Reporter`]; the engine knows no terminal and no file.

use std::time::Duration;

/// Start-up phases of a rank, in order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "SCREAMING_SNAKE_CASE")]
pub enum Phase {
    Preflight,
    Rendezvous,
    CommInit,
    Loading,
    Warmup,
    Ready,
    Draining,
    Done,
}

/// How far a rank is with its weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize, serde::Deserialize)]
#[serde(default)]
pub struct Load {
    pub bytes_read: u64,
    pub bytes_total: u64,
    /// Until all was read, or until now. Weights are put in place while others are read, and that may take longer.
    pub read_seconds: f64,
    /// Since it began.
    pub seconds: f64,
}

/// Receives a rank's progress. Calls are cheap and never block on the network.
pub trait Reporter: Send + Sync {
    /// The rank entered a phase.
    fn phase(&self, phase: Phase);
    /// Share of the current phase that is done, 0..=1.
    fn progress(&self, done: f64);
    /// How far the weights are.
    fn load(&self, _load: Load) {}
    /// Steps that the thread which waits on the device has completed since start.
    fn steps(&self, steps: u64);
    /// How long this rank has computed in all of its steps: without waiting for other ranks, as far as that is seen.
    fn busy(&self, _busy: Duration) {}
}
