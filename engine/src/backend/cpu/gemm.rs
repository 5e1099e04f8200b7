//! Matrix products y = x · Wᵀ with both operands contiguous along the sum, so that weights are used as they are stored.
//!
//! Every element of y is one dot product with a fixed order of additions: lane j of 16 adds elements (of bf16: pairs) j, j + 16, …;
//! what does not fill a vector at the end is filled up with zeros; [`Simd::sum`] adds the lanes. Tiles and blocks only interleave
//! the sums of different elements, so that none depends on what is computed beside it.

use super::matrix::Panel;
use super::product::{Element, Product};
use super::simd::{Kernel, Simd};

/// Rows of x that one task multiplies.
pub(super) const ROW_BLOCK: usize = 64;
/// Most rows of W that one task multiplies.
pub(super) const COLUMN_BLOCK: usize = 48;
/// Logarithm of the largest number of chunks.
pub(super) const MAX_LEVELS: usize = 7;

/// Where tasks write y; each writes elements that no other does.
#[derive(Clone, Copy)]
pub(super) struct Output<'a> {
    start: *mut f32,
    len: usize,
    _exclusive: std::marker::PhantomData<&'a mut [f32]>,
}

// SAFETY: `write` is unsafe and demands that threads write different elements.
unsafe impl Send for Output<'_> {}
// SAFETY: as above.
unsafe impl Sync for Output<'_> {}

impl<'a> Output<'a> {
    pub(super) fn new(data: &'a mut [f32]) -> Self {
        Self { start: data.as_mut_ptr(), len: data.len(), _exclusive: std::marker::PhantomData }
    }

    /// # Safety
    /// No other thread reads or writes this element at the same time.
    #[inline(always)]
    pub(super) unsafe fn write(self, index: usize, value: f32) {
        assert!(index < self.len);
        // SAFETY: the index is inside the slice, and by this method's contract nobody else uses the element.
        unsafe { self.start.add(index).write(value) }
    }
}

/// What the tasks of one product have in common, and where one of them is.
#[derive(Clone, Copy)]
pub(super) struct Task<'a> {
    /// Rows of x, at most [`ROW_BLOCK`].
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) panel: &'a Panel,
    /// Length of the sums.
    pub(super) cols: usize,
    /// Parts of the sums, a power of two that divides `cols`; see `Backend::linear_chunked`.
    pub(super) chunks: usize,
    /// Store relu(y)² in place of y.
    pub(super) relu2: bool,
    /// y, `out_stride` elements from row to row.
    pub(super) out: Output<'a>,
    pub(super) out_stride: usize,
}

/// A task with its operands.
pub(super) struct Gemm<'a, P: Product> {
    task: Task<'a>,
    /// [rows, cols], `x_stride` elements from row to row.
    x: &'a [P::X],
    x_stride: usize,
    /// [columns, cols], `w_stride` elements from row to row.
    w: &'a [P::W],
    w_stride: usize,
}

impl<'a, P: Product> Gemm<'a, P> {
    /// `x` holds all rows, `x_stride` elements from row to row.
    pub(super) fn new(task: Task<'a>, x: &'a [P::X], x_stride: usize) -> Self {
        let w = task.panel.elements(task.cols);
        Self { task, x: &x[task.first_row * x_stride..], x_stride, w, w_stride: task.panel.stride }
    }
}

impl<P: Product> Kernel for Gemm<'_, P> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the CPU has S. The tiles are those whose sums fit the registers.
        unsafe { if S::WIDE { self.multiply::<S, 4, 6>() } else { self.multiply::<S, 2, 2>() } }
    }
}

impl<P: Product> Gemm<'_, P> {
    /// # Safety
    /// The CPU has S.
    #[inline(always)]
    unsafe fn multiply<S: Simd, const MR: usize, const NR: usize>(&self) {
        // What the loads of the tiles rely on.
        let Task { rows, cols, chunks, .. } = self.task;
        let columns = self.task.panel.rows;
        assert!(0 < rows && (rows - 1) * self.x_stride + cols <= self.x.len());
        assert!(0 < columns && (columns - 1) * self.w_stride + cols <= self.w.len());
        assert!(chunks.is_power_of_two() && chunks <= 1 << MAX_LEVELS && cols.is_multiple_of(chunks));

        let whole_tiles = columns - columns % NR;
        // SAFETY: the tiles have columns below `columns`.
        unsafe {
            for column in (0..whole_tiles).step_by(NR) {
                self.columns::<S, MR, NR>(column);
            }
            for column in whole_tiles..columns {
                self.columns::<S, MR, 1>(column);
            }
        }
    }

    /// All rows of x with NR rows of W, which stay in the cache meanwhile.
    ///
    /// # Safety
    /// The CPU has S; `multiply` has measured the operands; `column + NR` rows of W exist.
    #[inline(always)]
    unsafe fn columns<S: Simd, const MR: usize, const NR: usize>(&self, column: usize) {
        let rows = self.task.rows;
        let mut row = 0;
        // SAFETY: the tiles have rows below `rows`.
        unsafe {
            while row + MR <= rows {
                self.tile::<S, MR, NR>(row, column);
                row += MR;
            }
            if row + 2 <= rows {
                self.tile::<S, 2, NR>(row, column);
                row += 2;
            }
            if row < rows {
                self.tile::<S, 1, NR>(row, column);
            }
        }
    }

    /// # Safety
    /// As `columns`; `row + MR` rows of x exist.
    #[inline(always)]
    unsafe fn tile<S: Simd, const MR: usize, const NR: usize>(&self, row: usize, column: usize) {
        let task = &self.task;
        let width = task.cols / task.chunks;
        let mut x = [self.x.as_ptr(); MR];
        let mut w = [self.w.as_ptr(); NR];
        let mut sums = [[[0.0; NR]; MR]; MAX_LEVELS + 1];
        // SAFETY: the rows exist and have `cols` elements; no other task has these rows of y with this panel.
        unsafe {
            for r in 0..MR {
                x[r] = x[r].add((row + r) * self.x_stride);
            }
            for c in 0..NR {
                w[c] = w[c].add((column + c) * self.w_stride);
            }
            for chunk in 0..task.chunks {
                let mut part = dots::<S, P, MR, NR>(x, w, width);
                x = advanced(x, width);
                w = advanced(w, width);
                // Sums of 2, 4, … chunks are completed as a binary counter carries.
                let mut level = 0;
                while chunk >> level & 1 == 1 {
                    for (part, earlier) in part.as_flattened_mut().iter_mut().zip(sums[level].as_flattened()) {
                        *part += earlier;
                    }
                    level += 1;
                }
                sums[level] = part;
            }
            let sums = &sums[task.chunks.trailing_zeros() as usize];
            for r in 0..MR {
                for c in 0..NR {
                    let sum = sums[r][c];
                    let relu = if sum < 0.0 { 0.0 } else { sum };
                    let index = (task.first_row + row + r) * task.out_stride + task.panel.first_row + column + c;
                    task.out.write(index, if task.relu2 { relu * relu } else { sum });
                }
            }
        }
    }
}

