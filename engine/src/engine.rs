//! The engine as its users see it: submit a [`Request`], get a stream of [`Event`]s. Behind it, rank 0's thread plans steps, sends the plans
//! to all ranks, runs its own part, and hands out what was sampled.

use std::collections::VecDeque;
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use tokio::sync::mpsc::{Receiver, channel};
use tokio::sync::{Semaphore, watch};

use crate::backend::Backend;
use crate::collective::Collective;
use crate::config::{Mesh, ModelConfig};
use crate::rank::EngineError;
use crate::report::Reporter;
use crate::request::{Event, Request, RowError};
use crate::runner::Runner;
use crate::scheduler::Scheduler;
use crate::sequence::Sequence;
use crate::spec::Limits;
use crate::step::{StepPlan, StepResult};
use crate::tokenizer::Tokenizer;
use crate::wire;

/// A step plan for the follower that reads it.
pub(crate) const FRAME_PLAN: u8 = 1;
/// What the sampling rank found.
pub(crate) const FRAME_RESULT: u8 = 2;
/// The run is over.
pub(crate) const FRAME_END: u8 = 3;
/// How long the engine looks away when no row can go on before its client has read.
const STALL_PAUSE: Duration = Duration::from_millis(2);
/// No message between ranks is longer.
pub(crate) const FRAME_MAX: usize = 1 << 30;

/// A handle to the running engine; cheap to clone. The engine ends when the last handle is dropped.
#[derive(Clone)]
pub struct Engine {
    commands: mpsc::Sender<Sequence>,
    shared: Arc<Shared>,
}

/// A submitted row. Dropping it cancels the row and frees its KV pages.
pub struct Row {
    pub id: u64,
    pub events: Receiver<Event>,
}

/// What does not change while the engine runs.
#[derive(Clone)]
pub struct EngineInfo {
    /// Name for people and for `/v1/models`.
    pub model_name: String,
    pub config: ModelConfig,
    pub tokenizer: Tokenizer,
    pub mesh: Mesh,
    /// Ids that prompts may have and that can be sampled.
    pub vocab_size: usize,
    /// Tokens that prompt and completion may have together.
    pub max_context: usize,
    /// Tokens that the KV cache holds.
    pub kv_tokens: usize,
    /// Rows that run at the same time.
    pub max_sequences: usize,
}

/// Counters since start, and gauges.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
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

struct Shared {
    info: EngineInfo,
    next_id: AtomicU64,
    draining: AtomicBool,
    /// Rows that were submitted and have not ended.
    active: watch::Sender<usize>,
    failed: watch::Sender<Option<Arc<EngineError>>>,
    gauges: Gauges,
    /// See [`Engine::rank_steps`].
    rank_steps: Mutex<Vec<u64>>,
}

#[derive(Default)]
struct Gauges {
    running: AtomicUsize,
    pages_used: AtomicUsize,
    pages_total: AtomicUsize,
    prompt_tokens: AtomicU64,
    generated_tokens: AtomicU64,
    finished_rows: AtomicU64,
    steps: AtomicU64,
}

impl Engine {
    /// Queues a row of group 0.
    ///
    /// # Errors
    /// As those of [`Self::submit_in`].
    pub fn submit(&self, request: Request) -> Result<Row, RowError> {
        self.submit_in(0, request)
    }

    /// A number for [`Self::submit_in`] that nobody else has.
    pub fn new_group(&self) -> u64 {
        self.shared.next_id.fetch_add(1, Ordering::Relaxed)
    }

