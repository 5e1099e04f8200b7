use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{Advance, Embed, GatherRows, NO_ROW, SampleRow};

use super::device::{Memory, Random, in_every_order, wide};

#[test]
fn embed_takes_rows_of_its_own_part_of_the_vocabulary() {
    for hidden in [8, 264, 2304] {
        let mut random = Random(1);
        let (first_id, vocab) = (40_u32, 24_u32);
        let table = random.bf16s(vocab as usize * hidden, 1.0);
        let tokens = Memory(vec![0, 39, 40, 63, 64, 50, u32::MAX]);
        let x = in_every_order(|launch| {
            let mut x = Memory::<f32>::fresh(tokens.0.len() * hidden);
            let rows = tokens.0.len() as u32;
            launch(
                &Embed {
                    tokens: tokens.ptr(),
                    table: table.ptr(),
                    x: x.ptr_mut(),
                    rows,
                    hidden: hidden as u32,
                    first_id,
                    vocab,
                }
                .launch(),
            );
            x.bits()
        });
        for (row, token) in tokens.0.iter().enumerate() {
            let id = token.wrapping_sub(first_id);
            for i in 0..hidden {
                let expected = if id < vocab { wide(table.0[id as usize * hidden + i]) as f32 } else { 0.0 };
                assert_eq!(f32::from_bits(x[row * hidden + i]), expected, "token {token}");
            }
        }
    }
}

#[test]
fn gather_takes_rows_by_index() {
    let x = Random(2).f32s(5 * 12, 1.0);
    let indices = Memory(vec![4, 0, 4, 2]);
    let out = in_every_order(|launch| {
        let mut out = Memory::<f32>::fresh(4 * 12);
        launch(&GatherRows { x: x.ptr(), indices: indices.ptr(), out: out.ptr_mut(), rows: 4, width: 12 }.launch());
        out.bits()
    });
    let expected: Vec<_> = [4, 0, 4, 2].iter().flat_map(|row| x.bits()[row * 12..][..12].to_vec()).collect();
    assert_eq!(out, expected);
}

#[test]
fn sampled_tokens_become_the_next_step() {
    let rows = 130;
    let sampled = Memory((0..rows).map(|row| row * 7).collect::<Vec<u32>>());
    let plain = sample_row();
    let (tokens, positions, sample_rows, ids) = in_every_order(|launch| {
        let mut tokens = Memory(vec![9_u32; rows as usize]);
        let mut positions = Memory((0..rows).map(|row| if row % 5 == 4 { NO_ROW } else { row }).collect::<Vec<u32>>());
        let mut sample_rows = Memory(vec![plain; rows as usize]);
        sample_rows.0[1] =
            SampleRow { num_masked: 2, num_until_unmasked: 1, first_seen: 3, num_seen: 2, num_prompt: 1, ..plain };
        sample_rows.0[2] = SampleRow { num_masked: 2, num_until_unmasked: 2, ..plain };
        let mut ids = Memory(vec![1_u32, 2, 3, 4, 5, 6]);
        let advance = Advance {
            sampled: sampled.ptr(),
            tokens: tokens.ptr_mut(),
            positions: positions.ptr_mut(),
            sample_rows: sample_rows.ptr_mut(),
            ids: ids.ptr_mut(),
            rows,
            reserved: 0,
        };
        launch(&advance.launch());
        let state: Vec<_> = sample_rows.0.iter().map(|r| (r.position, r.num_masked, r.num_seen)).collect();
        (tokens.0, positions.0, state, ids.0)
    });
    for row in 0..rows as usize {
        let is_padding = row % 5 == 4;
        assert_eq!(tokens[row], if is_padding { 9 } else { row as u32 * 7 });
        assert_eq!(positions[row], if is_padding { NO_ROW } else { row as u32 + 1 });
        assert_eq!(sample_rows[row].0, if is_padding { 3 } else { 4 });
    }
    assert_eq!((sample_rows[1], sample_rows[2]), ((4, 0, 3), (4, 2, 0)));
    assert_eq!(ids, [1, 2, 3, 4, 5, 7], "the token is appended to the row's ids");
}

/// A row that is sampled from the plain softmax.
pub(crate) fn sample_row() -> SampleRow {
    SampleRow {
        seed: 7,
        sample: 0,
        position: 3,
        greedy: 0,
        temperature: 1.0,
        top_k: 0,
        top_p: 1.0,
        repetition_penalty: 1.0,
        frequency_penalty: 0.0,
        presence_penalty: 0.0,
        first_masked: 0,
        num_masked: 0,
        first_biased: 0,
        num_biased: 0,
        first_seen: 0,
        num_seen: 0,
        num_prompt: 0,
        logits_row: 0,
        num_until_unmasked: 0,
    }
}

#[test]
fn a_wrong_launch_is_an_error_of_the_emulation() {
    let launch = GatherRows { x: Ptr::NULL, indices: Ptr::NULL, out: Ptr::NULL, rows: 0, width: 8 }.launch();
    let error = super::device::try_launch(&[launch], (0, 0)).unwrap_err();
    assert!(error.contains("grid"), "{error}");
}
