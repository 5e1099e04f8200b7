//! The HTTP client of a serving run: `PUT /generate` as NeMo's clients send it, and `PUT /score`.

use std::time::Duration;

use anyhow::Context as _;
use futures_util::{StreamExt as _, stream};
use nemotron_engine::chat::Message;
use reqwest::{Method, RequestBuilder, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokio::runtime::Runtime;

use crate::report::{Exit, Failure, Outcome};

/// The body of `PUT /generate`.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct GenerateRequest {
    pub(crate) sentences: Vec<String>,
    pub(crate) tokens_to_generate: u32,
    pub(crate) min_tokens_to_generate: u32,
    pub(crate) temperature: f32,
    pub(crate) top_k: u32,
    pub(crate) top_p: f32,
    pub(crate) greedy: bool,
    pub(crate) repetition_penalty: f32,
    #[serde(rename = "add_BOS")]
    pub(crate) add_bos: bool,
    pub(crate) all_probs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) random_seed: Option<u64>,
    pub(crate) end_strings: Vec<String>,
}

/// A server to ask.
pub(crate) struct Client {
    url: String,
    token: Option<String>,
    http: reqwest::Client,
    runtime: Runtime,
}

impl Client {
    /// Without `timeout` an answer may take as long as it needs: a long completion of a large model takes minutes.
    pub(crate) fn new(url: &str, token: Option<String>, timeout: Option<Duration>) -> Outcome<Self> {
        let url = url.trim_end_matches('/');
        let url = if url.contains("://") { url.to_owned() } else { format!("http://{url}") };
        let mut http = reqwest::Client::builder().connect_timeout(Duration::from_secs(10));
        if let Some(timeout) = timeout {
            http = http.timeout(timeout);
        }
        let http = http.build().context("cannot make an HTTP client")?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        Ok(Self { url, token, http, runtime: runtime.context("cannot start the HTTP client")? })
    }

    /// Sends requests of one prompt each, `concurrency` at a time, and gives `take` the answers in the order of the requests, until it wants no more.
    ///
    /// # Errors
    /// Nobody answers there, or the server refuses a request, with the server's own words; or `take` failed.
    pub(crate) fn generate(
        &self,
        requests: impl Iterator<Item = GenerateRequest>,
        concurrency: usize,
        take: impl FnMut(Generated) -> Outcome<bool>,
    ) -> Outcome {
        self.ask("/generate", requests, concurrency, |status, text| self.generated(status, text), take)
    }

