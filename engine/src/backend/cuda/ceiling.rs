//! What the device can do at most: the figures that a step's speed is held against.

use std::time::Instant;

use super::CudaBackend;
use super::blas::{Blas, Shape};
use crate::backend::BackendError;

/// More than any cache holds.
const COPY_BYTES: usize = 1 << 30;
/// The best of this many runs is taken.
const RUNS: usize = 10;

impl CudaBackend {
    /// Bytes/s of a copy inside the device's memory, reads and writes both counted.
    ///
    /// # Errors
    /// The device failed, or is full.
    pub fn copy_bandwidth(&self) -> Result<f64, BackendError> {
        let device = self.device();
        let bytes = COPY_BYTES.min(device.memory()?.0 / 64);
        let (from, to) = (device.allocate("a copy", bytes)?, device.allocate("a copy", bytes)?);
        let seconds = self.best(|_| {
            device.copy(&from, &to, bytes);
            Ok(())
        })?;
        Ok(2.0 * bytes as f64 / seconds)
    }

    /// Operations/s of a product of two bf16 matrices of `size` rows and columns, a multiple of 128.
    ///
    /// # Errors
    /// The device failed, or is full.
    pub fn product_flops(&self, size: usize) -> Result<f64, BackendError> {
        let device = self.device();
        let operand = || device.allocate("a product", size * size * 2);
        let (x, w, out) = (operand()?, operand()?, device.allocate("a product", size * size * 4)?);
        for memory in [&x, &w] {
            // Small numbers: of NaNs and zeros a device makes less heat, and more speed, than of others.
            device.fill(memory, 0x3c);
        }
        let shape = Shape { rows: size, cols: size, capacity: size };
        let seconds = self.best(|blas| blas.multiply(shape, size, x.pointer(), w.pointer(), out.pointer()))?;
        Ok(2.0 * (size as f64).powi(3) / seconds)
    }

    fn best(&self, work: impl Fn(&mut Blas) -> Result<(), BackendError>) -> Result<f64, BackendError> {
        let mut best = f64::INFINITY;
        for _ in 0..RUNS {
            let start = Instant::now();
            work(&mut self.blas.borrow_mut())?;
            self.device().wait()?;
            best = best.min(start.elapsed().as_secs_f64());
        }
        Ok(best)
    }
}
