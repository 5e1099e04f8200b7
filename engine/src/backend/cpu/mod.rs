//! The CPU backend, and the oracle for the others.
//!
//! A row's results have the same bits on every instruction set and with any number of threads, whatever rows are beside it, however
//! its prompt is split into steps and its sequence into pages; [`simd`] names the one exception.

#[expect(clippy::needless_range_loop, reason = "indices of a tile name elements of several arrays at once")]
mod attention;
mod ceiling;
mod elementwise;
#[expect(clippy::needless_range_loop, reason = "indices of a tile name elements of several arrays at once")]
mod gemm;
mod matrix;
mod product;
mod simd;
#[cfg(test)]
mod tests;
mod threads;
mod twelve_bits;
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::RefCell;

use half::f16;

pub use self::elementwise::Norm;
pub use self::matrix::{Buffer, Matrix};

use self::attention::{Attention, Cache, Layout, Scratch};
use self::elementwise::{Add, Append, LayerNorm, RopeTable, Round};
use self::gemm::{DECODED_STEPS, Gemm, Output, ROW_BLOCK, sums_len};
use self::matrix::{Aligned, PANEL};
use self::product::{Bf16, Cached, F32, Product, Widened};
use self::simd::Isa;
use self::threads::Pool;
use super::{Backend, BackendError, Begun, ComputeType, HeadShape, StepBatch};
use crate::checkpoint::Tensor;
use crate::request::Choice;

/// Runs the model on threads of this process, with the best instruction set of the CPU.
pub struct CpuBackend {
    compute: ComputeType,
    isa: Isa,
    pool: Pool,
    rope: RefCell<RopeTable>,
    /// x of the current product, in its type and with padding.
    operand: RefCell<Aligned<f32>>,
    /// (span, first token of the span) of the current attention's tasks.
    attention_tasks: RefCell<Vec<(usize, usize)>>,
}

/// Keys and values of one layer: f16 beside bf16 products, which keeps three bits more in as much memory, else f32.
pub struct KvCache(Stored);

enum Stored {
    F16(Pages<f16>),
    F32(Pages<f32>),
}

/// See [`Cache`].
struct Pages<E> {
    keys: Aligned<E>,
    values: Aligned<E>,
    layout: Layout,
}

impl CpuBackend {
    /// Fails if there is no thread to run on.
    pub fn new(threads: usize, compute: ComputeType) -> Result<Self, BackendError> {
        Self::with_isa(threads, compute, Isa::available()[0])
    }

    /// Threads that compute, the caller's among them.
    fn threads(&self) -> usize {
        self.pool.threads()
    }

    fn with_isa(threads: usize, compute: ComputeType, isa: Isa) -> Result<Self, BackendError> {
        let unavailable = |reason| BackendError::Unavailable { device: "cpu", reason };
        if threads == 0 {
            return Err(unavailable("it is given no threads".to_owned()));
        }
        let pool = Pool::new(threads).map_err(|error| unavailable(format!("cannot start a thread: {error}")))?;
        Ok(Self {
            compute,
            isa,
            pool,
            rope: RefCell::default(),
            operand: RefCell::new(Aligned::empty()),
            attention_tasks: RefCell::default(),
        })
    }

    fn multiply(&self, rows: usize, x: &Buffer, w: &Matrix, chunks: usize, relu2: bool, out: &mut Buffer) {
        match (self.compute, w.is_bf16) {
            (ComputeType::Bf16, _) => self.multiply_as::<Bf16>(rows, x, w, chunks, relu2, out),
            (ComputeType::F32, true) => self.multiply_as::<Widened>(rows, x, w, chunks, relu2, out),
            (ComputeType::F32, false) => self.multiply_as::<F32>(rows, x, w, chunks, relu2, out),
        }
    }

    fn multiply_as<P: Product>(
        &self,
        rows: usize,
        x: &Buffer,
        w: &Matrix,
        chunks: usize,
        relu2: bool,
        out: &mut Buffer,
    ) {
        assert!(x.width() == w.cols && out.width() == w.rows, "widths are those of the matrix");
        let (isa, cols, x, out_stride) = (self.isa, w.cols, x.rows(rows), out.width());
        // An odd number of cache lines from row to row, so that rows do not compete for the same sets of a cache.
        let line = 64 / size_of::<P::X>();
        let stride = (cols.div_ceil(line) | 1) * line;
        let mut operand = self.operand.borrow_mut();
        let operand = operand.at_least(rows * stride * size_of::<P::X>() / size_of::<f32>());
        let operand: &mut [P::X] = bytemuck::cast_slice_mut(operand);
        self.pool.for_chunks(operand, stride, rows * cols, |row, operand| {
            isa.run(Round { x: &x[row * cols..][..cols], out: operand });
        });

        let operand = &*operand;
        let out = Output::new(out.rows_mut(rows));
        let num_panels = w.num_panels();
        // Panels that follow each other, so that one task's end fetches the next one's beginning.
        let group = (num_panels / (8 * self.threads())).max(1);
        let num_groups = num_panels.div_ceil(group);
        self.pool.run(rows.div_ceil(ROW_BLOCK) * num_groups, rows * w.rows * cols, &|index| {
            let (first_row, first_panel) = (index / num_groups * ROW_BLOCK, index % num_groups * group);
            let rows = ROW_BLOCK.min(rows - first_row);
            PRODUCT.with_borrow_mut(|(sums, decoded)| {
                for panel in first_panel..num_panels.min(first_panel + group) {
                    isa.run(Gemm::<P> {
                        x: &operand[first_row * stride..],
                        x_stride: stride,
                        rows,
                        panel: w.panel(panel),
                        chunks,
                        relu2,
                        out,
                        first: first_row * out_stride + panel * PANEL,
                        out_stride,
                        sums: sums.at_least(sums_len(rows, chunks)),
                        decoded: decoded.at_least(DECODED_STEPS * PANEL).as_chunks_mut().0,
                    });
                }
            });
        });
    }

