//! One completion of the OpenAI dialect as it grows: text that is safe to show, and log-probabilities in OpenAI's forms.

use serde_json::{Map, Value, json};

use crate::request::{Event, Finish, FinishReason, Logprobs};
use crate::tokenizer::{Detokenizer, Tokenizer};

/// What decides about the text of all choices of a request.
#[derive(Clone)]
pub(super) struct TextRules {
    /// Ids that end a row without being part of its text.
    pub(super) end_ids: Vec<u32>,
    /// Strings before which the text is cut.
    pub(super) stop_strings: Vec<String>,
    /// The line break before an end id is part of the turn's end, not of its text.
    pub(super) trim_newline: bool,
    /// Nothing of what is generated is shown.
    pub(super) prompt_only: bool,
}

/// The text of one row so far.
pub(super) struct Choice {
    rules: TextRules,
    tokenizer: Tokenizer,
    detokenizer: Detokenizer,
    text: String,
    /// Length of an echoed prompt at the start of `text`.
    echoed: usize,
    /// What was taken already.
    taken: usize,
    /// Tokens whose log-probabilities were not taken yet.
    tokens: Vec<ShownToken>,
    /// The next prompt token that waits for its log-probability; the first one has none.
    next_prompt: usize,
    ended_by_id: bool,
    finished: Option<FinishReason>,
    pub(super) num_tokens: usize,
}

/// A token and where its text starts.
pub(super) struct ShownToken {
    id: u32,
    start: usize,
    logprobs: Option<Logprobs>,
}

/// What a choice has gained since the last look.
pub(super) struct Piece {
    pub(super) text: String,
    /// Where `text` starts, in bytes of the whole.
    start: usize,
    tokens: Vec<ShownToken>,
    pub(super) finished: Option<FinishReason>,
}

impl Choice {
    /// With `echo` the text starts with the prompt's.
    pub(super) fn new(tokenizer: &Tokenizer, prompt: &[u32], echo: bool, rules: TextRules) -> Self {
        let mut choice = Self {
            rules,
            tokenizer: tokenizer.clone(),
            detokenizer: Detokenizer::new(tokenizer, if echo { &[] } else { prompt }),
            text: String::new(),
            echoed: 0,
            taken: 0,
            tokens: Vec::new(),
            next_prompt: 1,
            ended_by_id: false,
            finished: None,
            num_tokens: 0,
        };
        if echo {
            for &id in prompt {
                choice.push(id, None);
            }
            choice.echoed = choice.text.len();
        }
        choice
    }

    /// Takes an event of the row, except a failure.
    pub(super) fn update(&mut self, event: Event) {
        match event {
            Event::Prompt(positions) => {
                for position in positions {
                    if let Some(token) = self.tokens.get_mut(self.next_prompt) {
                        token.logprobs = Some(position);
                    }
                    self.next_prompt += 1;
                }
            }
            Event::Token { .. } if self.rules.prompt_only => {}
            Event::Token { id, logprobs } => {
                self.num_tokens += 1;
                if self.rules.end_ids.contains(&id) {
                    self.ended_by_id = true;
                } else {
                    self.push(id, logprobs.map(|logprobs| *logprobs));
                }
            }
            Event::Finished(finish) => self.finish(&finish),
            Event::Failed(_) => {}
        }
    }

    fn push(&mut self, id: u32, logprobs: Option<Logprobs>) {
        self.tokens.push(ShownToken { id, start: self.text.len(), logprobs });
        self.detokenizer.push(id, &mut self.text);
    }

    fn finish(&mut self, finish: &Finish) {
        self.detokenizer.finish(&mut self.text);
        if let Some(len) = finish.text_len {
            let end = (self.echoed + len).min(self.text.len());
            self.text.truncate(self.text.floor_char_boundary(end));
        }
        if self.ended_by_id && self.rules.trim_newline && self.text.ends_with('\n') {
            self.text.pop();
        }
        // A token of the stop string alone is not shown, so neither is its log-probability.
        let end = self.text.len();
        if finish.text_len.is_some() {
            self.tokens.retain(|token| token.start < end);
        }
        self.finished = Some(if self.rules.prompt_only { FinishReason::Length } else { finish.reason });
    }

