//! What the sampling kernel reads and writes, for the rows of a step.

use std::sync::Arc;

use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{NOT_FINITE, Sample, SampleRow};

use super::device::{Device, Memory, Pinned};
use super::sizes;
use crate::backend::BackendError;
use crate::request::Choice;
use crate::spec::Limits;

/// For one step and the one behind it, used in turn as in [`StepData`](super::step::StepData).
pub(super) struct SampleData {
    /// [slots] rows, then [ids], then [ids] biases, then [slots] tokens
    hosts: [Pinned; 2],
    turn: usize,
    device: Memory,
    slots: usize,
    ids: usize,
    /// Of this step, so far.
    num_rows: usize,
    num_ids: usize,
}

impl SampleData {
    pub(super) fn new(device: &Arc<Device>, limits: &Limits) -> Result<Self, BackendError> {
        let (ids, bytes) = sizes::sampling(limits);
        let host = || device.allocate_pinned("sampling", bytes);
        let (hosts, memory) = ([host()?, host()?], device.allocate("sampling", bytes)?);
        Ok(Self { hosts, turn: 0, device: memory, slots: limits.max_sequences, ids, num_rows: 0, num_ids: 0 })
    }

    /// Begins a step with that turn.
    pub(super) fn begin(&mut self, turn: usize) {
        (self.turn, self.num_rows, self.num_ids) = (turn, 0, 0);
    }

    fn ids_at(&self) -> usize {
        self.slots * size_of::<SampleRow>()
    }

    fn biases_at(&self) -> usize {
        self.ids_at() + self.ids * 4
    }

    fn tokens_at(&self) -> usize {
        self.biases_at() + self.ids * 4
    }

    /// Puts the choice of a token for each row on the stream; false if the step's rows name more ids than there is room for.
    pub(super) fn choose(
        &mut self,
        device: &Device,
        choices: &[Choice],
        vocab: usize,
        (logits, stride): (u64, usize),
    ) -> bool {
        let named = |choice: &Choice| choice.masked.len() + choice.sampling.logit_bias.len() + choice.seen.len();
        let (first_row, first_id) = (self.num_rows, self.num_ids);
        if first_row + choices.len() > self.slots || first_id + choices.iter().map(named).sum::<usize>() > self.ids {
            return false;
        }
        let (mut num_ids, mut biases_end) = (first_id, first_id);
        for (index, choice) in choices.iter().enumerate() {
            let sampling = choice.sampling;
            let first_biased = num_ids;
            for &(id, bias) in &sampling.logit_bias {
                self.put(self.ids_at() + num_ids * 4, id);
                self.put(self.biases_at() + num_ids * 4, bias);
                num_ids += 1;
                biases_end = num_ids;
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
                slot: choice.slot,
            };
            self.put((first_row + index) * size_of::<SampleRow>(), row);
        }
        (self.num_rows, self.num_ids) = (first_row + choices.len(), num_ids);
        let (ids_at, biases_at, tokens_at) = (self.ids_at(), self.biases_at(), self.tokens_at());
        let rows_at = first_row * size_of::<SampleRow>();
        for (at, bytes) in [
            (rows_at, choices.len() * size_of::<SampleRow>()),
            (ids_at + first_id * 4, (num_ids - first_id) * 4),
            (biases_at + first_id * 4, (biases_end - first_id) * 4),
        ] {
            if bytes > 0 {
                device.upload(&self.hosts[self.turn], at, bytes, &self.device, at);
            }
        }
        let address = |at: usize| self.device.pointer() + at as u64;
        let sample = Sample {
            logits: Ptr::new(logits),
            rows: Ptr::new(address(rows_at)),
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
        true
    }

    /// Where the token that was chosen last for each slot is, and the number of slots.
    pub(super) fn choices(&self) -> (u64, usize) {
        (self.device.pointer() + self.tokens_at() as u64, self.slots)
    }

    /// Puts the copy of what was chosen in this step on the stream.
    pub(super) fn download(&mut self, device: &Device) {
        let at = self.tokens_at();
        device.download(&self.device, at, self.slots * 4, &mut self.hosts[self.turn], at);
    }

    /// What was chosen for a slot in the step of that turn, once it is done; `None` for logits that are no numbers.
    pub(super) fn token(&self, turn: usize, slot: u32) -> Option<u32> {
        let first = self.tokens_at() / 4;
        let token = self.hosts[turn].slice::<u32>(first + self.slots)[first + slot as usize];
        (token != NOT_FINITE).then_some(token)
    }

    fn put<T: Copy>(&mut self, at: usize, value: T) {
        let bytes = self.hosts[self.turn].slice_mut::<u8>(at + size_of::<T>());
        assert!(at.is_multiple_of(align_of::<T>()), "arrays are aligned");
        // SAFETY: the bytes were just shown to be there; kernels' structs have no padding.
        unsafe { bytes[at..].as_mut_ptr().cast::<T>().write(value) };
    }
}
