//! Speed of the CPU backend's matrix product and attention: `cargo bench -p nemotron-engine --bench cpu [threads]`.

use std::time::Instant;

use nemotron_engine::backend::cpu::{CpuBackend, Matrix};
use nemotron_engine::backend::{Backend, BackendError, ComputeType, HeadShape, Span, StepBatch};
use nemotron_engine::checkpoint::{Block, Dtype, Storage, Tensor};

/// Rows and columns of the weights, as in the middle of a small model.
const SHAPE: (usize, usize) = (2048, 8192);
/// Of all weights together: more than any cache holds.
const BYTES: usize = 1 << 29;

/// Weights with the exponents that trained ones have, so that twelve bits do for each; or with any.
#[derive(Clone, Copy, PartialEq)]
enum Exponents {
    Few,
    Any,
}

fn main() -> Result<(), BackendError> {
    let threads = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(2);
    for compute in [ComputeType::Bf16, ComputeType::F32] {
        let backend = CpuBackend::new(threads, compute)?;
        let name = format!("{compute:?}, {threads} threads");
        let few = weights(&backend, Dtype::Bf16, Exponents::Few)?;
        let any = weights(&backend, Dtype::Bf16, Exponents::Any)?;
        for tokens in [1, 2, 4, 8, 12, 16, 24, 32, 512] {
            linear(&backend, &format!("{name}, bf16 in 12 bits"), &few, tokens)?;
            linear(&backend, &format!("{name}, bf16"), &any, tokens)?;
        }
        drop((few, any));
        if compute == ComputeType::F32 {
            let weights = weights(&backend, Dtype::F32, Exponents::Any)?;
            for tokens in [1, 4, 16, 512] {
                linear(&backend, &format!("{name}, f32"), &weights, tokens)?;
            }
        }
        attention(&backend, &name)?;
    }
    Ok(())
}

fn weights(backend: &CpuBackend, dtype: Dtype, exponents: Exponents) -> Result<Vec<Matrix>, BackendError> {
    let (rows, cols) = SHAPE;
    let len = rows * cols * dtype.size();
    (0..BYTES / len)
        .map(|_| {
            // Bit patterns of small numbers in either type; the high byte has a sign and the exponent's upper bits.
            let exponent =
                |i: usize| if exponents == Exponents::Few { 0x3b + (i >> 7 & 3) } else { 0x20 + (i >> 7 & 31) };
            let bytes = (0..len).map(|i| if i % 2 == 1 { exponent((i * 2_654_435_761) >> 16) as u8 } else { i as u8 });
            let storage = Storage::new(bytes.collect::<Vec<u8>>());
            backend.matrix(&Tensor { blocks: vec![Block { storage, dtype, offset: 0, rows, cols, stride: cols }] })
        })
        .collect()
}

/// One product with each of the matrices.
fn linear(backend: &CpuBackend, name: &str, weights: &[Matrix], tokens: usize) -> Result<(), BackendError> {
    let (rows, cols) = SHAPE;
    let mut x = backend.buffer(tokens, cols)?;
    x.rows_mut(tokens).fill(0.5);
    let mut out = backend.buffer(tokens, rows)?;
    let seconds = best_of(|| weights.iter().for_each(|w| backend.linear(tokens, &x, w, &mut out)));
    let num_weights = (weights.len() * rows * cols) as f64;
    println!(
        "linear {rows} x {cols}, {name}, {tokens:3} rows: {:5.1} weights/ns {:6.1} GFLOP/s",
        num_weights / seconds / 1e9,
        2.0 * tokens as f64 * num_weights / seconds / 1e9
    );
    Ok(())
}

fn attention(backend: &CpuBackend, name: &str) -> Result<(), BackendError> {
    let shape = HeadShape { heads: 24, kv_heads: 8, head_dim: 128, rotary_dim: 64, rope_theta: 10_000.0 };
    let context = 2048;
    let mut kv = backend.kv_cache(context / 16, 16, &shape)?;
    for tokens in [1, 512] {
        let first_position = (context - tokens) as u32;
        let num_pages = (context / 16) as u32;
        let batch = StepBatch {
            num_generated: 0,
            tokens: vec![0; tokens],
            positions: (first_position..).take(tokens).collect(),
            spans: vec![Span { first_row: 0, num_tokens: tokens as u32, first_position, first_page: 0, num_pages }],
            page_table: (0..num_pages).collect(),
        };
        let mut qkv = backend.buffer(tokens, shape.qkv_width())?;
        let mut out = backend.buffer(tokens, shape.heads * shape.head_dim)?;
        backend.rope_append(&batch, &shape, &mut qkv, &mut kv);
        let seconds = best_of(|| backend.attention(&batch, &shape, &qkv, &kv, &mut out));
        let flops = 4.0 * (tokens * context * shape.heads * shape.head_dim) as f64;
        println!("attention at {context} positions, {name}, {tokens:3} rows: {:6.1} GFLOP/s", flops / seconds / 1e9);
    }
    Ok(())
}

/// Seconds of the fastest of several runs.
fn best_of(mut run: impl FnMut()) -> f64 {
    (0..7)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}
