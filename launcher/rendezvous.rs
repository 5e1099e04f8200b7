//! How ranks and supervisor find each other, and what they say: one authenticated connection a rank, which lives as long as the rank does.
//!
//! The same connection is the rank's lifeline: when it ends, the rank's process ends, and when a process ends, the supervisor knows.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use hmac::{Hmac, Mac as _};
use nemotron_engine::engine::EngineStats;
use nemotron_engine::job::JobProgress;
use nemotron_engine::report::{Load, Phase};
use nemotron_engine::wire::{self, Acceptor, WireError};
use nix::ifaddrs::getifaddrs;
use nix::net::if_::InterfaceFlags;
use nix::sys::socket::SockaddrStorage;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::process::{ProcessId, hostname};
use crate::report::{Exit, Failure, Outcome};
use crate::rundir::{RunDir, hex};

/// What the handshake between a rank and its supervisor authenticates.
const LABEL: &str = "nemotron supervisor";
/// The one kind of frame on these connections.
const JSON: u8 = 0;
/// Bytes of a message at most.
const MAX_MESSAGE: usize = 1 << 20;
/// How long one of several addresses is tried before the next one.
const DIAL: Duration = Duration::from_secs(3);
/// Before all are tried again.
const PAUSE: Duration = Duration::from_millis(50);
/// What to do when hosts do not reach each other.
pub(crate) const NETWORK_HINT: &str = "name the network between the nodes with fabric.interface in the cluster file (`ip -brief address` \
                                       lists them), and see that no firewall closes it";

/// A rank introduces itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Hello {
    pub(crate) rank: usize,
    pub(crate) process: ProcessId,
    pub(crate) identity: Identity,
    /// Where the other ranks may reach this one, the likeliest first; empty if it knows no address, which it then says itself.
    pub(crate) addresses: Vec<SocketAddr>,
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
    /// Sent twice a second whatever happens: share of the phase that is done, steps since start, seconds that it has computed in them.
    Heartbeat { progress: f64, steps: u64, busy_s: f64, load: Load },
    /// Rank 0 only.
    Stats { stats: EngineStats, job: Option<JobProgress> },
    /// Rank 0 works; `url` when it serves.
    Ready { url: Option<String> },
    /// The scheduler's daemon on this rank's node has gone, or is back.
    Daemon { there: bool },
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
    /// Everybody is here; one address per rank. `seconds_left` is the time for a job's rows: no point in time, as hosts' clocks differ.
    /// `daemon_port` is where the scheduler's daemon listens on this node, if this rank shall watch it.
    Peers { addresses: Vec<SocketAddr>, seconds_left: Option<f64>, daemon_port: Option<u16> },
    /// Rank 0: the steps that each rank has completed when it was heard last.
    Steps { steps: Vec<u64> },
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

/// Addresses of this host at which others may reach it, the likeliest first: those of `interface`, if it is named; else the one from which
/// `towards` is reached, then those of other interfaces. On a run that stays on its host, loopback alone.
pub(crate) fn own_addresses(interface: Option<&str>, towards: SocketAddr) -> anyhow::Result<Vec<IpAddr>> {
    let mut of_host = interface_addresses().context("cannot list the network interfaces")?;
    // The resolver and the mesh are used to IPv4; both kinds would do.
    of_host.sort_by_key(|(_, ip)| ip.is_ipv6());
    if let Some(interface) = interface {
        let named: Vec<IpAddr> = of_host.iter().filter(|(name, _)| name == interface).map(|&(_, ip)| ip).collect();
        if named.is_empty() {
            let there: Vec<_> = of_host.iter().map(|(name, ip)| format!("{name} ({ip})")).collect();
            let (host, there) = (hostname(), there.join(", "));
            anyhow::bail!("host {host} has no interface {interface} with an address, only {there} (fabric.interface)");
        }
        return Ok(named);
    }
    let first = local_ip(towards).context("cannot find this host's own address")?;
    let mut addresses = vec![first];
    if !first.is_loopback() {
        let others = of_host.into_iter().map(|(_, ip)| ip).filter(|ip| *ip != first && !ip.is_loopback());
        addresses.extend(others);
    }
    Ok(addresses)
}

