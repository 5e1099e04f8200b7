//! Who runs next. Continuous batching: every step takes one token of each running row first, then adds chunks of prompts, smaller ones while rows
//! decode, so that a long prompt does not hold them up, then admits waiting rows: of each group the next in turn, so that a request of many
//! rows does not keep a request of one waiting, and within a group in the order they came.
//!
//! Rows are bound to one of `pp` micro-batches for life; while a micro-batch is in flight the next one is planned, so all stages have work.
//! A row gets pages as it grows. When none is left, the row of the micro-batch that came last gives up its own and is computed again when there
//! is room, before any other row is admitted; as its tokens depend on nothing else, it goes on as if nothing had happened.

use std::collections::VecDeque;

use crate::kv_cache::PagePool;
use crate::request::{Event, RowError};
use crate::sequence::Sequence;
use crate::spec::Limits;
use crate::step::{Admission, CHOSEN, RowResult, Slot, StepPlan, StepResult, Work};
use crate::tokenizer::Tokenizer;

/// Full-vocabulary log-probabilities of prompts are computed at most this many values at a time.
const FULL_LOGPROB_VALUES: usize = 4 << 20;

/// While rows decode, prompts get this share of a step's tokens: what the step then takes longer is what those rows wait.
pub const PROMPT_SHARE_BESIDE_DECODES: usize = 8;

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
    /// Slots whose pages were taken away, which the ranks have not been told of.
    preempted: Vec<Slot>,
    /// Rows that wait to be computed again.
    num_paused: usize,
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
            preempted: Vec::new(),
            num_paused: 0,
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
        for index in 0..self.micro_batches[micro_batch].len() {
            if self.is_next(micro_batch, index, true) {
                budget -= self.schedule(micro_batch, index, budget, plan);
            }
        }
        if !plan.is_empty() {
            budget = budget.min((self.limits.max_step_tokens / PROMPT_SHARE_BESIDE_DECODES).max(1));
        }
        for index in 0..self.micro_batches[micro_batch].len() {
            if self.is_next(micro_batch, index, false) {
                budget -= self.schedule(micro_batch, index, budget, plan);
            }
        }
        self.admit(micro_batch, budget, plan);
        self.tell(plan);
        cancelled
    }

    /// Plans the step behind the one in flight, of the only micro-batch, before the tokens of that one are known: each row's next token is what
    /// the device will have chosen for its slot. A row that turns out to have ended costs a row whose result nobody takes; its slot is given
    /// away by [`Self::plan`] alone, when nothing is in flight.
    ///
    /// False, and the plan is empty, where there may be more to do than go on: a row that waits could begin, one that runs is not about to get a
    /// token, a client has gone, or pages are short.
    pub fn plan_ahead(&mut self, plan: &mut StepPlan) -> bool {
        plan.clear();
        let mut wanted = 0;
        let goes_on = self.micro_batches[0].iter().all(|slot| {
            self.running[*slot as usize].as_ref().is_some_and(|sequence| {
                wanted += self.pool.pages_for(sequence.num_cached + 1) - sequence.pages.len();
                sequence.num_cached == sequence.num_known() && !sequence.is_cancelled()
            })
        });
        let has_left = self.waiting.iter().flatten().any(Sequence::is_cancelled);
        if !goes_on || has_left || self.next_waiting(0).is_some() || wanted > self.pool.num_free() {
            return false;
        }
        for &slot in &self.micro_batches[0] {
            let Some(sequence) = &mut self.running[slot as usize] else { continue };
            let first = sequence.num_cached;
            // Otherwise it ends with the token that is awaited.
            if first + 1 < sequence.max_len() {
                grow(sequence, first + 1, &mut self.pool, plan);
                plan.tokens.push(CHOSEN | slot);
                let first_position = first as u32;
                plan.work.push(Work { slot, first_position, num_tokens: 1, samples: true, next_prompt_token: None });
            }
        }
        self.tell(plan);
        !plan.is_empty()
    }

    /// Adds what ranks have not been told of to a plan that they get.
    fn tell(&mut self, plan: &mut StepPlan) {
        if !plan.is_empty() {
            plan.released.append(&mut self.released);
            plan.preempted.append(&mut self.preempted);
        }
    }

    fn is_next(&self, micro_batch: usize, index: usize, decoding: bool) -> bool {
        let slot = self.micro_batches[micro_batch][index];
        let sequence = self.running[slot as usize].as_ref();
        sequence.is_some_and(|sequence| sequence.is_decoding() == decoding && !sequence.is_backlogged())
    }

    /// The slot of the row that waits and could begin in a micro-batch.
    fn next_waiting(&self, micro_batch: usize) -> Option<Slot> {
        let share = (self.num_running() + self.num_waiting()).div_ceil(self.micro_batches.len());
        let first = self.waiting.front().and_then(VecDeque::front)?;
        let can_begin = self.num_paused == 0
            && self.micro_batches[micro_batch].len() < share
            && self.has_room(first.request.prompt.len());
        self.free_slots.last().copied().filter(|_| can_begin)
    }

    fn admit(&mut self, micro_batch: usize, mut budget: usize, plan: &mut StepPlan) {
        while budget > 0
            && let Some(slot) = self.next_waiting(micro_batch)
        {
            self.free_slots.pop();
            let mut group = self.waiting.pop_front().expect("the front was looked at");
            let mut sequence = group.pop_front().expect("its front was looked at");
            if !group.is_empty() {
                self.waiting.push_back(group);
            }
            sequence.slot = slot;
            sequence.prepare_stops(&self.tokenizer);
            let max_pages = self.pool.pages_for(sequence.max_len());
            sequence.pages.reserve(max_pages);
            sequence.generated.reserve(sequence.request.stopping.max_new_tokens as usize);
            let request = &sequence.request;
            if !request.logprobs.prompt {
                // The last token is computed in any case: what follows it is wanted.
                let beginning = &request.prompt[..request.prompt.len() - 1];
                sequence.content = self.pool.share(beginning, &mut sequence.pages);
                sequence.num_remembered = sequence.pages.len();
                sequence.num_cached = sequence.pages.len() * self.pool.page_tokens();
            }
            plan.admitted.push(Admission {
                slot,
                prompt_len: request.prompt.len() as u32,
                max_pages: max_pages as u32,
                cached: request.prompt[..sequence.num_cached].to_vec(),
                sampling: request.sampling.clone(),
                min_new_tokens: request.stopping.min_new_tokens,
                eos_ids: request.stopping.eos_ids.clone(),
                logprobs: request.logprobs,
            });
            plan.pages.extend(sequence.pages.iter().map(|page| (slot, *page)));
            self.running[slot as usize] = Some(sequence);
            let rows = &mut self.micro_batches[micro_batch];
            rows.push(slot);
            let index = rows.len() - 1;
            budget -= self.schedule(micro_batch, index, budget, plan);
        }
    }

    /// Adds the next token of a row, or the next chunk of those that are not in the cache, to the plan; returns the number of tokens: 0 if the budget is
    /// used up, or if there are no pages.
    fn schedule(&mut self, micro_batch: usize, index: usize, budget: usize, plan: &mut StepPlan) -> usize {
        let slot = self.micro_batches[micro_batch][index];
        let Some(sequence) = &mut self.running[slot as usize] else { return 0 };
        remember_prompt(sequence, &mut self.pool);
        let (first, len, request) = (sequence.num_cached, sequence.num_known(), &sequence.request);
        let is_paused = sequence.pages.is_empty() && plan.admitted.iter().all(|admission| admission.slot != slot);
        let mut num_tokens = budget.min(len - first);
        if request.logprobs.prompt && request.logprobs.full {
            num_tokens = num_tokens.min((FULL_LOGPROB_VALUES / self.vocab_size).max(1));
        }
        // A row that was stopped for want of pages goes on when there are enough for all it had.
        if num_tokens == 0 || is_paused && !self.has_room(len) {
            return 0;
        }
        let wanted = self.pool.pages_for(first + num_tokens);
        while let Some(sequence) = &self.running[slot as usize]
            && self.pool.num_free() < wanted - sequence.pages.len()
        {
            let last = self.last_with_pages(micro_batch, plan);
            let Some(last) = last.filter(|last| *last >= index) else { return 0 };
            self.preempt(micro_batch, last);
            if last == index {
                return 0;
            }
        }
        let Some(sequence) = &mut self.running[slot as usize] else { return 0 };
        grow(sequence, first + num_tokens, &mut self.pool, plan);
        self.num_paused -= usize::from(is_paused);
        sequence.copy_tokens(first..first + num_tokens, &mut plan.tokens);
        plan.work.push(Work {
            slot,
            first_position: first as u32,
            num_tokens: num_tokens as u32,
            samples: first + num_tokens == len,
            next_prompt_token: sequence.request.prompt.get(first + num_tokens).copied(),
        });
        num_tokens
    }

    /// Whether a row of `len` tokens can begin, generate one, and leave a page for each of those that run to grow.
    fn has_room(&self, len: usize) -> bool {
        let wanted = self.pool.pages_for(len + 1) + self.num_running() - self.num_paused;
        self.pool.num_free() >= wanted.min(self.pool.num_pages())
    }

    /// Index of the row that came last among those of a micro-batch that hold pages and have no part in the plan.
    fn last_with_pages(&self, micro_batch: usize, plan: &StepPlan) -> Option<usize> {
        self.micro_batches[micro_batch].iter().rposition(|slot| {
            let sequence = self.running[*slot as usize].as_ref();
            sequence.is_some_and(|sequence| !sequence.pages.is_empty())
                && plan.work.iter().all(|work| work.slot != *slot)
                && plan.admitted.iter().all(|admission| admission.slot != *slot)
        })
    }

    /// Takes a row's pages away.
    fn preempt(&mut self, micro_batch: usize, index: usize) {
        let slot = self.micro_batches[micro_batch][index];
        if let Some(sequence) = &mut self.running[slot as usize] {
            self.pool.release(&mut sequence.pages);
            (sequence.num_cached, sequence.num_remembered, sequence.content) = (0, 0, 0);
            self.preempted.push(slot);
            self.num_paused += 1;
        }
    }

    /// Takes in what a step gave: tokens to rows, events to their clients, resources of ended rows back.
    /// Returns how many tokens rows got, and how many rows ended.
    pub fn complete(&mut self, result: &mut StepResult) -> (usize, usize) {
        let (mut generated, mut ended) = (0, 0);
        for row in result.rows.drain(..) {
            let Some(sequence) = &mut self.running[row.slot as usize] else { continue };
            generated += usize::from(row.token.is_some());
            if let Some(last_event) = advance(sequence, row) {
                let slot = sequence.slot;
                sequence.emit(last_event);
                self.release(slot);
                ended += 1;
            }
        }
        (generated, ended)
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
            self.num_paused -= usize::from(sequence.pages.is_empty());
            remember_prompt(&mut sequence, &mut self.pool);
            self.pool.release(&mut sequence.pages);
            for micro_batch in &mut self.micro_batches {
                micro_batch.retain(|other| *other != slot);
            }
            self.free_slots.push(slot);
            self.released.push(slot);
        }
    }
}

/// Tells the pool of the prompt's pages that earlier plans have filled.
fn remember_prompt(sequence: &mut Sequence, pool: &mut PagePool) {
    let filled = sequence.num_cached.min(sequence.request.prompt.len()) / pool.page_tokens();
    while sequence.num_remembered < filled {
        let index = sequence.num_remembered;
        let tokens = &sequence.request.prompt[index * pool.page_tokens()..][..pool.page_tokens()];
        sequence.content = pool.remember(sequence.content, tokens, sequence.pages[index]);
        sequence.num_remembered += 1;
    }
}

/// Gives a row pages for its first `len` positions, which will then be in the cache.
fn grow(sequence: &mut Sequence, len: usize, pool: &mut PagePool, plan: &mut StepPlan) {
    while sequence.pages.len() < pool.pages_for(len)
        && let Some(page) = pool.allocate()
    {
        sequence.pages.push(page);
        plan.pages.push((sequence.slot, page));
    }
    sequence.num_cached = len;
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
mod tests;
