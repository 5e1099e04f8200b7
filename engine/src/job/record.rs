//! What the journal records: what its rows were made from, which were begun, and the output line of each that is done.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::frame::{self, Frame};

/// Names a row by everything that determines its line: model, precision, prompt settings, sampling, the input row and the sample.
pub(super) type Key = [u8; 16];

const HEADER: u8 = 0;
const BEGUN: u8 = 1;
const DONE: u8 = 2;

/// Bytes of a DONE record before the line: key, failed, prompt tokens, completion tokens.
const DONE_HEAD: usize = 16 + 1 + 4 + 4;

/// The first record of each file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Header {
    pub(super) schema: u32,
    pub(super) attempt: u32,
    /// Of checkpoint, device and precision.
    pub(super) model: String,
    /// Digest of the model and of the job's settings; a part of each row's key.
    pub(super) settings: String,
    /// Digest of all input rows.
    pub(super) input: String,
    pub(super) rows: u64,
}

impl Header {
    /// Of what all attempts and replicas at the same rows have in common.
    pub(super) fn digest(&self) -> [u8; 32] {
        Sha256::new().chain_update(&self.input).chain_update(self.rows.to_le_bytes()).finalize().into()
    }
}

/// What is counted about a row.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    pub(super) failed: bool,
    pub(super) prompt_tokens: u32,
    pub(super) completion_tokens: u32,
}

/// A row that is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Done {
    pub(super) key: Key,
    pub(super) counts: Counts,
    /// Without a line break.
    pub(super) line: String,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Record {
    Header(Header),
    Begun(Key),
    Done(Done),
}

impl Record {
    /// `None` for what this version does not know.
    pub(super) fn decode(frame: Frame) -> Option<Self> {
        let Frame { kind, mut payload } = frame;
        match kind {
            HEADER => serde_json::from_slice(&payload).ok().map(Self::Header),
            BEGUN => payload.try_into().ok().map(Self::Begun),
            DONE if payload.len() >= DONE_HEAD => {
                let line = String::from_utf8(payload.split_off(DONE_HEAD)).ok()?;
                let number = |at: usize| Some(u32::from_le_bytes(payload.get(at..at + 4)?.try_into().ok()?));
                Some(Self::Done(Done {
                    key: payload.get(..16)?.try_into().ok()?,
                    counts: Counts {
                        failed: payload[16] != 0,
                        prompt_tokens: number(17)?,
                        completion_tokens: number(21)?,
                    },
                    line,
                }))
            }
            _ => None,
        }
    }

    pub(super) fn encode(&self, bytes: &mut Vec<u8>) {
        match self {
            Self::Header(header) => {
                let json = serde_json::to_vec(header).expect("texts and numbers are JSON");
                frame::encode(HEADER, &[&json], bytes);
            }
            Self::Begun(key) => frame::encode(BEGUN, &[key], bytes),
            Self::Done(done) => {
                let Counts { failed, prompt_tokens, completion_tokens } = done.counts;
                let tokens = [prompt_tokens.to_le_bytes(), completion_tokens.to_le_bytes()].concat();
                frame::encode(DONE, &[&done.key, &[u8::from(failed)], &tokens, done.line.as_bytes()], bytes);
            }
        }
    }
}

/// The key of one sample of an input row.
pub(super) fn key(settings: &str, row: &[u8; 32], sample: u32) -> Key {
    let hash = Sha256::new().chain_update(settings).chain_update(row).chain_update(sample.to_le_bytes()).finalize();
    let mut key = Key::default();
    key.copy_from_slice(&hash[..16]);
    key
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn records_come_back() {
        let header =
            Header { schema: 1, attempt: 2, model: "m".into(), settings: "s".into(), input: "i".into(), rows: 7 };
        let counts = Counts { failed: true, prompt_tokens: 5, completion_tokens: 1 << 20 };
        let done = Done { key: [3; 16], counts, line: "{\"é\":1}".into() };
        for record in [Record::Header(header), Record::Begun([9; 16]), Record::Done(done)] {
            let mut bytes = Vec::new();
            record.encode(&mut bytes);
            let frame = frame::read(&mut bytes.as_slice()).unwrap().unwrap();
            assert_eq!(Record::decode(frame), Some(record));
        }
        assert_eq!(Record::decode(Frame { kind: 2, payload: vec![0; DONE_HEAD - 1] }), None);
        assert_eq!(Record::decode(Frame { kind: 77, payload: Vec::new() }), None);
    }

    #[test]
    fn a_key_depends_on_all_its_parts() {
        let keys = [key("a", &[0; 32], 0), key("b", &[0; 32], 0), key("a", &[1; 32], 0), key("a", &[0; 32], 1)];
        assert!((1..4).all(|other| keys[0] != keys[other]));
    }
}
