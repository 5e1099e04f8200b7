//! A handshake proves to both sides that the other knows the run's secret, without showing it, and carries one hello each way. It keeps
//! strangers out; it does not hide or protect what follows from somebody who can alter packets.
//!
//! ```text
//! connector → acceptor   magic, nonce                               nonces: 32 random bytes
//! acceptor → connector   nonce, mac(PROOF, "")                      mac: HMAC-SHA256 under the secret of
//! connector → acceptor   length, hello, mac(CONNECTOR, hello)         step, label, both nonces, hello
//! acceptor → connector   length, hello, mac(ACCEPTOR, hello)        length: u32, little-endian
//! ```
//!
//! Fresh nonces make a recorded handshake useless, the step keeps a message from being sent back to its author, and the label keeps
//! it from being used for another purpose. The acceptor proves itself first, so a hello never goes to a stranger.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use hmac::{Hmac, Mac};
use rand::TryRngCore;
use rand::rngs::OsRng;
use sha2::Sha256;

use super::{WireError, WithDeadline, checked_length, configure, remaining};

/// Bytes of a hello at most.
pub const MAX_HELLO: usize = 64 << 10;

const MAGIC: [u8; 8] = *b"nemotro\x01";
const NONCE: usize = 32;
const MAC: usize = 32;

/// Connects to `address`, again and again while nothing listens there, and shakes hands. Returns the stream, blocking and without
/// time limits, and the peer's hello.
///
/// # Errors
/// Nothing listens before the deadline, the peer does not prove that it knows the secret for this label, or the connection breaks.
pub fn connect(
    address: SocketAddr,
    secret: &[u8],
    label: &str,
    hello: &[u8],
    deadline: Instant,
) -> Result<(TcpStream, Vec<u8>), WireError> {
    let stream = dial(address, deadline)?;
    configure(&stream)?;
    let mut timed = WithDeadline::new(&stream, deadline);
    let mut nonces = [0; 2 * NONCE];
    fresh_nonce(&mut nonces[..NONCE])?;
    timed.write_all(&[&MAGIC, &nonces[..NONCE]].concat())?;
    timed.read_exact(&mut nonces[NONCE..])?;
    let session = Session { secret, label, nonces };
    session.expect(&mut timed, Step::Proof, &[])?;
    session.send_hello(&mut timed, Step::Connector, hello)?;
    let hello = session.receive_hello(&mut timed, Step::Acceptor)?;
    drop(timed);
    Ok((stream, hello))
}

/// The other side of [`connect`], for one connection that a listener accepted.
///
/// # Errors
/// The peer does not prove before the deadline that it knows the secret for this label, or the connection breaks.
pub fn accept(
    stream: TcpStream,
    secret: &[u8],
    label: &str,
    hello: &[u8],
    deadline: Instant,
) -> Result<(TcpStream, Vec<u8>), WireError> {
    stream.set_nonblocking(false)?;
    configure(&stream)?;
    let mut timed = WithDeadline::new(&stream, deadline);
    let mut magic = [0; MAGIC.len()];
    timed.read_exact(&mut magic)?;
    if magic != MAGIC {
        return Err(WireError::Protocol);
    }
    let mut nonces = [0; 2 * NONCE];
    timed.read_exact(&mut nonces[..NONCE])?;
    fresh_nonce(&mut nonces[NONCE..])?;
    let session = Session { secret, label, nonces };
    timed.write_all(&[&nonces[NONCE..], &session.mac(Step::Proof, &[]).finalize().into_bytes()].concat())?;
    let peer_hello = session.receive_hello(&mut timed, Step::Connector)?;
    session.send_hello(&mut timed, Step::Acceptor, hello)?;
    drop(timed);
    Ok((stream, peer_hello))
}

/// Which message of the handshake a MAC belongs to.
#[derive(Clone, Copy)]
enum Step {
    Proof = 1,
    Connector = 2,
    Acceptor = 3,
}

