//! Rows of one request while they are generated.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Instant;

use crate::engine::Row;
use crate::request::{Event, Request, RowError};

use super::Server;
use super::metrics::Metrics;

/// Tokens of one HTTP request, for the access log.
#[derive(Default)]
pub(super) struct Tally {
    prompt: AtomicU64,
    completion: AtomicU64,
}

impl Tally {
    pub(super) fn prompt_tokens(&self) -> u64 {
        self.prompt.load(Relaxed)
    }

    pub(super) fn completion_tokens(&self) -> u64 {
        self.completion.load(Relaxed)
    }
}

/// A submitted row whose latencies are measured. Dropping it cancels it.
pub(super) struct TrackedRow {
    row: Row,
    metrics: Arc<Metrics>,
    tally: Arc<Tally>,
    submitted: Instant,
    last_token: Option<Instant>,
    over: bool,
}

impl TrackedRow {
    pub(super) fn submit(server: &Server, tally: &Arc<Tally>, group: u64, request: Request) -> Result<Self, RowError> {
        let prompt_tokens = request.prompt.len() as u64;
        let row = server.engine.submit_in(group, request)?;
        tally.prompt.fetch_add(prompt_tokens, Relaxed);
        let (metrics, tally) = (server.metrics.clone(), tally.clone());
        Ok(Self { row, metrics, tally, submitted: Instant::now(), last_token: None, over: false })
    }

    /// The next event; `None` after `Finished` or `Failed`.
    pub(super) async fn next(&mut self) -> Option<Event> {
        if self.over {
            return None;
        }
        let event = self.row.events.recv().await;
        let event = event.unwrap_or_else(|| Event::Failed(RowError::EngineFailed("it dropped the row".into())));
        match &event {
            Event::Prompt(_) => {}
            Event::Token { .. } => {
                self.tally.completion.fetch_add(1, Relaxed);
                let now = Instant::now();
                match self.last_token.replace(now) {
                    None => self.metrics.first_token.observe(now - self.submitted),
                    Some(last) => self.metrics.next_token.observe(now - last),
                }
            }
            Event::Finished(_) => {
                self.over = true;
                self.metrics.row.observe(self.submitted.elapsed());
            }
            Event::Failed(_) => self.over = true,
        }
        Some(event)
    }
}
