//! The rows of a job: JSON lines or inline prompts, checked as a whole, rendered with the prompt template and tokenised.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::Path;

use serde_json::{Map, Value};
use sha2::{Digest, Sha256};

use crate::chat::{ChatTemplate, Message, Role};
use crate::error_chain::error_chain;
use crate::tokenizer::Tokenizer;

use super::{JobError, JobFile};

/// Keys of an output line. An input row that carries one of them would give a line with two.
const RESERVED: [&str; 7] =
    ["sample", "response", "finish_reason", "prompt_tokens", "completion_tokens", "seed", "error"];

/// One prompt of the job.
#[derive(Debug, PartialEq)]
pub(super) struct InputRow {
    /// A string or a number; unique in the job.
    pub(super) id: Value,
    /// As the model shall see it, which takes no more memory than the text.
    pub(super) prompt: Vec<u32>,
    /// All other keys of the row, in their order.
    pub(super) carried: Map<String, Value>,
    /// Of the row as the input has it, and of its id.
    pub(super) digest: [u8; 32],
}

fn digest(id: &Value, text: &str) -> [u8; 32] {
    Sha256::new().chain_update(id.to_string()).chain_update([0]).chain_update(text.trim()).finalize().into()
}

/// What a row gives the model.
pub(super) enum Prompt {
    Text(String),
    Messages(Vec<Message>),
}

/// How that becomes ids.
pub(super) struct Encoder<'a> {
    pub(super) tokenizer: &'a Tokenizer,
    /// `None`: prompts are sent as they are.
    pub(super) chat: Option<&'a ChatTemplate>,
    /// Put before conversations that have no system message.
    pub(super) system: &'a str,
}

impl Encoder<'_> {
    pub(super) fn encode(&self, prompt: Prompt) -> Result<Vec<u32>, String> {
        let (chat, mut messages) = match (self.chat, prompt) {
            (None, Prompt::Text(text)) => return Ok(self.tokenizer.encode(&text)),
            (None, Prompt::Messages(_)) => return Err("`messages` needs a prompt template other than \"raw\"".into()),
            (Some(chat), Prompt::Text(content)) => (chat, vec![Message { role: Role::User, content }]),
            (Some(chat), Prompt::Messages(messages)) => (chat, messages),
        };
        if !self.system.is_empty() && messages.first().is_none_or(|message| message.role != Role::System) {
            messages.insert(0, Message { role: Role::System, content: self.system.into() });
        }
        chat.encode(&messages, self.tokenizer).map_err(|error| error_chain(&error))
    }
}

/// Reads the first `limit` rows; `encode` says what each gives the model.
pub(super) fn read(
    file: &JobFile,
    dir: &Path,
    limit: Option<u64>,
    encode: impl Fn(Prompt) -> Result<Vec<u32>, String>,
) -> Result<Vec<InputRow>, JobError> {
    let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
    match (&file.input.path, &file.input.prompts) {
        (Some(path), None) => {
            let path = dir.join(path);
            let error = |reason: String| JobError::Input { path: path.clone(), reason };
            let open = File::open(&path).map_err(|source| error(source.to_string()))?;
            match read_lines(BufReader::new(open), limit, encode) {
                Ok(rows) if rows.is_empty() && limit > 0 => Err(error("there is no row in it".into())),
                rows => rows.map_err(error),
            }
        }
        (None, Some(prompts)) => {
            let rows = prompts.iter().take(limit).enumerate().map(|(index, prompt)| {
                let (id, text) = (Value::from(index), prompt.as_str());
                let digest = digest(&id, text);
                Ok(InputRow { id, prompt: encode(Prompt::Text(text.into()))?, carried: Map::new(), digest })
            });
            let rows: Result<_, String> = rows.collect();
            rows.map_err(|reason| JobError::Input { path: "input.prompts".into(), reason })
        }
        _ => Err(JobError::Input {
            path: "input".into(),
            reason: "exactly one of `path` and `prompts` is needed".into(),
        }),
    }
}

fn read_lines(
    mut input: impl BufRead,
    limit: usize,
    encode: impl Fn(Prompt) -> Result<Vec<u32>, String>,
) -> Result<Vec<InputRow>, String> {
    let mut rows = Vec::new();
    // The line of each id, by its JSON form: the string "1" is not the number 1.
    let mut lines_of_ids = HashMap::new();
    let mut bytes = Vec::new();
    for line_number in 1.. {
        bytes.clear();
        let error = |reason: String| format!("line {line_number}: {reason}");
        if rows.len() == limit || input.read_until(b'\n', &mut bytes).map_err(|source| error(source.to_string()))? == 0
        {
            break;
        }
        let line = std::str::from_utf8(&bytes).map_err(|source| error(source.to_string()))?;
        // Editors of some systems mark the start of a file as UTF-8.
        let line = if line_number == 1 { line.trim_start_matches('\u{feff}') } else { line };
        if line.trim().is_empty() {
            continue;
        }
        let row = parse_row(line, rows.len(), &encode).map_err(error)?;
        match lines_of_ids.entry(row.id.to_string()) {
            Entry::Vacant(entry) => entry.insert(line_number),
            Entry::Occupied(entry) => {
                let (id, first) = (entry.key(), entry.get());
                return Err(error(format!("the id {id} is that of line {first} already")));
            }
        };
        rows.push(row);
    }
    Ok(rows)
}

