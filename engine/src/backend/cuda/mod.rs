//! The CUDA backend: the kernels of `nemotron-kernels` and cuBLASLt on one stream of one device.
//!
//! Products of generated tokens are memory-bound and go through our own kernel; products of prompts are compute-bound and go through
//! cuBLASLt. Which of them a row takes is a property of the row, and either computes a row alike whatever rows are beside it, so a
//! sequence's tokens do not depend on its batch. They may depend on the mesh: cuBLASLt adds in an order of its own.

mod blas;
mod ceiling;
mod device;
mod graphs;
pub(crate) mod libraries;
pub(crate) mod peers;
mod sample;
pub(crate) mod sizes;
mod step;
mod weights;

use std::cell::{OnceCell, RefCell};
use std::path::PathBuf;
use std::sync::Arc;

use nemotron_kernels::ops::{AddNorm, Attention, AttentionCombine, Embed, Gemm, GemmReduce, RopeAppend, Sizes, Store};
use nemotron_kernels::{Bf16, Ptr};

pub use self::device::{Device, Memory, Pinned};

use self::blas::{Blas, ROW_TILE, Shape};
use self::graphs::Graphs;
use self::sample::SampleData;
use self::step::StepData;
use self::weights::Uploader;
use super::{Backend, BackendError, Begun, ComputeType, HeadShape, NormTo, StepBatch};
use crate::checkpoint::Tensor;
use crate::request::Choice;
use crate::spec::Limits;

/// What decides how a device is used.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CudaOptions {
    /// Of the devices that the process sees.
    pub ordinal: usize,
    /// Where cuBLASLt and NCCL are looked for before the loader's own places.
    pub library_folders: Vec<PathBuf>,
    pub limits: Limits,
    /// Positions of a sequence at most.
    pub max_context: usize,
}

/// Runs the model on one device.
pub struct CudaBackend {
    device: Arc<Device>,
    blas: RefCell<Blas>,
    uploader: RefCell<Uploader>,
    step: RefCell<StepData>,
    sampling: RefCell<SampleData>,
    graphs: RefCell<Graphs>,
    /// Partial sums of products whose columns are cut into parts, f32; grows with the matrices that are loaded.
    partials: RefCell<Option<Memory>>,
    heads: OnceCell<HeadBuffers>,
    limits: Limits,
    max_context: usize,
}

/// A weight matrix [rows, cols], bf16.
pub struct Matrix {
    memory: Memory,
    rows: usize,
    cols: usize,
}

/// 1 + γ and β, f32 [hidden] each.
pub struct Norm {
    scale: Memory,
    shift: Memory,
}

/// f32 activations [capacity, width], with room for whole tiles of rows behind them.
pub struct Buffer {
    memory: Memory,
    width: usize,
    /// Where `fetch` puts rows.
    host: Option<Pinned>,
}

/// bf16 activations [capacity, width], with room for whole tiles of rows behind them.
pub struct Operand {
    memory: Memory,
    width: usize,
}

/// Keys and values of one layer, bf16 [pages, kv_heads, 2, page_tokens, head_dim].
pub struct KvCache {
    memory: Memory,
    page_tokens: usize,
}

/// What attention needs besides the caches; one for all layers.
struct HeadBuffers {
    /// Cosines and sines, f32 [positions, rotary_dim].
    rope: Memory,
    /// Rotated queries, bf16 [rows, heads · head_dim].
    q: Memory,
    sums: Memory,
    stats: Memory,
}

impl CudaBackend {
    /// Opens the device, loads the kernels, and makes room for the largest step.
    ///
    /// # Errors
    /// No usable device or library, or no memory.
    pub fn new(options: &CudaOptions, compute: ComputeType) -> Result<Self, BackendError> {
        if compute == ComputeType::F32 {
            return Err(libraries::unavailable("it computes in bf16 only, not in f32".into()));
        }
        let device = Device::open(options.ordinal, &options.library_folders)?;
        let blas = Blas::new(&device, &options.library_folders)?;
        Ok(Self {
            blas: RefCell::new(blas),
            uploader: RefCell::new(Uploader::new(&device)?),
            step: RefCell::new(StepData::new(&device, options)?),
            sampling: RefCell::new(SampleData::new(&device, &options.limits)?),
            graphs: RefCell::default(),
            partials: RefCell::new(None),
            heads: OnceCell::new(),
            limits: options.limits,
            max_context: options.max_context,
            device,
        })
    }

