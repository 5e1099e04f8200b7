//! What a job would take, before any of it is generated.

use super::run::Job;

/// What a job would take.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct JobMeasure {
    /// Samples of all prompts.
    pub rows: u64,
    /// Rows that do not fit the context and would fail.
    pub rejected: u64,
    /// Rows whose prompt would lose its beginning.
    pub truncated: u64,
    /// Rows that would get fewer new tokens than asked for.
    pub shortened: u64,
    /// Of the rows that would run.
    pub prompt_tokens: u64,
    pub longest_prompt: u64,
    /// New tokens of all rows if none stops early.
    pub max_new_tokens: u64,
    /// Lengths of prompts: how many have at most so many tokens, and more than the entry before says.
    pub prompt_lengths: Vec<(u64, u64)>,
}

impl Job {
    /// Counts rows and tokens without generating any. `context` is what prompt and completion may have together.
    pub fn measure(&self, context: usize) -> JobMeasure {
        let samples = u64::from(self.generation.samples_per_prompt);
        let mut measure = JobMeasure { rows: self.prompt_lens.len() as u64 * samples, ..JobMeasure::default() };
        for &len in &self.prompt_lens {
            let limit = u64::from(len).next_power_of_two();
            match measure.prompt_lengths.iter_mut().find(|(at_most, _)| *at_most == limit) {
                Some((_, prompts)) => *prompts += 1,
                None => measure.prompt_lengths.push((limit, 1)),
            }
            measure.longest_prompt = measure.longest_prompt.max(len.into());
            match self.fit(len as usize, context) {
                Ok((prompt_len, max_new_tokens)) => {
                    measure.prompt_tokens += samples * prompt_len as u64;
                    measure.max_new_tokens += if self.scores { 0 } else { samples * u64::from(max_new_tokens) };
                    measure.truncated += if prompt_len < len as usize { samples } else { 0 };
                    let asked = self.sampling.tokens_to_generate;
                    measure.shortened += if max_new_tokens < asked { samples } else { 0 };
                }
                Err(_) => measure.rejected += samples,
            }
        }
        measure.prompt_lengths.sort_unstable();
        measure
    }
}
