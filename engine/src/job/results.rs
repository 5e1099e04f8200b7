//! What a job's journal and output hold, for those who look from outside, whether the run goes on or has ended.

use std::collections::BTreeMap;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use serde::Serialize;
use sha2::{Digest, Sha256};

use super::archive::{Archive, newest_header};
use super::record::hex;
use super::run::Job;
use super::{JobError, JobFile, JobProgress, lines, output, parquet_file};

/// Bytes at the end of a text in which repetition is looked for.
const REPETITIVE: usize = 200;

/// The rows of a job that are done so far.
pub struct Results {
    archive: Archive,
    output: PathBuf,
}

/// What is known about the rows of a job.
#[derive(Clone, Debug, Serialize)]
pub struct Stats {
    pub rows: JobProgress,
    pub rows_missing: u64,
    /// Attempts that wrote to the journal.
    pub attempts: u32,
    /// Records that were damaged on the disk; their rows are generated again.
    pub records_damaged: u64,
    /// Rows of which there is more than one record: in flight at a crash.
    pub rows_repeated: u64,
    /// Rows whose text ends in the same few characters again and again.
    pub rows_repetitive: u64,
    /// How many rows ended for which reason; of failed ones, the error's code.
    pub endings: BTreeMap<String, u64>,
}

/// Whether the output is what the journal says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub output: PathBuf,
    /// Every row is in the journal.
    pub complete: bool,
    /// The output has each row once, in input order, with the bytes of the journal.
    pub output_matches: bool,
    /// What is wrong with the output.
    pub problem: Option<String>,
    /// SHA-256 of the lines that the journal has.
    pub sha256: String,
}

impl Results {
    /// Reads the journals, one a replica, of the job's first `limit` rows. Relative paths are relative to `dir`.
    ///
    /// # Errors
    /// The input or the journal cannot be read, or nothing was journaled yet.
    pub fn read(file: &JobFile, dir: &Path, limit: Option<u64>, journals: &[PathBuf]) -> Result<Self, JobError> {
        let header = journals.iter().find_map(|journal| newest_header(journal).transpose()).transpose()?;
        let header = header.ok_or_else(|| JobError::Output {
            path: journals.first().cloned().unwrap_or_default(),
            source: io::Error::new(io::ErrorKind::NotFound, "no attempt has begun its journal yet"),
        })?;
        let job = Job::scan(file, dir, limit, None)?;
        Ok(Self { archive: Archive::read(journals, &job.keys(&header.settings))?, output: job.output })
    }

    pub fn stats(&self) -> Result<Stats, JobError> {
        let mut endings = BTreeMap::new();
        let mut rows_repetitive = 0;
        self.each_line(|line| {
            rows_repetitive += u64::from(line["response"].as_str().is_some_and(is_repetitive));
            let text = |pointer| Some(line.pointer(pointer)?.as_str()?.to_owned());
            let ending = text("/error/code").or_else(|| text("/finish_reason")).unwrap_or_else(|| "scored".into());
            *endings.entry(ending).or_default() += 1;
            Ok(())
        })?;
        let rows = self.archive.progress;
        Ok(Stats {
            rows,
            rows_missing: rows.rows_total - rows.rows_done,
            attempts: self.archive.attempts,
            records_damaged: self.archive.damage.damaged,
            rows_repeated: self.archive.repeated,
            rows_repetitive,
            endings,
        })
    }

    /// Hands out the lines of rows that failed, in the order of the input.
    pub fn failed(&self, mut take: impl FnMut(&serde_json::Value) -> io::Result<()>) -> Result<(), JobError> {
        self.each_line(|line| if line.get("error").is_some() { take(line) } else { Ok(()) })
    }

    fn each_line(&self, mut take: impl FnMut(&serde_json::Value) -> io::Result<()>) -> Result<(), JobError> {
        let read = output::lines(&self.archive, |line| take(&serde_json::from_str(line)?));
        read.map_err(|source| JobError::Output { path: "the journal".into(), source })
    }

    /// Compares the output with the journal, byte for byte; of a Parquet file, its rows as lines of JSON.
    pub fn verify(&self) -> Result<Verified, JobError> {
        let mut problem = None;
        let mut output = match lines::open(&self.output) {
            Ok(file) => Some(file),
            Err(error) => {
                problem = Some(error.to_string());
                None
            }
        };
        let (mut number, mut bytes) = (0, Vec::new());
        let sha256 = self.expected(|line| {
            number += 1;
            if let Some(file) = output.as_mut().filter(|_| problem.is_none()) {
                bytes.clear();
                file.read_until(b'\n', &mut bytes)?;
                if bytes.strip_suffix(b"\n") != Some(line) {
                    problem = Some(format!("line {number} is not the one that the journal has"));
                }
            }
            Ok(())
        });
        let sha256 = sha256.map_err(|source| JobError::Output { path: self.output.clone(), source })?;
        if let (Some(file), None) = (&mut output, &problem) {
            let more = file.fill_buf().map_err(|source| JobError::Output { path: self.output.clone(), source })?;
            if !more.is_empty() {
                problem = Some(format!("it goes on after line {number}"));
            }
        }
        Ok(Verified {
            output: self.output.clone(),
            complete: self.archive.progress.rows_done == self.archive.progress.rows_total,
            output_matches: problem.is_none(),
            problem,
            sha256,
        })
    }

    /// Hands out the lines that the output should give back. The SHA-256 of those that the journal has.
    fn expected(&self, mut take: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<String> {
        let mut hash = Sha256::new();
        let mut hash_line = |line: &str| hash.update(format!("{line}\n"));
        // With the columns that it has; where there is none, nothing is compared.
        let table = Some(&self.output).filter(|path| lines::is_parquet(path) && path.exists());
        let columns = table.map(|path| parquet_file::columns(path)).transpose().map_err(io::Error::other)?;
        let Some(columns) = columns else {
            output::lines(&self.archive, |line| {
                hash_line(line);
                take(line.as_bytes())
            })?;
            return Ok(hex(&hash.finalize()));
        };
        let mut bytes = Vec::new();
        let mut batches = parquet_file::Batches::new(&columns, |batch| {
            bytes.clear();
            parquet_file::write_lines(&batch, &mut bytes)?;
            bytes.split_inclusive(|&byte| byte == b'\n').try_for_each(|line| take(line.trim_ascii_end()))
        })?;
        output::lines(&self.archive, |line| {
            hash_line(line);
            writeln!(batches, "{line}")
        })?;
        batches.finish()?;
        Ok(hex(&hash.finalize()))
    }
}

/// The last [`REPETITIVE`] bytes are one text of a quarter of them at most, again and again.
fn is_repetitive(text: &str) -> bool {
    let Some(tail) = text.len().checked_sub(REPETITIVE).map(|begin| &text.as_bytes()[begin..]) else { return false };
    (1..=REPETITIVE / 4).any(|period| tail[period..] == tail[..REPETITIVE - period])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repetition_is_told_from_verse() {
        assert!(is_repetitive(&format!("Once upon a time{}", " and then".repeat(40))));
        assert!(is_repetitive(&"é".repeat(REPETITIVE)));
        assert!(!is_repetitive(&"ha".repeat(REPETITIVE / 4)));
        let numbers: String = (0..100).map(|number| format!("{number} bottles, ")).collect();
        assert!(!is_repetitive(&numbers));
    }
}
