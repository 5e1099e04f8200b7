//! `PUT /generate` as NeMo's text-generation server answers it.
//!
//! Where NeMo hangs or dies we answer: an empty list is an empty result, what cannot be generated is refused with a text like any other
//! bad field, rows are clipped to the context, and no NaN or infinity is written. `random_seed` alone decides a sampled text, as each row draws
//! its own random numbers from the seed and its index.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{Extension, FromRequest, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use futures_util::{future, stream};
use serde_json::{Value, json};

use crate::end_strings;
use crate::error_chain::error_chain;
use crate::request::{self, Event, LogprobSpec, RowError, Sampling, Stopping};

use super::rows::{Tally, TrackedRow};
use super::shape::{Generated, Reply};
use super::validate::{Params, Refusal, Sentence, validate};
use super::{Server, random_u64, score};

/// Any method on `/generate`.
pub(super) async fn generate(
    State(server): State<Arc<Server>>,
    Extension(tally): Extension<Arc<Tally>>,
    request: Request,
) -> Response {
    match put_body(request).await {
        Ok(body) => put(&server, &tally, body).await,
        Err(answer) => answer,
    }
}

/// The body of a `PUT` with JSON; for anything else the answer that Flask gives.
pub(super) async fn put_body(request: Request) -> Result<Bytes, Response> {
    if request.method() != Method::PUT {
        return Err(answer_method(request.method(), "HEAD, OPTIONS, PUT, GET"));
    }
    if !is_json(request.headers()) {
        let text = "Did not attempt to load JSON data because the request Content-Type was not 'application/json'.";
        return Err(message(StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
    }
    // It was received before, so this cannot fail.
    Bytes::from_request(request, &()).await.map_err(IntoResponse::into_response)
}

/// Any method on `/generate/`.
pub(super) async fn trailing_slash(method: Method) -> Response {
    answer_method(&method, "HEAD, OPTIONS, GET")
}

async fn put(server: &Arc<Server>, tally: &Arc<Tally>, body: Bytes) -> Response {
    let prepared = prepare(server, body, |server, body| {
        let params = validate(body)?;
        let all_probs = params.all_probs;
        Ok((Batch::new(params, server)?, all_probs))
    });
    let (batch, all_probs) = match prepared.await {
        Ok(prepared) => prepared,
        Err(answer) => return answer,
    };
    let (filler, compute_logprob) = (batch.eos.unwrap_or(0), batch.logprobs.tokens);
    let rows = match run(server, tally, batch.prompts).await {
        Ok(rows) => rows,
        Err(error) => return failed(error, server.strict),
    };
    let reply = Reply { rows, filler, compute_logprob };
    let body = if all_probs {
        score::stream(server.clone(), reply)
    } else {
        let chunks = reply.into_chunks(server.tokenizer.clone()).map(Ok::<_, std::convert::Infallible>);
        Body::from_stream(stream::iter(std::iter::once(Ok(Bytes::from_static(b"{"))).chain(chunks)))
    };
    ([(header::CONTENT_TYPE, "application/json")], body).into_response()
}

/// Parses a body and makes of it what is to be generated; or the answer that says why not.
///
/// 128 long prompts take a while to parse and tokenise; other requests are answered meanwhile.
pub(super) async fn prepare<T: Send + 'static>(
    server: &Arc<Server>,
    body: Bytes,
    prepare: impl FnOnce(&Server, Value) -> Result<T, Refusal> + Send + 'static,
) -> Result<T, Response> {
    let shared = server.clone();
    let prepared = tokio::task::spawn_blocking(move || {
        let body = serde_json::from_slice(&body).map_err(|_| {
            let text = "The browser (or proxy) sent a request that this server could not understand.";
            Refusal::Malformed(text.into())
        })?;
        prepare(&shared, body)
    });
    match prepared.await {
        Ok(prepared) => prepared.map_err(|refusal| refuse(refusal, server.strict)),
        Err(error) => Err(internal_error(&error)),
    }
}

/// The answer when a row was refused or failed.
pub(super) fn failed(error: RowError, strict: bool) -> Response {
    match error {
        RowError::ShuttingDown => message(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"),
        RowError::EngineFailed(_) | RowError::NotFinite => internal_error(&error),
        _ => refuse(Refusal::Invalid(error.to_string().into()), strict),
    }
}

/// What Flask makes of the methods that a route does not have.
fn answer_method(method: &Method, allow: &'static str) -> Response {
    if method == Method::GET || method == Method::HEAD {
        return not_found();
    }
    if method == Method::OPTIONS {
        return ([(header::ALLOW, allow)], Html("")).into_response();
    }
    let page = Html(
        "<!doctype html>\n<html lang=en>\n<title>405 Method Not Allowed</title>\n<h1>Method Not Allowed</h1>\n\
         <p>The method is not allowed for the requested URL.</p>\n",
    );
    (StatusCode::METHOD_NOT_ALLOWED, [(header::ALLOW, allow)], page).into_response()
}

/// The page for everything that is not there.
pub(super) fn not_found() -> Response {
    let page = Html(
        "<!doctype html>\n<html lang=en>\n<title>404 Not Found</title>\n<h1>Not Found</h1>\n\
         <p>The requested URL was not found on the server.</p>\n",
    );
    (StatusCode::NOT_FOUND, page).into_response()
}

fn is_json(headers: &HeaderMap) -> bool {
    let value = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let essence = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    essence == "application/json" || (essence.starts_with("application/") && essence.ends_with("+json"))
}

pub(super) fn message(status: StatusCode, text: &str) -> Response {
    json_line(status, &json!({"message": text}))
}

fn internal_error(error: &dyn std::error::Error) -> Response {
    tracing::error!(%error, "a request failed");
    message(StatusCode::INTERNAL_SERVER_ERROR, &format!("Internal Server Error: {error}"))
}

fn refuse(refusal: Refusal, strict: bool) -> Response {
    match refusal {
        Refusal::Malformed(text) => message(StatusCode::BAD_REQUEST, &text),
        Refusal::Rejected(text) => json_line(StatusCode::BAD_REQUEST, &json!(text)),
        Refusal::Invalid(text) => {
            json_line(if strict { StatusCode::BAD_REQUEST } else { StatusCode::OK }, &Value::from(text))
        }
    }
}

pub(super) fn json_line(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

/// A request ready to be submitted.
pub(super) struct Batch {
    pub(super) prompts: Vec<BatchPrompt>,
    eos: Option<u32>,
    pub(super) logprobs: LogprobSpec,
}

pub(super) struct BatchPrompt {
    text: Option<String>,
    request: request::Request,
}

impl Batch {
    pub(super) fn new(mut params: Params, server: &Server) -> Result<Self, Refusal> {
        let (info, tokenizer) = (server.engine.info(), &server.tokenizer);
        let bos = match (params.add_bos, info.config.bos_id) {
            (false, _) => None,
            (true, None) => return Err(Refusal::Invalid("add_BOS: the model has no BOS token".into())),
            (true, bos) => bos,
        };
        let sentences: Vec<(Option<String>, Vec<u32>)> = std::mem::take(&mut params.sentences)
            .into_iter()
            .map(|sentence| {
                let (text, ids) = match sentence {
                    Sentence::Text(text) => {
                        let ids = tokenizer.encode(&text);
                        (Some(text), ids)
                    }
                    Sentence::Ids(ids) => (None, ids),
                    Sentence::Chat(messages) => {
                        let ids = server.chat.encode(&messages, tokenizer);
                        (None, ids.map_err(|error| Refusal::Invalid(error_chain(&error).into()))?)
                    }
                };
                Ok((text, bos.into_iter().chain(ids).collect()))
            })
            .collect::<Result<_, Refusal>>()?;
        let lengths: Vec<usize> = sentences.iter().map(|(_, ids)| ids.len()).collect();
        let budgets = budgets(&lengths, params.tokens_to_generate, info.max_context.min(info.kv_tokens))?;
        let logprobs = LogprobSpec {
            tokens: params.compute_logprob || params.all_probs,
            prompt: params.compute_logprob || params.all_probs,
            ..LogprobSpec::default()
        };
        let eos = end_strings::eos_id(info, tokenizer);
        let stopping = end_strings::stopping(tokenizer, eos, &params.end_strings, 0, params.min_tokens_to_generate);
        let seed = params.random_seed.unwrap_or_else(random_u64);
        let prompts = sentences
            .into_iter()
            .zip(budgets)
            .enumerate()
            .map(|(index, ((text, prompt), max_new_tokens))| BatchPrompt {
                text,
                request: request::Request {
                    prompt,
                    sampling: sampling(&params, info.vocab_size, seed, index as u32),
                    stopping: Stopping { max_new_tokens, ..stopping.clone() },
                    logprobs,
                },
            })
            .collect();
        Ok(Self { prompts, eos, logprobs })
    }
}

/// New tokens that each row may have: NeMo counts `tokens_to_generate` from the end of the longest prompt, so shorter prompts get more.
fn budgets(lengths: &[usize], tokens_to_generate: u32, context: usize) -> Result<Vec<u32>, Refusal> {
    let Some(longest) = lengths.iter().copied().max() else { return Ok(Vec::new()) };
    if longest >= context {
        let text = format!("a prompt of {longest} tokens leaves nothing to generate in a context of {context} tokens");
        return Err(Refusal::Invalid(text.into()));
    }
    let end = longest.saturating_add(tokens_to_generate as usize).min(context);
    Ok(lengths.iter().map(|length| u32::try_from(end - length).unwrap_or(u32::MAX)).collect())
}

fn sampling(params: &Params, vocab_size: usize, seed: u64, sample: u32) -> Sampling {
    Sampling {
        greedy: params.greedy,
        temperature: params.temperature,
        // As many as there are is the same as no limit, and cheaper.
        top_k: if params.top_k as usize >= vocab_size { 0 } else { params.top_k },
        top_p: params.top_p,
        repetition_penalty: params.repetition_penalty,
        seed,
        sample,
        ..Sampling::default()
    }
}

/// Generates all rows; the first failure cancels the others.
pub(super) async fn run(
    server: &Server,
    tally: &Arc<Tally>,
    prompts: Vec<BatchPrompt>,
) -> Result<Vec<Generated>, RowError> {
    let group = server.engine.new_group();
    let mut rows = Vec::with_capacity(prompts.len());
    for BatchPrompt { text, request } in prompts {
        let generated =
            Generated { text, prompt_len: request.prompt.len(), ids: request.prompt.clone(), logprobs: Vec::new() };
        rows.push(collect(TrackedRow::submit(server, tally, group, request)?, generated));
    }
    future::try_join_all(rows).await
}

/// Waits for a row.
async fn collect(mut row: TrackedRow, mut generated: Generated) -> Result<Generated, RowError> {
    while let Some(event) = row.next().await {
        match event {
            Event::Prompt(positions) => generated.logprobs.extend(positions.iter().map(|position| position.token)),
            Event::Token { id, logprobs } => {
                generated.ids.push(id);
                generated.logprobs.extend(logprobs.map(|position| position.token));
            }
            Event::Finished(_) => {}
            Event::Failed(error) => return Err(error),
        }
    }
    Ok(generated)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn short_prompts_get_what_the_longest_one_leaves() {
        assert_eq!(budgets(&[3, 5], 4, 100).unwrap(), [6, 4]);
        assert!(budgets(&[], 4, 100).unwrap().is_empty());
    }

    #[test]
    fn rows_are_clipped_to_the_context() {
        assert_eq!(budgets(&[3, 5], u32::MAX, 9).unwrap(), [6, 4]);
        assert_eq!(budgets(&[8], 64, 9).unwrap(), [1]);
        assert!(matches!(budgets(&[3, 9], 1, 9), Err(Refusal::Invalid(_))));
    }

    #[test]
    fn content_types_with_parameters_and_suffixes_are_json() {
        let is_json = |value: &str| is_json(&HeaderMap::from_iter([(header::CONTENT_TYPE, value.parse().unwrap())]));
        assert!(is_json("application/json"));
        assert!(is_json("Application/JSON; charset=utf-8"));
        assert!(is_json("application/problem+json"));
        assert!(!is_json("text/plain"));
        assert!(!is_json("application/x-www-form-urlencoded"));
        assert!(!is_json("application/jsonl"));
        assert!(!super::is_json(&HeaderMap::new()));
    }

    #[test]
    fn top_k_beyond_the_vocabulary_is_off() {
        let params = validate(json!({"sentences": ["a"], "top_k": 1_000_000_000})).unwrap();
        assert_eq!(sampling(&params, 4096, 1, 0).top_k, 0);
        let params = validate(json!({"sentences": ["a"], "top_k": 40.9})).unwrap();
        assert_eq!(sampling(&params, 4096, 1, 0).top_k, 40);
    }
}
