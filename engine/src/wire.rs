//! Connections between processes of one run: who may connect ([`connect`], [`accept`], [`Acceptor`]), and frames on them.
//!
//! All sockets block, send small messages at once, and fail when the peer's host has vanished.

mod acceptor;
mod handshake;

use std::io::{self, IoSlice, Read, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use nix::sys::socket::{setsockopt, sockopt};

pub use self::acceptor::Acceptor;
pub use self::handshake::{MAX_HELLO, accept, connect};

/// Length (u32, little-endian) and kind of a frame.
const FRAME_HEADER: usize = 5;
/// How long a vanished host goes unnoticed.
const SILENCE: Duration = Duration::from_secs(10);

/// Why a connection could not be made or used.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    #[error("cannot connect")]
    Unreachable(#[source] io::Error),
    #[error("no answer in time")]
    Timeout,
    #[error("the peer closed the connection")]
    Closed,
    #[error("the peer is not part of nemotron, or another version")]
    Protocol,
    #[error("the peer has another secret or another purpose")]
    Secret,
    #[error("{length} bytes are more than the limit of {max}")]
    TooLong { length: usize, max: usize },
    #[error("the connection failed")]
    Io(#[source] io::Error),
}

impl From<io::Error> for WireError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => Self::Timeout,
            io::ErrorKind::UnexpectedEof | io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe => Self::Closed,
            _ => Self::Io(error),
        }
    }
}

/// Writes length, kind and payload, together.
///
/// # Errors
/// The payload is longer than a u32 can say, or the connection broke.
pub fn write_frame(writer: &mut impl Write, kind: u8, payload: &[u8]) -> Result<(), WireError> {
    let length = u32::try_from(payload.len())
        .map_err(|_| WireError::TooLong { length: payload.len(), max: u32::MAX as usize })?;
    let mut header = [0; FRAME_HEADER];
    header[..4].copy_from_slice(&length.to_le_bytes());
    header[4] = kind;
    let mut parts: &mut [IoSlice] = &mut [IoSlice::new(&header), IoSlice::new(payload)];
    while !parts.is_empty() {
        match writer.write_vectored(parts) {
            Ok(0) => return Err(WireError::Closed),
            Ok(written) => IoSlice::advance_slices(&mut parts, written),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Reads a frame into `payload`, which only grows in capacity, and returns its kind.
///
/// # Errors
/// The frame is longer than `max_length`, or the connection broke or was closed. It cannot be used after that.
pub fn read_frame(reader: &mut impl Read, max_length: usize, payload: &mut Vec<u8>) -> Result<u8, WireError> {
    let mut header = [0; FRAME_HEADER];
    reader.read_exact(&mut header)?;
    let [l0, l1, l2, l3, kind] = header;
    let length = checked_length([l0, l1, l2, l3], max_length)?;
    payload.resize(length, 0);
    reader.read_exact(payload)?;
    Ok(kind)
}

/// Whether a frame has begun to arrive, or the connection has ended.
///
/// # Errors
/// The socket refuses.
pub(crate) fn has_arrived(stream: &TcpStream) -> io::Result<bool> {
    stream.set_nonblocking(true)?;
    let peeked = stream.peek(&mut [0]);
    stream.set_nonblocking(false)?;
    // What else is wrong with it, whoever reads next finds.
    Ok(!peeked.is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock))
}

/// Sets after how long a peer that acknowledges nothing is given up.
///
/// TCP counts a peer that is up but reads nothing as such a peer, as soon as the socket buffers are full.
///
/// # Errors
/// The socket refuses.
pub(crate) fn set_patience(stream: &TcpStream, patience: Duration) -> io::Result<()> {
    Ok(setsockopt(stream, sockopt::TcpUserTimeout, &(patience.as_millis() as u32))?)
}

/// A stream all of whose reads and writes are over at a deadline, however slowly the peer trickles. They block again when this is dropped.
pub struct WithDeadline<'a> {
    stream: &'a TcpStream,
    deadline: Instant,
}

impl<'a> WithDeadline<'a> {
    pub fn new(stream: &'a TcpStream, deadline: Instant) -> Self {
        Self { stream, deadline }
    }
}

impl Drop for WithDeadline<'_> {
    fn drop(&mut self) {
        // Only a closed socket refuses, and that one answers every read and write with an error anyway.
        let _ = self.stream.set_read_timeout(None);
        let _ = self.stream.set_write_timeout(None);
    }
}

impl Read for WithDeadline<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.set_read_timeout(Some(remaining(self.deadline)?))?;
        self.stream.read(buffer)
    }
}

impl Write for WithDeadline<'_> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.stream.set_write_timeout(Some(remaining(self.deadline)?))?;
        self.stream.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn checked_length(bytes: [u8; 4], max: usize) -> Result<usize, WireError> {
    let length = u32::from_le_bytes(bytes) as usize;
    if length > max { Err(WireError::TooLong { length, max }) } else { Ok(length) }
}

/// What is left until the deadline, never zero.
fn remaining(deadline: Instant) -> io::Result<Duration> {
    deadline
        .checked_duration_since(Instant::now())
        .filter(|left| !left.is_zero())
        .ok_or_else(|| io::ErrorKind::TimedOut.into())
}

/// No delay for small messages, and an error instead of silence when the peer's host vanishes.
fn configure(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    setsockopt(stream, sockopt::KeepAlive, &true)?;
    setsockopt(stream, sockopt::TcpKeepIdle, &4)?;
    setsockopt(stream, sockopt::TcpKeepInterval, &2)?;
    setsockopt(stream, sockopt::TcpKeepCount, &3)?;
    set_patience(stream, SILENCE)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    #[test]
    fn frames_arrive_in_order_with_kind_and_payload() {
        let payloads: [&[u8]; 4] = [b"plan", b"", &[7; 100_000], b"end"];
        let mut bytes = Vec::new();
        for (kind, payload) in (0..).zip(payloads) {
            write_frame(&mut bytes, kind, payload).unwrap();
        }
        let (mut reader, mut payload) = (bytes.as_slice(), Vec::new());
        for (kind, expected) in (0..).zip(payloads) {
            assert_eq!(read_frame(&mut reader, 100_000, &mut payload).unwrap(), kind);
            assert_eq!(payload, expected);
        }
        assert!(matches!(read_frame(&mut reader, 100_000, &mut payload), Err(WireError::Closed)));
    }

    #[test]
    fn a_long_frame_is_refused_before_memory_is_taken() {
        let (mut reader, mut payload) = (&[0xff; 64][..], Vec::new());
        let error = read_frame(&mut reader, 1000, &mut payload).unwrap_err();
        assert!(matches!(error, WireError::TooLong { length: 0xffff_ffff, max: 1000 }), "{error}");
        assert_eq!(payload.capacity(), 0);
    }

    #[test]
    fn a_frame_survives_a_writer_that_takes_little() {
        struct Trickle(Vec<u8>);
        impl Write for Trickle {
            fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
                let length = buffer.len().min(3);
                self.0.extend_from_slice(&buffer[..length]);
                Ok(length)
            }
            fn flush(&mut self) -> io::Result<()> {
                Ok(())
            }
        }
        let mut trickle = Trickle(Vec::new());
        write_frame(&mut trickle, 9, b"seven bytes, twice").unwrap();
        let mut payload = Vec::new();
        assert_eq!(read_frame(&mut trickle.0.as_slice(), 100, &mut payload).unwrap(), 9);
        assert_eq!(payload, b"seven bytes, twice");
    }
}
