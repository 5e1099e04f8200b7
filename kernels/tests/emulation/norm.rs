use nemotron_kernels::ops::{AddNorm, AllReduceNorm, TIMED_OUT};
use nemotron_kernels::{Bf16, Ptr};

use super::device::{Memory, Random, assert_near, in_every_order, try_launch, wide};

fn norm(x: &[f32], scale: &[f32], shift: &[f32]) -> Vec<f64> {
    let len = x.len() as f64;
    let mean = x.iter().map(|x| f64::from(*x)).sum::<f64>() / len;
    let variance = x.iter().map(|x| (f64::from(*x) - mean).powi(2)).sum::<f64>() / len;
    x.iter()
        .zip(scale.iter().zip(shift))
        .map(|(x, (scale, shift))| {
            (f64::from(*x) - mean) / (variance + 1e-5).sqrt() * f64::from(*scale) + f64::from(*shift)
        })
        .collect()
}

struct Case {
    rows: usize,
    hidden: usize,
    x: Memory<f32>,
    y: Memory<f32>,
    scale: Memory<f32>,
    shift: Memory<f32>,
}

impl Case {
    fn new(rows: usize, hidden: usize, offset: f32) -> Self {
        let mut random = Random(hidden as u64);
        let mut x = random.f32s(rows * hidden, 2.0);
        x.0.iter_mut().for_each(|x| *x += offset);
        let y = random.f32s(rows * hidden, 1.0);
        let mut scale = random.f32s(hidden, 0.2);
        scale.0.iter_mut().for_each(|scale| *scale += 1.0);
        Self { rows, hidden, x, y, scale, shift: random.f32s(hidden, 0.1) }
    }

    /// The residual stream and the operand afterwards, as bits.
    fn run(&self, with_y: bool, indices: Option<&Memory<u32>>, rows: usize) -> (Vec<u32>, Vec<Bf16>) {
        in_every_order(|launch| {
            let mut x = Memory(self.x.0.clone());
            let mut out = Memory::<Bf16>::fresh(rows * self.hidden);
            let add_norm = AddNorm {
                x: x.ptr_mut(),
                y: if with_y { self.y.ptr() } else { Ptr::NULL },
                indices: indices.map_or(Ptr::NULL, Memory::ptr),
                scale: self.scale.ptr(),
                shift: self.shift.ptr(),
                out: out.ptr_mut(),
                rows: rows as u32,
                hidden: self.hidden as u32,
                eps: 1e-5,
                reserved: 0,
            };
            launch(&add_norm.launch());
            (x.bits(), out.0)
        })
    }
}

#[test]
fn add_norm_adds_in_f32_and_normalises() {
    for (rows, hidden, offset) in
        [(3, 8, 0.0), (1, 136, 100.0), (2, 1000, -3.0), (2, 4096, 0.0), (1, 18432, 30.0), (1, 32768, 0.0)]
    {
        let case = Case::new(rows, hidden, offset);
        let (x, out) = case.run(true, None, rows);
        let sums: Vec<f32> = case.x.0.iter().zip(&case.y.0).map(|(x, y)| x + y).collect();
        assert_eq!(x, sums.iter().map(|x| x.to_bits()).collect::<Vec<_>>());
        let expected: Vec<_> = sums.chunks(hidden).flat_map(|row| norm(row, &case.scale.0, &case.shift.0)).collect();
        assert_near(out.iter().map(|x| wide(*x)), &expected, 2.5e-3);
        // Rounded once: no element is further away than half a unit of bf16, and what f32 adds to that.
        for (out, expected) in out.iter().zip(&expected) {
            assert!(
                (wide(*out) - expected).abs() <= expected.abs() / 256.0 + 1e-4,
                "{} instead of {expected}",
                wide(*out)
            );
        }
        // Without the sum, of some rows.
        let indices = Memory(vec![rows as u32 - 1, 0]);
        let (x, out) = case.run(false, Some(&indices), 2);
        assert_eq!(x, case.x.bits(), "nothing is added");
        let row = |row: usize| norm(&case.x.0[row * hidden..][..hidden], &case.scale.0, &case.shift.0);
        assert_near(out.iter().map(|x| wide(*x)), &[row(rows - 1), row(0)].concat(), 2.5e-3);
    }
}

#[test]
fn a_rows_norm_does_not_depend_on_other_rows() {
    let case = Case::new(5, 264, 1.0);
    let (_, batch) = case.run(false, None, 5);
    for row in 0..5 {
        let (_, alone) = case.run(false, Some(&Memory(vec![row as u32])), 1);
        assert_eq!(alone, batch[row * 264..][..264]);
    }
    assert_eq!(case.rows, 5);
}

/// All ranks' launches of one all-reduce, over memory that they share.
struct Ranks {
    partials: Vec<Memory<f32>>,
    flags: Vec<Memory<u32>>,
    epochs: Vec<Memory<u32>>,
    status: Memory<u32>,
    x: Vec<Memory<f32>>,
    out: Vec<Memory<Bf16>>,
}

