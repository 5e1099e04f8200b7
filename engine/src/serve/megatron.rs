//! `PUT /api` as Megatron-LM's text-generation server answers it, but for beam search.
//!
//! Unlike NeMo's, its rows end each at their own length, and a limit on `top_k` and the pairing with `top_p` are checked.

use std::sync::Arc;

use axum::extract::{Extension, Request, State};
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::{Value, json};

use super::Server;
use super::generate::{Batch, failed, json_line, prepare, put_body, run};
use super::rows::Tally;
use super::shape::{Generated, sentence};
use super::validate::{Fields, MAX_SENTENCES, Params, Refusal, Sentence, positive, saturate};

/// Any method on `/api`.
pub(super) async fn api(
    State(server): State<Arc<Server>>,
    Extension(tally): Extension<Arc<Tally>>,
    request: Request,
) -> Response {
    answer(&server, &tally, request).await.unwrap_or_else(|refused| refused)
}

async fn answer(server: &Arc<Server>, tally: &Arc<Tally>, request: Request) -> Result<Response, Response> {
    let body = put_body(request).await?;
    let (batch, score_only) = prepare(server, body, |server, body| {
        let (params, score_only) = validate(body)?;
        Ok((Batch::new(params, server)?, score_only))
    })
    .await?;
    let logprobs = batch.logprobs.tokens;
    let mut rows = run(server, tally, batch.prompts).await.map_err(|error| failed(error, server.strict))?;
    if score_only {
        rows.iter_mut().for_each(drop_last);
    }
    let text: Vec<String> = rows.iter().map(|row| sentence(row, &server.tokenizer)).collect();
    let pieces =
        |row: &Generated| row.ids.iter().map(|&id| server.tokenizer.piece(id).replace('\u{2581}', " ")).collect();
    let segments: Vec<Vec<String>> = rows.iter().map(pieces).collect();
    let logprobs = logprobs.then(|| rows.iter().map(|row| &row.logprobs).collect::<Vec<_>>());
    Ok(json_line(StatusCode::OK, &json!({"text": text, "segments": segments, "logprobs": logprobs})))
}

/// The engine generates at least one token; nobody asked for it.
fn drop_last(row: &mut Generated) {
    row.ids.pop();
    row.logprobs.pop();
}

/// Checks a body in Megatron-LM's order. True: only the prompts' log-probabilities are wanted.
fn validate(body: Value) -> Result<(Params, bool), Refusal> {
    const TOKENS: &str = "tokens_to_generate must be an integer greater than or equal to 0";
    let invalid = |text: &'static str| Err(Refusal::Invalid(text.into()));
    let Value::Object(mut fields) = body else {
        return Err(Refusal::Malformed("the body must be a JSON object".into()));
    };
    let prompts = fields.remove("prompts");
    let fields = Fields(fields);
    let given = |name| fields.0.contains_key(name);
    let sentences = match prompts {
        None => return Err(Refusal::Rejected("prompts argument required")),
        _ if given("max_len") => {
            return Err(Refusal::Rejected("max_len is no longer used.  Replace with tokens_to_generate"));
        }
        _ if given("sentences") => return Err(Refusal::Rejected("sentences is no longer used.  Replace with prompts")),
        Some(Value::Array(prompts)) => prompts,
        Some(_) => return Err(Refusal::Rejected("prompts is not a list of strings")),
    };
    match sentences.len() {
        0 => return Err(Refusal::Rejected("prompts is empty")),
        1..=MAX_SENTENCES => {}
        _ => return Err(Refusal::Rejected("Maximum number of prompts is 128")),
    }
    let texts: Option<Vec<Sentence>> =
        sentences.iter().map(|prompt| prompt.as_str().map(|text| Sentence::Text(text.to_owned()))).collect();
    let sentences = texts.ok_or(Refusal::Rejected("prompts is not a list of strings"))?;

    let tokens = saturate(fields.int("tokens_to_generate", 64, 0, TOKENS)?);
    let logprobs = fields.bool("logprobs")?;
    if tokens == 0 && !logprobs {
        return invalid("tokens_to_generate=0 implies logprobs should be True");
    }
    let temperature = "temperature must be a positive number less than or equal to 100.0";
    let temperature = fields.number("temperature", 1.0, |t| t > 0.0 && t <= 100.0, temperature)?;
    let top_k = fields.int("top_k", 0, 0, TOP_K)?;
    if top_k > 1000 {
        return invalid(TOP_K);
    }
    let top_p = fields.number("top_p", 0.0, |p| (0.0..=1.0).contains(&p), "top_p must be less than or equal to 1.0")?;
    if top_p > 0.0 && top_k > 0 {
        return invalid("cannot set both top-k and top-p samplings.");
    }
    for (name, text) in
        [("top_p_decay", "top_p_decay is not supported"), ("top_p_bound", "top_p_bound is not supported")]
    {
        fields.number(name, 0.0, |value| value == 0.0, text)?;
    }
    let add_bos = fields.bool("add_BOS")?;
    if !add_bos && sentences.contains(&Sentence::Text(String::new())) {
        return invalid("Empty prompts require add_BOS=true");
    }
    let mut end_strings = vec!["<|endoftext|>".to_owned()];
    for (name, end) in [("stop_on_double_eol", "\n\n"), ("stop_on_eol", "\n")] {
        if fields.bool(name)? {
            end_strings.push(end.to_owned());
        }
    }
    if fields.bool("prevent_newline_after_colon")? {
        return invalid("prevent_newline_after_colon is not supported");
    }
    let random_seed = match fields.0.get("random_seed").and_then(Value::as_i64) {
        Some(-1) => None,
        _ if given("random_seed") => Some(fields.int("random_seed", 0, 0, "random_seed must be a positive integer")?),
        _ => None,
    };
    fields.bool("no_log")?;
    if fields.0.get("beam_width").is_some_and(|width| !width.is_null()) {
        return invalid("beam_width: beam search is not supported");
    }
    let params = Params {
        sentences,
        tokens_to_generate: tokens.max(1),
        all_probs: false,
        temperature: positive(temperature),
        add_bos,
        // Neither top-k nor top-p: Megatron-LM draws from the whole distribution, and takes the best token with top_k 1.
        greedy: top_k == 1,
        top_k: saturate(top_k),
        top_p: if top_p > 0.0 { positive(top_p) } else { 0.0 },
        repetition_penalty: 1.0,
        end_strings,
        min_tokens_to_generate: 0,
        compute_logprob: logprobs,
        random_seed,
    };
    Ok((params, tokens == 0))
}

