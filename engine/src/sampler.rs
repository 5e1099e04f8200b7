//! From logits to a token: masks, penalties, temperature, top-k, top-p, one draw; and log-probabilities.
//!
//! The draw uses a counter-based random number that is a function of (seed, sample, position) alone, and all sums run in a fixed order,
//! so a row's tokens do not depend on what else is in the batch.

use std::cmp::Ordering;
use std::collections::HashMap;

use crate::request::{Choice, LogprobSpec, Logprobs, Sampling};

/// How many candidates a nucleus is first looked for in; grown eightfold while it holds too little probability.
const NUCLEUS_GUESS: usize = 512;

/// What the sampler remembers of one running sequence.
#[derive(Debug, Default)]
pub struct SamplerState {
    sampling: Sampling,
    /// The first position at which the row may end.
    min_len: u32,
    eos_ids: Vec<u32>,
    pub logprobs: LogprobSpec,
    /// Occurrences in (prompt and new text, new text alone) of every id of the row; kept only if a penalty needs it.
    counts: HashMap<u32, (u32, u32)>,
}

impl SamplerState {
    pub fn new(sampling: Sampling, min_len: u32, eos_ids: Vec<u32>, logprobs: LogprobSpec) -> Self {
        Self { sampling, min_len, eos_ids, logprobs, ..Self::default() }
    }

    /// Whether choosing a token takes all tokens before it.
    pub fn has_penalties(&self) -> bool {
        let Sampling { greedy, repetition_penalty, frequency_penalty, presence_penalty, .. } = self.sampling;
        !greedy && (repetition_penalty != 1.0 || frequency_penalty != 0.0 || presence_penalty != 0.0)
    }

    /// Ids that may not be chosen.
    fn masked(&self, position: u32) -> &[u32] {
        if position < self.min_len { &self.eos_ids } else { &[] }
    }

    /// Takes note of the token that was chosen.
    pub fn observe_choice(&mut self, token: u32) {
        if self.has_penalties() {
            let (row, new) = self.counts.entry(token).or_default();
            (*row, *new) = (*row + 1, *new + 1);
        }
    }

    /// Appends the ids that penalties ask about, as [`Choice::seen`] wants them; returns how many are the prompt's.
    pub fn append_seen(&self, seen: &mut Vec<u32>) -> u32 {
        let start = seen.len();
        seen.extend(self.counts.iter().filter(|(_, (row, new))| row > new).map(|(id, _)| *id));
        let num_prompt = seen.len() - start;
        for (id, (_, new)) in &self.counts {
            seen.extend(std::iter::repeat_n(*id, *new as usize));
        }
        num_prompt as u32
    }

    /// How the token at `position` is to be chosen, with what [`Self::append_seen`] appended.
    pub fn choice<'a>(&'a self, slot: u32, position: u32, seen: &'a [u32], num_prompt: u32) -> Choice<'a> {
        Choice { sampling: &self.sampling, position, masked: self.masked(position), seen, num_prompt, slot }
    }

    /// Takes note of prompt tokens.
    pub fn observe_prompt(&mut self, ids: &[u32]) {
        if self.has_penalties() {
            for id in ids {
                self.counts.entry(*id).or_default().0 += 1;
            }
        }
    }
}

/// Scratch memory for one vocabulary, reused from row to row.
#[derive(Default)]
pub struct Sampler {
    candidates: Vec<(f32, u32)>,
}

/// Logits that are NaN or infinite in the wrong direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotFinite;

