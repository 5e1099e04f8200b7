//! Bodies of `/v1/completions` and `/v1/chat/completions`, and the rows that they ask for.
//!
//! Unknown fields are ignored and any `model` is taken as ours, because tools send what other servers want. Fields that would change the
//! answer, and that we do not have, are refused.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::Value;

use crate::chat::{ChatTemplate, Message, Role};
use crate::end_strings::EOS_ALIAS;
use crate::engine::EngineInfo;
use crate::error_chain::error_chain;
use crate::request::{LogprobSpec, Request, Sampling, StopMatch, Stopping};
use crate::serve::random_u64;
use crate::serve::validate::MAX_SENTENCES;
use crate::tokenizer::Tokenizer;

use super::ApiError;
use super::choice::TextRules;

/// Alternatives a position that may be asked for.
const MAX_TOP_LOGPROBS: u16 = 20;

/// Fields that both dialects share.
#[derive(Deserialize)]
struct Common {
    max_tokens: Option<u32>,
    temperature: Option<f32>,
    top_p: Option<f32>,
    /// An extension that many servers have; -1 and 0 are off.
    top_k: Option<i64>,
    /// An extension that many servers have.
    repetition_penalty: Option<f32>,
    presence_penalty: Option<f32>,
    frequency_penalty: Option<f32>,
    logit_bias: Option<BTreeMap<String, f32>>,
    n: Option<u32>,
    best_of: Option<u32>,
    seed: Option<i64>,
    stop: Option<OneOrMany>,
    /// NeMo's name for `stop`; both count.
    end_strings: Option<Vec<String>>,
    /// NeMo's `max_tokens`: clipped to the context, not held against it.
    tokens_to_generate: Option<u32>,
    /// NeMo's name; an extension.
    min_tokens_to_generate: Option<u32>,
    /// NeMo's name; an extension.
    #[serde(rename = "add_BOS")]
    add_bos: Option<bool>,
    stream: Option<bool>,
    stream_options: Option<StreamOptions>,
    suffix: Option<Value>,
    tools: Option<Value>,
    functions: Option<Value>,
    response_format: Option<Value>,
    modalities: Option<Value>,
}

