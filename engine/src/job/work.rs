//! The rows that are not done yet, through the engine and into the journal.

use std::collections::{HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use futures_util::future::BoxFuture;
use futures_util::stream::FuturesUnordered;
use tokio::sync::watch;

use crate::engine::{Engine, Row};
use crate::error_chain::error_chain;
use crate::request::{Event, RowError, Stopping};
use crate::tokenizer::Tokenizer;

use super::answer::{self, Completed, RowFailure};
use super::archive::Archive;
use super::input::{Feed, InputRow};
use super::journal::{Journal, Reply, Strikes, Writer};
use super::queue::Queue;
use super::record::Key;
use super::run::Job;
use super::{JobError, JobProgress};

/// Rows that the engine has at a time: more than it can run, so that it always finds one to admit.
const MAX_IN_FLIGHT: usize = 512;

/// Finished rows that may wait for the disk; beyond it no row is admitted.
const MAX_UNCOMMITTED: usize = 4096;

/// Left before the deadline to bring the last rows to the disk, as a share of the time that there was, and within which bounds.
const MARGIN: (f64, Duration, Duration) = (0.05, Duration::from_secs(1), Duration::from_secs(30));

/// A row is given this many times the longest that was seen.
const CAUTION: f64 = 1.25;

/// A crash of the engine twice with the row in flight, the second time alone.
const POISON: u32 = 2;

/// What came of a submitted row.
enum Fate {
    Completed(Completed, Duration),
    Failed(RowError),
    /// It had not begun when admission was closed.
    Abandoned,
}

/// All rows are on the disk: in `archive` or, of a shared job, in the journals of all replicas.
pub(super) struct Finished {
    pub(super) archive: Archive,
    pub(super) progress: JobProgress,
    pub(super) queue: Option<Queue>,
    pub(super) keys: Vec<Key>,
}

pub(super) struct Work<'a> {
    job: &'a Job,
    engine: &'a Engine,
    tokenizer: &'a Tokenizer,
    progress: &'a (dyn Fn(JobProgress) + Send + Sync),
    stopping: Stopping,
    archive: Archive,
    writer: Writer,
    keys: Vec<Key>,
    /// Of a job that replicas share: where rows to admit come from.
    queue: Option<Queue>,
    strikes: HashMap<usize, Strikes>,
    /// What all replicas had done when that was last of interest.
    others: Option<Archive>,
    /// Since when the queue cannot be used.
    queue_trouble: Option<Instant>,
    patience: Duration,
    /// Rows to admit, in the order of the input.
    fresh: VecDeque<usize>,
    /// Rows that were in flight when the engine crashed: one at a time after all others, so that another crash names its row.
    suspects: VecDeque<usize>,
    in_flight: FuturesUnordered<BoxFuture<'a, (usize, Arc<InputRow>, Fate)>>,
    feed: Feed<'a>,
    /// Rows that the writer has and the disk does not.
    uncommitted: usize,
    /// Admission is closed: what has begun is finished, and that is all.
    closing: watch::Sender<bool>,
    deadline: Option<Instant>,
    began: Instant,
    /// The longest that a row ran.
    longest: Duration,
}

impl<'a> Work<'a> {
    pub(super) fn new(
        job: &'a Job,
        engine: &'a Engine,
        tokenizer: &'a Tokenizer,
        mut journal: Journal,
        deadline: Option<Instant>,
        progress: &'a (dyn Fn(JobProgress) + Send + Sync),
    ) -> Result<Self, JobError> {
        let keys = std::mem::take(&mut journal.keys);
        let strikes = std::mem::take(&mut journal.strikes);
        let queue = journal.queue.take();
        let patience = journal.options.patience;
        let dir = journal.options.dir.clone();
        let (mut archive, writer) = journal.start().map_err(|source| JobError::Output { path: dir, source })?;
        archive.progress.rows_kept = archive.progress.rows_done;
        progress(archive.progress);
        let mut work = Self {
            stopping: job.stopping(engine, tokenizer),
            job,
            engine,
            tokenizer,
            progress,
            archive,
            writer,
            keys,
            queue,
            strikes,
            others: None,
            queue_trouble: None,
            patience,
            fresh: VecDeque::new(),
            suspects: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            feed: job.feed(tokenizer),
            uncommitted: 0,
            closing: watch::Sender::new(false),
            deadline,
            began: Instant::now(),
            longest: Duration::ZERO,
        };
        if work.queue.is_none() {
            work.take((0..work.keys.len()).collect())?;
        }
        Ok(work)
    }

