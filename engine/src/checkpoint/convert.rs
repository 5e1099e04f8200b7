//! Writing a checkpoint anew: as Hugging Face safetensors, or as one file for each rank of a mesh. Files are written one by one under a
//! temporary name and noted when they are complete, so that a conversion that was stopped goes on where it was; at the end everything is
//! read back and compared.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::hf::stored_name;
use super::manifest::{FileHashes, Hasher, Manifest, hash};
use super::sharded::{DESCRIPTION, Description, rank_file};
use super::{CheckpointError, CheckpointSource, Dtype, Tensor, TensorName, identity};
use crate::config::{Mesh, MeshError, ModelConfig, RewardHead};
use crate::reward;

/// What a conversion writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// `NemotronForCausalLM`, or `NemotronForSequenceClassification`, as transformers reads it.
    HuggingFace { shard_bytes: u64 },
    /// One file a rank.
    Shards(Mesh),
}

/// What a conversion has written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Conversion {
    pub bytes: u64,
    pub files: usize,
    /// Of these, files that an earlier call had completed.
    pub kept: usize,
}

#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    #[error("the checkpoint cannot be read")]
    Source(#[from] CheckpointError),
    #[error("the model cannot be split this way")]
    Mesh(#[from] MeshError),
    #[error("{} is not empty, and no conversion of this kind that was stopped", path.display())]
    Occupied { path: PathBuf },
    #[error("cannot write {}", path.display())]
    Write {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("{} reads back differently from what was written", path.display())]
    ReadBack { path: PathBuf },
}

/// What is done of a conversion; a file of the output until it is complete.
#[derive(Serialize, Deserialize, PartialEq)]
struct State {
    /// Identity of the checkpoint, and the target.
    of: String,
    done: BTreeMap<String, FileHashes>,
}

const STATE: &str = "nemotron.convert.json";
const HF_INDEX: &str = "model.safetensors.index.json";
/// Where weights begin in a file, for direct reads.
const DATA_ALIGNMENT: usize = 4096;
/// Bytes of a tensor that are in memory at a time.
const STEP_BYTES: usize = 64 << 20;
/// Files that are written at the same time.
const WRITERS: usize = 4;

/// A file to write.
struct OutputFile {
    name: String,
    tensors: Vec<Part>,
}

struct Part {
    stored_name: String,
    name: TensorName,
    /// Whether the stored tensor has one axis.
    is_vector: bool,
    rows: Range<usize>,
    cols: Range<usize>,
    dtype: Dtype,
}

impl Part {
    fn bytes(&self) -> u64 {
        (self.rows.len() * self.cols.len() * self.dtype.size()) as u64
    }
}

/// Writes `source` into the directory `output`; `progress` is told bytes done and all bytes.
///
/// # Errors
/// A file cannot be read or written, or the directory has files of something else.
pub fn convert(
    source: &dyn CheckpointSource,
    target: Target,
    output: &Path,
    progress: &(dyn Fn(u64, u64) + Sync),
) -> Result<Conversion, ConvertError> {
    let write_error = |path: &Path| {
        let path = path.to_owned();
        move |source| ConvertError::Write { path, source }
    };
    let files = output_files(source, target)?;
    fs::create_dir_all(output).map_err(write_error(output))?;
    let of = format!("{} {target:?}", identity(source)?);
    let state_path = output.join(STATE);
    let state: Option<State> = fs::read(&state_path).ok().and_then(|text| serde_json::from_slice(&text).ok());
    let occupied = || ConvertError::Occupied { path: output.to_owned() };
    let state = match state {
        Some(state) if state.of == of => state,
        Some(_) => return Err(occupied()),
        None if fs::read_dir(output).map_err(write_error(output))?.next().is_some() => return Err(occupied()),
        None => State { of, done: BTreeMap::new() },
    };
    save(&state_path, &state).map_err(write_error(&state_path))?;

    let total: u64 = files.iter().flat_map(|file| &file.tensors).map(Part::bytes).sum();
    let kept = files.iter().filter(|file| is_done(&state, output, &file.name)).count();
    let (state, written, next) = (Mutex::new(state), Mutex::new(0_u64), AtomicUsize::new(0));
    let lock_state = || state.lock().unwrap_or_else(PoisonError::into_inner);
    let count = |bytes: u64| {
        let mut written = written.lock().unwrap_or_else(PoisonError::into_inner);
        *written += bytes;
        progress(*written, total);
    };
    let work = || -> Result<(), ConvertError> {
        while let Some(file) = files.get(next.fetch_add(1, Ordering::Relaxed)) {
            if is_done(&lock_state(), output, &file.name) {
                count(file.tensors.iter().map(Part::bytes).sum());
                continue;
            }
            let path = output.join(&file.name);
            let hashes = write_file(source, file, &path, &count)?;
            let mut state = lock_state();
            state.done.insert(file.name.clone(), hashes);
            save(&state_path, &state).map_err(write_error(&state_path))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..WRITERS.min(files.len())).map(|_| scope.spawn(work)).collect();
        threads.into_iter().try_for_each(|thread| match thread.join() {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic),
        })
    })?;

    let mut hashes = std::mem::take(&mut lock_state().done);
    for (name, expected) in &hashes {
        let path = output.join(name);
        if hash(&path, |_| {}).map_err(write_error(&path))? != *expected {
            return Err(ConvertError::ReadBack { path });
        }
    }
    for (name, content) in small_files(source, target, &files)? {
        let path = output.join(&name);
        fs::write(&path, content).map_err(write_error(&path))?;
        hashes.insert(name, hash(&path, |_| {}).map_err(write_error(&path))?);
    }
    let (bytes, num_files) = (hashes.values().map(|hashes| hashes.bytes).sum(), hashes.len());
    Manifest::new(output.to_owned(), hashes).write(output).map_err(write_error(output))?;
    fs::remove_file(&state_path).map_err(write_error(&state_path))?;
    Ok(Conversion { bytes, files: num_files, kept })
}

