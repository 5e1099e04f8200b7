//! The journal of a job: what is done survives whatever happens to the processes.
//!
//! Each attempt appends to a file of its own (`attempt-000`, …), so nothing is ever written behind a torn record. `fence` holds the number of
//! the newest attempt; a writer that finds a higher one there stops. `lock` is held while an attempt writes. A row counts as done when its
//! record is on the disk (`fdatasync`, for all records of up to [`COMMIT_INTERVAL`] together) and the fence was still ours after that. What the
//! files of earlier attempts hold for rows that are not the job's any more is taken out when it is the larger part ([`compact`]).

mod compact;

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

use super::JobError;
use super::archive::{Archive, Place, file_of};
use super::queue::{Queue, Share};
use super::record::{self, Counts, Done, Header, Key, Record};

/// Records that come within this time share one `fdatasync`.
const COMMIT_INTERVAL: Duration = Duration::from_millis(100);

/// For how long an older attempt on this host may hold the lock; it notices the fence within that time if it still writes.
const LOCK_PATIENCE: Duration = Duration::from_secs(10);

/// Between two tries after storage trouble, at first and at most.
const RETRY: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));

/// Where the journal of a run is, and who writes to it.
#[derive(Clone, Debug)]
pub struct JournalOptions {
    /// Made if it is not there.
    pub dir: PathBuf,
    pub attempt: u32,
    /// Go on although the input, the settings or the model have changed: rows that would now be others are generated again.
    pub allow_changed: bool,
    /// What the rows' bytes depend on besides the job: checkpoint, device and precision.
    pub model: String,
    /// Earlier attempts that ended because the engine crashed, in which a row in flight may be the cause.
    pub crashed: Vec<u32>,
    /// For how long storage trouble is borne before the job gives up, resumable.
    pub patience: Duration,
    /// Other replicas work on the job too.
    pub share: Option<Share>,
}

/// The journal of a job that this attempt may write to.
#[derive(Debug)]
pub struct Journal {
    pub(super) archive: Archive,
    pub(super) keys: Vec<Key>,
    /// Rows in flight at engine crashes: how often, and whether one was alone the last time.
    pub(super) strikes: HashMap<usize, Strikes>,
    pub(super) options: JournalOptions,
    pub(super) queue: Option<Queue>,
    path: PathBuf,
    file: File,
    /// Bytes of the file that are on the disk.
    committed: u64,
    lock: File,
}

/// How a row was involved in engine crashes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Strikes {
    pub(super) count: u32,
    pub(super) alone: bool,
}

impl Journal {
    /// Takes the journal over from earlier attempts and begins this attempt's file.
    ///
    /// # Errors
    /// What made the finished rows has changed, a newer attempt writes, an older one does not stop, or the directory cannot be used.
    pub(super) fn open(options: JournalOptions, header: &Header, keys: Vec<Key>) -> Result<Self, JobError> {
        let dir = &options.dir;
        let output = |source| JobError::Output { path: dir.clone(), source };
        fs::create_dir_all(dir).map_err(output)?;
        let fence = read_fence(dir).map_err(output)?;
        if fence.is_some_and(|fence| fence > options.attempt) {
            return Err(JobError::Fenced { attempt: fence.unwrap_or_default() });
        }
        // First the fence, then the lock: an attempt that still writes finds the fence and lets go.
        write_fence(dir, options.attempt).map_err(output)?;
        let lock = lock(dir)?;
        let mut archive = Archive::read(std::slice::from_ref(dir), &keys)?;
        if let Some(earlier) = archive.header.as_ref().filter(|_| !options.allow_changed) {
            let changed = [
                ("the model", earlier.model != header.model),
                ("the job file's [prompt], [sampling] or [generation]", earlier.settings != header.settings),
                ("the input", earlier.input != header.input || earlier.rows != header.rows),
            ];
            if let Some((what, _)) = changed.into_iter().find(|(_, changed)| *changed) {
                return Err(JobError::Changed { what });
            }
        }
        // Of an attempt that was killed at it.
        _ = fs::remove_file(dir.join(compact::TEMPORARY));
        if compact::is_due(&archive) {
            // Only now: with a changed input that is not meant, all of it would look superseded.
            if let Err(error) = compact::compact(dir, &keys, &archive) {
                tracing::warn!(%error, "the journal cannot be made smaller for now");
            }
            archive = Archive::read(std::slice::from_ref(dir), &keys)?;
        }
        let queue = options.share.as_ref().map(|share| {
            // Of those that the same job has in all its replicas.
            let job = record::hex(&record::key(&header.settings, &header.digest(), 0));
            Queue::open(share.clone(), &job, options.attempt, keys.len())
                .map_err(|source| JobError::Output { path: share.dir.clone(), source })
        });
        let queue = queue.transpose()?;
        let path = file_of(dir, options.attempt);
        let mut bytes = Vec::new();
        Record::Header(header.clone()).encode(&mut bytes);
        let create = || {
            let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
            file.write_all(&bytes)?;
            file.sync_all()?;
            File::open(dir)?.sync_all()?;
            Ok((file, File::open(&path)?))
        };
        let (file, reader) = create().map_err(|source| JobError::Output { path: path.clone(), source })?;
        let mut journal = Self {
            archive,
            keys,
            strikes: HashMap::new(),
            options,
            queue,
            path,
            file,
            committed: bytes.len() as u64,
            lock,
        };
        journal.archive.files.push(reader);
        journal.count_strikes();
        Ok(journal)
    }

