//! What a reward model says of texts: `PUT /score`, and Triton's `POST /v2/models/reward_model/infer` as NeMo-Aligner's clients send it.

use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Extension, Request, State};
use axum::http::{HeaderMap, StatusCode, Uri};
use axum::response::Response;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::chat::{ChatTemplate, Message};
use crate::error_chain::error_chain;
use crate::request::{Event, RowError};
use crate::reward;

use super::Server;
use super::generate::{failed, json_line, message, prepare, put_body};
use super::rows::{Tally, TrackedRow};
use super::validate::{MAX_SENTENCES, Refusal};

/// The body of `PUT /score`: one of the two.
#[derive(Deserialize)]
struct ScoreRequest {
    /// Texts as the model reads them, or token ids.
    #[serde(default)]
    sentences: Vec<Text>,
    /// Each is put into the annotator's form.
    #[serde(default)]
    conversations: Vec<Vec<Message>>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Text(String),
    Ids(Vec<u32>),
}

/// Any method on `/score`.
pub(super) async fn score(
    State(server): State<Arc<Server>>,
    Extension(tally): Extension<Arc<Tally>>,
    request: Request,
) -> Response {
    scores(&server, &tally, request).await.unwrap_or_else(|refused| refused)
}

async fn scores(server: &Arc<Server>, tally: &Arc<Tally>, request: Request) -> Result<Response, Response> {
    let body = put_body(request).await?;
    let texts = prepare(server, body, |server, body| {
        let ScoreRequest { sentences, conversations } =
            serde_json::from_value(body).map_err(|error| Refusal::Malformed(error.to_string().into()))?;
        if sentences.is_empty() == conversations.is_empty() {
            return Err(Refusal::Malformed("one of `sentences` and `conversations` is required".into()));
        }
        let texts = sentences.into_iter().map(|text| match text {
            Text::Text(text) => Ok(server.tokenizer.encode(&text)),
            Text::Ids(ids) => Ok(ids),
        });
        let conversations = conversations.iter().map(|messages| annotated(server, messages));
        let texts = texts.chain(conversations).collect::<Result<Vec<_>, _>>();
        fit(server, texts.map_err(|error| Refusal::Malformed(error.into()))?)
    })
    .await?;
    let exceeded: Vec<bool> = texts.iter().map(|text| text.exceeded).collect();
    let rewards = rewards(server, tally, texts).await.map_err(|error| match error {
        RowError::ShuttingDown | RowError::EngineFailed(_) | RowError::NotFinite => failed(error, true),
        error => message(StatusCode::BAD_REQUEST, &error.to_string()),
    })?;
    let names: Vec<_> = (0..rewards.first().map_or(0, Vec::len)).map(reward::attribute).collect();
    let scalars: Vec<Option<f32>> = rewards.iter().map(|values| reward::scalar(values)).collect();
    let reply = json!({"attributes": names, "rewards": rewards, "scores": scalars, "exceeded": exceeded});
    Ok(json_line(StatusCode::OK, &reply))
}

/// A conversation in the annotator's form.
pub(super) fn annotated(server: &Server, messages: &[Message]) -> Result<Vec<u32>, String> {
    let annotator = ChatTemplate::builtin("annotator").expect("it is built in and compiles");
    annotator.encode(messages, &server.tokenizer).map_err(|error| error_chain(&error))
}

/// A text to score.
pub(super) struct Scored {
    pub(super) ids: Vec<u32>,
    /// It was longer than the context, and its end is cut off: NeMo-Aligner does the same.
    pub(super) exceeded: bool,
}

pub(super) fn fit(server: &Server, texts: Vec<Vec<u32>>) -> Result<Vec<Scored>, Refusal> {
    if texts.len() > MAX_SENTENCES {
        return Err(Refusal::Malformed(format!("at most {MAX_SENTENCES} texts can be scored at a time").into()));
    }
    let info = server.engine.info();
    let limit = info.max_context.min(info.kv_tokens) - 1;
    let fit = |mut ids: Vec<u32>| {
        let exceeded = ids.len() > limit;
        ids.truncate(limit);
        Scored { ids, exceeded }
    };
    Ok(texts.into_iter().map(fit).collect())
}

/// The values of each text, in order.
pub(super) async fn rewards(
    server: &Server,
    tally: &Arc<Tally>,
    texts: Vec<Scored>,
) -> Result<Vec<Vec<f32>>, RowError> {
    let group = server.engine.new_group();
    let submit = |text: Scored| TrackedRow::submit(server, tally, group, reward::request(text.ids));
    let rows = texts.into_iter().map(submit).collect::<Result<Vec<_>, _>>()?;
    let mut rewards = Vec::with_capacity(rows.len());
    for mut row in rows {
        let mut values = Vec::new();
        while let Some(event) = row.next().await {
            match event {
                Event::Token { logprobs: Some(logprobs), .. } => values = logprobs.full,
                Event::Failed(error) => return Err(error),
                _ => {}
            }
        }
        rewards.push(values);
    }
    Ok(rewards)
}

