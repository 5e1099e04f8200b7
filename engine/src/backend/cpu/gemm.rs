//! Matrix products y = x · Wᵀ on packed weights (`matrix.rs`).
//!
//! Sixteen elements of y are the lanes of a sum, to which the products along the columns of W are added in order; every row of x meets them in
//! the same way, whether alone or in a tile of twelve. So an element of y has the same bits whatever is computed beside it, one row reads the weights
//! as fast as memory gives them, and many rows keep the multipliers busy.

use std::ops::Range;

use super::matrix::{PANEL, Panel};
use super::product::Product;
use super::simd::{Kernel, Simd};

/// Rows of x that one task multiplies: their partial sums stay in the cache.
pub(super) const ROW_BLOCK: usize = 512;
/// Steps after which the next rows take their turn: the weights of so many stay in the cache for all of them.
const STEP_BLOCK: usize = 256;
/// Steps by which weights are asked for ahead of their use.
const PREFETCH: usize = 48;
/// Logarithm of the largest number of chunks.
const MAX_LEVELS: usize = 7;

/// Memory that tasks write to; each writes elements that no other does.
pub(super) struct Output<'a, T> {
    start: *mut T,
    len: usize,
    _exclusive: std::marker::PhantomData<&'a mut [T]>,
}

impl<T> Clone for Output<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}

impl<T> Copy for Output<'_, T> {}

// SAFETY: the methods are unsafe and demand that threads write different elements.
unsafe impl<T: Send> Send for Output<'_, T> {}
// SAFETY: as above.
unsafe impl<T: Send> Sync for Output<'_, T> {}

impl<'a, T> Output<'a, T> {
    pub(super) fn new(data: &'a mut [T]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), _exclusive: std::marker::PhantomData }
    }

    /// `len` elements from `first` on.
    ///
    /// # Safety
    /// Nobody else uses them as long as the slice lives.
    #[inline(always)]
    pub(super) unsafe fn slice(self, first: usize, len: usize) -> &'a mut [T] {
        assert!(first <= self.len && len <= self.len - first);
        // SAFETY: the elements are inside the slice that this was made of, and by this method's contract nobody else uses them.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(first), len) }
    }

    /// # Safety
    /// Nobody else uses this element at the same time.
    #[inline(always)]
    pub(super) unsafe fn write(self, index: usize, value: T) {
        assert!(index < self.len);
        // SAFETY: the index is inside the slice, and by this method's contract nobody else uses the element.
        unsafe { self.start.add(index).write(value) }
    }
}

/// One task: some rows of x times one panel of W.
pub(super) struct Gemm<'a, P: Product> {
    /// [rows, steps · P::STEP], `x_stride` elements from row to row.
    pub(super) x: &'a [P::X],
    pub(super) x_stride: usize,
    pub(super) rows: usize,
    pub(super) panel: Panel<'a>,
    /// Parts of the sums, a power of two; see `Backend::linear_chunked`.
    pub(super) chunks: usize,
    /// Store relu(y)² in place of y.
    pub(super) relu2: bool,
    /// The panel's columns of row r of y begin at `first + r · out_stride`.
    pub(super) out: Output<'a, f32>,
    pub(super) first: usize,
    pub(super) out_stride: usize,
    /// Room for [`sums_len`] numbers.
    pub(super) sums: &'a mut [f32],
    /// Room for [`DECODED_STEPS`].
    pub(super) decoded: &'a mut [[u32; PANEL]],
}

/// Numbers that a task needs for its sums.
pub(super) fn sums_len(rows: usize, chunks: usize) -> usize {
    (chunks.trailing_zeros() as usize + 1) * rows * PANEL
}

/// Steps that a task needs room for to decode them.
pub(super) const DECODED_STEPS: usize = STEP_BLOCK;