    pub fn device(&self) -> &Arc<Device> {
        &self.device
    }

    /// Where the token that was chosen last for each slot is, and the number of slots.
    pub(crate) fn choices(&self) -> (u64, usize) {
        self.sampling.borrow().choices()
    }

    /// # Errors
    /// Less than `bytes` of the device's memory are free.
    pub fn check_room(&self, bytes: u64) -> Result<(), BackendError> {
        let (free, _) = self.device.memory()?;
        match bytes > free as u64 {
            true => Err(BackendError::NoRoom { device: "CUDA", bytes, free: free as u64 }),
            false => Ok(()),
        }
    }

    fn multiply(&self, rows: usize, x: &Operand, w: &Matrix, chunks: usize, store: Store, out: u64) {
        assert!(x.width == w.cols, "the operand's width is that of the matrix");
        let first_prompt = self.step.borrow().first_prompt_row().min(rows);
        // Address of a row of x and of the result.
        let from = |row: usize| x.memory.pointer() + (row * w.cols * 2) as u64;
        let to = |row: usize| out + (row * w.rows * element_bytes(store)) as u64;
        let (partials, room) = self.partials();

        let parts = Gemm::parts(w.rows as u32, w.cols as u32, chunks as u32);
        let block = if parts == 1 { first_prompt } else { room / (parts as usize * w.rows) };
        for row in (0..first_prompt).step_by(block.max(1)) {
            let rows = block.min(first_prompt - row);
            self.multiply_few(rows, from(row), w, parts, store, if parts == 1 { to(row) } else { partials });
            if parts > 1 {
                self.reduce(parts, rows * w.rows, partials, store, to(row));
            }
        }

        let max_rows = self.limits.max_step_tokens;
        let block = if store == Store::F32 { max_rows } else { room / w.rows / ROW_TILE * ROW_TILE };
        for row in (first_prompt..rows).step_by(block) {
            let rows = block.min(rows - row);
            let sums = if store == Store::F32 { to(row) } else { partials };
            let shape = Shape { rows: w.rows, cols: w.cols, capacity: max_rows.next_multiple_of(ROW_TILE) };
            let answer = self.blas.borrow_mut().multiply(shape, rows, from(row), w.memory.pointer(), sums);
            self.device.note_failure(answer);
            if store != Store::F32 {
                self.reduce(1, rows * w.rows, sums, store, to(row));
            }
        }
    }

    /// Our own kernel: weights are read once for all rows.
    fn multiply_few(&self, rows: usize, x: u64, w: &Matrix, parts: u32, store: Store, out: u64) {
        let gemm = Gemm {
            x: Ptr::new(x),
            w: Ptr::new(w.memory.pointer()),
            out: Ptr::new(out),
            rows: rows as u32,
            n: w.rows as u32,
            cols: w.cols as u32,
            parts,
            store: store as u32,
            reserved: 0,
        };
        // SAFETY: the operand has as many rows, and `out` has room for `parts` results.
        unsafe { self.device.launch(&gemm.launch()) };
    }

    fn reduce(&self, parts: u32, count: usize, partials: u64, store: Store, out: u64) {
        let (partials, out) = (Ptr::new(partials), Ptr::new(out));
        let reduce = GemmReduce { partials, out, count: count as u64, parts, store: store as u32 };
        // SAFETY: `parts` results of `count` elements were put there, and `out` has room for one.
        unsafe { self.device.launch(&reduce.launch()) };
    }

    /// Address and number of elements.
    fn partials(&self) -> (u64, usize) {
        self.partials.borrow().as_ref().map_or((0, 0), |memory| (memory.pointer(), memory.bytes() / 4))
    }

