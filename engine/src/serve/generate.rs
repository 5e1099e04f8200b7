//! `PUT /generate` as NeMo's text-generation server answers it.
//!
//! Where NeMo hangs or dies we answer: an empty list is an empty result, what cannot be generated is refused with a text like any other
//! bad field, rows are clipped to the context, and no NaN or infinity is written. `random_seed` alone decides a sampled text, as each row draws
//! its own random numbers from the seed and its index.

use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::extract::{FromRequest, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{Html, IntoResponse, Response};
use futures_util::{future, stream};
use serde_json::{Value, json};

use crate::end_strings;
use crate::engine::EngineInfo;
use crate::request::{self, Event, LogprobSpec, Logprobs, RowError, Sampling, Stopping};
use crate::tokenizer::Tokenizer;

use super::rows::TrackedRow;
use super::shape::{Generated, Reply};
use super::validate::{MAX_SENTENCES, Params, Refusal, Sentence, validate};
use super::{Server, random_u64};

/// Memory that the log-probabilities of one `all_probs` request may take: they are held until its last row is done.
const MAX_FULL_LOGPROB_BYTES: usize = 8 << 30;

/// Any method on `/generate`.
pub(super) async fn generate(State(server): State<Arc<Server>>, request: Request) -> Response {
    if request.method() != Method::PUT {
        return answer_method(request.method(), "HEAD, OPTIONS, PUT, GET");
    }
    if !is_json(request.headers()) {
        let text = "Did not attempt to load JSON data because the request Content-Type was not 'application/json'.";
        return message(StatusCode::UNSUPPORTED_MEDIA_TYPE, text);
    }
    match Bytes::from_request(request, &()).await {
        Ok(body) => put(server, body).await,
        Err(rejection) => message(rejection.status(), &rejection.body_text()),
    }
}

/// Any method on `/generate/`.
pub(super) async fn trailing_slash(method: Method) -> Response {
    answer_method(&method, "HEAD, OPTIONS, GET")
}

async fn put(server: Arc<Server>, body: Bytes) -> Response {
    // 128 long prompts take a while to parse and tokenise; other requests are answered meanwhile.
    let prepared = {
        let server = server.clone();
        tokio::task::spawn_blocking(move || Batch::prepare(&body, server.engine.info(), &server.tokenizer)).await
    };
    let batch = match prepared {
        Ok(Ok(batch)) => batch,
        Ok(Err(refusal)) => return refuse(refusal, server.strict),
        Err(error) => return internal_error(&error),
    };
    let rows = match run(&server, batch.prompts).await {
        Ok(rows) => rows,
        Err(RowError::ShuttingDown) => return message(StatusCode::SERVICE_UNAVAILABLE, "the server is shutting down"),
        Err(error @ (RowError::EngineFailed(_) | RowError::NotFinite)) => return internal_error(&error),
        Err(error) => return refuse(Refusal::Invalid(error.to_string().into()), server.strict),
    };
    let reply = Reply {
        rows,
        filler: batch.eos.unwrap_or(0),
        compute_logprob: batch.logprobs.tokens,
        all_probs: batch.logprobs.full,
        vocab_size: server.engine.info().vocab_size,
    };
    let chunks = reply.into_chunks(server.tokenizer.clone()).map(Ok::<_, std::convert::Infallible>);
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, Body::from_stream(stream::iter(chunks))).into_response()
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

fn message(status: StatusCode, text: &str) -> Response {
    json_line(status, &json!({"message": text}))
}

fn internal_error(error: &dyn std::error::Error) -> Response {
    tracing::error!(%error, "a request failed");
    message(StatusCode::INTERNAL_SERVER_ERROR, &format!("Internal Server Error: {error}"))
}

fn refuse(refusal: Refusal, strict: bool) -> Response {
    match refusal {
        Refusal::Malformed(text) => message(StatusCode::BAD_REQUEST, &text),
        Refusal::TooManySentences => {
            json_line(StatusCode::BAD_REQUEST, &json!(format!("Maximum number of sentences is {MAX_SENTENCES}")))
        }
        Refusal::Invalid(text) => {
            json_line(if strict { StatusCode::BAD_REQUEST } else { StatusCode::OK }, &Value::from(text))
        }
    }
}

fn json_line(status: StatusCode, value: &Value) -> Response {
    (status, [(header::CONTENT_TYPE, "application/json")], format!("{value}\n")).into_response()
}

/// A request ready to be submitted.
struct Batch {
    prompts: Vec<BatchPrompt>,
    eos: Option<u32>,
    logprobs: LogprobSpec,
}

struct BatchPrompt {
    text: Option<String>,
    request: request::Request,
}

impl Batch {
    fn prepare(body: &[u8], info: &EngineInfo, tokenizer: &Tokenizer) -> Result<Self, Refusal> {
        let body = serde_json::from_slice(body).map_err(|_| {
            let text = "The browser (or proxy) sent a request that this server could not understand.";
            Refusal::Malformed(text.into())
        })?;
        let mut params = validate(body)?;
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
                };
                (text, bos.into_iter().chain(ids).collect())
            })
            .collect();
        let lengths: Vec<usize> = sentences.iter().map(|(_, ids)| ids.len()).collect();
        let budgets = budgets(&lengths, params.tokens_to_generate, info.max_context.min(info.kv_tokens))?;
        let logprobs = LogprobSpec {
            tokens: params.compute_logprob || params.all_probs,
            prompt: params.compute_logprob || params.all_probs,
            top: 0,
            full: params.all_probs,
        };
        if params.all_probs {
            let positions: usize = lengths.iter().zip(&budgets).map(|(n, budget)| n + *budget as usize).sum();
            let bytes = positions.saturating_mul(info.vocab_size).saturating_mul(size_of::<f32>());
            if bytes > MAX_FULL_LOGPROB_BYTES {
                let text = format!(
                    "all_probs for {positions} tokens would take {bytes} bytes; at most {MAX_FULL_LOGPROB_BYTES} may be asked for at a time"
                );
                return Err(Refusal::Invalid(text.into()));
            }
        }
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
async fn run(server: &Server, prompts: Vec<BatchPrompt>) -> Result<Vec<Generated>, RowError> {
    let mut rows = Vec::with_capacity(prompts.len());
    for BatchPrompt { text, request } in prompts {
        let generated = Generated {
            text,
            prompt_len: request.prompt.len(),
            ids: request.prompt.clone(),
            logprobs: Vec::new(),
            full_logprobs: Vec::new(),
        };
        rows.push(collect(TrackedRow::submit(&server.engine, &server.metrics, request)?, generated));
    }
    future::try_join_all(rows).await
}

/// Waits for a row.
async fn collect(mut row: TrackedRow, mut generated: Generated) -> Result<Generated, RowError> {
    while let Some(event) = row.next().await {
        match event {
            Event::Prompt(positions) => positions.into_iter().for_each(|position| generated.add(position)),
            Event::Token { id, logprobs } => {
                generated.ids.push(id);
                if let Some(position) = logprobs {
                    generated.add(*position);
                }
            }
            Event::Finished(_) => {}
            Event::Failed(error) => return Err(error),
        }
    }
    Ok(generated)
}

impl Generated {
    fn add(&mut self, position: Logprobs) {
        self.logprobs.push(position.token);
        if !position.full.is_empty() {
            self.full_logprobs.push(position.full);
        }
    }
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
