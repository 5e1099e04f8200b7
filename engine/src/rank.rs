//! One rank, from its specification to a running part of the engine.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::backend::{BackendError, ComputeType};
use crate::checkpoint::CheckpointError;
use crate::collective::CollectiveError;
use crate::config::{Mesh, MeshError};
use crate::engine::Engine;
use crate::report::Reporter;

/// Where the weights are.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ModelSource {
    /// The small model inside the binary.
    Builtin,
    /// A checkpoint directory.
    Path(PathBuf),
}

/// What computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Device {
    Cpu,
    Cuda,
}

/// Everything that decides what a rank does. Equal on all ranks but for `rank`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RankSpec {
    pub rank: usize,
    pub mesh: Mesh,
    pub model: ModelSource,
    pub device: Device,
    pub dtype: ComputeType,
    /// Threads that compute on this rank (CPU).
    pub threads: usize,
    pub limits: Limits,
}

/// Sizes that are fixed before anything is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Tokens of one page of the KV cache.
    pub page_tokens: usize,
    /// Pages of the KV cache.
    pub num_pages: usize,
    /// Tokens in one step at most.
    pub max_step_tokens: usize,
    /// Sequences that run at the same time at most.
    pub max_sequences: usize,
}

/// How this rank finds the others, as the launcher's rendezvous found out.
pub struct Peers {
    /// Bound to this rank's own entry of `addresses`.
    pub listener: TcpListener,
    /// One per rank.
    pub addresses: Vec<SocketAddr>,
    /// Shared by the ranks of this run; authenticates every connection.
    pub secret: Vec<u8>,
    /// When connecting must be over.
    pub deadline: Instant,
}

/// A started rank.
pub enum Rank {
    /// Rank 0: schedules, and answers requests.
    Leader(Engine),
    /// Any other: executes what rank 0 plans.
    Follower(Follower),
}

/// A rank that executes plans until rank 0 ends the run.
pub struct Follower {}

impl Follower {
    /// Blocks until the run ends.
    ///
    /// # Errors
    /// A connection broke or the device failed.
    pub fn run(self) -> Result<(), EngineError> {
        unimplemented!()
    }
}

/// Connects to the peers, loads this rank's part of the checkpoint, and decodes a warm-up token across all ranks.
///
/// `peers` is `None` exactly when the mesh has one rank.
///
/// # Errors
/// The model does not suit the mesh, the checkpoint is bad, memory is short, or a peer is lost.
pub fn start(_spec: RankSpec, _peers: Option<Peers>, _reporter: Arc<dyn Reporter>) -> Result<Rank, EngineError> {
    unimplemented!()
}

/// Why a rank could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the checkpoint cannot be used")]
    Checkpoint(#[from] CheckpointError),
    #[error("the model cannot be split this way")]
    Mesh(#[from] MeshError),
    #[error("the device failed")]
    Backend(#[from] BackendError),
    #[error("communication between ranks failed")]
    Collective(#[from] CollectiveError),
    #[error("ranks disagree: {0}")]
    Desync(String),
    #[error("logits are not finite")]
    NotFinite,
}
