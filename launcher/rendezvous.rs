//! How ranks and supervisor find each other, and what they say: one authenticated connection a rank, which lives as long as the rank does.
//!
//! The same connection is the rank's lifeline: when it ends, the rank's process ends, and when a process ends, the supervisor knows.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hmac::{Hmac, Mac as _};
use nemotron_engine::engine::EngineStats;
use nemotron_engine::job::JobProgress;
use nemotron_engine::report::Phase;
use nemotron_engine::wire::{self, Acceptor};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::process::ProcessId;
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, hex};

/// What the handshake between a rank and its supervisor authenticates.
const LABEL: &str = "nemotron supervisor";
/// The one kind of frame on these connections.
const JSON: u8 = 0;
/// Bytes of a message at most.
const MAX_MESSAGE: usize = 1 << 20;

/// A rank introduces itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) rank: usize,
    pub(crate) process: ProcessId,
    pub(crate) identity: Identity,
    /// Where the other ranks reach this one.
    pub(crate) address: SocketAddr,
}

/// What must be equal on every rank and in the supervisor.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Identity {
    pub(crate) version: String,
    /// SHA-256 of the executable.
    pub(crate) build: String,
    /// SHA-256 of `run.lock.toml`.
    pub(crate) config: String,
    pub(crate) attempt: u32,
}

impl Identity {
    pub(crate) fn current(run_dir: &RunDir, attempt: u32) -> anyhow::Result<Self> {
        let digest = |path: &std::path::Path| -> anyhow::Result<String> {
            let mut hash = Sha256::new();
            let read = std::fs::File::open(path).and_then(|mut file| io::copy(&mut file, &mut hash));
            read.with_context(|| format!("cannot read {}", path.display()))?;
            Ok(hex(&hash.finalize()))
        };
        Ok(Self {
            version: env!("CARGO_PKG_VERSION").into(),
            build: digest(std::path::Path::new("/proc/self/exe"))?,
            config: digest(&run_dir.lock_file())?,
            attempt,
        })
    }

    /// The first field in which `other` differs, with both values.
    pub(crate) fn difference(&self, other: &Self) -> Option<String> {
        let fields = [
            ("version", &self.version, &other.version),
            ("build", &self.build, &other.build),
            ("config", &self.config, &other.config),
            ("attempt", &self.attempt.to_string(), &other.attempt.to_string()),
        ];
        let (field, ours, theirs) = fields.into_iter().find(|(_, ours, theirs)| ours != theirs)?;
        Some(format!("{field} is {theirs} there and {ours} here"))
    }
}

/// What a rank tells the supervisor.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Up {
    /// The rank entered a phase; `Rendezvous` says that its preflight is over.
    Phase { phase: Phase },
    /// Sent twice a second whatever happens: share of the phase that is done, steps since start.
    Heartbeat { progress: f64, steps: u64 },
    /// Rank 0 only.
    Stats { stats: EngineStats, job: Option<JobProgress> },
    /// Rank 0 works; `url` when it serves.
    Ready { url: Option<String> },
    /// The rank's process got SIGTERM or SIGINT from outside.
    Signalled { interrupt: bool },
    /// The last message.
    End(RankEnd),
}

/// How a rank ended, as it says itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct RankEnd {
    /// `None` is success.
    pub(crate) exit: Option<Exit>,
    /// The error, its causes below it.
    pub(crate) error: Vec<String>,
    pub(crate) hints: Vec<String>,
}

impl RankEnd {
    pub(crate) fn of(outcome: &Outcome) -> Self {
        match outcome {
            Ok(()) => Self { exit: None, error: Vec::new(), hints: Vec::new() },
            Err(failure) => Self {
                exit: Some(failure.exit),
                error: failure.error.chain().map(ToString::to_string).collect(),
                hints: failure.hints.clone(),
            },
        }
    }
}

/// What the supervisor tells a rank.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
pub(crate) enum Down {
    /// Everybody is here; one address per rank.
    Peers { addresses: Vec<SocketAddr> },
    /// Rank 0: take nothing more in, finish what runs, then end.
    Drain,
    /// End at once.
    Stop,
}

/// The sending half of a connection.
#[derive(Clone)]
pub(crate) struct Link {
    stream: Arc<Mutex<TcpStream>>,
}

impl Link {
    fn new(stream: &TcpStream) -> io::Result<Self> {
        let stream = stream.try_clone()?;
        // Nobody waits longer than this for a peer that does not read.
        stream.set_write_timeout(Some(Duration::from_secs(5)))?;
        Ok(Self { stream: Arc::new(Mutex::new(stream)) })
    }

    pub(crate) fn send(&self, message: &impl Serialize) -> anyhow::Result<()> {
        let frame = serde_json::to_vec(message)?;
        let mut stream = self.stream.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(wire::write_frame(&mut *stream, JSON, &frame)?)
    }
}

/// The receiving half of a connection.
pub(crate) struct Messages {
    stream: TcpStream,
    frame: Vec<u8>,
}

impl Messages {
    fn new(stream: TcpStream) -> Self {
        Self { stream, frame: Vec::new() }
    }

    /// Blocks for the next message; an error when the connection has ended.
    pub(crate) fn next<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        wire::read_frame(&mut self.stream, MAX_MESSAGE, &mut self.frame)?;
        Ok(serde_json::from_slice(&self.frame)?)
    }
}

/// The key of the run's connections, so that the bearer token itself never leaves its file for them.
pub(crate) fn run_key(token: &str) -> Vec<u8> {
    let mut mac = Hmac::<Sha256>::new_from_slice(token.as_bytes()).expect("HMAC takes keys of any length");
    mac.update(b"rendezvous");
    mac.finalize().into_bytes().to_vec()
}

