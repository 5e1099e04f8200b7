//! Commands about checkpoints.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

#[derive(Clone, Debug, Args)]
#[command(after_help = "Exit code: 22 when the checkpoint is incomplete, damaged or of another architecture.")]
pub struct InspectArgs {
    /// Directory or file of a checkpoint, or `builtin`
    pub model: String,
    /// Profile whose ranks' reading plans are shown [default: h100x16, where the model can be cut so]
    #[arg(long, value_name = "NAME")]
    pub profile: Option<String>,
    /// Read every byte: hash the files, compare them with the manifest if there is one, look for NaN and infinities
    #[arg(long)]
    pub verify: bool,
    /// With --verify: write the manifest, with which every later load is compared
    #[arg(long, requires = "verify")]
    pub write_manifest: bool,
    /// Read what the ranks of the profile read, all at the same time, and say how fast: each byte is copied, as `dd` would
    #[arg(long)]
    pub read: bool,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// What `convert` writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ConvertTo {
    /// Hugging Face safetensors, as transformers reads them
    Hf,
    /// One file a rank of the mesh --tp × --pp, in the order in which it is read
    Shards,
}

#[derive(Clone, Debug, Args)]
#[command(after_help = "Examples:
  nemotron convert /models/Nemotron-4-340B-Instruct /scratch/340b-tp8pp2 --to shards --tp 8 --pp 2
  nemotron convert model.gguf model-hf --to hf
A conversion that was stopped goes on with the same command. The output has a manifest with which every load is compared.")]
pub struct ConvertArgs {
    /// Directory or file of a checkpoint, or `builtin`
    pub model: String,
    /// Directory to write: empty, not there yet, or of the same conversion
    pub output: PathBuf,
    /// Format
    #[arg(long, value_name = "FORMAT")]
    pub to: ConvertTo,
    /// Tensor-parallel ranks that the shards are for
    #[arg(long, value_name = "N", default_value = "1")]
    pub tp: std::num::NonZeroUsize,
    /// Pipeline stages that the shards are for
    #[arg(long, value_name = "N", default_value = "1")]
    pub pp: std::num::NonZeroUsize,
    /// Gigabytes of a Hugging Face file at most
    #[arg(long, value_name = "GB", default_value = "5")]
    pub shard_gb: std::num::NonZeroU64,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}