    /// Sends conversations to a reward model, like [`Self::generate`].
    ///
    /// # Errors
    /// Those of [`Self::generate`].
    pub(crate) fn score<'a>(
        &self,
        conversations: impl Iterator<Item = &'a [Message]>,
        concurrency: usize,
        take: impl FnMut(Scores) -> Outcome<bool>,
    ) -> Outcome {
        let requests = conversations.map(|messages| json!({ "conversations": [messages] }));
        let read = |status, text: &str| match status {
            StatusCode::OK => serde_json::from_str(text)
                .with_context(|| format!("{} does not answer as /score does", self.url))
                .map_err(Failure::from),
            _ => Err(self.refused(status, text)),
        };
        self.ask("/score", requests, concurrency, read, take)
    }

    fn ask<R: Serialize, A>(
        &self,
        route: &str,
        requests: impl Iterator<Item = R>,
        concurrency: usize,
        read: impl Fn(StatusCode, &str) -> Outcome<A>,
        mut take: impl FnMut(A) -> Outcome<bool>,
    ) -> Outcome {
        let answer = async |request: R| {
            let response = self.request(Method::PUT, route, &request).send().await?;
            Ok((response.status(), response.text().await?))
        };
        self.runtime.block_on(async {
            let mut answers = stream::iter(requests).map(answer).buffered(concurrency);
            while let Some(answer) = answers.next().await {
                let (status, text) = answer.map_err(|error| self.unanswered(error))?;
                if !take(read(status, &text)?)? {
                    break;
                }
            }
            Ok(())
        })
    }

    /// Gives `show` the text of a completion as it grows, without prompt and end string, until it wants no more; whether it still does.
    ///
    /// # Errors
    /// As those of [`Self::generate`]; or the answer ended before the text did.
    pub(crate) fn stream(
        &self,
        request: &GenerateRequest,
        mut show: impl FnMut(&str) -> Outcome<bool>,
    ) -> Outcome<bool> {
        let body = stream_body(request);
        self.runtime.block_on(async {
            let send = self.request(Method::POST, "/v1/completions", &body).send();
            let mut response = send.await.map_err(|error| self.unanswered(error))?;
            let status = response.status();
            if status != StatusCode::OK {
                let text = response.text().await.map_err(|error| self.unanswered(error))?;
                return Err(self.refused(status, &text));
            }
            let mut received = Vec::new();
            while let Some(chunk) = response.chunk().await.map_err(|error| self.unanswered(error))? {
                received.extend_from_slice(&chunk);
                while let Some(end) = received.windows(2).position(|two| two == b"\n\n") {
                    let event: Vec<u8> = received.drain(..end + 2).collect();
                    let Some(data) = event.strip_prefix(b"data: ") else { continue };
                    if data.trim_ascii_end() == b"[DONE]" {
                        return Ok(true);
                    }
                    let data: Value = serde_json::from_slice(data)
                        .with_context(|| format!("{} does not stream as /v1/completions does", self.url))?;
                    if let Some(message) = data.pointer("/error/message").and_then(Value::as_str) {
                        return Err(Failure::msg(Exit::Internal, format!("{} gives up: {message}", self.url)));
                    }
                    let text = data.pointer("/choices/0/text").and_then(Value::as_str).unwrap_or_default();
                    if !text.is_empty() && !show(text)? {
                        return Ok(false);
                    }
                }
            }
            Err(Failure::msg(Exit::Internal, format!("the answer of {} ended midway", self.url)))
        })
    }

    fn request(&self, method: Method, path: &str, body: &impl Serialize) -> RequestBuilder {
        let mut request = self.http.request(method, format!("{}{path}", self.url)).json(body);
        if let Some(token) = &self.token {
            request = request.bearer_auth(token);
        }
        request
    }

    fn unanswered(&self, error: reqwest::Error) -> Failure {
        let mut exit = Exit::Internal;
        let what = if error.is_builder() {
            exit = Exit::Usage;
            format!("{} is not the URL of a server", self.url)
        } else if error.is_timeout() {
            format!("no answer from {} in time", self.url)
        } else if error.is_connect() {
            format!("nothing answers at {}", self.url)
        } else {
            format!("the connection to {} failed", self.url)
        };
        let unreachable = error.is_connect();
        let failure = Failure::new(exit, anyhow::Error::new(error.without_url()).context(what));
        if unreachable { failure.hint("`nemotron status` shows what is running") } else { failure }
    }

    fn generated(&self, status: StatusCode, text: &str) -> Outcome<Generated> {
        match (status, serde_json::from_str(text)) {
            (StatusCode::OK, Ok(body @ Value::Object(_))) => {
                let foreign = || format!("{} does not answer as /generate does", self.url);
                let answer: Answer = serde_json::from_value(body).with_context(foreign)?;
                let (sentence, tokens) =
                    answer.sentences.into_iter().zip(answer.tokens).next().with_context(foreign)?;
                Ok(Generated { sentence, last_token: tokens.into_iter().next_back() })
            }
            _ => Err(self.refused(status, text)),
        }
    }

    /// What an answer says that is none.
    fn refused(&self, status: StatusCode, text: &str) -> Failure {
        let body: Option<Value> = serde_json::from_str(text).ok();
        match (status, body) {
            // NeMo reports an invalid request as a JSON string with status 200.
            (StatusCode::OK | StatusCode::BAD_REQUEST, Some(Value::String(error))) => {
                Failure::msg(Exit::Usage, format!("the server refuses the request: {error}"))
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                let text = format!(
                    "{} does not accept {}",
                    self.url,
                    if self.token.is_some() { "this token" } else { "requests without a token" }
                );
                Failure::msg(Exit::Usage, text).hint("--token-file names the file that holds it")
            }
            (status, body) => {
                let message = body.as_ref().and_then(|body| body.pointer("/error/message").or(body.get("message")));
                let message = message.and_then(Value::as_str).unwrap_or(text).trim();
                let exit = if status.is_client_error() { Exit::Usage } else { Exit::Internal };
                Failure::msg(exit, format!("{} answers {status}: {message}", self.url))
            }
        }
    }
}

/// An answer of `PUT /generate`, as far as it is read.
#[derive(Deserialize)]
struct Answer {
    sentences: Vec<String>,
    tokens: Vec<Vec<String>>,
}

/// The answer of `PUT /score` to one conversation: lists of one.
#[derive(Deserialize)]
pub(crate) struct Scores {
    pub(crate) attributes: Vec<String>,
    pub(crate) rewards: Vec<Vec<f32>>,
    pub(crate) scores: Vec<Option<f32>>,
    pub(crate) exceeded: Vec<bool>,
}

/// The answer to one prompt.
pub(crate) struct Generated {
    /// Prompt and completion.
    sentence: String,
    /// The piece that came last.
    last_token: Option<String>,
}

