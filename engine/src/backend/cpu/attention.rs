//! Causal attention over a paged cache, in blocks of keys with a running maximum.
//!
//! A row is one query head of one token. Blocks begin at fixed positions of the sequence and a row takes its own part of each, so
//! that its result depends neither on the tokens computed beside it nor on the size and order of pages. Keys lie across: sixteen positions are
//! the lanes of a vector, so that scores are sums without a sum over lanes.

use super::gemm::Output;
use super::matrix::Aligned;
use super::product::Cached;
use super::simd::{Kernel, Simd};

/// Positions of a block.
const KEY_BLOCK: usize = 64;
/// Rows that a task should have: enough to read keys and values seldom, few enough that its memory stays near.
const TARGET_ROWS: usize = 48;

/// Tokens of one task if `group` query heads share a KV head.
pub(super) fn tokens_per_task(group: usize) -> usize {
    (TARGET_ROWS / group).max(1)
}

/// Keys and values of one layer.
#[derive(Clone, Copy)]
pub(super) struct Cache<'a, E> {
    /// [pages, kv_heads, head_dim, slots]
    pub(super) keys: &'a [E],
    /// [pages, kv_heads, page_tokens, padded head_dim]
    pub(super) values: &'a [E],
    pub(super) layout: Layout,
}

/// Where a position of a page lies in the cache.
#[derive(Clone, Copy)]
pub(super) struct Layout {
    pub(super) page_tokens: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
}

impl Layout {
    /// Elements of one head's value: padded, so that it consists of whole vectors.
    pub(super) fn value_len(&self) -> usize {
        self.head_dim.next_multiple_of(32)
    }

    /// Positions of a page with those that fill its last vector of keys.
    pub(super) fn slots(&self) -> usize {
        self.page_tokens.next_multiple_of(16)
    }

    pub(super) fn keys_of_page(&self) -> usize {
        self.kv_heads * self.head_dim * self.slots()
    }

    pub(super) fn values_of_page(&self) -> usize {
        self.kv_heads * self.page_tokens * self.value_len()
    }

    /// Index of the first element of the key; the next ones are [`Self::slots`] apart.
    pub(super) fn key(&self, page: usize, head: usize, slot: usize) -> usize {
        (page * self.kv_heads + head) * self.head_dim * self.slots() + slot
    }

    /// Index of the first element of the value.
    pub(super) fn value(&self, page: usize, head: usize, slot: usize) -> usize {
        ((page * self.kv_heads + head) * self.page_tokens + slot) * self.value_len()
    }
}

/// One task: some consecutive tokens of a sequence with the query heads that share one KV head.
pub(super) struct Attention<'a, E> {
    /// q of the first token's first head of the group; `q_stride` elements from token to token. Heads are `head_dim` apart.
    pub(super) q: &'a [f32],
    pub(super) q_stride: usize,
    pub(super) tokens: usize,
    /// Query heads.
    pub(super) group: usize,
    /// Position of the first token.
    pub(super) position: usize,
    pub(super) cache: Cache<'a, E>,
    pub(super) page_table: &'a [u32],
    pub(super) kv_head: usize,
    /// The result of token t and head h of the group begins at `first + t · out_stride + h · head_dim`; no other task writes there.
    pub(super) out: Output<'a, f32>,
    pub(super) first: usize,
    pub(super) out_stride: usize,
    pub(super) scratch: &'a mut Scratch,
}

/// Memory of a thread's task, kept for its next one.
pub(super) struct Scratch {
    /// [rows, head_dim]
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

/// Positions of a block that share a vector of keys.
#[derive(Clone, Copy)]
struct Keys<E> {
    /// The vector's first dimension.
    first: *const E,
    /// The lanes in use, and where in the block they belong.
    lane: usize,
    len: usize,
    index: usize,
}

impl<E: Cached> Kernel for Attention<'_, E> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the CPU has S.
        unsafe { if S::WIDE { self.attend::<S, 6, 4>() } else { self.attend::<S, 4, 1>() } }
    }
}

