//! Where the elements of a matrix lie: bands of rows, each cut into tiles that lie in files.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use half::bf16;

use super::folder::map;
use super::fp8;
use super::{Block, CheckpointError, Dtype, Storage, Tensor};

/// A file with weights, mapped when its bytes are first asked for.
pub struct DataFile {
    path: PathBuf,
    bytes: u64,
    map: OnceLock<Storage>,
}

impl DataFile {
    /// A file of `bytes` bytes.
    pub fn on_disk(path: PathBuf, bytes: u64) -> Arc<Self> {
        Arc::new(Self { path, bytes, map: OnceLock::new() })
    }

    /// A file, or what stands for one, that is in memory already.
    pub fn in_memory(path: PathBuf, storage: Storage) -> Arc<Self> {
        Arc::new(Self { path, bytes: storage.bytes().len() as u64, map: OnceLock::from(storage) })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn num_bytes(&self) -> u64 {
        self.bytes
    }

    /// Its name in its folder.
    pub(super) fn name(&self) -> String {
        self.path.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// # Errors
    /// The file cannot be mapped, or has another size than when the checkpoint was opened.
    pub fn storage(&self) -> Result<Storage, CheckpointError> {
        if let Some(storage) = self.map.get() {
            return Ok(storage.clone());
        }
        let storage = map(&self.path)?;
        let found = storage.bytes().len() as u64;
        if found != self.bytes {
            let problem = format!("it has {found} bytes instead of {}", self.bytes);
            return Err(CheckpointError::damaged(&self.path, problem));
        }
        Ok(self.map.get_or_init(|| storage).clone())
    }
}

/// Element types that files have.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredDtype {
    Plain(Dtype),
    /// Eight bits, 4 of them exponent, no infinities; to be multiplied with a scale.
    F8E4M3,
}

impl StoredDtype {
    pub fn size(self) -> usize {
        match self {
            Self::Plain(dtype) => dtype.size(),
            Self::F8E4M3 => 1,
        }
    }

    /// Name for people.
    pub fn name(self) -> &'static str {
        match self {
            Self::Plain(Dtype::Bf16) => "bf16",
            Self::Plain(Dtype::F16) => "f16",
            Self::Plain(Dtype::F32) => "f32",
            Self::F8E4M3 => "f8_e4m3",
        }
    }
}

/// How stored numbers become weights.
#[derive(Clone)]
pub(super) enum Values {
    AsStored,
    /// The file has 1 + γ where the engine wants γ.
    OnePlus,
    /// Times a scale: one for all, or one a row.
    Scaled(Arc<[f32]>),
}

/// The columns of a band that lie in one file.
#[derive(Clone)]
pub struct Tile {
    pub file: Arc<DataFile>,
    /// Byte of the first element.
    pub offset: usize,
    pub cols: usize,
    /// Elements from row to row.
    pub stride: usize,
}

/// Consecutive rows of a matrix, as tiles from left to right.
#[derive(Clone)]
struct Band {
    rows: usize,
    tiles: Vec<Tile>,
}

/// A matrix [rows, cols] in files.
#[derive(Clone)]
pub struct Grid {
    dtype: StoredDtype,
    bands: Vec<Band>,
    values: Values,
}

/// Bytes of a file that follow one another.
#[derive(Clone)]
pub struct Extent {
    pub file: Arc<DataFile>,
    pub bytes: Range<usize>,
}

impl Grid {
    pub fn new(dtype: StoredDtype) -> Self {
        Self { dtype, bands: Vec::new(), values: Values::AsStored }
    }

    /// `rows` × `cols` elements that follow one another from byte `offset` on.
    pub fn contiguous(dtype: StoredDtype, file: Arc<DataFile>, offset: usize, [rows, cols]: [usize; 2]) -> Self {
        let mut grid = Self::new(dtype);
        grid.push(rows, vec![Tile { file, offset, cols, stride: cols }]);
        grid
    }

    /// Adds rows below those that are there. Their elements must be inside their files.
    pub fn push(&mut self, rows: usize, tiles: Vec<Tile>) {
        self.bands.push(Band { rows, tiles });
    }

    pub(super) fn with(self, values: Values) -> Self {
        Self { values, ..self }
    }

    pub fn rows(&self) -> usize {
        self.bands.iter().map(|band| band.rows).sum()
    }

    pub fn cols(&self) -> usize {
        self.bands.first().map_or(0, |band| band.tiles.iter().map(|tile| tile.cols).sum())
    }

    /// The files that have some of it.
    pub fn files(&self) -> impl Iterator<Item = &DataFile> {
        self.bands.iter().flat_map(|band| &band.tiles).map(|tile| &*tile.file)
    }

    /// Rows that lie at `ranges`, one range after another.
    pub fn select_rows(&self, ranges: impl IntoIterator<Item = Range<usize>>) -> Self {
        let mut selected = Self { dtype: self.dtype, bands: Vec::new(), values: self.values.clone() };
        for range in ranges {
            selected.bands.extend(self.cut(range, 0..self.cols()).map(|(_, band)| band));
        }
        selected
    }