    fn append<E: Cached>(&self, batch: &StepBatch, shape: &HeadShape, qkv: &mut Buffer, pages: &mut Pages<E>) {
        let positions = batch.positions.iter().max().map_or(0, |position| *position as usize + 1);
        let mut table = self.rope.borrow_mut();
        table.grow(positions, shape);
        let table = &*table;
        let (isa, layout, width, num_tokens) = (self.isa, pages.layout, qkv.width(), batch.num_tokens());
        let (keys, values) = (Output::new(pages.keys.as_mut_slice()), Output::new(pages.values.as_mut_slice()));
        self.pool.for_chunks(qkv.rows_mut(num_tokens), width, num_tokens * width, |row, qkv| {
            let span = &batch.spans[batch.spans.partition_point(|span| span.first_row as usize <= row) - 1];
            let position = batch.positions[row] as usize;
            let page_table = &batch.page_table[span.first_page as usize..][..span.num_pages as usize];
            let (page, slot) = (page_table[position / layout.page_tokens] as usize, position % layout.page_tokens);
            isa.run(Append { table, shape, position, qkv, layout, page, slot, keys, values });
        });
    }

    /// Calls `op(i, row)` for the first `rows` rows of `out`.
    fn for_rows(&self, rows: usize, out: &mut Buffer, op: impl Fn(usize, &mut [f32]) + Sync) {
        let width = out.width();
        self.pool.for_chunks(out.rows_mut(rows), width, rows * width, op);
    }

    fn attend<E: Cached>(&self, batch: &StepBatch, shape: &HeadShape, qkv: &Buffer, cache: Cache<E>, out: &mut Buffer) {
        let HeadShape { heads, kv_heads, head_dim, .. } = *shape;
        let group = heads / kv_heads;
        let tokens_per_task = attention::tokens_per_task(group);
        let mut tasks = self.attention_tasks.borrow_mut();
        tasks.clear();
        let mut work = 0;
        for (index, span) in batch.spans.iter().enumerate() {
            let tokens = span.num_tokens as usize;
            tasks.extend((0..tokens).step_by(tokens_per_task).map(|first| (index, first)));
            work += tokens * (span.first_position as usize + tokens) * heads * head_dim;
        }

        let (tasks, isa) = (&*tasks, self.isa);
        let (q_stride, out_stride) = (qkv.width(), out.width());
        let num_tokens = batch.num_tokens();
        let qkv = qkv.rows(num_tokens);
        let out = Output::new(out.rows_mut(num_tokens));
        self.pool.run(tasks.len() * kv_heads, work, &|index| {
            let ((span, first_token), kv_head) = (tasks[index / kv_heads], index % kv_heads);
            let span = &batch.spans[span];
            let row = span.first_row as usize + first_token;
            SCRATCH.with_borrow_mut(|scratch| {
                isa.run(Attention::<E> {
                    q: &qkv[row * q_stride + kv_head * group * head_dim..],
                    q_stride,
                    tokens: tokens_per_task.min(span.num_tokens as usize - first_token),
                    group,
                    position: span.first_position as usize + first_token,
                    cache,
                    page_table: &batch.page_table[span.first_page as usize..][..span.num_pages as usize],
                    kv_head,
                    out,
                    first: row * out_stride + kv_head * group * head_dim,
                    out_stride,
                    scratch,
                });
            });
        });
    }
}

thread_local! {
    static SCRATCH: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
    /// Partial sums of products, and decoded weights.
    static PRODUCT: RefCell<(Aligned<f32>, Aligned<u32>)> = const { RefCell::new((Aligned::empty(), Aligned::empty())) };
}

impl Backend for CpuBackend {
    const CHOOSES: bool = false;
    type Matrix = Matrix;
    type Norm = Norm;
    type Buffer = Buffer;
    type Operand = Buffer;
    type KvCache = KvCache;

    fn matrix(&self, tensor: &Tensor) -> Result<Matrix, BackendError> {
        Matrix::new(tensor, self.compute, self.isa, &self.pool)
    }

