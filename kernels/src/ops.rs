//! What can be launched: one struct a kernel, with shapes and types of everything it reads and writes, and the grid it needs.
//!
//! Conventions, for all of them:
//! - Matrices are row-major; a row is a token. `x` is the residual stream, f32 [rows, hidden]. Operands of products are bf16, their
//!   sums f32. Pointers to f32 and bf16 data are 16-byte aligned, and widths are multiples of 8.
//! - Keys and values of one layer are bf16 [page][kv_head][2: keys, values][page_tokens][head_dim]; keys are rotated.
//! - `page_table` holds page numbers; a row's pages begin at its entry of `first_pages`, and page i of them holds positions
//!   i · page_tokens .. (i + 1) · page_tokens.
//! - A row whose position is [`NO_ROW`] is padding: nothing is stored for it, and what it computes is never read.
//! - A row's results are a function of that row: they do not depend on the other rows, on tiles, or on the order in which threads run.
//!   There are no floating-point atomics. Sums that are cut into parts are added in a binary tree, ((p0 + p1) + (p2 + p3)) + …
//! - Nothing here synchronises with the host, and every argument may be captured into a graph: what changes from step to step (tokens,
//!   positions, pages, lengths) is read from the device's memory.

use std::ffi::c_void;

use crate::args::{Bf16, CType, Ptr, c_types, layout};
pub use crate::launch::{KERNELS, Launch};

/// Positions of one split of a sequence's keys and values; part of what defines an attention row's bits.
pub const SPLIT_TOKENS: u32 = 256;
/// The position of a row that is only padding.
pub const NO_ROW: u32 = u32::MAX;
/// Ranks that a one-shot all-reduce can have.
pub const MAX_PEERS: u32 = 8;
/// Largest supported head; heads are computed at the next of 64, 128 and 192, filled up with zeros.
pub const MAX_HEAD_DIM: u32 = 192;
/// Query heads that may share a KV head.
pub const MAX_GROUP: u32 = 64;
/// Largest row that LayerNorm holds in registers.
pub const MAX_HIDDEN: u32 = 32768;
/// Parts that a product's sum may be cut into.
pub const MAX_PARTS: u32 = 64;

/// What `cuda/args.h` shares with this file.
pub(crate) const CONSTANTS: &[(&str, u32)] = &[
    ("SPLIT_TOKENS", SPLIT_TOKENS),
    ("NO_ROW", NO_ROW),
    ("GEMM_TILE_N", Gemm::TILE_N),
    ("GEMM_STAGE_COLS", Gemm::STAGE_COLS),
    ("GEMM_STAGES", Gemm::STAGES),
    ("STORE_F32", Store::F32 as u32),
    ("STORE_BF16", Store::Bf16 as u32),
    ("STORE_RELU2_BF16", Store::Relu2Bf16 as u32),
    ("REDUCE_ROWS", AllReduceNorm::MAX_ROWS),
    ("REDUCE_SLICES", AllReduceNorm::SLICES),
    ("REDUCE_FLAGS", AllReduceNorm::FLAGS),
    ("NOT_FINITE", NOT_FINITE),
    ("CHOSEN", CHOSEN),
];

/// What a product stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Store {
    F32 = 0,
    Bf16 = 1,
    /// relu(y)², rounded to bf16.
    Relu2Bf16 = 2,
}

/// Written in place of a token by [`Sample`] when logits are NaN or +∞, or all are −∞.
pub const NOT_FINITE: u32 = u32::MAX;
/// In place of an id, with the number of a slot: the token that [`Sample`] has chosen last for that slot.
pub const CHOSEN: u32 = 1 << 31;

c_types! { AttentionTile = "AttentionTile" SampleRow = "SampleRow" }