/// The address by which this host reaches `supervisor`; other ranks can use it too.
pub(crate) fn local_ip(supervisor: SocketAddr) -> io::Result<IpAddr> {
    let any: SocketAddr = match supervisor {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // Choosing a route sends nothing.
    socket.connect(supervisor)?;
    Ok(socket.local_addr()?.ip())
}

/// A rank connects to its supervisor.
pub(crate) fn connect(supervisor: SocketAddr, key: &[u8], hello: &Hello, limit: Duration) -> Outcome<(Link, Messages)> {
    let connect = || -> anyhow::Result<_> {
        let hello = serde_json::to_vec(hello)?;
        let (stream, _) = wire::connect(supervisor, key, LABEL, &hello, Instant::now() + limit)?;
        Ok((Link::new(&stream)?, Messages::new(stream)))
    };
    connect().map_err(|error| {
        let text = format!("rank {} cannot reach its supervisor at {supervisor}", hello.rank);
        Failure::new(Exit::Rendezvous, error.context(text))
    })
}

/// What arrives from the ranks.
pub(crate) enum Arrival {
    Hello {
        hello: Hello,
        link: Link,
    },
    Message {
        rank: usize,
        message: Up,
    },
    /// The connection has ended; nothing more comes from this rank.
    Closed {
        rank: usize,
    },
}

/// Accepts ranks until it is dropped; the connections live on.
pub(crate) struct Reception {
    address: SocketAddr,
    closed: Arc<AtomicBool>,
}

impl Reception {
    /// Listens on `ip` and sends what ranks say to `arrivals`. Whoever does not know the key is turned away.
    pub(crate) fn open<T>(ip: IpAddr, key: Vec<u8>, arrivals: Sender<T>) -> io::Result<Self>
    where
        T: From<Arrival> + Send + 'static,
    {
        let listener = TcpListener::bind((ip, 0))?;
        let address = listener.local_addr()?;
        let acceptor = Acceptor::new(listener, key, LABEL, Vec::new())?;
        let closed = Arc::new(AtomicBool::new(false));
        let stop = Arc::clone(&closed);
        std::thread::Builder::new().name("reception".into()).spawn(move || {
            while !stop.load(Ordering::Relaxed) {
                let result = match acceptor.accept_until(Instant::now() + Duration::from_millis(200)) {
                    Ok(None) => Ok(()),
                    Ok(Some((stream, hello))) => attend(stream, &hello, arrivals.clone()),
                    Err(error) => Err(error),
                };
                if let Err(error) = result {
                    tracing::warn!(%error, "cannot attend to a connection");
                }
            }
        })?;
        Ok(Self { address, closed })
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Reception {
    fn drop(&mut self) {
        self.closed.store(true, Ordering::Relaxed);
    }
}

/// Passes on what a rank says, from its hello to its end.
fn attend<T: From<Arrival> + Send + 'static>(stream: TcpStream, hello: &[u8], arrivals: Sender<T>) -> io::Result<()> {
    let hello: Hello = serde_json::from_slice(hello)?;
    let link = Link::new(&stream)?;
    std::thread::Builder::new().name("rank link".into()).spawn(move || {
        let rank = hello.rank;
        // The receiver is gone when the run is over; then there is nobody to tell.
        let tell = |arrival| arrivals.send(T::from(arrival)).is_ok();
        let mut heard = tell(Arrival::Hello { hello, link });
        let mut messages = Messages::new(stream);
        while let (true, Ok(message)) = (heard, messages.next()) {
            heard = tell(Arrival::Message { rank, message });
        }
        tell(Arrival::Closed { rank });
    })?;
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::sync::mpsc::channel;

    use super::*;

    fn hello() -> Hello {
        let identity = Identity { version: "1".into(), build: "b".into(), config: "c".into(), attempt: 0 };
        Hello { rank: 2, process: ProcessId::current(), identity, address: (Ipv4Addr::LOCALHOST, 9).into() }
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn a_rank_is_introduced_heard_and_missed() {
        let (sender, arrivals) = channel();
        let reception = Reception::open(Ipv4Addr::LOCALHOST.into(), run_key("secret"), sender).unwrap();
        let (link, mut messages) = connect(reception.address(), &run_key("secret"), &hello(), LIMIT).unwrap();
        let Arrival::Hello { hello: heard, link: to_rank } = arrivals.recv().unwrap() else { panic!("no hello") };
        assert_eq!(heard, hello());

        to_rank.send(&Down::Drain).unwrap();
        assert_eq!(messages.next::<Down>().unwrap(), Down::Drain);
        link.send(&Up::Ready { url: None }).unwrap();
        let ready = arrivals.recv().unwrap();
        assert!(matches!(ready, Arrival::Message { rank: 2, message: Up::Ready { url: None } }));

        drop((link, messages));
        assert!(matches!(arrivals.recv().unwrap(), Arrival::Closed { rank: 2 }));
    }

    #[test]
    fn a_stranger_is_turned_away() {
        let (sender, arrivals) = channel::<Arrival>();
        let reception = Reception::open(Ipv4Addr::LOCALHOST.into(), run_key("secret"), sender).unwrap();
        let refused = connect(reception.address(), &run_key("guess"), &hello(), LIMIT).err().unwrap();
        assert_eq!(refused.exit, Exit::Rendezvous);
        drop(reception);
        assert!(arrivals.recv_timeout(LIMIT).is_err());
    }

    #[test]
    fn a_mismatch_names_the_field() {
        let ours = hello().identity;
        assert_eq!(ours.difference(&ours.clone()), None);
        let theirs = Identity { config: "other".into(), ..ours.clone() };
        assert_eq!(ours.difference(&theirs).unwrap(), "config is other there and c here");
    }
}
