//! Every operation against a plain loop in f64, and the promise that bits depend on nothing but a row.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::{bf16, f16};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::simd::Isa;
use super::*;
use crate::backend::Span;
use crate::checkpoint::{Block, Dtype, Storage};

const COMPUTE_TYPES: [ComputeType; 2] = [ComputeType::Bf16, ComputeType::F32];

fn backend(compute: ComputeType, isa: Isa) -> CpuBackend {
    CpuBackend::with_isa(2, compute, isa).unwrap()
}

fn best(compute: ComputeType) -> CpuBackend {
    CpuBackend::new(2, compute).unwrap()
}

fn random(rng: &mut StdRng, len: usize) -> Vec<f32> {
    (0..len).map(|_| rng.random_range(-1.0..1.0)).collect()
}

fn bytes(dtype: Dtype, values: &[f32]) -> Vec<u8> {
    let encode = |value: &f32| match dtype {
        Dtype::Bf16 => bf16::from_f32(*value).to_le_bytes().to_vec(),
        Dtype::F16 => f16::from_f32(*value).to_le_bytes().to_vec(),
        Dtype::F32 => value.to_le_bytes().to_vec(),
    };
    values.iter().flat_map(encode).collect()
}

/// A tensor of one block that begins `gap` bytes into its storage.
fn tensor(dtype: Dtype, rows: usize, cols: usize, gap: usize, values: &[f32]) -> Tensor {
    let storage = Storage::new([vec![0; gap], bytes(dtype, values)].concat());
    Tensor { blocks: vec![Block { storage, dtype, offset: gap, rows, cols, stride: cols }] }
}

/// What the product uses of a stored weight.
fn used(dtype: Dtype, compute: ComputeType, value: f32) -> f32 {
    let stored = match dtype {
        Dtype::Bf16 => bf16::from_f32(value).to_f32(),
        Dtype::F16 => f16::from_f32(value).to_f32(),
        Dtype::F32 => value,
    };
    operand(compute, stored)
}

fn operand(compute: ComputeType, value: f32) -> f32 {
    if compute == ComputeType::Bf16 { bf16::from_f32(value).to_f32() } else { value }
}

fn filled(backend: &CpuBackend, width: usize, values: &[f32]) -> Buffer {
    let rows = values.len() / width;
    let mut buffer = backend.buffer(rows, width).unwrap();
    buffer.rows_mut(rows).copy_from_slice(values);
    buffer
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

/// The operation `op` of the backend on `x`, into rows of `width`.
fn apply(
    backend: &CpuBackend,
    x: &[f32],
    x_width: usize,
    width: usize,
    op: impl Fn(&CpuBackend, usize, &Buffer, &mut Buffer),
) -> Vec<f32> {
    let rows = x.len() / x_width;
    let x = filled(backend, x_width, x);
    let mut out = filled(backend, width, &vec![f32::NAN; rows * width]);
    op(backend, rows, &x, &mut out);
    out.rows(rows).to_vec()
}

fn assert_close(actual: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(actual.len(), expected.len());
    for (i, (actual, expected)) in actual.iter().zip(expected).enumerate() {
        assert!((f64::from(*actual) - expected).abs() <= tolerance, "element {i}: {actual} for {expected}");
    }
}

fn naive_linear(x: &[f32], w: &[f32], cols: usize) -> Vec<f64> {
    let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum();
    x.chunks(cols).flat_map(|x| w.chunks(cols).map(move |w| dot(x, w))).collect()
}

#[test]
fn linear_is_the_product_on_every_instruction_set_with_the_same_bits() {
    let rng = &mut StdRng::seed_from_u64(1);
    for (rows, columns, cols) in
        [(1, 7, 5), (2, 13, 33), (3, 1, 64), (4, 54, 100), (7, 50, 31), (9, 97, 1700), (70, 10, 48)]
    {
        for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32] {
            for compute in COMPUTE_TYPES {
                // An odd gap misaligns the elements.
                let gap = rng.random_range(0..4);
                let (x, values) = (random(rng, rows * cols), random(rng, columns * cols));
                let w = tensor(dtype, columns, cols, gap, &values);
                let mut results = Isa::available().into_iter().map(|isa| {
                    let backend = backend(compute, isa);
                    let w = backend.matrix(&w).unwrap();
                    apply(&backend, &x, cols, columns, |b, rows, x, out| b.linear(rows, x, &w, out))
                });
                let first = results.next().unwrap();
                assert!(
                    results.all(|other| bits(&other) == bits(&first)),
                    "{rows} {columns} {cols} {dtype:?} {compute:?}"
                );
                let x: Vec<f32> = x.iter().map(|&x| operand(compute, x)).collect();
                let values: Vec<f32> = values.iter().map(|&w| used(dtype, compute, w)).collect();
                assert_close(&first, &naive_linear(&x, &values, cols), 1e-6 * cols as f64);
            }
        }
    }
}

