//! Steps that only decode, as graphs: a step of some 400 kernels is put on the stream by one call.
//!
//! A graph is recorded for a shape: a number of rows and of attention splits, each rounded up. What differs from step to step is read from
//! the device's memory. A shape is recorded when it comes for the second time: the first time, libraries still allocate and connect.

use std::collections::HashMap;
use std::sync::Arc;

use cudarc::driver::CudaGraph;

use super::device::Device;
use crate::backend::BackendError;

/// Rows and splits.
pub(super) type Shape = (usize, u32);

#[derive(Default)]
pub(super) struct Graphs {
    /// `None`: the shape was seen once.
    recorded: HashMap<Shape, Option<Recorded>>,
    recording: Option<Shape>,
}

struct Recorded(CudaGraph);

// SAFETY: a graph may be used from any thread, one at a time.
unsafe impl Send for Recorded {}

impl Graphs {
    /// Puts the graph of the shape on the stream, if there is one; otherwise what follows may be recorded.
    pub(super) fn replay(&mut self, device: &Device, shape: Shape) -> Result<bool, BackendError> {
        match self.recorded.get(&shape) {
            None => {
                self.recorded.insert(shape, None);
                Ok(false)
            }
            Some(Some(graph)) => {
                device.note("launching a graph", graph.0.launch());
                Ok(true)
            }
            Some(None) => {
                device.start_recording()?;
                self.recording = Some(shape);
                Ok(false)
            }
        }
    }

    /// Ends a recording, if there is one, and runs it.
    pub(super) fn end(&mut self, device: &Arc<Device>) -> Result<(), BackendError> {
        let Some(shape) = self.recording.take() else { return Ok(()) };
        let graph = device.end_recording()?;
        device.note("launching a graph", graph.launch());
        self.recorded.insert(shape, Some(Recorded(graph)));
        Ok(())
    }
}

/// The number of rows that a step of `rows` is run with: few different ones, and at most a third more.
pub(super) fn bucket(rows: usize) -> usize {
    match rows {
        0..=8 => rows.next_power_of_two(),
        9..=32 => rows.next_multiple_of(8),
        33..=128 => rows.next_multiple_of(16),
        _ => rows.next_multiple_of(32),
    }
}

#[cfg(test)]
mod tests {
    use super::bucket;

    #[test]
    fn buckets_are_few_and_near() {
        let all: std::collections::BTreeSet<usize> = (1..=256).map(bucket).collect();
        assert!(all.len() <= 17, "{all:?}");
        assert!((1..=256).all(|rows| bucket(rows) >= rows && bucket(bucket(rows)) == bucket(rows)));
    }
}
