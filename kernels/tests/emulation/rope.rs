use nemotron_kernels::Bf16;
use nemotron_kernels::ops::{NO_ROW, RopeAppend};

use super::device::{Memory, Random, assert_near, in_every_order, wide};

#[test]
fn heads_are_rotated_and_stored_at_their_positions() {
    // (heads, kv_heads, head_dim, rotary_dim, page_tokens)
    for (heads, kv_heads, dim, rotary, page_tokens) in [
        (12, 1, 192, 96, 64),
        (6, 2, 64, 32, 16),
        (3, 3, 128, 64, 5),
        (4, 2, 16, 8, 1),
        (2, 1, 24, 24, 7),
        (4, 1, 40, 0, 3),
    ] {
        let mut random = Random(dim as u64);
        let positions = Memory(vec![0_u32, 1, 6, NO_ROW, 63, 64, 130]);
        let rows = positions.0.len();
        let pages_each = 131_usize.div_ceil(page_tokens);
        let num_pages = rows * pages_each;
        // Every row is of another sequence; its pages are anywhere.
        let table = Memory((0..num_pages).map(|i| ((i * 37 + 11) % num_pages) as u32).collect::<Vec<_>>());
        assert!(!num_pages.is_multiple_of(37));
        let first_pages = Memory((0..rows).map(|row| (row * pages_each) as u32).collect::<Vec<_>>());
        let width = (heads + 2 * kv_heads) * dim;
        let qkv = random.f32s(rows * width, 1.0);
        let angle = |position: usize, i: usize| position as f64 * 10000_f64.powf(-2.0 * i as f64 / rotary as f64);
        let mut rope = Memory::<f32>(Vec::new());
        for position in 0..131 {
            rope.0.extend((0..rotary / 2).map(|i| angle(position, i).cos() as f32));
            rope.0.extend((0..rotary / 2).map(|i| angle(position, i).sin() as f32));
        }
        let (q, kv) = in_every_order(|launch| {
            let mut q = Memory::<Bf16>::fresh(rows * heads * dim);
            let mut kv = Memory::<Bf16>::fresh(num_pages * kv_heads * 2 * page_tokens * dim);
            let append = RopeAppend {
                qkv: qkv.ptr(),
                rope: rope.ptr(),
                positions: positions.ptr(),
                first_pages: first_pages.ptr(),
                page_table: table.ptr(),
                q: q.ptr_mut(),
                kv: kv.ptr_mut(),
                rows: rows as u32,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: dim as u32,
                rotary_dim: rotary as u32,
                page_tokens: page_tokens as u32,
            };
            launch(&append.launch());
            (q.0, kv.0)
        });

        let mut touched = vec![false; kv.len()];
        for (row, position) in positions.0.iter().enumerate() {
            if *position == NO_ROW {
                assert!(q[row * heads * dim..][..heads * dim].iter().all(|x| x.0 == 0xffff));
                continue;
            }
            let position = *position as usize;
            for head in 0..heads + 2 * kv_heads {
                let from = &qkv.0[row * width + head * dim..][..dim];
                let mut expected: Vec<f64> = from.iter().map(|x| f64::from(*x)).collect();
                if head < heads + kv_heads {
                    for i in 0..rotary / 2 {
                        let (sin, cos) = angle(position, i).sin_cos();
                        let (a, b) = (f64::from(from[i]), f64::from(from[i + rotary / 2]));
                        expected[i] = a * cos - b * sin;
                        expected[i + rotary / 2] = b * cos + a * sin;
                    }
                }
                let stored = if head < heads {
                    &q[(row * heads + head) * dim..][..dim]
                } else {
                    let (kv_head, is_value) = ((head - heads) % kv_heads, (head - heads) / kv_heads);
                    let page = table.0[row * pages_each + position / page_tokens] as usize;
                    let at =
                        (((page * kv_heads + kv_head) * 2 + is_value) * page_tokens + position % page_tokens) * dim;
                    touched[at..at + dim].fill(true);
                    &kv[at..at + dim]
                };
                assert_near(stored.iter().map(|x| wide(*x)), &expected, 3e-3);
            }
        }
        assert!(kv.iter().zip(touched).all(|(x, touched)| touched || x.0 == 0xffff), "something else was stored");
    }
}
