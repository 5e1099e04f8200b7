//! HTTP: routes, authentication, health, and the dialects that turn bodies into requests.
//!
//! `PUT /generate` answers as NeMo's server does, `PUT /api` as Megatron-LM's; `/v1/*` as OpenAI's API does; a reward model answers `PUT /score` and Triton's `/v2`. Requests wait for the engine as long as it takes: there is
//! no timeout on our side, and a row is cancelled when the client that asked for it goes away.

mod generate;
mod megatron;
mod metrics;
mod openai;
mod reward;
mod rows;
mod score;
mod shape;
mod validate;

use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::{Body, Bytes, HttpBody as _};
use axum::extract::{ConnectInfo, DefaultBodyLimit, FromRequest as _, Request, State};
use axum::http::{HeaderValue, Method, StatusCode, header};
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::serve::ListenerExt;
use futures_util::{StreamExt as _, stream};
use subtle::ConstantTimeEq;

use crate::chat::ChatTemplate;
use crate::engine::Engine;
use crate::error_chain::error_chain;
use crate::tokenizer::Tokenizer;

use self::metrics::Metrics;
use self::rows::Tally;

/// Largest request body: 128 prompts of any length that a model takes are far below it.
const MAX_BODY_BYTES: usize = 256 << 20;

/// In which a body must arrive. The answer may take as long as it needs.
const BODY_PATIENCE: Duration = Duration::from_secs(300);

/// Routes that answer without a token, for probes.
const OPEN_ROUTES: [&str; 5] = ["/livez", "/readyz", "/startupz", "/healthz", "/openapi.json"];

/// What the routes take and give, for tools.
const OPENAPI: &str = include_str!("openapi.json");

/// Routes that metrics name; all others count as "other".
const ROUTES: [&str; 13] = [
    "/generate",
    "/api",
    "/score",
    "/v2/models/reward_model/infer",
    "/openapi.json",
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/models",
    "/metrics",
    "/livez",
    "/readyz",
    "/startupz",
    "/healthz",
];

/// How to serve.
pub struct ServeOptions {
    /// Bound, not yet listening for anyone but us to see: the port answers from the moment this is served, when the model is ready.
    pub listener: TcpListener,
    /// Clients must send it as a bearer token; `None` with `--no-auth`.
    pub token: Option<String>,
    /// Validation errors of `PUT /generate` get status 400 instead of NeMo's 200.
    pub strict: bool,
    /// How `/v1/chat/completions` writes a conversation.
    pub chat: ChatTemplate,
}

/// What handlers share.
struct Server {
    engine: Engine,
    tokenizer: Tokenizer,
    chat: ChatTemplate,
    token: Option<String>,
    strict: bool,
    metrics: Arc<Metrics>,
    draining: AtomicBool,
}

impl Server {
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed) || self.engine.is_draining()
    }
}

/// Serves until `shutdown` resolves, then lets running requests finish.
///
/// # Errors
/// The listener failed.
pub async fn run(
    engine: Engine,
    tokenizer: Tokenizer,
    options: ServeOptions,
    shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    options.listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(options.listener)?.tap_io(|connection| {
        // Tokens of a stream are small packets that must not wait for each other.
        if let Err(error) = connection.set_nodelay(true) {
            tracing::debug!(%error, "cannot set TCP_NODELAY");
        }
    });
    let server = Arc::new(Server {
        engine,
        tokenizer,
        chat: options.chat,
        token: options.token,
        strict: options.strict,
        metrics: Arc::default(),
        draining: AtomicBool::new(false),
    });
    let drain = server.clone();
    let shutdown = async move {
        shutdown.await;
        drain.draining.store(true, Ordering::Relaxed);
        tracing::info!("draining");
    };
    let service = router(server).into_make_service_with_connect_info::<SocketAddr>();
    axum::serve(listener, service).with_graceful_shutdown(shutdown).await
}

fn router(server: Arc<Server>) -> Router {
    Router::new()
        .route("/generate", any(generate::generate))
        .route("/generate/", any(generate::trailing_slash))
        .route("/api", any(megatron::api))
        .route("/score", any(reward::score))
        .route("/v2/models/reward_model/infer", post(reward::infer))
        .route("/v2/models/reward_model", get(reward::metadata))
        .route("/v2/models/reward_model/config", get(reward::metadata))
        .route("/v2/models/reward_model/ready", get(ready))
        .route("/v2/health/ready", get(ready))
        .route("/v2/health/live", get(live))
        .route("/v1/models", get(openai::models))
        .route("/v1/models/{*id}", get(openai::model))
        .route("/v1/completions", post(openai::completions))
        .route("/v1/chat/completions", post(openai::chat_completions))
        .route("/livez", get(live))
        .route("/healthz", get(live))
        .route("/readyz", get(ready))
        .route("/startupz", get(|| async { "started\n" }))
        .route("/metrics", get(metrics_text))
        .route("/openapi.json", get(|| async { ([(header::CONTENT_TYPE, "application/json")], OPENAPI) }))
        .fallback(not_found)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(middleware::from_fn_with_state(server.clone(), give_up))
        .layer(middleware::from_fn(|request, next| receive(request, next, BODY_PATIENCE)))
        .layer(middleware::from_fn_with_state(server.clone(), authorize))
        .layer(middleware::from_fn_with_state(server.clone(), observe))
        .layer(DefaultBodyLimit::max(MAX_BODY_BYTES))
        .with_state(server)
}