/// Where a body's JSON ends and its binary tensors begin.
const JSON_LENGTH: &str = "inference-header-content-length";

#[derive(Deserialize)]
struct InferRequest {
    #[serde(default)]
    id: Option<String>,
    inputs: Vec<InferInput>,
}

#[derive(Deserialize)]
struct InferInput {
    name: String,
    datatype: String,
    #[serde(default)]
    data: Value,
    #[serde(default)]
    parameters: InferParameters,
}

#[derive(Default, Deserialize)]
struct InferParameters {
    binary_data_size: Option<usize>,
}

/// `POST /v2/models/reward_model/infer`.
pub(super) async fn infer(
    State(server): State<Arc<Server>>,
    Extension(tally): Extension<Arc<Tally>>,
    headers: HeaderMap,
    body: Bytes,
) -> Response {
    let refused = |status, text: &str| json_line(status, &json!({ "error": text }));
    let (id, texts) = match read_infer(&headers, &body) {
        Ok(read) => read,
        Err(problem) => return refused(StatusCode::BAD_REQUEST, &problem),
    };
    let shared = server.clone();
    let encode = move || fit(&shared, texts.iter().map(|(text, eos)| with_eos(&shared, text, *eos)).collect());
    let texts = match tokio::task::spawn_blocking(encode).await {
        Ok(Ok(texts)) => texts,
        Ok(Err(_)) => return refused(StatusCode::BAD_REQUEST, "too many sentences"),
        Err(error) => return refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    };
    let exceeded: Vec<u8> = texts.iter().map(|text| u8::from(text.exceeded)).collect();
    let rewards = match rewards(&server, &tally, texts).await {
        Ok(rewards) => rewards,
        Err(error @ (RowError::EngineFailed(_) | RowError::NotFinite)) => {
            return refused(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string());
        }
        Err(error) => return refused(StatusCode::BAD_REQUEST, &error.to_string()),
    };
    let (rows, width) = (rewards.len(), rewards.first().map_or(0, Vec::len));
    let outputs = json!([
        {"name": "rewards", "datatype": "FP32", "shape": [rows, width], "data": rewards.concat()},
        {"name": "exceeded", "datatype": "INT32", "shape": [rows, 1], "data": exceeded},
    ]);
    let mut reply = json!({"model_name": "reward_model", "model_version": "1", "outputs": outputs});
    if let Some(id) = id {
        reply["id"] = id.into();
    }
    json_line(StatusCode::OK, &reply)
}

fn with_eos(server: &Server, text: &str, eos: bool) -> Vec<u32> {
    let mut ids = server.tokenizer.encode(text);
    ids.extend(server.engine.info().config.eos_ids.first().filter(|_| eos));
    ids
}

/// A sentence, and whether the end-of-sequence id belongs behind it.
type Sentence = (String, bool);

/// The request's id and its sentences.
fn read_infer(headers: &HeaderMap, body: &[u8]) -> Result<(Option<String>, Vec<Sentence>), String> {
    let length = headers.get(JSON_LENGTH).map(|value| value.to_str().ok().and_then(|text| text.parse().ok()));
    let length = length.map_or(Some(body.len()), |length| length);
    let split = length.and_then(|length| body.split_at_checked(length));
    let (head, mut binary) = split.ok_or_else(|| format!("{JSON_LENGTH} does not fit the body"))?;
    let request: InferRequest = serde_json::from_slice(head).map_err(|error| error.to_string())?;
    let (mut sentences, mut eos) = (None, None);
    for InferInput { name, datatype, data, parameters } in request.inputs {
        let raw = match parameters.binary_data_size {
            None => None,
            Some(size) => {
                let (raw, rest) = binary.split_at_checked(size).ok_or(format!("input {name} is cut short"))?;
                binary = rest;
                Some(raw)
            }
        };
        match (name.as_str(), datatype.as_str()) {
            ("sentences", "BYTES") => sentences = Some(strings(&data, raw).ok_or("input sentences is malformed")?),
            ("add_EOS", "BOOL") => eos = Some(booleans(&data, raw).ok_or("input add_EOS is malformed")?),
            _ => {
                return Err(format!(
                    "input {name} of type {datatype} is not supported: there are sentences (BYTES) and add_EOS (BOOL)"
                ));
            }
        }
    }
    let sentences = sentences.ok_or("input sentences is missing")?;
    let eos = eos.unwrap_or_else(|| vec![false; sentences.len()]);
    if eos.len() != sentences.len() {
        return Err("add_EOS and sentences have different lengths".into());
    }
    Ok((request.id, sentences.into_iter().zip(eos).collect()))
}