impl<E: Cached> Attention<'_, E> {
    /// Tiles are MR rows with NV vectors of keys, or of a value.
    ///
    /// # Safety
    /// The CPU has S.
    #[inline(always)]
    unsafe fn attend<S: Simd, const MR: usize, const NV: usize>(self) {
        let Cache { keys: all_keys, values: all_values, layout } = self.cache;
        let (head_dim, dim, slots) = (layout.head_dim, layout.value_len(), layout.slots());
        let num_rows = self.tokens * self.group;
        let end = self.position + self.tokens;
        let scale = (1.0 / (head_dim as f64).sqrt()) as f32;

        let q = self.scratch.q.at_least(num_rows * head_dim);
        for (row, q) in q.chunks_exact_mut(head_dim).enumerate() {
            let start = row / self.group * self.q_stride + row % self.group * head_dim;
            q.copy_from_slice(&self.q[start..start + head_dim]);
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
            let mut keys = [Keys { first: all_keys.as_ptr(), lane: 0, len: 0, index: 0 }; KEY_BLOCK];
            let mut num_keys = 0;
            let mut values = [all_values.as_ptr(); KEY_BLOCK];
            for j in 0..len {
                let position = start + j;
                let page = self.page_table[position / layout.page_tokens] as usize;
                let slot = position % layout.page_tokens;
                let first = layout.value(page, self.kv_head, slot);
                values[j] = all_values[first..first + dim].as_ptr();
                if j == 0 || slot % 16 == 0 {
                    let first = layout.key(page, self.kv_head, slot - slot % 16);
                    let first = all_keys[first..first + (head_dim - 1) * slots + 16].as_ptr();
                    keys[num_keys] = Keys { first, lane: slot % 16, len: 0, index: j };
                    num_keys += 1;
                }
                keys[num_keys - 1].len += 1;
            }
            let keys = &keys[..num_keys];

            // Tokens before the block see none of it.
            let first_row = start.saturating_sub(self.position) * self.group;
            let rows = &mut rows[first_row..];
            let q = &q[first_row * head_dim..];
            let sums = &mut sums[first_row * dim..];
            // SAFETY: `q` has `head_dim` elements and `sums` has `dim`, whole vectors, for each row, and so have the keys and the first `len` values.
            unsafe {
                let mut r = 0;
                while r + MR <= rows.len() {
                    score_rows::<S, E, MR, NV>(&q[r * head_dim..], head_dim, keys, slots, scale, &mut rows[r..]);
                    r += MR;
                }
                while r + 2 <= rows.len() {
                    score_rows::<S, E, 2, NV>(&q[r * head_dim..], head_dim, keys, slots, scale, &mut rows[r..]);
                    r += 2;
                }
                if r < rows.len() {
                    score_rows::<S, E, 1, NV>(&q[r * head_dim..], head_dim, keys, slots, scale, &mut rows[r..]);
                }
                for (r, row) in rows.iter_mut().enumerate() {
                    let position = self.position + (first_row + r) / self.group;
                    row.visible = KEY_BLOCK.min(position + 1 - start);
                    row.weigh();
                }
                let mut r = 0;
                while r + MR <= rows.len() {
                    add_values::<S, E, MR, NV>(&rows[r..], dim, &values[..len], &mut sums[r * dim..]);
                    r += MR;
                }
                while r + 2 <= rows.len() {
                    add_values::<S, E, 2, NV>(&rows[r..], dim, &values[..len], &mut sums[r * dim..]);
                    r += 2;
                }
                if r < rows.len() {
                    add_values::<S, E, 1, NV>(&rows[r..], dim, &values[..len], &mut sums[r * dim..]);
                }
            }
        }

        for (index, row) in rows.iter().enumerate() {
            let first = self.first + index / self.group * self.out_stride + index % self.group * head_dim;
            // SAFETY: no other task writes these elements.
            let out = unsafe { self.out.slice(first, head_dim) };
            for (out, sum) in out.iter_mut().zip(&sums[index * dim..]) {
                *out = sum / row.total;
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
                lanes[i] = larger(chunk[i], lanes[i]);
            }
        }
        for half in [8, 4, 2, 1] {
            for i in 0..half {
                lanes[i] = larger(lanes[i + half], lanes[i]);
            }
        }
        let max = larger(lanes[0], self.max);
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

/// `f32::max` takes more than one instruction because it looks for NaN; one in the scores still shows in their sum.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// scores = q · keys · scale of the first MR rows.
///
/// # Safety
/// The CPU has S; `q` holds MR rows of `head_dim` elements; that many vectors, `slots` elements apart, can be read of each of the keys.
#[inline(always)]
unsafe fn score_rows<S: Simd, E: Cached, const MR: usize, const NV: usize>(
    q: &[f32],
    head_dim: usize,
    keys: &[Keys<E>],
    slots: usize,
    scale: f32,
    rows: &mut [Row],
) {
    let (q, rows) = (q.as_ptr(), &mut rows[..MR]);
    let (tiles, rest) = keys.as_chunks::<NV>();
    // SAFETY: by this function's contract.
    unsafe {
        for keys in tiles {
            S::call(ScoreTile::<E, MR, NV> { q, head_dim, keys: *keys, slots, scale, rows });
        }
        for keys in rest {
            S::call(ScoreTile::<E, MR, 1> { q, head_dim, keys: [*keys], slots, scale, rows });
        }
    }
}

/// MR rows with NV vectors of keys.
struct ScoreTile<'a, E, const MR: usize, const NV: usize> {
    q: *const f32,
    head_dim: usize,
    keys: [Keys<E>; NV],
    slots: usize,
    scale: f32,
    /// MR of them.
    rows: &'a mut [Row],
}