impl<P: Product> Kernel for Gemm<'_, P> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, x_stride, rows, panel, chunks, out, first, out_stride, .. } = self;
        let steps = panel.steps;
        // What the loads of the tiles rely on.
        assert!(0 < rows && (rows - 1) * x_stride + steps * P::STEP <= x.len());
        assert!(chunks.is_power_of_two() && chunks <= 1 << MAX_LEVELS && steps.is_multiple_of(chunks));
        let width = steps / chunks;
        let (sums, len, decoded) = (self.sums, rows * PANEL, self.decoded);
        // To decode a second time costs less than to put aside and to fetch.
        let is_decoded_once = !panel.codes.is_empty() && rows > 2 * if S::WIDE { WIDE_ROWS } else { NARROW_ROWS };
        for chunk in 0..chunks {
            let mut level = 0;
            // Sums of 2, 4, … chunks are completed as a binary counter carries: this chunk's go behind those that it completes.
            let target = chunk.trailing_ones() as usize;
            let (earlier, part) = sums.split_at_mut(target * len);
            let part = &mut part[..len];
            for start in (0..width).step_by(STEP_BLOCK) {
                let first = chunk * width + start;
                let range = first..first + STEP_BLOCK.min(width - start);
                let x = &x[first * P::STEP..];
                let decoded = is_decoded_once.then_some(&mut decoded[..range.len()]);
                let block = Block::<P> { x, x_stride, rows, panel, range, decoded, is_first: start == 0, sums: part };
                // SAFETY: the CPU has S, and the operands were measured above.
                unsafe {
                    if S::WIDE { block.multiply::<S, WIDE_ROWS, 2>() } else { block.multiply::<S, NARROW_ROWS, 1>() }
                }
            }
            while level < target {
                for (sum, earlier) in part.iter_mut().zip(&earlier[level * len..]) {
                    *sum += earlier;
                }
                level += 1;
            }
        }
        let sums = &mut sums[chunks.trailing_zeros() as usize * len..][..len];
        for (row, sums) in sums.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            if self.relu2 {
                for vector in sums.as_chunks_mut::<16>().0 {
                    // SAFETY: the CPU has S; the vector is one.
                    unsafe {
                        let relu = S::max(S::load(vector.as_ptr()), S::splat(0.0));
                        S::store(vector.as_mut_ptr(), S::mul(relu, relu));
                    }
                }
            }
            // SAFETY: no other task has these columns of these rows.
            let out = unsafe { out.slice(first + row * out_stride, panel.columns) };
            match out.as_mut_array::<PANEL>() {
                Some(out) => *out = *sums,
                None => out.copy_from_slice(&sums[..panel.columns]),
            }
        }
    }
}

/// Rows of the largest tile with 32 registers, and with 16.
const WIDE_ROWS: usize = 12;
const NARROW_ROWS: usize = 4;

/// All rows with some steps of a panel.
struct Block<'a, P: Product> {
    x: &'a [P::X],
    x_stride: usize,
    rows: usize,
    panel: Panel<'a>,
    range: Range<usize>,
    /// Where the first tile leaves the words that it decodes, for the next ones.
    decoded: Option<&'a mut [[u32; PANEL]]>,
    /// The sums begin here, else they go on.
    is_first: bool,
    /// [rows, PANEL]
    sums: &'a mut [f32],
}

impl<P: Product> Block<'_, P> {
    /// Tiles have at most `MAX` rows and `NV` vectors of columns.
    ///
    /// # Safety
    /// The CPU has S; the operands are as long as the fields say.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const MAX: usize, const NV: usize>(mut self) {
        let mut row = 0;
        // SAFETY: the tiles have rows below `rows`.
        unsafe {
            // Twice 8 is better than 12 and less.
            while row + MAX <= self.rows && !(MAX == 12 && (13..=16).contains(&(self.rows - row))) {
                self.tile::<S, MAX, NV>(row);
                row += MAX;
            }
            while MAX > 8 && row + 8 <= self.rows {
                self.tile::<S, 8, NV>(row);
                row += 8;
            }
            if MAX > 4 && row + 4 <= self.rows {
                self.tile::<S, 4, NV>(row);
                row += 4;
            }
            if row + 2 <= self.rows {
                self.tile::<S, 2, NV>(row);
                row += 2;
            }
            if row < self.rows {
                self.tile::<S, 1, NV>(row);
            }
        }
    }

    /// # Safety
    /// As `multiply`; `row + MR` rows exist.
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NV: usize>(&mut self, row: usize) {
        let mut decoded = self.decoded.take();
        let keep = decoded.as_mut().map_or(std::ptr::null_mut(), |words| words.as_mut_ptr());
        for first_half in (0..2).step_by(NV) {
            // SAFETY: by this method's contract, and the words that are kept have room.
            unsafe {
                S::call(Tile::<P, MR, NV> {
                    x: self.x.as_ptr().add(row * self.x_stride),
                    x_stride: self.x_stride,
                    panel: self.panel,
                    range: self.range.clone(),
                    first_half,
                    keep,
                    is_first: self.is_first,
                    sums: self.sums[row * PANEL + 16 * first_half..].as_mut_ptr(),
                });
            }
        }
        if let Some(words) = decoded {
            self.panel = Panel { steps: words.len(), codes: &[], others: &[], words, ..self.panel };
            self.range = 0..words.len();
        }
    }
}