#[derive(Deserialize)]
struct StreamOptions {
    #[serde(default)]
    include_usage: bool,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum OneOrMany {
    One(String),
    Many(Vec<String>),
}

#[derive(Deserialize)]
struct CompletionFields {
    prompt: Prompt,
    #[serde(default)]
    echo: Option<bool>,
    logprobs: Option<Alternatives>,
}

/// OpenAI's number, or NeMo's flag.
#[derive(Clone, Copy, Deserialize)]
#[serde(untagged)]
enum Alternatives {
    Number(u16),
    Flag(bool),
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Prompt {
    Text(String),
    Texts(Vec<String>),
    Ids(Vec<u32>),
    ManyIds(Vec<Vec<u32>>),
}

#[derive(Deserialize)]
struct ChatFields {
    messages: Vec<ChatMessage>,
    max_completion_tokens: Option<u32>,
    logprobs: Option<bool>,
    top_logprobs: Option<u16>,
}

#[derive(Deserialize)]
struct ChatMessage {
    role: String,
    content: Option<Content>,
    tool_calls: Option<Value>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Content {
    Text(String),
    Parts(Vec<Part>),
}

#[derive(Deserialize)]
struct Part {
    #[serde(rename = "type")]
    kind: String,
    text: Option<String>,
}

/// The two endpoints.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Dialect {
    Completions,
    Chat,
}

/// A body, checked and tokenised.
pub(super) struct Plan {
    pub(super) dialect: Dialect,
    /// `n` for each prompt, one after the other: the order of the choices.
    pub(super) rows: Vec<Request>,
    pub(super) rules: TextRules,
    pub(super) echo: bool,
    pub(super) logprobs: bool,
    pub(super) stream: bool,
    pub(super) include_usage: bool,
    pub(super) prompt_tokens: usize,
}

impl Plan {
    /// # Errors
    /// The body is not what the endpoint takes, with the field's name where one is to blame.
    pub(super) fn prepare(
        dialect: Dialect,
        body: &[u8],
        info: &EngineInfo,
        tokenizer: &Tokenizer,
        chat: &ChatTemplate,
    ) -> Result<Self, ApiError> {
        let common: Common = parse(body)?;
        common.refuse_unsupported()?;
        let eos_ids = info.config.eos_ids.clone();
        let (mut prompts, max_tokens, echo, logprobs, stop_ids) = match dialect {
            Dialect::Completions => {
                let fields: CompletionFields = parse(body)?;
                let prompts = fields.prompt.tokenize(tokenizer);
                let top = fields.logprobs.and_then(|asked| match asked {
                    Alternatives::Number(top) => Some(top),
                    Alternatives::Flag(asked) => asked.then_some(0),
                });
                let max_tokens = common.max_tokens.or(common.tokens_to_generate).unwrap_or(16);
                (prompts, Some(max_tokens), fields.echo == Some(true), top, Vec::new())
            }
            Dialect::Chat => {
                let fields: ChatFields = parse(body)?;
                let top = match (fields.logprobs, fields.top_logprobs) {
                    (Some(true), top) => Some(top.unwrap_or(0)),
                    (_, Some(1..)) => return Err(ApiError::field("top_logprobs", "needs `logprobs: true`")),
                    _ => None,
                };
                let max_tokens = fields.max_completion_tokens.or(common.max_tokens);
                let prompt = chat.encode(&messages(fields.messages)?, tokenizer);
                let prompt = prompt.map_err(|error| ApiError::field("messages", error_chain(&error)))?;
                // Models of this family end a turn by beginning the next one.
                let turn_end = tokenizer.token_id("<extra_id_1>");
                (vec![prompt], max_tokens, false, top, turn_end.into_iter().collect())
            }
        };
        if common.add_bos == Some(true) {
            let bos = info.config.bos_id.ok_or_else(|| ApiError::field("add_BOS", "the model has no BOS token"))?;
            prompts.iter_mut().for_each(|prompt| prompt.insert(0, bos));
        }
        let clip = common.max_tokens.is_none() && common.tokens_to_generate.is_some();
        // OpenAI's way to ask for the prompt's log-probabilities. The engine generates a token that nobody sees.
        let score_only = dialect == Dialect::Completions && max_tokens == Some(0);
        let max_tokens = if score_only { Some(1) } else { max_tokens };
        let n = common.n.unwrap_or(1);
        let num_rows = prompts.len().saturating_mul(n as usize);
        if num_rows == 0 || num_rows > MAX_SENTENCES {
            return Err(ApiError::field(
                "n",
                format!("prompts times `n` must be 1 to {MAX_SENTENCES}, not {num_rows}"),
            ));
        }
        if common.best_of.is_some_and(|best_of| best_of != n) {
            return Err(ApiError::field("best_of", "is not supported: all `n` choices are returned"));
        }
        if logprobs.is_some_and(|top| top > MAX_TOP_LOGPROBS) {
            return Err(ApiError::field(
                "logprobs",
                format!("at most {MAX_TOP_LOGPROBS} alternatives can be asked for"),
            ));
        }
        let stop_strings = common.stop_strings()?;
        let sampling = common.sampling(info.vocab_size)?;
        let spec = LogprobSpec {
            tokens: logprobs.is_some(),
            prompt: logprobs.is_some() && echo,
            top: logprobs.unwrap_or(0),
            ..LogprobSpec::default()
        };
        let stopping = Stopping {
            max_new_tokens: 0,
            min_new_tokens: common.min_tokens_to_generate.unwrap_or(0),
            eos_ids: eos_ids.clone(),
            stop_ids: stop_ids.clone(),
            stop_strings: stop_strings.clone(),
            stop_match: StopMatch::TextContains,
        };
        let mut rows = Vec::with_capacity(num_rows);
        for prompt in &prompts {
            let context = info.max_context.min(info.kv_tokens);
            let max_new_tokens = max_new_tokens(prompt.len(), max_tokens, clip, context)?;
            for sample in 0..n {
                rows.push(Request {
                    prompt: prompt.clone(),
                    sampling: Sampling { sample, ..sampling.clone() },
                    stopping: Stopping { max_new_tokens, ..stopping.clone() },
                    logprobs: spec,
                });
            }
        }
        Ok(Self {
            dialect,
            rows,
            rules: TextRules {
                end_ids: eos_ids.into_iter().chain(stop_ids).collect(),
                stop_strings,
                trim_newline: dialect == Dialect::Chat,
                prompt_only: score_only,
            },
            echo,
            logprobs: logprobs.is_some(),
            stream: common.stream == Some(true),
            include_usage: common.stream_options.is_some_and(|options| options.include_usage),
            prompt_tokens: prompts.iter().map(Vec::len).sum(),
        })
    }
}

/// The conversation that a reward model shall score.
///
/// # Errors
/// Those of [`Plan::prepare`].
pub(super) fn conversation(body: &[u8]) -> Result<Vec<Message>, ApiError> {
    let common: Common = parse(body)?;
    common.refuse_unsupported()?;
    if common.stream == Some(true) {
        return Err(ApiError::field("stream", "a reward model's answer comes at once"));
    }
    messages(parse::<ChatFields>(body)?.messages)
}

fn parse<'a, T: Deserialize<'a>>(body: &'a [u8]) -> Result<T, ApiError> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let parsed = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let at = error.path().to_string();
        // No field is to blame for what is no JSON, or no object.
        match error.inner().is_data() && at != "." {
            true => ApiError::field(&at, error.inner()),
            false => ApiError::invalid(error.inner().to_string()),
        }
    })?;
    reader.end().map_err(|error| ApiError::invalid(error.to_string()))?;
    Ok(parsed)
}

