//! The messages between rank 0 and the others: one [`StepPlan`] a step to all, one [`StepResult`] back from the rank that samples.
//!
//! Both are sequences of little-endian u32 words with a version in front, decoded into reused memory. A plan holds deltas: what a slot is
//! (its sampling rules) is sent once, when a sequence is admitted, and each page when the slot gets it.

pub use nemotron_kernels::ops::CHOSEN;

use crate::request::{LogprobSpec, Logprobs, Sampling};

/// Increased with every change of the encoding; ranks of different versions never get past the rendezvous.
const VERSION: u32 = 2;

/// Index of a running sequence's persistent state on every rank.
pub type Slot = u32;

/// What every rank does in one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepPlan {
    pub step: u64,
    /// Slots whose pages are taken away, before anything else; what was in them is computed again later.
    pub preempted: Vec<Slot>,
    /// Slots whose sequences ended; their state is dropped.
    pub released: Vec<Slot>,
    pub admitted: Vec<Admission>,
    /// Pages that slots get behind those they have.
    pub pages: Vec<(Slot, u32)>,
    pub work: Vec<Work>,
    /// Ids of all `work`, one after another. In a step that was planned before the one ahead of it was done, [`CHOSEN`] with a slot stands for
    /// what the device chose for that slot.
    pub tokens: Vec<u32>,
}

/// A sequence takes a slot.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Admission {
    pub slot: Slot,
    pub prompt_len: u32,
    /// Pages for all positions that the sequence can reach.
    pub max_pages: u32,
    /// The prompt's beginning that is in the cache already, in the first pages that the slot gets.
    pub cached: Vec<u32>,
    pub sampling: Sampling,
    pub min_new_tokens: u32,
    pub eos_ids: Vec<u32>,
    pub logprobs: LogprobSpec,
}

/// Consecutive tokens of one sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Work {
    pub slot: Slot,
    pub first_position: u32,
    pub num_tokens: u32,
    /// A token is sampled from the last row.
    pub samples: bool,
    /// The id after this chunk if it is still part of the prompt, for prompt log-probabilities.
    pub next_prompt_token: Option<u32>,
}

/// What the sampling rank reports of one step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepResult {
    pub step: u64,
    pub rows: Vec<RowResult>,
}

/// What one [`Work`] gave.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RowResult {
    pub slot: Slot,
    /// Of prompt positions, if asked for.
    pub prompt: Vec<Logprobs>,
    /// `None` while the prompt is not complete.
    pub token: Option<u32>,
    pub logprobs: Option<Box<Logprobs>>,
    /// The logits were NaN or infinite; the sequence cannot go on.
    pub not_finite: bool,
}

/// A message that cannot be decoded: a bug, or a peer of another version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed step message ({0})")]
pub struct DecodeError(&'static str);

impl StepPlan {
    pub fn is_empty(&self) -> bool {
        self.work.is_empty()
    }

    pub fn clear(&mut self) {
        self.preempted.clear();
        self.released.clear();
        self.admitted.clear();
        self.pages.clear();
        self.work.clear();
        self.tokens.clear();
    }

    /// Replaces `out` by the encoded plan.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut words = Writer::new(out);
        words.u64(self.step);
        words.list(&self.preempted);
        words.list(&self.released);
        words.u32(self.admitted.len() as u32);
        for admission in &self.admitted {
            let Admission { slot, prompt_len, max_pages, cached, sampling, min_new_tokens, eos_ids, logprobs } =
                admission;
            words.u32(*slot);
            words.u32(*prompt_len);
            words.u32(*max_pages);
            words.list(cached);
            words.u32(*min_new_tokens);
            words.list(eos_ids);
            words.u32(u32::from(sampling.greedy));
            words.u32(sampling.top_k);
            words.u32(sampling.sample);
            words.u64(sampling.seed);
            for value in [
                sampling.temperature,
                sampling.top_p,
                sampling.repetition_penalty,
                sampling.frequency_penalty,
                sampling.presence_penalty,
            ] {
                words.f32(value);
            }
            words.u32(sampling.logit_bias.len() as u32);
            for (id, bias) in &sampling.logit_bias {
                words.u32(*id);
                words.f32(*bias);
            }
            let flags = u32::from(logprobs.tokens)
                | u32::from(logprobs.prompt) << 1
                | u32::from(logprobs.full) << 2
                | u32::from(logprobs.rewards) << 3;
            words.u32(flags | u32::from(logprobs.top) << 16);
        }
        words.u32(self.pages.len() as u32);
        for (slot, page) in &self.pages {
            words.u32(*slot);
            words.u32(*page);
        }
        words.u32(self.work.len() as u32);
        for work in &self.work {
            words.u32(work.slot);
            words.u32(work.first_position);
            words.u32(work.num_tokens);
            words.u32(u32::from(work.samples));
            words.u32(work.next_prompt_token.unwrap_or(u32::MAX));
        }
        words.list(&self.tokens);
    }

    /// Replaces this plan by an encoded one.
    ///
    /// # Errors
    /// The bytes are not a plan of this version, or its parts do not agree.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let mut words = Reader::new(bytes)?;
        self.clear();
        self.step = words.u64()?;
        words.list(&mut self.preempted)?;
        words.list(&mut self.released)?;
        for _ in 0..words.u32()? {
            let mut admission = Admission { slot: words.u32()?, ..Admission::default() };
            admission.prompt_len = words.u32()?;
            admission.max_pages = words.u32()?;
            words.list(&mut admission.cached)?;
            admission.min_new_tokens = words.u32()?;
            words.list(&mut admission.eos_ids)?;
            let sampling = &mut admission.sampling;
            sampling.greedy = words.u32()? != 0;
            sampling.top_k = words.u32()?;
            sampling.sample = words.u32()?;
            sampling.seed = words.u64()?;
            sampling.temperature = words.f32()?;
            sampling.top_p = words.f32()?;
            sampling.repetition_penalty = words.f32()?;
            sampling.frequency_penalty = words.f32()?;
            sampling.presence_penalty = words.f32()?;
            for _ in 0..words.u32()? {
                sampling.logit_bias.push((words.u32()?, words.f32()?));
            }
            let flags = words.u32()?;
            admission.logprobs = LogprobSpec {
                tokens: flags & 1 != 0,
                prompt: flags & 2 != 0,
                full: flags & 4 != 0,
                rewards: flags & 8 != 0,
                top: (flags >> 16) as u16,
            };
            self.admitted.push(admission);
        }
        for _ in 0..words.u32()? {
            self.pages.push((words.u32()?, words.u32()?));
        }
        for _ in 0..words.u32()? {
            self.work.push(Work {
                slot: words.u32()?,
                first_position: words.u32()?,
                num_tokens: words.u32()?,
                samples: words.u32()? != 0,
                next_prompt_token: Some(words.u32()?).filter(|id| *id != u32::MAX),
            });
        }
        words.list(&mut self.tokens)?;
        let num_tokens: u64 = self.work.iter().map(|work| u64::from(work.num_tokens)).sum();
        if num_tokens != self.tokens.len() as u64 {
            return Err(DecodeError("token count"));
        }
        words.end()
    }
}

