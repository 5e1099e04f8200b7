//! Connects the ranks of a run with each other: control connections to rank 0, and a link for every pair that exchanges data.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Display, Formatter};
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use crate::collective::Link;
use crate::collective::host::HostCollective;
use crate::collective::shm::{Offer, Region, ShmLink};
use crate::collective::tcp::TcpLink;
use crate::config::Mesh;
use crate::spec::Peers;
use crate::wire::{self, Acceptor, WireError, WithDeadline};

/// Purpose of a handshake between ranks.
const LABEL: &str = "rank to rank";
/// Answers to an [`Offer`] of shared memory: kinds of an empty frame.
const USE_TCP: u8 = 0;
const USE_SHARED_MEMORY: u8 = 1;
/// Kind of a frame that rank 0 sends to all.
const BROADCAST: u8 = 2;

/// A rank's connections.
pub struct Connected {
    pub collective: HostCollective,
    pub control: Control,
}

/// Connections for plans and tokens, apart from the data.
pub enum Control {
    /// On rank 0: to all others; the one to rank r has index r − 1.
    Leader(Vec<TcpStream>),
    /// On the others: to rank 0.
    Follower(TcpStream),
}

impl Control {
    /// Fills `bytes` on every rank with those of rank 0.
    ///
    /// # Errors
    /// A rank is gone, or nothing came in time.
    pub fn broadcast(&self, bytes: &mut [u8], deadline: Instant) -> Result<(), ConnectError> {
        let failed = |rank, stream: &TcpStream, source| match stream.peer_addr() {
            Ok(address) => ConnectError::Peer { rank, address, source },
            Err(error) => ConnectError::Io(error),
        };
        match self {
            Self::Leader(followers) => {
                for (index, stream) in followers.iter().enumerate() {
                    wire::write_frame(&mut WithDeadline::new(stream, deadline), BROADCAST, bytes)
                        .map_err(|source| failed(index + 1, stream, source))?;
                }
            }
            Self::Follower(stream) => {
                let mut received = Vec::new();
                let kind = wire::read_frame(&mut WithDeadline::new(stream, deadline), bytes.len(), &mut received);
                match kind {
                    Ok(BROADCAST) if received.len() == bytes.len() => bytes.copy_from_slice(&received),
                    Ok(_) => return Err(failed(0, stream, WireError::Protocol)),
                    Err(source) => return Err(failed(0, stream, source)),
                }
            }
        }
        Ok(())
    }
}

/// Why ranks could not be connected.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("no connection in time to {}", Ranks(.0))]
    Missing(Vec<(usize, SocketAddr)>),
    #[error("rank {rank} at {address} cannot be reached")]
    Peer {
        rank: usize,
        address: SocketAddr,
        #[source]
        source: WireError,
    },
    #[error("rank {rank} was started for another run: {reason}")]
    Mismatch { rank: usize, reason: String },
    #[error("a rank of another version answers")]
    Hello(#[from] serde_json::Error),
    #[error("rank {rank} with {addresses} addresses is not in a mesh of tp {} × pp {}", mesh.tp, mesh.pp)]
    Mesh { rank: usize, addresses: usize, mesh: Mesh },
    #[error("a connection cannot be prepared")]
    Io(#[from] io::Error),
}

/// What a connection is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Purpose {
    Control,
    Data,
}

/// Hello of the rank that connects.
#[derive(Serialize, Deserialize)]
struct Call {
    rank: usize,
    mesh: Mesh,
    purpose: Purpose,
    /// Shared memory, in case both ranks are on one host.
    offer: Option<Offer>,
}

/// Hello of the rank that accepts.
#[derive(Serialize, Deserialize)]
struct Answer {
    rank: usize,
    mesh: Mesh,
}

/// A finished connection.
enum Connection {
    Control(TcpStream),
    Data(Box<dyn Link>),
}

