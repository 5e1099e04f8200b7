//! The whole engine against numbers that other software computed: transformers in f32 on the same checkpoints.

use super::parity_model;
use super::support::{LIMITS, Output, engine, fixtures, floats, generate, greedy, ids, json};
use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::Mesh;
use nemotron_engine::rank::ModelSource;
use nemotron_engine::request::{LogprobSpec, Request};

const ALL: LogprobSpec = LogprobSpec { tokens: true, prompt: true, top: 5, full: false, rewards: false };
const ONE_RANK: Mesh = Mesh { tp: 1, pp: 1 };

fn golden() -> ModelSource {
    ModelSource::Path(fixtures().join("golden/tiny-hf"))
}

fn golden_requests() -> Vec<Request> {
    let cases = json("golden/expected.json");
    let prompts = cases.as_array().unwrap().iter().map(|case| ids(&case["ids"]));
    prompts.map(|prompt| Request { logprobs: ALL, ..greedy(prompt, 32) }).collect()
}

fn assert_close(what: &str, ours: &[f32], theirs: &[f32], tolerance: f32) {
    assert_eq!(ours.len(), theirs.len(), "{what}");
    for (index, (a, b)) in ours.iter().zip(theirs).enumerate() {
        assert!((a - b).abs() <= tolerance, "{what}[{index}]: {a} instead of {b}");
    }
}

#[test]
fn golden_checkpoint_in_f32_on_every_mesh() {
    let cases = json("golden/expected.json");
    let mut first: Option<Vec<Output>> = None;
    for (tp, pp) in [(1, 1), (2, 1), (1, 2), (2, 2), (1, 4), (2, 4)] {
        let outputs = generate(&engine(&golden(), ComputeType::F32, Mesh { tp, pp }, LIMITS), golden_requests());
        for (case, output) in cases.as_array().unwrap().iter().zip(&outputs) {
            assert_eq!(output.ids, ids(&case["greedy32"]), "tp {tp} pp {pp}");
            for (ours, theirs) in output.logprobs[0].top.iter().zip(case["top5_last"].as_array().unwrap()) {
                assert_eq!(u64::from(ours.0), theirs[0].as_u64().unwrap());
                assert_close("top5_last", &[ours.1], &[theirs[2].as_f64().unwrap() as f32], 1e-3);
            }
            let argmax: Vec<u32> =
                output.prompt.iter().chain(&output.logprobs[..1]).map(|logprobs| logprobs.top[0].0).collect();
            assert_eq!(argmax, ids(&case["argmax_all_positions"]));
        }
        match &first {
            Some(first) => assert_eq!(first, &outputs, "tp {tp} pp {pp} differs from one rank"),
            None => first = Some(outputs),
        }
    }
}

#[test]
fn golden_checkpoint_in_bf16_stays_near_f32() {
    let mut requests = golden_requests();
    let exact = generate(&engine(&golden(), ComputeType::F32, ONE_RANK, LIMITS), requests.clone());
    let one = generate(&engine(&golden(), ComputeType::Bf16, ONE_RANK, LIMITS), requests.clone());
    let four = generate(&engine(&golden(), ComputeType::Bf16, Mesh { tp: 2, pp: 2 }, LIMITS), requests.clone());
    assert_eq!(one, four);

    // The same rows are compared: f32's text as the prompt of both.
    for (request, output) in requests.iter_mut().zip(&exact) {
        request.prompt.extend(&output.ids);
        request.stopping.max_new_tokens = 1;
    }
    let exact = generate(&engine(&golden(), ComputeType::F32, ONE_RANK, LIMITS), requests.clone());
    let rounded = generate(&engine(&golden(), ComputeType::Bf16, ONE_RANK, LIMITS), requests);
    let differences: Vec<f32> = exact
        .iter()
        .zip(&rounded)
        .flat_map(|(a, b)| a.prompt_logprobs().into_iter().zip(b.prompt_logprobs()))
        .map(|(a, b)| (a - b).abs())
        .collect();
    let mean = differences.iter().sum::<f32>() / differences.len() as f32;
    let max = differences.iter().copied().fold(0.0, f32::max);
    println!("bf16 against f32 over {} log-probabilities: mean {mean}, max {max}", differences.len());
    assert!(max <= 0.3 && mean <= 0.03);
    assert!(mean > 0.0, "bf16 was not used");
}