/// # Safety
/// As `<*const T>::add`, for every pointer.
#[inline(always)]
unsafe fn advanced<T, const N: usize>(mut pointers: [*const T; N], by: usize) -> [*const T; N] {
    for pointer in &mut pointers {
        // SAFETY: by this function's contract.
        *pointer = unsafe { pointer.add(by) };
    }
    pointers
}

/// x[r] · w[c] over `len` elements.
///
/// # Safety
/// The CPU has S; `len` elements can be read from every pointer.
#[inline(always)]
pub(super) unsafe fn dots<S: Simd, P: Product, const MR: usize, const NR: usize>(
    x: [*const P::X; MR],
    w: [*const P::W; NR],
    len: usize,
) -> [[f32; NR]; MR] {
    let mut lanes = [[Lanes([0.0; 16]); NR]; MR];
    let mut sums = [[0.0; NR]; MR];
    let rest = len % P::STEP;
    let whole = len - rest;
    // SAFETY: the first part ends inside the operands, the second is a copy.
    unsafe {
        S::call(Tile::<P, MR, NR> { x, w, depth: whole, lanes: &mut lanes });
        if rest > 0 {
            let x = ends(advanced(x, whole), rest);
            let w = ends(advanced(w, whole), rest);
            let (x, w) = (x.each_ref().map(|x| x.as_ptr()), w.each_ref().map(|w| w.as_ptr()));
            S::call(Tile::<P, MR, NR> { x, w, depth: P::STEP, lanes: &mut lanes });
        }
        for r in 0..MR {
            for c in 0..NR {
                sums[r][c] = S::sum(S::load(lanes[r][c].0.as_ptr()));
            }
        }
    }
    sums
}

/// Partial sums of one element of y.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; 16]);

/// lanes[r][c] += x[r] · w[c] over `depth` elements, a multiple of `P::STEP`, which can be read from every pointer.
struct Tile<'a, P: Product, const MR: usize, const NR: usize> {
    x: [*const P::X; MR],
    w: [*const P::W; NR],
    depth: usize,
    lanes: &'a mut [[Lanes; NR]; MR],
}

impl<P: Product, const MR: usize, const NR: usize> Kernel for Tile<'_, P, MR, NR> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: k + STEP ≤ depth.
        unsafe {
            let mut sums = [[S::splat(0.0); NR]; MR];
            for r in 0..MR {
                for c in 0..NR {
                    sums[r][c] = S::load(self.lanes[r][c].0.as_ptr());
                }
            }
            let mut k = 0;
            while k < self.depth {
                let mut w = [P::load_w::<S>(self.w[0].add(k)); NR];
                for c in 1..NR {
                    w[c] = P::load_w::<S>(self.w[c].add(k));
                }
                for r in 0..MR {
                    let x = P::load_x::<S>(self.x[r].add(k));
                    for c in 0..NR {
                        sums[r][c] = P::mul_add::<S>(x, w[c], sums[r][c]);
                    }
                }
                k = k.wrapping_add(P::STEP);
            }
            for r in 0..MR {
                for c in 0..NR {
                    S::store(self.lanes[r][c].0.as_mut_ptr(), sums[r][c]);
                }
            }
        }
    }
}

/// Vectors that begin with `len` elements and end with zeros.
///
/// # Safety
/// `len` ≤ 32 elements can be read from every pointer.
#[inline(always)]
unsafe fn ends<T: Element, const N: usize>(pointers: [*const T; N], len: usize) -> [[T; 32]; N] {
    let mut ends = [[T::zeroed(); 32]; N];
    for (end, pointer) in ends.iter_mut().zip(pointers) {
        // SAFETY: by this function's contract.
        unsafe { pointer.copy_to_nonoverlapping(end.as_mut_ptr(), len) };
    }
    ends
}