    fn norm(&self, gamma: &Tensor, beta: &Tensor) -> Result<Norm, BackendError> {
        let scale = gamma.to_f32().into_iter().map(|gamma| 1.0 + gamma).collect();
        Ok(Norm { scale, shift: beta.to_f32() })
    }

    fn buffer(&self, capacity: usize, width: usize) -> Result<Buffer, BackendError> {
        Buffer::new(capacity, width)
    }

    fn operand(&self, capacity: usize, width: usize) -> Result<Buffer, BackendError> {
        Buffer::new(capacity, width)
    }

    fn kv_cache(&self, num_pages: usize, page_tokens: usize, shape: &HeadShape) -> Result<KvCache, BackendError> {
        let layout = Layout { page_tokens, kv_heads: shape.kv_heads, head_dim: shape.head_dim };
        Ok(KvCache(match self.compute {
            ComputeType::Bf16 => Stored::F16(Pages::new(num_pages, layout)?),
            ComputeType::F32 => Stored::F32(Pages::new(num_pages, layout)?),
        }))
    }

    fn begin(&self, batch: &StepBatch) -> Result<Begun, BackendError> {
        Ok(Begun::Rows(batch.num_tokens()))
    }

    fn end(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn close(&self) -> usize {
        0
    }

    fn poll(&self, _: Option<usize>) -> Result<bool, BackendError> {
        Ok(true)
    }

    fn embed(&self, table: &Matrix, first_id: u32, tokens: &[u32], out: &mut Buffer) {
        self.for_rows(tokens.len(), out, |row, out| {
            let index = tokens[row].wrapping_sub(first_id) as usize;
            if index < table.rows {
                table.widen_row(index, out);
            } else {
                out.fill(0.0);
            }
        });
    }

    fn layer_norm(&self, rows: usize, x: &Buffer, norm: &Norm, eps: f32, out: &mut Buffer) {
        let (x, width) = (x.rows(rows), x.width());
        let isa = self.isa;
        self.for_rows(rows, out, |row, out| {
            isa.run(LayerNorm { x: &x[row * width..][..width], norm, eps, out });
        });
    }

    fn linear(&self, rows: usize, x: &Buffer, w: &Matrix, out: &mut Buffer) {
        self.multiply(rows, x, w, 1, false, out);
    }

    fn linear_relu2(&self, rows: usize, x: &Buffer, w: &Matrix, out: &mut Buffer) {
        self.multiply(rows, x, w, 1, true, out);
    }

    fn linear_chunked(&self, rows: usize, x: &Buffer, w: &Matrix, chunks: usize, out: &mut Buffer) {
        self.multiply(rows, x, w, chunks, false, out);
    }

    fn rope_append(&self, batch: &StepBatch, shape: &HeadShape, qkv: &mut Buffer, kv: &mut KvCache) {
        match &mut kv.0 {
            Stored::F16(pages) => self.append(batch, shape, qkv, pages),
            Stored::F32(pages) => self.append(batch, shape, qkv, pages),
        }
    }

    fn attention(&self, batch: &StepBatch, shape: &HeadShape, qkv: &Buffer, kv: &KvCache, out: &mut Buffer) {
        match &kv.0 {
            Stored::F16(pages) => self.attend(batch, shape, qkv, pages.cache(), out),
            Stored::F32(pages) => self.attend(batch, shape, qkv, pages.cache(), out),
        }
    }

    fn add(&self, rows: usize, x: &mut Buffer, y: &Buffer) {
        let (isa, y, width) = (self.isa, y.rows(rows), y.width());
        self.for_rows(rows, x, |row, x| isa.run(Add { x, y: &y[row * width..][..width] }));
    }

    fn gather_rows(&self, x: &Buffer, indices: &[u32], out: &mut Buffer) {
        let width = x.width();
        self.for_rows(indices.len(), out, |row, out| {
            let index = indices[row] as usize;
            out.copy_from_slice(&x.rows(index + 1)[index * width..]);
        });
    }

    fn choose(&self, _: &[Choice], _: usize, _: &mut Buffer) -> bool {
        false
    }

    fn chosen(&self, _: usize, _: u32) -> Option<u32> {
        None
    }

    fn fetch<'a>(&self, rows: usize, x: &'a mut Buffer) -> Result<&'a mut [f32], BackendError> {
        Ok(x.rows_mut(rows))
    }
}

impl<E: Cached> Pages<E> {
    fn new(num_pages: usize, layout: Layout) -> Result<Self, BackendError> {
        Ok(Self {
            keys: Aligned::zeroed(num_pages * layout.keys_of_page(), "the KV cache")?,
            values: Aligned::zeroed(num_pages * layout.values_of_page(), "the KV cache")?,
            layout,
        })
    }

    fn cache(&self) -> Cache<'_, E> {
        Cache { keys: self.keys.as_slice(), values: self.values.as_slice(), layout: self.layout }
    }
}
