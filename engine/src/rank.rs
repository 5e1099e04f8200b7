//! One rank, from its specification to a running part of the engine.

use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crate::backend::cpu::CpuBackend;
use crate::backend::cuda::peers::PeerArea;
use crate::backend::cuda::{CudaBackend, CudaOptions};
use crate::backend::{Backend, BackendError};
use crate::checkpoint::{self, CheckpointError, CheckpointSource, Manifest, ReadingPlan};
use crate::collective::host::HostCollective;
use crate::collective::nccl::{Nccl, NcclCollective, UniqueId};
use crate::collective::{Collective, CollectiveError, Metered};
use crate::config::{Mesh, MeshError, ModelConfig};
use crate::engine::{Engine, EngineInfo, FRAME_END, FRAME_MAX, FRAME_PLAN, FRAME_RESULT, start_leader};
use crate::memory::rank_memory;
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
    /// [`follow`] on some backend.
    follow: Box<dyn FnOnce() -> Result<(), EngineError> + Send>,
}

/// Connects to the peers, loads this rank's part of the checkpoint, and, on rank 0, decodes a warm-up token across all ranks.
///
/// `peers` is `None` exactly when the mesh has one rank.
///
/// # Errors
/// The device is not usable, the model does not suit the mesh, the checkpoint is bad, memory is short, or a peer is lost.
pub fn start(spec: &RankSpec, peers: Option<Peers>, reporter: Arc<dyn Reporter>) -> Result<Rank, EngineError> {
    let source = checkpoint::open_for(&spec.model, spec.mesh)?;
    spec.mesh.check(source.config())?;
    match spec.device {
        Device::Cpu => {
            let backend = CpuBackend::new(spec.threads, spec.dtype)?;
            reporter.phase(Phase::CommInit);
            let (collective, control) = connect(spec, peers)?;
            lead_or_follow(spec, source.as_ref(), backend, Metered::new(collective), control, reporter)
        }
        Device::Cuda => {
            let backend = CudaBackend::new(&cuda_options(spec, source.config()), spec.dtype)?;
            backend.check_room(cuda_bytes(spec, source.config()))?;
            reporter.phase(Phase::CommInit);
            let deadline = peers.as_ref().map(|peers| peers.deadline);
            let (_, control) = connect(spec, peers)?;
            let collective = match deadline {
                Some(deadline) => Some(join_devices(spec, source.config(), &backend, &control, deadline)?),
                None => None,
            };
            lead_or_follow(spec, source.as_ref(), backend, collective, control, reporter)
        }
    }
}

/// Connections to the other ranks.
fn connect(spec: &RankSpec, peers: Option<Peers>) -> Result<(HostCollective, Control), EngineError> {
    let Some(peers) = peers else { return Ok((HostCollective::single(), Control::Leader(Vec::new()))) };
    let connected = connect_mesh(peers, spec.mesh, spec.rank)?;
    Ok((connected.collective, connected.control))
}

fn cuda_options(spec: &RankSpec, config: &ModelConfig) -> CudaOptions {
    CudaOptions {
        ordinal: spec.device_ordinal,
        library_folders: spec.library_folders.clone(),
        limits: spec.limits,
        max_context: config.max_context,
    }
}

/// What the model and its cache will take of the device's memory.
fn cuda_bytes(spec: &RankSpec, config: &ModelConfig) -> u64 {
    let Limits { num_pages, page_tokens, .. } = spec.limits;
    let memory = rank_memory(config, spec.mesh, spec.rank, spec.dtype, spec.device, &spec.limits);
    memory.fixed() + (num_pages * page_tokens) as u64 * memory.kv_bytes_per_token
}

/// Joins this rank's device with the others.
fn join_devices(
    spec: &RankSpec,
    config: &ModelConfig,
    backend: &CudaBackend,
    control: &Control,
    deadline: Instant,
) -> Result<NcclCollective, EngineError> {
    let nccl = Nccl::load(&spec.library_folders)?;
    let mut id = match control {
        Control::Leader(_) => nccl.unique_id()?,
        Control::Follower(_) => UniqueId([0; 128]),
    };
    control.broadcast(&mut id.0, deadline)?;
    let device = backend.device();
    let bytes = NcclCollective::received_bytes(config, spec.mesh, spec.limits.max_step_tokens);
    let received = device.allocate("data of other ranks", bytes)?;
    let limit = deadline.saturating_duration_since(Instant::now());
    let area = if spec.mesh.tp > 1 { Some(PeerArea::new(device, config.hidden_size)?) } else { None };
    Ok(NcclCollective::join(&nccl, device, id, (spec.mesh, spec.rank), limit, (received, area))?)
}