/// Interfaces that are up, with their addresses; those that are valid on one link alone are left out.
fn interface_addresses() -> io::Result<Vec<(String, IpAddr)>> {
    let up = |flags: InterfaceFlags| flags.contains(InterfaceFlags::IFF_UP);
    let address = |address: SockaddrStorage| match (address.as_sockaddr_in(), address.as_sockaddr_in6()) {
        (Some(v4), _) => Some(IpAddr::from(v4.ip())),
        (_, Some(v6)) => Some(IpAddr::from(v6.ip())).filter(|_| v6.ip().segments()[0] & 0xffc0 != 0xfe80),
        _ => None,
    };
    let all = getifaddrs()?.filter(|interface| up(interface.flags));
    Ok(all.filter_map(|interface| Some((interface.interface_name, address(interface.address?)?))).collect())
}

/// The address from which this host reaches `peer`.
pub(crate) fn local_ip(peer: SocketAddr) -> io::Result<IpAddr> {
    let any: SocketAddr = match peer {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any)?;
    // Choosing a route sends nothing.
    socket.connect(peer)?;
    Ok(socket.local_addr()?.ip())
}

/// Listens at all of `addresses`, on one port that the system chooses, and says where.
pub(crate) fn listen(addresses: &[IpAddr]) -> io::Result<(TcpListener, Vec<SocketAddr>)> {
    let any: IpAddr = match addresses {
        [only] => *only,
        all if all.iter().all(IpAddr::is_ipv4) => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    let listener = TcpListener::bind((any, 0))?;
    let port = listener.local_addr()?.port();
    Ok((listener, addresses.iter().map(|&ip| (ip, port).into()).collect()))
}

/// A rank connects to its supervisor, at the first of its addresses where it answers.
pub(crate) fn connect(
    supervisor: &[SocketAddr],
    key: &[u8],
    hello: &Hello,
    limit: Duration,
) -> Outcome<(Link, Messages)> {
    let deadline = Instant::now() + limit;
    let frame = serde_json::to_vec(hello).map_err(anyhow::Error::new)?;
    let mut last = vec![String::from("no answer in time"); supervisor.len()];
    while Instant::now() < deadline {
        for (address, last) in supervisor.iter().zip(&mut last) {
            match wire::connect(*address, key, LABEL, &frame, deadline.min(Instant::now() + DIAL)) {
                Ok((stream, _)) => {
                    let link = Link::new(&stream).context("the connection to the supervisor failed")?;
                    return Ok((link, Messages::new(stream)));
                }
                // What was wrong before says more.
                Err(WireError::Timeout) => {}
                Err(error) => *last = error_chain(&error),
            }
        }
        std::thread::sleep(PAUSE);
    }
    let tried: Vec<_> = supervisor.iter().zip(&last).map(|(address, last)| format!("{address}: {last}")).collect();
    let text = format!("rank {} on host {} cannot reach its supervisor ({})", hello.rank, hostname(), tried.join("; "));
    Err(Failure::msg(Exit::Rendezvous, text).hint(NETWORK_HINT))
}

/// The first of a rank's addresses that can be reached from here, or why none can.
fn dial_back(hello: &Hello) -> Result<SocketAddr, String> {
    // An address that two hosts have, such as that of a bridge for containers, would lead back to this one.
    let own = if hello.process.host == hostname() { Vec::new() } else { interface_addresses().unwrap_or_default() };
    let mut tried = Vec::new();
    for address in &hello.addresses {
        if own.iter().any(|(_, ip)| *ip == address.ip()) {
            tried.push(format!("{address}: this host has that address too"));
            continue;
        }
        match TcpStream::connect_timeout(address, DIAL) {
            Ok(_) => return Ok(*address),
            Err(error) => tried.push(format!("{address}: {error}")),
        }
    }
    Err(tried.join("; "))
}

/// An error and its causes in one line.
fn error_chain(error: &dyn std::error::Error) -> String {
    let causes = std::iter::successors(error.source(), |error| error.source());
    causes.fold(error.to_string(), |text, cause| format!("{text}: {cause}"))
}

/// What arrives from the ranks.
pub(crate) enum Arrival {
    Hello {
        hello: Hello,
        /// Where it can be reached, or why it cannot.
        address: Result<SocketAddr, String>,
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
    addresses: Vec<SocketAddr>,
    closed: Arc<AtomicBool>,
}

impl Reception {
    /// Listens at `addresses` and sends what ranks say to `arrivals`. Whoever does not know the key is turned away.
    pub(crate) fn open<T>(addresses: &[IpAddr], key: Vec<u8>, arrivals: Sender<T>) -> io::Result<Self>
    where
        T: From<Arrival> + Send + 'static,
    {
        let (listener, addresses) = listen(addresses)?;
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
        Ok(Self { addresses, closed })
    }

    /// Where ranks may find it, the likeliest first.
    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
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
        let address = dial_back(&hello);
        let mut heard = tell(Arrival::Hello { hello, address, link });
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
        Hello { rank: 2, process: ProcessId::current(), identity, addresses: Vec::new() }
    }

    fn reception(sender: Sender<Arrival>) -> Reception {
        Reception::open(&[Ipv4Addr::LOCALHOST.into()], run_key("secret"), sender).unwrap()
    }

    const LIMIT: Duration = Duration::from_secs(5);

    #[test]
    fn a_rank_is_introduced_heard_and_missed() {
        let (sender, arrivals) = channel();
        let reception = reception(sender);
        // The first address is nobody's, so the second one serves, in both directions.
        let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let (_listener, here) = listen(&[Ipv4Addr::LOCALHOST.into()]).unwrap();
        let hello = Hello { addresses: vec![nobody, here[0]], ..hello() };
        let supervisor = [nobody, reception.addresses()[0]];
        let (link, mut messages) = connect(&supervisor, &run_key("secret"), &hello, 2 * DIAL).unwrap();
        let Arrival::Hello { hello: heard, address, link: to_rank } = arrivals.recv().unwrap() else {
            panic!("no hello")
        };
        assert_eq!((heard, address), (hello, Ok(here[0])));

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
        let reception = reception(sender);
        let refused =
            connect(reception.addresses(), &run_key("guess"), &hello(), Duration::from_secs(1)).err().unwrap();
        assert_eq!(refused.exit, Exit::Rendezvous);
        assert!(refused.to_string().contains("another secret"), "{refused}");
        drop(reception);
        assert!(arrivals.recv_timeout(LIMIT).is_err());
    }

    #[test]
    fn a_rank_that_cannot_be_reached_is_told_with_every_address() {
        let nobody = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap();
        let hello = Hello { addresses: vec![nobody, nobody], ..hello() };
        let tried = dial_back(&hello).unwrap_err();
        assert_eq!(tried.matches(&nobody.to_string()).count(), 2, "{tried}");
    }

    #[test]
    fn an_interface_is_taken_by_name() {
        let loopback: SocketAddr = (Ipv4Addr::LOCALHOST, 1).into();
        assert_eq!(own_addresses(None, loopback).unwrap(), [IpAddr::from(Ipv4Addr::LOCALHOST)]);
        assert_eq!(own_addresses(Some("lo"), loopback).unwrap()[0], IpAddr::from(Ipv4Addr::LOCALHOST));
        let error = own_addresses(Some("bond7"), loopback).unwrap_err().to_string();
        assert!(error.contains("no interface bond7") && error.contains("lo (127.0.0.1)"), "{error}");
    }

    #[test]
    fn a_mismatch_names_the_field() {
        let ours = hello().identity;
        assert_eq!(ours.difference(&ours.clone()), None);
        let theirs = Identity { config: "other".into(), ..ours.clone() };
        assert_eq!(ours.difference(&theirs).unwrap(), "config is other there and c here");
    }
}
