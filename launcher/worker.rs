//! One rank's process: finds its supervisor, takes part in the engine, tells how it goes, and never outlives the supervisor.

use std::fs::{self, OpenOptions};
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use nemotron_engine::chat::ChatTemplate;
use nemotron_engine::checkpoint;
use nemotron_engine::engine::Engine;
use nemotron_engine::job::{Job, JobError, JobProgress, Journal, JournalOptions};
use nemotron_engine::rank::{self, Device, EngineError, ModelSource, Peers, Rank, RankSpec};
use nemotron_engine::report::{Load, Phase, Reporter};
use nemotron_engine::serve::{self, ServeOptions};
use nemotron_engine::tokenizer::Tokenizer;
use nix::sys::prctl::set_pdeathsig;
use nix::sys::signal::{SigSet, Signal};
use nix::unistd::{dup2_stderr, dup2_stdout, getppid};
use tokio::sync::watch;

use crate::attempts::{self, Attempt};
use crate::cli::WorkerArgs;
use crate::env::{self, Environment};
use crate::health::devices;
use crate::job_file::load_job;
use crate::local::SUPERVISOR_PID;
use crate::model;
use crate::port::Port;
use crate::preflight;
use crate::process::{ProcessId, hostname};
use crate::rendezvous::{
    Down, Hello, Identity, Link, Messages, NETWORK_HINT, RankEnd, Up, connect, listen, own_addresses, run_key,
};
use crate::replicas;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, read_token};
use crate::slurm;
use crate::spec::{RunSpec, Task};
use crate::state::url_of;

/// How often a rank says that it is alive, and how far.
const HEARTBEAT: Duration = Duration::from_millis(500);

/// How long rank 0 may still tell its clients that the engine has failed or is being stopped.
const FAREWELL: Duration = Duration::from_millis(500);

pub(crate) fn run(args: &WorkerArgs) -> Outcome {
    // Until the connection to the supervisor takes over this duty.
    set_pdeathsig(Signal::SIGKILL).map_err(anyhow::Error::new)?;
    let environment = Environment::of_process();
    let parent = getppid().to_string();
    if environment.get(SUPERVISOR_PID).is_some_and(|supervisor| supervisor != parent) {
        return Err(Failure::msg(Exit::Communication, "the supervisor has ended already"));
    }
    let signals: SigSet = [Signal::SIGINT, Signal::SIGTERM, Signal::SIGHUP].into_iter().collect();
    signals.thread_block().map_err(anyhow::Error::new)?;

    let run_dir = RunDir::open(&args.run_dir).map_err(|failure| {
        // Whoever started this rank has seen it.
        let text = format!("{} cannot be seen on host {}", args.run_dir.display(), hostname());
        Failure::new(Exit::Preflight, failure.error.context(text))
            .hint("login.run_root must be a folder that every node sees")
    })?;
    let spec = run_dir.spec()?;
    let supervisor = &args.supervisor;
    let rank = args.rank.or_else(|| slurm::env::rank(&environment, spec.mesh.world_size())).ok_or_else(|| {
        let text = format!("this is no rank: neither --rank nor a Slurm step of {} tasks", spec.mesh.world_size());
        Failure::msg(Exit::Rendezvous, text)
    })?;
    if args.rank.is_none() {
        // Not srun's to write: what it says itself about a rank that never began would be mixed in, or lost.
        log_to(&run_dir.rank_log(args.attempt, rank))?;
    }
    // What is wrong here is said to the supervisor, so it waits for the connection to it.
    let interface = spec.site.as_ref().and_then(|site| site.interface.as_deref());
    let listening = own_addresses(interface, supervisor[0])
        .and_then(|own| listen(&own).context("cannot listen for other ranks"))
        .map_err(|error| Failure::new(Exit::Rendezvous, error).hint(NETWORK_HINT));
    let addresses = listening.as_ref().map_or_else(|_| Vec::new(), |(_, addresses)| addresses.clone());
    let ip = addresses.first().map_or(supervisor[0].ip(), SocketAddr::ip);
    let key = run_key(&run_dir.token()?);
    let identity = Identity::current(&run_dir, args.attempt)?;
    let hello = Hello { rank, process: ProcessId::current(), identity, addresses };
    let (link, messages) = connect(supervisor, &key, &hello, spec.deadlines.rendezvous)?;

    let (voice, post) = Post::open(link);
    let (peers_sender, peers) = channel();
    let (drain_sender, drain) = watch::channel(false);
    let endpoint = (rank == 0).then(|| run_dir.endpoint_file());
    let lifeline = Lifeline { messages, endpoint, peers: peers_sender, drain: drain_sender, post: Arc::clone(&post) };
    lifeline.hold().context("cannot start a thread")?;
    forward_signals(signals, Arc::clone(&post)).context("cannot start a thread")?;
    set_pdeathsig(None).map_err(anyhow::Error::new)?;

    let member = Member { rank, attempt: args.attempt, spec: &spec, run_dir: &run_dir, post: &post, ip };
    let outcome = listening.and_then(|(listener, _)| member.take_part(listener, key, &peers, drain));
    post.end(&outcome);
    // The last message is out when the voice falls silent.
    _ = voice.join();
    outcome
}

