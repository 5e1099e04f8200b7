//! What this machine can do at most: the figures that the engine's speed is held against.

use std::hint::black_box;
use std::time::Instant;

use super::CpuBackend;
use super::matrix::Aligned;
use super::simd::{Kernel, Simd};
use crate::backend::{BackendError, ComputeType};

/// More than any cache holds.
const READ_BYTES: usize = 1 << 30;
/// Vector operations of one task of the arithmetic measurement.
const ROUNDS: usize = 1 << 20;
/// Sums that are added to in turn, enough to hide the latency of an operation.
const SUMS: usize = 16;
/// The best of this many runs is taken.
const RUNS: usize = 5;

impl CpuBackend {
    /// Bytes per second that all threads together read from memory.
    ///
    /// # Errors
    /// Memory is short.
    pub fn read_bandwidth(&self) -> Result<f64, BackendError> {
        let mut data = Aligned::<f32>::zeroed(READ_BYTES / size_of::<f32>(), "the measurement of memory")?;
        // Pages that were never written are all one page of zeros.
        data.as_mut_slice().fill(1.0);
        let (isa, data) = (self.isa, data.as_slice());
        let tasks = 64 * self.threads();
        let part = data.len() / tasks;
        Ok(self.best_rate(READ_BYTES as f64, tasks, &|task| isa.run(Read { data: &data[task * part..][..part] })))
    }

    /// Floating-point operations per second of all threads together, in the type of this backend's products.
    pub fn peak_flops(&self) -> f64 {
        let per_round = match self.compute {
            ComputeType::Bf16 => 2 * 32,
            ComputeType::F32 => 2 * 16,
        };
        let tasks = 8 * self.threads();
        let operations = (tasks * ROUNDS * SUMS * per_round) as f64;
        let (isa, compute) = (self.isa, self.compute);
        self.best_rate(operations, tasks, &|_| isa.run(Arithmetic { compute }))
    }

    /// `amount` per second of the fastest run of all tasks.
    fn best_rate(&self, amount: f64, tasks: usize, task: &(dyn Fn(usize) + Sync)) -> f64 {
        let seconds = (0..RUNS).map(|_| {
            let start = Instant::now();
            self.pool.run(tasks, usize::MAX, task);
            start.elapsed().as_secs_f64()
        });
        amount / seconds.fold(f64::INFINITY, f64::min)
    }
}

struct Read<'a> {
    data: &'a [f32],
}

impl Kernel for Read<'_> {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        // SAFETY: the CPU has S, and every chunk is 8 vectors long.
        unsafe {
            let mut sums = [S::splat(0.0); 8];
            let one = S::splat(1.0);
            for chunk in self.data.chunks_exact(8 * 16) {
                for (index, sum) in sums.iter_mut().enumerate() {
                    *sum = S::mul_add(S::load(chunk.as_ptr().add(16 * index)), one, *sum);
                }
            }
            black_box(sums);
        }
    }
}

struct Arithmetic {
    compute: ComputeType,
}

impl Kernel for Arithmetic {
    #[inline(always)]
    unsafe fn run<S: Simd>(self) {
        let (floats, pairs) = (black_box([0.5_f32; 16]), black_box([0x3f00_u16; 32]));
        // SAFETY: the CPU has S, and the arrays are vectors long.
        unsafe {
            let (x, pair) = (S::load(floats.as_ptr()), S::load_pairs(pairs.as_ptr()));
            let mut sums = [S::splat(0.0); SUMS];
            for _ in 0..ROUNDS {
                for sum in &mut sums {
                    *sum = match self.compute {
                        ComputeType::Bf16 => S::dot_pairs(pair, pair, *sum),
                        ComputeType::F32 => S::mul_add(x, x, *sum),
                    };
                }
            }
            black_box(sums);
        }
    }
}
