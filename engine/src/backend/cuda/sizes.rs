//! Bytes of what the backend allocates beside weights, caches and the model's buffers: for who allocates it, and for who plans.

use nemotron_kernels::ops::{Attention, AttentionTile, Gemm, SampleRow};

use super::blas::{ROW_TILE, WORKSPACE_BYTES};
use crate::backend::HeadShape;
use crate::spec::{LOGIT_ROWS, Limits};

/// Parts of a sum, for which room for partial sums is made.
const MAX_CHUNKS: usize = 8;
/// Of partial sums at most, if a tile of rows does not need more.
const PARTIALS_BYTES: usize = 128 << 20;
pub(super) const WORD: usize = size_of::<u32>();
/// Words of an [`AttentionTile`].
pub(super) const TILE_WORDS: usize = size_of::<AttentionTile>() / WORD;
/// Ids that all rows of a step may name together, for each of [`LOGIT_ROWS`].
const IDS_PER_ROW: usize = 16 << 10;

/// Rows that a buffer has room for, so that a product may fill up its last tile.
pub(super) fn room(capacity: usize) -> usize {
    capacity.next_multiple_of(ROW_TILE) + ROW_TILE
}

/// Rows that decode together at most.
pub(super) fn max_generated_rows(limits: &Limits) -> usize {
    limits.max_sequences.min(limits.max_step_tokens)
}

/// Rows that each array of a step has room for, and words of all its arrays.
pub(super) fn step(limits: &Limits, max_context: usize) -> (usize, usize) {
    let rows = limits.max_step_tokens.next_multiple_of(TILE_WORDS);
    // A sequence has two spans where its prompt ends.
    let pages = 2 * limits.max_sequences * max_context.div_ceil(limits.page_tokens);
    (rows, rows * (4 + TILE_WORDS) + pages)
}

/// Ids that a step may name for sampling, and bytes of all that sampling reads and writes.
pub(super) fn sampling(limits: &Limits) -> (usize, usize) {
    let ids = LOGIT_ROWS * IDS_PER_ROW;
    (ids, limits.max_sequences * (size_of::<SampleRow>() + WORD) + 2 * ids * WORD)
}

/// Rows times splits that one launch of attention may have.
pub(super) fn row_splits(limits: &Limits, max_context: usize) -> usize {
    Attention::splits(max_context as u32) as usize * max_generated_rows(limits).max(64)
}

/// What attention needs: rotated queries, sums of splits, and their maxima and weights.
pub(super) fn attention(limits: &Limits, max_context: usize, shape: &HeadShape) -> [usize; 3] {
    let rows = row_splits(limits, max_context);
    let (sums, stats) = Attention::workspace_bytes(rows as u32, shape.heads as u32, shape.head_dim as u32, 1);
    [room(limits.max_step_tokens) * shape.heads * shape.head_dim * 2, sums, stats]
}

/// Partial sums of a product with a [rows, cols] matrix, for as many rows as decode at once; more rows go through in blocks.
pub(super) fn partials(limits: &Limits, rows: usize, cols: usize) -> usize {
    let parts = (Gemm::parts(rows as u32, cols as u32, 1) as usize).max(MAX_CHUNKS);
    (4 * rows * parts * max_generated_rows(limits)).min(PARTIALS_BYTES).max(4 * rows * ROW_TILE)
}

/// The sum of all of these for a rank that multiplies with such matrices, [rows, cols].
pub(crate) fn workspace(
    limits: &Limits,
    max_context: usize,
    shape: &HeadShape,
    matrices: impl Iterator<Item = (usize, usize)>,
) -> usize {
    let partials = matrices.map(|(rows, cols)| partials(limits, rows, cols)).max().unwrap_or(0);
    let rotations = max_context * shape.rotary_dim * 4;
    let [q, sums, stats] = attention(limits, max_context, shape);
    WORKSPACE_BYTES + step(limits, max_context).1 * WORD + sampling(limits).1 + partials + rotations + q + sums + stats
}

/// Bytes of buffers of `capacity` rows: f32 ones, and operands, by the sums of their widths.
pub(crate) fn buffers(capacity: usize, f32_widths: usize, operand_widths: usize) -> usize {
    room(capacity) * (f32_widths * 4 + operand_widths * 2)
}
