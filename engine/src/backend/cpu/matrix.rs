//! Weights and activations in host memory.

use std::sync::{Mutex, PoisonError};

use bytemuck::Pod;
use memmap2::MmapMut;

use super::simd::{Isa, Kernel, Simd, round_bf16, widen_bf16};
use super::threads::Pool;
use super::twelve_bits::{Exponents, STEP_BYTES};
use crate::backend::{BackendError, ComputeType};
use crate::checkpoint::{Block, Dtype, Tensor};

/// Zeroed memory of `len` elements on a page boundary. Pages are not touched until they are used: that is why it is a map of its own and not
/// the allocator's, which clears whatever it aligns.
pub(super) struct Aligned<T> {
    map: Option<MmapMut>,
    len: usize,
    _element: std::marker::PhantomData<T>,
}

impl<T: Pod> Aligned<T> {
    pub(super) const fn empty() -> Self {
        Self { map: None, len: 0, _element: std::marker::PhantomData }
    }

    /// `what` names the memory if there is not enough.
    pub(super) fn zeroed(len: usize, what: &'static str) -> Result<Self, BackendError> {
        if len == 0 {
            return Ok(Self::empty());
        }
        let bytes = len.saturating_mul(size_of::<T>());
        let map = MmapMut::map_anon(bytes).map_err(|_| BackendError::OutOfMemory { device: "host", what, bytes })?;
        // Where the kernel has none, small pages do.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Self { map: Some(map), len, _element: std::marker::PhantomData })
    }

    /// Makes room for `len` elements and returns them, with unspecified contents.
    pub(super) fn at_least(&mut self, len: usize) -> &mut [T] {
        if len > self.len {
            *self = Self::zeroed(len, "scratch memory").unwrap_or_else(|error| panic!("{error}"));
        }
        &mut self.as_mut_slice()[..len]
    }

    pub(super) fn as_slice(&self) -> &[T] {
        self.map.as_ref().map_or(&[], |map| bytemuck::cast_slice(&map[..self.len * size_of::<T>()]))
    }

    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        self.map.as_mut().map_or(&mut [], |map| bytemuck::cast_slice_mut(&mut map[..self.len * size_of::<T>()]))
    }
}

impl<T> AsRef<[u8]> for Aligned<T> {
    fn as_ref(&self) -> &[u8] {
        self.map.as_ref().map_or(&[], |map| &map[..self.len * size_of::<T>()])
    }
}

/// f32 activations [capacity, width].
pub struct Buffer {
    data: Aligned<f32>,
    width: usize,
}

impl Buffer {
    pub(super) fn new(capacity: usize, width: usize) -> Result<Self, BackendError> {
        Ok(Self { data: Aligned::zeroed(capacity * width, "an activation buffer")?, width })
    }

    pub fn width(&self) -> usize {
        self.width
    }

    pub fn capacity(&self) -> usize {
        self.data.len.checked_div(self.width).unwrap_or(0)
    }

    /// The first `rows` rows, [rows, width].
    pub fn rows(&self, rows: usize) -> &[f32] {
        &self.data.as_slice()[..rows * self.width]
    }

    /// The first `rows` rows for writing, [rows, width].
    pub fn rows_mut(&mut self, rows: usize) -> &mut [f32] {
        &mut self.data.as_mut_slice()[..rows * self.width]
    }
}

/// A weight matrix [rows, cols], packed for `gemm.rs`: panels of [`PANEL`] rows, in each the columns one after another, as words of 32 bits.
/// A word is an f32, or two bf16 of a row; the last word is filled with zero, the last panel with copies of the last row. A step is a word of
/// each row of a panel. Where it pays, steps of bf16 are encoded (`twelve_bits.rs`).
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The elements are bf16, else f32.
    pub(super) is_bf16: bool,
    /// Words of a row.
    steps: usize,
    exponents: Exponents,
    /// [panels, steps, STEP_BYTES], or nothing.
    codes: Aligned<u8>,
    /// Beside codes: the steps of each panel that are not encoded, in order.
    others: Vec<u32>,
    /// [panels + 1]: where each panel's begin.
    first_others: Vec<usize>,
    /// [others, PANEL] beside codes, else [panels, steps, PANEL].
    words: Aligned<u32>,
}

/// Rows of a panel.
pub(super) const PANEL: usize = 32;
/// Weights whose exponents are looked at before a matrix is encoded.
const SAMPLE: usize = 1 << 15;
/// A matrix is encoded if fewer than one of so many steps will have to be kept as they are.
const MIN_STEPS_PER_OTHER: f64 = 16.0;

/// Columns of y that are multiplied together: rows of W.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// At most [`PANEL`].
    pub(super) columns: usize,
    pub(super) steps: usize,
    pub(super) exponents: Exponents,
    /// [steps], or nothing.
    pub(super) codes: &'a [[u8; STEP_BYTES]],
    /// Beside codes: the steps that are not encoded, in order.
    pub(super) others: &'a [u32],
    /// [others] beside codes, else [steps].
    pub(super) words: &'a [[u32; PANEL]],
}

