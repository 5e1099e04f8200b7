//! Causal attention over a paged cache, in blocks of keys with a running maximum.
//!
//! A row is one query head of one token. Blocks begin at fixed positions of the sequence and a row takes its own part of each, so
//! that its result depends neither on the tokens computed beside it nor on the size and order of pages.

use super::gemm::{Output, dots};
use super::matrix::Aligned;
use super::product::{Element, Product};
use super::simd::{Kernel, Simd};

/// Positions of a block.
const KEY_BLOCK: usize = 64;
/// Rows that a task should have: enough to read keys and values seldom, few enough that its memory stays near.
const TARGET_ROWS: usize = 32;

/// Elements of one head's row in the cache: padded, so that it consists of whole vectors.
pub(super) fn padded(head_dim: usize) -> usize {
    head_dim.next_multiple_of(32)
}

/// Tokens of one task if `group` query heads share a KV head.
pub(super) fn tokens_per_task(group: usize) -> usize {
    (TARGET_ROWS / group).max(1)
}

/// Keys and values of one layer, each [pages, page_tokens, kv_heads, padded head_dim].
#[derive(Clone, Copy)]
pub(super) struct Cache<'a, W> {
    pub(super) keys: &'a [W],
    pub(super) values: &'a [W],
    pub(super) page_tokens: usize,
}

/// One task: some consecutive tokens of a sequence with the query heads that share one KV head.
pub(super) struct Attention<'a, P: Product> {
    /// q of the first token's first head of the group; `q_stride` elements from token to token. Heads are `head_dim` apart.
    pub(super) q: &'a [f32],
    pub(super) q_stride: usize,
    pub(super) tokens: usize,
    /// Query heads.
    pub(super) group: usize,
    pub(super) head_dim: usize,
    /// Position of the first token.
    pub(super) position: usize,
    pub(super) cache: Cache<'a, P::W>,
    pub(super) page_table: &'a [u32],
    pub(super) kv_heads: usize,
    pub(super) kv_head: usize,
    /// The result of token t and head h of the group begins at `first + t · out_stride + h · head_dim`; no other task writes there.
    pub(super) out: Output<'a>,
    pub(super) first: usize,
    pub(super) out_stride: usize,
    pub(super) scratch: &'a mut Scratch,
}

/// Memory of a thread's task, kept for its next one.
pub(super) struct Scratch {
    /// [rows, padded head_dim], in the type of the products' operands.
    q: Aligned<f32>,
    /// [rows, padded head_dim]: weighted sums of values.
    sums: Aligned<f32>,
    rows: Vec<Row>,
}

impl Scratch {
    pub(super) const fn new() -> Self {
        Self { q: Aligned::empty(), sums: Aligned::empty(), rows: Vec::new() }
    }
}

#[derive(Clone, Copy)]
#[repr(align(64))]
struct Row {
    /// q · k of the current block, then the weights of its values; −∞ and 0 beyond the row's own position.
    scores: [f32; KEY_BLOCK],
    /// Largest score so far.
    max: f32,
    /// Sum of the weights so far, relative to `max`.
    total: f32,
    /// By how much the sums so far shrink because the maximum grew.
    shrink: f32,
    /// Keys of the current block that the row sees.
    visible: usize,
}

impl<P: Product> Kernel for Attention<'_, P> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the CPU has S.
        unsafe { if S::WIDE { self.attend::<S, 4, 6, 4>() } else { self.attend::<S, 2, 2, 2>() } }
    }
}

