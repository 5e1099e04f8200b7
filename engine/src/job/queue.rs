//! One job shared by several replicas: who works on which rows, by files in a folder that all of them see, without a daemon.
//!
//! The rows are cut into ranges of equal length. `NNNNNN.E` holds the replica that claimed range N; it is made with `O_EXCL`, so of several
//! that try, one succeeds. `NNNNNN.done` says that all its rows are in the journals. The range after the last one is the output: whoever
//! claims it when all others are done writes it.
//!
//! A replica that lives writes another number into `beat-R` now and then. When an observer has seen the same number for longer than the
//! lease, by its own monotonic clock, it takes the ranges of that replica over by making `NNNNNN.E+1`. Clocks of two hosts are never
//! compared. A replica that was only slow finds `E+1` and begins no more rows of that range; rows that both have done are the same bytes.
//!
//! A replica is the same one in all its attempts, which its journal's fence keeps apart: it finds its own ranges and goes on with them.

use std::collections::{HashMap, HashSet};
use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Ranges a replica, so that the last ones end at about the same time, and the most rows in one.
const RANGES_PER_REPLICA: usize = 16;
const MAX_RANGE: usize = 256;

/// How often a replica shows that it lives within the time after which it is taken for dead.
const BEATS_PER_LEASE: u32 = 10;

/// The part of a replica in a job that several share.
#[derive(Clone, Debug)]
pub struct Share {
    /// Of the queue; made if it is not there.
    pub dir: PathBuf,
    pub replica: u32,
    /// Directories of the journals of all replicas, this one's among them.
    pub journals: Vec<PathBuf>,
    /// For how long a replica may show no sign of life.
    pub lease: Duration,
}

/// The queue as this replica sees it.
#[derive(Debug)]
pub(super) struct Queue {
    share: Share,
    dir: PathBuf,
    rows: usize,
    range_rows: usize,
    /// Ranges that this replica works on.
    held: HashMap<usize, Held>,
    /// What was last seen of each replica, and when that was new.
    beats: HashMap<String, (String, Instant)>,
    /// Told apart from that of an earlier attempt.
    beat: u64,
    attempt: u32,
    next_beat: Instant,
}

#[derive(Debug)]
struct Held {
    epoch: u32,
    /// Rows that are not done yet; the range was just claimed if `None`.
    left: Option<usize>,
}

/// A range that now is this replica's.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) range: usize,
    pub(super) rows: Range<usize>,
    /// Somebody has worked on it before.
    pub(super) again: bool,
}

/// What the folder holds: the newest epoch of each range that was claimed, and the ranges that are done.
#[derive(Default)]
struct Listing {
    epochs: HashMap<usize, u32>,
    done: HashSet<usize>,
}

impl Queue {
    /// `job` tells jobs apart: a changed input has another queue.
    pub(super) fn open(share: Share, job: &str, attempt: u32, rows: usize) -> io::Result<Self> {
        let dir = share.dir.join(job);
        fs::create_dir_all(&dir)?;
        let ranges = RANGES_PER_REPLICA * share.journals.len();
        let mut queue = Self {
            range_rows: rows.div_ceil(ranges).clamp(1, MAX_RANGE),
            share,
            dir,
            rows,
            held: HashMap::new(),
            beats: HashMap::new(),
            beat: u64::from(attempt) << 32,
            attempt,
            next_beat: Instant::now(),
        };
        queue.tend()?;
        Ok(queue)
    }

    pub(super) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(super) fn attempt(&self) -> u32 {
        self.attempt
    }

    pub(super) fn replica(&self) -> u32 {
        self.share.replica
    }

    pub(super) fn journals(&self) -> &[PathBuf] {
        &self.share.journals
    }

    /// After how long to call [`Self::tend`] again at the latest.
    pub(super) fn interval(&self) -> Duration {
        self.share.lease / BEATS_PER_LEASE
    }

    /// How many rows are one replica's part.
    pub(super) fn fair_share(&self) -> usize {
        self.rows.div_ceil(self.share.journals.len())
    }

    fn num_ranges(&self) -> usize {
        self.rows.div_ceil(self.range_rows)
    }

