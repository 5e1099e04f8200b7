//! The rows of a job, read one after another: however many there are, one is in memory at a time.

use std::io::{self, BufRead};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_schema::SchemaRef;
use serde_json::{Map, Value, json};
use sha2::{Digest, Sha256};

use crate::tokenizer::Tokenizer;

use super::prompt::Prompting;
use super::{Input, JobError, lines, parquet_file};

/// One prompt of the job.
#[derive(Debug, PartialEq)]
pub(super) struct InputRow {
    /// A string or a number; unique in the job.
    pub(super) id: Value,
    /// As the model shall see it.
    pub(super) prompt: Vec<u32>,
    /// All other keys of the row, in their order.
    pub(super) carried: Map<String, Value>,
}

/// A row as the input has it.
#[derive(Debug, PartialEq)]
pub(super) struct RawRow {
    /// Counted from 1; of other inputs than files of lines, the row's number.
    pub(super) line: usize,
    pub(super) id: Value,
    /// All other keys, in their order.
    pub(super) columns: Map<String, Value>,
    /// Of the row as the input has it, and of its id.
    pub(super) digest: [u8; 32],
}

/// Where a job's rows come from.
#[derive(Clone, Debug)]
pub(super) enum Source {
    /// Absolute, or relative to where the process is.
    File(PathBuf),
    Prompts(Vec<String>),
}

impl Source {
    pub(super) fn of(input: &Input, dir: &Path) -> Result<Self, JobError> {
        match (&input.path, &input.prompts) {
            (Some(path), None) => Ok(Self::File(dir.join(path))),
            (None, Some(prompts)) => Ok(Self::Prompts(prompts.clone())),
            _ => Err(JobError::Input {
                path: "input".into(),
                reason: "exactly one of `path` and `prompts` is needed".into(),
            }),
        }
    }

    pub(super) fn file(&self) -> Option<&Path> {
        match self {
            Self::File(path) => Some(path),
            Self::Prompts(_) => None,
        }
    }

    /// The input's columns, if it is a file that says what they are.
    pub(super) fn columns(&self) -> Result<Option<SchemaRef>, JobError> {
        let file = self.file().filter(|path| lines::is_parquet(path));
        file.map(parquet_file::columns).transpose().map_err(|reason| self.error(reason))
    }

    pub(super) fn error(&self, reason: String) -> JobError {
        JobError::Input { path: self.file().unwrap_or(Path::new("input.prompts")).to_owned(), reason }
    }

    pub(super) fn rows(&self) -> Result<Rows<'_>, JobError> {
        let reader = match self {
            Self::File(path) => Reader::File(lines::open(path).map_err(|error| self.error(error.to_string()))?),
            Self::Prompts(prompts) => Reader::Prompts(prompts),
        };
        Ok(Rows { source: self, reader, line: 0, index: 0, bytes: Vec::new() })
    }
}

enum Reader<'a> {
    File(Box<dyn BufRead + Send>),
    Prompts(&'a [String]),
}

/// The rows from the first one on.
pub(super) struct Rows<'a> {
    source: &'a Source,
    reader: Reader<'a>,
    line: usize,
    /// Of the next row.
    index: usize,
    bytes: Vec<u8>,
}

impl Rows<'_> {
    pub(super) fn index(&self) -> usize {
        self.index
    }

    /// Parses the next row; `None` after the last one.
    pub(super) fn next(&mut self) -> Result<Option<RawRow>, JobError> {
        if !self.advance()? {
            return Ok(None);
        }
        let index = self.index - 1;
        let row = match &self.reader {
            Reader::File(_) => parse(self.text()?, index),
            Reader::Prompts(prompts) => Ok(inline(index, &prompts[index])),
        };
        row.map(|row| Some(RawRow { line: self.line, ..row })).map_err(|reason| self.error(&reason))
    }

    /// Goes past the next row without parsing it; false after the last one.
    pub(super) fn advance(&mut self) -> Result<bool, JobError> {
        loop {
            self.line += 1;
            match &mut self.reader {
                Reader::Prompts(prompts) => {
                    self.index += 1;
                    return Ok(self.index <= prompts.len());
                }
                Reader::File(file) => {
                    self.bytes.clear();
                    let read = file.read_until(b'\n', &mut self.bytes);
                    if read.map_err(|error: io::Error| self.error(&error.to_string()))? == 0 {
                        return Ok(false);
                    }
                    if !self.text()?.trim().is_empty() {
                        self.index += 1;
                        return Ok(true);
                    }
                }
            }
        }
    }

    fn text(&self) -> Result<&str, JobError> {
        let text = std::str::from_utf8(&self.bytes).map_err(|error| self.error(&error.to_string()))?;
        // Editors of some systems mark the start of a file as UTF-8.
        Ok(if self.line == 1 { text.trim_start_matches('\u{feff}') } else { text })
    }

    /// With the line that was read last.
    pub(super) fn error(&self, reason: &str) -> JobError {
        let what = match self.source.file() {
            None => "prompt",
            Some(path) if lines::is_parquet(path) => "row",
            Some(_) => "line",
        };
        self.source.error(format!("{what} {}: {reason}", self.line))
    }
}

