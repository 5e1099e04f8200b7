//! Communication between ranks: sums and gathers inside a tensor-parallel group, hand-over between pipeline stages.
//!
//! A sum is a binary tree over ranks, ((r0 + r1) + (r2 + r3)) + …, done by recursive doubling: in round k a rank exchanges its whole
//! buffer with rank ^ 2^k and adds. Additions of two floats commute, so all ranks get the same bits, and the order equals
//! that of [`Backend::linear_chunked`] on one rank.

pub mod alone;
pub mod host;
pub mod nccl;
pub mod shm;
pub mod tcp;

use std::io;
use std::time::{Duration, Instant};

use crate::backend::{Backend, NormTo};

/// Why ranks could not compute together.
#[derive(Debug, thiserror::Error)]
pub enum CollectiveError {
    /// A connection to another rank broke.
    #[error("lost the connection to rank {peer} ({doing})")]
    Lost {
        peer: usize,
        doing: &'static str,
        #[source]
        source: io::Error,
    },
    /// Devices could not exchange data.
    #[error("NCCL failed among {ranks} ({doing}): {reason}")]
    Nccl { ranks: String, doing: &'static str, reason: String },
    #[error(
        "NCCL did not start among {ranks} in {seconds:.0} s ({doing}): a rank has not joined, or cannot be reached"
    )]
    NcclTimeout { ranks: String, doing: &'static str, seconds: f64 },
}

/// The ranks that this rank computes with, over the buffers of its backend.
pub trait Collective<B: Backend>: Send {
    /// Sum over the tensor-parallel group, in place, the same bits on every rank.
    fn all_reduce(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError>;
    /// x += that sum of y, and what follows of it; y is overwritten. The same bits as one after the other.
    fn all_reduce_add(
        &mut self,
        backend: &B,
        rows: usize,
        x: &mut B::Buffer,
        y: &mut B::Buffer,
        norm: Option<NormTo<'_, B>>,
    ) -> Result<(), CollectiveError> {
        self.all_reduce(rows, y)?;
        backend.add_norm(rows, x, y, norm);
        Ok(())
    }
    /// Tensor-parallel rank 0 gets the columns of all ranks side by side: out[r] = x₀[r] ‖ x₁[r] ‖ …; `out` is untouched on the others.
    fn gather_columns(&mut self, rows: usize, x: &B::Buffer, out: &mut B::Buffer) -> Result<(), CollectiveError>;
    /// To the same tensor-parallel rank of the next pipeline stage.
    fn send_next(&mut self, rows: usize, x: &B::Buffer) -> Result<(), CollectiveError>;
    /// From the same tensor-parallel rank of the previous pipeline stage.
    fn recv_previous(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError>;
    /// Tells the tensor-parallel group's devices what that of rank 0 has chosen last, for the step that follows. Nothing to do where the host does.
    fn share_choices(&mut self, _backend: &B) -> Result<(), CollectiveError> {
        Ok(())
    }
    /// Whether the ranks are still there, as far as this one knows. Asked while the device is waited for: a device waits for ever
    /// for one that is gone.
    fn check(&self) -> Result<(), CollectiveError>;
    /// How long this rank has waited for others in all of its calls, where that is measured.
    fn waited(&self) -> Duration {
        Duration::ZERO
    }
}

/// Measures how long calls take. With ranks on CPUs that is the time for which a rank waits for slower ones. Not for devices: they wait by
/// themselves, and sums that go on with a norm would come apart.
pub struct Metered<C> {
    ranks: C,
    waited: Duration,
}

impl<C> Metered<C> {
    pub fn new(ranks: C) -> Self {
        Self { ranks, waited: Duration::ZERO }
    }

    fn measure<T>(&mut self, call: impl FnOnce(&mut C) -> T) -> T {
        let start = Instant::now();
        let outcome = call(&mut self.ranks);
        self.waited += start.elapsed();
        outcome
    }
}

impl<B: Backend, C: Collective<B>> Collective<B> for Metered<C> {
    fn all_reduce(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.measure(|ranks| ranks.all_reduce(rows, x))
    }

    fn gather_columns(&mut self, rows: usize, x: &B::Buffer, out: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.measure(|ranks| ranks.gather_columns(rows, x, out))
    }

    fn send_next(&mut self, rows: usize, x: &B::Buffer) -> Result<(), CollectiveError> {
        self.measure(|ranks| ranks.send_next(rows, x))
    }

    fn recv_previous(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.measure(|ranks| ranks.recv_previous(rows, x))
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.ranks.check()
    }

    fn waited(&self) -> Duration {
        self.waited
    }
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

/// A rank alone: there is nothing to exchange.
impl<B: Backend, C: Collective<B>> Collective<B> for Option<C> {
    fn all_reduce(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.as_mut().map_or(Ok(()), |ranks| ranks.all_reduce(rows, x))
    }

    fn all_reduce_add(
        &mut self,
        backend: &B,
        rows: usize,
        x: &mut B::Buffer,
        y: &mut B::Buffer,
        norm: Option<NormTo<'_, B>>,
    ) -> Result<(), CollectiveError> {
        match self {
            Some(ranks) => ranks.all_reduce_add(backend, rows, x, y, norm),
            None => {
                backend.add_norm(rows, x, y, norm);
                Ok(())
            }
        }
    }

    fn gather_columns(&mut self, rows: usize, x: &B::Buffer, out: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.as_mut().map_or(Ok(()), |ranks| ranks.gather_columns(rows, x, out))
    }

    fn send_next(&mut self, rows: usize, x: &B::Buffer) -> Result<(), CollectiveError> {
        self.as_mut().map_or(Ok(()), |ranks| ranks.send_next(rows, x))
    }

    fn recv_previous(&mut self, rows: usize, x: &mut B::Buffer) -> Result<(), CollectiveError> {
        self.as_mut().map_or(Ok(()), |ranks| ranks.recv_previous(rows, x))
    }

    fn share_choices(&mut self, backend: &B) -> Result<(), CollectiveError> {
        self.as_mut().map_or(Ok(()), |ranks| ranks.share_choices(backend))
    }

    fn check(&self) -> Result<(), CollectiveError> {
        self.as_ref().map_or(Ok(()), Collective::check)
    }
}
