//! The HTTP client of a serving run: `PUT /generate` as NeMo's clients send it.

use std::time::Duration;

use anyhow::Context as _;
use reqwest::StatusCode;
use serde::Serialize;
use serde_json::Value;
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

    /// Each prompt with its completion.
    ///
    /// # Errors
    /// Nobody answers there, or the server refuses the request; with the server's own words.
    pub(crate) fn generate(&self, request: &GenerateRequest) -> Outcome<Vec<String>> {
        let body = serde_json::to_vec(request).context("cannot write the request")?;
        let mut put = self.http.put(format!("{}/generate", self.url)).header("content-type", "application/json");
        if let Some(token) = &self.token {
            put = put.bearer_auth(token);
        }
        let answer = self.runtime.block_on(async {
            let response = put.body(body).send().await?;
            Ok((response.status(), response.text().await?))
        });
        let (status, text) = answer.map_err(|error| self.unanswered(error))?;
        self.sentences(status, &text)
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

    fn sentences(&self, status: StatusCode, text: &str) -> Outcome<Vec<String>> {
        let body: Option<Value> = serde_json::from_str(text).ok();
        match (status, body) {
            // NeMo reports an invalid request as a JSON string with status 200.
            (StatusCode::OK | StatusCode::BAD_REQUEST, Some(Value::String(error))) => {
                Err(Failure::msg(Exit::Usage, format!("the server refuses the request: {error}")))
            }
            (StatusCode::OK, Some(Value::Object(mut body))) => {
                let sentences = body.remove("sentences").unwrap_or_default();
                let sentences = serde_json::from_value(sentences);
                Ok(sentences.with_context(|| format!("{} does not answer as /generate does", self.url))?)
            }
            (StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                let text = format!(
                    "{} does not accept {}",
                    self.url,
                    if self.token.is_some() { "this token" } else { "requests without a token" }
                );
                Err(Failure::msg(Exit::Usage, text).hint("--token-file names the file that holds it"))
            }
            (status, body) => {
                let message = body.as_ref().and_then(|body| body.pointer("/error/message").or(body.get("message")));
                let message = message.and_then(Value::as_str).unwrap_or(text).trim();
                let exit = if status.is_client_error() { Exit::Usage } else { Exit::Internal };
                Err(Failure::msg(exit, format!("{} answers {status}: {message}", self.url)))
            }
        }
    }
}

/// What the model added to `prompt`: the prompt is cut by its length, as NeMo's clients do, and one end string at the end is cut too.
pub(crate) fn completion(sentence: &str, prompt: &str, end_strings: &[String]) -> String {
    let cut = sentence.char_indices().nth(prompt.chars().count()).map_or(sentence.len(), |(at, _)| at);
    let text = sentence.strip_prefix(prompt).unwrap_or(&sentence[cut..]);
    let ends = end_strings.iter().filter(|end| !end.is_empty() && text.ends_with(end.as_str()));
    let end = ends.map(String::len).max().unwrap_or(0);
    text[..text.len() - end].to_owned()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::{Read as _, Write as _};
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn prompt_and_one_end_string_are_cut() {
        let ends = ["<extra_id_1>", "<extra_id_1>User", ""].map(String::from);
        let check = |sentence, expected: &str| assert_eq!(completion(sentence, "Ω: ", &ends), expected);
        check("Ω: a poem\n<extra_id_1>", "a poem\n");
        check("Ω: a poem\n<extra_id_1>User", "a poem\n");
        check("Ω: a poem", "a poem");
        check("?: a poem", "a poem");
        check("Ω", "");
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
        let failure = Client::new(&url, None, None).unwrap().generate(&request()).unwrap_err();
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
            let failure = Client::new(url, None, None).unwrap().generate(&request()).unwrap_err();
            assert_eq!(failure.exit, Exit::Usage, "{url}: {failure}");
        }
    }

    #[test]
    fn a_dead_server_is_named() {
        let url = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let failure = Client::new(&url, None, None).unwrap().generate(&request()).unwrap_err();
        assert_eq!(failure.exit, Exit::Internal);
        assert!(failure.to_string().contains(&format!("nothing answers at http://{url}")), "{failure}");
    }
}