/// Loads the model and starts this rank's part of the engine.
fn lead_or_follow<B: Backend + 'static>(
    spec: &RankSpec,
    source: &dyn CheckpointSource,
    backend: B,
    collective: impl Collective<B> + 'static,
    control: Control,
    reporter: Arc<dyn Reporter>,
) -> Result<Rank, EngineError> {
    let RankSpec { rank, mesh, limits, .. } = *spec;
    reporter.phase(Phase::Loading);
    let (config, tokenizer) = (source.config().clone(), source.tokenizer()?);
    let vocab_size = config.vocab_size.min(tokenizer.vocab_size());
    let plan = ReadingPlan::of_rank(source, mesh, rank)?;
    let manifest = Manifest::of(&spec.model)?;
    let model = while_reading(&plan, manifest.as_ref(), reporter.as_ref(), |progress| {
        Model::load(backend, collective, source, mesh, rank, &limits, progress)
    })?;
    let runner = Runner::new(model, vocab_size, limits.max_sequences);

    reporter.phase(Phase::Warmup);
    match control {
        Control::Follower(control) => {
            let follow = Box::new(move || follow(runner, control, reporter.as_ref(), mesh, rank));
            Ok(Rank::Follower(Box::new(Follower { follow })))
        }
        Control::Leader(followers) => {
            let info = EngineInfo {
                model_name: spec.model.name(),
                max_context: config.max_context,
                kv_tokens: limits.num_pages * limits.page_tokens,
                max_sequences: limits.max_sequences,
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
    let read_seconds = OnceLock::new();
    let report = |loaded: f64| {
        let (bytes_read, seconds) = (read.load(Ordering::Relaxed), start.elapsed().as_secs_f64());
        let read_seconds = read_seconds.get().copied().unwrap_or(seconds);
        reporter.load(Load { bytes_read, bytes_total, read_seconds, seconds });
        reporter.progress(loaded.min(bytes_read as f64 / bytes_total.max(1) as f64));
    };
    std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let outcome = plan.read(manifest, &|_| (), &read, &stop);
            _ = read_seconds.set(start.elapsed().as_secs_f64());
            outcome
        });
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

/// Decodes two tokens across all ranks: a prompt step and a decode step have then run everywhere. A reward model scores one token.
fn warm_up(engine: &Engine) -> Result<(), EngineError> {
    let rewards = engine.info().config.reward.is_some();
    let request = Request {
        prompt: vec![engine.info().config.bos_id.unwrap_or(0)],
        sampling: Sampling::default(),
        stopping: Stopping { max_new_tokens: if rewards { 1 } else { 2 }, ..Stopping::default() },
        logprobs: LogprobSpec { rewards, ..LogprobSpec::default() },
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
    pub fn run(self) -> Result<(), EngineError> {
        (self.follow)()
    }
}

/// Executes plans until rank 0 ends the run.
fn follow<B: Backend, C: Collective<B>>(
    mut runner: Runner<B, C>,
    mut control: TcpStream,
    reporter: &dyn Reporter,
    mesh: Mesh,
    rank: usize,
) -> Result<(), EngineError> {
    let lost = |source| EngineError::Control { peer: 0, source };
    // Rank 0 may send the next plan while a step runs, and this rank must then not keep its device waiting.
    let looks_ahead = B::CHOOSES && mesh.pp == 1;
    let (mut plan, mut result) = (StepPlan::default(), StepResult::default());
    let mut bytes = Vec::new();
    loop {
        // What runs is watched until the next plan is there.
        while runner.num_in_flight() > 0 {
            if looks_ahead && !runner.is_done()? {
                match wire::has_arrived(&control).map_err(|error| lost(error.into()))? {
                    true if runner.num_in_flight() == 1 => break,
                    _ => continue,
                }
            }
            runner.collect(&mut result)?;
            if rank == mesh.sampling_rank() {
                result.encode(&mut bytes);
                wire::write_frame(&mut control, FRAME_RESULT, &bytes).map_err(lost)?;
            }
            if result.step == 1 {
                reporter.phase(Phase::Ready);
            }
            reporter.busy(runner.busy());
            reporter.steps(result.step);
        }
        match wire::read_frame(&mut control, FRAME_MAX, &mut bytes).map_err(lost)? {
            FRAME_PLAN => {}
            FRAME_END => return Ok(()),
            kind => return Err(EngineError::Desync(format!("rank 0 sent message {kind} instead of a plan"))),
        }
        plan.decode(&bytes).map_err(|error| EngineError::Desync(error.to_string()))?;
        runner.launch(&plan)?;
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