    /// Has rows to do, if they are not done.
    fn take(&mut self, rows: Vec<usize>) -> Result<(), JobError> {
        for row in rows {
            match self.strikes.get(&row) {
                _ if self.archive.places[row].is_some() => {}
                Some(&Strikes { count: POISON.., alone: true }) => {
                    let (input, _) = self.row(row)?;
                    self.record(row, &input, Err(RowFailure::poison()));
                }
                Some(_) => self.suspects.push_back(row),
                None => self.fresh.push_back(row),
            }
        }
        Ok(())
    }

    /// Keeps the lease, and takes rows from the queue as long as the engine has few; whether all rows of all replicas are done.
    fn share(&mut self) -> Result<bool, JobError> {
        let Some(mut queue) = self.queue.take() else {
            return Ok(self.archive.progress.rows_done == self.archive.progress.rows_total);
        };
        let shared = self.pull(&mut queue);
        self.queue = Some(queue);
        match shared {
            Ok(done) => {
                self.queue_trouble = None;
                Ok(done)
            }
            Err(error @ JobError::Output { .. })
                if self.queue_trouble.get_or_insert_with(Instant::now).elapsed() < self.patience =>
            {
                tracing::warn!(error = error_chain(&error), "the queue of the replicas cannot be used for now");
                Ok(false)
            }
            Err(error) => Err(error),
        }
    }

    fn pull(&mut self, queue: &mut Queue) -> Result<bool, JobError> {
        let dir = queue.dir().to_owned();
        let trouble = |source| JobError::Output { path: dir.clone(), source };
        for lost in queue.tend().map_err(trouble)? {
            self.fresh.retain(|row| !lost.contains(row));
            self.suspects.retain(|row| !lost.contains(row));
        }
        let enough = self.engine.info().max_sequences.min(queue.fair_share());
        while !self.archive.progress.paused
            && !*self.closing.borrow()
            && self.in_flight.len() + self.fresh.len() < enough
        {
            let Some(claim) = queue.claim().map_err(trouble)? else { break };
            // Whoever had it before, or an earlier attempt, may have done some of it.
            if claim.again || (self.others.is_none() && queue.attempt() > 0) {
                let others = Archive::read(queue.journals(), &self.keys);
                self.others = Some(others.inspect_err(|_| queue.release(claim.range))?);
            }
            let done = |row: &usize| {
                self.archive.places[*row].is_some()
                    || self.others.as_ref().is_some_and(|all| all.places[*row].is_some())
            };
            let rows: Vec<usize> = claim.rows.filter(|row| !done(row)).collect();
            queue.begin(claim.range, rows.len()).map_err(trouble)?;
            self.take(rows)?;
        }
        if self.in_flight.is_empty() && self.fresh.is_empty() && self.suspects.is_empty() && self.uncommitted == 0 {
            return queue.is_done().map_err(trouble);
        }
        Ok(false)
    }

    /// Until every row is on the disk.
    pub(super) async fn run(
        mut self,
        stop: &mut Pin<&mut (impl Future<Output = ()> + Send)>,
    ) -> Result<Finished, JobError> {
        loop {
            let done = self.share()?;
            self.admit()?;
            if self.in_flight.is_empty() && self.uncommitted == 0 {
                if done {
                    let Self { archive, queue, keys, .. } = self;
                    return Ok(Finished { progress: archive.progress, archive, queue, keys });
                }
                if *self.closing.borrow() {
                    return Err(self.out_of_time());
                }
            }
            let next_stop = self.next_stop();
            let pause = self.queue.as_ref().map(|queue| Instant::now() + queue.interval());
            tokio::select! {
                biased;
                () = stop.as_mut() => return Err(JobError::Stopped),
                Some(reply) = self.writer.replies.recv() => self.replied(reply)?,
                Some((index, row, fate)) = self.in_flight.next() => self.finished(index, &row, fate)?,
                () = sleep_until(next_stop) => {
                    if self.closing.send_replace(true) {
                        return Err(self.out_of_time());
                    }
                    tracing::info!("no more rows are begun: they could not end before the deadline");
                }
                () = sleep_until(pause) => {}
            }
        }
    }

    /// Gives the engine what it may have.
    fn admit(&mut self) -> Result<(), JobError> {
        if self.archive.progress.paused || *self.closing.borrow() {
            return Ok(());
        }
        while self.in_flight.len() < MAX_IN_FLIGHT && self.uncommitted < MAX_UNCOMMITTED {
            let next = match self.fresh.pop_front() {
                None if self.in_flight.is_empty() => self.suspects.pop_front(),
                next => next,
            };
            let Some(index) = next else { break };
            let (row, sample) = self.row(index)?;
            self.writer.begun(self.keys[index]);
            let submitted = self.job.submit(self.engine, &self.stopping, &row, sample);
            let closing = self.closing.subscribe();
            self.in_flight.push(Box::pin(async move { (index, row, collect(submitted, closing).await) }));
        }
        Ok(())
    }