impl Prompt {
    fn tokenize(self, tokenizer: &Tokenizer) -> Vec<Vec<u32>> {
        match self {
            Self::Text(text) => vec![tokenizer.encode(&text)],
            Self::Texts(texts) => texts.iter().map(|text| tokenizer.encode(text)).collect(),
            Self::Ids(ids) => vec![ids],
            Self::ManyIds(ids) => ids,
        }
    }
}

fn messages(messages: Vec<ChatMessage>) -> Result<Vec<Message>, ApiError> {
    if messages.is_empty() {
        return Err(ApiError::field("messages", "must not be empty"));
    }
    messages.into_iter().map(ChatMessage::into_message).collect()
}

impl ChatMessage {
    fn into_message(self) -> Result<Message, ApiError> {
        let content = match self.content {
            None => String::new(),
            Some(Content::Text(text)) => text,
            Some(Content::Parts(parts)) => {
                let texts = parts.into_iter().map(|part| part.text.filter(|_| part.kind == "text"));
                let text: Option<String> = texts.collect();
                text.ok_or(ApiError::field("messages", "only text content is supported"))?
            }
        };
        let role = match self.role.as_str() {
            // "developer" is its newer name.
            "system" | "developer" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            role => {
                let text = format!("a message of `{role}` is not supported: there are system, user and assistant");
                return Err(ApiError::field("messages", text));
            }
        };
        if self.tool_calls.as_ref().is_some_and(asks) {
            return Err(ApiError::field("messages", "tool calls are not supported"));
        }
        Ok(Message { role, content })
    }
}

/// Whether a field that we do not have asks for anything.
fn asks(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => false,
        Value::String(text) => !text.is_empty(),
        Value::Array(list) => list.iter().any(|item| item != "text"),
        Value::Object(fields) => fields.get("type").is_none_or(|kind| kind != "text"),
        _ => true,
    }
}

impl Common {
    fn refuse_unsupported(&self) -> Result<(), ApiError> {
        let fields = [
            ("suffix", &self.suffix),
            ("tools", &self.tools),
            ("functions", &self.functions),
            ("response_format", &self.response_format),
            ("modalities", &self.modalities),
        ];
        match fields.into_iter().find(|(_, value)| value.as_ref().is_some_and(asks)) {
            Some((name, _)) => Err(ApiError::field(name, "is not supported: this server gives plain text")),
            None => Ok(()),
        }
    }