    /// Queues a row of a group. Waiting groups take turns, so that one of many rows does not hold up the others.
    ///
    /// # Errors
    /// The row can never be generated (empty prompt, too long, unknown id), or the engine has stopped.
    pub fn submit_in(&self, group: u64, request: Request) -> Result<Row, RowError> {
        let shared = &self.shared;
        shared.info.check(&request)?;
        if shared.draining.load(Ordering::Acquire) {
            return Err(RowError::ShuttingDown);
        }
        let id = shared.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, events) = channel(Semaphore::MAX_PERMITS);
        shared.active.send_modify(|active| *active += 1);
        if self.commands.send(Sequence::new(id, group, request, sender)).is_err() {
            shared.active.send_modify(|active| *active -= 1);
            let reason = shared.failed.borrow().as_ref().map_or_else(|| "it has stopped".into(), ToString::to_string);
            return Err(RowError::EngineFailed(reason));
        }
        Ok(Row { id, events })
    }

    pub fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    /// A snapshot of counters and gauges.
    pub fn stats(&self) -> EngineStats {
        let gauges = &self.shared.gauges;
        let running = gauges.running.load(Ordering::Relaxed);
        EngineStats {
            // Rows that the engine's thread has not seen yet wait too.
            waiting: self.shared.active.borrow().saturating_sub(running),
            running,
            prompt_tokens: gauges.prompt_tokens.load(Ordering::Relaxed),
            generated_tokens: gauges.generated_tokens.load(Ordering::Relaxed),
            finished_rows: gauges.finished_rows.load(Ordering::Relaxed),
            kv_pages_used: gauges.pages_used.load(Ordering::Relaxed),
            kv_pages_total: gauges.pages_total.load(Ordering::Relaxed),
            steps: gauges.steps.load(Ordering::Relaxed),
        }
    }

    /// Steps that each rank has completed, as whoever watches all ranks has told last; empty before.
    pub fn rank_steps(&self) -> Vec<u64> {
        self.shared.rank_steps.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn set_rank_steps(&self, steps: Vec<u64>) {
        *self.shared.rank_steps.lock().unwrap_or_else(PoisonError::into_inner) = steps;
    }

    /// Refuses new rows from now on; resolves when no submitted row is left.
    pub async fn drain(&self) {
        self.shared.draining.store(true, Ordering::Release);
        // The sender lives in `shared`, so waiting cannot fail.
        let _ = self.shared.active.subscribe().wait_for(|active| *active == 0).await;
    }

    pub fn is_draining(&self) -> bool {
        self.shared.draining.load(Ordering::Acquire)
    }

    /// Declares that the engine has failed for a reason outside of it, so that whoever waits for it gives up. The first reason stays.
    pub fn abort(&self, reason: &str) {
        self.shared.fail(EngineError::Aborted(reason.into()));
    }

    /// Why the engine has failed, if it has.
    pub fn failure(&self) -> Option<Arc<EngineError>> {
        self.shared.failed.borrow().clone()
    }

    /// Resolves when the engine has failed: a rank was lost, or the device failed.
    pub async fn failed(&self) -> Arc<EngineError> {
        let mut failed = self.shared.failed.subscribe();
        match failed.wait_for(Option::is_some).await.ok().and_then(|error| error.clone()) {
            Some(error) => error,
            None => std::future::pending().await,
        }
    }
}

impl Shared {
    fn fail(&self, error: EngineError) {
        self.failed.send_if_modified(|failed| {
            let first = failed.is_none();
            failed.get_or_insert(Arc::new(error));
            first
        });
    }
}

impl EngineInfo {
    fn check(&self, request: &Request) -> Result<(), RowError> {
        match (self.config.reward.is_some(), request.logprobs.rewards) {
            (true, false) => return Err(RowError::OnlyScores),
            (false, true) => return Err(RowError::CannotScore),
            _ => {}
        }
        if request.prompt.is_empty() {
            return Err(RowError::EmptyPrompt);
        }
        let vocab_size = self.vocab_size;
        if let Some(id) = request.prompt.iter().find(|id| **id as usize >= vocab_size) {
            return Err(RowError::UnknownToken { id: *id, vocab_size });
        }
        let needed = request.prompt.len() + request.stopping.max_new_tokens as usize;
        if needed > self.max_context {
            return Err(RowError::TooLong { needed, limit: self.max_context });
        }
        if needed > self.kv_tokens {
            return Err(RowError::KvTooSmall { needed, limit: self.kv_tokens });
        }
        Ok(())
    }
}

