use nemotron_kernels::ops::{AddNorm, AllReduceNorm, Launch};
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

/// All ranks of one all-reduce, over memory that they share.
struct Ranks {
    hidden: usize,
    areas: Vec<Memory<u32>>,
    counts: Vec<Memory<u32>>,
    stop: Memory<u32>,
    y: Vec<Memory<f32>>,
    x: Vec<Memory<f32>>,
    scale: Memory<f32>,
    shift: Memory<f32>,
    out: Vec<Memory<Bf16>>,
}

impl Ranks {
    fn new(ranks: usize, rows: usize, hidden: usize) -> Self {
        let mut random = Random(9);
        let x = random.f32s(rows * hidden, 2.0);
        let (area, counts) = AllReduceNorm::bytes(hidden);
        let zeros = |bytes: usize| (0..ranks).map(|_| Memory(vec![0; bytes / 4])).collect();
        Self {
            hidden,
            areas: zeros(area),
            counts: zeros(counts),
            stop: Memory(vec![0]),
            y: (0..ranks).map(|_| random.f32s(rows * hidden, 1.0)).collect(),
            x: (0..ranks).map(|_| Memory(x.0.clone())).collect(),
            scale: random.f32s(hidden, 1.0),
            shift: random.f32s(hidden, 1.0),
            out: (0..ranks).map(|_| Memory::fresh(rows * hidden)).collect(),
        }
    }

    fn launch(&mut self, rank: usize, rows: usize) -> Launch {
        let mut areas = [Ptr::NULL; 8];
        areas.iter_mut().zip(&mut self.areas).for_each(|(pointer, area)| *pointer = area.ptr_mut());
        let reduce = AllReduceNorm {
            areas,
            own_flags: areas[rank],
            counts: self.counts[rank].ptr_mut(),
            stop: self.stop.ptr_mut(),
            y: self.y[rank].ptr(),
            x: self.x[rank].ptr_mut(),
            scale: self.scale.ptr(),
            shift: self.shift.ptr(),
            out: self.out[rank].ptr_mut(),
            hidden: self.hidden as u32,
            rank: rank as u32,
            ranks: self.x.len() as u32,
            eps: 1e-5,
        };
        reduce.launch(rows as u32)
    }
}

#[test]
fn all_ranks_get_the_sum_of_the_tree() {
    for (ranks, rows, hidden) in [(2, 1, 8), (4, 3, 264), (8, 2, 1000), (2, 8, 2048)] {
        for order in [(0, 0), (1, 0), (2, 5)] {
            let mut all = Ranks::new(ranks, rows, hidden);
            // Several times with the same flags, as in a captured graph, and with fewer rows in between.
            for rows in [rows, rows.div_ceil(2), rows] {
                let before = all.x[0].0.clone();
                all.y.iter_mut().flat_map(|y| &mut y.0).for_each(|y| *y *= 1.25);
                let launches: Vec<_> = (0..ranks).map(|rank| all.launch(rank, rows)).collect();
                try_launch(&launches, order).unwrap();
                let mut sums: Vec<Vec<f32>> = all.y.iter().map(|y| y.0[..rows * hidden].to_vec()).collect();
                while sums.len() > 1 {
                    sums =
                        sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
                }
                let expected: Vec<f32> = sums[0].iter().zip(&before).map(|(sum, x)| x + sum).collect();
                // The norm is that of the kernel that norms without other ranks, to the bit.
                let case = Case {
                    rows,
                    hidden,
                    x: Memory(expected.clone()),
                    y: Memory(Vec::new()),
                    scale: Memory(all.scale.0.clone()),
                    shift: Memory(all.shift.0.clone()),
                };
                let (_, normed) = case.run(false, None, rows);
                for rank in 0..ranks {
                    assert_eq!(all.x[rank].0[..rows * hidden], expected, "{ranks} ranks, {rows} rows, rank {rank}");
                    assert_eq!(all.out[rank].0[..rows * hidden], normed);
                }
            }
        }
    }
}

#[test]
fn waiting_for_a_rank_that_does_not_come_can_be_ended() {
    let mut all = Ranks::new(2, 1, 8);
    all.stop.0[0] = 1;
    let alone = all.launch(0, 1);
    try_launch(&[alone], (0, 0)).unwrap();
}