    fn count_strikes(&mut self) {
        let mut crashed = self.options.crashed.clone();
        crashed.sort_unstable();
        let rows: HashMap<Key, usize> = self.keys.iter().enumerate().map(|(row, key)| (*key, row)).collect();
        for in_flight in crashed.iter().filter_map(|attempt| self.archive.in_flight.get(attempt)) {
            for row in in_flight.iter().filter_map(|key| rows.get(key)) {
                if self.archive.places[*row].is_none() {
                    let strikes = self.strikes.entry(*row).or_default();
                    strikes.count += 1;
                    strikes.alone = in_flight.len() == 1;
                }
            }
        }
    }

    /// Starts the thread that writes.
    pub(super) fn start(self) -> io::Result<(Archive, Writer)> {
        let (notes, receiver) = mpsc::channel();
        let (sender, replies) = unbounded_channel();
        let scribe = Scribe {
            dir: self.options.dir,
            attempt: self.options.attempt,
            patience: self.options.patience,
            path: self.path,
            file: self.file,
            file_index: self.archive.files.len() as u32 - 1,
            committed: self.committed,
            uncommitted: Vec::new(),
            written: 0,
            rows: Vec::new(),
            replies: sender,
            _lock: self.lock,
        };
        let thread = std::thread::Builder::new().name("journal".into()).spawn(move || scribe.run(&receiver))?;
        Ok((self.archive, Writer { notes: Some(notes), replies, thread: Some(thread) }))
    }
}

/// What the writing thread answers.
#[derive(Debug)]
pub(super) enum Reply {
    /// These rows are on the disk.
    Committed(Vec<(usize, Place, Counts)>),
    /// Nothing can be written for now; what it was given is kept.
    Trouble(String),
    /// It is over with an error: [`JobError::Fenced`] or [`JobError::Output`].
    Failed(JobError),
}

enum Note {
    Begun(Key),
    Done(usize, Box<Done>),
}

/// Hands records to the writing thread. Dropping it writes what was handed over.
pub(super) struct Writer {
    notes: Option<mpsc::Sender<Note>>,
    pub(super) replies: UnboundedReceiver<Reply>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn begun(&self, key: Key) {
        self.send(Note::Begun(key));
    }

    pub(super) fn done(&self, row: usize, done: Done) {
        self.send(Note::Done(row, Box::new(done)));
    }

    fn send(&self, note: Note) {
        if let Some(notes) = &self.notes {
            // A thread that has ended has said why in its last reply.
            _ = notes.send(note);
        }
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        self.notes = None;
        // Nobody waits for answers any more, so trouble is not endured.
        self.replies.close();
        if let Some(thread) = self.thread.take() {
            _ = thread.join();
        }
    }
}

/// The writing thread's own.
struct Scribe {
    dir: PathBuf,
    attempt: u32,
    patience: Duration,
    path: PathBuf,
    file: File,
    file_index: u32,
    /// Bytes on the disk.
    committed: u64,
    /// What follows them.
    uncommitted: Vec<u8>,
    /// Bytes of `uncommitted` that the file has.
    written: usize,
    rows: Vec<(usize, Place, Counts)>,
    replies: UnboundedSender<Reply>,
    _lock: File,
}

