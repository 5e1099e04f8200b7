//! Rows of a job through the engine.

use std::path::{Path, PathBuf};
use std::pin::pin;

use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::chat::ChatTemplate;
use crate::end_strings;
use crate::engine::{Engine, Row};
use crate::error_chain::error_chain;
use crate::request::{Event, FinishReason, LogprobSpec, Request, RowError, Sampling, Stopping};
use crate::tokenizer::{Detokenizer, Tokenizer};

use super::input::{self, Encoder, InputRow};
use super::output::OrderedOutput;
use super::{ContextOverflow, Generation, JobError, JobFile, JobProgress, JobSampling};

/// Rows that the engine has at a time: more than it can run, so that it always finds one to admit.
const MAX_IN_FLIGHT: usize = 512;

/// Rows between the first that is not done and the last that was begun: what one long row can make us hold.
const MAX_AHEAD: usize = 8192;

/// A job file whose input is read and tokenised.
pub struct Job {
    rows: Vec<InputRow>,
    sampling: JobSampling,
    generation: Generation,
    input: Option<PathBuf>,
    output: PathBuf,
}

/// What a job would take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct JobMeasure {
    /// Samples of all prompts.
    pub rows: u64,
    /// Rows that do not fit the context and would fail.
    pub rejected: u64,
    /// Of the rows that would run.
    pub prompt_tokens: u64,
    pub longest_prompt: u64,
    /// New tokens of all rows if none stops early.
    pub max_new_tokens: u64,
}

impl Job {
    /// Reads the first `limit` rows. Relative paths are relative to `dir`.
    ///
    /// # Errors
    /// The input or the template cannot be read, or a row is not as it must be.
    pub fn load(file: &JobFile, dir: &Path, limit: Option<u64>, tokenizer: &Tokenizer) -> Result<Self, JobError> {
        let template = file.prompt.template.as_str();
        let chat = match template {
            "raw" => None,
            // A built-in template's name has neither a directory nor an extension.
            path if path.contains(['/', '.']) => {
                let path = dir.join(path);
                let source = std::fs::read_to_string(&path)
                    .map_err(|error| JobError::Input { path: path.clone(), reason: error.to_string() })?;
                Some(ChatTemplate::from_source(&source, template))
            }
            name => Some(ChatTemplate::builtin(name)),
        };
        let chat = chat
            .transpose()
            .map_err(|error| JobError::Input { path: "prompt.template".into(), reason: error_chain(&error) })?;
        let encoder = Encoder { tokenizer, chat: chat.as_ref(), system: &file.prompt.system };
        Ok(Self {
            rows: input::read(file, dir, limit, &encoder)?,
            sampling: file.sampling.clone(),
            generation: file.generation.clone(),
            input: file.input.path.as_ref().map(|path| dir.join(path)),
            output: dir.join(&file.output.path),
        })
    }

    /// Counts rows and tokens without generating any. `context` is what prompt and completion may have together.
    pub fn measure(&self, context: usize) -> JobMeasure {
        let samples = u64::from(self.generation.samples_per_prompt);
        let mut measure = JobMeasure { rows: self.rows.len() as u64 * samples, ..JobMeasure::default() };
        for row in &self.rows {
            match self.fit(row.prompt.len(), context) {
                Ok((prompt_len, max_new_tokens)) => {
                    measure.prompt_tokens += samples * prompt_len as u64;
                    measure.longest_prompt = measure.longest_prompt.max(prompt_len as u64);
                    measure.max_new_tokens += samples * u64::from(max_new_tokens);
                }
                Err(_) => measure.rejected += samples,
            }
        }
        measure
    }

