//! Arrays in zarr version 2 with raw chunks, as Megatron Core's distributed checkpoints have them.
//!
//! Every array is seen as [layers, rows, columns]: layers are stacked on the first axis, and an axis that an array does not have
//! counts 1. A chunk is a file of its own with an equal part of each axis, in row-major order.

use serde::Deserialize;
use serde_json::Value;

use super::array::{Array, Axes};
use super::folder::{Folder, Member};
use super::{CheckpointError, DataFile, Dtype, StoredDtype};

/// What the metadata of an array says.
pub(super) struct ZarrHeader {
    directory: String,
    axes: Axes,
    dtype: StoredDtype,
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

impl ZarrHeader {
    /// Reads `directory/.zarray`; chunks are not looked for yet.
    pub(super) fn open(folder: &Folder, directory: String, axes: Axes) -> Result<Self, CheckpointError> {
        let name = format!("{directory}/.zarray");
        let file = folder.path(&name);
        let damaged = |problem: &str| Err(CheckpointError::damaged(&file, problem));
        let metadata: Metadata = serde_json::from_slice(&folder.require(&name)?.to_vec()?)
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
                let tensor = last(&directory).to_owned();
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
        Ok(Self { directory, dtype: StoredDtype::Plain(dtype), shape, chunk, axes })
    }

    /// Finds every chunk's file in its full size, once the shape is known to be that of the model; with the files' paths.
    ///
    /// Without `has_data`, files are taken to be there as the metadata says.
    pub(super) fn find_chunks(
        self,
        folder: &Folder,
        has_data: bool,
    ) -> Result<(Array, Vec<(String, u64)>), CheckpointError> {
        let bounds = [0, 1, 2].map(|axis| (0..=self.shape[axis]).step_by(self.chunk[axis]).collect::<Vec<_>>());
        let [layers, rows, cols] = [0, 1, 2].map(|axis| bounds[axis].len() - 1);
        let expected = self.chunk.iter().product::<usize>() * self.dtype.size();
        let (mut chunks, mut files) = (Vec::new(), Vec::new());
        for i in 0..layers * rows * cols {
            let index = [i / cols / rows, i / cols % rows, i % cols];
            let coordinates: Vec<_> = self.axes.iter().map(|&axis| index[axis].to_string()).collect();
            let name = format!("{}/{}", self.directory, coordinates.join("."));
            let path = folder.path(&name);
            let chunk = if has_data {
                folder.require(&name)?
            } else {
                Member { file: DataFile::on_disk(path.clone(), expected as u64), offset: 0, len: expected }
            };
            if chunk.len != expected {
                let problem = format!("it has {} bytes instead of {expected}", chunk.len);
                return Err(CheckpointError::damaged(path, problem));
            }
            if has_data {
                files.push((name, chunk.len as u64));
            }
            chunks.push(chunk);
        }
        let name = last(&self.directory).to_owned();
        Ok((Array { name, axes: self.axes, dtype: self.dtype, bounds, chunks }, files))
    }
}

/// Whether an array's directory has any chunk.
pub(super) fn has_chunks(folder: &Folder, directory: &str) -> Result<bool, CheckpointError> {
    Ok(folder.names(directory)?.iter().any(|name| name.starts_with(|first: char| first.is_ascii_digit())))
}

fn last(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}
