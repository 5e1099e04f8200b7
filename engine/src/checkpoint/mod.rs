//! Checkpoints: where the bytes of each logical tensor are, and how a rank gets its part of them.
//!
//! A [`CheckpointSource`] names the tensors of the model the way the model thinks of them; a format (Hugging Face safetensors, NeMo's
//! zarr or torch_dist folders, GGUF, our own shards) only has to say in which rectangles of which files a tensor lies: its [`Grid`].
//! What a rank of a mesh holds is arithmetic on that answer: the bytes stay where they are if the part has whole rows, and are put
//! together in memory if its columns are spread over files.
//!
//! [`open`] checks everything that can be checked without reading weights, so that a bad checkpoint is refused in milliseconds. What it
//! reads may come from anywhere: nothing in a file makes it panic, or allocate more than that file's size.

mod archive;
mod array;
mod builtin;
mod convert;
mod detect;
mod fields;
mod folder;
mod fp8;
mod gguf;
mod gguf_file;
mod grid;
mod hf;
mod hf_config;
mod identity;
mod manifest;
mod names;
mod nemo;
mod nemo_config;
mod pickle;
mod random;
mod reading;
mod safetensors_file;
mod sharded;
mod tensor;
mod torch_dist;
mod zarr;

use std::io;
use std::ops::Range;
use std::path::PathBuf;

use crate::config::{ConfigError, Mesh, ModelConfig};
use crate::tokenizer::{Tokenizer, TokenizerError};

pub use builtin::BUILTIN_NAME;
pub use convert::{Conversion, ConvertError, Target, convert};
pub use detect::{open, open_for, open_headers, preflight};
pub use grid::{DataFile, Extent, Grid, StoredDtype, Tile};
pub use identity::identity;
pub use manifest::{BLOCK_BYTES, FileHashes, Manifest, hash};
pub use names::TensorName;
pub use random::RandomWeights;
pub use reading::ReadingPlan;
pub use tensor::{Block, Dtype, Storage, Tensor};

/// An opened checkpoint whose tensors were all found with the shapes that its configuration demands.
pub trait CheckpointSource: Send + Sync {
    /// Name of the format, for people.
    fn format(&self) -> &'static str;
    fn config(&self) -> &ModelConfig;
    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError>;
    /// The chat template, where the weights' own file has one.
    fn chat_template(&self) -> Option<String> {
        None
    }
    /// The files, besides weights and configuration, that a copy in another format needs, by the names that they get there.
    fn companions(&self) -> Result<Vec<(String, Vec<u8>)>, CheckpointError>;
    /// Where a tensor lies.
    fn grid(&self, name: TensorName) -> Result<Grid, CheckpointError>;
    /// Names as the files have them, with shapes and element types, for `inspect`.
    fn stored_tensors(&self) -> Vec<StoredTensor>;
    /// Files that belong to the checkpoint, with their sizes in bytes.
    fn files(&self) -> Vec<(String, u64)>;
    /// The mesh that the files were cut for, if they were.
    fn mesh(&self) -> Option<Mesh> {
        None
    }

    /// A whole tensor.
    fn tensor(&self, name: TensorName) -> Result<Tensor, CheckpointError> {
        let [rows, cols] = name.shape(self.config());
        self.part(name, 0..rows, 0..cols)
    }

    /// Rows and columns of a tensor. Without copying where every file that has some of the rows has all of the columns.
    ///
    /// # Errors
    /// A file cannot be read or has changed, or a norm is not finite.
    fn part(&self, name: TensorName, rows: Range<usize>, cols: Range<usize>) -> Result<Tensor, CheckpointError> {
        let tensor = self.grid(name)?.part(rows, cols)?;
        if name.is_norm() && !tensor.is_finite() {
            return Err(CheckpointError::NotFinite { tensor: name });
        }
        Ok(tensor)
    }

    /// What `rank` has of a tensor.
    ///
    /// # Errors
    /// Those of [`Self::part`].
    fn shard(&self, name: TensorName, mesh: Mesh, rank: usize) -> Result<Tensor, CheckpointError> {
        let [rows, cols] = name.shard(self.config(), mesh, rank);
        self.part(name, rows, cols)
    }
}

/// A tensor as a file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    pub name: String,
    pub dtype: StoredDtype,
    pub shape: Vec<usize>,
}

/// A checkpoint is missing, damaged, or of another architecture.
#[derive(Debug, thiserror::Error)]
pub enum CheckpointError {
    #[error("cannot read {}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("no checkpoint in {}: {expected}", path.display())]
    NotFound { path: PathBuf, expected: &'static str },
    #[error("{} is {format}, which this version does not read; {hint}", path.display())]
    Unsupported { path: PathBuf, format: &'static str, hint: &'static str },
    #[error("cannot use {}", file.display())]
    Config {
        file: PathBuf,
        #[source]
        source: ConfigError,
    },
    #[error("{} is damaged: {problem}", file.display())]
    Damaged { file: PathBuf, problem: String },
    #[error("{} is a link to {}, outside of the checkpoint", file.display(), target.display())]
    Link { file: PathBuf, target: PathBuf },
    #[error("missing tensor {tensor} in {}", path.display())]
    MissingTensor { tensor: String, path: PathBuf },
    #[error("tensor {tensor} has shape {found:?}, the configuration demands {expected:?} (in {})", file.display())]
    Shape { tensor: String, file: PathBuf, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor {tensor} has element type {dtype}, this engine reads bf16, f16, f32 and f8_e4m3 (in {})", file.display())]
    Dtype { tensor: String, file: PathBuf, dtype: String },
    #[error("tensor {tensor} has a value that is NaN or infinite")]
    NotFinite { tensor: TensorName },
    #[error("{} is damaged: bytes {start} to {end} are not those of its manifest", file.display())]
    Corrupt { file: PathBuf, start: u64, end: u64 },
    #[error("{} is cut for tp {} × pp {}, not for tp {} × pp {}", path.display(), found.tp, found.pp, wanted.tp, wanted.pp)]
    Mesh { path: PathBuf, found: Mesh, wanted: Mesh },
    #[error("no tokenizer in {}", path.display())]
    MissingTokenizer { path: PathBuf },
    #[error("cannot use {}", file.display())]
    Tokenizer {
        file: PathBuf,
        #[source]
        source: TokenizerError,
    },
}

impl CheckpointError {
    fn damaged(file: impl Into<PathBuf>, problem: impl Into<String>) -> Self {
        Self::Damaged { file: file.into(), problem: problem.into() }
    }
}
