//! One rank's half of a step: turns a [`StepPlan`] into a batch, runs the model, samples where this rank samples.
//!
//! A step is launched, and what it gave is collected. A device works in between, and where it chooses tokens itself, the next step can be launched
//! before they are collected.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use crate::backend::{Backend, StepBatch};
use crate::collective::Collective;
use crate::model::Model;
use crate::rank::EngineError;
use crate::request::{Choice, Logprobs};
use crate::sampler::{self, Sampler, SamplerState};
use crate::spec::LOGIT_ROWS;
use crate::step::{Admission, RowResult, Slot, StepPlan, StepResult};

/// Executes plans. All ranks hold the same slots and see the same plans in the same order.
pub struct Runner<B: Backend, C> {
    model: Model<B, C>,
    /// Ids that can be sampled; a checkpoint's matrices may have padding rows above.
    vocab_size: usize,
    slots: Vec<Option<SlotState>>,
    batch: StepBatch,
    /// Steps that were launched and not collected, oldest first: two at most.
    in_flight: VecDeque<Launched>,
    /// Memory for steps.
    spare: Vec<Launched>,
    /// Rows of the step whose logits are needed, with what for.
    wanted: Vec<Wanted>,
    /// Those whose logits are computed together.
    group: Vec<Wanted>,
    rows: Vec<u32>,
    /// Ids that penalties ask about, of all rows of the group.
    seen: Vec<u32>,
    sampler: Sampler,
    busy: Duration,
    /// When the last step was collected.
    collected: Instant,
}

/// A step whose results the device may still be working on.
struct Launched {
    start: Instant,
    /// For other ranks, in all steps before.
    waited: Duration,
    /// By which the backend knows it.
    number: usize,
    /// Complete but for the tokens that the device chooses.
    result: StepResult,
    /// Rows whose token the device chooses.
    chosen: Vec<Wanted>,
    /// Whether the device has all tokens that the next step needs.
    feeds: bool,
}

/// What a rank remembers of a running sequence.
struct SlotState {
    pages: Vec<u32>,
    prompt_len: u32,
    /// Positions whose keys and values are in the cache.
    len: u32,
    /// Prompt positions that the sampler knows and whose log-probabilities, if they are wanted, were reported.
    observed: u32,
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
    /// More is asked for than the token.
    needs_logits: bool,
}

impl<B: Backend, C: Collective<B>> Runner<B, C> {
    pub fn new(model: Model<B, C>, vocab_size: usize, max_sequences: usize) -> Self {
        Self {
            model,
            vocab_size,
            slots: (0..max_sequences).map(|_| None).collect(),
            batch: StepBatch::default(),
            wanted: Vec::new(),
            group: Vec::with_capacity(LOGIT_ROWS),
            rows: Vec::with_capacity(LOGIT_ROWS),
            seen: Vec::new(),
            in_flight: VecDeque::with_capacity(2),
            spare: Vec::with_capacity(2),
            sampler: Sampler::default(),
            busy: Duration::ZERO,
            collected: Instant::now(),
        }
    }

    /// For how long it has computed, see [`Reporter::busy`](crate::report::Reporter::busy).
    pub fn busy(&self) -> Duration {
        self.busy
    }

    /// Steps that were launched and not collected.
    pub fn num_in_flight(&self) -> usize {
        self.in_flight.len()
    }

    /// Whether a step may follow that does not know the tokens of the one launched last.
    pub fn feeds(&self) -> bool {
        B::CHOOSES && self.in_flight.back().is_some_and(|step| step.feeds)
    }

    /// Whether the oldest step is done; waits for it a moment.
    ///
    /// # Errors
    /// A peer was lost, or the device failed.
    pub fn is_done(&self) -> Result<bool, EngineError> {
        self.model.is_done(self.in_flight.front().map(|step| step.number))
    }

    /// Launches a step behind one other at most.
    ///
    /// # Errors
    /// A peer was lost, or the plan contradicts what this rank knows.
    pub fn launch(&mut self, plan: &StepPlan) -> Result<(), EngineError> {
        assert!(self.in_flight.len() < 2, "buffers are used by two steps in turn");
        let (start, waited) = (Instant::now(), self.model.waited());
        let (result, chosen) = self.spare.pop().map(|step| (step.result, step.chosen)).unwrap_or_default();
        let mut step = Launched { start, waited, number: 0, result, chosen, feeds: true };
        for slot in &plan.preempted {
            if let Some(state) = self.slot_mut(*slot)? {
                state.pages.clear();
                state.len = 0;
            }
        }
        for slot in &plan.released {
            *self.slot_mut(*slot)? = None;
        }
        for admission in &plan.admitted {
            self.admit(admission)?;
        }
        for (slot, page) in &plan.pages {
            match self.slot_mut(*slot)? {
                Some(state) => state.pages.push(*page),
                None => return Err(EngineError::Desync(format!("slot {slot} gets a page and holds no sequence"))),
            }
        }
        self.prepare(plan, &mut step.result)?;
        self.model.forward(&self.batch)?;
        self.sample(&mut step)?;
        step.number = self.model.close();
        self.in_flight.push_back(step);
        Ok(())
    }