impl Sampler {
    /// Chooses the token at `position` of the row from its `logits` (changed in place) and takes note of it.
    ///
    /// # Errors
    /// A logit is NaN or +∞, or all are −∞.
    pub fn sample(&mut self, state: &mut SamplerState, position: u32, logits: &mut [f32]) -> Result<u32, NotFinite> {
        for id in state.masked(position) {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit = f32::NEG_INFINITY;
            }
        }
        for (id, bias) in &state.sampling.logit_bias {
            if let Some(logit) = logits.get_mut(*id as usize) {
                *logit += bias;
            }
        }
        let (best, max) = argmax(logits)?;
        let token = if state.sampling.greedy { best } else { self.draw(state, position, logits, max)? };
        state.observe_choice(token);
        Ok(token)
    }

    fn draw(
        &mut self,
        state: &SamplerState,
        position: u32,
        logits: &mut [f32],
        unscaled_max: f32,
    ) -> Result<u32, NotFinite> {
        let sampling = &state.sampling;
        // The maximum is subtracted before the division, so that no temperature, however small, overflows.
        for logit in logits.iter_mut() {
            *logit = (*logit - unscaled_max) / sampling.temperature;
        }
        if state.has_penalties() {
            apply_penalties(state, logits, unscaled_max / sampling.temperature);
        }
        let (_, max) = argmax(logits)?;

        let vocab_size = logits.len();
        let top_k = sampling.top_k as usize;
        let limit_k = top_k > 0 && top_k < vocab_size;
        let limit_p = sampling.top_p > 0.0 && sampling.top_p < 1.0;
        let uniform = uniform(sampling.seed, sampling.sample, position);

        if !limit_k && !limit_p {
            let weight = |logit: &f32| f64::from(logit - max).exp();
            let total: f64 = logits.iter().map(weight).sum();
            let weights = logits.iter().enumerate().map(|(id, logit)| (id as u32, weight(logit)));
            return Ok(pick(weights, uniform * total));
        }

        let candidates = &mut self.candidates;
        candidates.clear();
        candidates
            .extend(logits.iter().zip(0..).filter(|(logit, _)| **logit > f32::NEG_INFINITY).map(|(l, id)| (*l, id)));
        if limit_k && top_k < candidates.len() {
            let (_, kth, _) = candidates.select_nth_unstable_by(top_k - 1, best_first);
            let threshold = kth.0;
            candidates.retain(|(logit, _)| *logit >= threshold);
        }
        let weight = |candidate: &(f32, u32)| f64::from(candidate.0 - max).exp();
        if !limit_p {
            candidates.sort_unstable_by(best_first);
            let total: f64 = candidates.iter().map(weight).sum();
            return Ok(pick(candidates.iter().map(|c| (c.1, weight(c))), uniform * total));
        }
        // The sum needs a fixed order, and selecting the k largest leaves none.
        candidates.sort_unstable_by_key(|(_, id)| *id);
        let total: f64 = candidates.iter().map(weight).sum();
        let kept = nucleus(candidates, total * f64::from(sampling.top_p), weight);
        let kept = &candidates[..kept];
        let total: f64 = kept.iter().map(weight).sum();
        Ok(pick(kept.iter().map(|c| (c.1, weight(c))), uniform * total))
    }
}

/// Log-probabilities of `token` under the plain softmax of `logits`, with whatever `spec` asks for besides.
pub fn logprobs(spec: LogprobSpec, token: u32, logits: &[f32]) -> Logprobs {
    let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let total: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
    let log_total = f64::from(max) + total.ln();
    let logprob = |logit: f32| (f64::from(logit) - log_total) as f32;
    let mut top = Vec::new();
    if spec.top > 0 {
        let mut candidates: Vec<(f32, u32)> = logits.iter().copied().zip(0..).collect();
        let count = usize::from(spec.top).min(candidates.len());
        if count < candidates.len() {
            candidates.select_nth_unstable_by(count - 1, best_first);
            candidates.truncate(count);
        }
        candidates.sort_unstable_by(best_first);
        top.extend(candidates.into_iter().map(|(logit, id)| (id, logprob(logit))));
    }
    let full = if spec.full { logits.iter().map(|logit| logprob(*logit)).collect() } else { Vec::new() };
    Logprobs { token: logprob(logits[token as usize]), top, full }
}

/// The lowest id among those with the largest logit, and that logit.
fn argmax(logits: &[f32]) -> Result<(u32, f32), NotFinite> {
    // By lanes, so that it is done in vectors.
    let (chunks, rest) = logits.as_chunks::<16>();
    let (mut lanes, mut insane) = ([f32::NEG_INFINITY; 16], [0; 16]);
    for chunk in chunks {
        for i in 0..16 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
            insane[i] |= u32::from(!is_sane(chunk[i]));
        }
    }
    let max = lanes.iter().chain(rest).fold(f32::NEG_INFINITY, |max, logit| if *logit > max { *logit } else { max });
    let is_sane = insane == [0; 16] && rest.iter().copied().all(is_sane) && max.is_finite();
    let has_max = |chunk: &[f32; 16]| chunk.iter().fold(false, |has, logit| has | (*logit == max));
    let start = 16 * chunks.iter().position(has_max).unwrap_or(chunks.len());
    let best = logits[start..].iter().position(|logit| *logit == max);
    best.filter(|_| is_sane).map(|best| ((start + best) as u32, max)).ok_or(NotFinite)
}

/// Neither NaN nor +∞.
fn is_sane(logit: f32) -> bool {
    logit < f32::INFINITY
}

