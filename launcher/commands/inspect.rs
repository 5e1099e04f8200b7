use std::fmt::Write as _;
use std::path::PathBuf;

use nemotron_engine::checkpoint::{self, Dtype, StoredTensor};
use nemotron_engine::config::ModelConfig;
use nemotron_engine::rank::ModelSource;
use serde::Serialize;
use sha2::{Digest, Sha256};

use crate::cli::InspectArgs;
use crate::env::Environment;
use crate::model::{self, Model};
use crate::report::{Exit, Failure, Outcome, print_json, print_line};

/// Files up to this size are hashed: configurations and tokenizers, and the weights of toy models.
const HASHED_BYTES: u64 = 16 << 20;

#[derive(Serialize)]
struct Inspection {
    schema: u32,
    model: String,
    /// `None` for the model inside the binary.
    path: Option<PathBuf>,
    format: &'static str,
    architecture: ModelConfig,
    parameters: u64,
    tokenizer: TokenizerInfo,
    tensors: Vec<TensorInfo>,
    files: Vec<FileInfo>,
}

#[derive(Serialize)]
struct TokenizerInfo {
    kind: &'static str,
    vocab_size: usize,
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
    /// `None` for large files, and for those inside the binary.
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
    let inspection = inspect(&source)?;
    if args.json {
        print_json(&inspection)?
    } else {
        print_line(text(&inspection))?
    };
    Ok(())
}

fn inspect(source: &ModelSource) -> Outcome<Inspection> {
    let checkpoint = checkpoint::open(source)?;
    let path = match source {
        ModelSource::Builtin => None,
        ModelSource::Path(path) => Some(model::directory(path)),
    };
    let files = checkpoint.files();
    let tokenizer = TokenizerInfo { kind: tokenizer_kind(&files), vocab_size: checkpoint.tokenizer()?.vocab_size() };
    Ok(Inspection {
        schema: 1,
        model: model::name(source),
        format: checkpoint.format(),
        architecture: checkpoint.config().clone(),
        parameters: checkpoint.config().num_parameters(),
        tokenizer,
        tensors: checkpoint.stored_tensors().into_iter().map(tensor_info).collect(),
        files: files
            .into_iter()
            .map(|(name, bytes)| {
                let sha256 = path.as_ref().filter(|_| bytes <= HASHED_BYTES).and_then(|path| sha256(&path.join(&name)));
                FileInfo { name, bytes, sha256 }
            })
            .collect(),
        path,
    })
}

fn tokenizer_kind(files: &[(String, u64)]) -> &'static str {
    if files.iter().any(|(name, _)| name.ends_with(".model")) { "SentencePiece" } else { "Hugging Face tokenizer.json" }
}

fn tensor_info(tensor: StoredTensor) -> TensorInfo {
    let dtype = match tensor.dtype {
        Dtype::Bf16 => "bf16",
        Dtype::F16 => "f16",
        Dtype::F32 => "f32",
    };
    TensorInfo { name: tensor.name, dtype, shape: tensor.shape }
}

/// `None` when the file cannot be read: it is described, not used.
fn sha256(path: &std::path::Path) -> Option<String> {
    let digest = Sha256::digest(std::fs::read(path).ok()?);
    Some(digest.iter().map(|byte| format!("{byte:02x}")).collect())
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
    writeln!(out, "tokenizer     {}, {} pieces", tokenizer.kind, tokenizer.vocab_size)?;
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