impl<P: Product> Attention<'_, P> {
    /// Tiles are MR rows with NR keys, and MR rows with NV vectors of a value.
    ///
    /// # Safety
    /// The CPU has S.
    #[inline(always)]
    unsafe fn attend<S: Simd, const MR: usize, const NR: usize, const NV: usize>(self) {
        let dim = padded(self.head_dim);
        let num_rows = self.tokens * self.group;
        let end = self.position + self.tokens;
        let scale = (1.0 / (self.head_dim as f64).sqrt()) as f32;

        let q: &mut [P::X] = &mut bytemuck::cast_slice_mut(self.scratch.q.at_least(num_rows * dim))[..num_rows * dim];
        for row in 0..num_rows {
            let start = row / self.group * self.q_stride + row % self.group * self.head_dim;
            let (used, padding) = q[row * dim..][..dim].split_at_mut(self.head_dim);
            for (to, from) in used.iter_mut().zip(&self.q[start..start + self.head_dim]) {
                *to = P::X::from_f32(*from);
            }
            padding.fill(P::X::from_f32(0.0));
        }
        let sums = self.scratch.sums.at_least(num_rows * dim);
        sums.fill(0.0);
        let rows = &mut self.scratch.rows;
        rows.clear();
        rows.resize(
            num_rows,
            Row { scores: [0.0; KEY_BLOCK], max: f32::NEG_INFINITY, total: 0.0, shrink: 0.0, visible: 0 },
        );

        for start in (0..end).step_by(KEY_BLOCK) {
            let len = KEY_BLOCK.min(end - start);
            let Cache { keys: all_keys, values: all_values, page_tokens } = self.cache;
            let mut keys = [all_keys.as_ptr(); KEY_BLOCK];
            let mut values = [all_values.as_ptr(); KEY_BLOCK];
            for j in 0..len {
                let position = start + j;
                let page = self.page_table[position / page_tokens] as usize;
                let slot = page * page_tokens + position % page_tokens;
                let first = (slot * self.kv_heads + self.kv_head) * dim;
                keys[j] = all_keys[first..first + dim].as_ptr();
                values[j] = all_values[first..first + dim].as_ptr();
            }

            // Tokens before the block see none of it.
            let first_row = start.saturating_sub(self.position) * self.group;
            let rows = &mut rows[first_row..];
            let q = &q[first_row * dim..];
            let sums = &mut sums[first_row * dim..];
            let mut r = 0;
            // SAFETY: `q` and `sums` have `dim` elements, whole vectors, for each row, and so have the first `len` keys and values.
            unsafe {
                while r + MR <= rows.len() {
                    score_rows::<S, P, MR, NR>(&q[r * dim..], dim, &keys[..len], scale, &mut rows[r..]);
                    r += MR;
                }
                while r < rows.len() {
                    score_rows::<S, P, 1, NR>(&q[r * dim..], dim, &keys[..len], scale, &mut rows[r..]);
                    r += 1;
                }
                for (r, row) in rows.iter_mut().enumerate() {
                    let position = self.position + (first_row + r) / self.group;
                    row.visible = KEY_BLOCK.min(position + 1 - start);
                    row.weigh();
                }
                r = 0;
                while r + MR <= rows.len() {
                    add_values::<S, P, MR, NV>(&rows[r..], dim, &values[..len], &mut sums[r * dim..]);
                    r += MR;
                }
                while r < rows.len() {
                    add_values::<S, P, 1, NV>(&rows[r..], dim, &values[..len], &mut sums[r * dim..]);
                    r += 1;
                }
            }
        }

        for (index, row) in rows.iter().enumerate() {
            let first = self.first + index / self.group * self.out_stride + index % self.group * self.head_dim;
            for (i, sum) in sums[index * dim..][..self.head_dim].iter().enumerate() {
                // SAFETY: no other task writes this element.
                unsafe { self.out.write(first + i, sum / row.total) }
            }
        }
    }
}

impl Row {
    /// Turns the scores of the block into weights relative to the new maximum.
    #[inline(always)]
    fn weigh(&mut self) {
        self.scores[self.visible..].fill(f32::NEG_INFINITY);
        let mut lanes = [f32::NEG_INFINITY; 16];
        for chunk in self.scores.as_chunks::<16>().0 {
            for i in 0..16 {
                lanes[i] = lanes[i].max(chunk[i]);
            }
        }
        let mut max = self.max;
        for lane in lanes {
            max = max.max(lane);
        }
        let mut lanes = [0.0; 16];
        for chunk in self.scores.as_chunks_mut::<16>().0 {
            for i in 0..16 {
                chunk[i] = exp(chunk[i] - max);
                lanes[i] += chunk[i];
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] += lanes[i + half];
            }
        }
        self.shrink = exp(self.max - max);
        self.total = self.total * self.shrink + lanes[0];
        self.max = max;
    }
}

/// scores[j] = q · keys[j] · scale of the first MR rows.
///
/// # Safety
/// The CPU has S; `q` holds MR rows of `dim` elements, each key `dim`, a multiple of 32.
#[inline(always)]
unsafe fn score_rows<S: Simd, P: Product, const MR: usize, const NR: usize>(
    q: &[P::X],
    dim: usize,
    keys: &[*const P::W],
    scale: f32,
    rows: &mut [Row],
) {
    let mut x = [q.as_ptr(); MR];
    let mut j = 0;
    // SAFETY: by this function's contract.
    unsafe {
        for r in 1..MR {
            x[r] = x[0].add(r * dim);
        }
        while j + NR <= keys.len() {
            let mut w = [keys[j]; NR];
            w.copy_from_slice(&keys[j..j + NR]);
            let sums = dots::<S, P, MR, NR>(x, w, dim);
            for r in 0..MR {
                for c in 0..NR {
                    rows[r].scores[j + c] = sums[r][c] * scale;
                }
            }
            j += NR;
        }
        while j < keys.len() {
            let sums = dots::<S, P, MR, 1>(x, [keys[j]], dim);
            for r in 0..MR {
                rows[r].scores[j] = sums[r][0] * scale;
            }
            j += 1;
        }
    }
}