    /// Generates all rows and writes the output file; `progress` hears of each row that is done.
    ///
    /// # Errors
    /// The output cannot be written, more rows failed than may, the engine failed, or `stop` resolved first. Only in the second case is there
    /// an output file; otherwise what was there stays as it was, and a `.partial` file beside it has the rows up to the first that is missing.
    pub async fn run(
        &self,
        engine: &Engine,
        tokenizer: &Tokenizer,
        progress: &(dyn Fn(JobProgress) + Send + Sync),
        stop: impl Future<Output = ()> + Send,
    ) -> Result<JobProgress, JobError> {
        let mut stop = pin!(stop);
        let mut output = OrderedOutput::create(self.output.clone(), self.input.as_deref())?;
        let info = engine.info();
        let eos = end_strings::eos_id(info, tokenizer);
        let sampling = &self.sampling;
        let stopping = end_strings::stopping(
            tokenizer,
            eos,
            &sampling.end_strings,
            sampling.tokens_to_generate,
            sampling.min_tokens_to_generate,
        );
        let samples = self.generation.samples_per_prompt as usize;
        let total = self.rows.len() * samples;
        let mut done = JobProgress { rows_total: total as u64, ..JobProgress::default() };
        progress(done);
        let mut in_flight = FuturesUnordered::new();
        let mut next = 0;
        let mut first_failure = None;
        while output.num_written() < total {
            while next < total && in_flight.len() < MAX_IN_FLIGHT && next - output.num_written() < MAX_AHEAD {
                let (index, row, sample) = (next, &self.rows[next / samples], (next % samples) as u32);
                let submitted = self.submit(engine, &stopping, row, sample);
                in_flight.push(async move { (index, collect(submitted).await) });
                next += 1;
            }
            let (index, result) = tokio::select! {
                biased;
                () = &mut stop => return Err(JobError::Stopped),
                Some(finished) = in_flight.next() => finished,
            };
            let (row, sample) = (&self.rows[index / samples], (index % samples) as u32);
            let result = match result {
                Err(RowError::EngineFailed(reason)) => return Err(JobError::Engine(reason)),
                Err(RowError::ShuttingDown) => return Err(JobError::Stopped),
                result => result.map(|completed| completed.outcome(tokenizer, &stopping)),
            };
            done.rows_done += 1;
            match &result {
                Ok(outcome) => {
                    done.prompt_tokens += outcome.prompt_tokens as u64;
                    done.completion_tokens += outcome.completion_tokens as u64;
                }
                Err(error) => {
                    done.rows_failed += 1;
                    first_failure.get_or_insert_with(|| error.clone());
                }
            }
            output.put(index, output_line(row, sample, self.seed(row, sample), result))?;
            progress(done);
        }
        output.finish()?;
        let allowed = (self.generation.max_failed * total as f64).floor() as u64;
        if let Some(first) = first_failure.filter(|_| done.rows_failed > allowed) {
            return Err(JobError::TooManyFailed { failed: done.rows_failed, total: total as u64, allowed, first });
        }
        Ok(done)
    }

    fn submit(
        &self,
        engine: &Engine,
        stopping: &Stopping,
        row: &InputRow,
        sample: u32,
    ) -> Result<(Vec<u32>, Row), RowError> {
        let info = engine.info();
        let (prompt_len, max_new_tokens) = self.fit(row.prompt.len(), info.max_context.min(info.kv_tokens))?;
        let prompt = row.prompt[row.prompt.len() - prompt_len..].to_vec();
        let sampling = &self.sampling;
        let request = Request {
            prompt: prompt.clone(),
            sampling: Sampling {
                greedy: sampling.greedy,
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                repetition_penalty: sampling.repetition_penalty,
                seed: self.seed(row, sample),
                sample,
                ..Sampling::default()
            },
            stopping: Stopping { max_new_tokens, ..stopping.clone() },
            logprobs: LogprobSpec::default(),
        };
        Ok((prompt, engine.submit(request)?))
    }

    /// How many tokens of a prompt's end, and how many new ones, go into the context together.
    fn fit(&self, prompt_len: usize, context: usize) -> Result<(usize, u32), RowError> {
        let new = self.sampling.tokens_to_generate;
        let needed = prompt_len.saturating_add(new as usize);
        let left = context.saturating_sub(prompt_len);
        match self.generation.context_overflow {
            _ if needed <= context => Ok((prompt_len, new)),
            ContextOverflow::TruncateLeft if (new as usize) < context => Ok((context - new as usize, new)),
            // Less than `new`, so it fits.
            ContextOverflow::ShortenGeneration if left > 0 => Ok((prompt_len, left as u32)),
            _ => Err(RowError::TooLong { needed, limit: context }),
        }
    }