/// From now on stdout and stderr go to the file.
fn log_to(path: &Path) -> Outcome {
    let open = || -> std::io::Result<()> {
        let file = OpenOptions::new().append(true).create(true).mode(0o600).open(path)?;
        dup2_stdout(&file)?;
        Ok(dup2_stderr(&file)?)
    };
    let text = || format!("cannot write {} on host {}", path.display(), hostname());
    open().with_context(text).map_err(|error| Failure::new(Exit::Preflight, error))
}

/// What this rank has to say; said by a thread of its own, so that nobody who computes waits for the network.
struct Post {
    messages: Mutex<Sender<Up>>,
    phase: Mutex<Option<Phase>>,
    /// Bits of an f64.
    progress: AtomicU64,
    load: Mutex<Load>,
    steps: AtomicU64,
    busy_us: AtomicU64,
    engine: OnceLock<Engine>,
    job: Mutex<Option<JobProgress>>,
    /// The supervisor wants the end.
    stopped: AtomicBool,
    ended: AtomicBool,
}

impl Post {
    fn open(link: Link) -> (JoinHandle<()>, Arc<Self>) {
        let (sender, messages) = channel();
        let post = Arc::new(Self {
            messages: Mutex::new(sender),
            phase: Mutex::new(None),
            progress: AtomicU64::new(0),
            load: Mutex::default(),
            steps: AtomicU64::new(0),
            busy_us: AtomicU64::new(0),
            engine: OnceLock::new(),
            job: Mutex::new(None),
            stopped: AtomicBool::new(false),
            ended: AtomicBool::new(false),
        });
        let speaker = Arc::clone(&post);
        (std::thread::spawn(move || speaker.speak(&link, &messages)), post)
    }

    fn say(&self, message: Up) {
        // Nobody listens any more only when the process is about to end.
        _ = lock(&self.messages).send(message);
    }

    fn end(&self, outcome: &Outcome) {
        self.ended.store(true, Ordering::Relaxed);
        self.say(Up::End(RankEnd::of(outcome)));
    }

    /// Sends messages as they come and a heartbeat in between, until the last message. When the connection is broken, the lifeline ends
    /// the process.
    fn speak(&self, link: &Link, messages: &Receiver<Up>) {
        let mut next_beat = Instant::now();
        loop {
            let sent = match messages.recv_timeout(next_beat.saturating_duration_since(Instant::now())) {
                Ok(Up::End(end)) => {
                    _ = self.beat(link).and_then(|()| link.send(&Up::End(end)));
                    return;
                }
                // With the last word on the phase that is over.
                Ok(message @ Up::Phase { .. }) => self.beat(link).and_then(|()| link.send(&message)),
                Ok(message) => link.send(&message),
                Err(RecvTimeoutError::Timeout) => {
                    next_beat = Instant::now() + HEARTBEAT;
                    self.beat(link)
                }
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if sent.is_err() {
                return;
            }
        }
    }

    fn beat(&self, link: &Link) -> anyhow::Result<()> {
        let progress = f64::from_bits(self.progress.load(Ordering::Relaxed));
        let busy_s = self.busy_us.load(Ordering::Relaxed) as f64 / 1e6;
        let steps = self.steps.load(Ordering::Relaxed);
        link.send(&Up::Heartbeat { progress, steps, busy_s, load: *lock(&self.load) })?;
        match self.engine.get() {
            Some(engine) => link.send(&Up::Stats { stats: engine.stats(), job: *lock(&self.job) }),
            None => Ok(()),
        }
    }
}

impl Reporter for Post {
    fn phase(&self, phase: Phase) {
        if lock(&self.phase).replace(phase) != Some(phase) {
            self.progress.store(0, Ordering::Relaxed);
            self.say(Up::Phase { phase });
        }
    }

