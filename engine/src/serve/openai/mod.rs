//! OpenAI's API: `/v1/models`, `/v1/completions`, `/v1/chat/completions`.

mod body;
mod choice;
mod stream;

use std::sync::Arc;
use std::time::{SystemTime, UNIX_EPOCH};

use axum::Json;
use axum::body::Bytes;
use axum::extract::{Extension, Path, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use futures_util::future;
use serde_json::{Value, json};

use crate::request::{Event, FinishReason, RowError};
use crate::reward::{number, trained};

use super::rows::{Tally, TrackedRow};
use super::{Server, new_id, reward};

use self::body::{Dialect, Plan};
use self::choice::{Choice, Piece};

/// With this many rows waiting a request is turned away. Clients of `PUT /generate` are not: they expect to wait.
const MAX_WAITING_ROWS: usize = 4096;

/// When one that was turned away may ask again.
const RETRY_AFTER_SECONDS: &str = "5";

pub(super) async fn models(State(server): State<Arc<Server>>) -> Json<Value> {
    Json(json!({"object": "list", "data": [served(&server)]}))
}

pub(super) async fn model(State(server): State<Arc<Server>>, Path(id): Path<String>) -> Response {
    if id == server.engine.info().model_name {
        return Json(served(&server)).into_response();
    }
    let unknown = ApiError::invalid(format!("the model `{id}` does not exist"));
    ApiError { status: StatusCode::NOT_FOUND, code: Some("model_not_found"), ..unknown }.into_response()
}

fn served(server: &Server) -> Value {
    json!({"id": server.engine.info().model_name, "object": "model", "created": 0, "owned_by": "nemotron"})
}

pub(super) async fn completions(server: State<Arc<Server>>, tally: Extension<Arc<Tally>>, body: Bytes) -> Response {
    complete(Dialect::Completions, server.0, &tally, body).await.unwrap_or_else(IntoResponse::into_response)
}

pub(super) async fn chat_completions(
    server: State<Arc<Server>>,
    tally: Extension<Arc<Tally>>,
    body: Bytes,
) -> Response {
    let answer = match server.engine.info().config.reward {
        Some(_) => score(&server, &tally, &body).await,
        None => complete(Dialect::Chat, server.0, &tally, body).await,
    };
    answer.unwrap_or_else(IntoResponse::into_response)
}

/// What NVIDIA's hosted reward model answers to a chat: the values as a message (in a list), and again as log-probabilities of tokens that are
/// the attributes' names.
async fn score(server: &Arc<Server>, tally: &Arc<Tally>, body: &[u8]) -> Result<Response, ApiError> {
    let messages = body::conversation(body)?;
    let ids = reward::annotated(server, &messages).map_err(|error| ApiError::field("messages", error))?;
    let texts = reward::fit(server, vec![ids]).map_err(|_| ApiError::internal("one text is too many".into()))?;
    let prompt_tokens = texts[0].ids.len();
    if texts[0].exceeded {
        return Err(ApiError::context_length(format!("the conversation exceeds {prompt_tokens} tokens")));
    }
    let rewards = reward::rewards(server, tally, texts).await?;
    let values = trained(&rewards[0]).map(|(name, value)| {
        let value = number(value);
        (format!("{name}:{value}"), json!({"token": name, "logprob": value, "bytes": null, "top_logprobs": []}))
    });
    let (texts, tokens): (Vec<String>, Vec<Value>) = values.unzip();
    let message = json!([{"role": "assistant", "content": texts.join(",")}]);
    let choice = json!({"index": 0, "message": message, "logprobs": {"content": tokens}, "finish_reason": "length"});
    let answer = Answer::new(server, Dialect::Chat, true, prompt_tokens);
    Ok(Json(answer.object("chat.completion", vec![choice], Some(answer.usage(1)))).into_response())
}

/// A refusal of any route below `/v1`.
pub(super) fn error(status: StatusCode, text: &str) -> Response {
    let code = (status == StatusCode::UNAUTHORIZED).then_some("invalid_api_key");
    ApiError { status, code, ..ApiError::invalid(text) }.into_response()
}

async fn complete(
    dialect: Dialect,
    server: Arc<Server>,
    tally: &Arc<Tally>,
    body: Bytes,
) -> Result<Response, ApiError> {
    if server.engine.stats().waiting >= MAX_WAITING_ROWS {
        return Err(ApiError {
            status: StatusCode::TOO_MANY_REQUESTS,
            ..ApiError::invalid("too many rows wait already")
        });
    }
    let plan = {
        let server = server.clone();
        let prepare = move || Plan::prepare(dialect, &body, server.engine.info(), &server.tokenizer, &server.chat);
        tokio::task::spawn_blocking(prepare).await.map_err(|error| ApiError::internal(error.to_string()))??
    };
    let answer = Answer::new(&server, plan.dialect, plan.logprobs, plan.prompt_tokens);
    let group = server.engine.new_group();
    let rows = plan
        .rows
        .into_iter()
        .map(|request| {
            let choice = Choice::new(&server.tokenizer, &request.prompt, plan.echo, plan.rules.clone());
            Ok((TrackedRow::submit(&server, tally, group, request)?, choice))
        })
        .collect::<Result<Vec<_>, RowError>>()?;
    if plan.stream {
        return Ok(stream::respond(answer, rows, plan.include_usage));
    }
    let choices = future::try_join_all(rows.into_iter().map(|(row, choice)| finish(row, choice))).await?;
    let completion_tokens = choices.iter().map(|choice| choice.num_tokens).sum();
    let choices: Vec<Value> = choices
        .into_iter()
        .enumerate()
        .map(|(index, mut choice)| {
            let piece = choice.take().expect("a finished choice has a last piece");
            answer.choice(index, &choice, &piece)
        })
        .collect();
    Ok(Json(answer.object(answer.kind(false), choices, Some(answer.usage(completion_tokens)))).into_response())
}

/// Waits for a row.
async fn finish(mut row: TrackedRow, mut choice: Choice) -> Result<Choice, RowError> {
    while let Some(event) = row.next().await {
        match event {
            Event::Failed(error) => return Err(error),
            event => choice.update(event),
        }
    }
    Ok(choice)
}

/// What all parts of one answer have in common.
struct Answer {
    dialect: Dialect,
    id: String,
    created: u64,
    model: String,
    logprobs: bool,
    prompt_tokens: usize,
}

impl Answer {
    fn new(server: &Server, dialect: Dialect, logprobs: bool, prompt_tokens: usize) -> Self {
        let prefix = match dialect {
            Dialect::Completions => "cmpl",
            Dialect::Chat => "chatcmpl",
        };
        Self {
            dialect,
            id: format!("{prefix}-{}", new_id()),
            created: SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |now| now.as_secs()),
            model: server.engine.info().model_name.clone(),
            logprobs,
            prompt_tokens,
        }
    }

    fn kind(&self, chunk: bool) -> &'static str {
        match (self.dialect, chunk) {
            (Dialect::Completions, _) => "text_completion",
            (Dialect::Chat, false) => "chat.completion",
            (Dialect::Chat, true) => "chat.completion.chunk",
        }
    }

    fn object(&self, kind: &str, choices: Vec<Value>, usage: Option<Value>) -> Value {
        let Self { id, created, model, .. } = self;
        let mut object = json!({"id": id, "object": kind, "created": created, "model": model, "choices": choices});
        if let Some(usage) = usage {
            object["usage"] = usage;
        }
        object
    }

    fn usage(&self, completion_tokens: usize) -> Value {
        json!({
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
        })
    }

    /// A choice of an answer that comes at once.
    fn choice(&self, index: usize, choice: &Choice, piece: &Piece) -> Value {
        let (logprobs, reason) = (self.logprobs(choice, piece), reason(piece.finished));
        match self.dialect {
            Dialect::Completions => {
                json!({"index": index, "text": piece.text, "logprobs": logprobs, "finish_reason": reason})
            }
            Dialect::Chat => {
                let message = json!({"role": "assistant", "content": piece.text, "refusal": null});
                json!({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
            }
        }
    }

    fn logprobs(&self, choice: &Choice, piece: &Piece) -> Value {
        match (self.logprobs, self.dialect) {
            (false, _) => Value::Null,
            (true, Dialect::Completions) => choice.completion_logprobs(piece),
            (true, Dialect::Chat) => choice.chat_logprobs(piece),
        }
    }
}

fn reason(reason: Option<FinishReason>) -> Value {
    match reason {
        None => Value::Null,
        Some(FinishReason::Stop) => "stop".into(),
        Some(FinishReason::Length) => "length".into(),
    }
}

/// An error as the API's clients know it.
#[derive(Debug)]
struct ApiError {
    status: StatusCode,
    message: String,
    param: Option<String>,
    code: Option<&'static str>,
}

impl ApiError {
    fn invalid(message: impl Into<String>) -> Self {
        Self { status: StatusCode::BAD_REQUEST, message: message.into(), param: None, code: None }
    }

    /// One field is to blame.
    fn field(name: &str, message: impl std::fmt::Display) -> Self {
        Self { param: Some(name.into()), ..Self::invalid(format!("`{name}`: {message}")) }
    }

    fn context_length(message: String) -> Self {
        Self { code: Some("context_length_exceeded"), ..Self::invalid(message) }
    }

    fn internal(message: String) -> Self {
        tracing::error!(message, "a request failed");
        Self { status: StatusCode::INTERNAL_SERVER_ERROR, ..Self::invalid(message) }
    }

    fn body(&self) -> Value {
        let kind = match self.status {
            StatusCode::TOO_MANY_REQUESTS => "rate_limit_error",
            status if status.is_client_error() => "invalid_request_error",
            _ => "server_error",
        };
        json!({"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}})
    }
}

impl From<RowError> for ApiError {
    fn from(error: RowError) -> Self {
        let message = error.to_string();
        match error {
            RowError::EmptyPrompt | RowError::UnknownToken { .. } => Self::field("prompt", message),
            RowError::TooLong { .. } | RowError::KvTooSmall { .. } => Self::context_length(message),
            RowError::OnlyScores | RowError::CannotScore => Self::invalid(message),
            RowError::ShuttingDown => Self { status: StatusCode::SERVICE_UNAVAILABLE, ..Self::invalid(message) },
            RowError::EngineFailed(_) | RowError::NotFinite => Self::internal(message),
        }
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body())).into_response();
        if self.status == StatusCode::TOO_MANY_REQUESTS {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from_static(RETRY_AFTER_SECONDS));
        }
        response
    }
}