/// sums = sums · shrink + Σ weight · value of the first MR rows, values in order.
///
/// # Safety
/// The CPU has S; `sums` holds MR rows of `dim` elements, each value `dim`, a multiple of 32.
#[inline(always)]
unsafe fn add_values<S: Simd, P: Product, const MR: usize, const NV: usize>(
    rows: &[Row],
    dim: usize,
    values: &[*const P::W],
    sums: &mut [f32],
) {
    let rows = &rows[..MR];
    // Rows of later tokens see more values: first those that all rows see, then each row's others. A value that a row does not see is
    // not even multiplied by zero.
    let mut shared = rows[0].visible;
    for row in rows {
        shared = shared.min(row.visible);
    }
    let mut d = 0;
    // SAFETY: by this function's contract; d + 16 · (vectors of the tile) ≤ dim.
    unsafe {
        let sums = sums.as_mut_ptr();
        while d < dim {
            let vectors = if d + NV * 16 <= dim { NV } else { 2 };
            let at = sums.add(d);
            if vectors == NV {
                value_tile::<S, P, MR, NV>(rows, true, &values[..shared], 0, d, at, dim);
            } else {
                value_tile::<S, P, MR, 2>(rows, true, &values[..shared], 0, d, at, dim);
            }
            for r in 0..MR {
                let (row, own, at) = (&rows[r..=r], &values[shared..rows[r].visible], at.add(r * dim));
                if own.is_empty() {
                    continue;
                }
                if vectors == NV {
                    value_tile::<S, P, 1, NV>(row, false, own, shared, d, at, dim);
                } else {
                    value_tile::<S, P, 1, 2>(row, false, own, shared, d, at, dim);
                }
            }
            d += vectors * 16;
        }
    }
}

/// Adds `values`, the first of which has the weight `first`, elements `d .. d + 16 · NV`, to MR rows of sums at `sums`, which are `dim` apart.
///
/// # Safety
/// The CPU has S; those elements exist in every value and in the sums.
#[inline(always)]
unsafe fn value_tile<S: Simd, P: Product, const MR: usize, const NV: usize>(
    rows: &[Row],
    shrink: bool,
    values: &[*const P::W],
    first: usize,
    d: usize,
    sums: *mut f32,
    dim: usize,
) {
    // SAFETY: by this function's contract.
    unsafe {
        let mut tile = [[S::splat(0.0); NV]; MR];
        for r in 0..MR {
            let factor = S::splat(if shrink { rows[r].shrink } else { 1.0 });
            for v in 0..NV {
                tile[r][v] = S::mul(S::load(sums.add(r * dim + v * 16)), factor);
            }
        }
        for (j, value) in values.iter().enumerate() {
            for v in 0..NV {
                let value = P::W::load::<S>(value.add(d + v * 16));
                for r in 0..MR {
                    let weight = S::splat(rows.get_unchecked(r).scores[first + j]);
                    tile[r][v] = S::mul_add(weight, value, tile[r][v]);
                }
            }
        }
        for r in 0..MR {
            for v in 0..NV {
                S::store(sums.add(r * dim + v * 16), tile[r][v]);
            }
        }
    }
}

/// eˣ for x ≤ 0 to 2 units in the last place, 0 below 2⁻¹²⁶. Free of branches, so that loops over it are vectorised, and the same on every
/// instruction set, which a library's would not be.
#[inline(always)]
fn exp(x: f32) -> f32 {
    // Adding and subtracting 1.5 · 2²³ rounds to an integer, which is left in the low bits.
    const ROUND: f32 = 12_582_912.0;
    // ln 2 in two parts: the first has few enough bits that its products with integers up to 2⁷ are exact.
    const LN2_HIGH: f32 = 0.693_359_4;
    const LN2_LOW: f32 = -2.121_944_4e-4;
    let clamped = if x < -87.0 { -87.0 } else { x };
    let shifted = clamped.mul_add(std::f32::consts::LOG2_E, ROUND);
    let n = shifted - ROUND;
    let r = n.mul_add(-LN2_LOW, n.mul_add(-LN2_HIGH, clamped));
    // The Taylor series to r⁷; |r| ≤ ln 2 / 2, so the rest is below 2⁻²⁷.
    let mut sum = 1.0 / 5040.0;
    for coefficient in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
        sum = r.mul_add(sum, coefficient);
    }
    let power = f32::from_bits((shifted.to_bits() << 23).wrapping_add(1.0_f32.to_bits()));
    if x < -87.0 { 0.0 } else { sum * power }
}

#[cfg(test)]
mod tests {
    use super::exp;

    #[test]
    fn exp_is_accurate_to_two_units_in_the_last_place() {
        for i in 0..=870_000 {
            let x = -1e-4 * i as f32;
            let exact = f64::from(x).exp();
            let unit = f64::from((exact as f32).next_up() - exact as f32);
            assert!((f64::from(exp(x)) - exact).abs() <= 2.0 * unit, "exp({x})");
        }
        assert_eq!(exp(0.0), 1.0);
        assert_eq!(exp(f32::NEG_INFINITY), 0.0);
        assert!(exp(f32::NAN).is_nan());
    }
}
