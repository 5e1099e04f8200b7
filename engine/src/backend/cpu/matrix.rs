//! Weights and activations in host memory.

use bytemuck::Pod;
use memmap2::MmapMut;

use super::simd::{Isa, Kernel, Simd, round_bf16, widen_bf16};
use super::threads::Pool;
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
        bytemuck::cast_slice(self.as_ref())
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
/// A word is an f32, or two bf16 of a row; what the last panel and the last word lack is zero.
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// The elements are bf16, else f32.
    pub(super) is_bf16: bool,
    /// Words of a row.
    pub(super) steps: usize,
    /// [panels, steps, PANEL]
    words: Aligned<u32>,
}

/// Rows of a panel.
pub(super) const PANEL: usize = 32;

/// Columns of y that are multiplied together: rows of W.
#[derive(Clone, Copy)]
pub(super) struct Panel<'a> {
    /// [steps, PANEL]
    pub(super) words: &'a [u32],
    /// At most [`PANEL`].
    pub(super) columns: usize,
}

impl Matrix {
    /// Packs a tensor by all threads of `pool`.
    pub(super) fn new(tensor: &Tensor, compute: ComputeType, isa: Isa, pool: &Pool) -> Result<Self, BackendError> {
        let (rows, cols) = (tensor.rows(), tensor.cols());
        assert!(tensor.blocks.iter().all(|block| block.cols == cols), "blocks of a matrix have the same columns");
        let is_bf16 = compute == ComputeType::Bf16 || tensor.blocks.iter().all(|block| block.dtype == Dtype::Bf16);
        let steps = if is_bf16 { cols.div_ceil(2) } else { cols };
        let panel_len = steps * PANEL;
        let mut words = Aligned::zeroed(rows.div_ceil(PANEL) * panel_len, "a weight matrix")?;
        pool.for_chunks(words.as_mut_slice(), panel_len.max(1), rows * cols, |panel, words| {
            let first = panel * PANEL;
            let sources: Vec<RowSource> =
                (first..rows.min(first + PANEL)).map(|row| RowSource::find(tensor, row)).collect();
            isa.run(Pack { sources: &sources, is_bf16, steps, words });
            for rows in sources.chunk_by(|a, b| std::ptr::eq(a.block, b.block)) {
                let (block, first, last) = (rows[0].block, rows[0].row, rows[rows.len() - 1].row);
                let (size, start) = (block.dtype.size(), block.offset);
                block
                    .storage
                    .set_aside(start + first * block.stride * size..start + (last * block.stride + block.cols) * size);
            }
        });
        Ok(Self { rows, cols, is_bf16, steps, words })
    }

    pub(super) fn num_panels(&self) -> usize {
        self.rows.div_ceil(PANEL)
    }

    pub(super) fn panel(&self, index: usize) -> Panel<'_> {
        let len = self.steps * PANEL;
        Panel { words: &self.words.as_slice()[index * len..][..len], columns: PANEL.min(self.rows - index * PANEL) }
    }

    /// Copies a row, widened.
    pub(super) fn widen_row(&self, row: usize, out: &mut [f32]) {
        let words = self.panel(row / PANEL).words.iter().skip(row % PANEL).step_by(PANEL);
        if self.is_bf16 {
            for (out, word) in out.chunks_mut(2).zip(words) {
                for (out, bits) in out.iter_mut().zip([*word as u16, (*word >> 16) as u16]) {
                    *out = widen_bf16(bits);
                }
            }
        } else {
            for (out, word) in out.iter_mut().zip(words) {
                *out = f32::from_bits(*word);
            }
        }
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

/// Packs one panel.
struct Pack<'a> {
    /// At most [`PANEL`] rows.
    sources: &'a [RowSource<'a>],
    is_bf16: bool,
    steps: usize,
    /// [steps, PANEL], zeros
    words: &'a mut [u32],
}

impl Kernel for Pack<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let Self { sources, is_bf16, steps, words } = self;
        assert!(words.len() == steps * PANEL && sources.len() <= PANEL);
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
        for (half, rows) in rows.chunks(16).enumerate() {
            for step in (0..steps).step_by(16) {
                let to = &mut words[step * PANEL + 16 * half..];
                let mut square = [[0_u8; 64]; 16];
                let mut from = [square[0].as_ptr().cast::<u32>(); 16];
                if rows.len() == 16 && rows.iter().all(|row| (step + 16) * 4 <= row.len()) && (step + 16) <= steps {
                    for (from, row) in from.iter_mut().zip(rows) {
                        *from = row[step * 4..][..64].as_ptr().cast();
                    }
                    assert!(15 * PANEL + 16 <= to.len());
                    // SAFETY: the CPU has S; 64 bytes can be read from every pointer, and the last word written is inside `to`.
                    unsafe { S::transpose(from, to.as_mut_ptr()) }
                } else {
                    for (square, row) in square.iter_mut().zip(rows) {
                        let rest = &row[(step * 4).min(row.len())..];
                        let len = rest.len().min(64);
                        square[..len].copy_from_slice(&rest[..len]);
                    }
                    for i in 0..16.min(steps - step) {
                        for (j, square) in square.iter().enumerate() {
                            let word = square.as_chunks::<4>().0[i];
                            to[i * PANEL + j] = u32::from_le_bytes(word);
                        }
                    }
                }
            }
        }
    }
}
