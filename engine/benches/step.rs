//! What a step costs beside the model, with 256 rows decoding: `cargo bench -p nemotron-engine --bench step`.
//!
//! Everything runs on one thread, one part after the other; when serving, text is made on the threads that answer, beside the next step.

use std::error::Error;
use std::path::Path;
use std::time::{Duration, Instant};

use nemotron_engine::request::{Event, LogprobSpec, Request, Sampling, Stopping};
use nemotron_engine::sampler::{Sampler, SamplerState};
use nemotron_engine::scheduler::Scheduler;
use nemotron_engine::sequence::Sequence;
use nemotron_engine::spec::Limits;
use nemotron_engine::step::{RowResult, StepPlan, StepResult};
use nemotron_engine::tokenizer::{Detokenizer, Tokenizer};
use tokio::sync::{Semaphore, mpsc::channel};

const ROWS: usize = 256;
const PROMPT: usize = 8;
const STEPS: usize = 2000;
/// Prompts come in, and buffers grow.
const FIRST_STEPS: usize = 64;
const PARTS: [&str; 5] = ["schedule", "protocol", "sample", "text", "all"];

fn main() -> Result<(), Box<dyn Error>> {
    let nucleus = Sampling { greedy: false, top_p: 0.9, ..Sampling::default() };
    measure("greedy", &Sampling::default())?;
    measure("top-p 0.9", &nucleus)
}

fn measure(name: &str, sampling: &Sampling) -> Result<(), Box<dyn Error>> {
    let assets = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/nemotron-shakespeare");
    let tokenizer = Tokenizer::from_dir(&assets)?;
    let vocab = tokenizer.vocab_size();
    let max_len = PROMPT + STEPS + FIRST_STEPS;
    let num_pages = ROWS * max_len.div_ceil(16);
    let limits = Limits { page_tokens: 16, num_pages, max_step_tokens: 512, max_sequences: ROWS };
    let mut scheduler = Scheduler::new(limits, 1, vocab, tokenizer.clone());
    let mut clients = Vec::new();
    for row in 0..ROWS {
        let prompt = vec![300 + row as u32; PROMPT];
        let (sender, events) = channel(Semaphore::MAX_PERMITS);
        clients.push((events, Detokenizer::new(&tokenizer, &prompt), String::new()));
        let max_new_tokens = (STEPS + FIRST_STEPS) as u32;
        let stopping = Stopping { max_new_tokens, stop_strings: vec!["<extra_id_1>".into()], ..Stopping::default() };
        let request = Request { prompt, sampling: sampling.clone(), stopping, logprobs: LogprobSpec::default() };
        scheduler.add(Sequence::new(row as u64, row as u64, request, sender));
    }
    // Each row has one likely id among ordinary pieces and a hundred that follow it.
    let noise = |i: usize| ((i * 2_654_435_761) >> 13) % 1000;
    let logits: Vec<f32> = (0..ROWS * vocab)
        .map(|i| {
            let (row, id) = (i / vocab, i % vocab);
            let distance = id.abs_diff(400 + noise(row));
            noise(i) as f32 / 500.0 + if distance < 50 { 12.0 - distance as f32 / 8.0 } else { 0.0 }
        })
        .collect();
    let (mut sampler, mut states) = (Sampler::default(), Vec::new());
    states.resize_with(ROWS, || SamplerState::new(sampling.clone(), 0, Vec::new(), LogprobSpec::default()));
    let (mut plan, mut sent, mut bytes) = (StepPlan::default(), StepPlan::default(), Vec::new());
    let (mut result, mut received) = (StepResult::default(), StepResult::default());
    let mut times: [Vec<Duration>; PARTS.len()] = Default::default();
    for step in 0..STEPS {
        let start = Instant::now();
        scheduler.plan(0, &mut plan);
        let planned = Instant::now();
        plan.encode(&mut bytes);
        sent.decode(&bytes)?;
        let told = Instant::now();
        result.rows.clear();
        let mut sampling_time = Duration::ZERO;
        for work in sent.work.iter().filter(|work| work.samples) {
            let row = (work.slot as usize + step) % ROWS;
            let mut scratch = logits[row * vocab..][..vocab].to_vec();
            let begin = Instant::now();
            let token = sampler.sample(&mut states[work.slot as usize], work.first_position + 1, &mut scratch);
            sampling_time += begin.elapsed();
            let token = token.map_err(|_| "logits are finite")?;
            result.rows.push(RowResult { slot: work.slot, token: Some(token), ..RowResult::default() });
        }
        let sampled = Instant::now();
        result.encode(&mut bytes);
        received.decode(&bytes)?;
        let answered = Instant::now();
        let (generated, ended) = scheduler.complete(&mut received);
        let completed = Instant::now();
        for (events, detokenizer, text) in &mut clients {
            while let Ok(Event::Token { id, .. }) = events.try_recv() {
                text.clear();
                detokenizer.push(id, text);
            }
        }
        let schedule = (planned - start) + (completed - answered);
        let parts = [schedule, (told - planned) + (answered - sampled), sampling_time, completed.elapsed()];
        if step >= FIRST_STEPS {
            assert_eq!((generated, ended), (ROWS, 0), "all rows decode");
            parts.iter().chain([&parts.iter().sum()]).zip(&mut times).for_each(|(part, times)| times.push(*part));
        }
    }
    println!("{ROWS} rows, vocabulary of {vocab}, {name}; us a step");
    for (part, mut times) in PARTS.iter().zip(times) {
        times.sort();
        let us = |share: usize| times[times.len() * share / 100].as_secs_f64() * 1e6;
        println!("{part:>10}  p50 {:7.1}  p99 {:7.1}", us(50), us(99));
    }
    Ok(())
}
