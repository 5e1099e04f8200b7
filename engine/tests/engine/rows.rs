//! What a row gives must not depend on its company: batch, chunks, pages, mesh; and every row ends as it was asked to.

use super::support::{LIMITS, collect, engine, generate, greedy};
use nemotron_engine::backend::ComputeType;
use nemotron_engine::config::Mesh;
use nemotron_engine::engine::Engine;
use nemotron_engine::rank::{Limits, ModelSource};
use nemotron_engine::request::{Finish, FinishReason, LogprobSpec, Request, RowError, Sampling, StopMatch};

const ONE_RANK: Mesh = Mesh { tp: 1, pp: 1 };

fn builtin(dtype: ComputeType, mesh: Mesh, limits: Limits) -> Engine {
    engine(&ModelSource::Builtin, dtype, mesh, limits)
}

/// 64 rows of many lengths, greedy and sampled, with every kind of log-probability among them.
fn mixed_rows() -> Vec<Request> {
    (0..64_u32)
        .map(|row| {
            let len = 1 + row * 37 % 150;
            let prompt = (0..len).map(|i| (row * 7919 + i * 104_729) % 3000 + 300).collect();
            let mut request = greedy(prompt, 1 + row * 11 % 40);
            request.stopping.eos_ids = vec![3, 5];
            request.stopping.min_new_tokens = row % 5;
            if row % 2 == 1 {
                request.sampling = Sampling {
                    greedy: false,
                    temperature: 0.5 + row as f32 / 40.0,
                    top_k: [0, 50][row as usize / 2 % 2],
                    top_p: [1.0, 0.9][row as usize / 4 % 2],
                    repetition_penalty: [1.0, 1.3][row as usize / 8 % 2],
                    seed: u64::from(row / 16),
                    sample: row,
                    ..Sampling::default()
                };
            }
            request.logprobs = LogprobSpec {
                tokens: true,
                prompt: row % 3 == 0,
                top: (row % 4) as u16,
                full: row % 16 == 0,
                rewards: false,
            };
            request
        })
        .collect()
}

#[test]
fn a_batch_of_64_gives_each_row_what_it_gets_alone() {
    for dtype in [ComputeType::Bf16, ComputeType::F32] {
        let engine = builtin(dtype, ONE_RANK, LIMITS);
        let together = generate(&engine, mixed_rows());
        for (request, output) in mixed_rows().into_iter().zip(&together) {
            assert_eq!(&generate(&engine, [request])[0], output);
        }
    }
}

#[test]
fn chunks_pages_and_mesh_do_not_show() {
    let expected = generate(&builtin(ComputeType::Bf16, ONE_RANK, LIMITS), mixed_rows());
    let small = Limits { page_tokens: 4, num_pages: 100, max_step_tokens: 7, max_sequences: 5 };
    for (mesh, limits) in [
        (ONE_RANK, small),
        (Mesh { tp: 2, pp: 1 }, LIMITS),
        (Mesh { tp: 1, pp: 3 }, small),
        (Mesh { tp: 2, pp: 2 }, Limits { page_tokens: 32, ..LIMITS }),
        (Mesh { tp: 8, pp: 2 }, LIMITS),
    ] {
        let outputs = generate(&builtin(ComputeType::Bf16, mesh, limits), mixed_rows());
        assert_eq!(outputs, expected, "{mesh:?} {limits:?}");
    }
}

