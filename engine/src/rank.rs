//! One rank, from its specification to a running part of the engine.

use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::backend::BackendError;
use crate::backend::cpu::CpuBackend;
use crate::checkpoint::{self, CheckpointError, Manifest, ReadingPlan};
use crate::collective::CollectiveError;
use crate::collective::host::HostCollective;
use crate::config::MeshError;
use crate::engine::{Engine, EngineInfo, FRAME_END, FRAME_MAX, FRAME_PLAN, FRAME_RESULT, start_leader};
use crate::mesh::{ConnectError, Control, connect_mesh};
use crate::model::Model;
use crate::report::{Load, Phase, Reporter};
use crate::request::{Event, LogprobSpec, Request, RowError, Sampling, Stopping};
use crate::runner::Runner;
pub use crate::spec::{Device, Limits, ModelSource, Peers, RankSpec};
use crate::step::{StepPlan, StepResult};
use crate::wire::{self, WireError};

/// A started rank.
pub enum Rank {
    /// Rank 0: schedules, and answers requests.
    Leader(Engine),
    /// Any other: executes what rank 0 plans.
    Follower(Box<Follower>),
}

/// A rank that executes plans until rank 0 ends the run.
pub struct Follower {
    control: TcpStream,
    runner: Runner<CpuBackend, HostCollective>,
    reporter: Arc<dyn Reporter>,
    sends_results: bool,
}

/// Connects to the peers, loads this rank's part of the checkpoint, and, on rank 0, decodes a warm-up token across all ranks.
///
/// `peers` is `None` exactly when the mesh has one rank.
///
/// # Errors
/// The model does not suit the mesh, the checkpoint is bad, memory is short, or a peer is lost.
pub fn start(spec: &RankSpec, peers: Option<Peers>, reporter: Arc<dyn Reporter>) -> Result<Rank, EngineError> {
    let RankSpec { rank, mesh, device, limits, .. } = *spec;
    if device == Device::Cuda {
        let Err(reason) = nemotron_kernels::probe();
        return Err(BackendError::Unavailable { device: "CUDA", reason: reason.to_string() }.into());
    }
    let source = checkpoint::open_for(&spec.model, mesh)?;
    let config = source.config().clone();
    mesh.check(&config)?;
    let tokenizer = source.tokenizer()?;
    let vocab_size = config.vocab_size.min(tokenizer.vocab_size());

    reporter.phase(Phase::CommInit);
    let (collective, control) = match peers {
        Some(peers) => {
            let connected = connect_mesh(peers, mesh, rank)?;
            (connected.collective, connected.control)
        }
        None => (HostCollective::single(), Control::Leader(Vec::new())),
    };

    reporter.phase(Phase::Loading);
    let backend = CpuBackend::new(spec.threads, spec.dtype)?;
    let plan = ReadingPlan::of_rank(source.as_ref(), mesh, rank)?;
    let manifest = Manifest::of(&spec.model)?;
    let model = while_reading(&plan, manifest.as_ref(), reporter.as_ref(), |progress| {
        Model::load(backend, collective, source.as_ref(), mesh, rank, &limits, progress)
    })?;
    let runner = Runner::new(model, vocab_size, limits.max_sequences);

    reporter.phase(Phase::Warmup);
    match control {
        Control::Follower(control) => {
            let sends_results = rank == mesh.sampling_rank();
            Ok(Rank::Follower(Box::new(Follower { control, runner, reporter, sends_results })))
        }
        Control::Leader(followers) => {
            let info = EngineInfo {
                model_name: spec.model.name(),
                max_context: config.max_context,
                kv_tokens: limits.num_pages * limits.page_tokens,
                config,
                tokenizer,
                mesh,
                vocab_size,
            };
            let engine = start_leader(runner, info, limits, followers, Arc::clone(&reporter))?;
            warm_up(&engine)?;
            Ok(Rank::Leader(engine))
        }
    }
}