/// MR rows with NV halves of a panel.
struct Tile<'a, P: Product, const MR: usize, const NV: usize> {
    x: *const P::X,
    x_stride: usize,
    panel: Panel<'a>,
    range: Range<usize>,
    first_half: usize,
    /// [steps] for the words that are decoded, or null.
    keep: *mut [u32; PANEL],
    is_first: bool,
    sums: *mut f32,
}

impl<P: Product, const MR: usize, const NV: usize> Kernel for Tile<'_, P, MR, NV> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows and halves are below the numbers that whoever made the tile has measured, and pieces have as many steps as the range.
        unsafe {
            let mut sums = [[S::splat(0.0); NV]; MR];
            if !self.is_first {
                for r in 0..MR {
                    for v in 0..NV {
                        sums[r][v] = S::load(self.sums.add(r * PANEL + 16 * v));
                    }
                }
            }
            let mut x = self.x;
            // What the compiler knows about two halves it need not ask in the loop.
            let first_half = if NV == 2 { 0 } else { self.first_half };
            let Panel { codes, others, words, .. } = self.panel;
            if codes.is_empty() {
                for words in &words[self.range] {
                    if MR >= 8 {
                        prefetch::<S, _>(words);
                    }
                    let words = words.as_ptr().add(16 * first_half);
                    x = add_step::<S, P, MR, NV>(x, self.x_stride, load::<S, NV>(words), &mut sums);
                }
            } else if P::STEP == 2 {
                let base = S::base(self.panel.exponents.base());
                let other = others.partition_point(|other| (*other as usize) < self.range.start);
                let mut others = others[other..].iter().zip(&words[other..]);
                let mut other = others.next();
                let (mut step, mut keep) = (self.range.start as u32, self.keep);
                for codes in &codes[self.range] {
                    if MR >= 8 {
                        prefetch::<S, _>(codes);
                    }
                    let pairs = match other {
                        Some((other_step, words)) if *other_step == step => {
                            other = others.next();
                            load::<S, NV>(words.as_ptr().add(16 * first_half))
                        }
                        _ => {
                            let mut pairs = [S::decode(codes, first_half, base); NV];
                            for v in 1..NV {
                                pairs[v] = S::decode(codes, first_half + v, base);
                            }
                            pairs
                        }
                    };
                    if !keep.is_null() {
                        for v in 0..NV {
                            S::store(keep.cast::<f32>().add(16 * (first_half + v)), S::as_f32(pairs[v]));
                        }
                        keep = keep.add(1);
                    }
                    x = add_step::<S, P, MR, NV>(x, self.x_stride, pairs, &mut sums);
                    step += 1;
                }
            }
            for r in 0..MR {
                for v in 0..NV {
                    S::store(self.sums.add(r * PANEL + 16 * v), sums[r][v]);
                }
            }
        }
    }
}

/// Asks for what lies some steps behind this one.
///
/// # Safety
/// The CPU has S.
#[inline(always)]
unsafe fn prefetch<S: Simd, T>(step: &T) {
    let ahead = std::ptr::from_ref(step).wrapping_add(PREFETCH).cast::<u8>();
    // SAFETY: by this function's contract.
    unsafe {
        S::prefetch(ahead);
        S::prefetch(ahead.wrapping_add(64));
    }
}

/// # Safety
/// The CPU has S; NV vectors of words can be read.
#[inline(always)]
unsafe fn load<S: Simd, const NV: usize>(words: *const u32) -> [S::Pairs; NV] {
    // SAFETY: by this function's contract.
    unsafe {
        let mut pairs = [S::load_pairs(words.cast()); NV];
        for v in 1..NV {
            pairs[v] = S::load_pairs(words.add(16 * v).cast());
        }
        pairs
    }
}

/// Adds the products of a step; returns where x goes on.
///
/// # Safety
/// The CPU has S; `P::STEP` elements can be read from each of MR rows of x.
#[inline(always)]
unsafe fn add_step<S: Simd, P: Product, const MR: usize, const NV: usize>(
    x: *const P::X,
    x_stride: usize,
    pairs: [S::Pairs; NV],
    sums: &mut [[S::F32; NV]; MR],
) -> *const P::X {
    // SAFETY: by this function's contract.
    unsafe {
        let mut w = [P::weights::<S>(pairs[0]); NV];
        for v in 1..NV {
            w[v] = P::weights::<S>(pairs[v]);
        }
        for r in 0..MR {
            for v in 0..NV {
                sums[r][v] = P::mul_add::<S>(x.add(r * x_stride), w[v], sums[r][v]);
            }
        }
        x.add(P::STEP)
    }
}
