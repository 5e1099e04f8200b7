//! NVIDIA's libraries, looked up when a device is asked for. A machine without them is an ordinary answer.
//!
//! cudarc brings the driver's functions, but it panics where the library or a function is missing, and it looks for cuBLASLt and NCCL
//! under names that NVIDIA's run-time packages do not have (`libnccl.so.2`). So the driver is checked here before cudarc is called, and the
//! dozen functions of the other two are looked up here.

use std::path::{Path, PathBuf};

use libloading::Library;
use nemotron_kernels::nvrtc::Nvrtc;

use crate::backend::BackendError;
use crate::error_chain::error_chain;

/// The oldest driver API whose functions are used: R525.
const MIN_DRIVER: i32 = 12_000;

/// What must be in the driver's library; cudarc looks each up at its first call.
const DRIVER_SYMBOLS: &[&str] = &[
    "cuInit",
    "cuDriverGetVersion",
    "cuDeviceGetCount",
    "cuDevicePrimaryCtxRetain",
    "cuMemAlloc_v2",
    "cuMemGetInfo_v2",
    "cuMemHostAlloc",
    "cuMemcpyHtoDAsync_v2",
    "cuModuleLoadData",
    "cuLaunchKernel",
    "cuStreamBeginCapture_v2",
    "cuGraphInstantiateWithFlags",
    "cuIpcOpenMemHandle_v2",
];

/// Loads the driver and returns the version of its API, as 1000 · major + 10 · minor.
///
/// # Errors
/// There is no driver, or it is too old.
pub(super) fn driver() -> Result<i32, BackendError> {
    const NAME: &str = "libcuda.so.1";
    // SAFETY: loading the driver's library runs its initialisers, which have no preconditions.
    let library = unsafe { Library::new(NAME) }.map_err(|error| {
        unavailable(format!("there is no NVIDIA driver on this host ({NAME}: {})", error_chain(&error)))
    })?;
    for symbol in DRIVER_SYMBOLS {
        if !has(&library, symbol) {
            return Err(unavailable(format!("the NVIDIA driver is too old: {NAME} has no {symbol}")));
        }
    }
    // SAFETY: the function has had this signature since CUDA 2.2; it may be called before anything else.
    let version = unsafe {
        let mut version = 0;
        let function = library.get::<unsafe extern "C" fn(*mut i32) -> i32>(b"cuDriverGetVersion\0");
        function.map(|function| function(&raw mut version)).map(|_| version)
    };
    let version = version.map_err(|error| unavailable(error_chain(&error)))?;
    // The library stays loaded: cudarc has its own handle of it.
    std::mem::forget(library);
    if version < MIN_DRIVER {
        let (major, minor) = (version / 1000, version % 1000 / 10);
        return Err(unavailable(format!("the NVIDIA driver offers CUDA {major}.{minor}, 12.0 (R525) is needed")));
    }
    Ok(version)
}

/// Opens the first of `names` that has all `symbols`: in `folders`, then wherever the loader looks.
///
/// # Errors
/// There is none; the text says what was tried.
pub(crate) fn open(names: &[&str], symbols: &[&str], folders: &[PathBuf]) -> Result<Library, BackendError> {
    first(names, folders, |path| try_open(path, symbols)).map_err(unavailable)
}

/// Opens the first of NVRTC's versions that there is.
///
/// # Errors
/// There is none; the text says what was tried.
pub(super) fn nvrtc(folders: &[PathBuf]) -> Result<Nvrtc, String> {
    first(&["libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"], folders, |path| {
        Nvrtc::load(path).map_err(|error| error_chain(&error))
    })
}

fn first<T>(names: &[&str], folders: &[PathBuf], open: impl Fn(&Path) -> Result<T, String>) -> Result<T, String> {
    let in_folders = folders.iter().flat_map(|folder| names.iter().map(move |name| folder.join(name)));
    let candidates = in_folders.filter(|path| path.exists()).chain(names.iter().map(PathBuf::from));
    let mut tried = Vec::new();
    for path in candidates {
        match open(&path) {
            Ok(library) => return Ok(library),
            Err(reason) => tried.push(format!("{}: {reason}", path.display())),
        }
    }
    Err(format!("{} is not usable ({})", names[0], tried.join("; ")))
}

/// Declares `Functions`, a table of a library's functions, and how it is loaded from the first of the names that has them all. Each signature
/// must be that of the function's declaration in the library's header.
macro_rules! functions {
    ($names:expr; $($field:ident = $name:literal ( $($argument:ty),* ) -> $result:ty;)*) => {
        struct Functions {
            $($field: unsafe extern "C" fn($($argument),*) -> $result,)*
        }

        impl Functions {
            fn load(folders: &[std::path::PathBuf]) -> Result<Self, $crate::backend::BackendError> {
                use $crate::backend::cuda::libraries;
                let library = libraries::open($names, &[$($name),*], folders)?;
                let missing = |error: libloading::Error| libraries::unavailable(error.to_string());
                let functions = Self {
                    // SAFETY: whoever wrote the line took the signature from the library's header.
                    $($field: *unsafe { library.get($name) }.map_err(missing)?,)*
                };
                // What it runs, and its threads, may outlive whoever loaded it.
                std::mem::forget(library);
                Ok(functions)
            }
        }
    };
}
pub(crate) use functions;

fn try_open(path: &Path, symbols: &[&str]) -> Result<Library, String> {
    // SAFETY: NVIDIA's own library; its initialisers have no preconditions, and it is never unloaded while it is used.
    let library = unsafe { Library::new(path) }.map_err(|error| error_chain(&error))?;
    match symbols.iter().find(|symbol| !has(&library, symbol)) {
        Some(symbol) => Err(format!("it has no {symbol}")),
        None => Ok(library),
    }
}

fn has(library: &Library, symbol: &str) -> bool {
    // SAFETY: only the address is looked up, nothing is called.
    unsafe { library.get::<*const ()>(symbol) }.is_ok()
}

pub(crate) fn unavailable(reason: String) -> BackendError {
    BackendError::Unavailable { device: "CUDA", reason }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_library_that_is_not_there_or_is_another_is_named_with_what_was_tried() {
        let error = open(&["libno-such-thing.so.2"], &["f"], &[]).err().unwrap().to_string();
        assert!(error.contains("libno-such-thing.so.2 is not usable"), "{error}");
        let error = open(&["libc.so.6"], &["no_such_function"], &[]).err().unwrap().to_string();
        assert!(error.contains("libc.so.6: it has no no_such_function"), "{error}");
        assert!(open(&["libno-such-thing.so.2", "libc.so.6"], &["malloc"], &["/".into()]).is_ok());
    }
}