    /// Waits for the oldest step; `result` is filled on the rank that samples.
    ///
    /// # Errors
    /// A peer was lost, or the device failed.
    pub fn collect(&mut self, result: &mut StepResult) -> Result<(), EngineError> {
        let mut step = self.in_flight.pop_front().expect("a step was launched");
        self.model.finish(Some(step.number))?;
        for wanted in step.chosen.drain(..) {
            let row = &mut step.result.rows[wanted.result as usize];
            row.token = self.model.chosen(step.number, row.slot);
            row.not_finite = row.token.is_none();
            // A row that ended in the step before may be gone.
            if let (Some(token), Some(state)) = (row.token, &mut self.slots[row.slot as usize]) {
                state.sampler.observe_choice(token);
            }
        }
        std::mem::swap(result, &mut step.result);
        let now = Instant::now();
        let waited = self.model.waited() - step.waited;
        self.busy += (now - step.start.max(self.collected)).saturating_sub(waited);
        self.collected = now;
        self.spare.push(step);
        Ok(())
    }

    fn slot_mut(&mut self, slot: Slot) -> Result<&mut Option<SlotState>, EngineError> {
        let num_slots = self.slots.len();
        self.slots
            .get_mut(slot as usize)
            .ok_or_else(|| EngineError::Desync(format!("slot {slot} of a plan is outside the {num_slots} slots")))
    }

    fn admit(&mut self, admission: &Admission) -> Result<(), EngineError> {
        let Admission { slot, prompt_len, max_pages, cached, sampling, min_new_tokens, eos_ids, logprobs } = admission;
        let state = self.slot_mut(*slot)?;
        if state.is_some() {
            return Err(EngineError::Desync(format!("slot {slot} was given away twice")));
        }
        let min_len = prompt_len + min_new_tokens;
        let mut sampler = SamplerState::new(sampling.clone(), min_len, eos_ids.clone(), *logprobs);
        sampler.observe_prompt(cached);
        let len = cached.len() as u32;
        let pages = Vec::with_capacity(*max_pages as usize);
        *state = Some(SlotState { pages, prompt_len: *prompt_len, len, observed: len, sampler });
        Ok(())
    }

    /// Lays the plan's work out as one batch, generated tokens first, and lists the rows whose logits are needed.
    fn prepare(&mut self, plan: &StepPlan, result: &mut StepResult) -> Result<(), EngineError> {
        let Self { batch, wanted, slots, .. } = self;
        batch.clear();
        wanted.clear();
        result.step = plan.step;
        result.rows.clear();
        let mut num_tokens = 0;
        for work in &plan.work {
            let state = slots.get(work.slot as usize).and_then(Option::as_ref);
            if state.is_none_or(|state| state.len != work.first_position) {
                let (slot, position) = (work.slot, work.first_position);
                return Err(EngineError::Desync(format!("slot {slot} does not stand at position {position}")));
            }
            num_tokens += work.num_tokens as usize;
            result.rows.push(RowResult { slot: work.slot, ..RowResult::default() });
        }
        if plan.tokens.len() < num_tokens {
            return Err(EngineError::Desync(format!("step {} has too few tokens", plan.step)));
        }
        for is_prompt in [false, true] {
            batch.num_generated = batch.num_tokens();
            let mut first_token = 0;
            for (index, work) in plan.work.iter().enumerate() {
                let state = slots[work.slot as usize].as_mut().expect("found above");
                let tokens = &plan.tokens[first_token..][..work.num_tokens as usize];
                first_token += tokens.len();
                let num_prompt = state.prompt_len.saturating_sub(work.first_position).min(work.num_tokens) as usize;
                let (prompt, generated) = tokens.split_at(num_prompt);
                let (tokens, first_position) = match is_prompt {
                    true => (prompt, work.first_position),
                    false => (generated, work.first_position + num_prompt as u32),
                };
                if tokens.is_empty() {
                    continue;
                }
                let first_row = batch.push(first_position, tokens, &state.pages);
                let end = first_position + tokens.len() as u32;
                // What was computed before is not observed a second time.
                let first_new = state.observed.max(first_position);
                if is_prompt && first_new < end {
                    let new = &tokens[(first_new - first_position) as usize..];
                    state.sampler.observe_prompt(new);
                    if state.sampler.logprobs.prompt {
                        let next = new.iter().skip(1).copied().chain(work.next_prompt_token);
                        let rows = first_row + first_new - first_position..;
                        wanted.extend(rows.zip(next).map(|(row, next)| Wanted {
                            row,
                            result: index as u32,
                            next: Some(next),
                            needs_logits: true,
                        }));
                    }
                    state.observed = end;
                }
                if work.samples && end == work.first_position + work.num_tokens {
                    wanted.push(Wanted {
                        row: first_row + tokens.len() as u32 - 1,
                        result: index as u32,
                        next: None,
                        needs_logits: state.sampler.logprobs.wants_any(),
                    });
                }
            }
        }
        for work in &plan.work {
            slots[work.slot as usize].as_mut().expect("found above").len += work.num_tokens;
        }
        Ok(())
    }

