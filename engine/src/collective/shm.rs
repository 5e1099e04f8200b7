//! A link through shared memory, for ranks of one host.
//!
//! One side creates an unnamed memory file and offers it over their authenticated connection; the other opens it through /proc. So nothing
//! is left behind, whoever is killed. The file holds a ring of bytes for each direction. Each ring has one producer, who advances
//! `written`, and one consumer, who advances `read`; both count bytes modulo 2³². Who waits spins for some microseconds, then sleeps on
//! the word that will change. The connection stays open: its end says that the peer is gone.

use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::mem;
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::ptr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering, fence};
use std::time::{Duration, Instant};

use memmap2::{MmapOptions, MmapRaw};
use nix::fcntl::{FcntlArg, SealFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};
use rand::TryRngCore;
use rand::rngs::OsRng;
use serde::{Deserialize, Serialize};

use super::Link;

/// Bytes of a ring; a power of two, so that counts modulo 2³² stay positions in it.
const RING: usize = 1 << 20;
/// Where the rings begin in the file, after the header.
const RINGS: usize = 4096;
const FILE: usize = RINGS + 2 * RING;
/// Bytes that are copied before the other side hears of them, so that both sides of a large transfer copy at the same time.
const CHUNK: usize = 64 << 10;
const SPIN: Duration = Duration::from_micros(10);
/// How often a sleeper looks whether its peer is still there.
const SLEEP: libc::timespec = libc::timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// Where the memory file of a [`Region`] can be opened, and how to know that it is the right one.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Offer {
    boot_id: String,
    pid: u32,
    fd: i32,
    cookie: [u64; 2],
}

/// The shared memory of two ranks.
pub struct Region {
    map: MmapRaw,
    /// The peer opens the creator's descriptor.
    file: File,
    side: Side,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Side {
    Creator,
    Opener,
}

/// The beginning of the file. Only atomics: the peer may write at any time.
#[repr(C)]
struct Header {
    cookie: [AtomicU64; 2],
    /// From the creator, to the creator.
    rings: [Counts; 2],
}

#[repr(C)]
struct Counts {
    written: Word,
    read: Word,
}

/// A count that one side advances and the other may sleep on. Two cache lines, because processors fetch them in pairs.
#[repr(C, align(128))]
struct Word {
    count: AtomicU32,
    /// Not 0 while somebody may sleep.
    sleeper: AtomicU32,
}

const _: () = assert!(mem::size_of::<Header>() <= RINGS && RING.is_power_of_two());

impl Region {
    /// A new region, and the offer for the peer.
    ///
    /// # Errors
    /// The system has no memory files or no memory.
    pub fn create() -> io::Result<(Self, Offer)> {
        let file = File::from(memfd_create("nemotron-link", MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING)?);
        file.set_len(FILE as u64)?;
        fcntl(&file, FcntlArg::F_ADD_SEALS(seals()))?;
        let region = Self::map(file, Side::Creator)?;
        let cookie = [random()?, random()?];
        for (word, value) in region.header().cookie.iter().zip(cookie) {
            word.store(value, Ordering::Relaxed);
        }
        let offer = Offer { boot_id: boot_id()?, pid: std::process::id(), fd: region.file.as_raw_fd(), cookie };
        Ok((region, offer))
    }

