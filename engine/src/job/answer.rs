//! What a row gave, and the line that says so.

use serde_json::{Value, json};

use crate::request::{FinishReason, RowError, Stopping};
use crate::reward;
use crate::tokenizer::{Detokenizer, Tokenizer};

use super::input::InputRow;
use super::record::{Counts, Done, Key};

/// A row that was generated, or scored.
pub(super) struct Completed {
    pub(super) prompt: Vec<u32>,
    pub(super) new_ids: Vec<u32>,
    /// A reward model's values.
    pub(super) rewards: Vec<f32>,
    pub(super) reason: FinishReason,
}

/// What a line of the output says about a row.
#[derive(Default)]
pub(super) struct Outcome {
    response: String,
    rewards: Vec<f32>,
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
    let (outcome, error) = parts(result);
    let mut line = json!({
        "id": row.id,
        "sample": sample,
        "response": outcome.response,
        "finish_reason": outcome.reason.map_or(json!("error"), |reason| json!(reason)),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "seed": seed,
    });
    let counts = outcome.counts(error.is_some());
    if let Some(error) = error {
        line["error"] = error;
    }
    for (key, value) in &row.carried {
        line[key] = value.clone();
    }
    Done { key, counts, line: line.to_string() }
}

/// The record of a row that was scored: the row as it came, and its values. One that has no response keeps the error that says why.
pub(super) fn scored(key: Key, row: &InputRow, result: Result<Outcome, RowFailure>) -> Done {
    let (outcome, error) = parts(result);
    let mut line = json!({ "id": row.id });
    for (key, value) in &row.carried {
        line[key] = value.clone();
    }
    let counts = outcome.counts(error.is_some());
    if let Some(error) = error.filter(|_| line["error"].is_null()) {
        line["error"] = error;
    }
    let rewards = &outcome.rewards;
    line["rewards"] = if counts.failed { Value::Null } else { reward::by_name(rewards) };
    line["score"] = reward::scalar(rewards).map_or(Value::Null, reward::number);
    Done { key, counts, line: line.to_string() }
}

fn parts(result: Result<Outcome, RowFailure>) -> (Outcome, Option<Value>) {
    match result {
        Ok(outcome) => (outcome, None),
        Err(error) => (Outcome::default(), Some(json!({"code": error.code, "message": error.message}))),
    }
}

impl Outcome {
    fn counts(&self, failed: bool) -> Counts {
        let (prompt_tokens, completion_tokens) = (self.prompt_tokens as u32, self.completion_tokens as u32);
        Counts { failed, prompt_tokens, completion_tokens }
    }
}

impl Completed {
    pub(super) fn outcome(self, tokenizer: &Tokenizer, stopping: &Stopping) -> Outcome {
        Outcome {
            response: self.response(tokenizer, stopping),
            rewards: self.rewards,
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
    fn a_scored_row_keeps_what_it_has() {
        let line = |row: Value, result| {
            let mut carried = row.as_object().unwrap().clone();
            let id = carried.shift_remove("id").unwrap();
            let done = scored([0; 16], &InputRow { id, prompt: Vec::new(), carried }, result);
            (done.counts, done.line)
        };
        let row = json!({"id": 3, "sample": 1, "prompt": "a", "response": "b"});
        let rewards = vec![0.5, 0.0, 0.0, 0.0, 1.0, 2.0, 0.0, 0.0, 0.1];
        let outcome = || Outcome { rewards: rewards.clone(), prompt_tokens: 7, ..Outcome::default() };
        let (counts, text) = line(row.clone(), Ok(outcome()));
        assert_eq!((counts.failed, counts.prompt_tokens, counts.completion_tokens), (false, 7, 0));
        assert!(
            text.starts_with(r#"{"id":3,"sample":1,"prompt":"a","response":"b","rewards":{"quality":0.5,"#),
            "{text}"
        );
        assert!(text.ends_with(r#""verbosity":0.1},"score":1.747}"#), "{text}");
        let (counts, text) = line(row, Err(RowError::CannotScore.into()));
        assert!(counts.failed && text.contains(r#""error":{"code":"wrong_model""#), "{text}");
        assert!(text.ends_with(r#""rewards":null,"score":null}"#), "{text}");
        let unanswered = json!({"id": 4, "response": "", "error": {"code": "context_overflow"}});
        let (counts, text) = line(unanswered, Err(RowError::EmptyPrompt.into()));
        assert!(counts.failed && text.contains(r#""error":{"code":"context_overflow"}"#), "{text}");
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
