//! Weights and activations in host memory.

use bytemuck::Pod;
use memmap2::MmapMut;

use super::gemm::COLUMN_BLOCK;
use super::product::Element;
use crate::backend::{BackendError, ComputeType};
use crate::checkpoint::{Block, Dtype, Storage, Tensor};

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

/// A weight matrix [rows, cols], in panels of consecutive rows.
pub struct Matrix {
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) panels: Vec<Panel>,
}

/// At most [`COLUMN_BLOCK`] rows of a matrix, `stride` elements from row to row: in the checkpoint's memory if it can be used as it is.
pub(super) struct Panel {
    pub(super) first_row: usize,
    pub(super) rows: usize,
    pub(super) stride: usize,
    storage: Storage,
    offset: usize,
    /// The elements are bf16, else f32.
    pub(super) is_bf16: bool,
}

impl Panel {
    /// The elements, from the first of the first row on.
    pub(super) fn elements<T: Pod>(&self, cols: usize) -> &[T] {
        let len = (self.rows - 1) * self.stride + cols;
        bytemuck::cast_slice(&self.storage.bytes()[self.offset..self.offset + len * size_of::<T>()])
    }
}

impl Matrix {
    pub(super) fn new(tensor: &Tensor, compute: ComputeType) -> Result<Self, BackendError> {
        let cols = tensor.cols();
        let mut matrix = Self { rows: 0, cols, panels: Vec::new() };
        for block in tensor.blocks.iter().filter(|block| block.rows > 0) {
            assert_eq!(block.cols, cols, "blocks of a matrix have the same columns");
            let dtype = match (block.dtype, compute) {
                (Dtype::Bf16, _) | (_, ComputeType::Bf16) => Dtype::Bf16,
                (Dtype::F16 | Dtype::F32, ComputeType::F32) => Dtype::F32,
            };
            let first = block.storage.bytes().as_ptr().wrapping_add(block.offset);
            let in_place = dtype == block.dtype && first.align_offset(dtype.size()) == 0;
            let (storage, offset, stride) = if in_place {
                (block.storage.clone(), block.offset, block.stride)
            } else if dtype == Dtype::Bf16 {
                (converted::<u16>(block)?, 0, cols)
            } else {
                (converted::<f32>(block)?, 0, cols)
            };
            for row in (0..block.rows).step_by(COLUMN_BLOCK) {
                matrix.panels.push(Panel {
                    first_row: matrix.rows + row,
                    rows: COLUMN_BLOCK.min(block.rows - row),
                    stride,
                    storage: storage.clone(),
                    offset: offset + row * stride * dtype.size(),
                    is_bf16: dtype == Dtype::Bf16,
                });
            }
            matrix.rows += block.rows;
        }
        Ok(matrix)
    }

    /// Copies a row, widened.
    pub(super) fn widen_row(&self, row: usize, out: &mut [f32]) {
        fn widen<T: Element>(panel: &Panel, row: usize, out: &mut [f32]) {
            let elements = panel.elements::<T>(out.len());
            for (out, value) in out.iter_mut().zip(&elements[row * panel.stride..]) {
                *out = value.to_f32();
            }
        }
        let panel = &self.panels[self.panels.partition_point(|panel| panel.first_row <= row) - 1];
        let row = row - panel.first_row;
        if panel.is_bf16 { widen::<u16>(panel, row, out) } else { widen::<f32>(panel, row, out) }
    }
}

/// A copy of the block without gaps.
fn converted<T: Element>(block: &Block) -> Result<Storage, BackendError> {
    let mut copy = Aligned::<T>::zeroed(block.rows * block.cols, "a converted weight matrix")?;
    for (row, out) in copy.as_mut_slice().chunks_exact_mut(block.cols.max(1)).enumerate() {
        for (out, value) in out.iter_mut().zip(block.values(row)) {
            *out = T::from_f32(value);
        }
    }
    Ok(Storage::new(copy))
}