    /// Opens what the peer has offered.
    ///
    /// # Errors
    /// The peer is on another host, out of sight (another user, another container), or offers something else.
    pub fn open(offer: &Offer) -> io::Result<Self> {
        let refuse = |reason| Err(io::Error::new(ErrorKind::InvalidInput, reason));
        if offer.boot_id != boot_id()? {
            return refuse("another host");
        }
        // In another PID namespace this path may lead to anything, so opening must have no effect and never wait.
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK | libc::O_NOCTTY)
            .open(format!("/proc/{}/fd/{}", offer.pid, offer.fd))?;
        let metadata = file.metadata()?;
        if !metadata.is_file() || metadata.len() != FILE as u64 {
            return refuse("not a region");
        }
        if !SealFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GET_SEALS)?).contains(seals()) {
            return refuse("a region that could shrink");
        }
        let region = Self::map(file, Side::Opener)?;
        if region.header().cookie.each_ref().map(|word| word.load(Ordering::Relaxed)) != offer.cookie {
            return refuse("another region");
        }
        Ok(region)
    }

    /// Maps a file of [`FILE`] bytes that is sealed against shrinking.
    fn map(file: File, side: Side) -> io::Result<Self> {
        let map = MmapOptions::new().len(FILE).map_raw(&file)?;
        Ok(Self { map, file, side })
    }

    fn header(&self) -> &Header {
        // SAFETY: the mapping is FILE bytes (≥ the header, asserted above), page-aligned, and lives as long as `self`; the file cannot shrink
        // under it. All fields are atomics, which are valid for any bytes and may change at any time.
        unsafe { &*self.map.as_ptr().cast::<Header>() }
    }

    /// The first byte of ring 0 or 1.
    fn ring(&self, index: usize) -> *mut u8 {
        assert!(index < 2);
        // SAFETY: RINGS + index · RING lies inside the mapping of RINGS + 2 · RING bytes.
        unsafe { self.map.as_mut_ptr().add(RINGS + index * RING) }
    }
}

/// A link over a region that both sides have mapped.
pub struct ShmLink {
    region: Region,
    /// Index of the ring that this side writes to; it reads from the other.
    outgoing: usize,
    /// This side's own counts. Those in the shared memory are for the peer, and never believed.
    written: u32,
    read: u32,
    /// Nothing is sent here; it ends when the peer does.
    lifeline: TcpStream,
}

impl ShmLink {
    /// `lifeline` is the connection over which the region was agreed on.
    ///
    /// # Errors
    /// The socket cannot be made non-blocking.
    pub fn new(region: Region, lifeline: TcpStream) -> io::Result<Self> {
        lifeline.set_nonblocking(true)?;
        let outgoing = usize::from(region.side == Side::Opener);
        Ok(Self { region, outgoing, written: 0, read: 0, lifeline })
    }

    /// Copies as much of `bytes` into the outgoing ring as fits and returns how much that was.
    fn push(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let counts = &self.region.header().rings[self.outgoing];
        let used = ring_distance(self.written, counts.read.count.load(Ordering::Acquire))?;
        let length = bytes.len().min(RING - used).min(CHUNK);
        if length == 0 {
            return Ok(0);
        }
        let ring = self.region.ring(self.outgoing);
        let position = self.written as usize % RING;
        let until_end = length.min(RING - position);
        // SAFETY: position + until_end ≤ RING and length − until_end ≤ RING, so both parts lie in the ring; `length` ≤ bytes.len(). The
        // peer reads these bytes only after `written` has passed them. `bytes` is ordinary memory, not the mapping.
        unsafe {
            ptr::copy_nonoverlapping(bytes.as_ptr(), ring.add(position), until_end);
            ptr::copy_nonoverlapping(bytes.as_ptr().add(until_end), ring, length - until_end);
        }
        self.written = self.written.wrapping_add(length as u32);
        counts.written.advance(self.written);
        Ok(length)
    }

    /// Copies as much as there is from the incoming ring into `bytes` and returns how much that was.
    fn pull(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        let incoming = 1 - self.outgoing;
        let counts = &self.region.header().rings[incoming];
        let available = ring_distance(counts.written.count.load(Ordering::Acquire), self.read)?;
        let length = bytes.len().min(available).min(CHUNK);
        if length == 0 {
            return Ok(0);
        }
        let ring = self.region.ring(incoming);
        let position = self.read as usize % RING;
        let until_end = length.min(RING - position);
        // SAFETY: as in `push`; the peer wrote these bytes before `written` passed them and leaves them alone until `read` has.
        unsafe {
            ptr::copy_nonoverlapping(ring.add(position), bytes.as_mut_ptr(), until_end);
            ptr::copy_nonoverlapping(ring, bytes.as_mut_ptr().add(until_end), length - until_end);
        }
        self.read = self.read.wrapping_add(length as u32);
        counts.read.advance(self.read);
        Ok(length)
    }