    fn stop_strings(&self) -> Result<Vec<String>, ApiError> {
        let mut strings = match &self.stop {
            None => Vec::new(),
            Some(OneOrMany::One(string)) => vec![string.clone()],
            Some(OneOrMany::Many(strings)) => strings.clone(),
        };
        // The end-of-sequence id, which this name stands for, ends every row anyway.
        strings.extend(self.end_strings.iter().flatten().filter(|end| *end != EOS_ALIAS).cloned());
        match strings.iter().any(String::is_empty) {
            true => Err(ApiError::field("stop", "must not contain an empty string")),
            false => Ok(strings),
        }
    }

    fn sampling(&self, vocab_size: usize) -> Result<Sampling, ApiError> {
        let number = |name, value: Option<f32>, default: f32, min: f32, max: f32| {
            let value = value.unwrap_or(default);
            match (min..=max).contains(&value) {
                true => Ok(value),
                false => Err(ApiError::field(name, format!("must be from {min} to {max}, not {value}"))),
            }
        };
        let temperature = number("temperature", self.temperature, 1.0, 0.0, 100.0)?;
        let logit_bias = self.logit_bias.iter().flatten().map(|(id, &bias)| {
            let id = id.parse().ok().filter(|&id: &u32| (id as usize) < vocab_size);
            let id = id.ok_or_else(|| ApiError::field("logit_bias", "its keys must be token ids of the model"))?;
            Ok((id, number("logit_bias", Some(bias), 0.0, -100.0, 100.0)?))
        });
        Ok(Sampling {
            greedy: temperature == 0.0,
            temperature: temperature.max(f32::MIN_POSITIVE),
            top_k: self.top_k.and_then(|k| u32::try_from(k).ok()).filter(|&k| (k as usize) < vocab_size).unwrap_or(0),
            top_p: number("top_p", self.top_p, 1.0, 0.0, 1.0)?,
            repetition_penalty: number("repetition_penalty", self.repetition_penalty, 1.0, 1e-3, 1e3)?,
            frequency_penalty: number("frequency_penalty", self.frequency_penalty, 0.0, -2.0, 2.0)?,
            presence_penalty: number("presence_penalty", self.presence_penalty, 0.0, -2.0, 2.0)?,
            logit_bias: logit_bias.collect::<Result<_, ApiError>>()?,
            seed: self.seed.map_or_else(random_u64, i64::cast_unsigned),
            sample: 0,
        })
    }
}

