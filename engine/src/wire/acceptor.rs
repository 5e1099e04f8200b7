//! Handshakes with whoever connects, many at a time.

use std::io;
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender};
use std::thread;
use std::time::{Duration, Instant};

use super::{WireError, accept};

/// How long an acceptor waits for a peer that has connected to prove itself.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Handshakes at the same time at most; further connections wait in the listener's queue.
const MAX_HANDSHAKES: usize = 256;

/// Accepts connections and shakes hands on a thread for each, so that strangers who are silent or slow delay nobody.
pub struct Acceptor {
    listener: TcpListener,
    terms: Arc<Terms>,
    sender: Sender<(TcpStream, Vec<u8>)>,
    receiver: Receiver<(TcpStream, Vec<u8>)>,
}

/// What every handshake of an [`Acceptor`] uses.
struct Terms {
    secret: Vec<u8>,
    label: &'static str,
    hello: Vec<u8>,
}

impl Acceptor {
    /// # Errors
    /// The listener cannot be made non-blocking.
    pub fn new(listener: TcpListener, secret: Vec<u8>, label: &'static str, hello: Vec<u8>) -> io::Result<Self> {
        listener.set_nonblocking(true)?;
        let (sender, receiver) = mpsc::channel();
        Ok(Self { listener, terms: Arc::new(Terms { secret, label, hello }), sender, receiver })
    }

    /// The next peer that has proved itself, and its hello; `None` if there is none until `until`.
    ///
    /// # Errors
    /// The listener failed.
    pub fn accept_until(&self, until: Instant) -> io::Result<Option<(TcpStream, Vec<u8>)>> {
        // Waits for handshakes, and looks at the listener this often meanwhile.
        const INTERVAL: Duration = Duration::from_millis(5);
        loop {
            self.start_handshakes()?;
            let wait = until.saturating_duration_since(Instant::now()).min(INTERVAL);
            match self.receiver.recv_timeout(wait) {
                Ok(peer) => return Ok(Some(peer)),
                Err(_) if Instant::now() >= until => return Ok(None),
                Err(_) => {}
            }
        }
    }

    /// Takes all connections that wait at the listener.
    fn start_handshakes(&self) -> io::Result<()> {
        // Every running handshake holds a clone of `terms`.
        while Arc::strong_count(&self.terms) <= MAX_HANDSHAKES {
            let (stream, peer) = match self.listener.accept() {
                Ok(accepted) => accepted,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                Err(error) if matches!(error.kind(), io::ErrorKind::ConnectionAborted | io::ErrorKind::Interrupted) => {
                    continue;
                }
                Err(error) => return Err(error),
            };
            let (terms, sender) = (Arc::clone(&self.terms), self.sender.clone());
            thread::Builder::new().name("handshake".into()).spawn(move || {
                let deadline = Instant::now() + HANDSHAKE_TIMEOUT;
                match accept(stream, &terms.secret, terms.label, &terms.hello, deadline) {
                    // Fails when the acceptor is gone; then nobody wants the connection.
                    Ok(accepted) => drop(sender.send(accepted)),
                    // Somebody only looked whether this port can be reached.
                    Err(WireError::Closed) => {}
                    Err(error) => tracing::warn!(%peer, %error, "refused a connection"),
                }
            })?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::io::Write;

    use super::super::connect;
    use super::*;

    const SECRET: &[u8] = b"the secret of this run";
    const LABEL: &str = "test";

    #[test]
    fn strangers_do_not_hold_up_an_acceptor() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let acceptor = Acceptor::new(listener, SECRET.into(), LABEL, b"acceptor".into()).unwrap();
        let strangers: Vec<_> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
        (&strangers[0]).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
        let start = Instant::now();
        let deadline = start + Duration::from_secs(5);
        let friend = thread::spawn(move || connect(address, SECRET, LABEL, b"friend", deadline));
        let (_, hello) = acceptor.accept_until(deadline).unwrap().unwrap();
        assert_eq!(hello, b"friend");
        assert!(start.elapsed() < Duration::from_secs(2));
        friend.join().unwrap().unwrap();
        assert!(acceptor.accept_until(Instant::now()).unwrap().is_none());
    }
}