/// Rank 0's thread.
pub(crate) struct Leader<B: Backend, C> {
    runner: Runner<B, C>,
    scheduler: Scheduler,
    /// Connections to ranks 1.., in order.
    followers: Vec<TcpStream>,
    sampling_rank: usize,
    commands: mpsc::Receiver<Sequence>,
    shared: Arc<Shared>,
    reporter: Arc<dyn Reporter>,
    plan: StepPlan,
    result: StepResult,
    bytes: Vec<u8>,
    /// Micro-batches whose results are outstanding, oldest first.
    in_flight: VecDeque<usize>,
    steps: u64,
}

/// Starts rank 0's thread over a loaded runner.
pub(crate) fn start_leader<B: Backend + 'static, C: Collective<B> + 'static>(
    runner: Runner<B, C>,
    info: EngineInfo,
    limits: Limits,
    followers: Vec<TcpStream>,
    reporter: Arc<dyn Reporter>,
) -> std::io::Result<Engine> {
    let (commands, receiver) = mpsc::channel();
    let mesh = info.mesh;
    let scheduler = Scheduler::new(limits, mesh.pp, info.vocab_size, info.tokenizer.clone());
    let gauges = Gauges { pages_total: AtomicUsize::new(limits.num_pages), ..Gauges::default() };
    let shared = Arc::new(Shared {
        info,
        next_id: AtomicU64::new(1),
        draining: AtomicBool::new(false),
        active: watch::Sender::new(0),
        failed: watch::Sender::new(None),
        gauges,
        rank_steps: Mutex::default(),
    });
    let leader = Leader {
        runner,
        scheduler,
        followers,
        sampling_rank: mesh.sampling_rank(),
        commands: receiver,
        shared: Arc::clone(&shared),
        reporter,
        plan: StepPlan::default(),
        result: StepResult::default(),
        bytes: Vec::new(),
        in_flight: VecDeque::with_capacity(mesh.pp),
        steps: 0,
    };
    std::thread::Builder::new().name("engine".into()).spawn(move || leader.run())?;
    Ok(Engine { commands, shared })
}

impl<B: Backend, C: Collective<B>> Leader<B, C> {
    fn run(mut self) {
        if let Err(error) = self.run_steps() {
            let row_error = RowError::EngineFailed(error.to_string());
            // Seen before any row's failure is, so that whoever asks why finds the answer.
            self.shared.fail(error);
            let ended = self.scheduler.fail_all(&row_error);
            self.end_rows(ended);
            self.publish();
            for sequence in self.commands.try_iter() {
                sequence.emit(Event::Failed(row_error.clone()));
                self.shared.active.send_modify(|active| *active -= 1);
            }
        }
    }

    /// Until all handles are dropped and nothing is left to do.
    fn run_steps(&mut self) -> Result<(), EngineError> {
        let num_micro_batches = self.shared.info.mesh.pp;
        let (mut micro_batch, mut stalled) = (0, 0);
        loop {
            if !self.take_commands() {
                return self.end_followers();
            }
            while self.in_flight.contains(&micro_batch) {
                self.receive()?;
            }
            let cancelled = self.scheduler.plan(micro_batch, &mut self.plan);
            self.end_rows(cancelled);
            if !self.plan.is_empty() {
                self.execute(micro_batch)?;
                stalled = 0;
            } else if !self.in_flight.is_empty() {
                self.receive()?;
            } else if stalled < num_micro_batches {
                stalled += 1;
            } else {
                // Every row waits for a client that reads slowly.
                std::thread::sleep(STALL_PAUSE);
            }
            self.publish();
            micro_batch = (micro_batch + 1) % num_micro_batches;
        }
    }