/// What both sides know once the nonces are exchanged.
struct Session<'a> {
    secret: &'a [u8],
    label: &'a str,
    /// The connector's, then the acceptor's.
    nonces: [u8; 2 * NONCE],
}

impl Session<'_> {
    fn mac(&self, step: Step, hello: &[u8]) -> Hmac<Sha256> {
        let mut mac = Hmac::<Sha256>::new_from_slice(self.secret).expect("HMAC takes keys of any length");
        mac.update(&[step as u8]);
        mac.update(&(self.label.len() as u64).to_le_bytes());
        mac.update(self.label.as_bytes());
        mac.update(&self.nonces);
        mac.update(hello);
        mac
    }

    /// Reads a MAC and compares it, in constant time.
    fn expect(&self, reader: &mut impl Read, step: Step, hello: &[u8]) -> Result<(), WireError> {
        let mut received = [0; MAC];
        reader.read_exact(&mut received)?;
        self.mac(step, hello).verify_slice(&received).map_err(|_| WireError::Secret)
    }

    fn send_hello(&self, writer: &mut impl Write, step: Step, hello: &[u8]) -> Result<(), WireError> {
        if hello.len() > MAX_HELLO {
            return Err(WireError::TooLong { length: hello.len(), max: MAX_HELLO });
        }
        let length = (hello.len() as u32).to_le_bytes();
        let mac = self.mac(step, hello).finalize().into_bytes();
        Ok(writer.write_all(&[&length[..], hello, &mac].concat())?)
    }

    fn receive_hello(&self, reader: &mut impl Read, step: Step) -> Result<Vec<u8>, WireError> {
        let mut length = [0; 4];
        reader.read_exact(&mut length)?;
        let mut hello = vec![0; checked_length(length, MAX_HELLO)?];
        reader.read_exact(&mut hello)?;
        self.expect(reader, step, &hello)?;
        Ok(hello)
    }
}

fn fresh_nonce(nonce: &mut [u8]) -> Result<(), WireError> {
    OsRng.try_fill_bytes(nonce).map_err(|error| WireError::Io(io::Error::other(error)))
}