/// A SentencePiece BPE model of `vocab_size` pieces: the usual specials, the bytes, and made-up words.
fn tokenizer_model(vocab_size: usize) -> Vec<u8> {
    fn field(out: &mut Vec<u8>, number: u8, bytes: &[u8]) {
        out.extend([number << 3 | 2, bytes.len() as u8]);
        out.extend(bytes);
    }
    const NORMAL: u8 = 1;
    const UNKNOWN: u8 = 2;
    const CONTROL: u8 = 3;
    const BYTE: u8 = 6;
    let specials = [("<pad>", CONTROL), ("<unk>", UNKNOWN), ("<s>", CONTROL), ("</s>", CONTROL)];
    let specials = specials.map(|(text, kind)| (text.to_owned(), kind));
    let bytes = (0..256).map(|byte| (format!("<0x{byte:02X}>"), BYTE));
    let words = (0..).map(|word| (format!("word{word}"), NORMAL));
    let mut model = Vec::new();
    for (text, kind) in specials.into_iter().chain(bytes).chain(words).take(vocab_size) {
        let mut piece = Vec::new();
        field(&mut piece, 1, text.as_bytes());
        piece.extend([3 << 3, kind]);
        field(&mut model, 1, &piece);
    }
    const BPE_WITH_BYTE_FALLBACK: &[u8] = &[3 << 3, 2, 0x98, 0x02, 1];
    field(&mut model, 2, BPE_WITH_BYTE_FALLBACK);
    model
}

#[test]
fn parity_with_transformers() {
    for (size, model) in [("tiny", &parity_model::TINY), ("small", &parity_model::SMALL)] {
        let dir = tempfile::tempdir().unwrap();
        parity_model::write(model, 1, dir.path()).unwrap();
        std::fs::write(dir.path().join("tokenizer.model"), tokenizer_model(model.vocab)).unwrap();
        let cases = json(&format!("parity/public/{size}.json"));
        let cases = cases["cases"].as_array().unwrap();
        let generate = |dtype| {
            let requests = cases.iter().map(|case| Request { logprobs: ALL, ..greedy(ids(&case["prompt_ids"]), 32) });
            generate(&engine(&ModelSource::Path(dir.path().into()), dtype, ONE_RANK, LIMITS), requests)
        };
        for (case, output) in cases.iter().zip(generate(ComputeType::F32)) {
            assert_eq!(output.ids, ids(&case["greedy_ids"]), "{}", case["id"]);
            assert_close("greedy", &output.token_logprobs(), &floats(&case["greedy_logprobs"]), 1e-3);
            assert_close("prompt", &output.prompt_logprobs(), &floats(&case["prompt_logprobs"]), 1e-3);
        }

        // In bf16 another id may win where the best two are nearly equal. What follows it is another text and not compared.
        let (mut num_equal, mut differences) = (0, Vec::new());
        for (case, output) in cases.iter().zip(generate(ComputeType::Bf16)) {
            let theirs = ids(&case["greedy_ids"]);
            let len = output.ids.iter().zip(&theirs).take_while(|(a, b)| a == b).count();
            match output.ids.get(len) {
                None => num_equal += 1,
                Some(id) => {
                    let best: Vec<(u32, f32)> =
                        serde_json::from_value(case["top5"][len].clone()).expect("pairs of ids and log-probabilities");
                    assert_eq!(*id, best[1].0, "{} at {len}", case["id"]);
                    assert!(best[0].1 - best[1].1 <= 0.05, "{} at {len}: {best:?}", case["id"]);
                }
            }
            let logprobs = output.token_logprobs().into_iter().zip(floats(&case["greedy_logprobs"]));
            differences.extend(logprobs.take(len).map(|(a, b)| (a - b).abs()));
        }
        let mean = differences.iter().sum::<f32>() / differences.len() as f32;
        let max = differences.iter().copied().fold(0.0, f32::max);
        let num_cases = cases.len();
        println!("{size} in bf16: {num_equal} of {num_cases} texts equal, |Δ log-probability| mean {mean}, max {max}");
        assert!(mean <= 0.007 && max <= 0.04);
    }
}

#[test]
fn built_in_model_continues_as_transformers_does() {
    let cases = json("nemotron-shakespeare/expected.json");
    let cases = cases["cases"].as_array().unwrap();
    for mesh in [ONE_RANK, Mesh { tp: 8, pp: 2 }] {
        let engine = engine(&ModelSource::Builtin, ComputeType::F32, mesh, LIMITS);
        let requests = cases.iter().map(|case| {
            let mut request = greedy(ids(&case["ids"]), case["greedy"].as_array().unwrap().len() as u32);
            request.stopping.eos_ids = vec![3, 5];
            request
        });
        for (case, output) in cases.iter().zip(generate(&engine, requests)) {
            assert_eq!(output.ids, ids(&case["greedy"]), "{}", case["prompt"]);
        }
    }
}
