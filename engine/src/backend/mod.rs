//! What a device must be able to do. The model (`model.rs`) is written once over [`Backend`]; CPU and CUDA implement it.
//!
//! Activations are f32 in row-major [rows, width] buffers, one row a token; the residual stream is never rounded. With
//! [`ComputeType::Bf16`] weights and what they are multiplied with are rounded to bf16, keys and values to 16 bits, queries are not, and
//! products are accumulated in f32; with [`ComputeType::F32`] nothing is rounded.
//!
//! Every operation computes a row from that row alone, in an order of additions that depends neither on the other rows nor on how
//! weights are split over ranks. That is what makes a sequence's tokens independent of its batch and of the mesh.

pub mod cpu;
pub mod cuda;

use crate::checkpoint::Tensor;
use crate::config::ModelConfig;
use crate::request::Choice;
use crate::step::CHOSEN;

/// Precision of matrix products and of the KV cache.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ComputeType {
    Bf16,
    F32,
}

impl ComputeType {
    /// Bytes of one element of the KV cache.
    pub fn kv_bytes(self) -> usize {
        match self {
            Self::Bf16 => 2,
            Self::F32 => 4,
        }
    }
}

/// The heads that one rank holds, and how they are rotated.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct HeadShape {
    /// Query heads; head i uses KV head i / (heads / kv_heads).
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// RoPE turns the first `rotary_dim` elements of a head, in pairs (i, i + rotary_dim/2); even, ≤ head_dim.
    pub rotary_dim: usize,
    /// Base of the angles: θ^(-2i/rotary_dim).
    pub rope_theta: f64,
}

impl HeadShape {
    /// The heads of one of `tp` ranks.
    pub fn of_rank(config: &ModelConfig, tp: usize) -> Self {
        Self {
            heads: config.num_heads / tp,
            kv_heads: config.num_kv_heads / tp,
            head_dim: config.head_dim,
            rotary_dim: config.rotary_dim(),
            rope_theta: config.rope_theta,
        }
    }

    /// Elements of one token's q, k and v together; q comes first, then k, then v.
    pub fn qkv_width(&self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.head_dim
    }
}

/// Consecutive tokens of one sequence in a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Span {
    /// Index of the span's first token in the step.
    pub first_row: u32,
    pub num_tokens: u32,
    /// Position of that token in its sequence; all earlier positions are in the KV cache.
    pub first_position: u32,
    /// Where the sequence's page table begins in [`StepBatch::page_table`]; entry i holds positions
    /// i · page_tokens .. (i + 1) · page_tokens.
    pub first_page: u32,
    pub num_pages: u32,
}

/// The tokens of one step, flattened over its sequences. Reused from step to step.
#[derive(Clone, Debug, Default)]
pub struct StepBatch {
    /// [num_tokens]
    pub tokens: Vec<u32>,
    /// [num_tokens]
    pub positions: Vec<u32>,
    pub spans: Vec<Span>,
    pub page_table: Vec<u32>,
    /// The first so many tokens were generated, the others are of prompts. A device may have a way of its own for each: which of them it is
    /// is a property of the row.
    pub num_generated: usize,
}

impl StepBatch {
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Whether the device has the ids of this step's tokens from the step before.
    pub fn is_ahead(&self) -> bool {
        self.tokens.first().is_some_and(|token| token & CHOSEN != 0)
    }

    /// Adds consecutive tokens of one sequence, whose pages are `pages`; returns the row of the first.
    pub fn push(&mut self, first_position: u32, tokens: &[u32], pages: &[u32]) -> u32 {
        let (first_row, num_tokens) = (self.tokens.len() as u32, tokens.len() as u32);
        let (first_page, num_pages) = (self.page_table.len() as u32, pages.len() as u32);
        self.spans.push(Span { first_row, num_tokens, first_position, first_page, num_pages });
        self.page_table.extend_from_slice(pages);
        self.tokens.extend_from_slice(tokens);
        self.positions.extend(first_position..first_position + num_tokens);
        first_row
    }

    pub fn clear(&mut self) {
        self.num_generated = 0;
        self.tokens.clear();
        self.positions.clear();
        self.spans.clear();
        self.page_table.clear();
    }
}

/// How a step begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begun {
    /// The operations are to be called with so many rows: those of the batch, and perhaps some that only fill up.
    Rows(usize),
    /// The device has all of them from an earlier step of this shape: they are left out.
    Done,
}

fn gib(bytes: u64) -> f64 {
    bytes as f64 / (1_u64 << 30) as f64
}

