//! Checkpoints that were damaged at random or forged: they are refused by name or they load; nothing panics, and nothing allocates more than
//! the checkpoint's size and what a sound one needs.

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering::Relaxed;
use std::sync::atomic::{AtomicBool, AtomicU64};
use std::time::{Duration, Instant};

use nemotron_engine::chat::ChatTemplate;
use nemotron_engine::checkpoint::{self, CheckpointError, Manifest, ReadingPlan, Target, TensorName};
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::ModelSource;

use super::forge::forge;
use super::{LARGEST, LIVE, PEAK, support::fixtures};

/// Half of them damaged at random, half forged; another number with `NEMOTRON_TEST_MUTATIONS`.
const CASES: u64 = 1000;
/// Buffers of fixed size: of tar, of checksums, of the tokenizer's parser.
const FIXED_BYTES: u64 = 2 << 20;
const ONE_RANK: Mesh = Mesh { tp: 1, pp: 1 };

/// What loading needs beside its largest piece, in sizes of the checkpoint: FP8 becomes bf16, and the tokenizer's tables.
const COPIES: u64 = 4;

/// SplitMix64.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn below(&mut self, end: usize) -> usize {
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
    _ = ChatTemplate::for_checkpoint(path.is_dir().then_some(path));
    checkpoint.companions()?;
    checkpoint.stored_tensors();
    let manifest = Manifest::of(&source)?;
    let plan = ReadingPlan::of_rank(&*checkpoint, ONE_RANK, 0)?;
    plan.read(manifest.as_ref(), &|_| (), &AtomicU64::new(0), &AtomicBool::new(false))?;
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

/// Flips some bits of a file, mostly of its head, or cuts it; or forges a field of it.
fn damage(file: &Path, random: &mut Random) {
    let mut bytes = fs::read(file).unwrap();
    if random.below(2) == 0 {
        forge(file, &mut bytes, random);
    } else if bytes.is_empty() || random.below(5) == 0 {
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

    let cases = std::env::var("NEMOTRON_TEST_MUTATIONS").ok().and_then(|cases| cases.parse().ok()).unwrap_or(CASES);
    let (mut refused, mut slowest) = (0, (Duration::ZERO, 0));
    for case in 0..cases {
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

        let before = LIVE.load(Relaxed);
        LARGEST.store(0, Relaxed);
        PEAK.store(before, Relaxed);
        let began = Instant::now();
        let outcome = catch_unwind(AssertUnwindSafe(|| load(&mutant)));
        slowest = slowest.max((began.elapsed(), case));
        let (largest, most) = (LARGEST.load(Relaxed), PEAK.load(Relaxed).saturating_sub(before));
        let outcome = outcome.unwrap_or_else(|_| panic!("case {case}: {} makes a panic", file.display()));
        assert!(largest <= size + FIXED_BYTES, "case {case}: {} makes {largest} bytes be allocated", file.display());
        let limit = COPIES * size + 4 * FIXED_BYTES;
        assert!(most <= limit, "case {case}: {} makes {most} bytes be held at a time", file.display());
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
    let (longest, case) = slowest;
    println!("{refused} of {cases} damaged checkpoints are refused; the slowest, case {case}, took {longest:.1?}");
    assert!(refused > cases / 3);
}
