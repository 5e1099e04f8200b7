//! What the sampling kernel reads and writes, for the rows of one batch of logits.

use std::sync::Arc;

use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{NOT_FINITE, Sample, SampleRow};

use super::device::{Device, Memory, Pinned};
use super::sizes;
use crate::backend::BackendError;
use crate::request::Choice;
use crate::spec::LOGIT_ROWS;

pub(super) struct SampleData {
    /// [LOGIT_ROWS], then [ids], then [ids] biases, then [LOGIT_ROWS] tokens
    host: Pinned,
    device: Memory,
    ids: usize,
}

impl SampleData {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, BackendError> {
        let (ids, bytes) = sizes::sampling();
        let (host, memory) = (device.allocate_pinned("sampling", bytes)?, device.allocate("sampling", bytes)?);
        Ok(Self { host, device: memory, ids })
    }

    fn ids_at(&self) -> usize {
        LOGIT_ROWS * size_of::<SampleRow>()
    }

    fn biases_at(&self) -> usize {
        self.ids_at() + self.ids * 4
    }

    fn tokens_at(&self) -> usize {
        self.biases_at() + self.ids * 4
    }

    /// Puts the choice of a token for each row on the stream; false if the rows name more ids than there is room for.
    pub(super) fn choose(
        &mut self,
        device: &Device,
        choices: &[Choice],
        vocab: usize,
        (logits, stride): (u64, usize),
    ) -> bool {
        let named = |choice: &Choice| choice.masked.len() + choice.sampling.logit_bias.len() + choice.seen.len();
        if choices.len() > LOGIT_ROWS || choices.iter().map(named).sum::<usize>() > self.ids {
            return false;
        }
        let (mut num_ids, mut num_biases) = (0, 0);
        for (index, choice) in choices.iter().enumerate() {
            let sampling = choice.sampling;
            let first_biased = num_ids;
            for &(id, bias) in &sampling.logit_bias {
                self.put(self.ids_at() + num_ids * 4, id);
                self.put(self.biases_at() + num_ids * 4, bias);
                num_ids += 1;
                num_biases = num_ids;
            }
            let first_masked = num_ids;
            for &id in choice.masked.iter().chain(choice.seen) {
                self.put(self.ids_at() + num_ids * 4, id);
                num_ids += 1;
            }
            let row = SampleRow {
                seed: sampling.seed,
                sample: sampling.sample,
                position: choice.position,
                greedy: u32::from(sampling.greedy),
                temperature: sampling.temperature,
                top_k: sampling.top_k,
                top_p: sampling.top_p,
                repetition_penalty: sampling.repetition_penalty,
                frequency_penalty: sampling.frequency_penalty,
                presence_penalty: sampling.presence_penalty,
                first_masked: first_masked as u32,
                num_masked: choice.masked.len() as u32,
                first_biased: first_biased as u32,
                num_biased: sampling.logit_bias.len() as u32,
                first_seen: (first_masked + choice.masked.len()) as u32,
                num_seen: choice.seen.len() as u32,
                num_prompt: choice.num_prompt,
                logits_row: index as u32,
                num_until_unmasked: 0,
            };
            self.put(index * size_of::<SampleRow>(), row);
        }
        let (ids_at, biases_at, tokens_at) = (self.ids_at(), self.biases_at(), self.tokens_at());
        for (at, bytes) in
            [(0, choices.len() * size_of::<SampleRow>()), (ids_at, num_ids * 4), (biases_at, num_biases * 4)]
        {
            if bytes > 0 {
                device.upload(&self.host, at, bytes, &self.device, at);
            }
        }
        let address = |at: usize| self.device.pointer() + at as u64;
        let sample = Sample {
            logits: Ptr::new(logits),
            rows: Ptr::new(address(0)),
            ids: Ptr::new(address(ids_at)),
            biases: Ptr::new(address(biases_at)),
            tokens: Ptr::new(address(tokens_at)),
            num_rows: choices.len() as u32,
            vocab: vocab as u32,
            stride: stride as u32,
            reserved: 0,
        };
        // SAFETY: the rows were put there, name ids that were, and the logits have as many rows.
        unsafe { device.launch(&sample.launch()) };
        device.download(&self.device, tokens_at, choices.len() * 4, &mut self.host, tokens_at);
        true
    }

    /// The tokens that were chosen for `count` rows, once the stream has passed; `None` for logits that are no numbers.
    pub(super) fn tokens(&self, count: usize) -> impl Iterator<Item = Option<u32>> {
        let words = &self.host.slice::<u32>(self.tokens_at() / 4 + count)[self.tokens_at() / 4..];
        words.iter().map(|&token| (token != NOT_FINITE).then_some(token))
    }

    fn put<T: Copy>(&mut self, at: usize, value: T) {
        let bytes = self.host.slice_mut::<u8>(at + size_of::<T>());
        assert!(at.is_multiple_of(align_of::<T>()), "arrays are aligned");
        // SAFETY: the bytes were just shown to be there; kernels' structs have no padding.
        unsafe { bytes[at..].as_mut_ptr().cast::<T>().write(value) };
    }
}
