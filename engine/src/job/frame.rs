//! Records in an append-only file: framed, so that a reader finds the whole ones whatever was cut off or damaged.
//!
//! A frame is `MAGIC | kind: u8 | length: u32 LE | CRC32C of kind, length and payload: u32 LE | payload`.

use std::io::{self, BufReader, Read, Seek, SeekFrom};

/// Two of its bytes never occur in UTF-8, so no text inside a payload looks like the start of a frame.
const MAGIC: [u8; 4] = [0xFF, b'n', b'j', 0xFE];

/// Bytes before the payload.
const HEAD: usize = MAGIC.len() + 1 + 4 + 4;

/// No record is longer; a length beyond it is damage.
pub(super) const MAX_PAYLOAD: usize = 1 << 28;

/// A record as it lies in the file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) kind: u8,
    pub(super) payload: Vec<u8>,
}

impl Frame {
    /// Bytes in the file.
    pub(super) fn len(&self) -> u64 {
        (HEAD + self.payload.len()) as u64
    }
}

/// Appends a frame to `bytes`. The payload, given in parts, has at most [`MAX_PAYLOAD`] bytes.
pub(super) fn encode(kind: u8, payload: &[&[u8]], bytes: &mut Vec<u8>) {
    let length: usize = payload.iter().map(|part| part.len()).sum();
    debug_assert!(length <= MAX_PAYLOAD);
    let length = (length as u32).to_le_bytes();
    let crc = payload.iter().fold(checksum(kind, length), |crc, part| crc32c::crc32c_append(crc, part));
    bytes.extend_from_slice(&MAGIC);
    bytes.push(kind);
    bytes.extend_from_slice(&length);
    bytes.extend_from_slice(&crc.to_le_bytes());
    payload.iter().for_each(|part| bytes.extend_from_slice(part));
}

fn checksum(kind: u8, length: [u8; 4]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(&[kind]), &length)
}

/// The frame that `file` goes on with; `None` when there is no whole and sound one.
pub(super) fn read(file: &mut impl Read) -> io::Result<Option<Frame>> {
    let mut head = [0; HEAD];
    if !fill(file, &mut head)? || head[..4] != MAGIC {
        return Ok(None);
    }
    let kind = head[4];
    let length = [head[5], head[6], head[7], head[8]];
    let crc = u32::from_le_bytes([head[9], head[10], head[11], head[12]]);
    let len = u32::from_le_bytes(length) as usize;
    if len > MAX_PAYLOAD {
        return Ok(None);
    }
    // A damaged length asks for no more memory than the file has bytes.
    let mut payload = Vec::new();
    file.take(len as u64).read_to_end(&mut payload)?;
    let sound = payload.len() == len && crc32c::crc32c_append(checksum(kind, length), &payload) == crc;
    Ok(sound.then_some(Frame { kind, payload }))
}

/// False when the file ends before.
fn fill(file: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match file.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

/// What a file held beside its sound frames.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Damage {
    /// Stretches between sound frames that are none themselves.
    pub(super) damaged: u64,
    /// Bytes after the last sound frame: a record that was being written when the writer was stopped.
    pub(super) torn: u64,
}

/// Hands each sound frame to `take`, with its offset in the file.
pub(super) fn scan(file: impl Read + Seek, mut take: impl FnMut(u64, Frame)) -> io::Result<Damage> {
    let mut file = BufReader::with_capacity(1 << 16, file);
    let mut damage = Damage::default();
    let mut offset = 0;
    // Where the bytes begin that are no sound frame.
    let mut unsound = None;
    loop {
        if let Some(frame) = read(&mut file)? {
            if unsound.take().is_some() {
                damage.damaged += 1;
            }
            let len = frame.len();
            take(offset, frame);
            offset += len;
            continue;
        }
        let begin = *unsound.get_or_insert(offset);
        match find_magic(&mut file, offset + 1)? {
            Some(next) => offset = next,
            None => {
                damage.torn = file.seek(SeekFrom::End(0))?.saturating_sub(begin);
                return Ok(damage);
            }
        }
        file.seek(SeekFrom::Start(offset))?;
    }
}

/// Where the next frame could begin, from `offset` on.
fn find_magic(file: &mut (impl io::BufRead + Seek), offset: u64) -> io::Result<Option<u64>> {
    file.seek(SeekFrom::Start(offset))?;
    let (mut at, mut last) = (offset, [0; 4]);
    loop {
        let buffer = file.fill_buf()?;
        if buffer.is_empty() {
            return Ok(None);
        }
        for &byte in buffer {
            last = [last[1], last[2], last[3], byte];
            at += 1;
            if last == MAGIC {
                return Ok(Some(at - MAGIC.len() as u64));
            }
        }
        let len = buffer.len();
        file.consume(len);
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    fn scanned(bytes: &[u8]) -> (Vec<(u64, Frame)>, Damage) {
        let mut frames = Vec::new();
        let damage = scan(Cursor::new(bytes), |offset, frame| frames.push((offset, frame))).unwrap();
        (frames, damage)
    }

    fn file(payloads: &[Vec<u8>]) -> (Vec<u8>, Vec<usize>) {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for (kind, payload) in payloads.iter().enumerate() {
            encode(kind as u8, &[payload], &mut bytes);
            ends.push(bytes.len());
        }
        (bytes, ends)
    }

    #[test]
    fn frames_come_back_with_their_offsets() {
        let (bytes, ends) = file(&[b"one".to_vec(), Vec::new(), vec![7; 100_000]]);
        let (frames, damage) = scanned(&bytes);
        assert_eq!(damage, Damage::default());
        let offsets: Vec<u64> = frames.iter().map(|(offset, _)| *offset).collect();
        assert_eq!(offsets, [0, ends[0] as u64, ends[1] as u64]);
        assert_eq!(frames[2].1, Frame { kind: 2, payload: vec![7; 100_000] });
        assert_eq!(read(&mut &bytes[ends[0]..]).unwrap(), Some(frames[1].1.clone()));
    }

    #[test]
    fn a_file_cut_anywhere_keeps_what_was_whole() {
        let (bytes, ends) = file(&[b"first".to_vec(), MAGIC.to_vec(), b"third".to_vec()]);
        for len in 0..=bytes.len() {
            let whole = ends.iter().filter(|&&end| end <= len).count();
            let (frames, damage) = scanned(&bytes[..len]);
            assert_eq!(frames.len(), whole, "cut at {len}");
            let end = if whole == 0 { 0 } else { ends[whole - 1] };
            assert_eq!(damage, Damage { damaged: 0, torn: (len - end) as u64 });
        }
    }

    #[test]
    fn a_flipped_byte_costs_its_record_alone() {
        let payloads = [b"first".to_vec(), b"the second".to_vec(), b"third".to_vec()];
        let (bytes, ends) = file(&payloads);
        for at in ends[0]..ends[1] {
            for mask in [1, 0x80, 0xFF] {
                let mut bytes = bytes.clone();
                bytes[at] ^= mask;
                let (frames, damage) = scanned(&bytes);
                let kinds: Vec<u8> = frames.iter().map(|(_, frame)| frame.kind).collect();
                assert_eq!((kinds, damage), (vec![0, 2], Damage { damaged: 1, torn: 0 }), "byte {at}");
            }
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_without_harm(bytes: Vec<u8>, tail: Vec<u8>) {
            let mut all = bytes;
            let offset = all.len() as u64;
            encode(9, &[&tail], &mut all);
            let (frames, _) = scanned(&all);
            let found = frames.contains(&(offset, Frame { kind: 9, payload: tail }));
            prop_assert!(found);
        }
    }
}
