//! Communication between ranks: sums and gathers inside a tensor-parallel group, hand-over between pipeline stages.
//!
//! A sum is a binary tree over ranks, ((r0 + r1) + (r2 + r3)) + …, done by recursive doubling: in round k a rank exchanges its whole
//! buffer with rank ^ 2^k and adds. Additions of two floats commute, so all ranks get the same bits, and the order equals
//! that of [`Backend::linear_chunked`] on one rank.

pub mod host;
pub mod shm;
pub mod tcp;

use std::io;

use crate::backend::Backend;

/// A connection to another rank broke or timed out.
#[derive(Debug, thiserror::Error)]
#[error("lost the connection to rank {peer} ({doing})")]
pub struct CollectiveError {
    pub peer: usize,
    pub doing: &'static str,
    #[source]
    pub source: io::Error,
}

/// The ranks that this rank computes with, over the buffers of its backend.
pub trait Collective<B: Backend>: Send {
    /// Sum over the tensor-parallel group, in place, the same bits on every rank.
    fn all_reduce(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError>;
    /// Tensor-parallel rank 0 gets the columns of all ranks side by side: out[r] = x₀[r] ‖ x₁[r] ‖ …; `out` is untouched on the others.
    fn gather_columns(&mut self, rows: usize, x: &B::Buffer, out: &mut B::Buffer) -> Result<(), CollectiveError>;
    /// To the same tensor-parallel rank of the next pipeline stage.
    fn send_next(&mut self, rows: usize, x: &B::Buffer) -> Result<(), CollectiveError>;
    /// From the same tensor-parallel rank of the previous pipeline stage.
    fn recv_previous(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError>;
}

/// An ordered byte stream to one other rank. A peer that is gone is an error; one that is slow is waited for.
pub trait Link: Send {
    /// Sends all of `send` and fills all of `recv`. The peer may do the same at the same time, with any amount of bytes.
    ///
    /// # Errors
    /// The peer is gone.
    fn exchange(&mut self, send: &[u8], recv: &mut [u8]) -> io::Result<()>;

    /// What it goes through, for a log.
    fn medium(&self) -> &'static str;

    /// # Errors
    /// The peer is gone.
    fn send(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.exchange(bytes, &mut [])
    }

    /// # Errors
    /// The peer is gone.
    fn recv(&mut self, bytes: &mut [u8]) -> io::Result<()> {
        self.exchange(&[], bytes)
    }
}
