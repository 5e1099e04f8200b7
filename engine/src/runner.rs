//! One rank's half of a step: turns a [`StepPlan`] into a batch, runs the model, samples where this rank samples.

use crate::backend::{Backend, Span, StepBatch};
use crate::collective::Collective;
use crate::model::{LOGIT_ROWS, Model};
use crate::rank::EngineError;
use crate::sampler::{self, Sampler, SamplerState};
use crate::step::{Admission, RowResult, Slot, StepPlan, StepResult, Work};

/// Executes plans. All ranks hold the same slots and see the same plans in the same order.
pub struct Runner<B: Backend, C> {
    model: Model<B, C>,
    /// Ids that can be sampled; a checkpoint's matrices may have padding rows above.
    vocab_size: usize,
    slots: Vec<Option<SlotState>>,
    batch: StepBatch,
    /// Rows of the step whose logits are needed, with what for.
    wanted: Vec<Wanted>,
    rows: Vec<u32>,
    sampler: Sampler,
}

/// What a rank remembers of a running sequence.
struct SlotState {
    pages: Vec<u32>,
    prompt_len: u32,
    /// Positions whose keys and values are in the cache.
    len: u32,
    sampler: SamplerState,
}

#[derive(Clone, Copy)]
struct Wanted {
    /// Row of the step.
    row: u32,
    /// Index into the result's rows.
    result: u32,
    /// The id that follows this row, if it is part of the prompt; otherwise the row is sampled.
    next: Option<u32>,
}

impl<B: Backend, C: Collective<B>> Runner<B, C> {
    pub fn new(model: Model<B, C>, vocab_size: usize, max_sequences: usize) -> Self {
        Self {
            model,
            vocab_size,
            slots: (0..max_sequences).map(|_| None).collect(),
            batch: StepBatch::default(),
            wanted: Vec::new(),
            rows: Vec::with_capacity(LOGIT_ROWS),
            sampler: Sampler::default(),
        }
    }

    /// Runs one step; `result` is filled on the rank that samples.
    ///
    /// # Errors
    /// A peer was lost, or the plan contradicts what this rank knows.
    pub fn execute(&mut self, plan: &StepPlan, result: &mut StepResult) -> Result<(), EngineError> {
        for slot in &plan.released {
            *self.slot_mut(*slot)? = None;
        }
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        self.prepare(plan, result)?;
        self.model.forward(&self.batch)?;
        self.sample(result)?;
        Ok(self.model.finish()?)
    }

    fn slot_mut(&mut self, slot: Slot) -> Result<&mut Option<SlotState>, EngineError> {
        let num_slots = self.slots.len();
        self.slots
            .get_mut(slot as usize)
            .ok_or_else(|| EngineError::Desync(format!("slot {slot} of a plan is outside the {num_slots} slots")))
    }

    fn admit(&mut self, admission: &Admission) -> Result<(), EngineError> {
        let Admission { slot, pages, prompt_len, sampling, min_new_tokens, eos_ids, logprobs } = admission;
        let state = self.slot_mut(*slot)?;
        if state.is_some() {
            return Err(EngineError::Desync(format!("slot {slot} was given away twice")));
        }
        *state = Some(SlotState {
            pages: pages.clone(),
            prompt_len: *prompt_len,
            len: 0,
            sampler: SamplerState::new(sampling.clone(), *min_new_tokens, eos_ids.clone(), *logprobs),
        });
        Ok(())
    }

    /// Lays the plan's work out as one batch and lists the rows whose logits are needed.
    fn prepare(&mut self, plan: &StepPlan, result: &mut StepResult) -> Result<(), EngineError> {
        let Self { batch, wanted, slots, .. } = self;
        batch.clear();
        wanted.clear();
        result.step = plan.step;
        result.rows.clear();
        let mut tokens = plan.tokens.as_slice();
        for (index, work) in plan.work.iter().enumerate() {
            let Work { slot, first_position, num_tokens, next_prompt_token } = *work;
            let state = slots.get_mut(slot as usize).and_then(Option::as_mut);
            let Some(state) = state.filter(|state| state.len == first_position) else {
                return Err(EngineError::Desync(format!("slot {slot} does not stand at position {first_position}")));
            };
            let Some((chunk, rest)) = tokens.split_at_checked(num_tokens as usize) else {
                return Err(EngineError::Desync(format!("step {} has too few tokens", plan.step)));
            };
            tokens = rest;
            let first_row = batch.tokens.len() as u32;
            batch.spans.push(Span {
                first_row,
                num_tokens,
                first_position,
                first_page: batch.page_table.len() as u32,
                num_pages: state.pages.len() as u32,
            });
            batch.page_table.extend_from_slice(&state.pages);
            batch.tokens.extend_from_slice(chunk);
            batch.positions.extend(first_position..first_position + num_tokens);
            state.len += num_tokens;

            if first_position < state.prompt_len {
                state.sampler.observe_prompt(chunk);
                if state.sampler.logprobs.prompt {
                    let next = chunk.iter().skip(1).copied().chain(next_prompt_token);
                    wanted.extend((first_row..).zip(next).map(|(row, next)| Wanted {
                        row,
                        result: index as u32,
                        next: Some(next),
                    }));
                }
            }
            if state.len >= state.prompt_len {
                wanted.push(Wanted { row: first_row + num_tokens - 1, result: index as u32, next: None });
            }
            result.rows.push(RowResult { slot, ..RowResult::default() });
        }
        Ok(())
    }

    fn sample(&mut self, result: &mut StepResult) -> Result<(), EngineError> {
        let Self { model, vocab_size, slots, wanted, rows, sampler, .. } = self;
        for group in wanted.chunks(LOGIT_ROWS) {
            rows.clear();
            rows.extend(group.iter().map(|wanted| wanted.row));
            let Some(logits) = model.logits(rows)? else { continue };
            let width = logits.len() / group.len();
            for (wanted, logits) in group.iter().zip(logits.chunks_mut(width)) {
                let logits = &mut logits[..*vocab_size];
                let row = &mut result.rows[wanted.result as usize];
                let state = slots[row.slot as usize].as_mut().expect("prepare has found this slot");
                let spec = state.sampler.logprobs;
                if let Some(next) = wanted.next {
                    row.prompt.push(sampler::logprobs(spec, next, logits));
                    continue;
                }
                // The plain log-probabilities are wanted, and sampling changes the logits: keep a copy where both happen.
                let plain = (spec.tokens || spec.full || spec.top > 0).then(|| logits.to_vec());
                match sampler.sample(&mut state.sampler, state.len, logits) {
                    Ok(token) => {
                        row.token = Some(token);
                        row.logprobs = plain.map(|plain| Box::new(sampler::logprobs(spec, token, &plain)));
                    }
                    Err(sampler::NotFinite) => row.not_finite = true,
                }
            }
        }
        Ok(())
    }
}
