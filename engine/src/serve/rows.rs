//! Rows of one request while they are generated.

use std::sync::Arc;
use std::time::Instant;

use crate::engine::{Engine, Row};
use crate::request::{Event, Request, RowError};

use super::metrics::Metrics;

/// A submitted row whose latencies are measured. Dropping it cancels it.
pub(super) struct TrackedRow {
    row: Row,
    metrics: Arc<Metrics>,
    submitted: Instant,
    last_token: Option<Instant>,
    over: bool,
}

impl TrackedRow {
    pub(super) fn submit(
        engine: &Engine,
        group: u64,
        metrics: &Arc<Metrics>,
        request: Request,
    ) -> Result<Self, RowError> {
        let row = engine.submit_in(group, request)?;
        Ok(Self { row, metrics: metrics.clone(), submitted: Instant::now(), last_token: None, over: false })
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