#[test]
fn rows_end_as_asked() {
    let engine = builtin(ComputeType::F32, ONE_RANK, LIMITS);
    let tokenizer = engine.info().tokenizer.clone();
    let prompt = tokenizer.encode("Shall I compare thee to a summer's day?");
    let free = generate(&engine, [greedy(prompt.clone(), 24)]).remove(0);
    let text_of = |ids: &[u32]| {
        let row: Vec<u32> = prompt.iter().chain(ids).copied().collect();
        tokenizer.decode(&row)[tokenizer.decode(&prompt).len()..].to_owned()
    };
    let finish = |reason| Some(Ok(Finish { reason, text_len: None }));
    assert_eq!((free.ids.len(), &free.finish), (24, &finish(FinishReason::Length)));
    let first = |id| free.ids.iter().position(|other| *other == id).unwrap() + 1;

    let mut stop_id = greedy(prompt.clone(), 24);
    stop_id.stopping.stop_ids = vec![free.ids[9]];
    let output = generate(&engine, [stop_id]).remove(0);
    assert_eq!((output.ids.as_slice(), output.finish), (&free.ids[..first(free.ids[9])], finish(FinishReason::Stop)));

    // A string over two tokens, kept whole at the end of the row.
    let mut stop_string = greedy(prompt.clone(), 24);
    stop_string.stopping.stop_strings =
        vec![text_of(&free.ids)[text_of(&free.ids[..8]).len()..text_of(&free.ids[..10]).len()].into()];
    let output = generate(&engine, [stop_string.clone()]).remove(0);
    assert!(output.ids.len() <= 10 && text_of(&output.ids).ends_with(&stop_string.stopping.stop_strings[0]));
    assert_eq!(output.finish, finish(FinishReason::Stop));

    // The same string found anywhere, and cut.
    stop_string.stopping.stop_match = StopMatch::TextContains;
    let output = generate(&engine, [stop_string.clone()]).remove(0);
    let at = text_of(&output.ids).find(&stop_string.stopping.stop_strings[0]).unwrap();
    assert_eq!(output.finish, Some(Ok(Finish { reason: FinishReason::Stop, text_len: Some(at) })));

    let mut empty = greedy(prompt.clone(), 24);
    empty.stopping.stop_strings = vec![String::new()];
    assert_eq!(generate(&engine, [empty])[0].ids, free.ids[..1]);

    let mut eos = greedy(prompt.clone(), 24);
    eos.stopping.eos_ids = vec![free.ids[0]];
    eos.stopping.min_new_tokens = 3;
    let output = generate(&engine, [eos]).remove(0);
    assert!(!output.ids[..3].contains(&free.ids[0]), "masked while below the minimum");
}

#[test]
fn rows_that_cannot_be_generated_are_refused() {
    let limits = Limits { num_pages: 10, ..LIMITS };
    let engine = builtin(ComputeType::Bf16, ONE_RANK, limits);
    let refused = |request| engine.submit(request).err().unwrap();
    assert_eq!(refused(greedy(vec![], 1)), RowError::EmptyPrompt);
    assert_eq!(refused(greedy(vec![4096], 1)), RowError::UnknownToken { id: 4096, vocab_size: 4096 });
    assert_eq!(refused(greedy(vec![300; 1020], 5)), RowError::TooLong { needed: 1025, limit: 1024 });
    assert_eq!(refused(greedy(vec![300; 100], 61)), RowError::KvTooSmall { needed: 161, limit: 160 });
    assert_eq!(generate(&engine, [greedy(vec![300; 100], 60)])[0].ids.len(), 60);
}

#[test]
fn a_dropped_row_gives_its_pages_back() {
    let engine = builtin(ComputeType::Bf16, ONE_RANK, Limits { num_pages: 64, ..LIMITS });
    for _ in 0..20 {
        let mut row = engine.submit(greedy(vec![300; 20], 900)).unwrap();
        row.events.blocking_recv().unwrap();
    }
    // Were pages kept, this row could never run.
    let output = collect(engine.submit(greedy(vec![300; 1000], 24)).unwrap());
    assert_eq!(output.ids.len(), 24);
}

#[test]
fn drain_finishes_what_runs_and_refuses_what_comes() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let engine = builtin(ComputeType::Bf16, ONE_RANK, LIMITS);
    let row = engine.submit(greedy(vec![300; 20], 50)).unwrap();
    runtime.block_on(engine.drain());
    assert_eq!(collect(row).ids.len(), 50);
    assert_eq!(engine.submit(greedy(vec![300], 1)).err(), Some(RowError::ShuttingDown));
}