    /// Makes room for the partial sums of a product with a [rows, cols] matrix.
    fn reserve_partials(&self, rows: usize, cols: usize) -> Result<(), BackendError> {
        let bytes = sizes::partials(&self.limits, rows, cols);
        let mut partials = self.partials.borrow_mut();
        if partials.as_ref().is_none_or(|memory| memory.bytes() < bytes) {
            // The old one first, so that there is room.
            *partials = None;
            *partials = Some(self.device.allocate("partial sums", bytes)?);
        }
        Ok(())
    }

    fn add_then_norm(&self, rows: usize, x: &Buffer, y: Option<&Buffer>, norm: Option<NormTo<'_, Self>>) {
        let (scale, shift, out, eps) = norm.map_or((Ptr::NULL, Ptr::NULL, Ptr::NULL, 0.0), NormTo::addresses);
        let add_norm = AddNorm {
            x: Ptr::new(x.address()),
            y: y.map_or(Ptr::NULL, |y| Ptr::new(y.address())),
            indices: Ptr::NULL,
            scale,
            shift,
            out,
            rows: rows as u32,
            hidden: x.width as u32,
            eps,
            reserved: 0,
        };
        // SAFETY: the buffers have as many rows of this width.
        unsafe { self.device.launch(&add_norm.launch()) };
    }

    fn head_buffers(&self, shape: &HeadShape) -> Result<&HeadBuffers, BackendError> {
        if self.heads.get().is_none() {
            self.step.borrow_mut().set_heads(shape);
            let rope = self.upload_f32("the table of rotations", &rope_table(shape, self.max_context))?;
            let [q, sums, stats] = sizes::attention(&self.limits, self.max_context, shape);
            let buffers = HeadBuffers {
                rope,
                q: self.device.allocate("queries", q)?,
                sums: self.device.allocate("partial sums of attention", sums)?,
                stats: self.device.allocate("partial sums of attention", stats)?,
            };
            _ = self.heads.set(buffers);
        }
        Ok(self.heads.get().expect("set above"))
    }

    fn upload_f32(&self, what: &'static str, values: &[f32]) -> Result<Memory, BackendError> {
        let memory = self.device.allocate(what, size_of_val(values))?;
        self.uploader.borrow_mut().upload(bytemuck::cast_slice(values), &memory)?;
        Ok(memory)
    }
}

impl Backend for CudaBackend {
    const CHOOSES: bool = true;
    type Matrix = Matrix;
    type Norm = Norm;
    type Buffer = Buffer;
    type Operand = Operand;
    type KvCache = KvCache;

    fn matrix(&self, tensor: &Tensor) -> Result<Matrix, BackendError> {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        self.reserve_partials(rows, cols)?;
        let memory = self.device.allocate("a weight matrix", rows * cols * 2)?;
        self.uploader.borrow_mut().upload_bf16(tensor, &memory)?;
        Ok(Matrix { memory, rows, cols })
    }

    fn norm(&self, gamma: &Tensor, beta: &Tensor) -> Result<Norm, BackendError> {
        let scale: Vec<f32> = gamma.to_f32().into_iter().map(|gamma| 1.0 + gamma).collect();
        Ok(Norm { scale: self.upload_f32("a norm", &scale)?, shift: self.upload_f32("a norm", &beta.to_f32())? })
    }

    fn buffer(&self, capacity: usize, width: usize) -> Result<Buffer, BackendError> {
        let memory = self.device.allocate("an activation buffer", sizes::buffers(capacity, width, 0))?;
        Ok(Buffer { memory, width, host: None })
    }

    fn operand(&self, capacity: usize, width: usize) -> Result<Operand, BackendError> {
        let memory = self.device.allocate("an activation buffer", sizes::buffers(capacity, 0, width))?;
        Ok(Operand { memory, width })
    }

    fn kv_cache(&self, num_pages: usize, page_tokens: usize, shape: &HeadShape) -> Result<KvCache, BackendError> {
        let sizes = Sizes {
            hidden: 8,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            ffn: 8,
            chunks: 1,
        };
        sizes.check().map_err(|error| libraries::unavailable(error.to_string()))?;
        self.head_buffers(shape)?;
        let bytes = num_pages * page_tokens * shape.kv_heads * shape.head_dim * 2 * 2;
        Ok(KvCache { memory: self.device.allocate("the KV cache", bytes)?, page_tokens })
    }

