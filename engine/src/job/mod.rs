//! A job file run to its end: rows in, `responses.jsonl` out, in input order, each exactly once.
//!
//! [`Job::load`] reads and checks the whole input before anything is generated. [`Job::run`] generates (with `[reward]`: scores) what the
//! [`Journal`] does not have yet, and writes the output from the journal when every row is there. [`Results`] looks into the journal from outside.

mod answer;
mod archive;
mod columns;
mod frame;
mod input;
mod journal;
mod lines;
mod measure;
mod output;
mod parquet_file;
mod prompt;
mod queue;
mod record;
mod results;
mod run;
mod work;

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

pub use self::journal::{Journal, JournalOptions};
pub use self::measure::JobMeasure;
pub use self::queue::Share;
pub use self::results::{Results, Stats, Verified};
pub use self::run::Job;

/// A job file. Field by field the contract that users write.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JobFile {
    pub schema: u32,
    pub input: Input,
    pub output: Output,
    #[serde(default)]
    pub prompt: Prompt,
    #[serde(default)]
    pub sampling: JobSampling,
    #[serde(default)]
    pub generation: Generation,
    /// Rows have their response already, and a reward model scores it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reward: Option<Reward>,
    /// Launcher keys that a job file may override (`slurm.time`, `profile`, …); the engine does not read them.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub launch: BTreeMap<String, toml::Value>,
}

/// Exactly one of the two.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Input {
    /// JSON lines, also compressed (`.zst`), or Parquet: `{"id"?, "prompt" | "messages", …}`; relative to the job file.
    pub path: Option<PathBuf>,
    pub prompts: Option<Vec<String>>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// Relative to the job file.
    pub path: PathBuf,
    /// Lines carry `prompt` or `messages` too.
    #[serde(default)]
    pub include_prompt: bool,
}

/// The table `[reward]`; that it is there says everything.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reward {}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Prompt {
    /// A built-in template's name, "raw", or a file. With `[reward]`, "nemotron" is not what is meant and becomes "annotator".
    pub template: String,
    pub system: String,
    /// A template over a row's columns that makes what the user says, in place of the row's `prompt`.
    pub user: Option<String>,
    /// The same from a file.
    pub user_file: Option<PathBuf>,
}

impl Default for Prompt {
    fn default() -> Self {
        Self { template: "nemotron".into(), system: String::new(), user: None, user_file: None }
    }
}

/// The request fields of `PUT /generate`, same names and meaning.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct JobSampling {
    pub tokens_to_generate: u32,
    pub min_tokens_to_generate: u32,
    pub greedy: bool,
    pub temperature: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub repetition_penalty: f32,
    pub random_seed: u64,
    pub end_strings: Vec<String>,
}

impl Default for JobSampling {
    fn default() -> Self {
        Self {
            tokens_to_generate: 1024,
            min_tokens_to_generate: 1,
            greedy: true,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            random_seed: 0,
            end_strings: ["<|endoftext|>", "<extra_id_1>", "\u{11}", "<extra_id_1>User"].map(String::from).to_vec(),
        }
    }
}

/// What to do with a row whose prompt and new tokens exceed the context.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ContextOverflow {
    #[default]
    Reject,
    TruncateLeft,
    ShortenGeneration,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Generation {
    pub samples_per_prompt: u32,
    pub context_overflow: ContextOverflow,
    /// Share of rows that may fail before the run counts as failed.
    pub max_failed: f64,
}

impl Default for Generation {
    fn default() -> Self {
        Self { samples_per_prompt: 1, context_overflow: ContextOverflow::Reject, max_failed: 0.0 }
    }
}

/// How far a job is. A row is one sample of one prompt.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct JobProgress {
    pub rows_total: u64,
    /// Complete rows, failed ones among them.
    pub rows_done: u64,
    pub rows_failed: u64,
    /// Of the complete rows: those that earlier attempts completed.
    #[serde(default)]
    pub rows_kept: u64,
    /// No row is begun for now: the journal or the output cannot be written.
    #[serde(default)]
    pub paused: bool,
    /// Of all complete rows.
    pub prompt_tokens: u64,
    pub completion_tokens: u64,
}

/// Why a job did not complete.
#[derive(Debug, thiserror::Error)]
pub enum JobError {
    #[error("{path}: {reason}")]
    Input { path: PathBuf, reason: String },
    #[error("cannot write {path}")]
    Output {
        path: PathBuf,
        #[source]
        source: std::io::Error,
    },
    #[error("{failed} of {total} rows failed, at most {allowed} may; the first: {first}")]
    TooManyFailed { failed: u64, total: u64, allowed: u64, first: String },
    #[error("the engine failed: {0}")]
    Engine(String),
    #[error("a row needs {needed} tokens of KV cache, which holds {limit}")]
    KvTooSmall { needed: usize, limit: usize },
    #[error("{what} changed since the rows that are done were generated")]
    Changed { what: &'static str },
    #[error("attempt {attempt} has taken the job over")]
    Fenced { attempt: u32 },
    #[error("the time is over: {done} of {total} rows are done{}", rest(*.rest_s))]
    Deadline {
        done: u64,
        total: u64,
        /// Seconds for the others at this attempt's rate, if it completed any.
        rest_s: Option<f64>,
    },
    #[error("stopped before the end")]
    Stopped,
}

fn rest(seconds: Option<f64>) -> String {
    seconds.map_or_else(String::new, |seconds| format!(", the others need about {:.0} s more", seconds.ceil()))
}
