//! Who runs next. Continuous batching: every step takes one token of each running row first, then fills what is left of the
//! token budget with chunks of prompts, then admits waiting rows: of each group the next in turn, so that a request of many rows does not keep
//! a request of one waiting, and within a group in the order they came.
//!
//! Rows are bound to one of `pp` micro-batches for life; while a micro-batch is in flight the next one is planned, so all stages have work.
//! A row is admitted when pages for every position that it can reach are free, so that a running row never has to stop for memory.

use std::collections::VecDeque;

use crate::kv_cache::PagePool;
use crate::request::{Event, RowError};
use crate::sequence::Sequence;
use crate::spec::Limits;
use crate::step::{Admission, RowResult, Slot, StepPlan, StepResult, Work};
use crate::tokenizer::Tokenizer;

/// Full-vocabulary log-probabilities of prompts are computed at most this many values at a time.
const FULL_LOGPROB_VALUES: usize = 4 << 20;

/// Rank 0's queue and running rows. No tensor, no device, no I/O.
pub struct Scheduler {
    limits: Limits,
    vocab_size: usize,
    tokenizer: Tokenizer,
    pool: PagePool,
    /// Rows of one group each, never empty; the front group is next.
    waiting: VecDeque<VecDeque<Sequence>>,
    /// Indexed by slot.
    running: Vec<Option<Sequence>>,
    free_slots: Vec<Slot>,
    /// Slots of each micro-batch, in order of admission.
    micro_batches: Vec<Vec<Slot>>,
    /// Slots whose end the ranks have not been told of.
    released: Vec<Slot>,
}

impl Scheduler {
    pub fn new(limits: Limits, num_micro_batches: usize, vocab_size: usize, tokenizer: Tokenizer) -> Self {
        Self {
            limits,
            vocab_size,
            tokenizer,
            pool: PagePool::new(limits.num_pages, limits.page_tokens),
            waiting: VecDeque::new(),
            running: (0..limits.max_sequences).map(|_| None).collect(),
            free_slots: (0..limits.max_sequences as Slot).rev().collect(),
            micro_batches: vec![Vec::with_capacity(limits.max_sequences); num_micro_batches],
            released: Vec::new(),
        }
    }

    pub fn add(&mut self, sequence: Sequence) {
        // A group's rows come one after the other, so its queue is most often the last.
        match self
            .waiting
            .iter_mut()
            .rev()
            .find(|group| group.front().is_some_and(|first| first.group == sequence.group))
        {
            Some(group) => group.push_back(sequence),
            None => self.waiting.push_back(VecDeque::from([sequence])),
        }
    }

    pub fn num_waiting(&self) -> usize {
        self.waiting.iter().map(VecDeque::len).sum()
    }

    pub fn num_running(&self) -> usize {
        self.limits.max_sequences - self.free_slots.len()
    }