impl Scribe {
    fn run(mut self, notes: &mpsc::Receiver<Note>) {
        let mut due = Instant::now();
        let mut open = true;
        while open {
            let note = if self.rows.is_empty() {
                notes.recv().map_err(|_| RecvTimeoutError::Disconnected)
            } else {
                notes.recv_timeout(due.saturating_duration_since(Instant::now()))
            };
            match note {
                Ok(note) => {
                    self.take(note);
                    notes.try_iter().for_each(|note| self.take(note));
                }
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => open = false,
            }
            let commit = !open || !self.rows.is_empty() && Instant::now() >= due;
            // Marks of begun rows need to outlive this process, not this host: they are written at once, and not waited for.
            if let Err(error) = if commit { self.commit() } else { self.write() } {
                let outcome = if open { self.endure(error) } else { Err(self.failed(error)) };
                if let Err(error) = outcome {
                    _ = self.replies.send(Reply::Failed(error));
                    return;
                }
            }
            if commit {
                if let Err(error) = self.check_fence() {
                    _ = self.replies.send(Reply::Failed(error));
                    return;
                }
                _ = self.replies.send(Reply::Committed(std::mem::take(&mut self.rows)));
                due = Instant::now() + COMMIT_INTERVAL;
            }
        }
    }

    fn take(&mut self, note: Note) {
        match note {
            Note::Begun(key) => Record::Begun(key).encode(&mut self.uncommitted),
            Note::Done(row, done) => {
                let offset = self.committed + self.uncommitted.len() as u64;
                self.rows.push((row, Place { file: self.file_index, offset }, done.counts));
                Record::Done(*done).encode(&mut self.uncommitted);
            }
        }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.uncommitted[self.written..], self.committed + self.written as u64)?;
        self.written = self.uncommitted.len();
        Ok(())
    }

    fn commit(&mut self) -> io::Result<()> {
        self.write()?;
        self.file.sync_data()?;
        self.committed += self.uncommitted.len() as u64;
        self.uncommitted.clear();
        self.written = 0;
        Ok(())
    }

    /// Of a fence that cannot be read nothing is known; it is looked at again after the next commit.
    fn check_fence(&self) -> Result<(), JobError> {
        match read_fence(&self.dir) {
            Ok(Some(fence)) if fence > self.attempt => Err(JobError::Fenced { attempt: fence }),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn failed(&self, source: io::Error) -> JobError {
        JobError::Output { path: self.path.clone(), source }
    }

    /// Tries again until it works or patience is over. After a failed sync nobody knows which pages reached the disk, and a handle may have
    /// become stale, so the file is opened anew and everything since the last commit is written again.
    fn endure(&mut self, mut error: io::Error) -> Result<(), JobError> {
        let begin = Instant::now();
        let mut pause = RETRY.0;
        loop {
            _ = self.replies.send(Reply::Trouble(error.to_string()));
            if begin.elapsed() >= self.patience || self.replies.is_closed() {
                return Err(self.failed(error));
            }
            std::thread::sleep(pause.min(self.patience));
            pause = (pause * 2).min(RETRY.1);
            // The file is a newer attempt's to read, and perhaps to make smaller: nothing of it may be cut off.
            self.check_fence()?;
            let again = OpenOptions::new().write(true).open(&self.path).and_then(|file| {
                file.set_len(self.committed)?;
                self.file = file;
                self.written = 0;
                // Begun rows have no commit of their own; here they need one to know that it works again.
                self.commit()
            });
            match again {
                Ok(()) => return Ok(()),
                Err(next) => error = next,
            }
        }
    }
}

fn fence_file(dir: &Path) -> PathBuf {
    dir.join("fence")
}

fn read_fence(dir: &Path) -> io::Result<Option<u32>> {
    match fs::read_to_string(fence_file(dir)) {
        Ok(text) => Ok(text.trim().parse().ok()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn write_fence(dir: &Path, attempt: u32) -> io::Result<()> {
    let temporary = dir.join(format!("fence.{attempt}.tmp"));
    let mut file = File::create(&temporary)?;
    writeln!(file, "{attempt}")?;
    file.sync_all()?;
    fs::rename(&temporary, fence_file(dir))?;
    File::open(dir)?.sync_all()
}

/// Waits for an older attempt on this host to end. Where the file system has no locks, the fence alone protects.
fn lock(dir: &Path) -> Result<File, JobError> {
    let path = dir.join("lock");
    let error = |source| JobError::Output { path: path.clone(), source };
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(error)?;
    let deadline = Instant::now() + LOCK_PATIENCE;
    loop {
        match file.try_lock() {
            Ok(()) | Err(TryLockError::Error(_)) => return Ok(file),
            Err(TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Err(TryLockError::WouldBlock) => {
                return Err(error(io::Error::other("an earlier attempt still holds it")));
            }
        }
    }
}

#[cfg(test)]
mod tests;
