//! Weights as a backend gets them: blocks of whole rows in memory that stays in place.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

/// Element type of stored weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dtype {
    Bf16,
    F16,
    F32,
}

impl Dtype {
    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            Self::Bf16 | Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// The elements that `bytes` are, widened.
    pub fn values(self, bytes: &[u8]) -> impl Iterator<Item = f32> {
        bytes.chunks_exact(self.size()).map(move |bytes| match (self, bytes) {
            (Self::Bf16, &[a, b]) => bf16::from_le_bytes([a, b]).to_f32(),
            (Self::F16, &[a, b]) => f16::from_le_bytes([a, b]).to_f32(),
            (Self::F32, &[a, b, c, d]) => f32::from_le_bytes([a, b, c, d]),
            _ => unreachable!("chunks have the size of an element"),
        })
    }
}

/// Bytes that stay in place and unchanged as long as a handle lives: a mapped file, or a part of the binary.
#[derive(Clone)]
pub struct Storage {
    bytes: Arc<dyn AsRef<[u8]> + Send + Sync>,
    is_file: bool,
}

impl Storage {
    pub fn new(bytes: impl AsRef<[u8]> + Send + Sync + 'static) -> Self {
        Self { bytes: Arc::new(bytes), is_file: false }
    }

    pub fn of_file(map: memmap2::Mmap) -> Self {
        Self { bytes: Arc::new(map), is_file: true }
    }

    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// Says that these bytes are not needed for now: a file's pages then no longer count as this process's memory. They are read again if they
    /// are used.
    pub fn set_aside(&self, range: Range<usize>) {
        if self.is_file && range.start < range.end {
            const PAGE: usize = 4096;
            let bytes = self.bytes();
            let start = range.start / PAGE * PAGE;
            let len = bytes[start..range.end].len();
            // SAFETY: the range lies inside a read-only map of a file, which this leaves as it is; a map begins at a page.
            unsafe { libc::madvise(bytes.as_ptr().add(start).cast_mut().cast(), len, libc::MADV_DONTNEED) };
        }
    }
}

/// `rows` × `cols` elements in row-major order, `stride` elements from row to row, from byte `offset` of `storage` on.
#[derive(Clone)]
pub struct Block {
    pub storage: Storage,
    pub dtype: Dtype,
    pub offset: usize,
    pub rows: usize,
    pub cols: usize,
    pub stride: usize,
}

impl Block {
    /// The bytes of one row, which need not be aligned to its elements.
    pub fn row(&self, row: usize) -> &[u8] {
        let start = self.offset + row * self.stride * self.dtype.size();
        &self.storage.bytes()[start..start + self.cols * self.dtype.size()]
    }

    /// The elements of one row, widened.
    pub fn values(&self, row: usize) -> impl Iterator<Item = f32> {
        self.dtype.values(self.row(row))
    }
}

/// A matrix [rows, cols] (a vector has one row) as blocks of whole rows, stacked.
#[derive(Clone)]
pub struct Tensor {
    pub blocks: Vec<Block>,
}

impl Tensor {
    pub fn rows(&self) -> usize {
        self.blocks.iter().map(|block| block.rows).sum()
    }

    pub fn cols(&self) -> usize {
        self.blocks.first().map_or(0, |block| block.cols)
    }

    /// All elements, widened: for small tensors.
    pub fn to_f32(&self) -> Vec<f32> {
        self.blocks.iter().flat_map(|block| (0..block.rows).flat_map(move |row| block.values(row))).collect()
    }

    /// Whether no element is NaN or infinite.
    pub fn is_finite(&self) -> bool {
        self.blocks.iter().all(|block| (0..block.rows).all(|row| block.values(row).all(f32::is_finite)))
    }

    /// The rows in `range`, without copying.
    pub fn slice_rows(&self, range: Range<usize>) -> Self {
        let mut blocks = Vec::new();
        let mut first = 0;
        for block in &self.blocks {
            let start = range.start.clamp(first, first + block.rows);
            let end = range.end.clamp(first, first + block.rows);
            if start < end {
                let offset = block.offset + (start - first) * block.stride * block.dtype.size();
                blocks.push(Block { offset, rows: end - start, ..block.clone() });
            }
            first += block.rows;
        }
        Self { blocks }
    }

    /// The columns in `range`, without copying.
    pub fn slice_cols(&self, range: Range<usize>) -> Self {
        let blocks = self
            .blocks
            .iter()
            .map(|block| Block {
                offset: block.offset + range.start * block.dtype.size(),
                cols: range.len(),
                ..block.clone()
            })
            .collect();
        Self { blocks }
    }

    /// The rows of `parts` one after another.
    pub fn stack(parts: impl IntoIterator<Item = Self>) -> Self {
        Self { blocks: parts.into_iter().flat_map(|part| part.blocks).collect() }
    }
}