/// What a prompt leaves of the context, or as much of it as was asked for.
fn max_new_tokens(prompt_len: usize, asked: Option<u32>, clip: bool, context: usize) -> Result<u32, ApiError> {
    if prompt_len == 0 {
        return Err(ApiError::field("prompt", "must not be empty"));
    }
    let left = u32::try_from(context.saturating_sub(prompt_len)).unwrap_or(u32::MAX);
    match asked {
        Some(0) => Err(ApiError::field("max_tokens", "must be at least 1 in a chat")),
        Some(asked) if asked <= left => Ok(asked),
        asked if left > 0 && (clip || asked.is_none()) => Ok(left),
        _ => {
            let new = asked.unwrap_or(1);
            Err(ApiError::context_length(format!(
                "the model's context is {context} tokens; {prompt_len} in the prompt and {new} to generate are more"
            )))
        }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn common(json: &str) -> Common {
        parse(json.as_bytes()).unwrap()
    }

    #[test]
    fn temperature_zero_is_greedy_and_unknown_fields_are_ignored() {
        assert!(common(r#"{"temperature": 0, "user": "u", "model": "gpt-4o"}"#).sampling(10).unwrap().greedy);
        let sampling = common(r#"{"top_k": -1, "seed": -1, "logit_bias": {"3": -100}}"#).sampling(10).unwrap();
        assert!(!sampling.greedy);
        assert_eq!((sampling.top_k, sampling.seed, sampling.logit_bias), (0, u64::MAX, vec![(3, -100.0)]));
    }

    #[test]
    fn fields_out_of_range_are_named() {
        for (json, name) in [
            (r#"{"temperature": -0.1}"#, "temperature"),
            (r#"{"top_p": 1.5}"#, "top_p"),
            (r#"{"presence_penalty": 3}"#, "presence_penalty"),
            (r#"{"frequency_penalty": -3}"#, "frequency_penalty"),
            (r#"{"logit_bias": {"10": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"x": 1}}"#, "logit_bias"),
            (r#"{"logit_bias": {"1": 101}}"#, "logit_bias"),
        ] {
            let error = common(json).sampling(10).unwrap_err();
            assert_eq!(error.param.as_deref(), Some(name), "{json}");
        }
        let error = common(r#"{"stop": ["a", ""]}"#).stop_strings().unwrap_err();
        assert_eq!(error.param.as_deref(), Some("stop"));
        assert!(parse::<Common>(br#"{"max_tokens": -1}"#).is_err());
        assert!(parse::<Common>(br#"{"n": 1.5}"#).is_err());
    }

    #[test]
    fn what_is_not_there_is_refused_when_it_is_asked_for() {
        for (json, name) in [
            (r#"{"suffix": "end"}"#, "suffix"),
            (r#"{"tools": [{"type": "function"}]}"#, "tools"),
            (r#"{"response_format": {"type": "json_object"}}"#, "response_format"),
            (r#"{"modalities": ["text", "audio"]}"#, "modalities"),
        ] {
            assert_eq!(common(json).refuse_unsupported().unwrap_err().param.as_deref(), Some(name), "{json}");
        }
        let nothing = r#"{"suffix": null, "tools": [], "response_format": {"type": "text"}, "modalities": ["text"]}"#;
        assert!(common(nothing).refuse_unsupported().is_ok());
    }

    #[test]
    fn the_field_that_cannot_be_read_is_named() {
        for (json, name) in [
            (r#"{"max_tokens": 1.5}"#, "max_tokens"),
            (r#"{"stream_options": {"include_usage": 1}}"#, "stream_options.include_usage"),
        ] {
            assert_eq!(parse::<Common>(json.as_bytes()).err().unwrap().param.as_deref(), Some(name));
        }
        assert_eq!(parse::<Common>(b"{").err().unwrap().param, None);
        assert!(parse::<Common>(b"{} {}").is_err());
    }

    #[test]
    fn stop_is_a_string_or_a_list() {
        assert_eq!(common(r#"{"stop": "a"}"#).stop_strings().unwrap(), ["a"]);
        assert_eq!(common(r#"{"stop": ["a", "b"]}"#).stop_strings().unwrap(), ["a", "b"]);
        let both = common(r#"{"stop": "a", "end_strings": ["<|endoftext|>", "b"]}"#);
        assert_eq!(both.stop_strings().unwrap(), ["a", "b"]);
        assert_eq!(common(r#"{"stop": null}"#).stop_strings().unwrap(), [""; 0]);
    }

    #[test]
    fn new_tokens_fit_the_context() {
        for (asked, clip) in [(None, false), (Some(5), false), (Some(9), true)] {
            assert_eq!(max_new_tokens(5, asked, clip, 10).unwrap(), 5);
        }
        assert!(max_new_tokens(10, Some(1), true, 10).is_err());
        for (prompt, asked) in [(5, Some(6)), (10, None), (11, None), (10, Some(1))] {
            assert_eq!(max_new_tokens(prompt, asked, false, 10).unwrap_err().code, Some("context_length_exceeded"));
        }
        assert!(max_new_tokens(0, None, false, 10).is_err());
        assert!(max_new_tokens(5, Some(0), false, 10).is_err());
    }

    #[test]
    fn content_is_a_string_or_parts_of_text() {
        let message = |json: &str| parse::<ChatMessage>(json.as_bytes()).unwrap().into_message();
        assert_eq!(message(r#"{"role": "user", "content": "a"}"#).unwrap().content, "a");
        let parts = r#"{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}"#;
        assert_eq!(message(parts).unwrap().content, "ab");
        assert_eq!(message(r#"{"role": "developer", "content": null}"#).unwrap().role, Role::System);
        for json in [
            r#"{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}"#,
            r#"{"role": "tool", "content": "4", "tool_call_id": "1"}"#,
            r#"{"role": "assistant", "content": null, "tool_calls": [{"id": "1"}]}"#,
        ] {
            assert_eq!(message(json).unwrap_err().param.as_deref(), Some("messages"), "{json}");
        }
    }
}