#[test]
fn a_row_of_linear_does_not_depend_on_the_others_nor_on_blocks() {
    let rng = &mut StdRng::seed_from_u64(2);
    let (columns, cols) = (131, 75);
    for compute in COMPUTE_TYPES {
        for isa in Isa::available() {
            let backend = backend(compute, isa);
            let (x, values) = (random(rng, 9 * cols), random(rng, columns * cols));
            let whole = tensor(Dtype::Bf16, columns, cols, 0, &values);
            let parts = [0..1, 1..50, 50..60, 60..131].map(|rows| whole.slice_rows(rows));
            let w = backend.matrix(&whole).unwrap();
            let stacked = backend.matrix(&Tensor::stack(parts)).unwrap();
            let linear =
                |w: &Matrix, x: &[f32]| apply(&backend, x, cols, columns, |b, rows, x, out| b.linear(rows, x, w, out));
            let all = linear(&w, &x);
            assert_eq!(bits(&linear(&stacked, &x)), bits(&all));
            for rows in 1..9 {
                assert_eq!(bits(&linear(&w, &x[..rows * cols])), bits(&all[..rows * columns]));
                assert_eq!(bits(&linear(&w, &x[rows * cols..])), bits(&all[rows * columns..]));
            }
        }
    }
}

#[test]
fn relu2_squares_what_is_positive() {
    let rng = &mut StdRng::seed_from_u64(3);
    let backend = best(ComputeType::F32);
    let (x, values) = (random(rng, 3 * 40), random(rng, 20 * 40));
    let w = backend.matrix(&tensor(Dtype::F32, 20, 40, 0, &values)).unwrap();
    let linear = apply(&backend, &x, 40, 20, |b, rows, x, out| b.linear(rows, x, &w, out));
    let relu2 = apply(&backend, &x, 40, 20, |b, rows, x, out| b.linear_relu2(rows, x, &w, out));
    assert!(linear.iter().any(|y| *y < 0.0));
    assert_eq!(relu2, linear.iter().map(|y| y.max(0.0).powi(2)).collect::<Vec<f32>>());
}

#[test]
fn chunks_are_added_as_ranks_that_hold_column_slices_add_them() {
    let rng = &mut StdRng::seed_from_u64(4);
    // Chunks of 42 columns: none ends on a whole vector.
    let (rows, columns, cols) = (5, 20, 8 * 42);
    for compute in COMPUTE_TYPES {
        for isa in Isa::available() {
            let backend = backend(compute, isa);
            let (x, values) = (random(rng, rows * cols), random(rng, columns * cols));
            let w = tensor(Dtype::Bf16, columns, cols, 0, &values);
            let part = |first: usize, width: usize, chunks: usize| {
                let x: Vec<f32> = x.chunks(cols).flat_map(|row| row[first..first + width].to_vec()).collect();
                let w = backend.matrix(&w.slice_cols(first..first + width)).unwrap();
                apply(&backend, &x, width, columns, |b, rows, x, out| b.linear_chunked(rows, x, &w, chunks, out))
            };
            let whole = part(0, cols, 8);
            for ranks in [2, 4, 8] {
                let width = cols / ranks;
                let mut sums: Vec<Vec<f32>> = (0..ranks).map(|rank| part(rank * width, width, 8 / ranks)).collect();
                while sums.len() > 1 {
                    let add = |pair: &[Vec<f32>]| pair[0].iter().zip(&pair[1]).map(|(a, b)| a + b).collect();
                    sums = sums.chunks(2).map(add).collect();
                }
                assert_eq!(bits(&sums[0]), bits(&whole), "{ranks} ranks");
            }
        }
    }
}

