//! The emulated device: builds its library from the sources under test, and launches.

use std::ffi::{CStr, CString, c_char, c_int};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use libloading::Library;
use nemotron_kernels::ops::{KERNELS, Launch};
use nemotron_kernels::{Bf16, Ptr};

/// Tests use the library at this path, if it is set, in place of building one.
pub(crate) const LIBRARY: &str = "NEMOTRON_EMULATION";

type LaunchFn = unsafe extern "C" fn(*const Emulated, u64, c_int, u64) -> *const c_char;

#[repr(C)]
struct Emulated {
    kernel: *const c_char,
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u64,
    args: *const std::ffi::c_void,
    args_bytes: u64,
}

fn library() -> &'static Library {
    static LIBRARY_CELL: OnceLock<Library> = OnceLock::new();
    LIBRARY_CELL.get_or_init(|| {
        let given = std::env::var_os(LIBRARY).map(PathBuf::from);
        let path = given.clone().unwrap_or_else(|| build("emulation", &sources(), &[]));
        // SAFETY: the library is ours; its initialisers only fill a table.
        let library = unsafe { Library::new(&path) }.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        if given.is_none() {
            std::fs::remove_file(path).unwrap();
        }
        library
    })
}

/// The kernels' own sources.
pub(crate) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("cuda")
}

/// Builds the kernels of a folder for the CPU, with more compiler flags.
pub(crate) fn build(name: &str, sources: &Path, flags: &[&str]) -> PathBuf {
    let out = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{}.so", std::process::id()));
    let build = Path::new(env!("CARGO_MANIFEST_DIR")).join("emulation/build");
    let status = Command::new(build).arg(&out).arg(sources).args(flags).status().unwrap();
    assert!(status.success(), "the emulation of {} does not compile", sources.display());
    out
}

/// In which order the threads of a block run.
const ORDERS: [(c_int, u64); 4] = [(0, 0), (1, 0), (2, 1), (2, 2)];

/// Runs launches of equal grids side by side, as on several devices.
///
/// # Errors
/// What the emulation found wrong.
pub(crate) fn try_launch(launches: &[Launch], (kind, seed): (c_int, u64)) -> Result<(), String> {
    let names: Vec<_> = launches.iter().map(|launch| CString::new(launch.kernel).unwrap()).collect();
    let emulated: Vec<_> = launches
        .iter()
        .zip(&names)
        .map(|(launch, name)| {
            let most = KERNELS.iter().find(|kernel| kernel.0 == launch.kernel).unwrap().1;
            assert!(
                launch.shared_bytes <= most,
                "{} asks for more shared memory than ops::KERNELS says",
                launch.kernel
            );
            Emulated {
                kernel: name.as_ptr(),
                grid: launch.grid,
                threads: launch.threads,
                shared_bytes: u64::from(launch.shared_bytes),
                args: launch.args(),
                args_bytes: launch.args_bytes() as u64,
            }
        })
        .collect();
    // SAFETY: the types are those of emulate.cpp; the launches are alive; the kernels' accesses are what the tests are about.
    unsafe {
        let launch: libloading::Symbol<LaunchFn> = library().get(b"emulation_launch").unwrap();
        let message = launch(emulated.as_ptr(), emulated.len() as u64, kind, seed);
        if message.is_null() { Ok(()) } else { Err(CStr::from_ptr(message).to_str().unwrap().to_owned()) }
    }
}

/// Runs `once` with several orders of threads and gives its result, which must be the same to the bit. `once` launches through the
/// function that it is given and must make its outputs anew.
pub(crate) fn in_every_order<T: PartialEq>(once: impl Fn(&dyn Fn(&Launch)) -> T) -> T {
    // The sanitizers make everything slow, and look for what does not depend on the order.
    let orders = if std::env::var_os("LD_PRELOAD").is_some() { &ORDERS[3..] } else { &ORDERS };
    let mut results = orders
        .iter()
        .map(|order| once(&|launch| try_launch(&[*launch], *order).unwrap_or_else(|error| panic!("{error}"))));
    let first = results.next().unwrap();
    assert!(results.all(|result| result == first), "the order of threads changes the result");
    first
}

/// Memory of the device.
pub(crate) struct Memory<T>(pub(crate) Vec<T>);

impl<T: Copy> Memory<T> {
    /// Memory that nobody has written: every bit set, a NaN as f32 and as bf16.
    pub(crate) fn fresh(len: usize) -> Self {
        let mut data = Vec::with_capacity(len);
        // SAFETY: the types that tests use (integers, floats, Bf16) may have any bits.
        unsafe {
            std::ptr::write_bytes(data.as_mut_ptr(), 0xff, len);
            data.set_len(len);
        }
        Self(data)
    }

    pub(crate) fn ptr(&self) -> Ptr<T> {
        Ptr::new(self.0.as_ptr() as u64)
    }

    pub(crate) fn ptr_mut(&mut self) -> Ptr<T> {
        Ptr::new(self.0.as_mut_ptr() as u64)
    }

    pub(crate) fn void(&mut self) -> Ptr<std::ffi::c_void> {
        Ptr::new(self.0.as_mut_ptr() as u64)
    }
}

impl Memory<f32> {
    pub(crate) fn bits(&self) -> Vec<u32> {
        self.0.iter().map(|x| x.to_bits()).collect()
    }
}

pub(crate) fn wide(x: Bf16) -> f64 {
    f64::from(f32::from_bits(u32::from(x.0) << 16))
}

pub(crate) fn bf16(x: f32) -> Bf16 {
    let bits = x.to_bits();
    Bf16(((bits + 0x7fff + (bits >> 16 & 1)) >> 16) as u16)
}

/// Random numbers from a seed.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn bits(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, limit: usize) -> usize {
        (self.bits() % limit as u64) as usize
    }

    /// About normal, with that deviation.
    pub(crate) fn normal(&mut self, sigma: f32) -> f32 {
        let sum: f64 = (0..12).map(|_| (self.bits() >> 11) as f64 / (1_u64 << 53) as f64).sum();
        (sum - 6.0) as f32 * sigma
    }

    pub(crate) fn f32s(&mut self, len: usize, sigma: f32) -> Memory<f32> {
        Memory((0..len).map(|_| self.normal(sigma)).collect())
    }

    pub(crate) fn bf16s(&mut self, len: usize, sigma: f32) -> Memory<Bf16> {
        Memory((0..len).map(|_| bf16(self.normal(sigma))).collect())
    }
}

/// ‖out − expected‖ / ‖expected‖ must not be above `limit`; NaN fails.
#[track_caller]
pub(crate) fn assert_near(out: impl IntoIterator<Item = f64>, expected: &[f64], limit: f64) {
    let (mut difference, mut norm, mut count) = (0.0, 0.0, 0);
    for (out, expected) in out.into_iter().zip(expected) {
        difference += (out - expected).powi(2);
        norm += expected.powi(2);
        count += 1;
    }
    assert_eq!(count, expected.len());
    let error = (difference / norm).sqrt();
    assert!(error <= limit, "relative error {error:e}, at most {limit:e} is allowed");
}