fn digest(id: &Value, text: &str) -> [u8; 32] {
    Sha256::new().chain_update(id.to_string()).chain_update([0]).chain_update(text.trim()).finalize().into()
}

fn inline(index: usize, prompt: &str) -> RawRow {
    let id = Value::from(index);
    let mut columns = Map::new();
    columns.insert("prompt".into(), json!(prompt));
    RawRow { line: 0, digest: digest(&id, prompt), id, columns }
}

fn parse(line: &str, index: usize) -> Result<RawRow, String> {
    let value: Value = serde_json::from_str(line).map_err(|error| {
        // The position that the message ends with is within this line only.
        let message = error.to_string();
        format!("column {}: {}", error.column(), message.split(" at line ").next().unwrap_or_default())
    })?;
    let Value::Object(mut columns) = value else { return Err("a row must be a JSON object".into()) };
    let id = columns.shift_remove("id").unwrap_or(index.into());
    if !id.is_string() && !id.is_number() {
        return Err("`id` must be a string or a number".into());
    }
    Ok(RawRow { line: 0, digest: digest(&id, line), id, columns })
}

/// Rows by their number, for somebody who asks for them about in their order.
pub(super) struct Feed<'a> {
    source: &'a Source,
    prompting: &'a Prompting,
    tokenizer: &'a Tokenizer,
    digests: &'a [[u8; 32]],
    rows: Option<Rows<'a>>,
    last: Option<(usize, Arc<InputRow>)>,
}

impl<'a> Feed<'a> {
    /// `digests` are those of the rows when they were checked.
    pub(super) fn new(
        source: &'a Source,
        prompting: &'a Prompting,
        tokenizer: &'a Tokenizer,
        digests: &'a [[u8; 32]],
    ) -> Self {
        Self { source, prompting, tokenizer, digests, rows: None, last: None }
    }

    /// # Errors
    /// The input cannot be read any more, or is not what was checked.
    pub(super) fn row(&mut self, index: usize) -> Result<Arc<InputRow>, JobError> {
        if let Some((_, row)) = self.last.as_ref().filter(|(last, _)| *last == index) {
            return Ok(Arc::clone(row));
        }
        let mut rows = match self.rows.take().filter(|rows| rows.index() <= index) {
            Some(rows) => rows,
            None => self.source.rows()?,
        };
        let changed = JobError::Changed { what: "the input" };
        while rows.index() < index {
            if !rows.advance()? {
                return Err(changed);
            }
        }
        let raw = rows.next()?.filter(|raw| raw.digest == self.digests[index]).ok_or(changed)?;
        let RawRow { id, mut columns, .. } = raw;
        let prompt = self.prompting.encode(self.tokenizer, &mut columns).map_err(|reason| rows.error(&reason))?;
        let row = Arc::new(InputRow { id, prompt, carried: columns });
        self.rows = Some(rows);
        self.last = Some((index, Arc::clone(&row)));
        Ok(row)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn rows(bytes: &[u8]) -> Result<Vec<RawRow>, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("in.jsonl");
        std::fs::write(&path, bytes).unwrap();
        let source = Source::File(path);
        let mut rows = source.rows().unwrap();
        let mut all = Vec::new();
        while let Some(row) = rows.next().map_err(|error| error.to_string())? {
            all.push(row);
        }
        Ok(all)
    }

    #[test]
    fn rows_keep_their_keys_in_order_and_blank_lines_are_skipped() {
        let text = concat!(
            "\u{feff}{\"z\":1.5,\"prompt\":\"a\",\"b\":{\"y\":null,\"x\":[]},\"a\":\"\"}\n",
            "  \r\n",
            "{\"id\":\"k\",\"prompt\":\"b\"}\r\n",
            "{\"prompt\":\"c\"}",
        );
        let rows = rows(text.as_bytes()).unwrap();
        assert_eq!(rows.iter().map(|row| row.id.clone()).collect::<Vec<_>>(), [json!(0), json!("k"), json!(2)]);
        assert_eq!(rows.iter().map(|row| row.line).collect::<Vec<_>>(), [1, 3, 4]);
        let columns = Value::from(rows[0].columns.clone()).to_string();
        assert_eq!(columns, r#"{"z":1.5,"prompt":"a","b":{"y":null,"x":[]},"a":""}"#);
    }

    #[test]
    fn bad_rows_are_named_by_line() {
        for (text, expected) in [
            (&b"{\"prompt\":\"a\"}\n\n{\"prompt\": a}\n"[..], "line 3: column 12: expected value"),
            (b"[1]", "line 1: a row must be a JSON object"),
            (br#"{"id":null,"prompt":"a"}"#, "line 1: `id` must be"),
            (b"{\"prompt\":\"\xff\"}", "line 1: invalid utf-8"),
        ] {
            let error = rows(text).unwrap_err();
            assert!(error.contains(&format!("in.jsonl: {expected}")), "{error}");
        }
    }
}