const TOP_K: &str = "top_k must be an integer equal to or greater than 0 and less than or equal to 1000";

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn with(changes: Value) -> Result<(Params, bool), Refusal> {
        let mut body = json!({"prompts": ["a prompt"]});
        for (key, value) in changes.as_object().unwrap() {
            body[key] = value.clone();
        }
        validate(body)
    }

    #[test]
    fn defaults_and_edges() {
        let (params, score_only) = with(json!({"foo": 1, "random_seed": -1, "beam_width": null})).unwrap();
        assert_eq!((params.tokens_to_generate, params.top_p, params.random_seed, score_only), (64, 0.0, None, false));
        let (params, score_only) = with(json!({"tokens_to_generate": 0, "logprobs": true})).unwrap();
        assert!(score_only && params.compute_logprob);
        assert!(with(json!({"prompts": [""], "add_BOS": true, "top_k": 1000, "top_p": 0.0})).is_ok());
        assert_eq!(with(json!({"stop_on_eol": true})).unwrap().0.end_strings, ["<|endoftext|>", "\n"]);
    }

    #[test]
    fn refusals() {
        for (changes, text) in [
            (json!({"prompts": null}), "prompts is not a list of strings"),
            (json!({"prompts": [1]}), "prompts is not a list of strings"),
            (json!({"prompts": []}), "prompts is empty"),
            (json!({"prompts": vec!["a"; 129]}), "Maximum number of prompts is 128"),
            (json!({"max_len": 1}), "max_len is no longer used.  Replace with tokens_to_generate"),
            (json!({"sentences": []}), "sentences is no longer used.  Replace with prompts"),
        ] {
            assert_eq!(with(changes.clone()).unwrap_err(), Refusal::Rejected(text), "{changes}");
        }
        assert_eq!(validate(json!({})).unwrap_err(), Refusal::Rejected("prompts argument required"));
        for (changes, text) in [
            (json!({"tokens_to_generate": 0}), "tokens_to_generate=0 implies logprobs should be True"),
            (json!({"top_k": 1001}), TOP_K),
            (json!({"top_k": 2, "top_p": 0.5}), "cannot set both top-k and top-p samplings."),
            (json!({"prompts": [""]}), "Empty prompts require add_BOS=true"),
            (json!({"beam_width": 2}), "beam_width: beam search is not supported"),
            (json!({"top_p_decay": 0.5}), "top_p_decay is not supported"),
            (json!({"random_seed": -2}), "random_seed must be a positive integer"),
        ] {
            assert_eq!(with(changes.clone()).unwrap_err(), Refusal::Invalid(text.into()), "{changes}");
        }
    }
}
