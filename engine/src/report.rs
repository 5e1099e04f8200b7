//! How a rank tells whoever started it where it is. The launcher implements [`Reporter`]; the engine knows no terminal and no file.

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

/// Receives a rank's progress. Calls are cheap and never block on the network.
pub trait Reporter: Send + Sync {
    /// The rank entered a phase.
    fn phase(&self, phase: Phase);
    /// Share of the current phase that is done, 0..=1.
    fn progress(&self, done: f64);
    /// Steps that the thread which waits on the device has completed since start.
    fn steps(&self, steps: u64);
}
