use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use nemotron_engine::checkpoint::{
    self, CheckpointError, CheckpointSource, FileHashes, Manifest, ReadingPlan, StoredTensor, TensorName,
};
use nemotron_engine::config::{Mesh, ModelConfig};
use nemotron_engine::rank::ModelSource;
use serde::Serialize;

use crate::cli::{EngineArgs, InspectArgs};
use crate::env::Environment;
use crate::hardware::hardware;
use crate::host::Host;
use crate::model::{self, Model};
use crate::report::{Exit, Failure, Outcome, print_json, print_line};
use crate::settings::{Selection, Settings};

/// Files up to this size are hashed in any case: configurations and tokenizers, and the weights of toy models.
const HASHED_BYTES: u64 = 16 << 20;
/// What reading plans are shown for when nothing else is asked.
const DEFAULT_PROFILE: &str = "h100x16";

#[derive(Serialize)]
struct Inspection {
    schema: u32,
    model: String,
    /// `None` for the model inside the binary.
    path: Option<PathBuf>,
    format: &'static str,
    architecture: ModelConfig,
    parameters: u64,
    /// Whether there is more than metadata.
    has_data: bool,
    /// `None` if the checkpoint has none.
    tokenizer: Option<TokenizerInfo>,
    reading_plan: Option<PlanInfo>,
    verified: Option<Verified>,
    tensors: Vec<TensorInfo>,
    files: Vec<FileInfo>,
}

#[derive(Serialize)]
struct TokenizerInfo {
    kind: &'static str,
    vocab_size: usize,
}

/// What each rank reads.
#[derive(Serialize)]
struct PlanInfo {
    profile: String,
    mesh: Mesh,
    bytes: u64,
    ranks: Vec<RankReading>,
    /// GB/s of all ranks together, if they have read.
    gb_s: Option<f64>,
}

#[derive(Serialize)]
struct RankReading {
    rank: usize,
    stage: usize,
    bytes: u64,
    files: usize,
    /// Runs of bytes that follow one another.
    extents: usize,
    seconds: Option<f64>,
}

#[derive(Serialize)]
struct Verified {
    bytes: u64,
    seconds: f64,
    gb_s: f64,
    /// Whether there was a manifest to compare with.
    manifest: bool,
}

#[derive(Serialize)]
struct TensorInfo {
    name: String,
    dtype: &'static str,
    shape: Vec<usize>,
}

#[derive(Serialize)]
struct FileInfo {
    name: String,
    bytes: u64,
    /// `None` for large files unless they are verified, and for those inside the binary.
    sha256: Option<String>,
}

pub(crate) fn run(args: &InspectArgs) -> Outcome {
    let source = match Model::find(&args.model, &Environment::of_process())? {
        Model::Source(source) => source,
        Model::Architecture(name) => {
            return Err(Failure::msg(Exit::Checkpoint, format!("{name} is an architecture, not a checkpoint"))
                .hint("give the directory of a checkpoint, or `builtin`"));
        }
    };
    let inspection = inspect(&source, args)?;
    if args.json {
        print_json(&inspection)?
    } else {
        print_line(text(&inspection))?
    };
    Ok(())
}

