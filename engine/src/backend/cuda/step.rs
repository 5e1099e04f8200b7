//! What a step's kernels read about its rows: one block of pinned memory that goes to the device in one copy. There are two, used in turn: one step
//! is laid out while that before it still runs.

use std::sync::Arc;

use cudarc::driver::CudaEvent;
use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{Attention, GatherRows, NO_ROW};

use super::device::{Device, Memory, Pinned};
use super::sizes::{self, TILE_WORDS, WORD};
use super::{CudaOptions, graphs};
use crate::backend::{BackendError, HeadShape, StepBatch};

/// No token has it, and it is no slot's: its embedding is zeros.
const NO_ID: u32 = u32::MAX >> 1;

/// The rows of a step, on the host and on the device. The arrays lie one behind the other.
pub(super) struct StepData {
    hosts: [Pinned; 2],
    /// By turn: what happens when the step is done.
    done: [CudaEvent; 2],
    turn: usize,
    device: Memory,
    /// Rows that each array has room for.
    rows: usize,
    /// Words of all arrays.
    words: usize,
    max_generated_rows: usize,
    max_splits: u32,
    /// Rows times splits that one launch of attention may have.
    max_row_splits: usize,
    /// Tokens of a tile; 0 before the heads are known.
    tile_tokens: usize,
    groups: Vec<Group>,
    num_tiles: usize,
    /// Indices that were gathered in this step.
    num_gathered: usize,
    first_prompt_row: usize,
    /// Rows that run: those of the step, and perhaps some that are only padding.
    num_rows: usize,
    /// Of a step that only decodes.
    shape: Option<graphs::Shape>,
}

/// Rows whose attention is launched together.
#[derive(Clone, Copy)]
pub(super) struct Group {
    pub(super) first_row: usize,
    pub(super) num_rows: u32,
    /// Address of the tiles; 0: every row is one.
    pub(super) tiles: u64,
    pub(super) num_tiles: u32,
    pub(super) splits: u32,
}

impl StepData {
    pub(super) fn new(device: &Arc<Device>, options: &CudaOptions) -> Result<Self, BackendError> {
        let (rows, words) = sizes::step(&options.limits, options.max_context);
        let host = || device.allocate_pinned("the rows of a step", words * WORD);
        Ok(Self {
            hosts: [host()?, host()?],
            done: [device.event()?, device.event()?],
            turn: 0,
            device: device.allocate("the rows of a step", words * WORD)?,
            rows,
            words,
            max_generated_rows: sizes::max_generated_rows(&options.limits),
            max_splits: Attention::splits(options.max_context as u32),
            max_row_splits: sizes::row_splits(&options.limits, options.max_context),
            tile_tokens: 0,
            groups: Vec::new(),
            num_tiles: 0,
            num_gathered: 0,
            first_prompt_row: 0,
            num_rows: 0,
            shape: None,
        })
    }

    pub(super) fn set_heads(&mut self, shape: &HeadShape) {
        self.tile_tokens = Attention::tile_tokens(shape.heads as u32, shape.kv_heads as u32) as usize;
    }

    /// The first row whose products are a prompt's.
    pub(super) fn first_prompt_row(&self) -> usize {
        self.first_prompt_row
    }

    /// The step's number, in turn.
    pub(super) fn turn(&self) -> usize {
        self.turn
    }

    pub(super) fn done(&self, turn: usize) -> &CudaEvent {
        &self.done[turn]
    }

    /// Lays out a step and puts its copy on the stream. The step before the last one is done.
    ///
    /// # Errors
    /// There are more rows or pages than there is room for.
    pub(super) fn begin(&mut self, device: &Device, batch: &StepBatch) -> Result<(), BackendError> {
        let end = self.page_table_at() + batch.page_table.len();
        if batch.num_tokens() > self.rows || end > self.words {
            let (tokens, pages) = (batch.num_tokens(), batch.page_table.len());
            let reason = format!("a step of {tokens} tokens and {pages} pages is larger than what was planned");
            return Err(BackendError::Failed { device: "CUDA", reason });
        }
        self.turn ^= 1;
        (self.first_prompt_row, self.num_gathered, self.num_tiles) = (batch.num_generated, 0, 0);
        self.put(0, &batch.tokens);
        self.put(self.rows, &batch.positions);
        for span in &batch.spans {
            let rows = 2 * self.rows + span.first_row as usize..;
            self.words_mut()[rows][..span.num_tokens as usize].fill(span.first_page);
        }
        self.put(self.page_table_at(), &batch.page_table);
        (self.num_rows, self.shape) = (batch.num_tokens(), None);
        if self.tile_tokens > 0 {
            self.make_groups(batch);
            self.round_up(batch);
        }
        device.upload(&self.hosts[self.turn], 0, end * WORD, &self.device, 0);
        Ok(())
    }

