//! Which bytes a rank reads of a checkpoint, and reading them: in the order of the files, in large pieces, several at a time.
//!
//! Weights are used where they are mapped, so reading means to bring them into the page cache and into this process' page tables before
//! they are used. A fault for each page, as a plain map has them, is many times slower on a network file system. The ranks of a node
//! share the page cache: where a rank's own part of a matrix are strips of its rows, each rank reads an equal run of whole rows instead,
//! so that together they read every byte once.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};

use super::manifest::{BLOCK_BYTES, Manifest};
use super::{CheckpointError, CheckpointSource, Extent, TensorName};
use crate::config::Mesh;

/// Reads that are under way at the same time: enough to keep a parallel file system busy.
const IN_FLIGHT: usize = 8;

/// The bytes that one rank reads.
pub struct ReadingPlan {
    /// Sorted by file in the order of use, then by place; they do not touch each other.
    extents: Vec<Extent>,
}

impl ReadingPlan {
    /// # Errors
    /// A tensor cannot be located.
    pub fn of_rank(source: &dyn CheckpointSource, mesh: Mesh, rank: usize) -> Result<Self, CheckpointError> {
        let config = source.config();
        let mut extents = Vec::new();
        for name in TensorName::of_rank(config, mesh, rank) {
            // All ranks of a stage need the norms; one brings them into the cache.
            if name.is_replicated() && mesh.tp_rank(rank) > 0 {
                continue;
            }
            let grid = source.grid(name)?;
            let [rows, cols] = name.shard(config, mesh, rank);
            let own = grid.extents(rows, cols);
            let share = || {
                let [rows, cols] = name.shape(config);
                let (tp, tp_rank) = (mesh.tp, mesh.tp_rank(rank));
                grid.extents(tp_rank * rows / tp..(tp_rank + 1) * rows / tp, 0..cols).unwrap_or_default()
            };
            extents.extend(own.unwrap_or_else(share));
        }
        Ok(Self { extents: merge(extents) })
    }

    pub fn extents(&self) -> &[Extent] {
        &self.extents
    }

    pub fn num_bytes(&self) -> u64 {
        self.extents.iter().map(|extent| extent.bytes.len() as u64).sum()
    }

    pub fn num_files(&self) -> usize {
        self.extents.chunk_by(|a, b| Arc::ptr_eq(&a.file, &b.file)).count()
    }

