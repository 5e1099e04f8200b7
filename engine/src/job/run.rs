//! A job that is read and tokenised, and the way from there to its output.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use arrow_schema::SchemaRef;
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::end_strings;
use crate::engine::{Engine, Row};
use crate::request::{LogprobSpec, Request, RowError, Sampling, Stopping};
use crate::reward;
use crate::tokenizer::Tokenizer;

use super::archive::Archive;
use super::columns::Columns;
use super::input::{Feed, InputRow, Source};
use super::journal::{Journal, JournalOptions};
use super::output;
use super::prompt::Prompting;
use super::queue::{Claim, Queue};
use super::record::{self, Header, Key, hex};
use super::work::{Finished, Work};
use super::{ContextOverflow, Generation, JobError, JobFile, JobProgress, JobSampling, lines};

/// A job file whose input was read, checked and tokenised. Of each row it keeps what the rest is told by, not the row.
pub struct Job {
    source: Source,
    prompting: Prompting,
    digests: Vec<[u8; 32]>,
    /// In tokens.
    pub(super) prompt_lens: Vec<u32>,
    pub(super) sampling: JobSampling,
    pub(super) generation: Generation,
    /// Rows are scored, not answered.
    pub(super) scores: bool,
    /// What, of the job file, determines rows.
    settings: String,
    pub(super) output: PathBuf,
    /// Of the output, if it is a Parquet file and rows were tokenised.
    columns: Option<SchemaRef>,
}

impl Job {
    /// Reads the first `limit` rows. Relative paths are relative to `dir`.
    ///
    /// # Errors
    /// The input or the template cannot be read, or a row is not as it must be.
    pub fn load(file: &JobFile, dir: &Path, limit: Option<u64>, tokenizer: &Tokenizer) -> Result<Self, JobError> {
        Self::scan(file, dir, limit, Some(tokenizer))
    }

