//! Arrays of a NeMo checkpoint: the tensors of one kind of all layers, stacked and cut into chunks, whatever file format the chunks have.

use super::folder::Member;
use super::{CheckpointError, Grid, StoredDtype, Tile};
use std::path::Path;
use std::sync::Arc;

/// The axes that an array has: 0 for layers, 1 for rows, 2 for columns. An axis that it does not have counts 1.
pub(super) type Axes = &'static [usize];

pub(super) const STACKED_MATRICES: Axes = &[0, 1, 2];
pub(super) const STACKED_VECTORS: Axes = &[0, 2];
pub(super) const MATRIX: Axes = &[1, 2];
pub(super) const VECTOR: Axes = &[2];

pub(super) struct Array {
    pub(super) name: String,
    pub(super) axes: Axes,
    pub(super) dtype: StoredDtype,
    /// Where chunks begin on the axes layers, rows and columns, and last where the axis ends.
    pub(super) bounds: [Vec<usize>; 3],
    /// Chunks in row-major order of their places, each with its elements in row-major order.
    pub(super) chunks: Vec<Member>,
}

impl Array {
    /// The sizes of the axes that the array has.
    pub(super) fn stored_shape(&self) -> Vec<usize> {
        self.axes.iter().map(|&axis| self.bounds[axis].last().copied().unwrap_or(0)).collect()
    }

    /// The matrix of a layer.
    pub(super) fn layer(&self, layer: usize) -> Grid {
        let [layers, rows, cols] = &self.bounds;
        let layer_chunk = layers.partition_point(|start| *start <= layer) - 1;
        let mut grid = Grid::new(self.dtype);
        for (row, row_bounds) in rows.windows(2).enumerate() {
            let num_rows = row_bounds[1] - row_bounds[0];
            let first = (layer_chunk * (rows.len() - 1) + row) * (cols.len() - 1);
            let tiles = cols.windows(2).zip(&self.chunks[first..]).map(|(col_bounds, chunk)| {
                let num_cols = col_bounds[1] - col_bounds[0];
                let skipped = (layer - layers[layer_chunk]) * num_rows * num_cols * self.dtype.size();
                Tile { file: Arc::clone(&chunk.file), offset: chunk.offset + skipped, cols: num_cols, stride: num_cols }
            });
            grid.push(num_rows, tiles.collect());
        }
        grid
    }
}

/// Refuses an array of another shape than [layers, rows, columns].
pub(super) fn check_shape(
    name: &str,
    axes: Axes,
    found: [usize; 3],
    expected: [usize; 3],
    file: &Path,
) -> Result<(), CheckpointError> {
    if found == expected {
        return Ok(());
    }
    let stored = |sizes: [usize; 3]| axes.iter().map(|&axis| sizes[axis]).collect();
    Err(CheckpointError::Shape {
        tensor: name.to_owned(),
        file: file.to_owned(),
        found: stored(found),
        expected: stored(expected),
    })
}
