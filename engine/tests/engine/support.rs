//! Engines for tests: one rank, or a mesh of ranks as threads that talk over real sockets.

use std::net::TcpListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::Mesh;
use nemotron_engine::engine::{Engine, Row};
use nemotron_engine::rank::{Device, Limits, ModelSource, Peers, Rank, RankSpec, start};
use nemotron_engine::report::{Phase, Reporter};
use nemotron_engine::request::{Event, Finish, LogprobSpec, Logprobs, Request, RowError, Sampling, Stopping};

pub(crate) fn fixtures() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures")
}

pub(crate) fn json(path: &str) -> serde_json::Value {
    serde_json::from_slice(&std::fs::read(fixtures().join(path)).unwrap()).unwrap()
}

pub(crate) fn ids(value: &serde_json::Value) -> Vec<u32> {
    value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect()
}

pub(crate) fn floats(value: &serde_json::Value) -> Vec<f32> {
    value.as_array().unwrap().iter().map(|number| number.as_f64().unwrap() as f32).collect()
}

pub(crate) const LIMITS: Limits = Limits { page_tokens: 16, num_pages: 1024, max_step_tokens: 96, max_sequences: 80 };

struct Silent;

impl Reporter for Silent {
    fn phase(&self, _: Phase) {}
    fn progress(&self, _: f64) {}
    fn steps(&self, _: u64) {}
}

pub(crate) fn engine(model: &ModelSource, dtype: ComputeType, mesh: Mesh, limits: Limits) -> Engine {
    let world_size = mesh.world_size();
    let listeners: Vec<TcpListener> = (0..world_size).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
    let addresses: Vec<_> = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
    let ranks = listeners.into_iter().enumerate().rev().map(|(rank, listener)| {
        let threads = if world_size == 1 { 2 } else { 1 };
        let spec = RankSpec {
            rank,
            mesh,
            model: model.clone(),
            device: Device::Cpu,
            dtype,
            threads,
            limits,
            device_ordinal: 0,
            library_folders: Vec::new(),
        };
        let peers = (world_size > 1).then(|| Peers {
            listener,
            addresses: addresses.clone(),
            secret: b"a secret of the test".to_vec(),
            deadline: Instant::now() + Duration::from_secs(30),
        });
        std::thread::spawn(move || match start(&spec, peers, Arc::new(Silent)).unwrap() {
            Rank::Leader(engine) => Some(engine),
            Rank::Follower(follower) => {
                // The test may end, and with it rank 0, at any time.
                let _ = follower.run();
                None
            }
        })
    });
    let threads: Vec<_> = ranks.collect();
    threads.into_iter().last().unwrap().join().unwrap().unwrap()
}

/// A greedy row that runs to its length.
pub(crate) fn greedy(prompt: Vec<u32>, max_new_tokens: u32) -> Request {
    Request {
        prompt,
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens, ..Stopping::default() },
        logprobs: LogprobSpec::default(),
    }
}

#[derive(Debug, Default, PartialEq)]
pub(crate) struct Output {
    pub(crate) ids: Vec<u32>,
    pub(crate) logprobs: Vec<Logprobs>,
    pub(crate) prompt: Vec<Logprobs>,
    pub(crate) finish: Option<Result<Finish, RowError>>,
}

impl Output {
    pub(crate) fn token_logprobs(&self) -> Vec<f32> {
        self.logprobs.iter().map(|logprobs| logprobs.token).collect()
    }

    pub(crate) fn prompt_logprobs(&self) -> Vec<f32> {
        self.prompt.iter().map(|logprobs| logprobs.token).collect()
    }
}

pub(crate) fn collect(mut row: Row) -> Output {
    let mut output = Output::default();
    while let Some(event) = row.events.blocking_recv() {
        match event {
            Event::Prompt(logprobs) => output.prompt.extend(logprobs),
            Event::Token { id, logprobs } => {
                output.ids.push(id);
                output.logprobs.extend(logprobs.map(|boxed| *boxed));
            }
            Event::Finished(finish) => output.finish = Some(Ok(finish)),
            Event::Failed(error) => output.finish = Some(Err(error)),
        }
    }
    output
}

/// Submits all rows at once and collects them.
pub(crate) fn generate(engine: &Engine, requests: impl IntoIterator<Item = Request>) -> Vec<Output> {
    let rows: Vec<Row> = requests.into_iter().map(|request| engine.submit(request).unwrap()).collect();
    rows.into_iter().map(collect).collect()
}