impl StepResult {
    /// Replaces `out` by the encoded result.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut words = Writer::new(out);
        words.u64(self.step);
        words.u32(self.rows.len() as u32);
        for row in &self.rows {
            words.u32(row.slot);
            words.u32(u32::from(row.not_finite));
            words.u32(row.token.unwrap_or(u32::MAX));
            words.u32(u32::from(row.logprobs.is_some()));
            words.u32(row.prompt.len() as u32);
            for logprobs in row.logprobs.iter().map(|boxed| &**boxed).chain(&row.prompt) {
                words.f32(logprobs.token);
                words.u32(logprobs.top.len() as u32);
                for (id, value) in &logprobs.top {
                    words.u32(*id);
                    words.f32(*value);
                }
                words.u32(logprobs.full.len() as u32);
                words.out.extend(logprobs.full.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }

    /// Replaces this result by an encoded one.
    ///
    /// # Errors
    /// The bytes are not a result of this version.
    pub fn decode(&mut self, bytes: &[u8]) -> Result<(), DecodeError> {
        let mut words = Reader::new(bytes)?;
        self.rows.clear();
        self.step = words.u64()?;
        for _ in 0..words.u32()? {
            let mut row = RowResult { slot: words.u32()?, ..RowResult::default() };
            row.not_finite = words.u32()? != 0;
            row.token = Some(words.u32()?).filter(|id| *id != u32::MAX);
            let has_logprobs = words.u32()? != 0;
            let num_prompt = words.u32()?;
            if has_logprobs {
                row.logprobs = Some(Box::new(words.logprobs()?));
            }
            for _ in 0..num_prompt {
                row.prompt.push(words.logprobs()?);
            }
            self.rows.push(row);
        }
        words.end()
    }
}

struct Writer<'a> {
    out: &'a mut Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(out: &'a mut Vec<u8>) -> Self {
        out.clear();
        let mut words = Self { out };
        words.u32(VERSION);
        words
    }

    fn u32(&mut self, value: u32) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.out.extend_from_slice(&value.to_le_bytes());
    }

    fn f32(&mut self, value: f32) {
        self.u32(value.to_bits());
    }

    fn list(&mut self, values: &[u32]) {
        self.u32(values.len() as u32);
        self.out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

struct Reader<'a> {
    words: std::slice::Iter<'a, [u8; 4]>,
}

impl<'a> Reader<'a> {
    fn new(bytes: &'a [u8]) -> Result<Self, DecodeError> {
        let (words, rest) = bytes.as_chunks::<4>();
        let mut words = Self { words: words.iter() };
        if !rest.is_empty() || words.u32()? != VERSION {
            return Err(DecodeError("version"));
        }
        Ok(words)
    }