    /// Fails when the peer's end of the connection is closed.
    fn check_peer(&self) -> io::Result<()> {
        match self.lifeline.peek(&mut [0]) {
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(error),
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(_) => Err(io::Error::new(ErrorKind::InvalidData, "the peer sent data where none belongs")),
        }
    }
}

impl Link for ShmLink {
    fn exchange(&mut self, mut send: &[u8], mut recv: &mut [u8]) -> io::Result<()> {
        let mut peer = Ok(());
        loop {
            let pushed = self.push(send)?;
            send = &send[pushed..];
            let pulled = self.pull(recv)?;
            recv = &mut recv[pulled..];
            if send.is_empty() && recv.is_empty() {
                return Ok(());
            }
            if pushed + pulled > 0 {
                continue;
            }
            // What the peer sent before it went is in the ring, so its end counts only when the ring has been found empty after it.
            peer?;
            let rings = &self.region.header().rings;
            // Waiting for incoming bytes is enough while both directions are unfinished: the peer takes ours in the same exchange.
            let awake = if recv.is_empty() {
                rings[self.outgoing].read.wait_while(self.written.wrapping_sub(RING as u32))
            } else {
                rings[1 - self.outgoing].written.wait_while(self.read)
            };
            peer = if awake { Ok(()) } else { self.check_peer() };
        }
    }

    fn medium(&self) -> &'static str {
        "shared memory"
    }
}

impl Word {
    /// Publishes the count, and all that was written before, and wakes a sleeper.
    fn advance(&self, count: u32) {
        self.count.store(count, Ordering::Release);
        // With the fence in `wait_while`: either this side sees the sleeper, or the sleeper sees the count.
        fence(Ordering::SeqCst);
        if self.sleeper.load(Ordering::Relaxed) != 0 {
            self.sleeper.store(0, Ordering::Relaxed);
            futex(&self.count, libc::FUTEX_WAKE, 1, ptr::null());
        }
    }

    /// Waits until the count is not `count`, or for [`SLEEP`]; false if it is time to look after the peer.
    fn wait_while(&self, count: u32) -> bool {
        let start = Instant::now();
        while start.elapsed() < SPIN {
            if self.count.load(Ordering::Acquire) != count {
                return true;
            }
            std::hint::spin_loop();
        }
        self.sleeper.store(1, Ordering::Relaxed);
        fence(Ordering::SeqCst);
        futex(&self.count, libc::FUTEX_WAIT, count, &SLEEP)
    }
}

/// Waits while `word` is `value` or wakes `value` waiters, in any process. False after the timeout or a signal.
fn futex(word: &AtomicU32, operation: libc::c_int, value: u32, timeout: *const libc::timespec) -> bool {
    // SAFETY: `word` is an aligned u32 that outlives the call, which only reads it; `timeout` is null or points to a constant.
    let result = unsafe { libc::syscall(libc::SYS_futex, word.as_ptr(), operation, value, timeout) };
    // EAGAIN: the word has already changed.
    result >= 0 || io::Error::last_os_error().raw_os_error() == Some(libc::EAGAIN)
}

/// `ahead` − `behind`, two counts of one ring of which the peer may have written anything to one.
fn ring_distance(ahead: u32, behind: u32) -> io::Result<usize> {
    let distance = ahead.wrapping_sub(behind) as usize;
    if distance > RING {
        return Err(io::Error::new(ErrorKind::InvalidData, "the peer corrupted the shared memory"));
    }
    Ok(distance)
}

