//! Arrays in zarr version 2 with raw chunks, as Megatron Core's distributed checkpoints have them.
//!
//! Every array is seen as [layers, rows, columns]: layers are stacked on the first axis, and an axis that an array does not have
//! counts 1. A chunk is a file of its own with an equal part of each axis, in row-major order.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::folder::map;
use super::{Block, CheckpointError, Dtype, Storage, Tensor};

/// The axes that an array has: 0 for layers, 1 for rows, 2 for columns.
pub(super) type Axes = &'static [usize];

pub(super) struct Array {
    directory: PathBuf,
    axes: Axes,
    pub(super) dtype: Dtype,
    /// [layers, rows, columns]
    pub(super) shape: [usize; 3],
    /// The same of one chunk; divides `shape`.
    chunk: [usize; 3],
}

/// The part of `.zarray` that decides what chunks mean.
#[derive(Deserialize)]
struct Metadata {
    zarr_format: u32,
    dtype: String,
    shape: Vec<usize>,
    chunks: Vec<usize>,
    compressor: Option<Value>,
    filters: Option<Value>,
    order: String,
    dimension_separator: Option<String>,
}

impl Array {
    pub(super) fn open(directory: PathBuf, axes: Axes) -> Result<Self, CheckpointError> {
        let file = directory.join(".zarray");
        let damaged = |problem: &str| Err(CheckpointError::damaged(&file, problem));
        let metadata: Metadata = serde_json::from_slice(map(&file)?.bytes())
            .map_err(|error| CheckpointError::damaged(&file, error.to_string()))?;
        if metadata.zarr_format != 2 || metadata.order != "C" {
            return damaged("it is not zarr version 2 in C order");
        }
        if metadata.compressor.is_some() || metadata.filters.is_some() {
            return damaged("its chunks are compressed or filtered, and only raw chunks can be read");
        }
        if metadata.dimension_separator.is_some_and(|separator| separator != ".") {
            return damaged("its dimension_separator is not a dot");
        }
        if metadata.shape.len() != axes.len() || metadata.chunks.len() != axes.len() {
            return damaged(&format!("it has {} axes instead of {}", metadata.shape.len(), axes.len()));
        }
        let dtype = match metadata.dtype.as_str() {
            "bfloat16" => Dtype::Bf16,
            "<f2" => Dtype::F16,
            "<f4" => Dtype::F32,
            _ => {
                let tensor = file_name(&directory);
                return Err(CheckpointError::Dtype { tensor, file, dtype: metadata.dtype });
            }
        };
        let (mut shape, mut chunk) = ([1; 3], [1; 3]);
        for (i, &axis) in axes.iter().enumerate() {
            shape[axis] = metadata.shape[i];
            chunk[axis] = metadata.chunks[i];
        }
        if (0..3).any(|axis| chunk[axis] == 0 || !shape[axis].is_multiple_of(chunk[axis])) {
            return damaged("its chunks do not divide its shape");
        }
        Ok(Self { directory, axes, dtype, shape, chunk })
    }

    /// The name of the array in the checkpoint.
    pub(super) fn name(&self) -> String {
        file_name(&self.directory)
    }

    /// The sizes of the axes that the array has.
    pub(super) fn stored_shape(&self) -> Vec<usize> {
        self.stored(self.shape).collect()
    }

    /// Checks the shape, then that every chunk file is there in its full size; returns the sizes of the files.
    pub(super) fn check(&self, expected: [usize; 3]) -> Result<Vec<(String, u64)>, CheckpointError> {
        if self.shape != expected {
            return Err(CheckpointError::Shape {
                tensor: self.name(),
                file: self.directory.clone(),
                found: self.stored_shape(),
                expected: self.stored(expected).collect(),
            });
        }
        let mut files = Vec::new();
        let [layers, rows, cols] = self.chunk_counts();
        for layer in 0..layers {
            for row in 0..rows {
                for col in 0..cols {
                    let file = self.chunk_file([layer, row, col]);
                    let metadata =
                        fs::metadata(&file).map_err(|source| CheckpointError::Io { path: file.clone(), source })?;
                    self.check_size(&file, metadata.len())?;
                    files.push((format!("{}/{}", self.name(), file_name(&file)), metadata.len()));
                }
            }
        }
        Ok(files)
    }

    /// Rows and columns of a layer. Without copying where a chunk holds whole rows; where columns are spread over chunks, as those of
    /// row-parallel matrices are, the rows are put together in memory.
    pub(super) fn matrix(&self, layer: usize) -> Result<Tensor, CheckpointError> {
        let [_, rows, cols] = self.shape;
        let [chunk_layers, chunk_rows, chunk_cols] = self.chunk;
        let [_, row_chunks, col_chunks] = self.chunk_counts();
        let (layer_chunk, size) = (layer / chunk_layers, self.dtype.size());
        let first_row = layer % chunk_layers * chunk_rows;
        let block = |storage, offset, rows| Block { storage, dtype: self.dtype, offset, rows, cols, stride: cols };

        if col_chunks == 1 {
            let blocks = (0..row_chunks)
                .map(|i| Ok(block(self.map_chunk([layer_chunk, i, 0])?, first_row * cols * size, chunk_rows)));
            return Ok(Tensor { blocks: blocks.collect::<Result<_, CheckpointError>>()? });
        }
        let mut bytes = Vec::with_capacity(rows * cols * size);
        for i in 0..row_chunks {
            let chunks = (0..col_chunks)
                .map(|j| self.map_chunk([layer_chunk, i, j]))
                .collect::<Result<Vec<_>, CheckpointError>>()?;
            for row in first_row..first_row + chunk_rows {
                let strip = row * chunk_cols * size..(row + 1) * chunk_cols * size;
                for chunk in &chunks {
                    bytes.extend_from_slice(&chunk.bytes()[strip.clone()]);
                }
            }
        }
        Ok(Tensor { blocks: vec![block(Storage::new(bytes), 0, rows)] })
    }

    /// How many chunks there are along layers, rows and columns.
    fn chunk_counts(&self) -> [usize; 3] {
        [0, 1, 2].map(|axis| self.shape[axis] / self.chunk[axis])
    }

    fn stored(&self, sizes: [usize; 3]) -> impl Iterator<Item = usize> {
        self.axes.iter().map(move |&axis| sizes[axis])
    }

    fn chunk_file(&self, index: [usize; 3]) -> PathBuf {
        let coordinates: Vec<_> = self.stored(index).map(|coordinate| coordinate.to_string()).collect();
        self.directory.join(coordinates.join("."))
    }

    fn map_chunk(&self, index: [usize; 3]) -> Result<Storage, CheckpointError> {
        let file = self.chunk_file(index);
        let storage = map(&file)?;
        self.check_size(&file, storage.bytes().len() as u64)?;
        Ok(storage)
    }

    fn check_size(&self, file: &Path, bytes: u64) -> Result<(), CheckpointError> {
        let expected = self.chunk.iter().product::<usize>() * self.dtype.size();
        if bytes == expected as u64 {
            return Ok(());
        }
        Err(CheckpointError::damaged(file, format!("it has {bytes} bytes instead of {expected}")))
    }
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