impl Panel<'_> {
    /// The words of a row.
    fn row(&self, row: usize) -> impl Iterator<Item = u32> {
        let mut others = self.others.iter().zip(self.words).peekable();
        (0..self.steps).map(move |step| {
            if self.codes.is_empty() {
                return self.words[step][row];
            }
            match others.next_if(|(other, _)| **other as usize == step) {
                Some((_, words)) => words[row],
                None => self.exponents.word(&self.codes[step], row),
            }
        })
    }
}

impl Matrix {
    /// Packs a tensor by all threads of `pool`.
    pub(super) fn new(tensor: &Tensor, compute: ComputeType, isa: Isa, pool: &Pool) -> Result<Self, BackendError> {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        assert!(tensor.blocks.iter().all(|block| block.cols == cols), "blocks of a matrix have the same columns");
        let is_bf16 = compute == ComputeType::Bf16 || tensor.blocks.iter().all(|block| block.dtype == Dtype::Bf16);
        let steps = if is_bf16 { cols.div_ceil(2) } else { cols };
        let num_panels = rows.div_ceil(PANEL);
        let (exponents, missing) = Exponents::choose(is_bf16.then(|| sample(tensor)).into_iter().flatten());
        let mut matrix = Self {
            rows,
            cols,
            is_bf16,
            steps,
            exponents,
            codes: Aligned::empty(),
            others: Vec::new(),
            first_others: vec![0; num_panels + 1],
            words: Aligned::empty(),
        };
        let pays = |others: f64| others * MIN_STEPS_PER_OTHER < 1.0;
        if is_bf16 && pays(missing * (2 * PANEL) as f64) {
            matrix.encode(tensor, isa, pool)?;
            if pays(matrix.others.len() as f64 / (num_panels * steps).max(1) as f64) {
                return Ok(matrix);
            }
            matrix.codes = Aligned::empty();
            matrix.others = Vec::new();
            matrix.first_others.fill(0);
        }
        let panel_len = steps * PANEL;
        let mut words = Aligned::zeroed(num_panels * panel_len, "a weight matrix")?;
        pool.for_chunks(words.as_mut_slice(), panel_len.max(1), rows * cols, |panel, words| {
            pack_panel(tensor, panel, is_bf16, isa, Target::Words(words.as_chunks_mut().0));
        });
        matrix.words = words;
        Ok(matrix)
    }

    /// Encodes all steps that can be.
    fn encode(&mut self, tensor: &Tensor, isa: Isa, pool: &Pool) -> Result<(), BackendError> {
        let (num_panels, panel_len) = (self.num_panels(), self.steps * STEP_BYTES);
        let mut codes = Aligned::zeroed(num_panels * panel_len, "a weight matrix")?;
        let others = Mutex::new(Vec::new());
        let exponents = self.exponents;
        pool.for_chunks(codes.as_mut_slice(), panel_len.max(1), self.rows * self.cols, |panel, codes| {
            let mut own = Vec::new();
            let codes = codes.as_chunks_mut().0;
            pack_panel(tensor, panel, true, isa, Target::Codes { exponents, codes, others: &mut own });
            let own = own.into_iter().map(|(step, words)| (panel, step, words));
            others.lock().unwrap_or_else(PoisonError::into_inner).extend(own);
        });
        let mut others = others.into_inner().unwrap_or_else(PoisonError::into_inner);
        others.sort_unstable_by_key(|(panel, step, _)| (*panel, *step));
        let mut words = Aligned::zeroed(others.len() * PANEL, "a weight matrix")?;
        for (to, (_, _, from)) in words.as_mut_slice().as_chunks_mut::<PANEL>().0.iter_mut().zip(&others) {
            *to = *from;
        }
        self.first_others = (0..=num_panels).map(|panel| others.partition_point(|other| other.0 < panel)).collect();
        self.others = others.iter().map(|(_, step, _)| *step).collect();
        (self.codes, self.words) = (codes, words);
        Ok(())
    }

    pub(super) fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        let steps = index * self.steps..(index + 1) * self.steps;
        let (codes, words) = (self.codes.as_slice().as_chunks().0, self.words.as_slice().as_chunks().0);
        let others = self.first_others[index]..self.first_others[index + 1];
        let is_encoded = !codes.is_empty();
        Panel {
            columns: PANEL.min(self.rows - index * PANEL),
            steps: self.steps,
            exponents: self.exponents,
            codes: if is_encoded { &codes[steps.clone()] } else { &[] },
            others: &self.others[others.clone()],
            words: &words[if is_encoded { others } else { steps }],
        }
    }

    /// Copies a row, widened.
    pub(super) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let panel = self.panel(row / PANEL);
        let words = panel.row(row % PANEL);
        if self.is_bf16 {
            for (out, word) in out.chunks_mut(2).zip(words) {
                for (out, bits) in out.iter_mut().zip([word as u16, (word >> 16) as u16]) {
                    *out = widen_bf16(bits);
                }
            }
        } else {
            for (out, word) in out.iter_mut().zip(words) {
                *out = f32::from_bits(word);
            }
        }
    }
}

