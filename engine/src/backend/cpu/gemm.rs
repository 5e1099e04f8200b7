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
/// Elements of the sum after which a tile gives way to the next one, so that the weights of a strip are read from the first-level cache.
const DEPTH_BLOCK: usize = 1536;
/// Logarithm of the largest number of chunks.
pub(super) const MAX_LEVELS: usize = 7;

/// Partial sums of one element of y.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Lanes([f32; 16]);

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
        // What the loads below rely on.
        let Task { rows, cols, chunks, .. } = self.task;
        let num_columns = self.task.panel.rows;
        assert!(0 < rows && rows <= ROW_BLOCK && (rows - 1) * self.x_stride + cols <= self.x.len());
        assert!(0 < num_columns && (num_columns - 1) * self.w_stride + cols <= self.w.len());
        assert!(chunks.is_power_of_two() && cols % chunks == 0);
        let levels = chunks.trailing_zeros() as usize;
        assert!(levels <= MAX_LEVELS);

        let width = cols / chunks;
        let mut lanes = [[Lanes([0.0; 16]); NR]; ROW_BLOCK];
        let mut part = [[0.0; NR]; ROW_BLOCK];
        let mut sums = [[[0.0; NR]; ROW_BLOCK]; MAX_LEVELS + 1];
        for column in (0..num_columns).step_by(NR) {
            let columns = NR.min(num_columns - column);
            for chunk in 0..chunks {
                // SAFETY: the chunk lies in the operands, which were measured above.
                unsafe { self.dots::<S, MR, NR>(column, columns, chunk * width, width, &mut lanes, &mut part) };
                // Sums of 2, 4, … chunks are completed as a binary counter carries.
                let mut level = 0;
                while chunk >> level & 1 == 1 {
                    for row in 0..rows {
                        for c in 0..NR {
                            part[row][c] += sums[level][row][c];
                        }
                    }
                    level += 1;
                }
                sums[level][..rows].copy_from_slice(&part[..rows]);
            }
            for row in 0..rows {
                for c in 0..columns {
                    let sum = sums[levels][row][c];
                    let relu = if sum < 0.0 { 0.0 } else { sum };
                    let value = if self.task.relu2 { relu * relu } else { sum };
                    let index =
                        (self.task.first_row + row) * self.task.out_stride + self.task.panel.first_row + column + c;
                    // SAFETY: no other task has this row with this panel.
                    unsafe { self.task.out.write(index, value) }
                }
            }
        }
    }

    /// Sums over elements `start .. start + width` of all rows of x with `columns` ≤ NR rows of W, by way of `lanes`.
    ///
    /// # Safety
    /// The CPU has S; the ranges lie in the operands.
    #[inline(always)]
    unsafe fn dots<S: Simd, const MR: usize, const NR: usize>(
        &self,
        column: usize,
        columns: usize,
        start: usize,
        width: usize,
        lanes: &mut [[Lanes; NR]; ROW_BLOCK],
        sums: &mut [[f32; NR]; ROW_BLOCK],
    ) {
        lanes[..self.task.rows].fill([Lanes([0.0; 16]); NR]);
        let full = width - width % P::STEP;
        // SAFETY: offsets stay in the ranges.
        unsafe {
            let x = self.x.as_ptr().add(start);
            let w = self.w.as_ptr().add(column * self.w_stride + start);
            for k in (0..full).step_by(DEPTH_BLOCK) {
                let depth = DEPTH_BLOCK.min(full - k);
                let strip =
                    Strip::<P> { x: x.add(k), x_stride: self.x_stride, w: w.add(k), w_stride: self.w_stride, depth };
                strip.accumulate::<S, MR, NR>(self.task.rows, columns, lanes);
            }
            if full < width {
                let mut x_end = [[P::X::from_f32(0.0); 32]; ROW_BLOCK];
                let mut w_end = [[P::W::from_f32(0.0); 32]; NR];
                for row in 0..self.task.rows {
                    x.add(row * self.x_stride + full).copy_to_nonoverlapping(x_end[row].as_mut_ptr(), width - full);
                }
                for c in 0..columns {
                    w.add(c * self.w_stride + full).copy_to_nonoverlapping(w_end[c].as_mut_ptr(), width - full);
                }
                let strip = Strip::<P> {
                    x: x_end.as_ptr().cast(),
                    x_stride: 32,
                    w: w_end.as_ptr().cast(),
                    w_stride: 32,
                    depth: P::STEP,
                };
                strip.accumulate::<S, MR, NR>(self.task.rows, columns, lanes);
            }
        }
        for row in 0..self.task.rows {
            for c in 0..columns {
                // SAFETY: the lanes are 16 f32.
                sums[row][c] = unsafe { S::sum(S::load(lanes[row][c].0.as_ptr())) };
            }
        }
    }
}

