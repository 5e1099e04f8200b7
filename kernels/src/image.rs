//! The kernels as modules for a device: machine code for the devices that clusters have, compiled ahead and embedded, and PTX for others.
//! The driver needs no compiler for the former. `compile-kernels` writes them; CI checks that they are what the sources give.

use crate::nvrtc::{Nvrtc, NvrtcError};

/// The main source, and the files that it includes.
pub const SOURCE: &str = include_str!("../cuda/kernels.cu");
pub const HEADERS: &[(&str, &str)] = &[
    ("args.h", include_str!("../cuda/args.h")),
    ("device.h", include_str!("../cuda/device.h")),
    ("rows.cu", include_str!("../cuda/rows.cu")),
    ("norm.cu", include_str!("../cuda/norm.cu")),
    ("rope.cu", include_str!("../cuda/rope.cu")),
    ("attention.cu", include_str!("../cuda/attention.cu")),
    ("gemm.cu", include_str!("../cuda/gemm.cu")),
    ("sample.cu", include_str!("../cuda/sample.cu")),
];

/// What is compiled ahead: NVRTC's name of the target, and the file under `images/`.
pub const TARGETS: &[(&str, &str)] =
    &[("sm_80", "sm_80.cubin"), ("sm_90a", "sm_90a.cubin"), ("compute_80", "compute_80.ptx")];

const SM_80: &[u8] = include_bytes!("../images/sm_80.cubin");
const SM_90A: &[u8] = include_bytes!("../images/sm_90a.cubin");
const COMPUTE_80: &[u8] = include_bytes!("../images/compute_80.ptx");

/// No kernel can run on this device.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error("the device has compute capability {major}.{minor}: the kernels need 8.0 or later")]
pub struct TooOld {
    pub major: u32,
    pub minor: u32,
}

/// The module for a device of that compute capability, as `cuModuleLoadData` takes it (PTX ends with a NUL). Machine code runs on
/// later devices of its own major version; `sm_90a` on 9.0 alone.
///
/// # Errors
/// The device is older than the kernels' instructions.
pub fn image(major: u32, minor: u32) -> Result<Vec<u8>, TooOld> {
    match (major, minor) {
        (8, _) => Ok(SM_80.to_vec()),
        (9, 0) => Ok(SM_90A.to_vec()),
        (9.., _) => Ok([COMPUTE_80, b"\0"].concat()),
        _ => Err(TooOld { major, minor }),
    }
}

/// Compiles the module on this host, for a device whose driver refuses [`image`].
///
/// # Errors
/// The compiler refused.
pub fn compile(nvrtc: &Nvrtc, major: u32, minor: u32) -> Result<Vec<u8>, NvrtcError> {
    Ok(nvrtc.compile(SOURCE, HEADERS, &format!("sm_{major}{minor}"))?.bytes)
}
