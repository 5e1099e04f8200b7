//! Commands that ask a serving run.

use std::num::NonZero;
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

/// Whom to ask: shared by `generate` and `score`.
#[derive(Clone, Debug, Default, Args)]
#[command(next_help_heading = "Server")]
pub struct ServerArgs {
    /// Serving run to ask: a name, a unique prefix of it, or `latest`; goes before --url [default: latest]
    #[arg(long, value_name = "RUN")]
    pub run: Option<String>,
    /// Server to ask, in place of a run
    #[arg(long, value_name = "URL", env = crate::env::URL)]
    pub url: Option<String>,
    /// File that holds the server's token; a run's own is found by itself
    #[arg(long, value_name = "FILE", env = crate::env::TOKEN_FILE)]
    pub token_file: Option<PathBuf>,
    /// Give up after so long (`90`, `90s`, `5m`, `2h`); waits forever when not given
    #[arg(long, value_name = "DURATION", value_parser = crate::seconds::parse, env = crate::env::TIMEOUT)]
    pub timeout: Option<Duration>,
}

#[derive(Clone, Debug, Args)]
#[command(
    after_help = "A line is a JSON object with `prompt` and `response`, or with `messages` of which the last is the assistant's (a `response` comes
behind them); or such a list of messages. Whole files are better scored by a job with the table [reward].

Examples:
  nemotron score --url http://127.0.0.1:1424 --json responses.jsonl
  nemotron score --prompt \"Sing of the sea.\" --response \"The sea is deep.\""
)]
pub struct ScoreArgs {
    /// Files of conversations, one a line; `-` is stdin [default: -]
    #[arg(value_name = "FILE", conflicts_with_all = ["prompt", "response"])]
    pub files: Vec<PathBuf>,
    /// What the user said, in place of a file
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "response")]
    pub prompt: Option<String>,
    /// What the assistant answered
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true, requires = "prompt")]
    pub response: Option<String>,
    /// Requests at a time
    #[arg(long, value_name = "N", default_value = "16")]
    pub concurrency: NonZero<usize>,
    /// One JSON object a conversation: its keys, and `rewards`, `score` and `exceeded`
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    pub server: ServerArgs,
}
