use nemotron_kernels::Bf16;
use nemotron_kernels::ops::{Gemm, GemmReduce, Store};

use super::device::{Memory, Random, assert_near, in_every_order, wide};

struct Case {
    n: usize,
    cols: usize,
    x: Memory<Bf16>,
    w: Memory<Bf16>,
}

impl Case {
    fn new(rows: usize, n: usize, cols: usize) -> Self {
        let mut random = Random((rows * n * cols) as u64);
        Self { n, cols, x: random.bf16s(rows * cols, 1.0), w: random.bf16s(n * cols, 1.0) }
    }

    /// Stored elements as f32.
    fn run(&self, first_row: usize, rows: usize, parts: u32, store: Store) -> Vec<u32> {
        let (n, cols) = (self.n as u32, self.cols as u32);
        let count = rows * self.n;
        let x = Memory(self.x.0[first_row * self.cols..][..rows * self.cols].to_vec());
        in_every_order(|launch| {
            let mut partials = Memory::<f32>::fresh(if parts > 1 { parts as usize * count } else { 0 });
            let mut wide_out = Memory::<f32>::fresh(count);
            let mut narrow_out = Memory::<Bf16>::fresh(count);
            let out = if store == Store::F32 { wide_out.void() } else { narrow_out.void() };
            let gemm = Gemm {
                x: x.ptr(),
                w: self.w.ptr(),
                out: if parts > 1 { partials.void() } else { out },
                rows: rows as u32,
                n,
                cols,
                parts,
                store: store as u32,
                reserved: 0,
            };
            launch(&gemm.launch());
            if parts > 1 {
                let reduce =
                    GemmReduce { partials: partials.ptr(), out, count: count as u64, parts, store: store as u32 };
                launch(&reduce.launch());
            }
            match store {
                Store::F32 => wide_out.bits(),
                _ => narrow_out.0.iter().map(|x| u32::from(x.0) << 16).collect(),
            }
        })
    }

    fn expected(&self, store: Store) -> Vec<f64> {
        let mut expected = Vec::new();
        for x in self.x.0.chunks(self.cols) {
            for w in self.w.0.chunks(self.cols) {
                let sum: f64 = x.iter().zip(w).map(|(x, w)| wide(*x) * wide(*w)).sum();
                expected.push(if store == Store::Relu2Bf16 { sum.max(0.0).powi(2) } else { sum });
            }
        }
        expected
    }
}

fn floats(bits: &[u32]) -> impl Iterator<Item = f64> {
    bits.iter().map(|bits| f64::from(f32::from_bits(*bits)))
}

#[test]
fn products_are_those_of_f64() {
    // (rows, n, cols, parts): ragged tiles of rows, of W and of the columns.
    for (rows, n, cols, parts) in [
        (1, 128, 64, 1),
        (3, 20, 72, 1),
        (8, 132, 320, 2),
        (9, 260, 136, 1),
        (16, 64, 512, 4),
        (17, 128, 256, 8),
        (33, 40, 64, 8),
        (64, 136, 192, 2),
        (70, 12, 512, 16),
    ] {
        let case = Case::new(rows, n, cols);
        let out = case.run(0, rows, parts, Store::F32);
        assert_near(floats(&out), &case.expected(Store::F32), 1e-6);
    }
}

#[test]
fn relu2_is_fused_and_rounded_once() {
    for (rows, parts) in [(5, 1), (5, 4)] {
        let case = Case::new(rows, 132, 256);
        let out = case.run(0, rows, parts, Store::Relu2Bf16);
        assert_near(floats(&out), &case.expected(Store::Relu2Bf16), 3e-3);
        let out = case.run(0, rows, parts, Store::Bf16);
        assert_near(floats(&out), &case.expected(Store::Bf16), 3e-3);
    }
}

#[test]
fn a_row_has_the_same_bits_in_any_batch() {
    let (rows, n, cols) = (70, 136, 256);
    let case = Case::new(rows, n, cols);
    for parts in [1, 4] {
        let batch = case.run(0, rows, parts, Store::F32);
        for (first, count) in [(0, 1), (69, 1), (5, 7), (40, 16), (12, 30), (3, 64)] {
            assert!(
                case.run(first, count, parts, Store::F32) == batch[first * n..][..count * n],
                "{count} rows from {first}"
            );
        }
    }
}

#[test]
fn parts_on_several_ranks_give_the_bits_of_one() {
    let (rows, n, cols) = (4, 24, 512);
    let case = Case::new(rows, n, cols);
    let whole = case.run(0, rows, 8, Store::F32);
    let halves = [0, 1].map(|half| {
        let columns = |matrix: &Memory<Bf16>| {
            Memory(
                matrix.0.chunks(cols).flat_map(|row| row[half * cols / 2..][..cols / 2].to_vec()).collect::<Vec<_>>(),
            )
        };
        Case { n, cols: cols / 2, x: columns(&case.x), w: columns(&case.w) }.run(0, rows, 4, Store::F32)
    });
    let sums: Vec<u32> =
        halves[0].iter().zip(&halves[1]).map(|(a, b)| (f32::from_bits(*a) + f32::from_bits(*b)).to_bits()).collect();
    assert_eq!(whole, sums);
}

#[test]
fn the_tree_is_that_of_chunks() {
    for parts in [1_usize, 2, 4, 8, 32, 64] {
        let count = 12;
        let partials = Random(parts as u64).f32s(parts * count, 1.0);
        let out = in_every_order(|launch| {
            let mut out = Memory::<f32>::fresh(count);
            let reduce = GemmReduce {
                partials: partials.ptr(),
                out: out.void(),
                count: count as u64,
                parts: parts as u32,
                store: Store::F32 as u32,
            };
            launch(&reduce.launch());
            out.bits()
        });
        let mut sums: Vec<Vec<f32>> = partials.0.chunks(count).map(<[f32]>::to_vec).collect();
        while sums.len() > 1 {
            sums = sums.chunks(2).map(|pair| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect()).collect();
        }
        assert_eq!(out, sums[0].iter().map(|x| x.to_bits()).collect::<Vec<_>>(), "{parts} parts");
    }
}

#[test]
fn parts_depend_on_a_chunk_alone() {
    for (n, cols) in [(18432, 9216), (18432, 2304), (2688, 18432), (9216, 18432), (32000, 18432), (24, 512), (128, 64)]
    {
        let one = Gemm::parts(n, cols, 1);
        assert!(one.is_power_of_two() && (cols / one).is_multiple_of(8), "{n} x {cols}: {one}");
        for chunks in [2, 8] {
            assert_eq!(Gemm::parts(n, cols * chunks, chunks), chunks * one);
        }
    }
}