/// Opens a TCP connection; peers start at different times, so a refusal is no answer before the deadline.
fn dial(address: SocketAddr, deadline: Instant) -> Result<TcpStream, WireError> {
    let mut pause = Duration::from_millis(10);
    loop {
        let refusal = match TcpStream::connect_timeout(&address, remaining(deadline)?) {
            // A port that nobody listens on may be given to the very socket that connects to it, and then it answers itself.
            Ok(stream) if stream.local_addr()? == address => io::ErrorKind::ConnectionRefused.into(),
            Ok(stream) => return Ok(stream),
            Err(error) => error,
        };
        let passing = matches!(
            refusal.kind(),
            io::ErrorKind::ConnectionRefused
                | io::ErrorKind::ConnectionReset
                | io::ErrorKind::HostUnreachable
                | io::ErrorKind::NetworkUnreachable
        );
        let now = Instant::now();
        if !passing || now + pause >= deadline {
            return Err(WireError::Unreachable(refusal));
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(250));
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::net::{Shutdown, TcpListener};

    use proptest::prelude::*;

    use super::*;

    const SECRET: &[u8] = b"the secret of this run";
    const LABEL: &str = "test";

    type Accepted = Result<(TcpStream, Vec<u8>), WireError>;

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(5)
    }

    /// A listener, and the result of `accept` for its first connection.
    fn accept_one(deadline: Instant) -> (SocketAddr, thread::JoinHandle<Accepted>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        (address, thread::spawn(move || accept(listener.accept().unwrap().0, SECRET, LABEL, b"acceptor", deadline)))
    }

    /// A listener whose first connection is answered by `bytes`.
    fn answer_with(bytes: Vec<u8>) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let mut stream = listener.accept().unwrap().0;
            stream.write_all(&bytes).unwrap();
            stream.shutdown(Shutdown::Write).unwrap();
            // Until the other side has given up, so that it sees the end of the stream and not a reset.
            io::copy(&mut stream, &mut io::sink()).ok();
        });
        address
    }

    /// Passes bytes on, the one at index `flip` altered, and returns what it has read.
    fn pass_on(mut from: TcpStream, mut to: TcpStream, flip: Option<usize>) -> Vec<u8> {
        let mut seen = Vec::new();
        let mut byte = [0];
        while let Ok(1) = from.read(&mut byte) {
            seen.push(byte[0]);
            byte[0] ^= u8::from(flip == Some(seen.len() - 1));
            if to.write_all(&byte).is_err() {
                break;
            }
        }
        to.shutdown(Shutdown::Write).ok();
        seen
    }

    /// A handshake through somebody in the middle, who may flip a bit of a byte to the acceptor or to the connector. Returns both
    /// results and what was sent to the acceptor.
    fn through_middle(flip: [Option<usize>; 2], deadline: Instant) -> (Accepted, Accepted, Vec<u8>) {
        let (address, acceptor) = accept_one(deadline);
        let middle = TcpListener::bind("127.0.0.1:0").unwrap();
        let middle_address = middle.local_addr().unwrap();
        let relay = thread::spawn(move || {
            let near = middle.accept().unwrap().0;
            let far = TcpStream::connect(address).unwrap();
            let (near2, far2) = (near.try_clone().unwrap(), far.try_clone().unwrap());
            let back = thread::spawn(move || pass_on(far2, near2, flip[1]));
            let seen = pass_on(near, far, flip[0]);
            back.join().unwrap();
            seen
        });
        let connected = connect(middle_address, SECRET, LABEL, b"connector", deadline);
        let connected = connected.map(|(stream, hello)| {
            stream.shutdown(Shutdown::Write).unwrap();
            (stream, hello)
        });
        let accepted = acceptor.join().unwrap();
        let accepted = accepted.map(|(stream, hello)| {
            stream.shutdown(Shutdown::Write).unwrap();
            (stream, hello)
        });
        (connected, accepted, relay.join().unwrap())
    }

    #[test]
    fn both_sides_get_the_others_hello_and_a_working_stream() {
        let (address, acceptor) = accept_one(soon());
        let (mut stream, hello) = connect(address, SECRET, LABEL, &[1; MAX_HELLO], soon()).unwrap();
        let (mut accepted, accepted_hello) = acceptor.join().unwrap().unwrap();
        assert_eq!((hello.as_slice(), accepted_hello), (&b"acceptor"[..], vec![1; MAX_HELLO]));
        stream.write_all(b"after").unwrap();
        let mut received = [0; 5];
        accepted.read_exact(&mut received).unwrap();
        assert_eq!(&received, b"after");
        assert_eq!((accepted.read_timeout().unwrap(), stream.write_timeout().unwrap()), (None, None));
        assert!(stream.nodelay().unwrap() && accepted.nodelay().unwrap());
    }

    #[test]
    fn another_secret_or_label_is_refused_by_the_connector_already() {
        for (secret, label) in [(&b"a guess"[..], LABEL), (SECRET, "another purpose")] {
            let (address, acceptor) = accept_one(soon());
            let result = connect(address, secret, label, b"", soon());
            assert!(matches!(result, Err(WireError::Secret)), "{result:?}");
            let result = acceptor.join().unwrap();
            assert!(matches!(result, Err(WireError::Closed)), "{result:?}");
        }
    }

    #[test]
    fn a_connector_that_skips_the_check_is_refused_by_the_acceptor() {
        let (address, acceptor) = accept_one(soon());
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[&MAGIC[..], &[0; NONCE], &5u32.to_le_bytes(), b"hello", &[0; MAC]].concat()).unwrap();
        assert!(matches!(acceptor.join().unwrap(), Err(WireError::Secret)));
    }

    #[test]
    fn a_recorded_handshake_is_worthless() {
        let (connected, accepted, recorded) = through_middle([None; 2], soon());
        assert!(connected.is_ok() && accepted.is_ok());
        let (address, acceptor) = accept_one(soon());
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&recorded).unwrap();
        let result = acceptor.join().unwrap();
        assert!(matches!(result, Err(WireError::Secret)), "{result:?}");
    }

    #[test]
    fn a_hello_over_the_limit_is_refused() {
        let (address, acceptor) = accept_one(soon());
        let result = connect(address, SECRET, LABEL, &[0; MAX_HELLO + 1], soon());
        assert!(matches!(result, Err(WireError::TooLong { .. })), "{result:?}");
        assert!(acceptor.join().unwrap().is_err());

        let (address, acceptor) = accept_one(soon());
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[&MAGIC[..], &[0; NONCE], &u32::MAX.to_le_bytes()].concat()).unwrap();
        assert!(matches!(acceptor.join().unwrap(), Err(WireError::TooLong { .. })));
    }

    #[test]
    fn a_peer_that_trickles_is_dropped_at_the_deadline() {
        let start = Instant::now();
        let (address, acceptor) = accept_one(start + Duration::from_millis(200));
        let mut stream = TcpStream::connect(address).unwrap();
        for byte in MAGIC.into_iter().chain([0; 1000]) {
            if stream.write_all(&[byte]).is_err() {
                break;
            }
            thread::sleep(Duration::from_millis(10));
        }
        let result = acceptor.join().unwrap();
        assert!(matches!(result, Err(WireError::Timeout)), "{result:?}");
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn connecting_where_nobody_listens_ends_at_the_deadline() {
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let start = Instant::now();
        let result = connect(address, SECRET, LABEL, b"", start + Duration::from_millis(100));
        assert!(matches!(result, Err(WireError::Unreachable(_) | WireError::Timeout)), "{result:?}");
        assert!(start.elapsed() < Duration::from_secs(2));
    }

    #[test]
    fn a_peer_that_listens_later_is_found() {
        let early = TcpListener::bind("127.0.0.77:0").unwrap();
        let address = early.local_addr().unwrap();
        drop(early);
        let connecting = thread::spawn(move || connect(address, SECRET, LABEL, b"", soon()));
        // Time for a refusal; the test holds without one too.
        thread::sleep(Duration::from_millis(30));
        let listener = TcpListener::bind(address).unwrap();
        accept(listener.accept().unwrap().0, SECRET, LABEL, b"", soon()).unwrap();
        connecting.join().unwrap().unwrap();
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn random_bytes_are_refused_by_both_sides(mut bytes in prop::collection::vec(any::<u8>(), 0..300), magic: bool) {
            let (address, acceptor) = accept_one(soon());
            let result = connect(answer_with(bytes.clone()), SECRET, LABEL, b"", soon());
            prop_assert!(result.is_err());
            if magic {
                bytes.splice(..0, MAGIC);
            }
            let mut stream = TcpStream::connect(address).unwrap();
            // Fails when the acceptor has seen enough.
            stream.write_all(&bytes).ok();
            stream.shutdown(Shutdown::Write).ok();
            prop_assert!(acceptor.join().unwrap().is_err());
        }

        #[test]
        fn an_altered_byte_is_noticed_by_who_receives_it(position in 0usize..108, to_acceptor: bool) {
            // A connector sends 40 bytes, an acceptor 64; then each a length of 4, a hello of 9 or 8, and a MAC of 32.
            let flip = if to_acceptor { [Some(position % 85), None] } else { [None, Some(position)] };
            // An altered length may leave the receiver waiting for more.
            let deadline = Instant::now() + Duration::from_millis(300);
            let (connected, accepted, _) = through_middle(flip, deadline);
            let result = if to_acceptor { accepted } else { connected };
            prop_assert!(result.is_err());
        }
    }
}
