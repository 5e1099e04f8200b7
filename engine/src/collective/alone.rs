//! NCCL with one rank: the calls that ranks make of it, on the stream and recorded in a graph. All that one device can prove of it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::CollectiveError;
use super::nccl::{Group, Nccl};
use crate::backend::BackendError;
use crate::backend::cuda::Device;

/// A row of the large model.
const FLOATS: usize = 18432;
const RUNS: usize = 100;
const LIMIT: Duration = Duration::from_secs(30);

/// What was found; data came through unchanged.
#[derive(Clone, Debug, serde::Serialize)]
pub struct NcclAlone {
    pub version: String,
    /// Of a gather, then a send and a receive, from a graph, in microseconds.
    pub recorded_us: f64,
}

/// # Errors
/// NCCL is not installed, refused a call, or changed the data.
pub(crate) fn try_alone(device: &Arc<Device>, folders: &[PathBuf]) -> Result<NcclAlone, CollectiveError> {
    const DOING: &str = "trying it with one rank";
    let unusable = |error: BackendError| CollectiveError::Nccl {
        ranks: "one rank".into(),
        doing: DOING,
        reason: error.to_string(),
    };
    let nccl = Nccl::load(folders).map_err(unusable)?;
    let all = Group::start(&nccl, nccl.unique_id()?, 1, 0, LIMIT)?;
    let group = all.split(0, 0, "one rank".into())?;
    let bytes = FLOATS * size_of::<f32>();
    let memory = || device.allocate(DOING, bytes).map_err(unusable);
    let (from, middle, to) = (memory()?, memory()?, memory()?);
    let mut host = device.allocate_pinned(DOING, bytes).map_err(unusable)?;
    host.slice_mut::<f32>(FLOATS).iter_mut().enumerate().for_each(|(i, x)| *x = i as f32);
    device.upload(&host, 0, bytes, &from, 0);
    group.wait(device, DOING)?;

    let calls = || {
        group.all_gather(device, from.pointer(), middle.pointer(), FLOATS)?;
        group.exchange(DOING, device, [(middle.pointer(), FLOATS, 0)], [(to.pointer(), FLOATS, 0)])
    };
    let mut check = || {
        device.download(&to, 0, bytes, &mut host, 0);
        group.wait(device, DOING)?;
        match host.slice::<f32>(FLOATS).iter().enumerate().all(|(i, x)| *x == i as f32) {
            true => Ok(()),
            false => Err(unusable(BackendError::Failed { device: "CUDA", reason: "data came back changed".into() })),
        }
    };
    device.fill(&to, 0xff);
    calls()?;
    check()?;
    device.fill(&to, 0xff);
    device.start_recording().map_err(unusable)?;
    let recorded = calls();
    let graph = device.end_recording().map_err(unusable)?;
    recorded?;
    let start = Instant::now();
    for _ in 0..RUNS {
        device.note("launching a graph", graph.launch());
    }
    group.wait(device, DOING)?;
    let recorded_us = start.elapsed().as_secs_f64() * 1e6 / RUNS as f64;
    check()?;
    let version = nccl.version();
    let version = format!("{}.{}.{}", version / 10_000, version / 100 % 100, version % 100);
    Ok(NcclAlone { version, recorded_us })
}
