//! Speed of the CPU backend's matrix product and attention: `cargo bench -p nemotron-engine --bench cpu [threads]`.

use std::time::Instant;

use nemotron_engine::backend::cpu::CpuBackend;
use nemotron_engine::backend::{Backend, BackendError, ComputeType, HeadShape, Span, StepBatch};
use nemotron_engine::checkpoint::{Block, Dtype, Storage, Tensor};

/// Rows and columns of the weights, as in the middle of a small model.
const SHAPE: (usize, usize) = (2048, 8192);

fn main() -> Result<(), BackendError> {
    let threads = std::env::args().find_map(|arg| arg.parse().ok()).unwrap_or(2);
    for compute in [ComputeType::Bf16, ComputeType::F32] {
        let backend = CpuBackend::new(threads, compute)?;
        for dtype in [Dtype::Bf16, Dtype::F32] {
            if (compute, dtype) != (ComputeType::Bf16, Dtype::F32) {
                linear(&backend, &format!("{compute:?}, weights {dtype:?}, {threads} threads"), dtype)?;
            }
        }
        attention(&backend, &format!("{compute:?}, {threads} threads"))?;
    }
    Ok(())
}

fn linear(backend: &CpuBackend, name: &str, dtype: Dtype) -> Result<(), BackendError> {
    let (rows, cols) = SHAPE;
    let bytes = rows * cols * dtype.size();
    // A bit pattern that is a small number in either type.
    let storage = Storage::new([0x12, 0x3d].repeat(bytes / 2));
    let w = backend.matrix(&Tensor { blocks: vec![Block { storage, dtype, offset: 0, rows, cols, stride: cols }] })?;
    for tokens in [1, 4, 16, 512] {
        let mut x = backend.buffer(tokens, cols)?;
        x.rows_mut(tokens).fill(0.5);
        let mut out = backend.buffer(tokens, rows)?;
        let seconds = best_of(|| backend.linear(tokens, &x, &w, &mut out));
        let flops = 2.0 * (tokens * rows * cols) as f64;
        println!(
            "linear {rows} x {cols}, {name}, {tokens:3} rows: {:6.1} GB/s {:6.1} GFLOP/s",
            bytes as f64 / seconds / 1e9,
            flops / seconds / 1e9
        );
    }
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
