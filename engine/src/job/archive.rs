//! What the journal's files hold together: the rows that are done, wherever their lines are, and what was in flight when an attempt ended.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use super::frame::{self, Damage};
use super::record::{Counts, Done, Header, Key, Record};
use super::{JobError, JobProgress};

/// Where a record lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    /// Index into the archive's files.
    pub(super) file: u32,
    pub(super) offset: u64,
}

/// The journal of all attempts, as a list of places: the lines stay on the disk.
#[derive(Debug)]
pub(super) struct Archive {
    pub(super) files: Vec<File>,
    /// One entry a row.
    pub(super) places: Vec<Option<Place>>,
    /// Rows that are done, and their tokens.
    pub(super) progress: JobProgress,
    /// Of the newest attempt that has a sound one.
    pub(super) header: Option<Header>,
    pub(super) attempts: u32,
    pub(super) damage: Damage,
    /// Of all files.
    pub(super) bytes: u64,
    /// Of the records that rows have their lines from.
    pub(super) bytes_needed: u64,
    /// Records of rows that were done already: generated again because they were in flight at a crash.
    pub(super) repeated: u64,
    /// Rows begun and not done, by attempt; of the last journal that was read.
    pub(super) in_flight: HashMap<u32, HashSet<Key>>,
}

impl Archive {
    /// Reads the journals in `dirs` of `keys.len()` rows.
    ///
    /// # Errors
    /// A file cannot be read. Damage inside of files is no error: its rows are not done.
    pub(super) fn read(dirs: &[PathBuf], keys: &[Key]) -> Result<Self, JobError> {
        let rows: HashMap<Key, usize> = keys.iter().enumerate().map(|(row, key)| (*key, row)).collect();
        let mut archive = Self {
            files: Vec::new(),
            places: vec![None; keys.len()],
            progress: JobProgress { rows_total: keys.len() as u64, ..JobProgress::default() },
            header: None,
            attempts: 0,
            damage: Damage::default(),
            bytes: 0,
            bytes_needed: 0,
            repeated: 0,
            in_flight: HashMap::new(),
        };
        for dir in dirs {
            for (attempt, path) in list(dir)? {
                archive.read_file(attempt, &path, &rows).map_err(|source| JobError::Output { path, source })?;
            }
        }
        Ok(archive)
    }

    fn read_file(&mut self, attempt: u32, path: &Path, rows: &HashMap<Key, usize>) -> io::Result<()> {
        let file = File::open(path)?;
        let index = self.files.len() as u32;
        let mut begun = HashSet::new();
        self.bytes += file.metadata()?.len();
        let damage = frame::scan(&file, |offset, frame| {
            let len = frame.len();
            match Record::decode(frame) {
                Some(Record::Header(header)) => self.header = Some(header),
                Some(Record::Begun(key)) => _ = begun.insert(key),
                Some(Record::Done(done)) => {
                    begun.remove(&done.key);
                    // A row that has changed since has another key.
                    if let Some(&row) = rows.get(&done.key) {
                        match &mut self.places[row] {
                            Some(_) => self.repeated += 1,
                            place => {
                                *place = Some(Place { file: index, offset });
                                self.bytes_needed += len;
                                self.progress.count(done.counts);
                            }
                        }
                    }
                }
                None => {}
            }
        })?;
        self.files.push(file);
        self.in_flight.insert(attempt, begun);
        self.attempts += 1;
        self.damage.damaged += damage.damaged;
        self.damage.torn += damage.torn;
        Ok(())
    }

    /// What the record of a row says; it is checked again.
    pub(super) fn done(&self, place: Place) -> io::Result<Done> {
        let file =
            self.files.get(place.file as usize).ok_or_else(|| io::Error::other("no such file of the journal"))?;
        let frame = frame::read(&mut BufReader::new(At { file, offset: place.offset }))?;
        match frame.and_then(Record::decode) {
            Some(Record::Done(done)) => Ok(done),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "a record of the journal was damaged meanwhile")),
        }
    }
}

impl JobProgress {
    pub(super) fn count(&mut self, row: Counts) {
        self.rows_done += 1;
        self.rows_failed += u64::from(row.failed);
        self.prompt_tokens += u64::from(row.prompt_tokens);
        self.completion_tokens += u64::from(row.completion_tokens);
    }
}

/// Reads from an offset on without moving the file's own position.
struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl io::Read for At<'_> {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let read = self.file.read_at(bytes, self.offset)?;
        self.offset += read as u64;
        Ok(read)
    }
}

/// The file of an attempt.
pub(super) fn file_of(dir: &Path, attempt: u32) -> PathBuf {
    dir.join(format!("attempt-{attempt:03}"))
}

/// The files of all attempts, the oldest first.
pub(super) fn list(dir: &Path) -> Result<Vec<(u32, PathBuf)>, JobError> {
    let error = |source| JobError::Output { path: dir.to_owned(), source };
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(source) => return Err(error(source)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(error)?.path();
        let attempt = path.file_name().and_then(|name| name.to_str()?.strip_prefix("attempt-")?.parse().ok());
        files.extend(attempt.map(|attempt| (attempt, path)));
    }
    files.sort();
    Ok(files)
}

/// The header of the newest attempt that has a sound one at its beginning.
pub(super) fn newest_header(dir: &Path) -> Result<Option<Header>, JobError> {
    for (_, path) in list(dir)?.into_iter().rev() {
        let frame = File::open(&path).and_then(|file| frame::read(&mut BufReader::new(file)));
        let frame = frame.map_err(|source| JobError::Output { path, source })?;
        if let Some(Record::Header(header)) = frame.and_then(Record::decode) {
            return Ok(Some(header));
        }
    }
    Ok(None)
}