fn is_done(state: &State, output: &Path, name: &str) -> bool {
    let size = fs::metadata(output.join(name)).map(|metadata| metadata.len());
    state.done.get(name).is_some_and(|hashes| size.is_ok_and(|size| size == hashes.bytes))
}

fn save(path: &Path, state: &State) -> io::Result<()> {
    let temporary = path.with_extension("tmp");
    fs::write(&temporary, serde_json::to_vec(state)?)?;
    fs::rename(temporary, path)
}

/// Which tensors go into which files.
fn output_files(source: &dyn CheckpointSource, target: Target) -> Result<Vec<OutputFile>, ConvertError> {
    let config = source.config();
    let part = |stored_name: String, name: TensorName, [rows, cols]: [Range<usize>; 2]| {
        // The type that a tensor has in memory.
        let dtype = source.part(name, 0..1, 0..1)?.blocks.first().map_or(Dtype::Bf16, |block| block.dtype);
        let is_vector = name.is_vector() && matches!(target, Target::HuggingFace { .. });
        Ok::<_, ConvertError>(Part { stored_name, name, is_vector, rows, cols, dtype })
    };
    match target {
        Target::Shards(mesh) => {
            mesh.check(config)?;
            (0..mesh.world_size())
                .map(|rank| {
                    let tensors = TensorName::of_rank(config, mesh, rank)
                        .map(|name| part(name.to_string(), name, name.shard(config, mesh, rank)));
                    Ok(OutputFile { name: rank_file(rank), tensors: tensors.collect::<Result<_, _>>()? })
                })
                .collect()
        }
        Target::HuggingFace { shard_bytes } => {
            let mut shards: Vec<Vec<Part>> = vec![Vec::new()];
            let mut bytes = 0;
            for name in TensorName::all(config) {
                let [rows, cols] = name.shape(config);
                let part = part(stored_name(name), name, [0..rows, 0..cols])?;
                if bytes > 0 && bytes + part.bytes() > shard_bytes {
                    shards.push(Vec::new());
                    bytes = 0;
                }
                bytes += part.bytes();
                shards.last_mut().expect("there is one from the start").push(part);
            }
            let count = shards.len();
            let name = |i: usize| match count {
                1 => "model.safetensors".to_owned(),
                _ => format!("model-{:05}-of-{count:05}.safetensors", i + 1),
            };
            Ok(shards.into_iter().enumerate().map(|(i, tensors)| OutputFile { name: name(i), tensors }).collect())
        }
    }
}

/// Writes a safetensors file, complete or not at all.
fn write_file(
    source: &dyn CheckpointSource,
    file: &OutputFile,
    path: &Path,
    count: &dyn Fn(u64),
) -> Result<FileHashes, ConvertError> {
    let temporary = path.with_extension("partial");
    let failed = |source| ConvertError::Write { path: temporary.clone(), source };
    let tee = Tee { file: File::create(&temporary).map_err(failed)?, hasher: Hasher::default() };
    let mut out = BufWriter::with_capacity(1 << 20, tee);
    out.write_all(&header(&file.tensors)).map_err(failed)?;
    for part in &file.tensors {
        let step = (STEP_BYTES / (part.cols.len() * part.dtype.size())).max(1);
        for first in part.rows.clone().step_by(step) {
            let rows = first..(first + step).min(part.rows.end);
            let tensor = source.part(part.name, rows, part.cols.clone())?;
            write_tensor(&tensor, &mut out).map_err(failed)?;
            count(tensor.rows() as u64 * (tensor.cols() * part.dtype.size()) as u64);
        }
    }
    let Tee { file, hasher } = out.into_inner().map_err(|error| failed(error.into_error()))?;
    file.sync_all().map_err(failed)?;
    fs::rename(&temporary, path).map_err(failed)?;
    Ok(hasher.finish())
}