/// A part of the sums, a multiple of `P::STEP` long, of rows of x with a few rows of W.
struct Strip<P: Product> {
    x: *const P::X,
    x_stride: usize,
    w: *const P::W,
    w_stride: usize,
    depth: usize,
}

impl<P: Product> Strip<P> {
    /// # Safety
    /// The CPU has S; `depth` elements of `rows` rows of x and `columns` ≤ NR rows of W can be read.
    #[inline(always)]
    unsafe fn accumulate<S: Simd, const MR: usize, const NR: usize>(
        &self,
        rows: usize,
        columns: usize,
        lanes: &mut [[Lanes; NR]; ROW_BLOCK],
    ) {
        let mut row = 0;
        // SAFETY: `tile` gets rows below `rows` and columns below `columns`.
        unsafe {
            while row + MR <= rows {
                self.tiles::<S, MR, NR>(row, columns, lanes);
                row += MR;
            }
            while row + 2 <= rows {
                self.tiles::<S, 2, NR>(row, columns, lanes);
                row += 2;
            }
            if row < rows {
                self.tiles::<S, 1, NR>(row, columns, lanes);
            }
        }
    }

    /// # Safety
    /// As `accumulate`, for rows `row .. row + MR`.
    #[inline(always)]
    unsafe fn tiles<S: Simd, const MR: usize, const NR: usize>(
        &self,
        row: usize,
        columns: usize,
        lanes: &mut [[Lanes; NR]; ROW_BLOCK],
    ) {
        let mut x = [self.x; MR];
        let mut w = [self.w; NR];
        // SAFETY: by this method's contract; pointers of columns that do not exist are not read.
        unsafe {
            for r in 0..MR {
                x[r] = self.x.add((row + r) * self.x_stride);
            }
            for c in 0..columns {
                w[c] = self.w.add(c * self.w_stride);
            }
            if columns == NR {
                let mut sums = [[S::splat(0.0); NR]; MR];
                for r in 0..MR {
                    for c in 0..NR {
                        sums[r][c] = S::load(lanes[row + r][c].0.as_ptr());
                    }
                }
                tile::<S, P, MR, NR>(x, w, self.depth, &mut sums);
                for r in 0..MR {
                    for c in 0..NR {
                        S::store(lanes[row + r][c].0.as_mut_ptr(), sums[r][c]);
                    }
                }
            } else {
                for c in 0..columns {
                    let mut sums = [[S::splat(0.0)]; MR];
                    for r in 0..MR {
                        sums[r][0] = S::load(lanes[row + r][c].0.as_ptr());
                    }
                    tile::<S, P, MR, 1>(x, [w[c]], self.depth, &mut sums);
                    for r in 0..MR {
                        S::store(lanes[row + r][c].0.as_mut_ptr(), sums[r][0]);
                    }
                }
            }
        }
    }
}

/// sums[r][c] += x[r] · w[c] by lanes, over `depth` elements, a multiple of `P::STEP`.
///
/// # Safety
/// The CPU has S; `depth` elements can be read from every pointer.
#[inline(always)]
pub(super) unsafe fn tile<S: Simd, P: Product, const MR: usize, const NR: usize>(
    x: [*const P::X; MR],
    w: [*const P::W; NR],
    depth: usize,
    sums: &mut [[S::F32; NR]; MR],
) {
    for k in (0..depth).step_by(P::STEP) {
        // SAFETY: k + STEP ≤ depth.
        unsafe {
            let mut ws = [P::load_w::<S>(w[0].add(k)); NR];
            for c in 1..NR {
                ws[c] = P::load_w::<S>(w[c].add(k));
            }
            for r in 0..MR {
                let xs = P::load_x::<S>(x[r].add(k));
                for c in 0..NR {
                    sums[r][c] = P::mul_add::<S>(xs, ws[c], sums[r][c]);
                }
            }
        }
    }
}