layout! {
    /// x[r] = table[tokens[r] − first_id], or zeros where this rank's part of the vocabulary does not hold that id.
    Embed {
        /// [rows]; those with [`CHOSEN`] stand for ids that the host does not know yet.
        tokens: Ptr<u32>,
        /// [slots]: where [`Sample`] puts tokens.
        chosen: Ptr<u32>,
        /// [vocab, hidden]
        table: Ptr<Bf16>,
        /// [rows, hidden]
        x: Ptr<f32>,
        rows: u32,
        hidden: u32,
        first_id: u32,
        /// Ids in `table`.
        vocab: u32,
    }

    /// x += y (if there is a y); out = (x − mean) / sqrt(variance + eps) · scale + shift (if there is a scale).
    AddNorm {
        /// [rows, hidden], updated in place; with `indices`, row r is x[indices[r]].
        x: Ptr<f32>,
        /// [rows, hidden] or null; null if there are `indices`.
        y: Ptr<f32>,
        /// [rows] or null.
        indices: Ptr<u32>,
        /// 1 + γ, [hidden], or null.
        scale: Ptr<f32>,
        /// β, [hidden]
        shift: Ptr<f32>,
        /// [rows, hidden]
        out: Ptr<Bf16>,
        rows: u32,
        hidden: u32,
        eps: f32,
        reserved: u32,
    }

    /// As [`AddNorm`] with the sum of all ranks' y, of at most [`AllReduceNorm::MAX_ROWS`] rows, over ranks that see each other's memory:
    /// x += tree(y of rank 0, y of rank 1, …); out = norm(x). The order of additions is that of gathering every y and adding with
    /// [`GemmReduce`] and [`AddNorm`], so either way gives the same bits. All ranks launch it with the same shape, as often.
    AllReduceNorm {
        /// Entry i is rank i's area, seen from this rank: its flags, u32 [blocks, 8], then numbers that it shows to the others, f32
        /// [2, MAX_ROWS, hidden]. All zero before the first launch.
        areas: [Ptr<u32>; 8],
        /// This rank's entry of `areas`.
        own_flags: Ptr<u32>,
        /// [blocks + MAX_ROWS], of this rank alone: its launches of each block, and blocks that are done with each row; zero before the first.
        counts: Ptr<u32>,
        /// Whatever is not 0, written by the host, ends the waiting for ranks that do not come; the results are then worthless.
        stop: Ptr<u32>,
        /// This rank's summand, [rows, hidden].
        y: Ptr<f32>,
        /// [rows, hidden]
        x: Ptr<f32>,
        /// 1 + γ, [hidden], or null: no norm.
        scale: Ptr<f32>,
        shift: Ptr<f32>,
        /// [rows, hidden]
        out: Ptr<Bf16>,
        hidden: u32,
        rank: u32,
        /// 2, 4 or 8
        ranks: u32,
        eps: f32,
    }

    /// Rotates queries and keys and stores keys and values at their positions.
    RopeAppend {
        /// [rows, (heads + 2 · kv_heads) · head_dim]: q, then k, then v.
        qkv: Ptr<f32>,
        /// [positions, rotary_dim]: rotary_dim / 2 cosines, then as many sines, of position · θ^(−2i / rotary_dim).
        rope: Ptr<f32>,
        /// [rows]
        positions: Ptr<u32>,
        /// [rows]: where each row's pages begin in `page_table`.
        first_pages: Ptr<u32>,
        page_table: Ptr<u32>,
        /// Rotated queries, [rows, heads · head_dim].
        q: Ptr<Bf16>,
        /// The layer's cache.
        kv: Ptr<Bf16>,
        rows: u32,
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        /// Even, ≤ head_dim.
        rotary_dim: u32,
        page_tokens: u32,
    }

    /// Consecutive tokens of one sequence that are attended together; their keys and values are in the cache.
    AttentionTile {
        first_row: u32,
        /// 0: the tile is padding; at most [`Attention::tile_tokens`].
        num_tokens: u32,
        first_position: u32,
        first_page: u32,
    }

    /// softmax(q · kᵀ / sqrt(head_dim)) · v over all positions up to the row's own. A sequence is cut into splits of
    /// [`SPLIT_TOKENS`] positions; rows with more than one need [`AttentionCombine`] afterwards.
    Attention {
        /// [rows, heads · head_dim]
        q: Ptr<Bf16>,
        kv: Ptr<Bf16>,
        page_table: Ptr<u32>,
        /// [num_tiles], or null: tile i is row i alone (decode).
        tiles: Ptr<AttentionTile>,
        /// [rows]
        positions: Ptr<u32>,
        /// [rows]
        first_pages: Ptr<u32>,
        /// [rows, heads · head_dim]
        out: Ptr<Bf16>,
        /// f32 [rows, heads, splits, head_dim], weighted sums of values.
        sums: Ptr<f32>,
        /// f32 [rows, heads, splits, 2]: largest scaled score (base 2), sum of weights.
        stats: Ptr<f32>,
        num_tiles: u32,
        heads: u32,
        kv_heads: u32,
        head_dim: u32,
        page_tokens: u32,
        /// Splits of the longest row of this launch, or more.
        splits: u32,
    }

    /// Joins the splits of rows that have several.
    AttentionCombine {
        sums: Ptr<f32>,
        stats: Ptr<f32>,
        positions: Ptr<u32>,
        /// [rows, heads · head_dim]
        out: Ptr<Bf16>,
        rows: u32,
        heads: u32,
        head_dim: u32,
        /// As given to [`Attention`].
        splits: u32,
    }

    /// y = x · Wᵀ for few rows, the sum over columns cut into `parts`.
    Gemm {
        /// [rows, cols]
        x: Ptr<Bf16>,
        /// [n, cols]
        w: Ptr<Bf16>,
        /// With one part the result as `store` says, [rows, n]; else f32 [parts, rows, n] for [`GemmReduce`].
        out: Ptr<c_void>,
        rows: u32,
        n: u32,
        cols: u32,
        /// A power of two; cols / parts is a multiple of 8.
        parts: u32,
        /// A [`Store`]; used with one part.
        store: u32,
        reserved: u32,
    }

    /// Adds a product's parts in a binary tree and stores the sum. With one part it converts: f32 to bf16, or relu².
    GemmReduce {
        /// [parts, count]
        partials: Ptr<f32>,
        /// [count]
        out: Ptr<c_void>,
        /// Elements, rows · n.
        count: u64,
        parts: u32,
        /// A [`Store`].
        store: u32,
    }

    /// out[r] = x[indices[r]].
    GatherRows {
        x: Ptr<f32>,
        /// [rows]
        indices: Ptr<u32>,
        /// [rows, width]
        out: Ptr<f32>,
        rows: u32,
        width: u32,
    }

    /// How one row's token is chosen. The order of operations and the random number are those of the engine's sampler.
    SampleRow {
        seed: u64,
        sample: u32,
        /// Position of the new token in its row.
        position: u32,
        /// 1: the largest logit, lowest id first; only masks and biases are applied.
        greedy: u32,
        temperature: f32,
        /// 0: all.
        top_k: u32,
        /// 0 or 1: all.
        top_p: f32,
        repetition_penalty: f32,
        frequency_penalty: f32,
        presence_penalty: f32,
        /// Ids masked now (end of sequence before the minimum length): `ids[first_masked ..][.. num_masked]`.
        first_masked: u32,
        num_masked: u32,
        /// Biased ids: `ids[first_biased ..]`, and the biases in `biases` at the same indices.
        first_biased: u32,
        num_biased: u32,
        /// The row's own ids, prompt then new: `ids[first_seen ..]`; none if there is no penalty.
        first_seen: u32,
        num_seen: u32,
        /// How many of those are the prompt's.
        num_prompt: u32,
        /// Which row of the logits.
        logits_row: u32,
        /// Where in `tokens` the token goes.
        slot: u32,
    }

    /// tokens[rows[r].slot] = the token of rows[r], or [`NOT_FINITE`]. Changes the logits.
    Sample {
        /// [·, stride]
        logits: Ptr<f32>,
        rows: Ptr<SampleRow>,
        ids: Ptr<u32>,
        biases: Ptr<f32>,
        /// [slots]
        tokens: Ptr<u32>,
        num_rows: u32,
        /// Ids that may be chosen: 0 .. vocab.
        vocab: u32,
        /// Elements from row to row, at least `vocab`.
        stride: u32,
        reserved: u32,
    }
}

