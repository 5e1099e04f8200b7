//! Matrix products y = x · Wᵀ on packed weights (`matrix.rs`).
//!
//! Sixteen elements of y are the lanes of a sum, to which the products along the columns of W are added in order; every row of x meets them in
//! the same way, whether alone or in a tile of twelve. So an element of y has the same bits whatever is computed beside it, one row reads the weights
//! as fast as memory gives them, and many rows keep the multipliers busy.

use super::matrix::{PANEL, Panel};
use super::product::Product;
use super::simd::{Kernel, Simd};

/// Rows of x that one task multiplies: their partial sums stay in the cache.
pub(super) const ROW_BLOCK: usize = 512;
/// Steps after which the next rows take their turn: the weights of so many stay in the cache for all of them.
const STEP_BLOCK: usize = 512;
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
}

/// Numbers that a task needs for its sums.
pub(super) fn sums_len(rows: usize, chunks: usize) -> usize {
    (chunks.trailing_zeros() as usize + 1) * rows * PANEL
}

impl<P: Product> Kernel for Gemm<'_, P> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { x, x_stride, rows, panel, chunks, out, first, out_stride, .. } = self;
        let steps = panel.words.len() / PANEL;
        // What the loads of the tiles rely on.
        assert!(0 < rows && (rows - 1) * x_stride + steps * P::STEP <= x.len());
        assert!(chunks.is_power_of_two() && chunks <= 1 << MAX_LEVELS && steps.is_multiple_of(chunks));
        let width = steps / chunks;
        let (sums, len) = (self.sums, rows * PANEL);
        for chunk in 0..chunks {
            let mut level = 0;
            // Sums of 2, 4, … chunks are completed as a binary counter carries: this chunk's go behind those that it completes.
            let target = chunk.trailing_ones() as usize;
            let (earlier, part) = sums.split_at_mut(target * len);
            let part = &mut part[..len];
            for start in (0..width).step_by(STEP_BLOCK) {
                let block = Block::<P> {
                    x: &x[(chunk * width + start) * P::STEP..],
                    x_stride,
                    rows,
                    words: &panel.words[(chunk * width + start) * PANEL..],
                    steps: STEP_BLOCK.min(width - start),
                    is_first: start == 0,
                    sums: part,
                };
                // SAFETY: the CPU has S, and the operands were measured above.
                unsafe { if S::WIDE { block.multiply::<S, 12, 2>() } else { block.multiply::<S, 4, 1>() } }
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

/// All rows with some steps of a panel.
struct Block<'a, P: Product> {
    x: &'a [P::X],
    x_stride: usize,
    rows: usize,
    /// [steps, PANEL]
    words: &'a [u32],
    steps: usize,
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
        for vector in (0..PANEL / 16).step_by(NV) {
            // SAFETY: by this method's contract.
            unsafe {
                S::call(Tile::<P, MR, NV> {
                    x: self.x.as_ptr().add(row * self.x_stride),
                    x_stride: self.x_stride,
                    words: self.words.as_ptr().add(16 * vector),
                    steps: self.steps,
                    is_first: self.is_first,
                    sums: self.sums[row * PANEL + 16 * vector..].as_mut_ptr(),
                });
            }
        }
    }
}

/// MR rows with NV vectors of columns.
struct Tile<P: Product, const MR: usize, const NV: usize> {
    x: *const P::X,
    x_stride: usize,
    words: *const u32,
    steps: usize,
    is_first: bool,
    sums: *mut f32,
}

impl<P: Product, const MR: usize, const NV: usize> Kernel for Tile<P, MR, NV> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: rows, steps and vectors are below the numbers that whoever made the tile has measured.
        unsafe {
            let mut sums = [[S::splat(0.0); NV]; MR];
            if !self.is_first {
                for r in 0..MR {
                    for v in 0..NV {
                        sums[r][v] = S::load(self.sums.add(r * PANEL + 16 * v));
                    }
                }
            }
            let (mut x, mut words) = (self.x, self.words);
            for _ in 0..self.steps {
                let mut w = [P::load::<S>(words); NV];
                for v in 1..NV {
                    w[v] = P::load::<S>(words.add(16 * v));
                }
                for r in 0..MR {
                    let x = x.add(r * self.x_stride);
                    for v in 0..NV {
                        sums[r][v] = P::mul_add::<S>(x, w[v], sums[r][v]);
                    }
                }
                x = x.add(P::STEP);
                words = words.add(PANEL);
            }
            for r in 0..MR {
                for v in 0..NV {
                    S::store(self.sums.add(r * PANEL + 16 * v), sums[r][v]);
                }
            }
        }
    }
}