    /// Moves submitted rows to the scheduler; waits for one when there is nothing else to do. False when no handle is left.
    fn take_commands(&mut self) -> bool {
        loop {
            let idle = self.scheduler.is_idle() && self.in_flight.is_empty();
            let command = if idle {
                self.commands.recv().map_err(|_| mpsc::TryRecvError::Disconnected)
            } else {
                self.commands.try_recv()
            };
            match command {
                Ok(sequence) => {
                    let tokens = sequence.request.prompt.len() as u64;
                    self.shared.gauges.prompt_tokens.fetch_add(tokens, Ordering::Relaxed);
                    self.scheduler.add(sequence);
                }
                Err(mpsc::TryRecvError::Empty) => return true,
                Err(mpsc::TryRecvError::Disconnected) => return !idle,
            }
        }
    }

    /// Carries the plan out, and, while devices go on by themselves, steps that follow it.
    fn execute(&mut self, micro_batch: usize) -> Result<(), EngineError> {
        self.launch()?;
        self.in_flight.push_back(micro_batch);
        if self.sampling_rank != 0 {
            return self.collect();
        }
        loop {
            // The next step is on the device before the host waits for this one: what hides a round trip where no other micro-batch does.
            let is_followed = self.runner.feeds() && self.take_commands() && self.scheduler.plan_ahead(&mut self.plan);
            if is_followed {
                self.launch()?;
                self.in_flight.push_back(micro_batch);
            }
            self.collect()?;
            self.in_flight.pop_front();
            self.complete();
            if !is_followed {
                return Ok(());
            }
            self.publish();
        }
    }

    /// Sends the plan to all ranks and launches this rank's part of it.
    fn launch(&mut self) -> Result<(), EngineError> {
        self.steps += 1;
        self.plan.step = self.steps;
        if !self.followers.is_empty() {
            self.plan.encode(&mut self.bytes);
            for (index, follower) in self.followers.iter_mut().enumerate() {
                wire::write_frame(follower, FRAME_PLAN, &self.bytes)
                    .map_err(|source| EngineError::Control { peer: index + 1, source })?;
            }
        }
        self.runner.launch(&self.plan)
    }

    /// Waits for this rank's part of the oldest step.
    fn collect(&mut self) -> Result<(), EngineError> {
        self.runner.collect(&mut self.result)?;
        self.reporter.busy(self.runner.busy());
        self.reporter.steps(self.result.step);
        self.shared.gauges.steps.store(self.result.step, Ordering::Relaxed);
        Ok(())
    }

    /// Waits for the oldest outstanding result.
    fn receive(&mut self) -> Result<(), EngineError> {
        let peer = self.sampling_rank;
        let control = |source| EngineError::Control { peer, source };
        let kind = wire::read_frame(&mut self.followers[peer - 1], FRAME_MAX, &mut self.bytes).map_err(control)?;
        if kind != FRAME_RESULT {
            return Err(EngineError::Desync(format!("rank {peer} sent message {kind} instead of a result")));
        }
        self.result.decode(&self.bytes).map_err(|error| EngineError::Desync(error.to_string()))?;
        self.in_flight.pop_front();
        self.complete();
        Ok(())
    }

    fn complete(&mut self) {
        let (generated, ended) = self.scheduler.complete(&mut self.result);
        self.shared.gauges.generated_tokens.fetch_add(generated as u64, Ordering::Relaxed);
        self.shared.gauges.finished_rows.fetch_add(ended as u64, Ordering::Relaxed);
        self.end_rows(ended);
    }

    fn end_rows(&self, ended: usize) {
        if ended > 0 {
            self.shared.active.send_modify(|active| *active -= ended);
        }
    }

    fn publish(&self) {
        let gauges = &self.shared.gauges;
        gauges.running.store(self.scheduler.num_running(), Ordering::Relaxed);
        gauges.pages_used.store(self.scheduler.pages_used(), Ordering::Relaxed);
    }

    fn end_followers(&mut self) -> Result<(), EngineError> {
        for (index, follower) in self.followers.iter_mut().enumerate() {
            wire::write_frame(follower, FRAME_END, &[])
                .map_err(|source| EngineError::Control { peer: index + 1, source })?;
        }
        Ok(())
    }
}