impl CType for Ptr<c_void> {
    fn declare(name: &str) -> String {
        format!("void* {name}")
    }
}

/// A model's sizes on one rank that the kernels cannot compute.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the CUDA kernels do not support {what} {value}: it must be {demand}")]
pub struct Unsupported {
    pub what: &'static str,
    pub value: u32,
    pub demand: &'static str,
}

/// Sizes of a model on one rank.
#[derive(Clone, Copy, Debug)]
pub struct Sizes {
    pub hidden: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    /// Rows of this rank's up projection.
    pub ffn: u32,
    /// Parts that row-parallel sums are cut into on this rank.
    pub chunks: u32,
}

impl Sizes {
    /// Whether all kernels can compute a model of these sizes.
    ///
    /// # Errors
    /// Names the size that they cannot.
    pub fn check(&self) -> Result<(), Unsupported> {
        let Self { hidden, heads, kv_heads, head_dim, ffn, chunks } = *self;
        let demand = |holds: bool, what, value, demand| {
            if holds { Ok(()) } else { Err(Unsupported { what, value, demand }) }
        };
        demand(
            hidden.is_multiple_of(8) && hidden <= MAX_HIDDEN,
            "hidden size",
            hidden,
            "a multiple of 8, at most 32768",
        )?;
        demand(
            head_dim.is_multiple_of(8) && head_dim <= MAX_HEAD_DIM,
            "head size",
            head_dim,
            "a multiple of 8, at most 192",
        )?;
        demand(heads / kv_heads <= MAX_GROUP, "query heads per KV head", heads / kv_heads, "at most 64")?;
        demand(
            chunks.is_power_of_two() && chunks <= MAX_PARTS,
            "chunks of a sum",
            chunks,
            "a power of two, at most 64",
        )?;
        demand(
            (heads * head_dim).is_multiple_of(8 * chunks),
            "attention width",
            heads * head_dim,
            "a multiple of 8 in each chunk",
        )?;
        demand(ffn.is_multiple_of(8 * chunks), "FFN size", ffn, "a multiple of 8 in each chunk")
    }
}