    /// Without a tokenizer, what the model would see is left out.
    pub(super) fn scan(
        file: &JobFile,
        dir: &Path,
        limit: Option<u64>,
        tokenizer: Option<&Tokenizer>,
    ) -> Result<Self, JobError> {
        let prompting = if tokenizer.is_some() { Prompting::load(file, dir)? } else { Prompting::default() };
        let scores = file.reward.is_some();
        let sampling = match scores {
            // The token that the values come with.
            true => JobSampling { tokens_to_generate: 1, end_strings: Vec::new(), ..JobSampling::default() },
            false => file.sampling.clone(),
        };
        let overflow = file.generation.context_overflow;
        let settings = match scores {
            true => json!([prompting.source, "reward", overflow]),
            false => json!([prompting.source, sampling, overflow]),
        };
        let mut job = Self {
            source: Source::of(&file.input, dir)?,
            prompting,
            digests: Vec::new(),
            prompt_lens: Vec::new(),
            sampling,
            generation: file.generation.clone(),
            scores,
            settings: settings.to_string(),
            output: dir.join(&file.output.path),
            columns: None,
        };
        let table = job.source.columns()?;
        let mut columns = (tokenizer.is_some() && lines::is_parquet(&job.output)).then(|| Columns::new(table));
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        let mut rows = job.source.rows()?;
        // The line of each id, by its JSON form: the string "1" is not the number 1. Answers of one prompt have its id in common.
        let mut lines_of_ids = HashMap::new();
        while job.digests.len() < limit
            && let Some(mut row) = rows.next()?
        {
            let id = match row.columns.get("sample").filter(|_| scores) {
                Some(sample) => format!("{} of sample {sample}", row.id),
                None => row.id.to_string(),
            };
            let digest: [u8; 32] = Sha256::digest(&id).into();
            let short =
                [digest[..8].try_into(), digest[8..16].try_into()].map(|half| half.map_or(0, u64::from_le_bytes));
            if let Some(first) = lines_of_ids.insert(short, row.line) {
                return Err(rows.error(&format!("the id {id} is that of line {first} already")));
            }
            if let Some(tokenizer) = tokenizer {
                let prompt = job.prompting.encode(tokenizer, &mut row.columns).map_err(|reason| rows.error(&reason))?;
                job.prompt_lens.push(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
            }
            if let Some(columns) = &mut columns {
                let mut carried = row.columns.iter();
                let added = columns.add("id", &row.id);
                let added = added.and_then(|()| carried.try_for_each(|(column, value)| columns.add(column, value)));
                added.map_err(|reason| rows.error(&reason))?;
            }
            job.digests.push(row.digest);
        }
        if job.digests.is_empty() && limit > 0 {
            return Err(job.source.error("there is no row in it".into()));
        }
        let schema = columns.map(|columns| columns.schema(scores)).transpose();
        job.columns = schema.map_err(|reason| job.source.error(reason))?;
        Ok(job)
    }

    /// The first prompt, as the model would see it.
    ///
    /// # Errors
    /// The input is not what it was.
    pub fn first_prompt(&self, tokenizer: &Tokenizer) -> Result<String, JobError> {
        Ok(tokenizer.decode(&self.feed(tokenizer).row(0)?.prompt))
    }

    pub(super) fn feed<'a>(&'a self, tokenizer: &'a Tokenizer) -> Feed<'a> {
        Feed::new(&self.source, &self.prompting, tokenizer, &self.digests)
    }

    /// Takes over the journal of the job's run.
    ///
    /// # Errors
    /// See [`JobError`]: what the finished rows were made from has changed, another attempt writes, or the storage fails.
    pub fn open_journal(&self, options: JournalOptions) -> Result<Journal, JobError> {
        let replica = options.share.as_ref().map(|share| share.replica);
        output::check(&self.output, self.source.file(), replica)?;
        let settings = Sha256::new().chain_update(&options.model).chain_update([0]).chain_update(&self.settings);
        let settings = hex(&settings.finalize());
        let input = self.digests.iter().fold(Sha256::new(), |hash, row| hash.chain_update(row));
        let keys = self.keys(&settings);
        let header = Header {
            schema: 1,
            attempt: options.attempt,
            model: options.model.clone(),
            settings,
            input: hex(&input.finalize()),
            rows: keys.len() as u64,
        };
        Journal::open(options, &header, keys)
    }

    /// One a row of the output, in its order.
    pub(super) fn keys(&self, settings: &str) -> Vec<Key> {
        let samples = 0..self.generation.samples_per_prompt;
        let keys = |row| samples.clone().map(move |sample| record::key(settings, row, sample));
        self.digests.iter().flat_map(keys).collect()
    }

    /// Generates the rows that the journal does not have and writes the output file; `progress` hears how many are done for good.
    ///
    /// # Errors
    /// Storage failed for longer than the journal bears it, more rows failed than may, the engine failed, `deadline` came, or `stop` resolved
    /// first. The output file is there if all rows are, even when too many failed; otherwise what was there stays as it was.
    pub async fn run(
        &self,
        engine: &Engine,
        tokenizer: &Tokenizer,
        journal: Journal,
        deadline: Option<Instant>,
        progress: &(dyn Fn(JobProgress) + Send + Sync),
        stop: impl Future<Output = ()> + Send,
    ) -> Result<JobProgress, JobError> {
        let info = engine.info();
        let fits = |&len: &u32| self.fit(len as usize, info.max_context).ok();
        let needed = self.prompt_lens.iter().filter_map(fits).map(|(prompt, new)| prompt + new as usize).max();
        if let Some(needed) = needed.filter(|&needed| needed > info.kv_tokens) {
            // As an error of rows it would make the output depend on the machine's memory.
            return Err(JobError::KvTooSmall { needed, limit: info.kv_tokens });
        }
        let patience = journal.options.patience;
        let mut stop = std::pin::pin!(stop);
        let Finished { archive, progress: done, queue, keys } =
            Work::new(self, engine, tokenizer, journal, deadline, progress)?.run(&mut stop).await?;
        let paused = |paused| progress(JobProgress { paused, ..done });
        let finish = async {
            match queue {
                None => {
                    let write = || output::write(&self.output, self.columns.as_ref(), &archive, None);
                    output::patiently(patience, write, paused).await.map(|()| archive)
                }
                Some(queue) => self.finish_together(queue, &keys, patience, paused).await,
            }
        };
        let archive = tokio::select! {
            biased;
            () = &mut stop => return Err(JobError::Stopped),
            archive = finish => archive?,
        };
        let all = archive.progress;
        let allowed = (self.generation.max_failed * all.rows_total as f64).floor() as u64;
        if all.rows_failed > allowed {
            let first = output::first_failure(&archive).unwrap_or_default();
            return Err(JobError::TooManyFailed { failed: all.rows_failed, total: all.rows_total, allowed, first });
        }
        Ok(done)
    }

    /// All rows are in the journals of the replicas: one of them writes the output, the others wait for it.
    async fn finish_together(
        &self,
        mut queue: Queue,
        keys: &[Key],
        patience: Duration,
        paused: impl Fn(bool),
    ) -> Result<Archive, JobError> {
        let archive = Archive::read(queue.journals(), keys)?;
        let missing = archive.progress.rows_total - archive.progress.rows_done;
        if missing > 0 {
            let mut damaged = (0..keys.len()).filter(|&row| archive.places[row].is_none());
            let reopened = damaged.try_for_each(|row| queue.reopen(row));
            let text = format!("{missing} rows that were done are damaged in the journals and must be generated again");
            let source = reopened.err().unwrap_or_else(|| io::Error::other(text));
            return Err(JobError::Output { path: self.output.clone(), source });
        }
        loop {
            let pause = queue.interval();
            let mut turn = || -> io::Result<Option<Claim>> {
                queue.tend()?;
                if queue.is_output_written()? { Ok(None) } else { queue.output() }
            };
            match turn() {
                Ok(Some(claim)) => {
                    let write = || output::write(&self.output, self.columns.as_ref(), &archive, Some(queue.replica()));
                    output::patiently(patience, write, &paused).await?;
                    if claim.again {
                        let others = (0..queue.journals().len() as u32).filter(|&replica| replica != queue.replica());
                        others.for_each(|replica| output::remove_partial(&self.output, replica));
                    }
                    queue
                        .begin(claim.range, 0)
                        .map_err(|source| JobError::Output { path: self.output.clone(), source })?;
                }
                Ok(None) if queue.is_output_written().unwrap_or(false) => return Ok(archive),
                Ok(None) => tokio::time::sleep(pause).await,
                Err(error) => {
                    tracing::warn!(%error, "the queue of the replicas cannot be read for now");
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    pub(super) fn stopping(&self, engine: &Engine, tokenizer: &Tokenizer) -> Stopping {
        let sampling = &self.sampling;
        end_strings::stopping(
            tokenizer,
            end_strings::eos_id(engine.info(), tokenizer),
            &sampling.end_strings,
            sampling.tokens_to_generate,
            sampling.min_tokens_to_generate,
        )
    }

    /// The prompt as the model sees it, and the row in the engine.
    pub(super) fn submit(
        &self,
        engine: &Engine,
        stopping: &Stopping,
        row: &InputRow,
        sample: u32,
    ) -> Result<(Vec<u32>, Row), RowError> {
        let (prompt_len, max_new_tokens) = self.fit(row.prompt.len(), engine.info().max_context)?;
        let prompt = row.prompt[row.prompt.len() - prompt_len..].to_vec();
        if self.scores {
            return Ok((prompt.clone(), engine.submit(reward::request(prompt))?));
        }
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
    pub(super) fn fit(&self, prompt_len: usize, context: usize) -> Result<(usize, u32), RowError> {
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
    pub(super) fn seed(&self, row: &InputRow, sample: u32) -> u64 {
        let key = json!([self.sampling.random_seed, row.id, sample]).to_string();
        let digest = Sha256::digest(key.as_bytes());
        digest[..8].iter().fold(0, |seed, &byte| seed << 8 | u64::from(byte)) >> 11
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Map, Value};

    use super::*;

    fn job(tokens_to_generate: u32, context_overflow: ContextOverflow) -> Job {
        Job {
            source: Source::Prompts(Vec::new()),
            prompting: Prompting::default(),
            digests: Vec::new(),
            prompt_lens: vec![4, 6],
            sampling: JobSampling { tokens_to_generate, ..JobSampling::default() },
            generation: Generation { context_overflow, ..Generation::default() },
            scores: false,
            settings: String::new(),
            output: PathBuf::new(),
            columns: None,
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
    fn a_job_is_measured_by_its_policy() {
        let measure = job(1, ContextOverflow::TruncateLeft).measure(6);
        let counts = (measure.rows, measure.rejected, measure.truncated, measure.prompt_tokens, measure.longest_prompt);
        assert_eq!(counts, (2, 0, 1, 9, 6));
        assert_eq!(measure.prompt_lengths, [(4, 1), (8, 1)]);
        let measure = job(4, ContextOverflow::ShortenGeneration).measure(6);
        assert_eq!((measure.rejected, measure.shortened, measure.max_new_tokens), (1, 1, 2));
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
}
