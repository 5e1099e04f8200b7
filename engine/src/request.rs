//! The nouns that a client of the engine speaks: what to generate, how to choose tokens, when to stop, and what
//! comes back. A dialect (NeMo, OpenAI, job file) turns its own fields into these; nothing below knows a dialect.

use serde::{Deserialize, Serialize};

/// How the next token is chosen from the logits.
///
/// Order of operations: end-of-sequence mask (minimum length), logit bias, then greedy argmax (lowest id wins a tie), or
/// temperature, penalties, top-k, top-p, softmax and one draw.
#[derive(Clone, Debug, PartialEq)]
pub struct Sampling {
    /// Take the most likely token; every other field but `logit_bias` is then without effect.
    pub greedy: bool,
    /// Logits are divided by it; finite and > 0.
    pub temperature: f32,
    /// Keep the `top_k` largest logits and everything equal to the smallest of them; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of tokens whose probability reaches it; 0 and 1 keep all.
    pub top_p: f32,
    /// Logits of ids that occur in the row are divided by it when positive, multiplied when negative; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a logit once for every generated occurrence of its id.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of every generated id once.
    pub presence_penalty: f32,
    /// Added to the logits of single ids.
    pub logit_bias: Vec<(u32, f32)>,
    /// Random numbers are a function of (seed, sample, position) alone, so they do not depend on the batch.
    pub seed: u64,
    /// Which of several samples of one prompt this is.
    pub sample: u32,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            greedy: true,
            temperature: 1.0,
            top_k: 0,
            top_p: 1.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            seed: 0,
            sample: 0,
        }
    }
}

/// Where a stop string is looked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum StopMatch {
    /// NeMo: the decoded text of the whole row, prompt included, ends with the string; nothing is cut.
    #[default]
    RowEndsWith,
    /// OpenAI: the new text contains the string; the text is cut before it.
    TextContains,
}

/// When a row ends.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Stopping {
    /// New tokens at most; at least 1.
    pub max_new_tokens: u32,
    /// While fewer tokens are generated, the ids in `eos_ids` cannot be chosen. Other stops are not affected.
    pub min_new_tokens: u32,
    /// Ids that always end a row.
    pub eos_ids: Vec<u32>,
    /// Further ids that end a row, not masked by `min_new_tokens`.
    pub stop_ids: Vec<u32>,
    /// Strings that end a row. The empty string ends it after one token.
    pub stop_strings: Vec<String>,
    /// How `stop_strings` are matched.
    pub stop_match: StopMatch,
}

/// Which log-probabilities come with the tokens. They are always those of the plain softmax: temperature 1, no filters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogprobSpec {
    /// Of each generated token.
    pub tokens: bool,
    /// Of the prompt's tokens 1.. given those before them.
    pub prompt: bool,
    /// Of this many most likely tokens at each of those positions.
    pub top: u16,
    /// Of the whole vocabulary at each of those positions.
    pub full: bool,
    /// A reward model's values for the prompt in place of all that, in [`Logprobs::full`] of a token that means nothing.
    pub rewards: bool,
}

impl LogprobSpec {
    /// Whether anything is wanted of a generated token.
    pub fn wants_any(self) -> bool {
        self.tokens || self.full || self.top > 0 || self.rewards
    }
}

/// How a token is chosen from a row of logits.
#[derive(Clone, Copy, Debug)]
pub struct Choice<'a> {
    pub sampling: &'a Sampling,
    /// Of the new token in its row.
    pub position: u32,
    /// Ids that may not be chosen.
    pub masked: &'a [u32],
    /// For penalties: ids of the prompt, once each, then those generated, as often as they occur.
    pub seen: &'a [u32],
    /// How many of `seen` are the prompt's.
    pub num_prompt: u32,
    /// A device keeps the token as the slot's, for the next step.
    pub slot: u32,
}

/// One row to generate.
#[derive(Clone, Debug)]
pub struct Request {
    /// At least one id; all below the vocabulary's size.
    pub prompt: Vec<u32>,
    pub sampling: Sampling,
    pub stopping: Stopping,
    pub logprobs: LogprobSpec,
}

/// Log-probabilities (natural) at one position.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Logprobs {
    /// Of the token that stands there.
    pub token: f32,
    /// The most likely ids, best first (equal ones by id); empty unless asked for.
    pub top: Vec<(u32, f32)>,
    /// `vocab_size` values, or a reward model's; empty unless asked for.
    pub full: Vec<f32>,
}

/// What a row reports while it is generated, in this order: `Prompt`*, `Token`*, then one of `Finished`, `Failed`.
#[derive(Clone, Debug)]
pub enum Event {
    /// The next prompt positions' log-probabilities, if asked for.
    Prompt(Vec<Logprobs>),
    /// One more token.
    Token { id: u32, logprobs: Option<Box<Logprobs>> },
    /// The row is complete.
    Finished(Finish),
    /// The row cannot be completed.
    Failed(RowError),
}

/// How a row ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finish {
    pub reason: FinishReason,
    /// With [`StopMatch::TextContains`]: the length in bytes of the new text that is left when it is cut before the stop string.
    pub text_len: Option<usize>,
}

/// Why a row ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-sequence id, a stop id or a stop string.
    Stop,
    /// `max_new_tokens` were generated.
    Length,
}

/// Why a row cannot be generated. The text is fit for the client that sent the row.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum RowError {
    #[error("the prompt is empty")]
    EmptyPrompt,
    #[error("token id {id} is outside the vocabulary of {vocab_size}")]
    UnknownToken { id: u32, vocab_size: usize },
    #[error("{needed} tokens (prompt and new ones) exceed the context of {limit}")]
    TooLong { needed: usize, limit: usize },
    #[error("{needed} tokens (prompt and new ones) do not fit the KV cache of {limit}")]
    KvTooSmall { needed: usize, limit: usize },
    #[error("this is a reward model: it scores texts and writes none")]
    OnlyScores,
    #[error("this model writes texts: it has no reward head to score them")]
    CannotScore,
    #[error("the engine is shutting down")]
    ShuttingDown,
    #[error("the engine has failed: {0}")]
    EngineFailed(String),
    #[error("the model gave logits that are not finite")]
    NotFinite,
}