/// Connects `rank` with all ranks that it talks to. Of two ranks the higher one connects, and the lower one accepts.
///
/// # Errors
/// A rank is not there at the deadline, or is not who it should be.
pub fn connect_mesh(peers: Peers, mesh: Mesh, rank: usize) -> Result<Connected, ConnectError> {
    const INTERVAL: Duration = Duration::from_millis(5);

    let Peers { listener, addresses, secret, deadline } = peers;
    if !mesh.tp.is_power_of_two() || addresses.len() != mesh.world_size() || rank >= addresses.len() {
        return Err(ConnectError::Mesh { rank, addresses: addresses.len(), mesh });
    }
    let mut missing = wanted(mesh, rank);
    let mut connections = BTreeMap::new();

    let (sender, dialled) = mpsc::channel();
    let shared_secret: Arc<[u8]> = secret.as_slice().into();
    for &(peer, purpose) in missing.iter().filter(|(peer, _)| *peer < rank) {
        let (sender, secret, address) = (sender.clone(), Arc::clone(&shared_secret), addresses[peer]);
        // Not joined: it ends at the deadline at the latest, and its result is dropped when nobody waits for it any more.
        thread::Builder::new().name(format!("dial {peer}")).spawn(move || {
            let result = dial(peer, address, &secret, mesh, rank, purpose, deadline);
            drop(sender.send((peer, purpose, result)));
        })?;
    }
    let acceptor = Acceptor::new(listener, secret, LABEL, encode(&Answer { rank, mesh }))?;

    while !missing.is_empty() {
        let now = Instant::now();
        if now >= deadline {
            let ranks: BTreeSet<usize> = missing.into_iter().map(|(peer, _)| peer).collect();
            return Err(ConnectError::Missing(ranks.into_iter().map(|peer| (peer, addresses[peer])).collect()));
        }
        if let Some((stream, hello)) = acceptor.accept_until(deadline.min(now + INTERVAL))? {
            let call: Call = serde_json::from_slice(&hello)?;
            let key = (call.rank, call.purpose);
            if call.mesh != mesh || call.rank <= rank || !missing.remove(&key) {
                let reason = format!("it wants {:?} in tp {} × pp {}", call.purpose, call.mesh.tp, call.mesh.pp);
                return Err(ConnectError::Mismatch { rank: call.rank, reason });
            }
            let address = addresses[call.rank];
            let connection = welcome(stream, call, deadline).map_err(|source| ConnectError::Peer {
                rank: key.0,
                address,
                source,
            })?;
            connections.insert(key, connection);
        }
        while let Ok((peer, purpose, result)) = dialled.try_recv() {
            match result {
                Ok(connection) => {
                    missing.remove(&(peer, purpose));
                    connections.insert((peer, purpose), connection);
                }
                // The deadline has come, or comes within a moment; then all missing ranks are named together.
                Err(ConnectError::Peer { source: WireError::Timeout | WireError::Unreachable(_), .. }) => {}
                Err(error) => return Err(error),
            }
        }
    }

    let mut links = BTreeMap::new();
    let mut control = Vec::new();
    // In the order of ranks.
    for ((peer, _), connection) in connections {
        match connection {
            Connection::Control(stream) => control.push(stream),
            Connection::Data(link) => drop(links.insert(peer, link)),
        }
    }
    let control = if rank == 0 {
        Control::Leader(control)
    } else {
        Control::Follower(control.pop().expect("nothing is missing"))
    };
    Ok(Connected { collective: HostCollective::new(mesh, rank, links), control })
}

/// The connections of a rank: to whom, and what for.
fn wanted(mesh: Mesh, rank: usize) -> BTreeSet<(usize, Purpose)> {
    let control = if rank == 0 { 1..mesh.world_size() } else { 0..1 };
    let data = HostCollective::partners(mesh, rank);
    control.map(|peer| (peer, Purpose::Control)).chain(data.into_iter().map(|peer| (peer, Purpose::Data))).collect()
}