    /// Shows that this replica lives, and looks whether others do. The rows of ranges that were taken from this one.
    pub(super) fn tend(&mut self) -> io::Result<Vec<Range<usize>>> {
        if Instant::now() < self.next_beat {
            return Ok(Vec::new());
        }
        self.beat += 1;
        fs::write(self.beat_file(&self.share.replica.to_string()), self.beat.to_string())?;
        self.next_beat = Instant::now() + self.interval();
        // What could not be said before.
        self.held.keys().copied().collect::<Vec<_>>().into_iter().try_for_each(|range| self.close(range))?;
        let listing = self.list()?;
        for owner in (0..self.share.journals.len()).map(|replica| replica.to_string()).chain([String::new()]) {
            self.look(&owner);
        }
        let epochs = &listing.epochs;
        let lost: Vec<usize> = self
            .held
            .iter()
            .filter(|(range, held)| epochs.get(range) > Some(&held.epoch))
            .map(|(&range, _)| range)
            .collect();
        Ok(lost
            .into_iter()
            .map(|range| {
                self.held.remove(&range);
                tracing::warn!(range, "another replica took this one for dead and has taken the range over");
                self.rows_of(range)
            })
            .collect())
    }

    /// Claims the next range that nobody works on; `None` when there is none for now.
    pub(super) fn claim(&mut self) -> io::Result<Option<Claim>> {
        let listing = self.list()?;
        for range in 0..self.num_ranges() {
            if let Some(claim) = self.try_claim(range, &listing)? {
                return Ok(Some(claim));
            }
        }
        Ok(None)
    }

    /// All rows are done.
    pub(super) fn is_done(&self) -> io::Result<bool> {
        let done = self.list()?.done;
        Ok((0..self.num_ranges()).all(|range| done.contains(&range)))
    }

    /// Claims the output; all rows are done.
    pub(super) fn output(&mut self) -> io::Result<Option<Claim>> {
        let listing = self.list()?;
        self.try_claim(self.num_ranges(), &listing)
    }

    pub(super) fn is_output_written(&self) -> io::Result<bool> {
        Ok(self.list()?.done.contains(&self.num_ranges()))
    }