    /// Rows that need nothing but a token first: a device may choose it without showing the logits.
    fn sample(&mut self, step: &mut Launched) -> Result<(), EngineError> {
        for needs_logits in [false, true] {
            let mut next = 0;
            while next < self.wanted.len() {
                self.group.clear();
                while next < self.wanted.len() && self.group.len() < LOGIT_ROWS {
                    let wanted = self.wanted[next];
                    next += 1;
                    if wanted.needs_logits == needs_logits {
                        self.group.push(wanted);
                    }
                }
                if !self.group.is_empty() {
                    self.sample_group(needs_logits, step)?;
                }
            }
        }
        Ok(())
    }

    fn sample_group(&mut self, needs_logits: bool, step: &mut Launched) -> Result<(), EngineError> {
        self.rows.clear();
        self.rows.extend(self.group.iter().map(|wanted| wanted.row));
        if !self.model.compute_logits(&self.rows)? {
            return Ok(());
        }
        if B::CHOOSES && !needs_logits && self.choose_on_device(step) {
            step.chosen.extend_from_slice(&self.group);
            return Ok(());
        }
        let Launched { result, feeds, .. } = step;
        *feeds = false;
        let Self { model, vocab_size, slots, group, sampler, .. } = self;
        let logits = model.logits(group.len())?;
        let width = logits.len() / group.len();
        for (wanted, logits) in group.iter().zip(logits.chunks_mut(width)) {
            let row = &mut result.rows[wanted.result as usize];
            let state = slots[row.slot as usize].as_mut().expect("prepare has found this slot");
            let spec = state.sampler.logprobs;
            if spec.rewards {
                row.not_finite = logits.iter().any(|value| !value.is_finite());
                row.token = (!row.not_finite).then_some(0);
                row.logprobs = Some(Box::new(Logprobs { full: logits.to_vec(), ..Logprobs::default() }));
                continue;
            }
            let logits = &mut logits[..*vocab_size];
            if let Some(next) = wanted.next {
                row.prompt.push(sampler::logprobs(spec, next, logits));
                continue;
            }
            // The plain log-probabilities are wanted, and sampling changes the logits: keep a copy where both happen.
            let plain = spec.wants_any().then(|| logits.to_vec());
            match sampler.sample(&mut state.sampler, state.len, logits) {
                Ok(token) => {
                    row.token = Some(token);
                    row.logprobs = plain.map(|plain| Box::new(sampler::logprobs(spec, token, &plain)));
                }
                Err(sampler::NotFinite) => row.not_finite = true,
            }
        }
        Ok(())
    }

    /// Whether the device chooses the tokens of the group.
    fn choose_on_device(&mut self, step: &mut Launched) -> bool {
        let Self { model, vocab_size, slots, group, seen, .. } = self;
        seen.clear();
        let state = |wanted: &Wanted| {
            let slot = step.result.rows[wanted.result as usize].slot;
            (slot, slots[slot as usize].as_ref().expect("prepare has found this slot"))
        };
        step.feeds &= group.iter().all(|wanted| !state(wanted).1.sampler.has_penalties());
        let ends: Vec<(usize, u32)> = group
            .iter()
            .map(|wanted| {
                let num_prompt = state(wanted).1.sampler.append_seen(seen);
                (seen.len(), num_prompt)
            })
            .collect();
        let mut start = 0;
        let choices: Vec<Choice> = group
            .iter()
            .zip(ends)
            .map(|(wanted, (end, num_prompt))| {
                let (slot, state) = state(wanted);
                let ids = &seen[start..end];
                start = end;
                state.sampler.choice(slot, state.len, ids, num_prompt)
            })
            .collect();
        model.choose(&choices, *vocab_size)
    }
}