    pub fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.num_running() == 0
    }

    pub fn pages_used(&self) -> usize {
        self.pool.num_pages() - self.pool.num_free()
    }

    /// Plans the next step of a micro-batch that is not in flight; the plan stays empty when it has nothing to do.
    /// Returns how many rows ended without a result because nobody waits for them any more.
    pub fn plan(&mut self, micro_batch: usize, plan: &mut StepPlan) -> usize {
        plan.clear();
        let cancelled = self.drop_cancelled(micro_batch);
        let mut budget = self.limits.max_step_tokens;
        for prompts in [false, true] {
            for index in 0..self.micro_batches[micro_batch].len() {
                let slot = self.micro_batches[micro_batch][index];
                if let Some(sequence) = &mut self.running[slot as usize]
                    && sequence.is_prefilled() != prompts
                    && !sequence.is_backlogged()
                {
                    budget -= schedule(sequence, budget, self.vocab_size, plan);
                }
            }
        }
        self.admit(micro_batch, budget, plan);
        if !plan.is_empty() {
            plan.released.append(&mut self.released);
        }
        cancelled
    }

    fn admit(&mut self, micro_batch: usize, mut budget: usize, plan: &mut StepPlan) {
        let total = self.num_running() + self.num_waiting();
        let share = total.div_ceil(self.micro_batches.len());
        while budget > 0
            && self.micro_batches[micro_batch].len() < share
            && let Some(first) = self.waiting.front().and_then(VecDeque::front)
            && self.pool.can_allocate(first.max_len())
            && let Some(slot) = self.free_slots.pop()
        {
            let mut group = self.waiting.pop_front().expect("the front was looked at");
            let mut sequence = group.pop_front().expect("its front was looked at");
            if !group.is_empty() {
                self.waiting.push_back(group);
            }
            sequence.slot = slot;
            self.pool.allocate(sequence.max_len(), &mut sequence.pages);
            sequence.prepare_stops(&self.tokenizer);
            let request = &sequence.request;
            plan.admitted.push(Admission {
                slot,
                pages: sequence.pages.clone(),
                prompt_len: request.prompt.len() as u32,
                sampling: request.sampling.clone(),
                min_new_tokens: request.stopping.min_new_tokens,
                eos_ids: request.stopping.eos_ids.clone(),
                logprobs: request.logprobs,
            });
            budget -= schedule(&mut sequence, budget, self.vocab_size, plan);
            self.running[slot as usize] = Some(sequence);
            self.micro_batches[micro_batch].push(slot);
        }
    }

    /// Takes in what a step gave: tokens to rows, events to their clients, resources of ended rows back.
    /// Returns how many rows ended.
    pub fn complete(&mut self, result: &mut StepResult) -> usize {
        let mut ended = 0;
        for row in result.rows.drain(..) {
            let Some(sequence) = &mut self.running[row.slot as usize] else { continue };
            if let Some(last_event) = advance(sequence, row) {
                let slot = sequence.slot;
                sequence.emit(last_event);
                self.release(slot);
                ended += 1;
            }
        }
        ended
    }

    /// Ends every row with an error; returns how many there were.
    pub fn fail_all(&mut self, error: &RowError) -> usize {
        let waiting = self.waiting.drain(..).flatten();
        let sequences: Vec<Sequence> = waiting.chain(self.running.iter_mut().filter_map(Option::take)).collect();
        for sequence in &sequences {
            sequence.emit(Event::Failed(error.clone()));
        }
        sequences.len()
    }

    fn drop_cancelled(&mut self, micro_batch: usize) -> usize {
        let before = self.num_waiting();
        self.waiting.retain_mut(|group| {
            group.retain(|sequence| !sequence.is_cancelled());
            !group.is_empty()
        });
        let mut dropped = before - self.num_waiting();
        let mut index = 0;
        while let Some(slot) = self.micro_batches[micro_batch].get(index).copied() {
            if self.running[slot as usize].as_ref().is_some_and(Sequence::is_cancelled) {
                self.release(slot);
                dropped += 1;
            } else {
                index += 1;
            }
        }
        dropped
    }

    fn release(&mut self, slot: Slot) {
        if let Some(mut sequence) = self.running[slot as usize].take() {
            self.pool.release(&mut sequence.pages);
            for micro_batch in &mut self.micro_batches {
                micro_batch.retain(|other| *other != slot);
            }
            self.free_slots.push(slot);
            self.released.push(slot);
        }
    }
}

/// Adds the next token, or the next chunk of the prompt, to the plan; returns the number of tokens, 0 if the budget is used up.
fn schedule(sequence: &mut Sequence, budget: usize, vocab_size: usize, plan: &mut StepPlan) -> usize {
    if budget == 0 {
        return 0;
    }
    let request = &sequence.request;
    let prompt = &request.prompt;
    let (first_position, num_tokens) = if sequence.is_prefilled() {
        plan.tokens.push(sequence.last_token);
        (prompt.len() + sequence.num_generated - 1, 1)
    } else {
        let first = sequence.num_prefilled;
        let mut chunk = budget.min(prompt.len() - first);
        if request.logprobs.prompt && request.logprobs.full {
            chunk = chunk.min((FULL_LOGPROB_VALUES / vocab_size).max(1));
        }
        plan.tokens.extend_from_slice(&prompt[first..first + chunk]);
        sequence.num_prefilled += chunk;
        (first, chunk)
    };
    plan.work.push(Work {
        slot: sequence.slot,
        first_position: first_position as u32,
        num_tokens: num_tokens as u32,
        next_prompt_token: prompt.get(first_position + num_tokens).copied(),
    });
    num_tokens
}

