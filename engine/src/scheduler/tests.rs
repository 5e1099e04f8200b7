#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::HashMap;

use proptest::prelude::*;
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{Receiver, channel};

use super::*;
use crate::request::{LogprobSpec, Request, Sampling, Stopping};

const LIMITS: Limits = Limits { page_tokens: 4, num_pages: 40, max_step_tokens: 16, max_sequences: 6 };

fn scheduler(num_micro_batches: usize) -> Scheduler {
    let model = include_bytes!("../../../tests/fixtures/golden/tok/ident_nodummy.model");
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

/// What the model says of a row with that seed.
fn token(seed: u64, position: u32) -> u32 {
    ((seed + 1) * 7 * (u64::from(position) + 3) * (u64::from(position) + 3) % 23) as u32
}

/// The ranks, as far as the scheduler can tell: they hold each slot's pages, how much of them is filled, and what was chosen last.
#[derive(Default)]
struct Ranks(HashMap<Slot, State>);

#[derive(Default)]
struct State {
    pages: Vec<u32>,
    len: u32,
    prompt_len: u32,
    seed: u64,
    chosen: u32,
}

impl Ranks {
    fn answer(&mut self, plan: &StepPlan) -> StepResult {
        for slot in &plan.preempted {
            let state = self.0.get_mut(slot).unwrap();
            state.pages.clear();
            state.len = 0;
        }
        for slot in &plan.released {
            self.0.remove(slot);
        }
        for admission in &plan.admitted {
            let (len, prompt_len) = (admission.cached.len() as u32, admission.prompt_len);
            let state = State { len, prompt_len, seed: admission.sampling.seed, ..State::default() };
            assert!(self.0.insert(admission.slot, state).is_none(), "a slot was given away twice");
        }
        for (slot, page) in &plan.pages {
            self.0.get_mut(slot).unwrap().pages.push(*page);
        }
        let mut tokens = plan.tokens.iter();
        let rows = plan.work.iter().map(|work| {
            let state = self.0.get_mut(&work.slot).unwrap();
            assert_eq!(state.len, work.first_position);
            for token in tokens.by_ref().take(work.num_tokens as usize) {
                let is_prompt = state.len < state.prompt_len;
                let token = if token & CHOSEN != 0 { state.chosen } else { *token };
                assert_eq!(token, if is_prompt { 7 } else { self::token(state.seed, state.len) });
                state.len += 1;
            }
            assert!(state.len as usize <= state.pages.len() * LIMITS.page_tokens);
            state.chosen = self::token(state.seed, state.len);
            RowResult { slot: work.slot, token: work.samples.then_some(state.chosen), ..RowResult::default() }
        });
        StepResult { step: plan.step, rows: rows.collect() }
    }
}

proptest! {
    #[test]
    fn every_row_gets_exactly_its_tokens(
        rows in prop::collection::vec((1_usize..60, 1_u32..40, any::<bool>(), any::<bool>()), 1..30),
        pp in 1_usize..4,
        ahead in any::<bool>(),
    ) {
        let mut scheduler = scheduler(pp);
        let mut later = VecDeque::new();
        let mut receivers = Vec::new();
        for (index, (prompt, new, cancel, ends)) in rows.into_iter().enumerate() {
            let (mut sequence, receiver) = row(index as u64 / 3, prompt, new);
            sequence.request.sampling.seed = index as u64;
            let mut expected: Vec<u32> = (0..new).map(|i| token(index as u64, prompt as u32 + i)).collect();
            if ends {
                sequence.request.stopping.eos_ids = vec![0];
                let end = expected.iter().position(|token| *token == 0);
                expected.truncate(end.map_or(expected.len(), |end| end + 1));
            }
            later.push_back(sequence);
            receivers.push((expected, Some(receiver), cancel));
        }
        let (num_rows, mut ended) = (receivers.len(), 0);
        let (mut plan, mut ranks, mut in_flight) = (StepPlan::default(), Ranks::default(), HashMap::new());
        for turn in 0..20_000 {
            // Half of the rows are there from the start, the others come one by one; some clients go.
            for _ in 0..if turn == 0 { num_rows.div_ceil(2) } else { 1 } {
                later.pop_front().into_iter().for_each(|sequence| scheduler.add(sequence));
            }
            let micro_batch = turn % pp;
            if let Some(mut result) = in_flight.remove(&micro_batch) {
                ended += scheduler.complete(&mut result).1;
            }
            ended += scheduler.plan(micro_batch, &mut plan);
            prop_assert!(plan.tokens.len() <= LIMITS.max_step_tokens);
            let slots: std::collections::HashSet<Slot> = plan.work.iter().map(|work| work.slot).collect();
            prop_assert_eq!(slots.len(), plan.work.len());
            if plan.is_empty() {
                if scheduler.is_idle() && later.is_empty() {
                    break;
                }
                continue;
            }
            let mut result = ranks.answer(&plan);
            for step in 0..if ahead && pp == 1 { turn % 9 } else { 0 } {
                if !scheduler.plan_ahead(&mut plan) {
                    break;
                }
                prop_assert!(plan.tokens.iter().all(|token| token & CHOSEN != 0));
                let next = ranks.answer(&plan);
                ended += scheduler.complete(&mut std::mem::replace(&mut result, next)).1;
                receivers.iter_mut().filter(|row| row.2 && step == 4).for_each(|row| row.1 = None);
            }
            in_flight.insert(micro_batch, result);
            if turn == 7 {
                receivers.iter_mut().filter(|row| row.2).for_each(|row| row.1 = None);
            }
        }
        prop_assert!(scheduler.is_idle());
        prop_assert_eq!(ended, num_rows);
        prop_assert_eq!(scheduler.pages_used(), 0);
        for (expected, receiver, _) in receivers {
            let Some(mut receiver) = receiver else { continue };
            let mut tokens = Vec::new();
            let mut last = None;
            while let Ok(event) = receiver.try_recv() {
                if let Event::Token { id, .. } = event {
                    tokens.push(id);
                }
                last = Some(event);
            }
            prop_assert_eq!(tokens, expected);
            prop_assert!(matches!(last, Some(Event::Finished(_))));
        }
    }
}

#[test]
fn nothing_is_planned_ahead_of_what_may_change_the_next_step() {
    let mut scheduler = scheduler(1);
    let (mut plan, mut next, mut ranks) = (StepPlan::default(), StepPlan::default(), Ranks::default());
    let (first, _first) = row(0, 20, 9);
    scheduler.add(first);
    scheduler.plan(0, &mut plan);
    assert!(!scheduler.plan_ahead(&mut next), "the prompt goes on");
    scheduler.complete(&mut ranks.answer(&plan));
    scheduler.plan(0, &mut plan);
    let mut result = ranks.answer(&plan);
    assert!(scheduler.plan_ahead(&mut next));
    scheduler.complete(&mut result);

    let (second, second_events) = row(1, 3, 9);
    scheduler.add(second);
    assert!(!scheduler.plan_ahead(&mut plan), "a row could begin");
    scheduler.complete(&mut ranks.answer(&next));
    scheduler.plan(0, &mut plan);
    assert_eq!(plan.admitted.len(), 1);
    drop(second_events);
    assert!(!scheduler.plan_ahead(&mut next), "a client has gone");
    scheduler.complete(&mut ranks.answer(&plan));

    for _ in 3..9 {
        scheduler.plan(0, &mut plan);
        result = ranks.answer(&plan);
        scheduler.complete(&mut result);
    }
    assert!(scheduler.is_idle());
    let (third, _third) = row(2, 3, 1);
    scheduler.add(third);
    scheduler.plan(0, &mut plan);
    assert!(!scheduler.plan_ahead(&mut next), "it ends with the token that is awaited");
}

#[test]
fn a_long_prompt_does_not_stop_running_rows() {
    let mut scheduler = scheduler(1);
    let (short, _short) = row(0, 3, 30);
    let (long, _long) = row(1, 100, 4);
    let (mut plan, mut ranks) = (StepPlan::default(), Ranks::default());
    scheduler.add(short);
    scheduler.plan(0, &mut plan);
    scheduler.complete(&mut ranks.answer(&plan));
    scheduler.add(long);
    for _ in 0..20 {
        scheduler.plan(0, &mut plan);
        assert_eq!(plan.work[0].num_tokens, 1, "the running row comes first");
        assert_eq!(plan.tokens.len(), 1 + LIMITS.max_step_tokens / PROMPT_SHARE_BESIDE_DECODES);
        scheduler.complete(&mut ranks.answer(&plan));
    }
}

#[test]
fn a_row_that_is_short_of_pages_takes_those_of_the_row_that_came_last() {
    let mut scheduler = scheduler(1);
    // 40 pages each in the end, of which 14 are shared, and there are 40.
    let (mut plan, mut ranks) = (StepPlan::default(), Ranks::default());
    let mut receivers = Vec::new();
    for group in 0..2 {
        let (sequence, receiver) = row(group, 60, 100);
        scheduler.add(sequence);
        receivers.push(receiver);
    }
    let mut preempted = 0;
    for _ in 0..1000 {
        scheduler.plan(0, &mut plan);
        preempted += plan.preempted.len();
        scheduler.complete(&mut ranks.answer(&plan));
    }
    assert!(scheduler.is_idle() && preempted > 0);
    for mut receiver in receivers {
        let events: Vec<Event> = std::iter::from_fn(|| receiver.try_recv().ok()).collect();
        assert_eq!(events.len(), 101, "100 tokens, each once, and the end");
    }
}

#[test]
fn rows_that_begin_alike_share_the_beginning() {
    let mut scheduler = scheduler(1);
    let (mut plan, mut ranks) = (StepPlan::default(), Ranks::default());
    let mut computed = Vec::new();
    for group in 0..3 {
        let (sequence, _receiver) = row(group, 13, 1);
        scheduler.add(sequence);
        scheduler.plan(0, &mut plan);
        computed.push(plan.tokens.len());
        scheduler.complete(&mut ranks.answer(&plan));
    }
    // Three pages of four are full, and the last token is always computed.
    assert_eq!(computed, [13, 1, 1]);
    assert_eq!(scheduler.pages_used(), 0);
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
    let (mut plan, mut ranks) = (StepPlan::default(), Ranks::default());
    scheduler.add(sequence);
    for _ in 0..4 {
        scheduler.plan(0, &mut plan);
        scheduler.complete(&mut ranks.answer(&plan));
    }
    scheduler.plan(0, &mut plan);
    assert!(plan.is_empty());
    receiver.try_recv().unwrap();
    scheduler.plan(0, &mut plan);
    assert_eq!(plan.tokens.len(), 1);
}
