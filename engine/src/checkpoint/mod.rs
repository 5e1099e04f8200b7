//! Checkpoints: where the bytes of each logical tensor are, without copying them.
//!
//! A [`CheckpointSource`] names the tensors of the model the way the model thinks of them; a format (Hugging Face safetensors, NeMo's
//! zarr folder) only has to say where their rows lie. Slicing for tensor parallelism is arithmetic on that answer.
//!
//! [`open`] checks everything that can be checked without reading weights, so that a bad checkpoint is refused in milliseconds. What it
//! reads may come from anywhere: nothing in a file makes it panic, or allocate more than that file's size.

mod builtin;
mod detect;
mod fields;
mod folder;
mod hf;
mod hf_config;
mod identity;
mod nemo;
mod nemo_config;
mod safetensors_file;
mod zarr;

use std::io;
use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;

use crate::config::{ConfigError, ModelConfig};
use crate::tokenizer::{Tokenizer, TokenizerError};

pub use builtin::BUILTIN_NAME;
pub use detect::open;
pub use identity::identity;

/// Element type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Bf16,
    F16,
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }
}

/// Bytes that stay in place and unchanged as long as a handle lives: a mapped file, or a part of the binary.
#[derive(Clone)]
pub struct Storage(Arc<dyn AsRef<[u8]> + Send + Sync>);

impl Storage {
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self(Arc::new(bytes))
    }

    pub fn bytes(&self) -> &[u8] {
        (*self.0).as_ref()
    }
}

/// `rows` × `cols` elements in row-major order, `stride` elements from row to row, from byte `offset` of `storage` on.
#[derive(Clone)]
pub struct Block {
    pub storage: Storage,
    pub dtype: Dtype,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl Block {
    /// The bytes of one row, which need not be aligned to its elements.
    pub fn row(&self, row: usize) -> &[u8] {
        let start = self.offset + row * self.stride * self.dtype.size();
        &self.storage.bytes()[start..start + self.cols * self.dtype.size()]
    }
}

/// A matrix [rows, cols] (a vector has one row) as blocks of whole rows, stacked.
#[derive(Clone)]
pub struct Tensor {
    pub blocks: Vec<Block>,
}

impl Tensor {
    pub fn rows(&self) -> usize {
        self.blocks.iter().map(|block| block.rows).sum()
    }

    pub fn cols(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.cols)
    }

    /// The rows in `range`, without copying.
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        let mut blocks = Vec::new();
        let mut first = 0;
        for block in &self.blocks {
            let start = range.start.clamp(first, first + block.rows);
            let end = range.end.clamp(first, first + block.rows);
            if start < end {
                let offset = block.offset + (start - first) * block.stride * block.dtype.size();
                blocks.push(Block { offset, rows: end - start, ..block.clone() });
            }
            first += block.rows;
        }
        Self { blocks }
    }

    /// The columns in `range`, without copying.
    pub fn slice_cols(&self, range: Range<usize>) -> Self {
        let blocks = self
            .blocks
            .iter()
            .map(|block| Block {
                offset: block.offset + range.start * block.dtype.size(),
                cols: range.len(),
                ..block.clone()
            })
            .collect();
        Self { blocks }
    }

    /// The rows of `parts` one after another.
    pub fn stack(parts: impl IntoIterator<Item = Self>) -> Self {
        Self { blocks: parts.into_iter().flat_map(|part| part.blocks).collect() }
    }
}

/// The tensors of a Nemotron model. Shapes are those of the whole model, before any split.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TensorName {
    /// [vocab, hidden]
    Embedding,
    /// γ of the LayerNorm before attention, [1, hidden]; the model uses 1 + γ
    AttentionNormGamma(usize),
    /// β of the LayerNorm before attention, [1, hidden]
    AttentionNormBeta(usize),
    /// [heads · head_dim, hidden], heads in order
    Query(usize),
    /// [kv_heads · head_dim, hidden]
    Key(usize),
    /// [kv_heads · head_dim, hidden]
    Value(usize),
    /// [hidden, heads · head_dim]
    Output(usize),
    /// γ of the LayerNorm before the MLP, [1, hidden]
    MlpNormGamma(usize),
    /// β of the LayerNorm before the MLP, [1, hidden]
    MlpNormBeta(usize),
    /// [ffn, hidden]
    Up(usize),
    /// [hidden, ffn]
    Down(usize),
    /// [1, hidden]
    FinalNormGamma,
    /// [1, hidden]
    FinalNormBeta,
    /// [vocab, hidden]
    Head,
}

impl TensorName {
    /// Every tensor of a model.
    pub fn all(config: &ModelConfig) -> impl Iterator<Item = Self> {
        let of_layer = |layer| {
            [
                Self::AttentionNormGamma(layer),
                Self::AttentionNormBeta(layer),
                Self::Query(layer),
                Self::Key(layer),
                Self::Value(layer),
                Self::Output(layer),
                Self::MlpNormGamma(layer),
                Self::MlpNormBeta(layer),
                Self::Up(layer),
                Self::Down(layer),
            ]
        };
        std::iter::once(Self::Embedding).chain((0..config.num_layers).flat_map(of_layer)).chain([
            Self::FinalNormGamma,
            Self::FinalNormBeta,
            Self::Head,
        ])
    }

    /// Rows and columns of the whole tensor.
    pub fn shape(self, config: &ModelConfig) -> [usize; 2] {
        let hidden = config.hidden_size;
        match self {
            Self::Embedding | Self::Head => [config.vocab_size, hidden],
            Self::Query(_) => [config.num_heads * config.head_dim, hidden],
            Self::Key(_) | Self::Value(_) => [config.num_kv_heads * config.head_dim, hidden],
            Self::Output(_) => [hidden, config.num_heads * config.head_dim],
            Self::Up(_) => [config.ffn_size, hidden],
            Self::Down(_) => [hidden, config.ffn_size],
            Self::AttentionNormGamma(_)
            | Self::AttentionNormBeta(_)
            | Self::MlpNormGamma(_)
            | Self::MlpNormBeta(_)
            | Self::FinalNormGamma
            | Self::FinalNormBeta => [1, hidden],
        }
    }
}

/// An opened checkpoint whose tensors were all found with the shapes that its configuration demands.
pub trait CheckpointSource: Send + Sync {
    /// Name of the format, for people.
    fn format(&self) -> &'static str;
    fn config(&self) -> &ModelConfig;
    fn tokenizer(&self) -> Result<Tokenizer, CheckpointError>;
    /// Where a tensor lies.
    fn tensor(&self, name: TensorName) -> Result<Tensor, CheckpointError>;
    /// Names as the files have them, with shapes and element types, for `inspect`.
    fn stored_tensors(&self) -> Vec<StoredTensor>;
    /// Files that belong to the checkpoint, with their sizes in bytes.
    fn files(&self) -> Vec<(String, u64)>;
}

/// A tensor as a file has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StoredTensor {
    pub name: String,
    pub dtype: Dtype,
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
    #[error("missing tensor {tensor} in {}", path.display())]
    MissingTensor { tensor: String, path: PathBuf },
    #[error("tensor {tensor} has shape {found:?}, the configuration demands {expected:?} (in {})", file.display())]
    Shape { tensor: String, file: PathBuf, found: Vec<usize>, expected: Vec<usize> },
    #[error("tensor {tensor} has element type {dtype}, this engine reads bf16, f16 and f32 (in {})", file.display())]
    Dtype { tensor: String, file: PathBuf, dtype: String },
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
