//! The engine as its users see it: submit a [`Request`], get a stream of [`Event`]s.

use tokio::sync::mpsc::UnboundedReceiver;

use crate::request::{Event, Request, RowError};

/// A handle to the running engine; cheap to clone.
#[derive(Clone)]
pub struct Engine {}

/// A submitted row. Dropping it cancels the row and frees its KV pages.
pub struct Row {
    pub id: u64,
    pub events: UnboundedReceiver<Event>,
}

impl Engine {
    /// Queues a row.
    ///
    /// # Errors
    /// The row can never be generated (empty prompt, too long, unknown id), or the engine has stopped.
    pub fn submit(&self, _request: Request) -> Result<Row, RowError> {
        unimplemented!()
    }

    pub fn info(&self) -> &EngineInfo {
        unimplemented!()
    }

    /// A snapshot of counters and gauges.
    pub fn stats(&self) -> EngineStats {
        unimplemented!()
    }

    /// Stops admitting, lets running rows finish; resolves when nothing is running.
    pub async fn drain(&self) {
        unimplemented!()
    }

    /// Resolves with the reason when the engine has failed (a rank was lost, the device failed).
    pub async fn failed(&self) -> String {
        unimplemented!()
    }
}

/// What does not change while the engine runs.
#[derive(Clone, Debug)]
pub struct EngineInfo {
    pub model_name: String,
    pub vocab_size: usize,
    /// Tokens that prompt and completion may have together.
    pub max_context: usize,
    /// Tokens that the KV cache holds.
    pub kv_tokens: usize,
    pub bos_id: Option<u32>,
    pub eos_ids: Vec<u32>,
}

/// Counters since start, and gauges.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub struct EngineStats {
    pub waiting: usize,
    pub running: usize,
    pub prompt_tokens: u64,
    pub generated_tokens: u64,
    pub finished_rows: u64,
    pub kv_pages_used: usize,
    pub kv_pages_total: usize,
    pub steps: u64,
}