    fn row(&mut self, index: usize) -> Result<(Arc<InputRow>, u32), JobError> {
        let samples = self.job.generation.samples_per_prompt as usize;
        Ok((self.feed.row(index / samples)?, (index % samples) as u32))
    }

    fn finished(&mut self, index: usize, row: &InputRow, fate: Fate) -> Result<(), JobError> {
        match fate {
            Fate::Completed(completed, ran) => {
                self.longest = self.longest.max(ran);
                self.record(index, row, Ok(completed.outcome(self.tokenizer, &self.stopping)));
            }
            Fate::Failed(RowError::EngineFailed(reason)) => return Err(JobError::Engine(reason)),
            Fate::Failed(RowError::ShuttingDown) => return Err(JobError::Stopped),
            Fate::Failed(error) => self.record(index, row, Err(error.into())),
            Fate::Abandoned => {}
        }
        Ok(())
    }

    fn record(&mut self, index: usize, row: &InputRow, result: Result<answer::Outcome, RowFailure>) {
        let sample = (index % self.job.generation.samples_per_prompt as usize) as u32;
        let done = match self.job.scores {
            true => answer::scored(self.keys[index], row, result),
            false => answer::done(self.keys[index], row, sample, self.job.seed(row, sample), result),
        };
        self.writer.done(index, done);
        self.uncommitted += 1;
    }

    fn replied(&mut self, reply: Reply) -> Result<(), JobError> {
        match reply {
            Reply::Committed(rows) => {
                self.archive.progress.paused = false;
                self.uncommitted -= rows.len();
                for (row, place, counts) in rows {
                    self.archive.places[row] = Some(place);
                    self.archive.progress.count(counts);
                    if let Some(Err(error)) = self.queue.as_mut().map(|queue| queue.done(row)) {
                        tracing::warn!(%error, "the queue of the replicas cannot be written for now");
                    }
                }
                (self.progress)(self.archive.progress);
            }
            Reply::Trouble(error) => {
                tracing::warn!(%error, "the journal cannot be written for now; no more rows are begun");
                self.archive.progress.paused = true;
                (self.progress)(self.archive.progress);
            }
            Reply::Failed(error) => return Err(error),
        }
        Ok(())
    }

    /// When to close admission, then when to end. `None`: there is no deadline.
    fn next_stop(&self) -> Option<Instant> {
        let deadline = self.deadline?;
        let (share, least, most) = MARGIN;
        let margin = deadline.saturating_duration_since(self.began).mul_f64(share).clamp(least, most);
        let needed = if *self.closing.borrow() { Duration::ZERO } else { self.longest.mul_f64(CAUTION) };
        Some(deadline.checked_sub(margin + needed).unwrap_or(self.began))
    }

    fn out_of_time(&self) -> JobError {
        let JobProgress { rows_done, rows_total, rows_kept, .. } = self.archive.progress;
        let new = rows_done - rows_kept;
        let rest = (rows_total - rows_done) as f64;
        let rest_s = (new > 0).then(|| self.began.elapsed().as_secs_f64() / new as f64 * rest);
        JobError::Deadline { done: rows_done, total: rows_total, rest_s }
    }
}

async fn sleep_until(instant: Option<Instant>) {
    match instant {
        Some(instant) => tokio::time::sleep_until(instant.into()).await,
        None => std::future::pending().await,
    }
}

async fn collect(submitted: Result<(Vec<u32>, Row), RowError>, mut closing: watch::Receiver<bool>) -> Fate {
    let (prompt, mut row) = match submitted {
        Ok(submitted) => submitted,
        Err(error) => return Fate::Failed(error),
    };
    let mut event = tokio::select! {
        biased;
        event = row.events.recv() => event,
        _ = closing.wait_for(|&closing| closing) => return Fate::Abandoned,
    };
    let began = Instant::now();
    let (mut new_ids, mut rewards) = (Vec::new(), Vec::new());
    loop {
        match event {
            Some(Event::Prompt(_)) => {}
            Some(Event::Token { logprobs: Some(values), .. }) => rewards = values.full,
            Some(Event::Token { id, .. }) => new_ids.push(id),
            Some(Event::Finished(finish)) => {
                return Fate::Completed(Completed { prompt, new_ids, rewards, reason: finish.reason }, began.elapsed());
            }
            Some(Event::Failed(error)) => return Fate::Failed(error),
            None => return Fate::Failed(RowError::EngineFailed("it dropped the row".into())),
        }
        event = row.events.recv().await;
    }
}