    fn begin(&self, batch: &StepBatch) -> Result<Begun, BackendError> {
        self.device.bind()?;
        let mut step = self.step.borrow_mut();
        step.begin(&self.device, batch)?;
        self.sampling.borrow_mut().begin(step.turn());
        if let Some(shape) = step.shape()
            && self.graphs.borrow_mut().replay(&self.device, shape)?
        {
            return Ok(Begun::Done);
        }
        Ok(Begun::Rows(step.num_rows()))
    }

    fn end(&self) -> Result<(), BackendError> {
        self.graphs.borrow_mut().end(&self.device)
    }

    fn close(&self) -> usize {
        let step = self.step.borrow();
        self.sampling.borrow_mut().download(&self.device);
        self.device.mark(step.done(step.turn()));
        step.turn()
    }

    fn poll(&self, step: Option<usize>) -> Result<bool, BackendError> {
        match step {
            Some(turn) => self.device.poll_for(self.step.borrow().done(turn)),
            None => self.device.poll(),
        }
    }

    fn embed(&self, table: &Matrix, first_id: u32, _: &[u32], out: &mut Buffer) {
        let step = self.step.borrow();
        let embed = Embed {
            tokens: step.tokens(),
            chosen: Ptr::new(self.choices().0),
            table: Ptr::new(table.memory.pointer()),
            x: Ptr::new(out.memory.pointer()),
            rows: step.num_rows() as u32,
            hidden: table.cols as u32,
            first_id,
            vocab: table.rows as u32,
        };
        // SAFETY: the step's tokens are on the device, and `out` has as many rows.
        unsafe { self.device.launch(&embed.launch()) };
    }

    fn layer_norm(&self, rows: usize, x: &Buffer, norm: &Norm, eps: f32, out: &mut Operand) {
        self.add_then_norm(rows, x, None, Some(NormTo { norm, eps, out }));
    }

    fn linear(&self, rows: usize, x: &Operand, w: &Matrix, out: &mut Buffer) {
        self.multiply(rows, x, w, 1, Store::F32, out.memory.pointer());
    }

    fn linear_relu2(&self, rows: usize, x: &Operand, w: &Matrix, out: &mut Operand) {
        self.multiply(rows, x, w, 1, Store::Relu2Bf16, out.memory.pointer());
    }

    fn linear_chunked(&self, rows: usize, x: &Operand, w: &Matrix, chunks: usize, out: &mut Buffer) {
        self.multiply(rows, x, w, chunks, Store::F32, out.memory.pointer());
    }

    fn rope_append(&self, _: &StepBatch, shape: &HeadShape, qkv: &mut Buffer, kv: &mut KvCache) {
        let (step, heads) = (self.step.borrow(), self.heads.get().expect("a cache was made"));
        let rope = RopeAppend {
            qkv: Ptr::new(qkv.memory.pointer()),
            rope: Ptr::new(heads.rope.pointer()),
            positions: step.positions(0),
            first_pages: step.first_pages(0),
            page_table: step.page_table(),
            q: Ptr::new(heads.q.pointer()),
            kv: Ptr::new(kv.memory.pointer()),
            rows: step.num_rows() as u32,
            heads: shape.heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            rotary_dim: shape.rotary_dim as u32,
            page_tokens: kv.page_tokens as u32,
        };
        // SAFETY: all of them have room for the step; pages of the table are inside the cache, as the scheduler hands them out.
        unsafe { self.device.launch(&rope.launch()) };
    }