    /// The rows of `parts`, which have the same columns and element type, one after another.
    pub fn stack(parts: impl IntoIterator<Item = Self>) -> Option<Self> {
        parts.into_iter().reduce(|mut all, part| {
            all.bands.extend(part.bands);
            all
        })
    }

    /// A part of the matrix in memory.
    ///
    /// # Errors
    /// A file cannot be mapped.
    pub fn part(&self, rows: Range<usize>, cols: Range<usize>) -> Result<Tensor, CheckpointError> {
        let blocks = self.cut(rows, cols).map(|(first_row, band)| self.block(first_row, &band));
        Ok(Tensor { blocks: blocks.collect::<Result<_, _>>()? })
    }

    /// The bytes of a part, or `None` if they are strips of longer rows.
    pub(super) fn extents(&self, rows: Range<usize>, cols: Range<usize>) -> Option<Vec<Extent>> {
        let mut extents = Vec::new();
        for (_, band) in self.cut(rows, cols) {
            for tile in band.tiles {
                if band.rows > 1 && tile.stride != tile.cols {
                    return None;
                }
                let bytes = tile.offset..tile.offset + band.rows * tile.cols * self.dtype.size();
                extents.push(Extent { file: tile.file, bytes });
            }
        }
        Some(extents)
    }

    /// The bands of a part, each with the row of the matrix that it begins with.
    fn cut(&self, rows: Range<usize>, cols: Range<usize>) -> impl Iterator<Item = (usize, Band)> {
        let size = self.dtype.size();
        let mut next_row = 0;
        self.bands.iter().filter_map(move |band| {
            let (band_start, band_end) = (next_row, next_row + band.rows);
            next_row = band_end;
            let (start, end) = (rows.start.clamp(band_start, band_end), rows.end.clamp(band_start, band_end));
            if start >= end {
                return None;
            }
            let mut next_col = 0;
            let tiles = band.tiles.iter().filter_map(|tile| {
                let (tile_start, tile_end) = (next_col, next_col + tile.cols);
                next_col = tile_end;
                let (left, right) = (cols.start.clamp(tile_start, tile_end), cols.end.clamp(tile_start, tile_end));
                let skipped = (start - band_start) * tile.stride + left - tile_start;
                (left < right).then(|| Tile {
                    offset: tile.offset + skipped * size,
                    cols: right - left,
                    ..tile.clone()
                })
            });
            Some((start, Band { rows: end - start, tiles: tiles.collect() }))
        })
    }

    /// A band in memory; `first_row` chooses its scales.
    fn block(&self, first_row: usize, band: &Band) -> Result<Block, CheckpointError> {
        if let (StoredDtype::Plain(dtype), Values::AsStored, [tile]) = (self.dtype, &self.values, &*band.tiles) {
            let Tile { offset, cols, stride, .. } = *tile;
            return Ok(Block { storage: tile.file.storage()?, dtype, offset, rows: band.rows, cols, stride });
        }
        let cols: usize = band.tiles.iter().map(|tile| tile.cols).sum();
        let storages = band.tiles.iter().map(|tile| tile.file.storage()).collect::<Result<Vec<_>, _>>()?;
        let size = self.dtype.size();
        let strips = |row: usize| {
            band.tiles.iter().zip(&storages).map(move |(tile, storage)| {
                &storage.bytes()[tile.offset + row * tile.stride * size..][..tile.cols * size]
            })
        };
        let (dtype, bytes) = match (self.dtype, &self.values) {
            (StoredDtype::Plain(dtype), Values::AsStored) => {
                let mut bytes = Vec::with_capacity(band.rows * cols * size);
                (0..band.rows).for_each(|row| strips(row).for_each(|strip| bytes.extend_from_slice(strip)));
                (dtype, bytes)
            }
            (StoredDtype::Plain(dtype), _) => {
                let mut bytes = Vec::with_capacity(band.rows * cols * Dtype::F32.size());
                for row in 0..band.rows {
                    for strip in strips(row) {
                        bytes.extend(dtype.values(strip).flat_map(|value| (value - 1.0).to_le_bytes()));
                    }
                }
                (Dtype::F32, bytes)
            }
            (StoredDtype::F8E4M3, values) => {
                let mut bytes = Vec::with_capacity(band.rows * cols * Dtype::Bf16.size());
                for row in 0..band.rows {
                    let scale = match values {
                        Values::Scaled(scales) => *scales.get(first_row + row).or(scales.first()).unwrap_or(&1.0),
                        _ => 1.0,
                    };
                    let table = fp8::scaled(scale).map(|value| bf16::from_f32(value).to_le_bytes());
                    strips(row).for_each(|strip| bytes.extend(strip.iter().flat_map(|code| table[*code as usize])));
                }
                (Dtype::Bf16, bytes)
            }
        };
        Ok(Block { storage: Storage::new(bytes), dtype, offset: 0, rows: band.rows, cols, stride: cols })
    }
}
