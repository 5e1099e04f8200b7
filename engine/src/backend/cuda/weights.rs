//! From mapped files to the device, through two pieces of pinned memory: one is filled while the other is copied.

use std::sync::Arc;

use cudarc::driver::CudaEvent;
use half::bf16;

use super::device::{Device, Memory, Pinned};
use crate::backend::BackendError;
use crate::checkpoint::{Dtype, Tensor};

const PIECE_BYTES: usize = 8 << 20;

pub(super) struct Uploader {
    device: Arc<Device>,
    /// Each with an event that follows its last copy.
    pieces: [(Pinned, CudaEvent); 2],
    current: usize,
    /// Bytes of the current piece that are filled.
    filled: usize,
}

impl Uploader {
    pub(super) fn new(device: &Arc<Device>) -> Result<Self, BackendError> {
        let piece = || Ok((device.allocate_pinned("copying weights", PIECE_BYTES)?, device.event()?));
        Ok(Self { pieces: [piece()?, piece()?], device: Arc::clone(device), current: 0, filled: 0 })
    }

    /// Copies a tensor's rows one after another, rounded to bf16.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn upload_bf16(&mut self, tensor: &Tensor, to: &Memory) -> Result<(), BackendError> {
        let mut offset = 0;
        for block in &tensor.blocks {
            for row in 0..block.rows {
                if block.dtype == Dtype::Bf16 {
                    self.push(block.row(row), to, &mut offset)?;
                } else {
                    let rounded: Vec<u16> = block.values(row).map(|x| bf16::from_f32(x).to_bits()).collect();
                    self.push(bytemuck::cast_slice(&rounded), to, &mut offset)?;
                }
            }
        }
        self.flush(to, &mut offset)
    }

    /// Copies `bytes` to the start of `to`.
    ///
    /// # Errors
    /// The device failed.
    pub(super) fn upload(&mut self, bytes: &[u8], to: &Memory) -> Result<(), BackendError> {
        let mut offset = 0;
        self.push(bytes, to, &mut offset)?;
        self.flush(to, &mut offset)
    }

    /// Appends to the current piece; `offset` is where its start belongs.
    fn push(&mut self, mut bytes: &[u8], to: &Memory, offset: &mut usize) -> Result<(), BackendError> {
        while !bytes.is_empty() {
            let part = bytes.len().min(PIECE_BYTES - self.filled);
            let (now, rest) = bytes.split_at(part);
            let (piece, _) = &mut self.pieces[self.current];
            piece.slice_mut(self.filled + part)[self.filled..].copy_from_slice(now);
            self.filled += part;
            bytes = rest;
            if self.filled == PIECE_BYTES {
                self.flush(to, offset)?;
            }
        }
        Ok(())
    }

    /// Sends the current piece off, and waits until the other one may be filled.
    fn flush(&mut self, to: &Memory, offset: &mut usize) -> Result<(), BackendError> {
        let (piece, sent) = &self.pieces[self.current];
        self.device.upload(piece, 0, self.filled, to, *offset);
        self.device.mark(sent);
        *offset += self.filled;
        self.filled = 0;
        self.current = 1 - self.current;
        self.device.wait_for(&self.pieces[self.current].1)
    }
}
