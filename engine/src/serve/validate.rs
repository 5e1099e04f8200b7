//! The fields of `PUT /generate`: types, ranges, order and error texts are NeMo's.
//!
//! Python decides what an integer is: `true` is 1 where NeMo asks `isinstance(x, int)`, and refused where it compares types.

use std::borrow::Cow;

use serde_json::{Map, Value};

use crate::chat::{Message, Role};

/// Prompts in one request at most; the texts below say so.
pub(super) const MAX_SENTENCES: usize = 128;

/// A valid request.
#[derive(Debug, PartialEq)]
pub(super) struct Params {
    pub(super) sentences: Vec<Sentence>,
    pub(super) tokens_to_generate: u32,
    pub(super) all_probs: bool,
    pub(super) temperature: f32,
    pub(super) add_bos: bool,
    pub(super) greedy: bool,
    /// 0 is off; not yet held against the vocabulary's size.
    pub(super) top_k: u32,
    pub(super) top_p: f32,
    pub(super) repetition_penalty: f32,
    pub(super) end_strings: Vec<String>,
    pub(super) min_tokens_to_generate: u32,
    pub(super) compute_logprob: bool,
    pub(super) random_seed: Option<u64>,
}

/// One prompt.
#[derive(Debug, PartialEq)]
pub(super) enum Sentence {
    Text(String),
    /// Our extension: a list of token ids.
    Ids(Vec<u32>),
    /// A conversation for the chat template.
    Chat(Vec<Message>),
}