    fn try_claim(&mut self, range: usize, listing: &Listing) -> io::Result<Option<Claim>> {
        if listing.done.contains(&range) || self.held.contains_key(&range) {
            return Ok(None);
        }
        let claim = Claim { range, rows: self.rows_of(range), again: listing.epochs.contains_key(&range) };
        let epoch = match listing.epochs.get(&range) {
            None => 0,
            Some(&epoch) => {
                // Empty while its claimer writes it, or was killed before.
                let owner = fs::read_to_string(self.file(range, epoch))?;
                if owner == self.share.replica.to_string() {
                    self.held.insert(range, Held { epoch, left: None });
                    return Ok(Some(claim));
                }
                let silent = self.look(&owner);
                if silent <= self.share.lease {
                    return Ok(None);
                }
                tracing::warn!(range, replica = owner, silent_s = silent.as_secs(), "its rows are taken over");
                epoch + 1
            }
        };
        let file = OpenOptions::new().write(true).create_new(true).open(self.file(range, epoch));
        match file.and_then(|mut file| write!(file, "{}", self.share.replica)) {
            Ok(()) => {
                self.held.insert(range, Held { epoch, left: None });
                Ok(Some(claim))
            }
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How many rows of a claimed range are to be done; with none left it is done.
    pub(super) fn begin(&mut self, range: usize, left: usize) -> io::Result<()> {
        if let Some(held) = self.held.get_mut(&range) {
            held.left = Some(left);
        }
        self.close(range)
    }

    /// Whoever claimed it could not begin; it is claimed again.
    pub(super) fn release(&mut self, range: usize) {
        self.held.remove(&range);
    }

    /// A row that counted as done is to be done again.
    pub(super) fn reopen(&self, row: usize) -> io::Result<()> {
        match fs::remove_file(self.dir.join(format!("{:06}.done", row / self.range_rows))) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// A row is on the disk.
    pub(super) fn done(&mut self, row: usize) -> io::Result<()> {
        let range = row / self.range_rows;
        if let Some(left) = self.held.get_mut(&range).and_then(|held| held.left.as_mut()) {
            *left = left.saturating_sub(1);
        }
        self.close(range)
    }

    fn close(&mut self, range: usize) -> io::Result<()> {
        if self.held.get(&range).is_some_and(|held| held.left == Some(0)) {
            fs::write(self.dir.join(format!("{range:06}.done")), "")?;
            self.held.remove(&range);
        }
        Ok(())
    }

    /// For how long, as far as this process has seen, a replica has shown no sign of life.
    fn look(&mut self, owner: &str) -> Duration {
        let text = fs::read_to_string(self.beat_file(owner)).unwrap_or_default();
        let (last, since) = self.beats.entry(owner.to_owned()).or_insert_with(|| (text.clone(), Instant::now()));
        if *last != text {
            (*last, *since) = (text, Instant::now());
        }
        since.elapsed()
    }

    fn rows_of(&self, range: usize) -> Range<usize> {
        let begin = range * self.range_rows;
        begin..(begin + self.range_rows).min(self.rows).max(begin)
    }

    fn file(&self, range: usize, epoch: u32) -> PathBuf {
        self.dir.join(format!("{range:06}.{epoch}"))
    }

    fn beat_file(&self, owner: &str) -> PathBuf {
        self.dir.join(format!("beat-{owner}"))
    }

    fn list(&self) -> io::Result<Listing> {
        let mut listing = Listing::default();
        for entry in fs::read_dir(&self.dir)? {
            let name = entry?.file_name();
            let parsed = Path::new(&name).to_str().and_then(|name| name.split_once('.'));
            let Some((Ok(range), what)) = parsed.map(|(range, what)| (range.parse::<usize>(), what)) else { continue };
            if what == "done" {
                listing.done.insert(range);
            } else if let Ok(epoch) = what.parse() {
                let newest = listing.epochs.entry(range).or_insert(epoch);
                *newest = epoch.max(*newest);
            }
        }
        Ok(listing)
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// Short, as the tests wait for it to pass.
    const LEASE: Duration = Duration::from_secs(1);

    fn queue(dir: &Path, replica: u32, attempt: u32) -> Queue {
        let journals = vec![PathBuf::new(); 2];
        Queue::open(Share { dir: dir.into(), replica, journals, lease: LEASE }, "job", attempt, 64).unwrap()
    }

    fn work_off(queue: &mut Queue) -> Vec<usize> {
        let mut rows = Vec::new();
        while let Some(claim) = queue.claim().unwrap() {
            queue.begin(claim.range, claim.rows.len()).unwrap();
            claim.rows.clone().for_each(|row| queue.done(row).unwrap());
            rows.extend(claim.rows);
        }
        rows
    }

    #[test]
    fn each_range_is_worked_on_by_one() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path();
        let rows: Vec<Vec<usize>> = std::thread::scope(|scope| {
            let threads: Vec<_> =
                (0..4).map(|replica| scope.spawn(move || work_off(&mut queue(path, replica, 0)))).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        let mut all: Vec<usize> = rows.into_iter().flatten().collect();
        all.sort_unstable();
        assert_eq!(all, (0..64).collect::<Vec<_>>());
        let mut queue = queue(dir.path(), 0, 1);
        assert!(queue.is_done().unwrap() && !queue.is_output_written().unwrap());
        let output = queue.output().unwrap().unwrap();
        queue.begin(output.range, 0).unwrap();
        assert!(queue.is_output_written().unwrap() && queue.output().unwrap().is_none());
    }

    #[test]
    fn the_ranges_of_a_silent_replica_are_taken_over_and_it_learns_of_it() {
        let dir = tempfile::tempdir().unwrap();
        let (mut slow, mut other) = (queue(dir.path(), 0, 0), queue(dir.path(), 1, 0));
        let claim = slow.claim().unwrap().unwrap();
        slow.begin(claim.range, claim.rows.len()).unwrap();
        assert_eq!(work_off(&mut other), (2..64).collect::<Vec<_>>());
        // As long as it shows that it lives, nothing is taken from it.
        for _ in 0..8 {
            std::thread::sleep(LEASE / 5);
            assert!(slow.tend().unwrap().is_empty());
            other.tend().unwrap();
            assert_eq!(other.claim().unwrap(), None);
        }
        std::thread::sleep(LEASE * 2);
        assert_eq!(other.claim().unwrap(), Some(Claim { again: true, ..claim }));
        assert_eq!(slow.tend().unwrap().first(), Some(&(0..2)));
        // Its own end of the range is nobody's business any more.
        slow.done(0).unwrap();
        slow.done(1).unwrap();
        assert!(!other.is_done().unwrap());
    }

    #[test]
    fn another_attempt_goes_on_with_its_ranges_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let first = queue(dir.path(), 0, 0).claim().unwrap().unwrap();
        let again = queue(dir.path(), 0, 1).claim().unwrap().unwrap();
        assert_eq!((again.range, again.again), (first.range, true));
        assert_ne!(queue(dir.path(), 1, 0).claim().unwrap().unwrap().range, first.range);
    }
}