    /// Fills a step that only decodes up to one of few shapes.
    fn round_up(&mut self, batch: &StepBatch) {
        let rows = batch.num_tokens();
        let padded = graphs::bucket(rows).min(self.max_generated_rows);
        let [group] = self.groups.as_mut_slice() else { return };
        if batch.num_generated < rows || rows > padded {
            return;
        }
        let splits = group.splits.next_power_of_two().min(self.max_splits);
        (group.num_rows, group.num_tiles, group.splits) = (padded as u32, padded as u32, splits);
        (self.num_rows, self.first_prompt_row, self.shape) = (padded, padded, Some((padded, splits)));
        for (array, filler) in [(0, NO_ID), (1, NO_ROW), (2, 0)] {
            let start = array * self.rows;
            self.words_mut()[start + rows..start + padded].fill(filler);
        }
    }

    pub(super) fn num_rows(&self) -> usize {
        self.num_rows
    }

    pub(super) fn shape(&self) -> Option<graphs::Shape> {
        self.shape
    }

    /// Cuts the step into launches of attention: each has room for its partial sums.
    fn make_groups(&mut self, batch: &StepBatch) {
        self.groups.clear();
        for (row, &position) in batch.positions[..batch.num_generated].iter().enumerate() {
            let group = self.group(row, 1, Attention::splits(position), false);
            group.num_tiles += 1;
        }
        for span in batch.spans.iter().filter(|span| span.first_row as usize >= batch.num_generated) {
            for first in (0..span.num_tokens).step_by(self.tile_tokens) {
                let num_tokens = (span.num_tokens - first).min(self.tile_tokens as u32);
                let (row, position) = (span.first_row + first, span.first_position + first);
                let splits = Attention::splits(position + num_tokens - 1);
                let group = self.group(row as usize, num_tokens, splits, true);
                group.num_tiles += 1;
                let first_row = row - group.first_row as u32;
                let at = 3 * self.rows + self.num_tiles * TILE_WORDS;
                self.put(at, &[first_row, num_tokens, position, span.first_page]);
                self.num_tiles += 1;
            }
        }
    }

    /// The group that takes `num_rows` more rows with so many splits: the last one, or a new one.
    fn group(&mut self, first_row: usize, num_rows: u32, splits: u32, is_tiled: bool) -> &mut Group {
        let room = self.max_row_splits;
        let fits = |group: &&mut Group| {
            let row_splits = (group.num_rows + num_rows) as usize * group.splits.max(splits) as usize;
            (group.tiles != 0) == is_tiled && row_splits <= room
        };
        if self.groups.last_mut().as_ref().is_none_or(|group| !fits(group)) {
            let tiles = match is_tiled {
                true => self.address(3 * self.rows + self.num_tiles * TILE_WORDS),
                false => 0,
            };
            self.groups.push(Group { first_row, num_rows: 0, tiles, num_tiles: 0, splits: 0 });
        }
        let group = self.groups.last_mut().expect("pushed above");
        group.num_rows += num_rows;
        group.splits = group.splits.max(splits);
        group
    }

    /// Copies row indices to the device and says what to gather. From here on rows are those gathered, and their products those of rows
    /// that decode.
    pub(super) fn gather(&mut self, device: &Device, indices: &[u32], x: u64, out: u64, width: usize) -> GatherRows {
        let at = (3 + TILE_WORDS) * self.rows + self.num_gathered;
        assert!(self.num_gathered + indices.len() <= self.rows, "every row of a step is gathered once at most");
        self.put(at, indices);
        device.upload(&self.hosts[self.turn], at * WORD, indices.len() * WORD, &self.device, at * WORD);
        self.num_gathered += indices.len();
        self.first_prompt_row = usize::MAX;
        let (rows, width) = (indices.len() as u32, width as u32);
        GatherRows { x: Ptr::new(x), indices: Ptr::new(self.address(at)), out: Ptr::new(out), rows, width }
    }

    pub(super) fn groups(&self) -> &[Group] {
        &self.groups
    }

    pub(super) fn tokens(&self) -> Ptr<u32> {
        Ptr::new(self.address(0))
    }

    /// From row `row` on.
    pub(super) fn positions(&self, row: usize) -> Ptr<u32> {
        Ptr::new(self.address(self.rows + row))
    }

    /// From row `row` on.
    pub(super) fn first_pages(&self, row: usize) -> Ptr<u32> {
        Ptr::new(self.address(2 * self.rows + row))
    }

    pub(super) fn page_table(&self) -> Ptr<u32> {
        Ptr::new(self.address(self.page_table_at()))
    }

    fn page_table_at(&self) -> usize {
        (4 + TILE_WORDS) * self.rows
    }

    fn address(&self, word: usize) -> u64 {
        self.device.pointer() + (word * WORD) as u64
    }

    fn words_mut(&mut self) -> &mut [u32] {
        self.hosts[self.turn].slice_mut(self.words)
    }

    fn put(&mut self, at: usize, words: &[u32]) {
        self.words_mut()[at..][..words.len()].copy_from_slice(words);
    }
}