    fn progress(&self, done: f64) {
        self.progress.store(done.to_bits(), Ordering::Relaxed);
    }

    fn load(&self, load: Load) {
        *lock(&self.load) = load;
    }

    fn steps(&self, steps: u64) {
        self.steps.store(steps, Ordering::Relaxed);
    }

    fn busy(&self, busy: Duration) {
        self.busy_us.store(busy.as_micros() as u64, Ordering::Relaxed);
    }
}

/// What this rank needs to know when everybody is here.
struct Everybody {
    /// By rank.
    addresses: Vec<SocketAddr>,
    /// Until when a job's rows may run.
    deadline: Option<Instant>,
    daemon_port: Option<u16>,
}

/// The receiving side of the connection: as long as it stands, there is a supervisor.
struct Lifeline {
    messages: Messages,
    /// Of rank 0: what must not outlive it.
    endpoint: Option<PathBuf>,
    peers: Sender<Everybody>,
    drain: watch::Sender<bool>,
    post: Arc<Post>,
}

impl Lifeline {
    fn hold(mut self) -> std::io::Result<()> {
        std::thread::Builder::new().name("lifeline".into()).spawn(move || {
            loop {
                match self.messages.next() {
                    Ok(Down::Peers { addresses, seconds_left, daemon_port }) => {
                        let left = seconds_left.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
                        let deadline = left.map(|left| Instant::now() + left);
                        _ = self.peers.send(Everybody { addresses, deadline, daemon_port });
                    }
                    Ok(Down::Steps { steps }) => {
                        if let Some(engine) = self.post.engine.get() {
                            engine.set_rank_steps(steps);
                        }
                    }
                    Ok(Down::Drain) => _ = self.drain.send_replace(true),
                    // After the last message this process is ending, and has an error to print.
                    Ok(Down::Stop) if self.post.ended.load(Ordering::Relaxed) => {}
                    Ok(Down::Stop) => {
                        if let Some(engine) = self.post.engine.get() {
                            // The process ends by itself when all have been told.
                            self.post.stopped.store(true, Ordering::Relaxed);
                            engine.abort("the run is being stopped");
                            std::thread::sleep(2 * FAREWELL);
                        }
                        self.leave(0)
                    }
                    Err(error) => {
                        tracing::error!(%error, "the supervisor has gone");
                        self.leave(Exit::Communication as i32);
                    }
                }
            }
        })?;
        Ok(())
    }

    /// Ends the process, whatever its other threads wait for.
    fn leave(&self, code: i32) -> ! {
        if let Some(endpoint) = &self.endpoint {
            // It is not there before READY.
            _ = fs::remove_file(endpoint);
        }
        std::process::exit(code)
    }
}

/// A signal to one rank (a scheduler sends it to all) is a wish that the run ends; the supervisor decides how.
fn forward_signals(signals: SigSet, post: Arc<Post>) -> std::io::Result<()> {
    std::thread::Builder::new().name("signals".into()).spawn(move || {
        while let Ok(signal) = signals.wait() {
            // The end of a terminal concerns the supervisor alone.
            if signal != Signal::SIGHUP {
                post.say(Up::Signalled { interrupt: signal == Signal::SIGINT });
            }
        }
    })?;
    Ok(())
}

struct Member<'a> {
    rank: usize,
    attempt: u32,
    spec: &'a RunSpec,
    run_dir: &'a RunDir,
    post: &'a Arc<Post>,
    /// By which other hosts reach this one.
    ip: IpAddr,
}

/// What rank 0 needs for its task; made before anything is loaded, so that mistakes show at once.
enum Errand {
    Serve { port: Port, token: Option<String>, strict: bool, chat: ChatTemplate },
    Job { job: Box<Job>, tokenizer: Tokenizer, journal: Box<Journal> },
}

