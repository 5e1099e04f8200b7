//! HTTP: routes, authentication, health, and the dialects that turn bodies into requests.

use std::net::TcpListener;

use crate::engine::Engine;
use crate::tokenizer::Tokenizer;

/// How to serve.
pub struct ServeOptions {
    /// Bound, not yet listening for anyone but us to see: the port answers from the moment this is served, when the model is ready.
    pub listener: TcpListener,
    /// Clients must send it as a bearer token; `None` with `--no-auth`.
    pub token: Option<String>,
    /// Validation errors of `PUT /generate` get status 400 instead of NeMo's 200.
    pub strict: bool,
}

/// Serves until `shutdown` resolves, then lets running requests finish.
///
/// # Errors
/// The listener failed.
pub async fn run(
    _engine: Engine,
    _tokenizer: Tokenizer,
    _options: ServeOptions,
    _shutdown: impl Future<Output = ()> + Send + 'static,
) -> std::io::Result<()> {
    unimplemented!()
}
