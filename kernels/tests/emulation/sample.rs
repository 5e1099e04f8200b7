use nemotron_kernels::ops::{NOT_FINITE, Sample, SampleRow};

use crate::request::{LogprobSpec, Sampling};
use crate::sampler::{Sampler, SamplerState};

use super::device::{Memory, Random, in_every_order, try_launch};

/// A row of both samplers.
struct Row {
    sampling: Sampling,
    prompt: Vec<u32>,
    new: Vec<u32>,
    min_new_tokens: u32,
    eos_ids: Vec<u32>,
    logits: Vec<f32>,
}

/// Tokens of the device for all rows at once; logits lie further apart than the vocabulary is long.
fn device_tokens(rows: &[Row], orders: bool) -> Vec<u32> {
    let vocab = rows[0].logits.len();
    let stride = vocab + 3;
    let (mut ids, mut biases) = (Vec::<u32>::new(), Vec::<f32>::new());
    let mut logits = Vec::new();
    let mut params = Vec::new();
    for (index, row) in rows.iter().enumerate() {
        let s = &row.sampling;
        let mut list = |items: &mut dyn Iterator<Item = (u32, f32)>| {
            let first = ids.len() as u32;
            items.for_each(|(id, bias)| {
                ids.push(id);
                biases.push(bias);
            });
            (first, ids.len() as u32 - first)
        };
        let masks = (row.new.len() as u32) < row.min_new_tokens;
        let (first_masked, num_masked) = list(&mut row.eos_ids.iter().filter(|_| masks).map(|id| (*id, 0.0)));
        let (first_biased, num_biased) = list(&mut s.logit_bias.iter().copied());
        let penalties = s.repetition_penalty != 1.0 || s.frequency_penalty != 0.0 || s.presence_penalty != 0.0;
        let (first_seen, num_seen) =
            list(&mut row.prompt.iter().chain(&row.new).filter(|_| penalties).map(|id| (*id, 0.0)));
        params.push(SampleRow {
            seed: s.seed,
            sample: s.sample,
            position: (row.prompt.len() + row.new.len()) as u32,
            greedy: u32::from(s.greedy),
            temperature: s.temperature,
            top_k: s.top_k,
            top_p: s.top_p,
            repetition_penalty: s.repetition_penalty,
            frequency_penalty: s.frequency_penalty,
            presence_penalty: s.presence_penalty,
            first_masked,
            num_masked,
            first_biased,
            num_biased,
            first_seen,
            num_seen,
            num_prompt: row.prompt.len() as u32,
            // Not in order.
            logits_row: (rows.len() - 1 - index) as u32,
            // Nor are the tokens.
            slot: index as u32 ^ 1,
        });
    }
    for row in rows.iter().rev() {
        logits.extend_from_slice(&row.logits);
        logits.extend([f32::NAN; 3]);
    }
    let (ids, biases, params) = (Memory(ids), Memory(biases), Memory(params));
    let once = |launch: &dyn Fn(&nemotron_kernels::ops::Launch)| {
        let mut logits = Memory(logits.clone());
        let mut tokens = Memory::<u32>::fresh(rows.len().next_multiple_of(2));
        let sample = Sample {
            logits: logits.ptr_mut(),
            rows: params.ptr(),
            ids: ids.ptr(),
            biases: biases.ptr(),
            tokens: tokens.ptr_mut(),
            num_rows: rows.len() as u32,
            vocab: vocab as u32,
            stride: stride as u32,
            reserved: 0,
        };
        launch(&sample.launch());
        (0..rows.len()).map(|index| tokens.0[index ^ 1]).collect::<Vec<_>>()
    };
    if orders { in_every_order(once) } else { once(&|launch| try_launch(&[*launch], (2, 7)).unwrap()) }
}

fn host_token(row: &Row) -> u32 {
    let mut sampler = Sampler::default();
    let min_len = row.prompt.len() as u32 + row.min_new_tokens;
    let mut state = SamplerState::new(row.sampling.clone(), min_len, row.eos_ids.clone(), LogprobSpec::default());
    state.observe_prompt(&row.prompt);
    // The sampler takes note of new tokens as it draws them: it is made to draw these.
    for (index, token) in row.new.iter().enumerate() {
        let mut logits = vec![f32::NEG_INFINITY; row.logits.len()];
        logits[*token as usize] = 1e4;
        let drawn = sampler.sample(&mut state, (row.prompt.len() + index) as u32, &mut logits);
        assert_eq!(drawn, Ok(*token), "the test forces this token");
    }
    let position = (row.prompt.len() + row.new.len()) as u32;
    sampler.sample(&mut state, position, &mut row.logits.clone()).unwrap_or(NOT_FINITE)
}