    /// What a row's random numbers come from: the job's seed, the row's id and the sample alone. Below 2^53, so that every JSON reader
    /// takes it exactly.
    fn seed(&self, row: &InputRow, sample: u32) -> u64 {
        let key = json!([self.sampling.random_seed, row.id, sample]).to_string();
        let digest = Sha256::digest(key.as_bytes());
        digest[..8].iter().fold(0, |seed, &byte| seed << 8 | u64::from(byte)) >> 11
    }
}

/// A row that was generated.
struct Completed {
    prompt: Vec<u32>,
    new_ids: Vec<u32>,
    reason: FinishReason,
}

async fn collect(submitted: Result<(Vec<u32>, Row), RowError>) -> Result<Completed, RowError> {
    let (prompt, mut row) = submitted?;
    let mut new_ids = Vec::new();
    while let Some(event) = row.events.recv().await {
        match event {
            Event::Prompt(_) => {}
            Event::Token { id, .. } => new_ids.push(id),
            Event::Finished(finish) => return Ok(Completed { prompt, new_ids, reason: finish.reason }),
            Event::Failed(error) => return Err(error),
        }
    }
    Err(RowError::EngineFailed("it dropped the row".into()))
}

/// What a line of the output says about a row.
#[derive(Default)]
struct Outcome {
    response: String,
    /// `None` for a failed row.
    reason: Option<FinishReason>,
    prompt_tokens: usize,
    completion_tokens: usize,
}

fn output_line(row: &InputRow, sample: u32, seed: u64, result: Result<Outcome, RowError>) -> String {
    let (outcome, error) = match result {
        Ok(outcome) => (outcome, None),
        Err(error) => (Outcome::default(), Some(json!({"code": error_code(&error), "message": error.to_string()}))),
    };
    let mut line = json!({
        "id": row.id,
        "sample": sample,
        "response": outcome.response,
        "finish_reason": outcome.reason.map_or(json!("error"), |reason| json!(reason)),
        "prompt_tokens": outcome.prompt_tokens,
        "completion_tokens": outcome.completion_tokens,
        "seed": seed,
    });
    if let Some(error) = error {
        line["error"] = error;
    }
    for (key, value) in &row.carried {
        line[key] = value.clone();
    }
    line.to_string()
}

fn error_code(error: &RowError) -> &'static str {
    match error {
        RowError::EmptyPrompt => "empty_prompt",
        RowError::UnknownToken { .. } => "unknown_token",
        RowError::TooLong { .. } | RowError::KvTooSmall { .. } => "context_overflow",
        RowError::NotFinite => "not_finite",
        RowError::ShuttingDown | RowError::EngineFailed(_) => "engine",
    }
}

impl Completed {
    fn outcome(&self, tokenizer: &Tokenizer, stopping: &Stopping) -> Outcome {
        Outcome {
            response: self.response(tokenizer, stopping),
            reason: Some(self.reason),
            prompt_tokens: self.prompt.len(),
            completion_tokens: self.new_ids.len(),
        }
    }

    /// The new text without what ended it.
    fn response(&self, tokenizer: &Tokenizer, stopping: &Stopping) -> String {
        let stopped = self.reason == FinishReason::Stop;
        let by_id = |id: &u32| stopped && (stopping.eos_ids.contains(id) || stopping.stop_ids.contains(id));
        let (ids, by_id) = match self.new_ids.split_last() {
            Some((last, rest)) if by_id(last) => (rest, true),
            _ => (self.new_ids.as_slice(), false),
        };
        let mut text = String::new();
        let mut detokenizer = Detokenizer::new(tokenizer, &self.prompt);
        ids.iter().for_each(|&id| detokenizer.push(id, &mut text));
        detokenizer.finish(&mut text);
        if stopped && !by_id {
            let prompt = tokenizer.decode(&self.prompt);
            text.truncate(len_before_end_string(&prompt, &text, &stopping.stop_strings));
        }
        text
    }
}