/// A file whose checksums are taken as it is written.
struct Tee {
    file: File,
    hasher: Hasher,
}

impl Write for Tee {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let len = self.file.write(bytes)?;
        self.hasher.update(&bytes[..len]);
        Ok(len)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn write_tensor(tensor: &Tensor, out: &mut impl Write) -> io::Result<()> {
    for block in &tensor.blocks {
        for row in 0..block.rows {
            out.write_all(block.row(row))?;
        }
    }
    Ok(())
}

/// The header of a safetensors file, filled up with spaces so that the weights begin on a page.
fn header(tensors: &[Part]) -> Vec<u8> {
    let mut entries = Map::new();
    entries.insert("__metadata__".to_owned(), json!({ "format": "pt" }));
    let mut start = 0;
    for part in tensors {
        let dtype = match part.dtype {
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
            Dtype::F32 => "F32",
        };
        let shape = if part.is_vector { json!([part.cols.len()]) } else { json!([part.rows.len(), part.cols.len()]) };
        let end = start + part.bytes();
        entries
            .insert(part.stored_name.clone(), json!({ "dtype": dtype, "shape": shape, "data_offsets": [start, end] }));
        start = end;
    }
    let mut text = Value::Object(entries).to_string().into_bytes();
    let length_bytes = size_of::<u64>();
    text.resize((length_bytes + text.len()).next_multiple_of(DATA_ALIGNMENT) - length_bytes, b' ');
    [&(text.len() as u64).to_le_bytes()[..], &text].concat()
}

/// Configuration, index and tokenizer.
fn small_files(
    source: &dyn CheckpointSource,
    target: Target,
    files: &[OutputFile],
) -> Result<Vec<(String, Vec<u8>)>, ConvertError> {
    let config = source.config();
    let text = |value: &Value| format!("{value:#}\n").into_bytes();
    let mut small = source.companions()?;
    if let Target::Shards(mesh) = target {
        let description = Description { schema: 1, mesh, config: config.clone() };
        small.push((DESCRIPTION.to_owned(), text(&json!(description))));
        return Ok(small);
    }
    let dtype = files.iter().flat_map(|file| &file.tensors).find(|part| part.name == TensorName::Embedding);
    small.push(("config.json".to_owned(), text(&hf_config(config, dtype.map_or(Dtype::Bf16, |part| part.dtype)))));
    let generation = json!({ "bos_token_id": config.bos_id, "eos_token_id": config.eos_ids });
    small.push(("generation_config.json".to_owned(), text(&generation)));
    if files.len() > 1 {
        let places = files.iter().flat_map(|file| file.tensors.iter().map(|part| (&part.stored_name, &file.name)));
        let weight_map: BTreeMap<_, _> = places.collect();
        let total_size: u64 = files.iter().flat_map(|file| &file.tensors).map(Part::bytes).sum();
        small.push((
            HF_INDEX.to_owned(),
            text(&json!({ "metadata": { "total_size": total_size }, "weight_map": weight_map })),
        ));
    }
    Ok(small)
}

fn hf_config(config: &ModelConfig, dtype: Dtype) -> Value {
    let dtype = match dtype {
        Dtype::Bf16 => "bfloat16",
        Dtype::F16 => "float16",
        Dtype::F32 => "float32",
    };
    let mut written = json!({
        "architectures": ["NemotronForCausalLM"],
        "model_type": "nemotron",
        "attention_bias": false,
        "bos_token_id": config.bos_id,
        "eos_token_id": config.eos_ids.first(),
        "head_dim": config.head_dim,
        "hidden_act": "relu2",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.ffn_size,
        "max_position_embeddings": config.max_context,
        "mlp_bias": false,
        "norm_eps": shortest(config.norm_eps),
        "num_attention_heads": config.num_heads,
        "num_hidden_layers": config.num_layers,
        "num_key_value_heads": config.num_kv_heads,
        "partial_rotary_factor": config.rotary_fraction,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": false,
        "torch_dtype": dtype,
        "use_cache": true,
        "vocab_size": config.vocab_size,
    });
    if let Some(RewardHead { num_attributes, has_bias }) = config.reward {
        let labels = || (0..num_attributes).map(reward::attribute).enumerate();
        written["architectures"] = json!(["NemotronForSequenceClassification"]);
        written["id2label"] = labels().map(|(id, label)| (id.to_string(), json!(label))).collect();
        written["label2id"] = labels().map(|(id, label)| (label.into_owned(), json!(id))).collect();
        written["score_bias"] = has_bias.into();
    }
    written
}

/// The decimal number that people would write for an f32.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().unwrap_or(value.into())
}