/// Calls `load`, which uses the bytes of the plan, while other threads read them ahead of it; it is over when both are.
fn while_reading<T>(
    plan: &ReadingPlan,
    manifest: Option<&Manifest>,
    reporter: &dyn Reporter,
    load: impl FnOnce(&dyn Fn(f64)) -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    const TICK: Duration = Duration::from_millis(20);
    let (start, bytes_total) = (Instant::now(), plan.num_bytes());
    let (read, stop) = (AtomicU64::new(0), AtomicBool::new(false));
    let report = |loaded: f64| {
        let bytes_read = read.load(Ordering::Relaxed);
        reporter.load(Load { bytes_read, bytes_total, seconds: start.elapsed().as_secs_f64() });
        reporter.progress(loaded.min(bytes_read as f64 / bytes_total.max(1) as f64));
    };
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| plan.read(manifest, &read, &stop));
        let loaded = load(&report);
        stop.store(loaded.is_err(), Ordering::Relaxed);
        while !reading.is_finished() {
            report(1.0);
            std::thread::sleep(TICK);
        }
        report(1.0);
        // What is wrong with a file says more than what came of it.
        reading.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        loaded
    })
}

/// Decodes two tokens across all ranks: a prompt step and a decode step have then run everywhere.
fn warm_up(engine: &Engine) -> Result<(), EngineError> {
    let request = Request {
        prompt: vec![engine.info().config.bos_id.unwrap_or(0)],
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens: 2, ..Stopping::default() },
        logprobs: LogprobSpec::default(),
    };
    let mut row = engine.submit(request).map_err(EngineError::Warmup)?;
    while let Some(event) = row.events.blocking_recv() {
        if let Event::Failed(error) = event {
            // The engine's own error says more than the row's.
            return Err(engine.failure().map_or(EngineError::Warmup(error), EngineError::Running));
        }
    }
    Ok(())
}

impl Follower {
    /// Blocks until the run ends.
    ///
    /// # Errors
    /// A connection broke, rank 0's plan contradicts this rank's state, or the device failed.
    pub fn run(mut self) -> Result<(), EngineError> {
        let control = |source| EngineError::Control { peer: 0, source };
        let (mut plan, mut result) = (StepPlan::default(), StepResult::default());
        let mut bytes = Vec::new();
        loop {
            match wire::read_frame(&mut self.control, FRAME_MAX, &mut bytes).map_err(control)? {
                FRAME_PLAN => {}
                FRAME_END => return Ok(()),
                kind => return Err(EngineError::Desync(format!("rank 0 sent message {kind} instead of a plan"))),
            }
            plan.decode(&bytes).map_err(|error| EngineError::Desync(error.to_string()))?;
            self.runner.execute(&plan, &mut result)?;
            if self.sends_results {
                result.encode(&mut bytes);
                wire::write_frame(&mut self.control, FRAME_RESULT, &bytes).map_err(control)?;
            }
            if plan.step == 1 {
                self.reporter.phase(Phase::Ready);
            }
            self.reporter.steps(plan.step);
        }
    }
}

/// Why a rank could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    #[error("the checkpoint cannot be used")]
    Checkpoint(#[from] CheckpointError),
    #[error("the model cannot be split this way")]
    Mesh(#[from] MeshError),
    #[error("the device failed")]
    Backend(#[from] BackendError),
    #[error("the ranks could not connect")]
    Connect(#[from] ConnectError),
    #[error("communication between ranks failed")]
    Collective(#[from] CollectiveError),
    #[error("lost the control connection to rank {peer}")]
    Control {
        peer: usize,
        #[source]
        source: WireError,
    },
    #[error("ranks disagree: {0}")]
    Desync(String),
    #[error("the warm-up token could not be decoded")]
    Warmup(#[source] RowError),
    #[error("{0}")]
    Aborted(String),
    #[error("the system refused a thread")]
    Thread(#[from] std::io::Error),
    /// What ended a running engine, shared by all who ask.
    #[error(transparent)]
    Running(Arc<Self>),
}

impl EngineError {
    /// The error itself, however many handles share it.
    pub fn cause(&self) -> &Self {
        match self {
            Self::Running(error) => error.cause(),
            error => error,
        }
    }
}