    /// What became certain since the last call: text that cannot turn out to be the beginning of a stop string.
    pub(super) fn take(&mut self) -> Option<Piece> {
        let mut end = self.text.len();
        if self.finished.is_none() {
            let new = &self.text[self.taken.max(self.echoed)..];
            end -= new.len() - certain_len(new, &self.rules.stop_strings);
            if self.rules.trim_newline && self.text[self.taken..end].ends_with('\n') {
                end -= 1;
            }
        }
        if end <= self.taken && self.finished.is_none() {
            return None;
        }
        let text = self.text.get(self.taken..end).unwrap_or_default().to_owned();
        let shown = match self.finished {
            Some(_) => self.tokens.len(),
            None => self.tokens.partition_point(|token| token.start < end),
        };
        let piece =
            Piece { text, start: self.taken, tokens: self.tokens.drain(..shown).collect(), finished: self.finished };
        self.taken = end.max(self.taken);
        Some(piece)
    }

    /// The text of a token by itself, spaces included; bytes of incomplete characters as they are.
    fn token_bytes(&self, id: u32) -> Vec<u8> {
        let piece = self.tokenizer.piece(id);
        let byte = piece.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
        match byte.and_then(|byte| u8::from_str_radix(byte, 16).ok()) {
            Some(byte) => vec![byte],
            None => piece.replace('\u{2581}', " ").into_bytes(),
        }
    }

    fn token_text(&self, id: u32) -> String {
        String::from_utf8_lossy(&self.token_bytes(id)).into_owned()
    }

    /// The `logprobs` object of chat completions.
    pub(super) fn chat_logprobs(&self, piece: &Piece) -> Value {
        let entry = |id: u32, logprob: f32| json!({"token": self.token_text(id), "logprob": finite(logprob), "bytes": self.token_bytes(id)});
        let known = piece.tokens.iter().filter_map(|token| Some((token.id, token.logprobs.as_ref()?)));
        let content: Vec<Value> = known
            .map(|(id, logprobs)| {
                let mut value = entry(id, logprobs.token);
                value["top_logprobs"] = logprobs.top.iter().map(|&(id, logprob)| entry(id, logprob)).collect();
                value
            })
            .collect();
        json!({"content": content, "refusal": null})
    }

    /// The `logprobs` object of completions.
    pub(super) fn completion_logprobs(&self, piece: &Piece) -> Value {
        let tokens = &piece.tokens;
        // Offsets count code points of the whole text; tokens come in order.
        let mut offset = self.text[..piece.start.min(self.text.len())].chars().count();
        let mut at = piece.start;
        let mut offsets = Vec::with_capacity(tokens.len());
        for token in tokens {
            // A character of several tokens starts at its last one.
            offset += self.text.get(at..token.start).map_or(0, |between| between.chars().count());
            at = token.start.max(at);
            offsets.push(offset);
        }
        let top = |logprobs: &Logprobs| -> Map<String, Value> {
            logprobs.top.iter().map(|&(id, logprob)| (self.token_text(id), json!(finite(logprob)))).collect()
        };
        json!({
            "tokens": tokens.iter().map(|token| self.token_text(token.id)).collect::<Vec<_>>(),
            "token_logprobs": tokens.iter().map(|token| Some(finite(token.logprobs.as_ref()?.token))).collect::<Vec<_>>(),
            "top_logprobs": tokens.iter().map(|token| token.logprobs.as_ref().map(top)).collect::<Vec<_>>(),
            "text_offset": offsets,
        })
    }
}

/// JSON has no infinity. OpenAI's API writes this for it.
fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { -9999.0 }
}

/// Bytes of `text` that neither are in a stop string nor may become one as the text grows.
fn certain_len(text: &str, stop_strings: &[String]) -> usize {
    let stops = stop_strings.iter().filter(|stop| !stop.is_empty());
    let uncertain = stops.filter_map(|stop| {
        let found = text.find(stop.as_str());
        found.or_else(|| {
            let first = text.len().saturating_sub(stop.len() - 1);
            (first..text.len()).find(|&start| text.is_char_boundary(start) && stop.starts_with(&text[start..]))
        })
    });
    uncertain.min().unwrap_or(text.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn check(text: &str, stops: &[&str], certain: &str) {
        let stops: Vec<String> = stops.iter().map(ToString::to_string).collect();
        assert_eq!(&text[..certain_len(text, &stops)], certain);
    }

    #[test]
    fn text_that_may_become_a_stop_string_is_held_back() {
        check("Hello", &[], "Hello");
        check("Hello", &["Human:"], "Hello");
        check("Hello Hu", &["Human:"], "Hello ");
        check("Hello HumHum", &["Human:"], "Hello Hum");
        check("aab", &["aabc", "b\n"], "");
        check("xaab", &["b\n"], "xaa");
        check("é", &["éa"], "");
        check("ab", &["", "zz"], "ab");
    }

    #[test]
    fn text_from_a_complete_stop_string_on_is_held_back() {
        check("Hello Human: you", &["Human:"], "Hello ");
        check("one two", &["two", "one"], "");
    }
}