impl<E: Cached, const MR: usize, const NV: usize> Kernel for ScoreTile<'_, E, MR, NV> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: whoever made the tile has proven its operands.
        unsafe {
            let mut sums = [[S::splat(0.0); NV]; MR];
            let mut at = self.keys.map(|keys| keys.first);
            for d in 0..self.head_dim {
                let mut k = [E::load::<S>(at[0]); NV];
                for v in 1..NV {
                    k[v] = E::load::<S>(at[v]);
                }
                for v in 0..NV {
                    at[v] = at[v].wrapping_add(self.slots);
                }
                for r in 0..MR {
                    let q = S::splat(*self.q.add(r * self.head_dim + d));
                    for v in 0..NV {
                        sums[r][v] = S::mul_add(q, k[v], sums[r][v]);
                    }
                }
            }
            let scale = S::splat(self.scale);
            for (row, sums) in self.rows.iter_mut().zip(sums) {
                for (keys, sum) in self.keys.iter().zip(sums) {
                    if keys.len == 16 {
                        S::store(row.scores[keys.index..keys.index + 16].as_mut_ptr(), S::mul(sum, scale));
                        continue;
                    }
                    let mut lanes = [0.0; 16];
                    S::store(lanes.as_mut_ptr(), S::mul(sum, scale));
                    row.scores[keys.index..][..keys.len].copy_from_slice(&lanes[keys.lane..][..keys.len]);
                }
            }
        }
    }
}

/// sums = sums · shrink + Σ weight · value of the first MR rows, values in order.
///
/// # Safety
/// The CPU has S; `sums` holds MR rows of `dim` elements, each value `dim`, a multiple of 32.
#[inline(always)]
unsafe fn add_values<S: Simd, E: Cached, const MR: usize, const NV: usize>(
    rows: &[Row],
    dim: usize,
    values: &[*const E],
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
            let seen = &values[..shared];
            if vectors == NV {
                S::call(ValueTile::<E, MR, NV> { rows, shrink: true, values: seen, first: 0, d, sums: at, dim });
            } else {
                S::call(ValueTile::<E, MR, 2> { rows, shrink: true, values: seen, first: 0, d, sums: at, dim });
            }
            for r in 0..MR {
                let (rows, values, sums) = (&rows[r..=r], &values[shared..rows[r].visible], at.add(r * dim));
                if values.is_empty() {
                    continue;
                }
                if vectors == NV {
                    S::call(ValueTile::<E, 1, NV> { rows, shrink: false, values, first: shared, d, sums, dim });
                } else {
                    S::call(ValueTile::<E, 1, 2> { rows, shrink: false, values, first: shared, d, sums, dim });
                }
            }
            d += vectors * 16;
        }
    }
}

/// Adds `values`, the first of which has the weight `first`, elements `d .. d + 16 · NV`, to MR rows of sums at `sums`, which are `dim` apart.
struct ValueTile<'a, E, const MR: usize, const NV: usize> {
    /// MR of them.
    rows: &'a [Row],
    shrink: bool,
    values: &'a [*const E],
    first: usize,
    d: usize,
    sums: *mut f32,
    dim: usize,
}

impl<E: Cached, const MR: usize, const NV: usize> Kernel for ValueTile<'_, E, MR, NV> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { rows, shrink, values, first, d, sums, dim } = self;
        // SAFETY: whoever made the tile has proven that those elements exist in every value and in the sums.
        unsafe {
            let mut tile = [[S::splat(0.0); NV]; MR];
            for r in 0..MR {
                let factor = S::splat(if shrink { rows[r].shrink } else { 1.0 });
                for v in 0..NV {
                    tile[r][v] = S::mul(S::load(sums.add(r * dim + v * 16)), factor);
                }
            }
            let weights = rows.as_ptr();
            for (j, value) in values.iter().enumerate() {
                let mut x = [S::splat(0.0); NV];
                for v in 0..NV {
                    x[v] = E::load::<S>(value.add(d + v * 16));
                }
                for r in 0..MR {
                    let weight = S::splat(*(*weights.add(r)).scores.as_ptr().add(first + j));
                    for v in 0..NV {
                        tile[r][v] = S::mul_add(weight, x[v], tile[r][v]);
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