fn inspect(source: &ModelSource, args: &InspectArgs) -> Outcome<Inspection> {
    let checkpoint = checkpoint::open_headers(source)?;
    let path = match source {
        ModelSource::Builtin => None,
        ModelSource::Path(path) => Some(model::directory(path)),
    };
    let files = checkpoint.files();
    let has_data = checkpoint::open(source).is_ok();
    let tokenizer = match checkpoint.tokenizer() {
        Ok(tokenizer) => Some(TokenizerInfo { kind: tokenizer.kind(), vocab_size: tokenizer.vocab_size() }),
        Err(CheckpointError::MissingTokenizer { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let reading_plan = reading_plan(&*checkpoint, args)?;
    let mut hashes = BTreeMap::new();
    let mut verified = None;
    if args.verify {
        checkpoint::open(source)?;
        (hashes, verified) = verify(source, &*checkpoint, path.as_deref())?;
        if let (true, ModelSource::Path(at), Some(root)) = (args.write_manifest, source, &path) {
            let manifest = Manifest::new(root.clone(), hashes.clone());
            manifest.write(at).map_err(|error| Failure::new(Exit::OutputStorage, error))?;
        }
    }
    let file_info = |(name, bytes): (String, u64)| {
        let known = hashes.get(&name).map(|hashes| hashes.sha256.clone());
        let small = path.as_ref().filter(|_| bytes <= HASHED_BYTES);
        // One that cannot be read is described, not used.
        let taken = || Some(checkpoint::hash(&small?.join(&name), |_| {}).ok()?.sha256);
        FileInfo { sha256: known.or_else(taken), name, bytes }
    };
    Ok(Inspection {
        schema: 1,
        model: model::name(source),
        format: checkpoint.format(),
        architecture: checkpoint.config().clone(),
        parameters: checkpoint.config().num_parameters(),
        has_data,
        tokenizer,
        reading_plan,
        verified,
        tensors: checkpoint.stored_tensors().into_iter().map(tensor_info).collect(),
        files: files.into_iter().map(file_info).collect(),
        path,
    })
}

/// The plan of the profile; `None` when none was asked for and the model cannot be cut like the default.
fn reading_plan(checkpoint: &dyn CheckpointSource, args: &InspectArgs) -> Outcome<Option<PlanInfo>> {
    let mut profile = args.profile.as_deref().unwrap_or(DEFAULT_PROFILE);
    let engine = EngineArgs { profile: Some(profile.to_owned()), ..EngineArgs::default() };
    let selection = Selection { engine: Some(&engine), ..Selection::default() };
    let settings = Settings::resolve(&selection, &Environment::of_process())?;
    let (mut mesh, _) = hardware(&settings, &Host::probe()?)?;
    if let Err(error) = mesh.check(checkpoint.config()) {
        match (&args.profile, args.read) {
            (Some(_), _) => return Err(error.into()),
            (None, false) => return Ok(None),
            (None, true) => (mesh, profile) = (Mesh { tp: 1, pp: 1 }, "one rank"),
        }
    }
    let plans = (0..mesh.world_size()).map(|rank| ReadingPlan::of_rank(checkpoint, mesh, rank));
    let plans = plans.collect::<Result<Vec<_>, _>>()?;
    let seconds = if args.read { Some(read(&plans)?) } else { None };
    let bytes = plans.iter().map(ReadingPlan::num_bytes).sum();
    let slowest = seconds.as_ref().and_then(|seconds| seconds.iter().copied().reduce(f64::max));
    let ranks = plans.iter().enumerate().map(|(rank, plan)| RankReading {
        rank,
        stage: mesh.stage(rank),
        bytes: plan.num_bytes(),
        files: plan.num_files(),
        extents: plan.extents().len(),
        seconds: seconds.as_ref().map(|seconds| seconds[rank]),
    });
    let gb_s = slowest.map(|slowest| bytes as f64 / 1e9 / slowest);
    Ok(Some(PlanInfo { profile: profile.to_owned(), mesh, bytes, ranks: ranks.collect(), gb_s }))
}

/// All ranks read at the same time, and copy what they read as `dd` does; seconds of each.
fn read(plans: &[ReadingPlan]) -> Result<Vec<f64>, CheckpointError> {
    let start = Instant::now();
    let read = |plan: &ReadingPlan| {
        plan.read(None, &copy, &AtomicU64::new(0), &AtomicBool::new(false))?;
        Ok(start.elapsed().as_secs_f64())
    };
    std::thread::scope(|scope| {
        let ranks: Vec<_> = plans.iter().map(|plan| scope.spawn(|| read(plan))).collect();
        let join = |rank: std::thread::ScopedJoinHandle<'_, _>| {
            rank.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        };
        ranks.into_iter().map(join).collect()
    })
}

fn copy(bytes: &[u8]) {
    const LEN: usize = 64 << 10;
    let mut buffer = [0; LEN];
    for bytes in bytes.chunks(LEN) {
        buffer[..bytes.len()].copy_from_slice(bytes);
        std::hint::black_box(&buffer);
    }
}

type Hashes = BTreeMap<String, FileHashes>;

/// Reads every byte: hashes of files as they are now, compared with the manifest; and every weight must be finite.
fn verify(
    source: &ModelSource,
    checkpoint: &dyn CheckpointSource,
    root: Option<&Path>,
) -> Outcome<(Hashes, Option<Verified>)> {
    let start = Instant::now();
    let manifest = Manifest::of(source)?;
    let hashes = Mutex::new(Hashes::new());
    if let Some(root) = root {
        in_parallel(&checkpoint.files(), |(name, _)| {
            let path = root.join(name);
            let found =
                checkpoint::hash(&path, |_| {}).map_err(|source| CheckpointError::Io { path: path.clone(), source })?;
            if let Some(expected) = manifest.as_ref().and_then(|manifest| manifest.files.get(name))
                && *expected != found
            {
                let problem = "its contents are not those of its manifest".to_owned();
                return Err(CheckpointError::Damaged { file: path, problem });
            }
            hashes.lock().unwrap_or_else(PoisonError::into_inner).insert(name.clone(), found);
            Ok(())
        })?;
    }
    let config = checkpoint.config();
    let names: Vec<TensorName> = TensorName::all(config).collect();
    in_parallel(&names, |name| {
        const ROWS: usize = 1024;
        let [rows, cols] = name.shape(config);
        for first in (0..rows).step_by(ROWS) {
            if !checkpoint.part(*name, first..(first + ROWS).min(rows), 0..cols)?.is_finite() {
                return Err(CheckpointError::NotFinite { tensor: *name });
            }
        }
        Ok(())
    })?;
    let hashes = hashes.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (bytes, seconds) = (checkpoint.files().iter().map(|file| file.1).sum(), start.elapsed().as_secs_f64());
    let verified = Verified { bytes, seconds, gb_s: bytes as f64 / 1e9 / seconds, manifest: manifest.is_some() };
    Ok((hashes, Some(verified)))
}

/// Does something with every item, on as many threads as there are cores; the first error ends it.
fn in_parallel<T: Sync>(
    items: &[T],
    work: impl Fn(&T) -> Result<(), CheckpointError> + Sync,
) -> Result<(), CheckpointError> {
    let next = AtomicU64::new(0);
    let worker = || {
        while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed) as usize) {
            work(item)?;
        }
        Ok(())
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(worker)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

fn tensor_info(tensor: StoredTensor) -> TensorInfo {
    TensorInfo { name: tensor.name, dtype: tensor.dtype.name(), shape: tensor.shape }
}

fn text(inspection: &Inspection) -> String {
    let mut out = String::new();
    _ = write(inspection, &mut out);
    out.truncate(out.trim_end().len());
    out
}

fn write(inspection: &Inspection, out: &mut String) -> std::fmt::Result {
    let Inspection { architecture: config, tokenizer, .. } = inspection;
    let place = inspection.path.as_ref().map_or("inside the binary".into(), |path| path.display().to_string());
    writeln!(out, "model         {} ({place})", inspection.model)?;
    writeln!(out, "format        {}", inspection.format)?;
    writeln!(out, "parameters    {}", inspection.parameters)?;
    writeln!(
        out,
        "architecture  {} layers, hidden {}, {} heads of {} with {} KV heads, FFN {}, vocabulary {}, context {}",
        config.num_layers,
        config.hidden_size,
        config.num_heads,
        config.head_dim,
        config.num_kv_heads,
        config.ffn_size,
        config.vocab_size,
        config.max_context,
    )?;
    if let Some(reward) = config.reward {
        writeln!(out, "reward model  {} values a text", reward.num_attributes)?;
    }
    match tokenizer {
        Some(tokenizer) => writeln!(out, "tokenizer     {}, {} pieces", tokenizer.kind, tokenizer.vocab_size)?,
        None => writeln!(out, "tokenizer     none")?,
    }
    if !inspection.has_data {
        writeln!(out, "weights       none: this is metadata alone")?;
    }
    if let Some(Verified { bytes, seconds, gb_s, manifest }) = &inspection.verified {
        let compared =
            if *manifest { "all files are those of the manifest" } else { "there is no manifest to compare with" };
        writeln!(
            out,
            "verified      {bytes} bytes in {seconds:.1} s ({gb_s:.2} GB/s): all weights are finite, {compared}"
        )?;
    }
    if let Some(plan) = &inspection.reading_plan {
        write_plan(plan, out)?;
    }
    writeln!(out, "\nfiles")?;
    for file in &inspection.files {
        let hash = file.sha256.as_ref().map_or(String::new(), |hash| format!("  sha256 {hash}"));
        writeln!(out, "  {:>14}  {}{hash}", file.bytes, file.name)?;
    }
    writeln!(out, "\ntensors")?;
    for TensorInfo { name, dtype, shape } in &inspection.tensors {
        writeln!(out, "  {dtype:4}  {name} {shape:?}")?;
    }
    Ok(())
}

fn write_plan(plan: &PlanInfo, out: &mut String) -> std::fmt::Result {
    let PlanInfo { profile, mesh: Mesh { tp, pp }, bytes, gb_s, .. } = plan;
    writeln!(out, "\nreading plan  {profile}: tp {tp} × pp {pp}, {bytes} bytes in all")?;
    if let Some(gb_s) = gb_s {
        writeln!(out, "read          {gb_s:.2} GB/s by all ranks together")?;
    }
    writeln!(out, "  {:>4} {:>5} {:>14} {:>6} {:>8}", "rank", "stage", "bytes", "files", "extents")?;
    for RankReading { rank, stage, bytes, files, extents, seconds } in &plan.ranks {
        write!(out, "  {rank:>4} {stage:>5} {bytes:>14} {files:>6} {extents:>8}")?;
        match seconds {
            Some(seconds) => writeln!(out, "  {seconds:.2} s, {:.2} GB/s", *bytes as f64 / 1e9 / seconds)?,
            None => writeln!(out)?,
        }
    }
    Ok(())
}
