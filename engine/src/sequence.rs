//! One row while it is generated: its tokens so far, and the rules that end it.

use std::ops::Range;

use tokio::sync::mpsc::Sender;

use crate::request::{Event, Finish, FinishReason, Request, StopMatch, Stopping};
use crate::step::Slot;
use crate::tokenizer::{Detokenizer, Tokenizer};

/// Events with distributions over the vocabulary that a client may leave untaken.
const MAX_UNTAKEN_DISTRIBUTIONS: usize = 4;

/// A submitted row and everything that rank 0 knows of it.
pub struct Sequence {
    pub id: u64,
    /// Rows of one group are admitted in turn with those of other groups.
    pub group: u64,
    pub request: Request,
    events: Sender<Event>,
    pub generated: Vec<u32>,
    /// Positions whose keys and values are (or will be, with the plan in flight) in the cache: fewer again when the row was preempted.
    pub num_cached: usize,
    pub slot: Slot,
    pub pages: Vec<u32>,
    /// Pages of the prompt that the pool has been told of, and the content of the last one.
    pub num_remembered: usize,
    pub content: u64,
    stop_text: Option<StopText>,
}

impl Sequence {
    /// `events` must have room for every event of the row: whoever sends never waits.
    pub fn new(id: u64, group: u64, request: Request, events: Sender<Event>) -> Self {
        Self {
            id,
            group,
            request,
            events,
            generated: Vec::new(),
            num_cached: 0,
            slot: Slot::MAX,
            pages: Vec::new(),
            num_remembered: 0,
            content: 0,
            stop_text: None,
        }
    }

    /// Called once, when the row is admitted.
    pub fn prepare_stops(&mut self, tokenizer: &Tokenizer) {
        if !self.request.stopping.stop_strings.is_empty() {
            self.stop_text = Some(StopText::new(tokenizer, &self.request.prompt, &self.request.stopping));
        }
    }

    /// Positions that the row can reach.
    pub fn max_len(&self) -> usize {
        self.request.prompt.len() + self.request.stopping.max_new_tokens as usize
    }

    /// Positions whose tokens are known.
    pub fn num_known(&self) -> usize {
        self.request.prompt.len() + self.generated.len()
    }

    /// Whether only the last generated token is still to be computed.
    pub fn is_decoding(&self) -> bool {
        !self.generated.is_empty() && self.num_cached + 1 == self.num_known()
    }

    /// Appends the tokens of `positions`, which are known.
    pub fn copy_tokens(&self, positions: Range<usize>, out: &mut Vec<u32>) {
        let prompt = &self.request.prompt;
        let split = prompt.len().clamp(positions.start, positions.end);
        if positions.start < split {
            out.extend_from_slice(&prompt[positions.start..split]);
        }
        if split < positions.end {
            out.extend_from_slice(&self.generated[split - prompt.len()..positions.end - prompt.len()]);
        }
    }

    /// Whether nobody waits for the row any more.
    pub fn is_cancelled(&self) -> bool {
        self.events.is_closed()
    }

    /// Whether the row must wait because its client is slow to take distributions over the vocabulary, each a megabyte with a large one.
    pub fn is_backlogged(&self) -> bool {
        let untaken = self.events.max_capacity() - self.events.capacity();
        self.request.logprobs.full && untaken >= MAX_UNTAKEN_DISTRIBUTIONS
    }

    /// Sends an event; a receiver that has gone is noticed by [`Self::is_cancelled`].
    pub fn emit(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Takes note of a generated token and says whether it ends the row.
    pub fn push(&mut self, id: u32) -> Option<Finish> {
        self.generated.push(id);
        let stopping = &self.request.stopping;
        if stopping.eos_ids.contains(&id) || stopping.stop_ids.contains(&id) {
            return Some(Finish { reason: FinishReason::Stop, text_len: None });
        }
        if let Some(text) = &mut self.stop_text
            && let Some(text_len) = text.push(id, stopping)
        {
            return Some(Finish { reason: FinishReason::Stop, text_len });
        }
        (self.generated.len() >= stopping.max_new_tokens as usize)
            .then_some(Finish { reason: FinishReason::Length, text_len: None })
    }
}

/// The row's text as far as stop strings need it.
struct StopText {
    detokenizer: Detokenizer,
    /// The end of the prompt's text, then the new text.
    text: String,
    /// Where the new text begins.
    new_text: usize,
    /// Length of the longest stop string.
    longest: usize,
}

impl StopText {
    fn new(tokenizer: &Tokenizer, prompt: &[u32], stopping: &Stopping) -> Self {
        let longest = stopping.stop_strings.iter().map(String::len).max().unwrap_or(0);
        let mut text = String::new();
        if stopping.stop_match == StopMatch::RowEndsWith {
            text = tokenizer.decode(prompt);
            let cut = text.floor_char_boundary(text.len().saturating_sub(longest));
            text.drain(..cut);
        }
        let new_text = text.len();
        Self { detokenizer: Detokenizer::new(tokenizer, prompt), text, new_text, longest }
    }

    /// `Some` when a stop string matches; in it, where the new text is to be cut.
    fn push(&mut self, id: u32, stopping: &Stopping) -> Option<Option<usize>> {
        let before = self.text.len();
        self.detokenizer.push(id, &mut self.text);
        match stopping.stop_match {
            StopMatch::RowEndsWith => {
                let complete = !self.detokenizer.pending();
                let matches = |stop: &String| stop.is_empty() || complete && self.text.ends_with(stop.as_str());
                stopping.stop_strings.iter().any(matches).then_some(None)
            }
            StopMatch::TextContains => {
                let from = self.text.floor_char_boundary(before.saturating_sub(self.longest).max(self.new_text));
                let found = stopping.stop_strings.iter().filter_map(|stop| self.text[from..].find(stop.as_str())).min();
                found.map(|at| Some(from + at - self.new_text))
            }
        }
    }
}
