//! Commands that measure.

use clap::builder::PossibleValuesParser;
use clap::{Args, Subcommand};

use super::EngineArgs;

#[derive(Clone, Debug, Subcommand)]
pub enum BenchCommand {
    /// One rank's part of a large model alone on one device, with random weights and no other ranks
    Rank(BenchRankArgs),
}

#[derive(Clone, Debug, Args)]
pub struct BenchRankArgs {
    #[command(flatten)]
    pub engine: EngineArgs,
    /// Stage of the pipeline whose first rank is measured
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub stage: usize,
    /// Only so many of the stage's layers
    #[arg(long, value_name = "N")]
    pub layers: Option<std::num::NonZeroUsize>,
    /// Rows that decode at the same time; repeatable
    #[arg(long = "batch", value_name = "N", default_values_t = [1, 8, 32, 64, 128], value_parser = sizes(1..=256))]
    pub batches: Vec<usize>,
    /// Length of a prompt whose prefill is measured; repeatable
    #[arg(long = "prompt-tokens", value_name = "N", default_values_t = [512, 2048], value_parser = sizes(1..=4096))]
    pub prompt_tokens: Vec<usize>,
    /// Tokens in the cache of each row that decodes
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = sizes(1..=4096))]
    pub context: usize,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}

/// Numbers in a range.
fn sizes(range: std::ops::RangeInclusive<u64>) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser as _;
    clap::value_parser!(u64).range(range).map(|size| size as usize)
}

#[derive(Clone, Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct BenchArgs {
    #[command(subcommand)]
    pub command: Option<BenchCommand>,
    /// Directory of a checkpoint, or `builtin` [default: builtin]
    #[arg(long, value_name = "DIR")]
    pub model: Option<String>,
    /// The same without the flag
    #[arg(value_name = "MODEL", conflicts_with = "model")]
    pub model_argument: Option<String>,
    /// Threads that compute [default: all cores]
    #[arg(long, value_name = "N")]
    pub threads: Option<std::num::NonZeroUsize>,
    /// Precision: bf16 operands with f32 sums, or all f32
    #[arg(long, value_name = "DTYPE", default_value = "bf16", value_parser = PossibleValuesParser::new(["bf16", "f32"]))]
    pub dtype: String,
    /// Length of a prompt whose prefill is measured; repeatable
    #[arg(long = "prompt-tokens", value_name = "N", default_values_t = [128, 512, 2048], value_parser = clap::value_parser!(u32).range(1..))]
    pub prompt_tokens: Vec<u32>,
    /// Steps of decoding that are measured
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u32).range(1..))]
    pub new_tokens: u32,
    /// Rows that decode at the same time; repeatable
    #[arg(long = "batch", value_name = "N", default_values_t = [1, 4, 16, 64], value_parser = clap::value_parser!(u32).range(1..=256))]
    pub batches: Vec<u32>,
    /// Print one JSON object on stdout
    #[arg(long)]
    pub json: bool,
}
