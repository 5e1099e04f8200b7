//! What decides how a rank is started: the same on every rank but for its number and its connections.

use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::backend::ComputeType;
use crate::checkpoint::BUILTIN_NAME;
use crate::config::Mesh;

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

/// Everything that decides what a rank does. Equal on all ranks but for `rank` and the host's own `device_ordinal` and `library_folders`.
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
    /// Which of the devices that the process sees is this rank's (CUDA).
    pub device_ordinal: usize,
    /// Where a device's libraries are looked for before the loader's own places.
    pub library_folders: Vec<PathBuf>,
}

/// Rows of logits that are computed at a time.
pub const LOGIT_ROWS: usize = 64;

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

impl ModelSource {
    /// Name for people: the directory's, or that of the built-in model.
    pub fn name(&self) -> String {
        match self {
            Self::Builtin => BUILTIN_NAME.into(),
            Self::Path(path) => {
                path.file_name().map_or_else(|| path.display().to_string(), |n| n.display().to_string())
            }
        }
    }
}