    /// Reads everything and shows it to `take`, piece by piece, from several threads; with a manifest, every block of a file that has some of
    /// it is compared. `done` counts bytes, and `stop` ends it early.
    ///
    /// # Errors
    /// A file cannot be read, or is not what the manifest says.
    pub fn read(
        &self,
        manifest: Option<&Manifest>,
        take: &(dyn Fn(&[u8]) + Sync),
        done: &AtomicU64,
        stop: &AtomicBool,
    ) -> Result<(), CheckpointError> {
        let pieces: Vec<(usize, Range<usize>)> = self
            .extents
            .iter()
            .enumerate()
            .flat_map(|(i, extent)| blocks(&extent.bytes).map(move |piece| (i, piece)))
            .collect();
        let next = AtomicUsize::new(0);
        let work = || -> Result<(), CheckpointError> {
            while let Some((extent, bytes)) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
                if stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                let file = &self.extents[*extent].file;
                let storage = file.storage()?;
                populate(&storage.bytes()[bytes.clone()])
                    .map_err(|source| CheckpointError::Io { path: file.path().to_owned(), source })?;
                take(&storage.bytes()[bytes.clone()]);
                if let Some(manifest) = manifest {
                    manifest.check_block(file.path(), storage.bytes(), bytes.start / BLOCK_BYTES)?;
                }
                done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            }
            Ok(())
        };
        std::thread::scope(|scope| {
            let threads: Vec<_> = (0..IN_FLIGHT.min(pieces.len())).map(|_| scope.spawn(work)).collect();
            let mut result = Ok(());
            for thread in threads {
                match thread.join() {
                    Ok(outcome) => result = result.and(outcome),
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            result
        })
    }
}

/// Sorts extents by file and place, and joins those that touch.
fn merge(mut extents: Vec<Extent>) -> Vec<Extent> {
    let mut order = HashMap::new();
    for extent in &extents {
        let next = order.len();
        order.entry(Arc::as_ptr(&extent.file)).or_insert(next);
    }
    extents.sort_by_key(|extent| (order[&Arc::as_ptr(&extent.file)], extent.bytes.start));
    let mut merged: Vec<Extent> = Vec::new();
    for extent in extents {
        match merged.last_mut() {
            Some(last) if Arc::ptr_eq(&last.file, &extent.file) && extent.bytes.start <= last.bytes.end => {
                last.bytes.end = last.bytes.end.max(extent.bytes.end);
            }
            _ => merged.push(extent),
        }
    }
    merged
}

/// Cuts a range at the multiples of [`BLOCK_BYTES`].
fn blocks(range: &Range<usize>) -> impl Iterator<Item = Range<usize>> + use<> {
    let Range { start, end } = *range;
    (start / BLOCK_BYTES..end.div_ceil(BLOCK_BYTES))
        .map(move |block| (block * BLOCK_BYTES).max(start)..((block + 1) * BLOCK_BYTES).min(end))
}

/// Brings mapped bytes into memory. A file that was cut meanwhile is an error, not the end of the process.
fn populate(bytes: &[u8]) -> std::io::Result<()> {
    const PAGE: usize = 4096;
    let start = bytes.as_ptr() as usize / PAGE * PAGE;
    let len = bytes.as_ptr() as usize + bytes.len() - start;
    let advise = |advice| {
        // SAFETY: the pages are those of `bytes`, which stay mapped as long as the borrow lasts, and neither advice changes what is
        // in them.
        match unsafe { libc::madvise(start as *mut libc::c_void, len, advice) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    };
    // Starts reads ahead of what is waited for; a hint.
    _ = advise(libc::MADV_WILLNEED);
    match advise(libc::MADV_POPULATE_READ) {
        // A kernel before 5.14 does not know it: touch each page.
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => {
            for byte in bytes.iter().step_by(PAGE) {
                std::hint::black_box(*byte);
            }
            Ok(())
        }
        result => result,
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::checkpoint::open;
    use crate::spec::ModelSource;

    fn fixture(name: &str) -> ModelSource {
        ModelSource::Path(Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures").join(name))
    }

    #[test]
    fn all_ranks_together_read_every_byte_of_the_tensors_once() {
        for (name, meshes) in [
            ("golden/tiny-hf", vec![(1, 1), (2, 1), (2, 4)]),
            ("golden/tiny-nemo", vec![(1, 1), (2, 1), (2, 2)]),
            ("foreign/zarr-tp8", vec![(1, 1), (2, 2)]),
            ("foreign/archive.nemo", vec![(2, 1)]),
            ("foreign/torch_dist", vec![(1, 2), (2, 2)]),
            ("foreign/llama.cpp-bf16.gguf", vec![(2, 2)]),
        ] {
            let source = open(&fixture(name)).unwrap();
            let size = |name: TensorName| {
                let grid = source.grid(name).unwrap();
                let [rows, cols] = name.shape(source.config());
                grid.extents(0..rows, 0..cols).unwrap().iter().map(|extent| extent.bytes.len() as u64).sum::<u64>()
            };
            let all: u64 = TensorName::all(source.config()).map(size).sum();
            for (tp, pp) in meshes {
                let mesh = Mesh { tp, pp };
                let plans: Vec<_> =
                    (0..mesh.world_size()).map(|rank| ReadingPlan::of_rank(&*source, mesh, rank).unwrap()).collect();
                assert_eq!(plans.iter().map(ReadingPlan::num_bytes).sum::<u64>(), all, "{name} tp {tp} pp {pp}");
                for plan in plans {
                    let done = AtomicU64::new(0);
                    plan.read(None, &|_| (), &done, &AtomicBool::new(false)).unwrap();
                    assert_eq!(done.into_inner(), plan.num_bytes());
                }
            }
        }
    }

    #[test]
    fn pieces_do_not_cross_blocks() {
        let pieces = |range| blocks(&range).map(|piece| (piece.start, piece.end)).collect::<Vec<_>>();
        const B: usize = BLOCK_BYTES;
        assert_eq!(pieces(5..7), [(5, 7)]);
        assert_eq!(pieces(5..B), [(5, B)]);
        assert_eq!(pieces(B - 1..2 * B + 1), [(B - 1, B), (B, 2 * B), (2 * B, 2 * B + 1)]);
        assert_eq!(pieces(B..B), []);
    }
}