/// Gives a row what a step computed for it; the event that ends it, if it ends.
fn advance(sequence: &mut Sequence, row: RowResult) -> Option<Event> {
    if !row.prompt.is_empty() {
        sequence.emit(Event::Prompt(row.prompt));
    }
    if row.not_finite {
        return Some(Event::Failed(RowError::NotFinite));
    }
    let id = row.token?;
    let finish = sequence.push(id);
    sequence.emit(Event::Token { id, logprobs: row.logprobs });
    finish.map(Event::Finished)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use std::collections::HashMap;

    use proptest::prelude::*;
    use tokio::sync::Semaphore;
    use tokio::sync::mpsc::{Receiver, channel};

    use super::*;
    use crate::request::{LogprobSpec, Request, Sampling, Stopping};

    const LIMITS: Limits = Limits { page_tokens: 4, num_pages: 40, max_step_tokens: 16, max_sequences: 6 };

    fn scheduler(num_micro_batches: usize) -> Scheduler {
        let model = include_bytes!("../../tests/fixtures/golden/tok/ident_nodummy.model");
        Scheduler::new(LIMITS, num_micro_batches, 1024, Tokenizer::from_sentencepiece(model).unwrap())
    }

    fn row(group: u64, prompt: usize, new: u32) -> (Sequence, Receiver<Event>) {
        let request = Request {
            prompt: vec![7; prompt],
            sampling: Sampling::default(),
            stopping: Stopping { max_new_tokens: new, ..Stopping::default() },
            logprobs: LogprobSpec::default(),
        };
        let (sender, receiver) = channel(Semaphore::MAX_PERMITS);
        (Sequence::new(0, group, request, sender), receiver)
    }

    /// What the sampling rank would answer, given how long each slot's prompt is.
    fn answer(plan: &StepPlan, prompts: &mut HashMap<Slot, u32>) -> StepResult {
        prompts.extend(plan.admitted.iter().map(|admission| (admission.slot, admission.prompt_len)));
        let rows = plan.work.iter().map(|work| {
            let complete = work.first_position + work.num_tokens >= prompts[&work.slot];
            RowResult { slot: work.slot, token: complete.then_some(9), ..RowResult::default() }
        });
        StepResult { step: plan.step, rows: rows.collect() }
    }

    proptest! {
        #[test]
        fn every_row_gets_exactly_its_tokens(rows in prop::collection::vec((1_usize..60, 1_u32..40, any::<bool>()), 1..30), pp in 1_usize..4) {
            let mut scheduler = scheduler(pp);
            let mut waiting = Vec::new();
            for (index, (prompt, new, cancel)) in rows.into_iter().enumerate() {
                let (sequence, receiver) = row(index as u64 / 3, prompt, new);
                scheduler.add(sequence);
                waiting.push((new, (!cancel).then_some(receiver)));
            }
            let (mut plan, mut prompts, mut in_flight) = (StepPlan::default(), HashMap::new(), HashMap::new());
            let mut ended = 0;
            for turn in 0..20_000 {
                let micro_batch = turn % pp;
                if let Some(mut result) = in_flight.remove(&micro_batch) {
                    ended += scheduler.complete(&mut result);
                }
                ended += scheduler.plan(micro_batch, &mut plan);
                prop_assert!(plan.tokens.len() <= LIMITS.max_step_tokens);
                let slots: std::collections::HashSet<Slot> = plan.work.iter().map(|work| work.slot).collect();
                prop_assert_eq!(slots.len(), plan.work.len());
                if !plan.is_empty() {
                    in_flight.insert(micro_batch, answer(&plan, &mut prompts));
                } else if scheduler.is_idle() {
                    break;
                }
            }
            prop_assert!(scheduler.is_idle());
            prop_assert_eq!(ended, waiting.len());
            prop_assert_eq!(scheduler.pages_used(), 0);
            for (new, receiver) in waiting {
                let Some(mut receiver) = receiver else { continue };
                let mut tokens = 0;
                let mut last = None;
                while let Ok(event) = receiver.try_recv() {
                    tokens += u32::from(matches!(event, Event::Token { .. }));
                    last = Some(event);
                }
                prop_assert_eq!(tokens, new);
                prop_assert!(matches!(last, Some(Event::Finished(_))));
            }
        }
    }

    #[test]
    fn a_long_prompt_does_not_stop_running_rows() {
        let mut scheduler = scheduler(1);
        let (short, _short) = row(0, 3, 30);
        let (long, _long) = row(1, 100, 4);
        let (mut plan, mut prompts) = (StepPlan::default(), HashMap::new());
        scheduler.add(short);
        scheduler.plan(0, &mut plan);
        scheduler.complete(&mut answer(&plan, &mut prompts));
        scheduler.add(long);
        for _ in 0..7 {
            scheduler.plan(0, &mut plan);
            assert_eq!(plan.work[0].num_tokens, 1, "the running row comes first");
            assert_eq!(plan.tokens.len(), LIMITS.max_step_tokens.min(plan.tokens.len()));
            scheduler.complete(&mut answer(&plan, &mut prompts));
        }
        // 15 prompt tokens beside each of its tokens: the long prompt is in after seven steps.
        assert_eq!(scheduler.running.iter().flatten().filter(|sequence| sequence.is_prefilled()).count(), 2);
    }

    #[test]
    fn rows_wait_for_pages_in_order() {
        let mut scheduler = scheduler(1);
        // 25 + 25 pages do not fit 40, the third would; it still waits behind the second.
        let rows = [row(0, 60, 40), row(1, 60, 40), row(2, 1, 1)];
        let (mut plan, mut receivers) = (StepPlan::default(), Vec::new());
        for (sequence, receiver) in rows {
            scheduler.add(sequence);
            receivers.push(receiver);
        }
        scheduler.plan(0, &mut plan);
        assert_eq!((scheduler.num_running(), scheduler.num_waiting()), (1, 2));
    }

    #[test]
    fn a_request_of_one_row_does_not_wait_for_all_rows_of_another() {
        let mut scheduler = scheduler(1);
        let (mut plan, mut receivers) = (StepPlan::default(), Vec::new());
        for (group, prompt) in [(0, 14), (0, 14), (0, 14), (1, 2)] {
            let (sequence, receiver) = row(group, prompt, 4);
            scheduler.add(sequence);
            receivers.push(receiver);
        }
        scheduler.plan(0, &mut plan);
        let admitted: Vec<u32> = plan.admitted.iter().map(|admission| admission.prompt_len).collect();
        assert_eq!(admitted, [14, 2], "the step has room for 16 tokens");
    }

    #[test]
    fn a_row_waits_for_a_client_that_does_not_take_its_distributions() {
        let mut scheduler = scheduler(1);
        let (mut sequence, mut receiver) = row(0, 3, 20);
        sequence.request.logprobs.full = true;
        let (mut plan, mut prompts) = (StepPlan::default(), HashMap::new());
        scheduler.add(sequence);
        for _ in 0..4 {
            scheduler.plan(0, &mut plan);
            scheduler.complete(&mut answer(&plan, &mut prompts));
        }
        scheduler.plan(0, &mut plan);
        assert!(plan.is_empty());
        receiver.try_recv().unwrap();
        scheduler.plan(0, &mut plan);
        assert_eq!(plan.tokens.len(), 1);
    }
}
