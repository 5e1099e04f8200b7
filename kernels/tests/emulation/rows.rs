use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{CHOSEN, Embed, GatherRows, NOT_FINITE};

use super::device::{Memory, Random, in_every_order, wide};

#[test]
fn embed_takes_rows_of_its_own_part_of_the_vocabulary_and_of_what_was_chosen() {
    for hidden in [8, 264, 2304] {
        let mut random = Random(1);
        let (first_id, vocab) = (40_u32, 24_u32);
        let table = random.bf16s(vocab as usize * hidden, 1.0);
        let tokens = Memory(vec![0, 39, 40, 63, 64, 50, u32::MAX >> 1, CHOSEN | 3, CHOSEN, CHOSEN | 1]);
        let chosen = Memory(vec![39, NOT_FINITE, 9, 62]);
        let x = in_every_order(|launch| {
            let mut x = Memory::<f32>::fresh(tokens.0.len() * hidden);
            let rows = tokens.0.len() as u32;
            launch(
                &Embed {
                    tokens: tokens.ptr(),
                    chosen: chosen.ptr(),
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
            let token = if token & CHOSEN > 0 { chosen.0[(token ^ CHOSEN) as usize] } else { *token };
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
fn a_wrong_launch_is_an_error_of_the_emulation() {
    let launch = GatherRows { x: Ptr::NULL, indices: Ptr::NULL, out: Ptr::NULL, rows: 0, width: 8 }.launch();
    let error = super::device::try_launch(&[launch], (0, 0)).unwrap_err();
    assert!(error.contains("grid"), "{error}");
}