/// Connects to a lower rank.
fn dial(
    peer: usize,
    address: SocketAddr,
    secret: &[u8],
    mesh: Mesh,
    rank: usize,
    purpose: Purpose,
    deadline: Instant,
) -> Result<Connection, ConnectError> {
    let failed = |source| ConnectError::Peer { rank: peer, address, source };
    // Without shared memory there is still TCP.
    let (region, offer) = match purpose {
        Purpose::Data => Region::create().ok().unzip(),
        Purpose::Control => (None, None),
    };
    let call = encode(&Call { rank, mesh, purpose, offer });
    let (stream, hello) = wire::connect(address, secret, LABEL, &call, deadline).map_err(failed)?;
    let answer: Answer = serde_json::from_slice(&hello)?;
    if answer.rank != peer || answer.mesh != mesh {
        let reason = format!("rank {} of tp {} × pp {} answers", answer.rank, answer.mesh.tp, answer.mesh.pp);
        return Err(ConnectError::Mismatch { rank: peer, reason });
    }
    if purpose == Purpose::Control {
        return Ok(Connection::Control(stream));
    }
    let verdict = wire::read_frame(&mut WithDeadline::new(&stream, deadline), 0, &mut Vec::new()).map_err(failed)?;
    Ok(Connection::Data(match region {
        Some(region) if verdict == USE_SHARED_MEMORY => Box::new(ShmLink::new(region, stream)?),
        _ => Box::new(TcpLink::new(stream)?),
    }))
}

/// Completes a connection that a higher rank has opened.
fn welcome(stream: TcpStream, call: Call, deadline: Instant) -> Result<Connection, WireError> {
    if call.purpose == Purpose::Control {
        return Ok(Connection::Control(stream));
    }
    let region = call.offer.and_then(|offer| Region::open(&offer).ok());
    let verdict = if region.is_some() { USE_SHARED_MEMORY } else { USE_TCP };
    wire::write_frame(&mut WithDeadline::new(&stream, deadline), verdict, &[])?;
    let link: Box<dyn Link> = match region {
        Some(region) => Box::new(ShmLink::new(region, stream)?),
        None => Box::new(TcpLink::new(stream)?),
    };
    tracing::debug!(peer = call.rank, medium = link.medium(), "linked");
    Ok(Connection::Data(link))
}

fn encode(hello: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(hello).expect("plain data")
}

/// Ranks and where they should be, for a message.
struct Ranks<'a>(&'a [(usize, SocketAddr)]);