/// A region keeps its size: access to a shrunk one would kill the process.
fn seals() -> SealFlag {
    SealFlag::F_SEAL_SHRINK | SealFlag::F_SEAL_GROW | SealFlag::F_SEAL_SEAL
}

/// Names this start of this host's kernel.
fn boot_id() -> io::Result<String> {
    Ok(fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

fn random() -> io::Result<u64> {
    OsRng.try_next_u64().map_err(io::Error::other)
}

#[cfg(test)]
pub(super) mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::super::tcp::tests::streams;
    use super::*;

    fn shm_pair() -> (ShmLink, ShmLink) {
        let (region, offer) = Region::create().unwrap();
        let (a, b) = streams();
        (ShmLink::new(region, a).unwrap(), ShmLink::new(Region::open(&offer).unwrap(), b).unwrap())
    }

    pub(crate) fn pair() -> (Box<dyn Link>, Box<dyn Link>) {
        let (a, b) = shm_pair();
        (Box::new(a), Box::new(b))
    }

    #[test]
    fn only_the_region_that_was_offered_is_opened() {
        let (region, offer) = Region::create().unwrap();
        assert!(Region::open(&offer).is_ok());
        assert!(Region::open(&Offer { boot_id: "another".into(), ..offer.clone() }).is_err());
        assert!(Region::open(&Offer { cookie: [1, 2], ..offer.clone() }).is_err());
        assert!(Region::open(&Offer { pid: u32::MAX, ..offer.clone() }).is_err());

        let (other, other_offer) = Region::create().unwrap();
        assert!(Region::open(&Offer { fd: other_offer.fd, ..offer.clone() }).is_err());
        drop(other);

        let ordinary = tempfile::tempfile().unwrap();
        ordinary.set_len(FILE as u64).unwrap();
        assert!(Region::open(&Offer { fd: ordinary.as_raw_fd(), ..offer.clone() }).is_err());
        drop(region);
        assert!(Region::open(&offer).is_err());
    }

    #[test]
    fn a_region_cannot_shrink() {
        let (region, _offer) = Region::create().unwrap();
        assert!(region.file.set_len(0).is_err());
    }

    #[test]
    fn counts_go_round() {
        let (mut a, mut b) = shm_pair();
        // As after almost 4 GiB.
        let count = u32::MAX - 1000;
        for link in [&mut a, &mut b] {
            (link.written, link.read) = (count, count);
        }
        for counts in &a.region.header().rings {
            counts.written.count.store(count, Ordering::Relaxed);
            counts.read.count.store(count, Ordering::Relaxed);
        }
        let sent: Vec<u8> = (0..3 * RING).map(|i| (i % 251) as u8).collect();
        let mut received = vec![0; sent.len()];
        std::thread::scope(|scope| {
            scope.spawn(|| a.send(&sent).unwrap());
            b.recv(&mut received).unwrap();
        });
        assert!(sent == received);
    }

    #[test]
    fn counts_that_cannot_be_are_an_error() {
        for corrupt in [RING as u32 + 1, u32::MAX] {
            let (mut a, b) = shm_pair();
            b.region.header().rings[1].written.count.store(corrupt, Ordering::Relaxed);
            assert_eq!(a.recv(&mut [0]).unwrap_err().kind(), ErrorKind::InvalidData);
            b.region.header().rings[0].read.count.store(corrupt, Ordering::Relaxed);
            assert_eq!(a.send(&[0]).unwrap_err().kind(), ErrorKind::InvalidData);
        }
    }

    #[test]
    fn what_a_peer_sent_before_it_went_still_arrives() {
        let (mut a, mut b) = shm_pair();
        a.send(b"last words").unwrap();
        drop(a);
        let mut received = [0; 10];
        b.recv(&mut received).unwrap();
        assert_eq!(&received, b"last words");
        assert_eq!(b.recv(&mut received).unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }
}
