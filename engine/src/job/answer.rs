//! What a row gave, and the line that says so.

use serde_json::json;

use crate::request::{FinishReason, RowError, Stopping};
use crate::tokenizer::{Detokenizer, Tokenizer};

use super::input::InputRow;
use super::record::{Counts, Done, Key};

/// A row that was generated.
pub(super) struct Completed {
    pub(super) prompt: Vec<u32>,
    pub(super) new_ids: Vec<u32>,
    pub(super) reason: FinishReason,
}

/// What a line of the output says about a row.
#[derive(Default)]
pub(super) struct Outcome {
    response: String,
    /// `None` for a failed row.
    reason: Option<FinishReason>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

/// Why a row has no response.
pub(super) struct RowFailure {
    /// Stable: scripts branch on it.
    code: &'static str,
    message: String,
}

impl RowFailure {
    /// For a row that the engine crashed over twice, the second time while it was the only one.
    pub(super) fn poison() -> Self {
        Self { code: "poison", message: "the engine crashed each time it ran this row".into() }
    }
}

impl From<RowError> for RowFailure {
    fn from(error: RowError) -> Self {
        let code = match error {
            RowError::EmptyPrompt => "empty_prompt",
            RowError::UnknownToken { .. } => "unknown_token",
            RowError::TooLong { .. } | RowError::KvTooSmall { .. } => "context_overflow",
            RowError::OnlyScores | RowError::CannotScore => "wrong_model",
            RowError::NotFinite => "not_finite",
            RowError::ShuttingDown | RowError::EngineFailed(_) => "engine",
        };
        Self { code, message: error.to_string() }
    }
}

/// The record of a row that is done.
pub(super) fn done(key: Key, row: &InputRow, sample: u32, seed: u64, result: Result<Outcome, RowFailure>) -> Done {
    let (outcome, error) = match result {
        Ok(outcome) => (outcome, None),
        Err(error) => (Outcome::default(), Some(json!({"code": error.code, "message": error.message}))),
    };
    let mut line = json!({
        "id": row.id,
        "sample": sample,
        "response": outcome.response,
        "finish_reason": outcome.reason.map_or(json!("error"), |reason| json!(reason)),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "seed": seed,
    });
    let failed = error.is_some();
    if let Some(error) = error {
        line["error"] = error;
    }
    for (key, value) in &row.carried {
        line[key] = value.clone();
    }
    let counts = Counts {
        failed,
        prompt_tokens: outcome.prompt_tokens as u32,
        completion_tokens: outcome.completion_tokens as u32,
    };
    Done { key, counts, line: line.to_string() }
}

impl Completed {
    pub(super) fn outcome(&self, tokenizer: &Tokenizer, stopping: &Stopping) -> Outcome {
        Outcome {
            response: self.response(tokenizer, stopping),
            reason: Some(self.reason),
            prompt_tokens: self.prompt.len(),
            completion_tokens: self.new_ids.len(),
        }
    }

    /// The new text without what ended it.
    fn response(&self, tokenizer: &Tokenizer, stopping: &Stopping) -> String {
        let stopped = self.reason == FinishReason::Stop;
        let by_id = |id: &u32| stopped && (stopping.eos_ids.contains(id) || stopping.stop_ids.contains(id));
        let (ids, by_id) = match self.new_ids.split_last() {
            Some((last, rest)) if by_id(last) => (rest, true),
            _ => (self.new_ids.as_slice(), false),
        };
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(tokenizer, &self.prompt);
        ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
        detokenizer.finish(&mut text);
        if stopped && !by_id {
            let prompt = tokenizer.decode(&self.prompt);
            text.truncate(len_before_end_string(&prompt, &text, &stopping.stop_strings));
        }
        text
    }
}

/// Bytes of `text` before the longest end string that prompt and text end with; it may begin in the prompt.
fn len_before_end_string(prompt: &str, text: &str, end_strings: &[String]) -> usize {
    let len = |end: &String| match text.strip_suffix(end.as_str()) {
        Some(rest) => Some(rest.len()),
        None => end.strip_suffix(text).filter(|head| prompt.ends_with(head)).map(|_| 0),
    };
    end_strings.iter().filter_map(len).min().unwrap_or(text.len())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn the_longest_end_string_is_cut_even_if_it_began_in_the_prompt() {
        let ends: Vec<String> = ["", "\n", "User\n", "Human:"].map(String::from).to_vec();
        for (prompt, text, left) in [
            ("p", "hello User\n", "hello "),
            ("p", "hello\n", "hello"),
            ("p", "hello", "hello"),
            ("Hum", "an:", ""),
            ("p", "an:", "an:"),
        ] {
            assert_eq!(&text[..len_before_end_string(prompt, text, &ends)], left, "{prompt}|{text}");
        }
    }

    #[test]
    fn failed_rows_have_a_line_with_code_and_carried_keys() {
        let carried = json!({"topic": "sea", "n": 1}).as_object().unwrap().clone();
        let row = InputRow { id: json!("k"), prompt: Vec::new(), carried };
        let done = done([0; 16], &row, 1, 9, Err(RowError::TooLong { needed: 7, limit: 6 }.into()));
        assert!(done.counts.failed);
        assert_eq!(
            done.line,
            r#"{"id":"k","sample":1,"response":"","finish_reason":"error","prompt_tokens":0,"completion_tokens":0,"seed":9,"error":{"code":"context_overflow","message":"7 tokens (prompt and new ones) exceed the context of 6"},"topic":"sea","n":1}"#
        );
    }
}