/// A request that waits for the engine is answered when the engine fails, whatever else the engine's thread is doing.
async fn give_up(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let uri = request.uri().clone();
    tokio::select! {
        biased;
        response = next.run(request) => response,
        error = server.engine.failed() => {
            let message = format!("Internal Server Error: the engine has failed: {}", error_chain(&*error));
            refusal(uri.path(), StatusCode::INTERNAL_SERVER_ERROR, &message)
        }
    }
}

/// Reads a body before its route sees it, so that one that never ends costs a connection and no more: what is left of it cannot be told from
/// the next request, so the client is told that the connection ends.
async fn receive(request: Request, next: Next, patience: Duration) -> Response {
    let (head, body) = request.into_parts();
    let path = head.uri.path();
    let received = Bytes::from_request(Request::from_parts(head.clone(), body), &());
    let mut response = match tokio::time::timeout(patience, received).await {
        Ok(Ok(body)) => return next.run(Request::from_parts(head, Body::from(body))).await,
        Ok(Err(rejection)) => refusal(path, rejection.status(), &rejection.body_text()),
        Err(_) => refusal(path, StatusCode::REQUEST_TIMEOUT, &format!("the body did not come within {patience:?}")),
    };
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    response
}

/// An error in the form of the path's dialect.
fn refusal(path: &str, status: StatusCode, text: &str) -> Response {
    if path.starts_with("/v1/") { openai::error(status, text) } else { generate::message(status, text) }
}

/// The process answers and its engine has not failed.
async fn live(State(server): State<Arc<Server>>) -> Response {
    match server.engine.failure() {
        Some(error) => unavailable(format!("failed: {}\n", error_chain(&*error))),
        None => "alive\n".into_response(),
    }
}

/// New requests are welcome.
async fn ready(State(server): State<Arc<Server>>) -> Response {
    match server.engine.failure() {
        Some(error) => unavailable(format!("failed: {}\n", error_chain(&*error))),
        None if server.is_draining() => unavailable("draining\n".into()),
        None => "ready\n".into_response(),
    }
}

fn unavailable(reason: String) -> Response {
    (StatusCode::SERVICE_UNAVAILABLE, reason).into_response()
}

async fn metrics_text(State(server): State<Arc<Server>>) -> Response {
    let phase = match server.engine.failure() {
        Some(_) => "failed",
        None if server.is_draining() => "draining",
        None => "ready",
    };
    let text = server.metrics.render(&server.engine.stats(), &server.engine.rank_steps(), phase);
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response()
}

/// Readiness polls of NeMo's recipe ask for `/` and are content with any answer, so this one must always come.
async fn not_found(request: Request) -> Response {
    match request.uri().path() {
        path if path.starts_with("/v1/") => refusal(path, StatusCode::NOT_FOUND, "there is no such endpoint"),
        _ => generate::not_found(),
    }
}

async fn method_not_allowed(request: Request) -> Response {
    let text = format!("{} has no method {}", request.uri().path(), request.method());
    refusal(request.uri().path(), StatusCode::METHOD_NOT_ALLOWED, &text)
}

/// Lets requests through that carry the token or need none.
async fn authorize(State(server): State<Arc<Server>>, request: Request, next: Next) -> Response {
    let allowed = match &server.token {
        None => true,
        Some(_) if OPEN_ROUTES.contains(&request.uri().path()) => true,
        Some(token) => bearer(&request).is_some_and(|given| given.as_bytes().ct_eq(token.as_bytes()).into()),
    };
    if allowed {
        return next.run(request).await;
    }
    let text = "a bearer token is required, and the one given (if any) is not it";
    let mut response = refusal(request.uri().path(), StatusCode::UNAUTHORIZED, text);
    response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
    response
}