impl Display for Ranks<'_> {
    fn fmt(&self, f: &mut Formatter) -> fmt::Result {
        for (index, (rank, address)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { ", " };
            write!(f, "{comma}rank {rank} at {address}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::Write;
    use std::net::TcpListener;

    use super::*;

    const SECRET: &[u8] = b"the secret of this run";

    type Start = thread::JoinHandle<Result<Connected, ConnectError>>;

    fn listeners(count: usize) -> (Vec<TcpListener>, Vec<SocketAddr>) {
        let listeners: Vec<_> = (0..count).map(|_| TcpListener::bind("127.0.0.1:0").unwrap()).collect();
        let addresses = listeners.iter().map(|listener| listener.local_addr().unwrap()).collect();
        (listeners, addresses)
    }

    /// `connect_mesh` on a thread, with some seconds of time.
    fn start(
        listener: TcpListener,
        addresses: &[SocketAddr],
        secret: &[u8],
        seconds: f64,
        mesh: Mesh,
        rank: usize,
    ) -> Start {
        let deadline = Instant::now() + Duration::from_secs_f64(seconds);
        let peers = Peers { listener, addresses: addresses.to_vec(), secret: secret.to_vec(), deadline };
        thread::spawn(move || connect_mesh(peers, mesh, rank))
    }

    fn start_all(listeners: Vec<TcpListener>, addresses: &[SocketAddr], mesh: Mesh) -> Vec<Connected> {
        let ranks = listeners.into_iter().enumerate();
        let starts: Vec<_> =
            ranks.map(|(rank, listener)| start(listener, addresses, SECRET, 20.0, mesh, rank)).collect();
        starts.into_iter().map(|start| start.join().unwrap().unwrap()).collect()
    }

    /// Uses every connection of every rank once.
    fn check(mesh: Mesh, ranks: Vec<Connected>) {
        let work = move |rank: usize, Connected { mut collective, control }: Connected| {
            match control {
                Control::Leader(streams) => {
                    assert_eq!(streams.len(), mesh.world_size() - 1);
                    for (index, stream) in streams.iter().enumerate() {
                        wire::write_frame(&mut &*stream, index as u8 + 1, b"plan").unwrap();
                    }
                }
                Control::Follower(stream) => {
                    assert_eq!(wire::read_frame(&mut &stream, 100, &mut Vec::new()).unwrap(), rank as u8);
                }
            }
            let mut x = [rank as f32];
            collective.sum(&mut x).unwrap();
            let first = mesh.stage(rank) * mesh.tp;
            assert_eq!(x[0], (first..first + mesh.tp).sum::<usize>() as f32);
            let mut out = vec![0.0; mesh.tp];
            collective.gather(1, &[rank as f32], &mut out).unwrap();
            if mesh.tp_rank(rank) == 0 {
                assert!(out.iter().copied().eq((first..first + mesh.tp).map(|rank| rank as f32)));
            }
            if mesh.stage(rank) > 0 {
                collective.recv_from_previous(&mut x).unwrap();
                assert_eq!(x[0], (rank - mesh.tp) as f32);
            }
            if mesh.stage(rank) + 1 < mesh.pp {
                collective.send_to_next(&[rank as f32]).unwrap();
            }
            // Others may still read what this rank has sent.
            collective
        };
        let threads: Vec<_> = ranks
            .into_iter()
            .enumerate()
            .map(|(rank, connected)| thread::spawn(move || work(rank, connected)))
            .collect();
        let finished: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        assert_eq!(finished.len(), mesh.world_size());
    }

    #[test]
    fn every_rank_gets_the_connections_it_needs() {
        for (tp, pp) in [(1, 1), (2, 1), (1, 3), (4, 2), (8, 2)] {
            let mesh = Mesh { tp, pp };
            let (listeners, addresses) = listeners(mesh.world_size());
            check(mesh, start_all(listeners, &addresses, mesh));
        }
    }

    #[test]
    fn strangers_disturb_nobody() {
        let mesh = Mesh { tp: 2, pp: 2 };
        let (listeners, addresses) = listeners(4);
        let strangers: Vec<_> = addresses.iter().flat_map(|&address| [address; 5]).map(TcpStream::connect).collect();
        for (index, stranger) in strangers.iter().enumerate() {
            // The others stay silent.
            if index % 2 == 0 {
                stranger.as_ref().unwrap().write_all(&[index as u8; 500]).unwrap();
            }
        }
        let start = Instant::now();
        check(mesh, start_all(listeners, &addresses, mesh));
        assert!(start.elapsed() < Duration::from_secs(3));
    }

    #[test]
    fn missing_ranks_are_named_with_their_addresses() {
        let mesh = Mesh { tp: 2, pp: 2 };
        let (mut listeners, addresses) = listeners(4);
        let missing = listeners.pop();
        let there: Vec<_> = listeners
            .into_iter()
            .enumerate()
            .map(|(rank, listener)| start(listener, &addresses, SECRET, 1.5, mesh, rank))
            .collect();
        let error = |start: Start| start.join().unwrap().err().map(|error| error.to_string());
        let errors: Vec<_> = there.into_iter().map(error).collect();
        let expected = format!("no connection in time to rank 3 at {}", addresses[3]);
        assert_eq!(errors, vec![Some(expected); 3]);
        drop(missing);

        let (mut listeners, addresses) = self::listeners(4);
        let alone = start(listeners.swap_remove(1), &addresses, SECRET, 0.2, mesh, 1);
        let expected = format!("no connection in time to rank 0 at {}, rank 3 at {}", addresses[0], addresses[3]);
        assert_eq!(error(alone), Some(expected));
    }

    #[test]
    fn a_rank_with_another_secret_is_refused() {
        let mesh = Mesh { tp: 2, pp: 1 };
        let (mut listeners, addresses) = listeners(2);
        let wrong = start(listeners.remove(1), &addresses, b"a guess", 5.0, mesh, 1);
        let right = start(listeners.remove(0), &addresses, SECRET, 1.0, mesh, 0);
        let error = wrong.join().unwrap().err().unwrap();
        assert!(matches!(error, ConnectError::Peer { rank: 0, source: WireError::Secret, .. }), "{error:?}");
        let error = right.join().unwrap().err().unwrap();
        assert!(matches!(error, ConnectError::Missing(_)), "{error:?}");
    }

    #[test]
    fn ranks_of_different_meshes_refuse_each_other() {
        let (mut listeners, addresses) = listeners(2);
        let one = start(listeners.remove(1), &addresses, SECRET, 5.0, Mesh { tp: 1, pp: 2 }, 1);
        let zero = start(listeners.remove(0), &addresses, SECRET, 5.0, Mesh { tp: 2, pp: 1 }, 0);
        assert!(matches!(zero.join().unwrap().err().unwrap(), ConnectError::Mismatch { rank: 1, .. }));
        // Of its two connections one may end before rank 0 has answered it.
        let error = one.join().unwrap().err().unwrap();
        assert!(
            matches!(error, ConnectError::Mismatch { rank: 0, .. } | ConnectError::Peer { rank: 0, .. }),
            "{error:?}"
        );
    }

    #[test]
    fn addresses_that_do_not_fit_the_mesh_are_an_error() {
        for (tp, pp, rank) in [(2, 1, 0), (3, 1, 0), (1, 1, 1)] {
            let (mut listeners, addresses) = listeners(if tp == 3 { 3 } else { 1 });
            let result = start(listeners.remove(0), &addresses, SECRET, 5.0, Mesh { tp, pp }, rank).join().unwrap();
            assert!(matches!(result.err().unwrap(), ConnectError::Mesh { .. }));
        }
    }

    #[test]
    fn ranks_of_one_host_share_memory_and_others_use_tcp() {
        let mesh = Mesh { tp: 2, pp: 1 };
        let deadline = Instant::now() + Duration::from_secs(5);
        for (boot_id, expected) in [(None, "shared memory"), (Some("that of another host"), "TCP")] {
            let (mut listeners, addresses) = listeners(1);
            let dialling = thread::spawn(move || dial(0, addresses[0], SECRET, mesh, 1, Purpose::Data, deadline));
            let answer = encode(&Answer { rank: 0, mesh });
            let acceptor = Acceptor::new(listeners.remove(0), SECRET.into(), LABEL, answer).unwrap();
            let (stream, hello) = acceptor.accept_until(deadline).unwrap().unwrap();
            let mut call: serde_json::Value = serde_json::from_slice(&hello).unwrap();
            if let Some(boot_id) = boot_id {
                call["offer"]["boot_id"] = boot_id.into();
            }
            let accepted = welcome(stream, serde_json::from_value(call).unwrap(), deadline).unwrap();
            let (Connection::Data(mut a), Ok(Connection::Data(mut b))) = (accepted, dialling.join().unwrap()) else {
                panic!("not a data connection");
            };
            assert_eq!([a.medium(), b.medium()], [expected; 2]);
            a.send(b"through").unwrap();
            let mut received = [0; 7];
            b.recv(&mut received).unwrap();
            assert_eq!(&received, b"through");
        }
    }
}