/// `logits` are shifted by `-shift` from their scaled values; the sign that the repetition penalty asks about is the unshifted one's.
fn apply_penalties(state: &SamplerState, logits: &mut [f32], shift: f32) {
    let Sampling { repetition_penalty, frequency_penalty, presence_penalty, .. } = state.sampling;
    for (id, (_, new)) in &state.counts {
        let Some(logit) = logits.get_mut(*id as usize) else { continue };
        let scaled = *logit + shift;
        let penalised = if scaled > 0.0 { scaled / repetition_penalty } else { scaled * repetition_penalty };
        *logit = penalised - shift;
        if *new > 0 {
            *logit -= presence_penalty + frequency_penalty * *new as f32;
        }
    }
}

fn best_first(a: &(f32, u32), b: &(f32, u32)) -> Ordering {
    b.0.total_cmp(&a.0).then(a.1.cmp(&b.1))
}

/// Brings the most likely candidates to the front, sorted, and returns how many reach `mass` together; at least one.
fn nucleus(candidates: &mut [(f32, u32)], mass: f64, weight: impl Fn(&(f32, u32)) -> f64) -> usize {
    let mut guess = NUCLEUS_GUESS;
    loop {
        let count = guess.min(candidates.len());
        if count < candidates.len() {
            candidates.select_nth_unstable_by(count - 1, best_first);
        }
        candidates[..count].sort_unstable_by(best_first);
        let mut before = 0.0;
        for (index, candidate) in candidates[..count].iter().enumerate() {
            // A candidate is dropped once the mass before it already exceeds what is asked for.
            if index > 0 && before > mass {
                return index;
            }
            before += weight(candidate);
        }
        if count == candidates.len() || before > mass {
            return count;
        }
        guess *= 8;
    }
}

/// The first id at which the running sum of weights passes `target`.
fn pick(weights: impl Iterator<Item = (u32, f64)>, target: f64) -> u32 {
    let (mut sum, mut last) = (0.0, 0);
    for (id, weight) in weights {
        if weight > 0.0 {
            sum += weight;
            last = id;
            if sum > target {
                break;
            }
        }
    }
    last
}

/// A number in [0, 1) from the finaliser of SplitMix64, applied once for each part of the key.
fn uniform(seed: u64, sample: u32, position: u32) -> f64 {
    let key = mix(mix(seed) ^ (u64::from(sample) << 32 | u64::from(position)));
    (key >> 11) as f64 / (1_u64 << 53) as f64
}

