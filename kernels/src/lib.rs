//! Device kernels: compiled images, typed launches, and NVRTC for devices without an image. Nothing here needs a driver or a toolkit to
//! build or to start; who launches the kernels brings both.

mod args;
pub mod image;
mod launch;
pub mod nvrtc;
pub mod ops;

pub use args::{Bf16, Ptr, c_header};