impl Ranks {
    fn new(ranks: usize, rows: usize, hidden: usize, seed: u64) -> Self {
        let mut random = Random(seed);
        let x = random.f32s(rows * hidden, 2.0);
        let each = |len| (0..ranks).map(|_| Memory(vec![0_u32; len])).collect::<Vec<_>>();
        let blocks = AllReduceNorm::MAX_BLOCKS as usize;
        Self {
            partials: (0..ranks).map(|_| random.f32s(rows * hidden, 1.0)).collect(),
            flags: each(blocks * 8),
            epochs: each(blocks),
            status: Memory(vec![0; ranks]),
            x: (0..ranks).map(|_| Memory(x.0.clone())).collect(),
            out: (0..ranks).map(|_| Memory::fresh(rows * hidden)).collect(),
        }
    }

    fn launches(
        &mut self,
        rows: usize,
        hidden: usize,
        scale: &Memory<f32>,
        shift: &Memory<f32>,
        add: bool,
    ) -> Vec<nemotron_kernels::ops::Launch> {
        let ranks = self.x.len();
        let mut partials = [Ptr::NULL; 8];
        let mut flags = [Ptr::NULL; 8];
        for rank in 0..ranks {
            partials[rank] = self.partials[rank].ptr();
            flags[rank] = self.flags[rank].ptr_mut();
        }
        (0..ranks)
            .map(|rank| {
                AllReduceNorm {
                    partials,
                    flags,
                    own_flags: flags[rank],
                    epochs: self.epochs[rank].ptr_mut(),
                    status: Ptr::new(self.status.ptr_mut().address + rank as u64 * 4),
                    x: self.x[rank].ptr_mut(),
                    scale: scale.ptr(),
                    shift: shift.ptr(),
                    out: self.out[rank].ptr_mut(),
                    timeout_ns: 60_000_000_000,
                    rows: rows as u32,
                    hidden: hidden as u32,
                    rank: rank as u32,
                    ranks: ranks as u32,
                    add: u32::from(add),
                    eps: 1e-5,
                }
                .launch()
            })
            .collect()
    }
}

#[test]
fn all_ranks_get_the_sum_of_the_tree() {
    for (ranks, rows, hidden) in [(2, 1, 8), (4, 3, 264), (8, 2, 1000), (2, 70, 16)] {
        let (scale, shift) = (Random(3).f32s(hidden, 1.0), Random(4).f32s(hidden, 1.0));
        for order in [(0, 0), (1, 0), (2, 5)] {
            let mut all = Ranks::new(ranks, rows, hidden, 9);
            // Three times with the same flags, as in a captured graph.
            for round in 0..3 {
                let add = round != 1;
                let before = all.x[0].0.clone();
                let launches = all.launches(rows, hidden, &scale, &shift, add);
                try_launch(&launches, order).unwrap();
                let mut sums: Vec<Vec<f32>> = all.partials.iter().map(|partial| partial.0.clone()).collect();
                while sums.len() > 1 {
                    sums =
                        sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
                }
                let expected: Vec<f32> =
                    sums[0].iter().zip(&before).map(|(sum, x)| if add { x + sum } else { *sum }).collect();
                let normed: Vec<_> = expected.chunks(hidden).flat_map(|row| norm(row, &scale.0, &shift.0)).collect();
                for rank in 0..ranks {
                    assert_eq!(all.x[rank].0, expected, "{ranks} ranks, {rows} rows, rank {rank}");
                    assert_near(all.out[rank].0.iter().map(|x| wide(*x)), &normed, 2.5e-3);
                    assert_eq!(all.out[rank].0, all.out[0].0);
                }
                assert!(all.status.0.iter().all(|status| *status == 0));
            }
        }
    }
}

#[test]
fn a_peer_that_does_not_come_is_noticed() {
    let (rows, hidden) = (1, 8);
    let (scale, shift) = (Random(3).f32s(hidden, 1.0), Random(4).f32s(hidden, 1.0));
    let mut all = Ranks::new(2, rows, hidden, 9);
    all.launches(rows, hidden, &scale, &shift, true);
    let mut partials = [Ptr::NULL; 8];
    let mut flags = [Ptr::NULL; 8];
    for rank in 0..2 {
        partials[rank] = all.partials[rank].ptr();
        flags[rank] = all.flags[rank].ptr_mut();
    }
    let alone = AllReduceNorm {
        partials,
        flags,
        own_flags: flags[0],
        epochs: all.epochs[0].ptr_mut(),
        status: all.status.ptr_mut(),
        x: all.x[0].ptr_mut(),
        scale: scale.ptr(),
        shift: shift.ptr(),
        out: all.out[0].ptr_mut(),
        timeout_ns: 1_000_000,
        rows: rows as u32,
        hidden: hidden as u32,
        rank: 0,
        ranks: 2,
        add: 1,
        eps: 1e-5,
    };
    try_launch(&[alone.launch()], (0, 0)).unwrap();
    assert_eq!(all.status.0[0], TIMED_OUT);
}