    fn u32(&mut self) -> Result<u32, DecodeError> {
        self.words.next().map(|word| u32::from_le_bytes(*word)).ok_or(DecodeError("length"))
    }

    fn u64(&mut self) -> Result<u64, DecodeError> {
        Ok(u64::from(self.u32()?) | u64::from(self.u32()?) << 32)
    }

    fn f32(&mut self) -> Result<f32, DecodeError> {
        self.u32().map(f32::from_bits)
    }

    /// Appends a list; its length is checked against what is there, so that a bad length allocates nothing.
    fn list(&mut self, out: &mut Vec<u32>) -> Result<(), DecodeError> {
        let len = self.u32()? as usize;
        if len > self.words.len() {
            return Err(DecodeError("list length"));
        }
        out.extend(self.words.by_ref().take(len).map(|word| u32::from_le_bytes(*word)));
        Ok(())
    }

    fn logprobs(&mut self) -> Result<Logprobs, DecodeError> {
        let mut logprobs = Logprobs { token: self.f32()?, ..Logprobs::default() };
        for _ in 0..self.u32()? {
            logprobs.top.push((self.u32()?, self.f32()?));
        }
        let mut full = Vec::new();
        self.list(&mut full)?;
        logprobs.full = full.into_iter().map(f32::from_bits).collect();
        Ok(logprobs)
    }

    fn end(&self) -> Result<(), DecodeError> {
        if self.words.len() == 0 { Ok(()) } else { Err(DecodeError("trailing words")) }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use proptest::prelude::*;

    use super::*;

    fn plan() -> StepPlan {
        StepPlan {
            step: 1 << 40,
            preempted: vec![4],
            released: vec![3, 9],
            admitted: vec![Admission {
                slot: 7,
                prompt_len: 40,
                max_pages: 4,
                cached: vec![11, 300],
                sampling: Sampling {
                    greedy: false,
                    temperature: 0.7,
                    seed: u64::MAX - 1,
                    logit_bias: vec![(4, -100.0)],
                    ..Sampling::default()
                },
                min_new_tokens: 2,
                eos_ids: vec![3, 5],
                logprobs: LogprobSpec { tokens: true, prompt: false, top: 5, full: true, rewards: true },
            }],
            pages: vec![(7, 5), (7, 0), (1, 12)],
            work: vec![
                Work { slot: 7, first_position: 0, num_tokens: 2, samples: false, next_prompt_token: Some(11) },
                Work { slot: 1, first_position: 99, num_tokens: 1, samples: true, next_prompt_token: None },
            ],
            tokens: vec![10, 12, 13],
        }
    }

    fn result() -> StepResult {
        let logprobs = Logprobs { token: -0.5, top: vec![(1, -0.5), (2, -3.0)], full: vec![-0.5, -3.0] };
        StepResult {
            step: 12,
            rows: vec![
                RowResult {
                    slot: 2,
                    token: Some(0),
                    logprobs: Some(Box::new(logprobs.clone())),
                    ..RowResult::default()
                },
                RowResult {
                    slot: 3,
                    prompt: vec![logprobs.clone(), logprobs],
                    not_finite: true,
                    ..RowResult::default()
                },
            ],
        }
    }

    #[test]
    fn messages_survive_the_wire() {
        let (mut bytes, mut decoded_plan, mut decoded_result) =
            (Vec::new(), StepPlan::default(), StepResult::default());
        plan().encode(&mut bytes);
        decoded_plan.decode(&bytes).unwrap();
        assert_eq!(decoded_plan, plan());
        result().encode(&mut bytes);
        decoded_result.decode(&bytes).unwrap();
        assert_eq!(decoded_result, result());
    }

    #[test]
    fn a_full_decode_step_is_small() {
        let work = |slot| Work { slot, first_position: 4000, num_tokens: 1, samples: true, next_prompt_token: None };
        let plan = StepPlan { work: (0..256).map(work).collect(), tokens: vec![7; 256], ..StepPlan::default() };
        let mut bytes = Vec::new();
        plan.encode(&mut bytes);
        assert!(bytes.len() <= 16 << 10, "{} bytes", bytes.len());
    }

    proptest! {
        #[test]
        fn damaged_messages_are_refused_or_decoded(cut in any::<prop::sample::Index>(), at in any::<prop::sample::Index>(), flip in 1_u8..) {
            for encode in [|out: &mut Vec<u8>| plan().encode(out), |out: &mut Vec<u8>| result().encode(out)] {
                let mut bytes = Vec::new();
                encode(&mut bytes);
                let truncated = &bytes[..cut.index(bytes.len())];
                prop_assert!(StepPlan::default().decode(truncated).is_err());
                prop_assert!(StepResult::default().decode(truncated).is_err());
                let at = at.index(bytes.len());
                bytes[at] ^= flip;
                let _ = StepPlan::default().decode(&bytes);
                let _ = StepResult::default().decode(&bytes);
            }
        }
    }
}
