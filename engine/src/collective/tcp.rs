//! A link over TCP, for ranks of different hosts.

use std::io::{self, ErrorKind, Read, Write};
use std::net::TcpStream;
use std::os::fd::AsFd;
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::Link;
use crate::wire::set_patience;

/// How long a peer may compute before it takes what has been sent to it, once that is more than socket buffers hold. A vanished host is
/// noticed as late on a link; on control connections, which carry little, sooner.
const STALL: Duration = Duration::from_secs(60);

/// A link over an authenticated connection.
pub struct TcpLink {
    stream: TcpStream,
}

impl TcpLink {
    /// # Errors
    /// The socket refuses its options.
    pub fn new(stream: TcpStream) -> io::Result<Self> {
        stream.set_nonblocking(true)?;
        set_patience(&stream, STALL)?;
        Ok(Self { stream })
    }
}

impl Link for TcpLink {
    fn exchange(&mut self, mut send: &[u8], mut recv: &mut [u8]) -> io::Result<()> {
        loop {
            let sent = if send.is_empty() { 0 } else { progress(self.stream.write(send), ErrorKind::WriteZero)? };
            send = &send[sent..];
            let received =
                if recv.is_empty() { 0 } else { progress(self.stream.read(recv), ErrorKind::UnexpectedEof)? };
            recv = &mut recv[received..];
            if send.is_empty() && recv.is_empty() {
                return Ok(());
            }
            if sent + received == 0 {
                let mut events = PollFlags::empty();
                events.set(PollFlags::POLLOUT, !send.is_empty());
                events.set(PollFlags::POLLIN, !recv.is_empty());
                match poll(&mut [PollFd::new(self.stream.as_fd(), events)], PollTimeout::NONE) {
                    Ok(_) | Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }

    fn medium(&self) -> &'static str {
        "TCP"
    }
}

/// Bytes that a non-blocking read or write of a non-empty buffer moved. None at all means that the stream has ended.
fn progress(result: io::Result<usize>, ended: ErrorKind) -> io::Result<usize> {
    match result {
        Ok(0) => Err(ended.into()),
        Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}

#[cfg(test)]
pub(super) mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::net::TcpListener;

    use super::*;

    /// Two ends of a connection.
    pub(crate) fn streams() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let stream = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let accepted = listener.accept().unwrap().0;
        accepted.set_nodelay(true).unwrap();
        stream.set_nodelay(true).unwrap();
        (stream, accepted)
    }

    pub(crate) fn pair() -> (Box<dyn Link>, Box<dyn Link>) {
        let (a, b) = streams();
        (Box::new(TcpLink::new(a).unwrap()), Box::new(TcpLink::new(b).unwrap()))
    }
}