/// A device failed or refused.
#[derive(Debug, thiserror::Error)]
pub enum BackendError {
    #[error("out of {device} memory: {what} needs {bytes} bytes")]
    OutOfMemory { device: &'static str, what: &'static str, bytes: usize },
    #[error("the model and its KV cache need {:.2} GiB of {device} memory, of which {:.2} GiB are free", gib(*bytes), gib(*free))]
    NoRoom { device: &'static str, bytes: u64, free: u64 },
    #[error("{device} is not usable: {reason}")]
    Unavailable { device: &'static str, reason: String },
    #[error("{device} failed: {reason}")]
    Failed { device: &'static str, reason: String },
}

/// A norm behind a sum: out = norm(x), as [`Backend::layer_norm`].
pub struct NormTo<'a, B: Backend + ?Sized> {
    pub norm: &'a B::Norm,
    pub eps: f32,
    pub out: &'a mut B::Operand,
}

/// The operations of the forward pass over opaque buffers.
///
/// Buffers are allocated once for the largest step; `rows` says how many rows of a call are in use. Shapes are the caller's duty
/// (`model.rs` proves them when it is built); a violated one is a bug and panics.
pub trait Backend: Send {
    /// Whether `choose` does anything.
    const CHOOSES: bool;
    /// A weight matrix [rows, cols] in the device's memory; y = x · Wᵀ.
    type Matrix: Send;
    /// 1 + γ and β, both [hidden].
    type Norm: Send;
    /// f32 activations [capacity, width].
    type Buffer: Send;
    /// Activations [capacity, width] that are only multiplied with weights: in the precision of products where that saves memory.
    type Operand: Send;
    /// Keys (rotated) and values of one layer, [pages, page_tokens, kv_heads, head_dim] each.
    type KvCache: Send;

    fn matrix(&self, tensor: &Tensor) -> Result<Self::Matrix, BackendError>;
    fn norm(&self, gamma: &Tensor, beta: &Tensor) -> Result<Self::Norm, BackendError>;
    fn buffer(&self, capacity: usize, width: usize) -> Result<Self::Buffer, BackendError>;
    fn operand(&self, capacity: usize, width: usize) -> Result<Self::Operand, BackendError>;
    fn kv_cache(&self, num_pages: usize, page_tokens: usize, shape: &HeadShape) -> Result<Self::KvCache, BackendError>;

    /// Gives the device the batch that `embed`, `rope_append` and `attention` are called with until `end`, and says with how many rows the
    /// operations are to be called.
    fn begin(&self, batch: &StepBatch) -> Result<Begun, BackendError>;
    /// After the step's last layer.
    fn end(&self) -> Result<(), BackendError>;
    /// Behind all that a step asks for. A device works while the host goes on, to the next step too; `poll` and `chosen` know the step by the number
    /// that this returns, until the step after the next begins.
    fn close(&self) -> usize;
    /// Whether a step, or everything that was asked for, is done; waits for it a moment. Operations do not wait: the first that failed shows here.
    fn poll(&self, step: Option<usize>) -> Result<bool, BackendError>;

    /// out[t] = table[tokens[t] − first_id], or zeros where the table does not hold that id. A token with [`CHOSEN`] is what `choose` chose for the
    /// slot in the step before.
    fn embed(&self, table: &Self::Matrix, first_id: u32, tokens: &[u32], out: &mut Self::Buffer);
    /// out = (x − mean) / sqrt(var + eps) · (1 + γ) + β over each row; biased variance.
    fn layer_norm(&self, rows: usize, x: &Self::Buffer, norm: &Self::Norm, eps: f32, out: &mut Self::Operand);
    /// out = x · Wᵀ.
    fn linear(&self, rows: usize, x: &Self::Operand, w: &Self::Matrix, out: &mut Self::Buffer);
    /// out = relu(x · Wᵀ)².
    fn linear_relu2(&self, rows: usize, x: &Self::Operand, w: &Self::Matrix, out: &mut Self::Operand);
    /// out = x · Wᵀ, the sum over columns taken as `chunks` (a power of two) equal contiguous parts whose sums are added in a binary tree
    /// ((c0 + c1) + (c2 + c3)) + …: the order in which ranks that hold the chunks apart would add them.
    fn linear_chunked(&self, rows: usize, x: &Self::Operand, w: &Self::Matrix, chunks: usize, out: &mut Self::Buffer);
    /// Rotates q and k of `qkv` in place and stores k and v at their positions in the cache.
    fn rope_append(&self, batch: &StepBatch, shape: &HeadShape, qkv: &mut Self::Buffer, kv: &mut Self::KvCache);
    /// Causal attention of every token over its sequence's cache: softmax(q·kᵀ / sqrt(head_dim)) · v → out [tokens, heads · head_dim].
    fn attention(
        &self,
        batch: &StepBatch,
        shape: &HeadShape,
        qkv: &Self::Buffer,
        kv: &Self::KvCache,
        out: &mut Self::Operand,
    );
    /// x += y.
    fn add(&self, rows: usize, x: &mut Self::Buffer, y: &Self::Buffer);
    /// x += y, and what follows of it.
    fn add_norm(&self, rows: usize, x: &mut Self::Buffer, y: &Self::Buffer, norm: Option<NormTo<'_, Self>>) {
        self.add(rows, x, y);
        if let Some(NormTo { norm, eps, out }) = norm {
            self.layer_norm(rows, x, norm, eps, out);
        }
    }
    /// out[i] = x[indices[i]].
    fn gather_rows(&self, x: &Self::Buffer, indices: &[u32], out: &mut Self::Buffer);
    /// Chooses a token from each row of logits, whose first `vocab` columns count. False, and nothing is done, if the device leaves it to
    /// the host.
    fn choose(&self, choices: &[Choice], vocab: usize, logits: &mut Self::Buffer) -> bool;
    /// The token that `choose` chose for a slot, once the step is done; `None` where the logits were no numbers.
    fn chosen(&self, step: usize, slot: u32) -> Option<u32>;
    /// The first `rows` rows, [rows, width], in host memory, where they may be overwritten. What made them must be done.
    fn fetch<'a>(&self, rows: usize, x: &'a mut Self::Buffer) -> Result<&'a mut [f32], BackendError>;
}