/// Binary: each element's length in four bytes, then its text.
fn strings(data: &Value, raw: Option<&[u8]>) -> Option<Vec<String>> {
    let Some(mut raw) = raw else {
        return flat(data)?.into_iter().map(|item| item.as_str().map(String::from)).collect();
    };
    let mut strings = Vec::new();
    while !raw.is_empty() {
        let (length, rest) = raw.split_first_chunk::<4>()?;
        let (text, rest) = rest.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        strings.push(String::from_utf8(text.to_vec()).ok()?);
        raw = rest;
    }
    Some(strings)
}

fn booleans(data: &Value, raw: Option<&[u8]>) -> Option<Vec<bool>> {
    match raw {
        Some(raw) => Some(raw.iter().map(|byte| *byte != 0).collect()),
        None => flat(data)?.into_iter().map(Value::as_bool).collect(),
    }
}

/// Tensors of one element a row come flat, or as lists of lists.
fn flat(data: &Value) -> Option<Vec<&Value>> {
    let rows = data.as_array()?;
    Some(rows.iter().flat_map(|row| row.as_array().map_or(std::slice::from_ref(row), Vec::as_slice)).collect())
}

/// `GET /v2/models/reward_model` and `…/config`: what Triton's clients ask before they infer.
pub(super) async fn metadata(State(server): State<Arc<Server>>, uri: Uri) -> Response {
    let Some(reward) = server.engine.info().config.reward else {
        return message(StatusCode::NOT_FOUND, &RowError::CannotScore.to_string());
    };
    if uri.path().ends_with("/config") {
        return json_line(StatusCode::OK, &config(reward.num_attributes));
    }
    let tensor = |name, datatype, width: usize| json!({"name": name, "datatype": datatype, "shape": [-1, width]});
    let metadata = json!({
        "name": "reward_model",
        "versions": ["1"],
        "platform": "nemotron",
        "inputs": [tensor("sentences", "BYTES", 1), tensor("add_EOS", "BOOL", 1)],
        "outputs": [tensor("rewards", "FP32", reward.num_attributes), tensor("exceeded", "INT32", 1)],
    });
    json_line(StatusCode::OK, &metadata)
}

fn config(num_attributes: usize) -> Value {
    let tensor = |name, data_type, dim: usize| json!({"name": name, "data_type": data_type, "dims": [dim]});
    let mut eos = tensor("add_EOS", "TYPE_BOOL", 1);
    eos["optional"] = true.into();
    json!({
        "name": "reward_model",
        "platform": "",
        "backend": "python",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": MAX_SENTENCES,
        "input": [tensor("sentences", "TYPE_STRING", 1), eos],
        "output": [tensor("rewards", "TYPE_FP32", num_attributes), tensor("exceeded", "TYPE_INT32", 1)],
        "instance_group": [{"name": "reward_model", "kind": "KIND_CPU", "count": 1}],
        "model_transaction_policy": {"decoupled": false},
    })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn read(json: &str, binary: &[u8]) -> Result<Vec<Sentence>, String> {
        let headers = [(JSON_LENGTH.parse().unwrap(), json.len().to_string().parse().unwrap())];
        let body = [json.as_bytes(), binary].concat();
        read_infer(&HeaderMap::from_iter(headers), &body).map(|(_, texts)| texts)
    }

    #[test]
    fn tensors_come_as_json_or_as_bytes() {
        let json = r#"{"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [2, 1], "data": [["a"], ["é"]]},
            {"name": "add_EOS", "datatype": "BOOL", "shape": [2, 1], "data": [true, false]}]}"#;
        assert_eq!(read(json, b"").unwrap(), [("a".into(), true), ("é".into(), false)]);
        let json = r#"{"inputs": [{"name": "sentences", "datatype": "BYTES", "shape": [2, 1], "parameters": {"binary_data_size": 11}}]}"#;
        assert_eq!(read(json, b"\x01\0\0\0a\x02\0\0\0\xc3\xa9").unwrap(), [("a".into(), false), ("é".into(), false)]);
        for binary in [&b"\x01\0\0\0a"[..], b"\x01\0\0\0a\x03\0\0\0\xc3\xa9", b"\x01\0\0\0\xff\x02\0\0\0\xc3\xa9"] {
            read(json, binary).unwrap_err();
        }
        for json in ["", "{}", r#"{"inputs": []}"#, r#"{"inputs": [{"name": "tokens", "datatype": "INT64"}]}"#] {
            read(json, b"").unwrap_err();
        }
    }
}