/// Why a request is not generated.
#[derive(Debug, PartialEq)]
pub(super) enum Refusal {
    /// Status 400 and an object with `message`: what makes NeMo fail rather than answer.
    Malformed(Cow<'static, str>),
    /// Status 400 and a JSON string.
    Rejected(&'static str),
    /// Status 200 (400 in strict mode) and a JSON string.
    Invalid(Cow<'static, str>),
}

const TOO_MANY: Refusal = Refusal::Rejected("Maximum number of sentences is 128");
const SENTENCES: &str = "sentences must be a list of strings";
const TASK_IDS: &str = "Input at 'sentences' must by a tuple of two tensors like:                    (context_tokens_tensor, context_length_tensor) if task ids are given";
const TOKENS_TO_GENERATE: &str = "tokens_to_generate must be an integer greater than 0";
const TEMPERATURE: &str = "temperature must be a positive number less than or equal to 100.0";
const TOP_K: &str = "top_k must be a positive integer number";
const TOP_P: &str = "top_p must be a positive number less than or equal to 1.0";
const REPETITION_PENALTY: &str = "repetition_penalty must be a positive number no less than 1.0";
const END_STRINGS: &str = "expect end_strings to be a list of strings";
const MIN_TOKENS: &str = "min_tokens_to_generate must be an integer no less than 0";
const NEIGHBORS: &str = "num of neighbors must be an integer no less than 0";
const RANDOM_SEED: &str = "random_seed must be a positive integer number or None";

/// Checks a body. The first bad field in NeMo's order wins; what NeMo would only trip over later comes last.
pub(super) fn validate(body: Value) -> Result<Params, Refusal> {
    let Value::Object(mut fields) = body else {
        return Err(Refusal::Malformed("the body must be a JSON object".into()));
    };
    let sentences = match fields.remove("sentences") {
        Some(Value::Array(list)) if list.len() > MAX_SENTENCES => return Err(TOO_MANY),
        Some(sentences @ (Value::Array(_) | Value::String(_) | Value::Object(_))) => sentences,
        _ => return Err(Refusal::Malformed(SENTENCES.into())),
    };
    if fields.contains_key("task_ids") {
        return Err(Refusal::Invalid(TASK_IDS.into()));
    }
    let fields = Fields(fields);
    // Struct fields are evaluated in the order written, which is the order of NeMo's checks.
    let mut params = Params {
        tokens_to_generate: saturate(fields.int("tokens_to_generate", 64, 1, TOKENS_TO_GENERATE)?),
        all_probs: fields.bool("all_probs")?,
        temperature: positive(fields.number("temperature", 1.0, |t| t > 0.0 && t <= 100.0, TEMPERATURE)?),
        add_bos: fields.bool("add_BOS")?,
        greedy: fields.bool("greedy")?,
        top_k: fields.number("top_k", 0.0, |k| k >= 0.0, TOP_K)? as u32,
        top_p: match fields.number("top_p", 0.9, |p| (0.0..=1.0).contains(&p), TOP_P)? {
            0.0 => 0.0,
            p => positive(p),
        },
        // NeMo documents a default of 1.2, but never applies it.
        repetition_penalty: positive(fields.number("repetition_penalty", 1.0, |p| p >= 1.0, REPETITION_PENALTY)?),
        end_strings: fields.end_strings()?,
        min_tokens_to_generate: saturate(fields.int("min_tokens_to_generate", 0, 0, MIN_TOKENS)?),
        compute_logprob: {
            fields.int("neighbors", 0, 0, NEIGHBORS)?;
            fields.bool("compute_logprob")?
        },
        random_seed: match fields.0.get("random_seed") {
            None | Some(Value::Null) => None,
            Some(_) => Some(fields.int("random_seed", 0, 0, RANDOM_SEED)?),
        },
        sentences: Vec::new(),
    };
    params.sentences = self::sentences(sentences, params.add_bos)?;
    Ok(params)
}

/// The fields of a body, read as NeMo and Megatron-LM read them.
pub(super) struct Fields(pub(super) Map<String, Value>);

impl Fields {
    pub(super) fn bool(&self, name: &str) -> Result<bool, Refusal> {
        match self.0.get(name) {
            None => Ok(false),
            Some(Value::Bool(value)) => Ok(*value),
            Some(_) => Err(Refusal::Invalid(format!("{name} must be a boolean value").into())),
        }
    }

    /// `isinstance(value, int)`, which booleans pass.
    pub(super) fn int(&self, name: &str, default: u64, min: u64, text: &'static str) -> Result<u64, Refusal> {
        let value = match self.0.get(name) {
            None => Some(default),
            Some(Value::Bool(value)) => Some(u64::from(*value)),
            Some(value) => value.as_u64().or_else(|| beyond_u64(value)),
        };
        value.filter(|&value| value >= min).ok_or(Refusal::Invalid(text.into()))
    }

    /// `type(value) in (int, float)`, which booleans do not pass.
    pub(super) fn number(
        &self,
        name: &str,
        default: f64,
        allowed: impl Fn(f64) -> bool,
        text: &'static str,
    ) -> Result<f64, Refusal> {
        let value = self.0.get(name).map_or(Some(default), Value::as_f64);
        value.filter(|&value| allowed(value)).ok_or(Refusal::Invalid(text.into()))
    }

    fn end_strings(&self) -> Result<Vec<String>, Refusal> {
        let Some(value) = self.0.get("end_strings") else { return Ok(vec!["<|endoftext|>".into()]) };
        let strings = value.as_array().and_then(|list| list.iter().map(|s| s.as_str().map(String::from)).collect());
        strings.ok_or(Refusal::Invalid(END_STRINGS.into()))
    }
}

fn sentences(value: Value, add_bos: bool) -> Result<Vec<Sentence>, Refusal> {
    let invalid = |text| Refusal::Invalid(Cow::Borrowed(text));
    let Value::Array(list) = value else { return Err(invalid(SENTENCES)) };
    if !list.is_empty() && list.iter().all(Value::is_object) {
        let conversations = conversations(&list).ok_or(invalid(SENTENCES))?;
        return match conversations.len() {
            0..=MAX_SENTENCES => Ok(conversations.into_iter().map(Sentence::Chat).collect()),
            _ => Err(TOO_MANY),
        };
    }
    list.into_iter()
        .map(|sentence| match sentence {
            Value::String(text) if text.is_empty() && !add_bos => Err(invalid("Empty prompts require add_BOS=true")),
            Value::String(text) => Ok(Sentence::Text(text)),
            Value::Array(ids) if ids.is_empty() => Err(invalid("a list of token ids must not be empty")),
            Value::Array(ids) => {
                let ids: Option<_> = ids.iter().map(|id| id.as_u64().and_then(|id| u32::try_from(id).ok())).collect();
                ids.map(Sentence::Ids).ok_or(invalid(SENTENCES))
            }
            _ => Err(invalid(SENTENCES)),
        })
        .collect()
}

/// NeMo's collated conversations: a list of turns, each `{"role": [one a conversation], "content": [one a conversation]}`.
fn conversations(turns: &[Value]) -> Option<Vec<Vec<Message>>> {
    let mut conversations: Vec<Vec<Message>> = Vec::new();
    for (index, turn) in turns.iter().enumerate() {
        let (roles, contents) = (turn["role"].as_array()?, turn["content"].as_array()?);
        if index == 0 {
            conversations.resize_with(roles.len(), Vec::new);
        }
        if roles.len() != conversations.len() || contents.len() != conversations.len() {
            return None;
        }
        for ((role, content), conversation) in roles.iter().zip(contents).zip(&mut conversations) {
            let role = match role.as_str()?.to_ascii_lowercase().as_str() {
                "system" => Role::System,
                "user" => Role::User,
                "assistant" => Role::Assistant,
                _ => return None,
            };
            conversation.push(Message { role, content: content.as_str()?.to_owned() });
        }
    }
    Some(conversations)
}

/// Python's integers have no end. JSON's reader makes floats of those beyond 64 bits, and only of those are so large.
fn beyond_u64(value: &Value) -> Option<u64> {
    value.as_f64().filter(|&value| value > u64::MAX as f64).map(|_| u64::MAX)
}

/// Counts beyond any context are all the same.
pub(super) fn saturate(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

/// A positive number stays positive and finite in single precision.
pub(super) fn positive(value: f64) -> f32 {
    (value as f32).clamp(f32::MIN_POSITIVE, f32::MAX)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    fn with(changes: Value) -> Result<Params, Refusal> {
        let mut body = json!({"sentences": ["a prompt"]});
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        validate(body)
    }

    fn refused(changes: Value, text: &str) {
        assert_eq!(with(changes.clone()).unwrap_err(), Refusal::Invalid(text.to_string().into()), "{changes}");
    }

    #[test]
    fn absent_fields_have_nemos_defaults() {
        let params = with(json!({"foo": 1, "task": null})).unwrap();
        let expected = Params {
            sentences: vec![Sentence::Text("a prompt".into())],
            tokens_to_generate: 64,
            all_probs: false,
            temperature: 1.0,
            add_bos: false,
            greedy: false,
            top_k: 0,
            top_p: 0.9,
            repetition_penalty: 1.0,
            end_strings: vec!["<|endoftext|>".into()],
            min_tokens_to_generate: 0,
            compute_logprob: false,
            random_seed: None,
        };
        assert_eq!(params, expected);
    }

    #[test]
    fn numbers_out_of_range_or_of_another_type_get_the_fields_text() {
        let cases: &[(&str, Value, &str)] = &[
            ("temperature", json!([0, -1, 101, "1", true, null, 0.0]), TEMPERATURE),
            ("tokens_to_generate", json!([0, -3, 5.0, "5", null, false]), TOKENS_TO_GENERATE),
            ("top_p", json!([1.01, -0.1, true, "0.5", null]), TOP_P),
            ("top_k", json!([-1, true, "1", null]), TOP_K),
            ("repetition_penalty", json!([0.9, true, "1", null]), REPETITION_PENALTY),
            ("end_strings", json!(["x", [1], null, ["a", null]]), END_STRINGS),
            ("random_seed", json!([-1, 1.5, "7"]), RANDOM_SEED),
            ("min_tokens_to_generate", json!([-1, 0.0, null]), MIN_TOKENS),
            ("neighbors", json!([-1, 0.5, null]), NEIGHBORS),
            ("task_ids", json!([[1], null]), TASK_IDS),
            ("all_probs", json!([0, null, "true"]), "all_probs must be a boolean value"),
            ("add_BOS", json!(["no", 1]), "add_BOS must be a boolean value"),
            ("greedy", json!([1, null]), "greedy must be a boolean value"),
            ("compute_logprob", json!([null, 0]), "compute_logprob must be a boolean value"),
        ];
        for (field, values, text) in cases {
            for value in values.as_array().unwrap() {
                refused(json!({*field: value}), text);
            }
        }
    }

    #[test]
    fn numbers_at_the_edges_pass() {
        let params = with(json!({"temperature": 1e-60, "top_p": 1e-60, "top_k": 40.9, "repetition_penalty": 1e300,
            "tokens_to_generate": true, "min_tokens_to_generate": true, "neighbors": true, "random_seed": u64::MAX}))
        .unwrap();
        assert!(params.temperature > 0.0 && params.top_p > 0.0 && params.repetition_penalty.is_finite());
        let counts = (params.top_k, params.tokens_to_generate, params.min_tokens_to_generate, params.random_seed);
        assert_eq!(counts, (40, 1, 1, Some(u64::MAX)));
        for fields in [
            json!({"temperature": 100, "top_p": 0, "top_k": 0.0, "repetition_penalty": 1, "random_seed": null}),
            json!({"temperature": 1e-8, "top_p": 1, "top_k": 1e300, "random_seed": 0, "end_strings": []}),
            json!({"top_p": 0.5, "top_k": 1_000_000_000, "random_seed": 4_294_967_295u64, "end_strings": [""]}),
            json!({"tokens_to_generate": 1_000_000_000_000u64, "top_k": 40}),
            serde_json::from_str(r#"{"tokens_to_generate": 100000000000000000000000, "min_tokens_to_generate": 1}"#)
                .unwrap(),
        ] {
            with(fields).unwrap();
        }
    }

    #[test]
    fn the_first_bad_field_in_nemos_order_wins() {
        let order: &[(&str, Value, &str)] = &[
            ("task_ids", json!([1]), TASK_IDS),
            ("tokens_to_generate", json!(0), TOKENS_TO_GENERATE),
            ("all_probs", json!(0), "all_probs must be a boolean value"),
            ("temperature", json!(0), TEMPERATURE),
            ("add_BOS", json!(0), "add_BOS must be a boolean value"),
            ("greedy", json!(0), "greedy must be a boolean value"),
            ("top_k", json!(-1), TOP_K),
            ("top_p", json!(-1), TOP_P),
            ("repetition_penalty", json!(0), REPETITION_PENALTY),
            ("end_strings", json!(0), END_STRINGS),
            ("min_tokens_to_generate", json!(-1), MIN_TOKENS),
            ("neighbors", json!(-1), NEIGHBORS),
            ("compute_logprob", json!(0), "compute_logprob must be a boolean value"),
            ("random_seed", json!(-1), RANDOM_SEED),
        ];
        for first in 0..order.len() {
            let bad = order[first..].iter().rev().map(|(field, value, _)| ((*field).to_owned(), value.clone()));
            let mut bad: Map<String, Value> = bad.collect();
            bad.insert("sentences".into(), json!([1]));
            refused(Value::Object(bad), order[first].2);
        }
    }

    #[test]
    fn odd_sentences_are_refused_or_empty() {
        for body in [json!([1]), json!({}), json!("x"), json!({"sentences": null}), json!({"sentences": 3})] {
            assert!(matches!(validate(body.clone()), Err(Refusal::Malformed(_))), "{body}");
        }
        for sentences in [json!("abc"), json!(""), json!({}), json!([1, 2]), json!([{}]), json!(["a", null])] {
            refused(json!({"sentences": sentences}), SENTENCES);
        }
        for ids in [json!([[1, -2]]), json!([[1.0]]), json!([["a"]]), json!([[4_294_967_296u64]])] {
            refused(json!({"sentences": ids}), SENTENCES);
        }
        refused(json!({"sentences": [[]], "add_BOS": true}), "a list of token ids must not be empty");
        refused(json!({"sentences": ["a", ""]}), "Empty prompts require add_BOS=true");
        assert_eq!(with(json!({"sentences": []})).unwrap().sentences, []);
        assert_eq!(with(json!({"sentences": [""], "add_BOS": true})).unwrap().sentences, [Sentence::Text("".into())]);
        assert_eq!(with(json!({"sentences": [[1, 2]]})).unwrap().sentences, [Sentence::Ids(vec![1, 2])]);
    }

    #[test]
    fn turns_are_collated_conversations() {
        let turn = |role: [&str; 2], content: [&str; 2]| json!({"role": role, "content": content});
        let turns = json!([turn(["System", "System"], ["", "s"]), turn(["User", "user"], ["a", "b"])]);
        let params = with(json!({"sentences": turns})).unwrap();
        let message = |role, content: &str| Message { role, content: content.into() };
        let expected = [("", "a"), ("s", "b")]
            .map(|(system, user)| Sentence::Chat(vec![message(Role::System, system), message(Role::User, user)]));
        assert_eq!(params.sentences, expected);
        for turns in [
            json!([{"role": ["User"], "content": []}]),
            json!([{"role": ["User"], "content": ["a"]}, {"role": [], "content": []}]),
            json!([{"role": ["narrator"], "content": ["a"]}]),
            json!([{"role": "User", "content": "a"}]),
            json!([{"role": ["User"], "content": [1]}]),
        ] {
            refused(json!({"sentences": turns}), SENTENCES);
        }
        let turns = json!([{"role": vec!["User"; 129], "content": vec!["a"; 129]}]);
        assert_eq!(with(json!({"sentences": turns})).unwrap_err(), TOO_MANY);
    }

    #[test]
    fn more_than_128_sentences_are_too_many() {
        assert_eq!(with(json!({"sentences": vec!["a"; 128]})).unwrap().sentences.len(), 128);
        let refusal = with(json!({"sentences": vec!["a"; 129], "temperature": 0})).unwrap_err();
        assert_eq!(refusal, TOO_MANY);
    }
}