#[test]
fn rows_are_normalised_added_and_gathered() {
    let rng = &mut StdRng::seed_from_u64(5);
    let backend = best(ComputeType::Bf16);
    let width = 37;
    // A mean far from zero is where variance from sums of squares would fail.
    let x: Vec<f32> = random(rng, 3 * width).iter().map(|x| x * 0.01 + 100.0).collect();
    let (gamma, beta) = (random(rng, width), random(rng, width));
    let norm = backend.norm(&tensor(Dtype::F32, 1, width, 0, &gamma), &tensor(Dtype::F32, 1, width, 3, &beta)).unwrap();
    let normal = apply(&backend, &x, width, width, |b, rows, x, out| b.layer_norm(rows, x, &norm, 1e-5, out));
    let expected: Vec<f64> = x
        .chunks(width)
        .flat_map(|row| {
            let row: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
            let mean = row.iter().sum::<f64>() / width as f64;
            let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / width as f64;
            let scale = |i: usize| (1.0 + f64::from(gamma[i])) / (variance + 1e-5).sqrt();
            (0..width).map(|i| (row[i] - mean) * scale(i) + f64::from(beta[i])).collect::<Vec<_>>()
        })
        .collect();
    assert_close(&normal, &expected, 1e-5);

    let y = filled(&backend, width, &normal);
    let mut sum = filled(&backend, width, &x);
    backend.add(2, &mut sum, &y);
    let sum = sum.rows(3);
    assert!((0..2 * width).all(|i| sum[i] == x[i] + normal[i]));
    assert_eq!(sum[2 * width..], x[2 * width..]);

    let mut gathered = backend.buffer(4, width).unwrap();
    backend.gather_rows(&y, &[2, 0, 2], &mut gathered);
    let row = |i: usize| &normal[i * width..][..width];
    assert_eq!(gathered.rows(3), [row(2), row(0), row(2)].concat());
}

#[test]
fn embed_gives_zeros_for_ids_of_other_ranks() {
    let rng = &mut StdRng::seed_from_u64(6);
    for (dtype, compute) in
        [(Dtype::Bf16, ComputeType::Bf16), (Dtype::F16, ComputeType::F32), (Dtype::F32, ComputeType::F32)]
    {
        let backend = best(compute);
        let values = random(rng, 100 * 10);
        let table = backend.matrix(&tensor(dtype, 100, 10, 0, &values)).unwrap();
        let tokens = [1000, 1099, 999, 1100, 0, u32::MAX, 1060];
        let mut out = filled(&backend, 10, &[f32::NAN; 70]);
        backend.embed(&table, 1000, &tokens, &mut out);
        for (token, row) in tokens.iter().zip(out.rows(7).chunks(10)) {
            let expected: Vec<f32> = match token.checked_sub(1000) {
                Some(i) if i < 100 => {
                    values[i as usize * 10..][..10].iter().map(|&x| used(dtype, compute, x)).collect()
                }
                _ => vec![0.0; 10],
            };
            assert_eq!(row, expected);
        }
    }
}

/// One sequence with its q, k and v before rotation, [tokens, qkv_width].
struct Sequence {
    shape: HeadShape,
    qkv: Vec<f32>,
}

impl Sequence {
    fn new(rng: &mut StdRng, shape: HeadShape, tokens: usize) -> Self {
        let qkv = random(rng, tokens * shape.qkv_width()).iter().map(|x| x * 2.0).collect();
        Self { shape, qkv }
    }

    fn tokens(&self) -> usize {
        self.qkv.len() / self.shape.qkv_width()
    }

    /// The attention's output for all tokens, in steps of the given numbers of tokens.
    fn run(&self, backend: &CpuBackend, page_tokens: usize, reversed_pages: bool, steps: &[usize]) -> Vec<f32> {
        let (shape, width) = (&self.shape, self.shape.qkv_width());
        let pages = self.tokens().div_ceil(page_tokens) as u32;
        let mut kv = backend.kv_cache(pages as usize, page_tokens, shape).unwrap();
        let mut result = Vec::new();
        let mut first = 0;
        for &tokens in steps {
            let span = Span {
                first_row: 0,
                num_tokens: tokens as u32,
                first_position: first as u32,
                first_page: 1,
                num_pages: pages,
            };
            let page = |i| if reversed_pages { pages - 1 - i } else { i };
            let batch = StepBatch {
                num_generated: 0,
                tokens: vec![0; tokens],
                positions: (first as u32..).take(tokens).collect(),
                spans: vec![span],
                page_table: std::iter::once(u32::MAX).chain((0..pages).map(page)).collect(),
            };
            let mut qkv = filled(backend, width, &self.qkv[first * width..(first + tokens) * width]);
            let mut out = backend.buffer(tokens, shape.heads * shape.head_dim).unwrap();
            backend.rope_append(&batch, shape, &mut qkv, &mut kv);
            backend.attention(&batch, shape, &qkv, &kv, &mut out);
            result.extend_from_slice(out.rows(tokens));
            first += tokens;
        }
        assert_eq!(first, self.tokens());
        result
    }