fn mix(value: u64) -> u64 {
    let mut z = value.wrapping_add(0x9E37_79B9_7F4A_7C15);
    z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]

    use super::*;

    const LOGITS: [f32; 8] = [0.5, 2.0, -1.0, 2.0, 1.0, 0.0, -3.0, 1.5];

    fn state(sampling: Sampling) -> SamplerState {
        SamplerState::new(sampling, 0, vec![1], LogprobSpec::default())
    }

    fn sampled(sampling: Sampling) -> Sampling {
        Sampling { greedy: false, ..sampling }
    }

    /// Share of each id in many draws.
    fn frequencies(sampling: &Sampling, draws: u32) -> Vec<f64> {
        let mut sampler = Sampler::default();
        let mut counts = vec![0; LOGITS.len()];
        for position in 0..draws {
            let token = sampler.sample(&mut state(sampling.clone()), position, &mut LOGITS.clone()).unwrap();
            counts[token as usize] += 1;
        }
        counts.into_iter().map(|count| f64::from(count) / f64::from(draws)).collect()
    }

    fn check_frequencies(sampling: Sampling, allowed: &[u32]) {
        let temperature = f64::from(sampling.temperature);
        let draws = 20_000;
        let weight = |id: &u32| (f64::from(LOGITS[*id as usize]) / temperature).exp();
        let total: f64 = allowed.iter().map(weight).sum();
        for (id, share) in frequencies(&sampled(sampling), draws).into_iter().enumerate() {
            let expected = if allowed.contains(&(id as u32)) { weight(&(id as u32)) / total } else { 0.0 };
            let sigma = (expected * (1.0 - expected) / f64::from(draws)).sqrt();
            assert!((share - expected).abs() <= 4.0 * sigma, "id {id}: {share} instead of {expected}");
        }
    }

    #[test]
    fn greedy_takes_the_lowest_of_equals() {
        let token = Sampler::default().sample(&mut state(Sampling::default()), 0, &mut LOGITS.clone());
        assert_eq!(token, Ok(1));
    }

    #[test]
    fn draws_follow_the_softmax() {
        check_frequencies(Sampling::default(), &[0, 1, 2, 3, 4, 5, 6, 7]);
        check_frequencies(Sampling { temperature: 3.0, ..Sampling::default() }, &[0, 1, 2, 3, 4, 5, 6, 7]);
        check_frequencies(Sampling { top_k: 3, ..Sampling::default() }, &[1, 3, 7]);
        check_frequencies(Sampling { top_k: 1_000_000_000, ..Sampling::default() }, &[0, 1, 2, 3, 4, 5, 6, 7]);
        // Equal to the k-th largest is kept.
        check_frequencies(Sampling { top_k: 1, ..Sampling::default() }, &[1, 3]);
        // softmax: 0.32, 0.32, 0.19, 0.12, …: the third is the one that passes 0.7.
        check_frequencies(Sampling { top_p: 0.7, ..Sampling::default() }, &[1, 3, 7]);
        check_frequencies(Sampling { top_p: 0.7, top_k: 2, ..Sampling::default() }, &[1, 3]);
        check_frequencies(Sampling { top_p: 0.0001, ..Sampling::default() }, &[1]);
    }

    #[test]
    fn a_tiny_temperature_is_greedy() {
        let shares = frequencies(&sampled(Sampling { temperature: 1e-8, ..Sampling::default() }), 1000);
        assert_eq!(shares[1] + shares[3], 1.0);
    }

    #[test]
    fn end_of_sequence_waits_for_the_minimum() {
        let mut state = SamplerState::new(Sampling::default(), 2, vec![1, 3], LogprobSpec::default());
        let mut sampler = Sampler::default();
        let tokens: Vec<u32> =
            (0..3).map(|position| sampler.sample(&mut state, position, &mut LOGITS.clone()).unwrap()).collect();
        assert_eq!(tokens, [7, 7, 1]);
    }

    #[test]
    fn penalties_respect_the_sign() {
        let sampling = sampled(Sampling { repetition_penalty: 1e6, temperature: 1.0, ..Sampling::default() });
        let mut state = state(sampling);
        state.observe_prompt(&[1, 3, 7, 4, 0, 2, 6]);
        // All seen ids fall to about 0 (positive) or far below (negative); the unseen zero stays.
        let mut logits = LOGITS;
        apply_penalties(&state, &mut logits, 0.0);
        assert!(logits[1].abs() < 1e-5 && logits[2] < -1e5 && logits[6] < -1e5);
        assert_eq!(logits[5], 0.0);
    }

    #[test]
    fn presence_and_frequency_count_new_tokens_only() {
        let sampling = sampled(Sampling { presence_penalty: 1.0, frequency_penalty: 0.5, ..Sampling::default() });
        let mut state = state(sampling);
        state.observe_prompt(&[2]);
        state.counts.insert(4, (2, 2));
        let mut logits = LOGITS;
        apply_penalties(&state, &mut logits, 0.0);
        assert_eq!((logits[2], logits[4]), (-1.0, 1.0 - 1.0 - 1.0));
    }

    #[test]
    fn bias_moves_greedy_too() {
        let sampling = Sampling { logit_bias: vec![(6, 100.0), (4_000_000, 1.0)], ..Sampling::default() };
        assert_eq!(Sampler::default().sample(&mut state(sampling), 0, &mut LOGITS.clone()), Ok(6));
    }

    #[test]
    fn what_is_not_finite_is_an_error() {
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = LOGITS;
            logits[2] = bad;
            let token = Sampler::default().sample(&mut state(Sampling::default()), 0, &mut logits);
            assert_eq!(token, Err(NotFinite));
        }
    }

    #[test]
    fn logprobs_are_those_of_the_plain_softmax() {
        let spec = LogprobSpec { tokens: true, prompt: false, top: 3, full: true, rewards: false };
        let logprobs = logprobs(spec, 4, &LOGITS);
        let total: f64 = LOGITS.iter().map(|logit| f64::from(*logit).exp()).sum();
        for (id, value) in logprobs.full.iter().enumerate() {
            assert!((f64::from(*value) - (f64::from(LOGITS[id]) - total.ln())).abs() < 1e-6);
        }
        assert_eq!(logprobs.token, logprobs.full[4]);
        assert_eq!(logprobs.top.iter().map(|(id, _)| *id).collect::<Vec<_>>(), [1, 3, 7]);
    }

    #[test]
    fn random_numbers_depend_on_every_part_of_the_key() {
        let base = uniform(1, 2, 3);
        for other in [uniform(2, 2, 3), uniform(1, 3, 3), uniform(1, 2, 4), uniform(3, 2, 1)] {
            assert_ne!(base, other);
        }
        let mean: f64 = (0..10_000).map(|position| uniform(9, 0, position)).sum::<f64>() / 10_000.0;
        assert!((mean - 0.5).abs() < 0.01, "{mean}");
    }
}
