//! Checkpoints that were damaged at random: they are refused by name or they load; nothing panics, and nothing allocates more than the
//! checkpoint's size and what a sound one needs.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};

use nemotron_engine::checkpoint::{self, CheckpointError, Manifest, ReadingPlan, Target, TensorName};
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::ModelSource;

use super::{LARGEST, support::fixtures};

const CASES: u64 = 500;
/// Buffers of fixed size: of tar, of checksums, of the tokenizer's parser.
const FIXED_BYTES: u64 = 2 << 20;
const ONE_RANK: Mesh = Mesh { tp: 1, pp: 1 };

/// SplitMix64.
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((mixed ^ mixed >> 31) % end as u64) as usize
    }
}

/// Everything that a rank does with a checkpoint before it computes.
fn load(path: &Path) -> Result<(), CheckpointError> {
    let source = ModelSource::Path(path.to_owned());
    let checkpoint = checkpoint::open(&source)?;
    checkpoint.tokenizer()?;
    let manifest = Manifest::of(&source)?;
    let plan = ReadingPlan::of_rank(&*checkpoint, ONE_RANK, 0)?;
    plan.read(manifest.as_ref(), &AtomicU64::new(0), &AtomicBool::new(false))?;
    TensorName::all(checkpoint.config()).try_for_each(|name| checkpoint.tensor(name).map(drop))
}

fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        fs::copy(from, to).unwrap();
        return;
    }
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

/// The files of a checkpoint in a fixed order.
fn files(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let mut entries: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()).collect();
    entries.sort();
    entries.iter().flat_map(|entry| files(entry)).collect()
}

/// Flips some bits of a file, mostly of its head, or cuts it.
fn damage(file: &Path, random: &mut Random) {
    let mut bytes = fs::read(file).unwrap();
    if bytes.is_empty() || random.below(5) == 0 {
        bytes.truncate(random.below(bytes.len() + 1));
    } else {
        let end = if random.below(4) > 0 { bytes.len().min(2048) } else { bytes.len() };
        for _ in 0..1 + random.below(3) {
            bytes[random.below(end)] ^= 1 << random.below(8);
        }
    }
    fs::write(file, bytes).unwrap();
}

pub(super) fn run() {
    let directory = tempfile::tempdir().unwrap();
    let foreign = fixtures().join("foreign");
    let shards = directory.path().join("shards");
    let source = checkpoint::open(&ModelSource::Path(foreign.join("transformers"))).unwrap();
    checkpoint::convert(&*source, Target::Shards(Mesh { tp: 2, pp: 2 }), &shards, &|_, _| {}).unwrap();
    let mut originals: Vec<PathBuf> =
        ["transformers-sharded", "zarr-tp2", "archive.nemo", "torch_dist", "llama.cpp-bf16.gguf", "fp8-channel"]
            .iter()
            .map(|name| foreign.join(name))
            .collect();
    originals.push(shards.clone());

    let mut refused = 0;
    for case in 0..CASES {
        let random = &mut Random(case);
        let original = &originals[case as usize % originals.len()];
        let name = original.file_name().unwrap();
        let mutant = directory.path().join(format!("{case}-{}", name.to_string_lossy()));
        copy(original, &mutant);
        let files = files(&mutant);
        let size: u64 = files.iter().map(|file| fs::metadata(file).unwrap().len()).sum();
        let file = &files[random.below(files.len())];
        let before = fs::read(file).unwrap();
        damage(file, random);
        let changed = fs::read(file).unwrap() != before;

        LARGEST.store(0, Relaxed);
        let outcome = catch_unwind(AssertUnwindSafe(|| load(&mutant)));
        let largest = LARGEST.load(Relaxed);
        let outcome = outcome.unwrap_or_else(|_| panic!("case {case}: {} makes a panic", file.display()));
        assert!(largest <= size + FIXED_BYTES, "case {case}: {} makes {largest} bytes be allocated", file.display());
        if let Err(error) = &outcome {
            refused += 1;
            assert!(!error.to_string().is_empty());
        }
        // With a manifest nothing passes; it does not guard itself.
        if *original == shards && changed && *file != Manifest::path(&mutant) {
            assert!(outcome.is_err(), "case {case}: {} was changed and is taken", file.display());
        }
        if mutant.is_dir() { fs::remove_dir_all(&mutant).unwrap() } else { fs::remove_file(&mutant).unwrap() }
    }
    println!("{refused} of {CASES} damaged checkpoints are refused");
    assert!(refused > CASES / 3);
}