/// Bytes of `text` before the longest end string that prompt and text end with; it may begin in the prompt.
fn len_before_end_string(prompt: &str, text: &str, end_strings: &[String]) -> usize {
    let len = |end: &String| match text.strip_suffix(end.as_str()) {
        Some(rest) => Some(rest.len()),
        None => end.strip_suffix(text).filter(|head| prompt.ends_with(head)).map(|_| 0),
    };
    end_strings.iter().filter_map(len).min().unwrap_or(text.len())
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use serde_json::{Map, Value};

    use super::*;

    fn job(tokens_to_generate: u32, context_overflow: ContextOverflow) -> Job {
        Job {
            rows: Vec::new(),
            sampling: JobSampling { tokens_to_generate, ..JobSampling::default() },
            generation: Generation { context_overflow, ..Generation::default() },
            input: None,
            output: PathBuf::new(),
        }
    }

    #[test]
    fn rows_beyond_the_context_are_treated_as_the_job_says() {
        let fit = |new, overflow| job(new, overflow).fit(4, 6);
        let too_long = |needed| Err(RowError::TooLong { needed, limit: 6 });
        assert_eq!(fit(2, ContextOverflow::Reject), Ok((4, 2)));
        assert_eq!(fit(3, ContextOverflow::Reject), too_long(7));
        assert_eq!(fit(3, ContextOverflow::TruncateLeft), Ok((3, 3)));
        assert_eq!(fit(5, ContextOverflow::TruncateLeft), Ok((1, 5)));
        assert_eq!(fit(6, ContextOverflow::TruncateLeft), too_long(10));
        assert_eq!(fit(3, ContextOverflow::ShortenGeneration), Ok((4, 2)));
        let full = job(1, ContextOverflow::ShortenGeneration).fit(6, 6);
        assert_eq!(full, too_long(7));
    }

    #[test]
    fn seeds_depend_on_job_seed_id_and_sample_only() {
        let job = job(1, ContextOverflow::Reject);
        let row = |id: Value, prompt: u32| InputRow { id, prompt: vec![prompt], carried: Map::new() };
        let seed = job.seed(&row(json!("a"), 1), 0);
        assert_eq!(seed, job.seed(&row(json!("a"), 2), 0));
        assert!(seed < 1 << 53);
        let others = [job.seed(&row(json!("a"), 1), 1), job.seed(&row(json!("b"), 1), 0)];
        assert!(!others.contains(&seed));
        assert_ne!(job.seed(&row(json!(1), 1), 0), job.seed(&row(json!("1"), 1), 0));
    }

    #[test]
    fn the_longest_end_string_is_cut_even_if_it_began_in_the_prompt() {
        let ends: Vec<String> = ["", "\n", "User\n", "Human:"].map(String::from).to_vec();
        for (prompt, text, left) in [
            ("p", "hello User\n", "hello "),
            ("p", "hello\n", "hello"),
            ("p", "hello", "hello"),
            ("Hum", "an:", ""),
            ("p", "an:", "an:"),
        ] {
            assert_eq!(&text[..len_before_end_string(prompt, text, &ends)], left, "{prompt}|{text}");
        }
    }

    #[test]
    fn failed_rows_have_a_line_with_code_and_carried_keys() {
        let carried = json!({"topic": "sea", "n": 1}).as_object().unwrap().clone();
        let row = InputRow { id: json!("k"), prompt: Vec::new(), carried };
        let line = output_line(&row, 1, 9, Err(RowError::TooLong { needed: 7, limit: 6 }));
        assert_eq!(
            line,
            r#"{"id":"k","sample":1,"response":"","finish_reason":"error","prompt_tokens":0,"completion_tokens":0,"seed":9,"error":{"code":"context_overflow","message":"7 tokens (prompt and new ones) exceed the context of 6"},"topic":"sea","n":1}"#
        );
    }
}