impl Member<'_> {
    /// From preflight to the end.
    fn take_part(
        &self,
        listener: TcpListener,
        secret: Vec<u8>,
        peers: &Receiver<Everybody>,
        drain: watch::Receiver<bool>,
    ) -> Outcome {
        self.post.phase(Phase::Preflight);
        if self.spec.device == Device::Cuda {
            self.preflight_device()?;
        }
        if self.spec.site.is_some() && self.spec.local_rank(self.rank) == 0 {
            // The first rank of a node looks for all of its node.
            preflight::model(&self.spec.model, self.spec.mesh)?;
            preflight::folder(self.run_dir.path(), "login.run_root")?;
        }
        let errand = if self.rank == 0 { Some(self.preflight()?) } else { None };
        self.post.phase(Phase::Rendezvous);
        let Everybody { addresses, deadline: job_deadline, daemon_port } =
            peers.recv().context("the lifeline has ended")?;
        if let Some(port) = daemon_port {
            let post = Arc::clone(self.post);
            let watch = move || slurm::daemon::watch(port, |there| post.say(Up::Daemon { there }));
            std::thread::Builder::new().name("slurmd watch".into()).spawn(watch).context("cannot start a thread")?;
        }
        let deadline = Instant::now() + self.spec.deadlines.comm_init;
        let peers = (addresses.len() > 1).then_some(Peers { listener, addresses, secret, deadline });
        let reporter: Arc<dyn Reporter> = Arc::<Post>::clone(self.post);
        let rank = rank::start(&self.rank_spec(), peers, reporter)?;
        self.post.phase(Phase::Ready);
        match (rank, errand) {
            (Rank::Leader(engine), Some(errand)) => self.lead(&engine, errand, job_deadline, drain),
            (Rank::Follower(follower), None) => Ok(follower.run()?),
            _ => Err(Failure::msg(Exit::Internal, "rank 0 and only rank 0 leads")),
        }
    }

    /// The device is fit; when the driver says later that it is lost, this rank ends.
    fn preflight_device(&self) -> Outcome {
        let environment = Environment::of_process();
        let visible = environment.get(env::VISIBLE_DEVICES).map(str::to_owned);
        devices::of_rank(self.spec, self.rank, visible.as_deref())?;
        let (ordinal, post) = (self.spec.local_rank(self.rank), Arc::clone(self.post));
        let watch = move || {
            if let Some(failure) = devices::watch(ordinal, visible.as_deref()) {
                let exit = failure.exit;
                failure.print(false);
                post.end(&Err(failure));
                // Nothing that waits for the device would ever return.
                std::thread::sleep(FAREWELL);
                std::process::exit(exit as i32);
            }
        };
        std::thread::Builder::new().name("device watch".into()).spawn(watch).context("cannot start a thread")?;
        Ok(())
    }

    fn rank_spec(&self) -> RankSpec {
        let spec = self.spec;
        RankSpec {
            rank: self.rank,
            mesh: spec.mesh,
            model: spec.model.clone(),
            device: spec.device,
            dtype: spec.dtype,
            threads: spec.threads,
            limits: spec.limits,
            device_ordinal: spec.local_rank(self.rank),
            library_folders: env::library_folders(&Environment::of_process()),
        }
    }

    fn preflight(&self) -> Outcome<Errand> {
        match &self.spec.task {
            &Task::Serve { host, port, no_auth, ref token_file, strict, idle_s: _ } => {
                let token = match (no_auth, token_file) {
                    (true, _) => None,
                    (false, Some(file)) => {
                        Some(read_token(file).map_err(|error| Failure::new(Exit::Preflight, error))?)
                    }
                    (false, None) => Some(self.run_dir.token()?),
                };
                let folder = match &self.spec.model {
                    ModelSource::Path(path) => Some(model::directory(path)),
                    ModelSource::Builtin => None,
                };
                let chat = match checkpoint::open(&self.spec.model)?.chat_template() {
                    Some(template) => ChatTemplate::from_source(&template, "of the checkpoint"),
                    None => ChatTemplate::for_checkpoint(folder.as_deref()),
                };
                let chat = chat.map_err(|error| Failure::new(Exit::Checkpoint, error))?;
                Ok(Errand::Serve { port: Port::bind((host, port).into())?, token, strict, chat })
            }
            Task::Job { file, limit, overrides, deadline_s: _ } => {
                let job = load_job(file, overrides)?;
                let folder = job.path.parent().unwrap_or(self.run_dir.path());
                let checkpoint = checkpoint::open(&self.spec.model)?;
                let tokenizer = checkpoint.tokenizer()?;
                let model = format!(
                    "{} {:?} {:?}",
                    checkpoint::identity(checkpoint.as_ref())?,
                    self.spec.device,
                    self.spec.dtype
                );
                let job = Box::new(Job::load(&job.file, folder, *limit, &tokenizer)?);
                let journal = Box::new(job.open_journal(self.journal(model)?)?);
                Ok(Errand::Job { job, tokenizer, journal })
            }
        }
    }

    fn journal(&self, model: String) -> Outcome<JournalOptions> {
        let (run_dir, attempt) = (self.run_dir, self.attempt);
        let crashed = |attempt: &Attempt| attempt.end.as_ref().is_some_and(|end| end.crashed);
        let earlier = attempts::read(run_dir)?.into_iter().filter(|earlier| earlier.attempt < attempt);
        Ok(JournalOptions {
            dir: run_dir.journal(),
            attempt,
            allow_changed: run_dir.allow_changed_file(attempt).exists(),
            model,
            crashed: earlier.filter(crashed).map(|earlier| earlier.attempt).collect(),
            patience: self.spec.deadlines.storage,
            share: replicas::share(run_dir, self.spec),
        })
    }

    fn lead(
        &self,
        engine: &Engine,
        errand: Errand,
        deadline: Option<Instant>,
        mut drain: watch::Receiver<bool>,
    ) -> Outcome {
        _ = self.post.engine.set(engine.clone());
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
        let runtime = runtime.context("cannot start the threads that serve")?;
        let asked_to_drain = async move {
            // The sender lives as long as the process.
            _ = drain.wait_for(|&drain| drain).await;
        };
        let outcome = runtime.block_on(async {
            let mut errand = std::pin::pin!(self.run_errand(engine, errand, deadline, asked_to_drain));
            let outcome = tokio::select! {
                biased;
                outcome = &mut errand => outcome,
                // Those that it serves are told by the errand itself.
                _ = engine.failed() => tokio::time::timeout(FAREWELL, errand).await.unwrap_or(Ok(())),
            };
            match engine.failure() {
                Some(_) if self.post.stopped.load(Ordering::Relaxed) => Ok(()),
                Some(error) => Err(EngineError::Running(error).into()),
                None => outcome,
            }
        });
        // Connections that idle clients hold open must not hold up the end.
        runtime.shutdown_background();
        outcome
    }

    async fn run_errand(
        &self,
        engine: &Engine,
        errand: Errand,
        deadline: Option<Instant>,
        asked_to_drain: impl Future<Output = ()> + Send + 'static,
    ) -> Outcome {
        match errand {
            Errand::Serve { port, token, strict, chat } => {
                let listener = port.listen()?;
                let mut address = listener.local_addr().context("cannot listen")?;
                if address.ip().is_unspecified() && self.spec.site.is_some() {
                    address.set_ip(self.ip);
                }
                let url = url_of(address);
                self.post.say(Up::Ready { url: Some(url) });
                let options = ServeOptions { listener, token, strict, chat };
                let (tokenizer, failing) = (engine.info().tokenizer.clone(), engine.clone());
                let over = async move {
                    tokio::select! {
                        () = asked_to_drain => {}
                        _ = failing.failed() => {}
                    }
                };
                let served = serve::run(engine.clone(), tokenizer, options, over).await;
                Ok(served.context("the server failed")?)
            }
            Errand::Job { job, tokenizer, journal } => {
                self.post.say(Up::Ready { url: None });
                let progress = |progress| *lock(&self.post.job) = Some(progress);
                match job.run(engine, &tokenizer, *journal, deadline, &progress, asked_to_drain).await {
                    Ok(progress) => {
                        *lock(&self.post.job) = Some(progress);
                        Ok(())
                    }
                    Err(error) => match (error, engine.failure()) {
                        // The engine says with which exit code it failed.
                        (JobError::Engine(_), Some(cause)) => Err(EngineError::Running(cause).into()),
                        (error, _) => Err(error.into()),
                    },
                }
            }
        }
    }
}

/// What is guarded is replaced as a whole, so a panic elsewhere leaves it usable.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