/// The request in the words of `/v1/completions`, which streams; NeMo's names in it are extensions of our server.
fn stream_body(request: &GenerateRequest) -> Value {
    json!({
        "prompt": request.sentences[0],
        "stream": true,
        "tokens_to_generate": request.tokens_to_generate,
        "min_tokens_to_generate": request.min_tokens_to_generate,
        "temperature": if request.greedy { 0.0 } else { request.temperature },
        "top_k": request.top_k,
        // 0 is off in NeMo's words.
        "top_p": if request.top_p == 0.0 { 1.0 } else { request.top_p },
        "repetition_penalty": request.repetition_penalty,
        "add_BOS": request.add_bos,
        "seed": request.random_seed.map(u64::cast_signed),
        "end_strings": request.end_strings,
    })
}

/// What the model added to a prompt.
pub(crate) struct Completion {
    pub(crate) text: String,
    /// "stop" or "length".
    pub(crate) finish_reason: &'static str,
}

/// The prompt is cut by its length, as NeMo's clients do, and one end string at the end is cut too.
pub(crate) fn completion(answer: &Generated, prompt: &str, end_strings: &[String]) -> Completion {
    let Generated { sentence, last_token } = answer;
    let cut = sentence.char_indices().nth(prompt.chars().count()).map_or(sentence.len(), |(at, _)| at);
    let text = sentence.strip_prefix(prompt).unwrap_or(&sentence[cut..]);
    let end = end_strings.iter().filter(|end| text.ends_with(end.as_str())).map(String::len).max();
    let is_stopped = end.is_some() || last_token.as_deref() == Some("</s>");
    Completion {
        text: text[..text.len() - end.unwrap_or(0)].to_owned(),
        finish_reason: if is_stopped { "stop" } else { "length" },
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::{Read as _, Write as _};
    use std::iter::once;
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn prompt_and_one_end_string_are_cut() {
        let ends = ["<extra_id_1>", "<extra_id_1>User"].map(String::from);
        let check = |sentence: &str, last: &str, text: &str, reason: &str| {
            let answer = Generated { sentence: sentence.into(), last_token: Some(last.into()) };
            let completion = completion(&answer, "Ω: ", &ends);
            assert_eq!((completion.text.as_str(), completion.finish_reason), (text, reason));
        };
        check("Ω: a poem\n<extra_id_1>", "<extra_id_1>", "a poem\n", "stop");
        check("Ω: a poem\n<extra_id_1>User", "User", "a poem\n", "stop");
        check("Ω: a poem", "poem", "a poem", "length");
        check("?: a poem", "</s>", "a poem", "stop");
        check("Ω", "Ω", "", "length");
    }

    /// The failure for an answer of a server.
    fn refused(answer: &'static str) -> Failure {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let url = listener.local_addr().unwrap().to_string();
        let server = std::thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            _ = stream.read(&mut [0; 4096]).unwrap();
            stream.write_all(answer.as_bytes()).unwrap();
        });
        let failure = Client::new(&url, None, None).unwrap().generate(once(request()), 1, |_| Ok(true)).unwrap_err();
        server.join().unwrap();
        failure
    }

    fn request() -> GenerateRequest {
        GenerateRequest {
            sentences: vec!["a".into()],
            tokens_to_generate: 1,
            min_tokens_to_generate: 0,
            temperature: 1.0,
            top_k: 0,
            top_p: 0.9,
            greedy: true,
            repetition_penalty: 1.0,
            add_bos: false,
            all_probs: false,
            random_seed: None,
            end_strings: Vec::new(),
        }
    }

    #[test]
    fn the_body_has_the_names_and_numbers_of_nemo() {
        let body = serde_json::to_string(&request()).unwrap();
        assert!(body.contains(r#""add_BOS":false"#) && body.contains(r#""top_p":0.9"#), "{body}");
        assert!(!body.contains("random_seed"), "{body}");
    }

    #[test]
    fn refusals_are_told_in_the_servers_words() {
        let failure = refused("HTTP/1.1 200 OK\r\ncontent-length: 14\r\n\r\n\"not like that");
        assert_eq!(failure.exit, Exit::Internal);
        let failure = refused("HTTP/1.1 200 OK\r\ncontent-length: 15\r\n\r\n\"not like that\"");
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.to_string().contains("not like that"));
        let failure = refused("HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n");
        assert!(failure.to_string().contains("--token-file"), "{failure}");
    }

    #[test]
    fn what_is_no_url_is_a_usage_error() {
        for url in ["not a url", "ftp://host"] {
            let failure = Client::new(url, None, None).unwrap().generate(once(request()), 1, |_| Ok(true)).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{url}: {failure}");
        }
    }

    #[test]
    fn a_dead_server_is_named() {
        let url = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let failure = Client::new(&url, None, None).unwrap().generate(once(request()), 1, |_| Ok(true)).unwrap_err();
        assert_eq!(failure.exit, Exit::Internal);
        assert!(failure.to_string().contains(&format!("nothing answers at http://{url}")), "{failure}");
    }
}
