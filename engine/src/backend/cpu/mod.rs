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
#[cfg(target_arch = "x86_64")]
mod x86;

use std::cell::RefCell;

pub use self::elementwise::Norm;
pub use self::matrix::{Buffer, Matrix};

use self::attention::{Attention, Cache, Scratch};
use self::elementwise::RopeTable;
use self::gemm::{Gemm, Output, ROW_BLOCK, Task};
use self::matrix::Aligned;
use self::product::{Bf16, Element, F32, Product};
use self::simd::{Isa, round_bf16};
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
    /// Activations of the current product rounded to bf16.
    rounded: RefCell<Aligned<u16>>,
    /// (span, first token of the span) of the current attention's tasks.
    attention_tasks: RefCell<Vec<(usize, usize)>>,
}

/// Keys and values of one layer, each [pages, page_tokens, kv_heads, head_dim] with head_dim filled up to whole vectors.
pub struct KvCache {
    keys: Elements,
    values: Elements,
    page_tokens: usize,
}

/// Stored numbers in the type of the products' operands.
enum Elements {
    Bf16(Aligned<u16>),
    F32(Aligned<f32>),
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
            rounded: RefCell::new(Aligned::empty()),
            attention_tasks: RefCell::default(),
        })
    }

    fn multiply(&self, rows: usize, x: &Buffer, w: &Matrix, chunks: usize, relu2: bool, out: &mut Buffer) {
        assert!(x.width() == w.cols && out.width() == w.rows, "widths are those of the matrix");
        let (cols, x) = (w.cols, x.rows(rows));
        // An odd number of cache lines from row to row, so that rows do not compete for the same sets of a cache.
        let stride = (cols.div_ceil(32) | 1) * 32;
        let mut rounded = self.rounded.borrow_mut();
        let rounded = match self.compute {
            ComputeType::F32 => &mut [],
            ComputeType::Bf16 => rounded.at_least(rows * stride),
        };
        self.pool.for_chunks(rounded, stride, rows * cols, |row, rounded| {
            for (to, from) in rounded.iter_mut().zip(&x[row * cols..][..cols]) {
                *to = round_bf16(*from);
            }
        });

        let (compute, isa, rounded, out_stride) = (self.compute, self.isa, &*rounded, out.width());
        let out = Output::new(out.rows_mut(rows));
        let num_panels = w.panels.len();
        self.pool.run(rows.div_ceil(ROW_BLOCK) * num_panels, rows * w.rows * cols, &|index| {
            let (first_row, panel) = (index / num_panels * ROW_BLOCK, &w.panels[index % num_panels]);
            let rows = ROW_BLOCK.min(rows - first_row);
            let task = Task { first_row, rows, panel, cols, chunks, relu2, out, out_stride };
            match (compute, panel.is_bf16) {
                (ComputeType::Bf16, _) => isa.run(Gemm::<Bf16>::new(task, rounded, stride)),
                (ComputeType::F32, true) => isa.run(Gemm::<F32<u16>>::new(task, x, cols)),
                (ComputeType::F32, false) => isa.run(Gemm::<F32<f32>>::new(task, x, cols)),
            }
        });
    }

    /// Calls `op(i, row)` for the first `rows` rows of `out`.
    fn for_rows(&self, rows: usize, out: &mut Buffer, op: impl Fn(usize, &mut [f32]) + Sync) {
        let width = out.width();
        self.pool.for_chunks(out.rows_mut(rows), width, rows * width, op);
    }

    fn attend<P: Product>(
        &self,
        batch: &StepBatch,
        shape: &HeadShape,
        qkv: &Buffer,
        cache: Cache<P::W>,
        out: &mut Buffer,
    ) {
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
                isa.run(Attention::<P> {
                    q: &qkv[row * q_stride + kv_head * group * head_dim..],
                    q_stride,
                    tokens: tokens_per_task.min(span.num_tokens as usize - first_token),
                    group,
                    head_dim,
                    position: span.first_position as usize + first_token,
                    cache,
                    page_table: &batch.page_table[span.first_page as usize..][..span.num_pages as usize],
                    kv_heads,
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
}

impl Backend for CpuBackend {
    const CHOOSES: bool = false;
    type Matrix = Matrix;
    type Norm = Norm;
    type Buffer = Buffer;
    type Operand = Buffer;
    type KvCache = KvCache;

    fn matrix(&self, tensor: &Tensor) -> Result<Matrix, BackendError> {
        Matrix::new(tensor, self.compute)
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
        let len = num_pages * page_tokens * shape.kv_heads * attention::padded(shape.head_dim);
        let elements = || {
            Ok(match self.compute {
                ComputeType::Bf16 => Elements::Bf16(Aligned::zeroed(len, "the KV cache")?),
                ComputeType::F32 => Elements::F32(Aligned::zeroed(len, "the KV cache")?),
            })
        };
        Ok(KvCache { keys: elements()?, values: elements()?, page_tokens })
    }

    fn begin(&self, batch: &StepBatch) -> Result<Begun, BackendError> {
        Ok(Begun::Rows(batch.num_tokens()))
    }

    fn end(&self) -> Result<(), BackendError> {
        Ok(())
    }

    fn poll(&self) -> Result<bool, BackendError> {
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
        self.for_rows(rows, out, |row, out| {
            elementwise::layer_norm(&x[row * width..][..width], norm, eps, out);
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
        let positions = batch.spans.iter().map(|span| (span.first_position + span.num_tokens) as usize).max();
        let mut table = self.rope.borrow_mut();
        table.grow(positions.unwrap_or(0), shape);
        let table = &*table;
        let HeadShape { heads, kv_heads, head_dim, .. } = *shape;
        let width = qkv.width();
        let rows = qkv.rows_mut(batch.num_tokens());
        for span in &batch.spans {
            for token in 0..span.num_tokens as usize {
                let position = span.first_position as usize + token;
                let row = &mut rows[(span.first_row as usize + token) * width..][..width];
                let (qk, v) = row.split_at_mut((heads + kv_heads) * head_dim);
                for head in qk.chunks_exact_mut(head_dim) {
                    table.rotate(position, head);
                }
                let page =
                    batch.page_table[span.first_page as usize..][..span.num_pages as usize][position / kv.page_tokens];
                let slot = page as usize * kv.page_tokens + position % kv.page_tokens;
                kv.keys.store(slot, head_dim, &qk[heads * head_dim..]);
                kv.values.store(slot, head_dim, v);
            }
        }
    }

    fn attention(&self, batch: &StepBatch, shape: &HeadShape, qkv: &Buffer, kv: &KvCache, out: &mut Buffer) {
        let page_tokens = kv.page_tokens;
        match (&kv.keys, &kv.values) {
            (Elements::Bf16(keys), Elements::Bf16(values)) => {
                let cache = Cache { keys: keys.as_slice(), values: values.as_slice(), page_tokens };
                self.attend::<F32<u16>>(batch, shape, qkv, cache, out);
            }
            (Elements::F32(keys), Elements::F32(values)) => {
                let cache = Cache { keys: keys.as_slice(), values: values.as_slice(), page_tokens };
                self.attend::<F32<f32>>(batch, shape, qkv, cache, out);
            }
            _ => unreachable!("keys and values are made alike"),
        }
    }

    fn add(&self, rows: usize, x: &mut Buffer, y: &Buffer) {
        let (y, width) = (y.rows(rows), y.width());
        self.for_rows(rows, x, |row, x| {
            for (x, y) in x.iter_mut().zip(&y[row * width..][..width]) {
                *x += y;
            }
        });
    }

    fn gather_rows(&self, x: &Buffer, indices: &[u32], out: &mut Buffer) {
        let width = x.width();
        self.for_rows(indices.len(), out, |row, out| {
            let index = indices[row] as usize;
            out.copy_from_slice(&x.rows(index + 1)[index * width..]);
        });
    }

    fn choose(&self, _: &[Choice], _: usize, _: &mut Buffer, _: &mut Vec<Option<u32>>) -> Result<bool, BackendError> {
        Ok(false)
    }

    fn fetch<'a>(&self, rows: usize, x: &'a mut Buffer) -> Result<&'a mut [f32], BackendError> {
        Ok(x.rows_mut(rows))
    }
}

impl Elements {
    /// Stores the heads of one token.
    fn store(&mut self, slot: usize, head_dim: usize, heads: &[f32]) {
        fn copy<T: Element>(to: &mut [T], slot: usize, head_dim: usize, heads: &[f32]) {
            let padded = attention::padded(head_dim);
            let num_heads = heads.len() / head_dim;
            let to = &mut to[slot * num_heads * padded..][..num_heads * padded];
            for (to, from) in to.chunks_exact_mut(padded).zip(heads.chunks_exact(head_dim)) {
                for (to, from) in to.iter_mut().zip(from) {
                    *to = T::from_f32(*from);
                }
            }
        }
        match self {
            Self::Bf16(to) => copy(to.as_mut_slice(), slot, head_dim, heads),
            Self::F32(to) => copy(to.as_mut_slice(), slot, head_dim, heads),
        }
    }
}