    /// A rotated head: `index` counts the heads of q, then those of k, then those of v, which are not rotated.
    fn head(&self, token: usize, index: usize) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim, rotary_dim, rope_theta } = self.shape;
        let start = token * self.shape.qkv_width() + index * head_dim;
        let mut head: Vec<f64> = self.qkv[start..start + head_dim].iter().map(|x| f64::from(*x)).collect();
        let half = rotary_dim / 2;
        for i in 0..if index < heads + kv_heads { half } else { 0 } {
            let angle = token as f64 * rope_theta.powf(-2.0 * i as f64 / rotary_dim as f64);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * angle.cos() - b * angle.sin();
            head[i + half] = b * angle.cos() + a * angle.sin();
        }
        head
    }

    fn naive(&self) -> Vec<f64> {
        let HeadShape { heads, kv_heads, head_dim, .. } = self.shape;
        let mut result = Vec::new();
        for token in 0..self.tokens() {
            for head in 0..heads {
                let (q, kv_head) = (self.head(token, head), head / (heads / kv_heads));
                let score = |j| -> f64 {
                    let k = self.head(j, heads + kv_head);
                    q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (head_dim as f64).sqrt()
                };
                let weights: Vec<f64> = (0..=token).map(|j| score(j).exp()).collect();
                let total: f64 = weights.iter().sum();
                let mut sum = vec![0.0; head_dim];
                for (j, weight) in weights.iter().enumerate() {
                    for (sum, v) in sum.iter_mut().zip(self.head(j, heads + kv_heads + kv_head)) {
                        *sum += weight / total * v;
                    }
                }
                result.extend(sum);
            }
        }
        result
    }
}

fn shape(heads: usize, kv_heads: usize, head_dim: usize, rotary_dim: usize) -> HeadShape {
    HeadShape { heads, kv_heads, head_dim, rotary_dim, rope_theta: 10_000.0 }
}

#[test]
fn attention_is_the_formula() {
    let rng = &mut StdRng::seed_from_u64(7);
    for shape in [shape(4, 4, 32, 16), shape(6, 2, 16, 8), shape(5, 1, 10, 10), shape(2, 1, 96, 0)] {
        let sequence = Sequence::new(rng, shape, 75);
        for (compute, tolerance) in [(ComputeType::F32, 1e-5), (ComputeType::Bf16, 0.05)] {
            assert_close(&sequence.run(&best(compute), 16, false, &[75]), &sequence.naive(), tolerance);
        }
    }
}

#[test]
fn attention_has_the_same_bits_for_any_chunks_pages_and_instruction_set() {
    let rng = &mut StdRng::seed_from_u64(8);
    for shape in [shape(3, 3, 64, 32), shape(12, 1, 16, 8), shape(8, 2, 48, 24)] {
        let sequence = Sequence::new(rng, shape, 200);
        for compute in COMPUTE_TYPES {
            let expected = bits(&sequence.run(&best(compute), 16, false, &[200]));
            for isa in Isa::available() {
                let backend = backend(compute, isa);
                for (page_tokens, reversed) in [(16, true), (7, false), (256, true)] {
                    for steps in [&[1; 200][..], &[200], &[1, 2, 63, 64, 3, 67], &[190, 1, 9]] {
                        let actual = bits(&sequence.run(&backend, page_tokens, reversed, steps));
                        assert!(actual == expected, "{shape:?} {compute:?} {isa:?} pages of {page_tokens}, {steps:?}");
                    }
                }
            }
        }
    }
}

#[test]
fn sequences_of_a_step_do_not_see_each_other() {
    let rng = &mut StdRng::seed_from_u64(9);
    let shape = shape(4, 2, 32, 16);
    let (a, b) = (Sequence::new(rng, shape, 5), Sequence::new(rng, shape, 70));
    let backend = best(ComputeType::F32);
    let span = |first_row, num_tokens, first_page, num_pages| Span {
        first_row,
        num_tokens,
        first_position: 0,
        first_page,
        num_pages,
    };
    let batch = StepBatch {
        num_generated: 0,
        tokens: vec![0; 75],
        positions: (0..5).chain(0..70).collect(),
        spans: vec![span(0, 5, 0, 1), span(5, 70, 1, 5)],
        page_table: vec![3, 5, 0, 1, 2, 4],
    };
    let mut kv = backend.kv_cache(6, 16, &shape).unwrap();
    let mut qkv = filled(&backend, shape.qkv_width(), &[&a.qkv[..], &b.qkv].concat());
    let mut out = backend.buffer(75, 128).unwrap();
    backend.rope_append(&batch, &shape, &mut qkv, &mut kv);
    backend.attention(&batch, &shape, &qkv, &kv, &mut out);
    let alone = [a.run(&backend, 16, false, &[5]), b.run(&backend, 16, false, &[70])].concat();
    assert_eq!(bits(out.rows(75)), bits(&alone));
}