    fn attention(&self, _: &StepBatch, shape: &HeadShape, _: &Buffer, kv: &KvCache, out: &mut Operand) {
        let (step, heads) = (self.step.borrow(), self.heads.get().expect("a cache was made"));
        let width = (shape.heads * shape.head_dim * 2) as u64;
        for group in step.groups() {
            let row = group.first_row as u64;
            let attention = Attention {
                q: Ptr::new(heads.q.pointer() + row * width),
                kv: Ptr::new(kv.memory.pointer()),
                page_table: step.page_table(),
                tiles: Ptr::new(group.tiles),
                positions: step.positions(group.first_row),
                first_pages: step.first_pages(group.first_row),
                out: Ptr::new(out.memory.pointer() + row * width),
                sums: Ptr::new(heads.sums.pointer()),
                stats: Ptr::new(heads.stats.pointer()),
                num_tiles: group.num_tiles,
                heads: shape.heads as u32,
                kv_heads: shape.kv_heads as u32,
                head_dim: shape.head_dim as u32,
                page_tokens: kv.page_tokens as u32,
                splits: group.splits,
            };
            // SAFETY: a group's rows times its splits are within the room for partial sums.
            unsafe { self.device.launch(&attention.launch()) };
            if group.splits > 1 {
                let combine = AttentionCombine {
                    sums: attention.sums,
                    stats: attention.stats,
                    positions: attention.positions,
                    out: attention.out,
                    rows: group.num_rows,
                    heads: attention.heads,
                    head_dim: attention.head_dim,
                    splits: group.splits,
                };
                // SAFETY: as above.
                unsafe { self.device.launch(&combine.launch()) };
            }
        }
    }

    fn add(&self, rows: usize, x: &mut Buffer, y: &Buffer) {
        self.add_then_norm(rows, x, Some(y), None);
    }

    fn add_norm(&self, rows: usize, x: &mut Buffer, y: &Buffer, norm: Option<NormTo<'_, Self>>) {
        self.add_then_norm(rows, x, Some(y), norm);
    }

    fn gather_rows(&self, x: &Buffer, indices: &[u32], out: &mut Buffer) {
        let gather =
            self.step.borrow_mut().gather(&self.device, indices, x.memory.pointer(), out.memory.pointer(), x.width);
        // SAFETY: indices are rows of the step, and `out` has room for as many.
        unsafe { self.device.launch(&gather.launch()) };
    }

    fn choose(&self, choices: &[Choice], vocab: usize, logits: &mut Buffer) -> bool {
        self.sampling.borrow_mut().choose(&self.device, choices, vocab, (logits.address(), logits.width))
    }

    fn chosen(&self, step: usize, slot: u32) -> Option<u32> {
        self.sampling.borrow().token(step, slot)
    }

    fn fetch<'a>(&self, rows: usize, x: &'a mut Buffer) -> Result<&'a mut [f32], BackendError> {
        let len = rows * x.width;
        let host = match x.host.take() {
            Some(host) => host,
            None => self.device.allocate_pinned("rows for the host", x.memory.bytes())?,
        };
        let host = x.host.insert(host);
        self.device.download(&x.memory, 0, len * 4, host, 0);
        self.device.wait()?;
        Ok(host.slice_mut(len))
    }
}

impl Buffer {
    /// Address of the first row on the device.
    pub fn address(&self) -> u64 {
        self.memory.pointer()
    }

    /// Elements of a row.
    pub fn width(&self) -> usize {
        self.width
    }
}

impl NormTo<'_, CudaBackend> {
    /// 1 + γ, β, the result, and ε.
    fn addresses(self) -> (Ptr<f32>, Ptr<f32>, Ptr<Bf16>, f32) {
        let Self { norm, eps, out } = self;
        (Ptr::new(norm.scale.pointer()), Ptr::new(norm.shift.pointer()), Ptr::new(out.memory.pointer()), eps)
    }
}

fn element_bytes(store: Store) -> usize {
    match store {
        Store::F32 => 4,
        Store::Bf16 | Store::Relu2Bf16 => 2,
    }
}

/// rotary_dim / 2 cosines, then as many sines, of position · θ^(−2i / rotary_dim).
fn rope_table(shape: &HeadShape, positions: usize) -> Vec<f32> {
    let half = shape.rotary_dim / 2;
    let angle =
        |position: usize, i: usize| position as f64 * shape.rope_theta.powf(-2.0 * i as f64 / shape.rotary_dim as f64);
    let row = |position| {
        let cosines = (0..half).map(move |i| angle(position, i).cos() as f32);
        cosines.chain((0..half).map(move |i| angle(position, i).sin() as f32))
    };
    (0..positions).flat_map(row).collect()
}