/// The token of an `Authorization: Bearer` header.
fn bearer(request: &Request) -> Option<&str> {
    let value = request.headers().get(header::AUTHORIZATION)?.to_str().ok()?;
    let (scheme, token) = value.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// Gives every answer a request id, counts and logs it. Bodies are never logged: prompts are private.
async fn observe(State(server): State<Arc<Server>>, mut request: Request, next: Next) -> Response {
    const REQUEST_ID: &str = "x-request-id";
    let given = request.headers().get(REQUEST_ID).filter(|id| id.len() <= 128).cloned();
    let id = given.unwrap_or_else(|| HeaderValue::try_from(new_id()).expect("hexadecimal digits are a header value"));
    let path = request.uri().path();
    let tally = Arc::<Tally>::default();
    let mut access = Access {
        metrics: server.metrics.clone(),
        method: request.method().clone(),
        route: ROUTES.into_iter().find(|route| *route == path).unwrap_or("other"),
        peer: request.extensions().get().map(|ConnectInfo(peer)| *peer),
        tally: tally.clone(),
        id: id.clone(),
        start: Instant::now(),
        status: 499,
    };
    request.extensions_mut().insert(tally);
    let mut response = next.run(request).await;
    response.headers_mut().insert(REQUEST_ID, id);
    let status = response.status().as_u16();
    if response.body().size_hint().exact().is_some() {
        access.answered(status);
        return response;
    }
    // A body of unknown length is still being made: the request is over when it ends, and abandoned when it is dropped before.
    response.map(|body| {
        let chunks = stream::unfold((body.into_data_stream(), access), move |(mut body, mut access)| async move {
            let Some(chunk) = body.next().await else {
                access.answered(status);
                return None;
            };
            Some((chunk, (body, access)))
        });
        Body::from_stream(chunks)
    })
}

/// One line of the access log, written when the request is over, be it because the client left.
struct Access {
    metrics: Arc<Metrics>,
    method: Method,
    route: &'static str,
    peer: Option<SocketAddr>,
    tally: Arc<Tally>,
    id: HeaderValue,
    start: Instant,
    status: u16,
}

impl Access {
    fn answered(&mut self, status: u16) {
        self.status = status;
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        self.metrics.count_response(self.route, self.status, self.start.elapsed());
        let (method, route, status) = (&self.method, self.route, self.status);
        let (id, ms) = (self.id.to_str().unwrap_or("?"), self.start.elapsed().as_millis() as u64);
        let peer = self.peer.map(tracing::field::display);
        let (prompt_tokens, completion_tokens) = (self.tally.prompt_tokens(), self.tally.completion_tokens());
        if OPEN_ROUTES.contains(&route) || route == "/metrics" {
            tracing::debug!(%method, route, status, ms, peer, id, "request");
        } else {
            tracing::info!(%method, route, status, ms, peer, prompt_tokens, completion_tokens, id, "request");
        }
    }
}

/// 128 random bits in hexadecimal.
fn new_id() -> String {
    format!("{:016x}{:016x}", random_u64(), random_u64())
}

/// A number that no client can guess or repeat.
fn random_u64() -> u64 {
    use rand::{RngCore, SeedableRng};
    rand::rngs::StdRng::from_os_rng().next_u64()
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn every_route_is_described() {
        let document: serde_json::Value = serde_json::from_str(OPENAPI).unwrap();
        let described: Vec<&String> = document["paths"].as_object().unwrap().keys().collect();
        let missing: Vec<&str> =
            ROUTES.into_iter().filter(|route| !described.iter().any(|path| path == route)).collect();
        // Models by their id are many paths to metrics.
        assert_eq!((missing, described.len()), (vec![], ROUTES.len() + 1));
    }

    #[tokio::test]
    async fn a_body_that_never_ends_is_given_up() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let hasty = |request, next| receive(request, next, Duration::from_millis(50));
        let app = Router::new().fallback(|body: Bytes| async { body }).layer(middleware::from_fn(hasty));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(async { axum::serve(listener, app).await });
        for (path, promised, expected) in [
            ("/generate", 3, "408 Request Timeout"),
            ("/generate", 3, r#"{"message":"the body did not come within 50ms"}"#),
            ("/v1/completions", 3, r#"{"error":{"#),
            ("/generate", 2, "200 OK"),
        ] {
            // After a body that was not read to its end, the server ends the connection and says so.
            let wish = if promised == 2 { "close" } else { "keep-alive" };
            let mut connection = tokio::net::TcpStream::connect(address).await.unwrap();
            let head = format!(
                "PUT {path} HTTP/1.1\r\nHost: x\r\nConnection: {wish}\r\nContent-Length: {promised}\r\n\r\n{{}}"
            );
            connection.write_all(head.as_bytes()).await.unwrap();
            let mut answer = String::new();
            connection.read_to_string(&mut answer).await.unwrap();
            assert!(answer.contains(expected) && answer.contains("connection: close"), "{path}: {answer}");
        }
    }
}