fn parse_row(
    line: &str,
    index: usize,
    encode: impl Fn(Prompt) -> Result<Vec<u32>, String>,
) -> Result<InputRow, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| {
        // The position that the message ends with is within this line only.
        let message = error.to_string();
        format!("column {}: {}", error.column(), message.split(" at line ").next().unwrap_or_default())
    })?;
    let Value::Object(mut carried) = value else { return Err("a row must be a JSON object".into()) };
    if let Some(key) = RESERVED.iter().find(|key| carried.contains_key(**key)) {
        return Err(format!("the key `{key}` is one that the output has; give it another name"));
    }
    let id = carried.shift_remove("id").unwrap_or(index.into());
    if !id.is_string() && !id.is_number() {
        return Err("`id` must be a string or a number".into());
    }
    let prompt =
        match (carried.shift_remove("prompt"), carried.shift_remove("messages")) {
            (Some(Value::String(text)), None) => Prompt::Text(text),
            (Some(_), None) => return Err("`prompt` must be a string".into()),
            (None, Some(messages)) => Prompt::Messages(serde_json::from_value(messages).map_err(|error| {
                format!("`messages` must be a list of objects with a `role` and a `content`: {error}")
            })?),
            (Some(_), Some(_)) => return Err("only one of `prompt` and `messages` can be given".into()),
            (None, None) => return Err("one of `prompt` and `messages` is needed".into()),
        };
    let digest = digest(&id, line);
    Ok(InputRow { id, prompt: encode(prompt)?, carried, digest })
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::json;

    use super::*;

    /// Characters for ids.
    fn encode(prompt: Prompt) -> Result<Vec<u32>, String> {
        match prompt {
            Prompt::Text(text) => Ok(text.chars().map(u32::from).collect()),
            Prompt::Messages(messages) => Err(format!("{} messages", messages.len())),
        }
    }

    fn rows(text: &str) -> Vec<InputRow> {
        read_lines(text.as_bytes(), usize::MAX, encode).unwrap()
    }

    #[track_caller]
    fn check_error(text: &str, expected: &str) {
        let error = read_lines(text.as_bytes(), usize::MAX, encode).unwrap_err();
        assert!(error.starts_with(expected), "{error}");
    }

    #[test]
    fn rows_keep_their_other_keys_in_order_and_blank_lines_are_skipped() {
        let rows = rows(concat!(
            "\u{feff}{\"z\":1.5,\"prompt\":\"a\",\"b\":{\"y\":null,\"x\":[]},\"a\":\"\"}\n",
            "  \r\n",
            "{\"id\":\"k\",\"prompt\":\"b\"}\r\n",
            "{\"prompt\":\"c\"}",
        ));
        assert_eq!(rows.iter().map(|row| row.id.clone()).collect::<Vec<_>>(), [json!(0), json!("k"), json!(2)]);
        assert_eq!(rows.iter().map(|row| row.prompt[0]).collect::<Vec<_>>(), [97, 98, 99]);
        assert_eq!(Value::from(rows[0].carried.clone()).to_string(), r#"{"z":1.5,"b":{"y":null,"x":[]},"a":""}"#);
    }

    #[test]
    fn a_limit_reads_no_further() {
        let read = |limit| read_lines("{\"prompt\":\"a\"}\n{\"prompt\":\"b\"}\nnot JSON".as_bytes(), limit, encode);
        assert_eq!(read(2).unwrap().len(), 2);
        assert!(read(3).is_err());
    }

    #[test]
    fn bad_rows_are_named_by_line() {
        check_error("{\"prompt\":\"a\"}\n\n{\"prompt\": a}\n", "line 3: column 12: expected value");
        check_error("[1]", "line 1: a row must be a JSON object");
        check_error("{}", "line 1: one of `prompt` and `messages` is needed");
        check_error(r#"{"prompt":1}"#, "line 1: `prompt` must be a string");
        check_error(r#"{"prompt":"a","messages":[]}"#, "line 1: only one of");
        check_error(r#"{"messages":[{"role":"user"}]}"#, "line 1: `messages` must be a list of objects");
        check_error(r#"{"messages":[{"role":"user","content":"a"}]}"#, "line 1: 1 messages");
        check_error(r#"{"id":null,"prompt":"a"}"#, "line 1: `id` must be");
        check_error(r#"{"seed":1,"prompt":"a"}"#, "line 1: the key `seed` is one that the output has");
        let error = read_lines(&b"{\"prompt\":\"\xff\"}"[..], 1, encode).unwrap_err();
        assert!(error.starts_with("line 1: invalid utf-8"), "{error}");
    }

    #[test]
    fn ids_are_unique_and_a_string_is_not_a_number() {
        let row = |id: &str| format!("{{\"id\":{id},\"prompt\":\"a\"}}\n");
        assert_eq!(rows(&(row("1") + &row("\"1\""))).len(), 2);
        check_error(
            &(row("\"k\"") + "\n" + &row("7") + &row("\"k\"")),
            "line 4: the id \"k\" is that of line 1 already",
        );
        check_error(&(row("1") + "{\"prompt\":\"no id\"}"), "line 2: the id 1 is that of line 1 already");
    }
}
