//! Device kernels and their run-time loading. A machine without a driver is an ordinary answer here, never a crash:
//! libraries are looked up when a device is asked for, so one binary runs everywhere.

mod args;
pub mod image;
mod launch;
pub mod nvrtc;
pub mod ops;

pub use args::{Bf16, Ptr, c_header};

/// Why no CUDA device can be used on this host.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    #[error("no CUDA driver is installed (libcuda.so.1 was not found)")]
    NoDriver(#[source] libloading::Error),
    #[error("this version has no CUDA kernels")]
    NoKernels,
}

/// Looks for a usable CUDA device.
///
/// # Errors
/// There is none, and why.
pub fn probe() -> Result<std::convert::Infallible, Unavailable> {
    // SAFETY: the driver's library is NVIDIA's own; loading it runs its initialisers, which have no preconditions.
    let driver = unsafe { libloading::Library::new("libcuda.so.1") };
    match driver {
        Ok(_) => Err(Unavailable::NoKernels),
        Err(error) => Err(Unavailable::NoDriver(error)),
    }
}