/// Some whole rows from all over a matrix, rounded to bf16.
fn sample(tensor: &Tensor) -> impl Iterator<Item = u16> {
    let (rows, cols) = (tensor.rows(), tensor.cols().max(1));
    (0..rows).step_by(rows.div_ceil(SAMPLE.div_ceil(cols)).max(1)).flat_map(|row| {
        let RowSource { block, row } = RowSource::find(tensor, row);
        block.values(row).map(round_bf16)
    })
}

/// Where the steps of a panel go.
enum Target<'a> {
    Words(&'a mut [[u32; PANEL]]),
    /// What cannot be encoded is appended to `others`, with its step.
    Codes {
        exponents: Exponents,
        codes: &'a mut [[u8; STEP_BYTES]],
        others: &'a mut Vec<(u32, [u32; PANEL])>,
    },
}

/// Packs a panel, and says that its bytes are no longer needed.
fn pack_panel(tensor: &Tensor, panel: usize, is_bf16: bool, isa: Isa, target: Target) {
    let last = tensor.rows() - 1;
    let sources = std::array::from_fn(|i| RowSource::find(tensor, (panel * PANEL + i).min(last)));
    let steps = if is_bf16 { tensor.cols().div_ceil(2) } else { tensor.cols() };
    isa.run(Pack { sources: &sources, is_bf16, steps, target });
    for rows in sources.chunk_by(|a, b| std::ptr::eq(a.block, b.block)) {
        let (block, first, last) = (rows[0].block, rows[0].row, rows[rows.len() - 1].row);
        let (size, start) = (block.dtype.size(), block.offset);
        block.storage.set_aside(start + first * block.stride * size..start + (last * block.stride + block.cols) * size);
    }
}

/// A row of a tensor.
struct RowSource<'a> {
    block: &'a Block,
    row: usize,
}

impl<'a> RowSource<'a> {
    fn find(tensor: &'a Tensor, mut row: usize) -> Self {
        for block in &tensor.blocks {
            if row < block.rows {
                return Self { block, row };
            }
            row -= block.rows;
        }
        panic!("the row is one of the tensor's");
    }
}

/// Puts the words of each step of one panel together.
struct Pack<'a> {
    sources: &'a [RowSource<'a>; PANEL],
    is_bf16: bool,
    steps: usize,
    target: Target<'a>,
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { sources, is_bf16, steps, mut target } = self;
        // Rows that are there as they are needed, and copies of the others.
        let wanted = if is_bf16 { Dtype::Bf16 } else { Dtype::F32 };
        let converted: Vec<Vec<u8>> = sources
            .iter()
            .map(|source| match source.block.dtype == wanted {
                true => Vec::new(),
                false if is_bf16 => {
                    source.block.values(source.row).flat_map(|value| round_bf16(value).to_le_bytes()).collect()
                }
                false => source.block.values(source.row).flat_map(f32::to_le_bytes).collect(),
            })
            .collect();
        let rows: Vec<&[u8]> = sources
            .iter()
            .zip(&converted)
            .map(|(source, copy)| if copy.is_empty() { source.block.row(source.row) } else { copy })
            .collect();
        let mut block = [[0_u32; PANEL]; 16];
        for step in (0..steps).step_by(16) {
            for (half, rows) in rows.chunks(16).enumerate() {
                let mut square = [[0_u8; 64]; 16];
                let mut from = [square[0].as_ptr().cast::<u32>(); 16];
                if rows.iter().all(|row| (step + 16) * 4 <= row.len()) {
                    for (from, row) in from.iter_mut().zip(rows) {
                        *from = row[step * 4..][..64].as_ptr().cast();
                    }
                    let to = &mut block.as_flattened_mut()[16 * half..];
                    assert!(15 * PANEL + 16 <= to.len());
                    // SAFETY: the CPU has S; 64 bytes can be read from every pointer, and the last word written is inside `to`.
                    unsafe { S::transpose(from, to.as_mut_ptr()) }
                } else {
                    for (square, row) in square.iter_mut().zip(rows) {
                        let rest = &row[(step * 4).min(row.len())..];
                        let len = rest.len().min(64);
                        square[..len].copy_from_slice(&rest[..len]);
                    }
                    for (i, words) in block.iter_mut().enumerate() {
                        for (word, square) in words[16 * half..].iter_mut().zip(&square) {
                            *word = u32::from_le_bytes(square.as_chunks::<4>().0[i]);
                        }
                    }
                }
            }
            let len = 16.min(steps - step);
            match &mut target {
                Target::Words(words) => words[step..step + len].copy_from_slice(&block[..len]),
                Target::Codes { exponents, codes, others } => {
                    for (i, (words, codes)) in block.iter().zip(&mut codes[step..step + len]).enumerate() {
                        if !exponents.encode(words, codes) {
                            others.push(((step + i) as u32, *words));
                        }
                    }
                }
            }
        }
    }
}