fn random_row(random: &mut Random, vocab: usize) -> Row {
    let sigma = [0.3, 2.0, 5.0][random.below(3)];
    let mut logits = random.f32s(vocab, sigma).0;
    // Ties, and ids that cannot be.
    for _ in 0..vocab / 8 {
        let (from, to) = (random.below(vocab), random.below(vocab));
        logits[to] = logits[from];
    }
    for _ in 0..random.below(4) {
        logits[random.below(vocab)] = f32::NEG_INFINITY;
    }
    let id = |random: &mut Random| random.below(vocab) as u32;
    let eos_ids = vec![id(random), vocab as u32 + 5];
    let few = |most: usize, random: &mut Random| {
        let count = random.below(most);
        (0..count).map(|_| id(random)).filter(|id| *id != eos_ids[0]).collect::<Vec<_>>()
    };
    let (prompt, new) = (few(12, random), few(9, random));
    let penalties = random.below(2) == 0;
    let either = |random: &mut Random, a: f32, b: f32| if penalties && random.below(2) == 0 { a } else { b };
    let sampling = Sampling {
        greedy: random.below(8) == 0,
        temperature: [0.01, 0.7, 1.0, 3.0][random.below(4)],
        top_k: [0, 0, 1, 3, 40, 1 << 30][random.below(6)],
        top_p: [0.0, 1.0, 1e-4, 0.5, 0.9, 0.999][random.below(6)],
        repetition_penalty: either(random, 1.3, 1.0),
        frequency_penalty: either(random, 0.4, 0.0),
        presence_penalty: either(random, -0.6, 0.0),
        logit_bias: if new.is_empty() && random.below(2) == 0 {
            vec![(id(random), 3.0), (vocab as u32, 1.0), (id(random), -2.0)]
        } else {
            Vec::new()
        },
        seed: random.bits(),
        sample: random.below(3) as u32,
    };
    Row { sampling, prompt, new, min_new_tokens: random.below(8) as u32, eos_ids, logits }
}

#[test]
fn tokens_are_those_of_the_host() {
    let mut random = Random(11);
    for (vocab, count) in [(1, 2), (31, 70), (1000, 25), (5000, 5)] {
        let rows: Vec<Row> = (0..count).map(|_| random_row(&mut random, vocab)).collect();
        let expected: Vec<u32> = rows.iter().map(host_token).collect();
        for (index, (token, expected)) in device_tokens(&rows, false).into_iter().zip(expected).enumerate() {
            assert_eq!(token, expected, "vocabulary {vocab}, row {index}: {:?}", rows[index].sampling);
        }
    }
}

#[test]
fn draws_do_not_depend_on_the_order_of_threads_or_the_batch() {
    let mut random = Random(12);
    let rows: Vec<Row> = (0..6).map(|_| random_row(&mut random, 1500)).collect();
    let batch = device_tokens(&rows, true);
    for (row, token) in rows.into_iter().zip(batch) {
        assert_eq!(device_tokens(&[row], false), [token]);
    }
}

#[test]
fn equal_logits_and_hopeless_ones() {
    let row = |logits: Vec<f32>, sampling: Sampling| Row {
        sampling,
        prompt: vec![],
        new: vec![],
        min_new_tokens: 0,
        eos_ids: vec![],
        logits,
    };
    let drawn = Sampling { greedy: false, ..Sampling::default() };
    let mut rows = Vec::new();
    for seed in 0..6 {
        rows.push(row(vec![0.25; 2100], Sampling { seed, top_p: 0.5, ..drawn.clone() }));
        rows.push(row(vec![-0.0; 2100], Sampling { seed, top_k: 7, ..drawn.clone() }));
    }
    for bad in [f32::NAN, f32::INFINITY] {
        let mut logits = vec![1.0; 2100];
        logits[1999] = bad;
        rows.push(row(logits, drawn.clone()));
    }
    rows.push(row(vec![f32::NEG_INFINITY; 2100], Sampling::default()));
    // The lowest of equals, and −0 equals 0.
    let mut logits = vec![-1.0; 2100];
    (logits[70], logits[1400], logits[20]) = (-0.0, 0.0, -0.5);
    rows.push(row(logits, Sampling::default()));
    let expected: Vec<u32> = rows.iter().map(host_token).collect();
    assert_eq!(expected[12..], [NOT_FINITE, NOT_FINITE, NOT_FINITE, 70]);
    assert_eq!(device_tokens(&rows, false), expected);
}
