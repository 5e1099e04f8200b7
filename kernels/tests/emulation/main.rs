//! Every kernel under emulation on the CPU (`emulation/emulate.h`), against plain references in f64.

#![expect(clippy::unwrap_used, reason = "tests")]

mod attention;
mod device;
mod gemm;
mod mutants;
mod norm;
#[path = "../../../engine/src/request.rs"]
#[expect(dead_code, unreachable_pub, reason = "the engine's own file, for its sampler")]
mod request;
mod rope;
mod rows;
mod sample;
#[path = "../../../engine/src/sampler.rs"]
#[expect(dead_code, unreachable_pub, reason = "the engine's own file: the device's sampler is held to it")]
mod sampler;
mod sanitizers;
