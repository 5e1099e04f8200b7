//! A device: its context, the stream that everything of a rank runs on, and memory that gives itself back.
//!
//! Work is put on the stream without waiting. The first piece that the driver refuses is remembered and reported by [`Device::poll`].

use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cudarc::driver::sys::{
    CUdeviceptr, CUfunction, CUfunction_attribute, CUgraphInstantiate_flags, CUmodule, CUresult, CUstream,
    CUstreamCaptureMode,
};
use cudarc::driver::{CudaContext, CudaEvent, CudaGraph, CudaStream, DriverError, result};
use nemotron_kernels::image;
use nemotron_kernels::ops::{KERNELS, Launch};

use super::libraries;
use crate::backend::BackendError;

/// Dynamic shared memory that a kernel may have without asking for more.
const DEFAULT_SHARED_BYTES: u32 = 48 << 10;
/// How long [`Device::poll`] waits at most.
const PATIENCE: Duration = Duration::from_millis(20);
/// And [`Device::poll_for`], whose caller has something else to look at.
const MOMENT: Duration = Duration::from_micros(50);

/// One GPU as one rank uses it.
pub struct Device {
    context: Arc<CudaContext>,
    stream: Arc<CudaStream>,
    /// Recorded behind what was asked for last.
    done: CudaEvent,
    kernels: HashMap<&'static str, CUfunction>,
    failure: Mutex<Option<String>>,
}

// SAFETY: a function's handle is only a name for the driver, valid as long as the context, which lives as long as this value.
unsafe impl Send for Device {}
// SAFETY: as above; the driver's calls may come from any thread.
unsafe impl Sync for Device {}

/// Device memory.
pub struct Memory {
    device: Arc<Device>,
    pointer: CUdeviceptr,
    bytes: usize,
}

/// Host memory that the device copies from and to by itself.
pub struct Pinned {
    device: Arc<Device>,
    pointer: *mut c_void,
    bytes: usize,
}

// SAFETY: the memory belongs to this value alone, and the driver lets any thread use it.
unsafe impl Send for Pinned {}

impl Device {
    /// Opens device `ordinal` of those that this process sees; in `folders` libraries are looked for first.
    ///
    /// # Errors
    /// There is no driver or no such device, or it is in a state in which it cannot be used.
    pub fn open(ordinal: usize, folders: &[PathBuf]) -> Result<Arc<Self>, BackendError> {
        libraries::driver()?;
        let unusable = |error: DriverError| libraries::unavailable(format!("device {ordinal}: {}", describe(&error)));
        let context = CudaContext::new(ordinal).map_err(unusable)?;
        // SAFETY: all buffers are used on one stream alone, so no events between streams are needed.
        unsafe { context.disable_event_tracking() };
        let stream = context.new_stream().map_err(unusable)?;
        let done = stream.record_event(None).map_err(unusable)?;
        let kernels = load_kernels(context.compute_capability().map_err(unusable)?, folders)?;
        Ok(Arc::new(Self { context, stream, done, kernels, failure: Mutex::new(None) }))
    }

    pub fn context(&self) -> &Arc<CudaContext> {
        &self.context
    }

    pub fn stream(&self) -> CUstream {
        self.stream.cu_stream()
    }

    /// Makes the device the calling thread's.
    pub fn bind(&self) -> Result<(), BackendError> {
        self.context.bind_to_thread().map_err(|error| failed("the context", &error))
    }

    /// Bytes that are free and bytes in all.
    pub fn memory(&self) -> Result<(usize, usize), BackendError> {
        self.context.mem_get_info().map_err(|error| failed("asking for free memory", &error))
    }

    /// `bytes` of memory with unspecified contents; at least one.
    pub fn allocate(self: &Arc<Self>, what: &'static str, bytes: usize) -> Result<Memory, BackendError> {
        self.bind()?;
        // SAFETY: the context is current; the memory is given back when the value is dropped.
        let pointer = unsafe { result::malloc_sync(bytes.max(1)) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => BackendError::OutOfMemory { device: "CUDA", what, bytes },
            _ => failed("allocating memory", &error),
        })?;
        Ok(Memory { device: Arc::clone(self), pointer, bytes })
    }

    /// `bytes` of pinned memory, zeroed.
    pub fn allocate_pinned(self: &Arc<Self>, what: &'static str, bytes: usize) -> Result<Pinned, BackendError> {
        self.bind()?;
        // SAFETY: the context is current; the memory is given back when the value is dropped.
        let pointer = unsafe { result::malloc_host(bytes.max(1), 0) }.map_err(|error| match error.0 {
            CUresult::CUDA_ERROR_OUT_OF_MEMORY => BackendError::OutOfMemory { device: "pinned host", what, bytes },
            _ => failed("allocating pinned memory", &error),
        })?;
        // SAFETY: the allocation has this many bytes.
        unsafe { pointer.cast::<u8>().write_bytes(0, bytes) };
        Ok(Pinned { device: Arc::clone(self), pointer, bytes })
    }

    /// An event that has happened.
    pub fn event(&self) -> Result<CudaEvent, BackendError> {
        self.stream.record_event(None).map_err(|error| failed("creating an event", &error))
    }

    /// Lets the event happen when everything that was asked for until now is done.
    pub fn mark(&self, event: &CudaEvent) {
        self.note("recording an event", event.record(&self.stream));
    }

    /// # Errors
    /// The device failed before the event happened.
    pub fn wait_for(&self, event: &CudaEvent) -> Result<(), BackendError> {
        event.synchronize().map_err(|error| failed("a copy to the device", &error))
    }

    /// Puts a kernel on the stream.
    ///
    /// # Safety
    /// The addresses in its arguments are of buffers as large as its description says, which live until the stream has passed.
    pub unsafe fn launch(&self, launch: &Launch) {
        let Some(&function) = self.kernels.get(launch.kernel) else {
            unreachable!("{} is not in KERNELS", launch.kernel)
        };
        if launch.grid.contains(&0) {
            return;
        }
        let [x, y, z] = launch.grid;
        let mut arguments = [launch.args().cast_mut()];
        // SAFETY: the function takes the one struct that `Launch` holds; the rest is the caller's promise.
        let answer = unsafe {
            result::launch_kernel(
                function,
                (x, y, z),
                (launch.threads, 1, 1),
                launch.shared_bytes,
                self.stream(),
                &mut arguments,
            )
        };
        self.note(launch.kernel, answer);
    }

    /// Copies to the device, behind what was asked for before; the source must stay as it is until the stream has passed.
    pub fn upload(&self, from: &Pinned, from_byte: usize, bytes: usize, to: &Memory, to_byte: usize) {
        assert!(from_byte + bytes <= from.bytes && to_byte + bytes <= to.bytes, "a copy inside its buffers");
        // SAFETY: both ranges are inside their allocations, as asserted.
        let source = unsafe { std::slice::from_raw_parts(from.pointer.cast::<u8>().add(from_byte), bytes) };
        // SAFETY: as above.
        let answer = unsafe { result::memcpy_htod_async(to.pointer + to_byte as u64, source, self.stream()) };
        self.note("copying to the device", answer);
    }

    /// Copies to the host, behind what was asked for before.
    pub fn download(&self, from: &Memory, from_byte: usize, bytes: usize, to: &mut Pinned, to_byte: usize) {
        assert!(from_byte + bytes <= from.bytes && to_byte + bytes <= to.bytes, "a copy inside its buffers");
        // SAFETY: both ranges are inside their allocations, as asserted.
        let target = unsafe { std::slice::from_raw_parts_mut(to.pointer.cast::<u8>().add(to_byte), bytes) };
        // SAFETY: as above.
        let answer = unsafe { result::memcpy_dtoh_async(target, from.pointer + from_byte as u64, self.stream()) };
        self.note("copying from the device", answer);
    }

    /// Copies inside the device's memory, behind what was asked for before.
    pub(super) fn copy(&self, from: &Memory, to: &Memory, bytes: usize) {
        assert!(bytes <= from.bytes && bytes <= to.bytes, "a copy inside its buffers");
        // SAFETY: both ranges are inside their allocations, as asserted.
        let answer = unsafe { result::memcpy_dtod_async(to.pointer, from.pointer, bytes, self.stream()) };
        self.note("copying on the device", answer);
    }

    /// Sets every byte, behind what was asked for before.
    pub(crate) fn fill(&self, memory: &Memory, byte: u8) {
        // SAFETY: the whole of an allocation.
        let answer = unsafe { result::memset_d8_async(memory.pointer, byte, memory.bytes, self.stream()) };
        self.note("filling memory", answer);
    }

    /// From here on, what is asked for is recorded instead of done.
    ///
    /// # Errors
    /// The driver refuses.
    pub(crate) fn start_recording(&self) -> Result<(), BackendError> {
        // Libraries have threads of their own, which may allocate meanwhile.
        let mode = CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        self.stream.begin_capture(mode).map_err(|error| failed("recording a graph", &error))
    }

    /// What was asked for since [`Self::start_recording`].
    ///
    /// # Errors
    /// Something that was asked for cannot be recorded.
    pub(crate) fn end_recording(&self) -> Result<CudaGraph, BackendError> {
        let graph = self.stream.end_capture(CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH);
        let graph = graph.map_err(|error| failed("recording a graph", &error))?;
        graph.ok_or_else(|| BackendError::Failed { device: "CUDA", reason: "an empty graph was recorded".into() })
    }

    /// Whether everything that was asked for is done; waits for it a moment.
    ///
    /// # Errors
    /// The device or the driver has refused something since the last call.
    pub fn poll(&self) -> Result<bool, BackendError> {
        self.mark(&self.done);
        self.watch(&self.done, PATIENCE)
    }

    /// Whether an event has happened; waits for it a moment.
    ///
    /// # Errors
    /// As [`Device::poll`].
    pub fn poll_for(&self, event: &CudaEvent) -> Result<bool, BackendError> {
        self.watch(event, MOMENT)
    }

    fn watch(&self, event: &CudaEvent, patience: Duration) -> Result<bool, BackendError> {
        if let Some(reason) = self.failure.lock().unwrap_or_else(PoisonError::into_inner).take() {
            return Err(BackendError::Failed { device: "CUDA", reason });
        }
        let start = Instant::now();
        loop {
            match event.try_is_complete() {
                Ok(true) => return Ok(true),
                // A step is milliseconds long: sleeping would be longer than what is left of it.
                Ok(false) if start.elapsed() < patience => std::thread::yield_now(),
                Ok(false) => return Ok(false),
                Err(error) => return Err(failed("a kernel or copy of this step", &error)),
            }
        }
    }

    /// Waits for everything that was asked for; only where no other rank can be the reason that it is never done.
    ///
    /// # Errors
    /// As [`Device::poll`].
    pub fn wait(&self) -> Result<(), BackendError> {
        while !self.poll()? {}
        Ok(())
    }

    /// Remembers a failure, if it is the first.
    pub(super) fn note_failure(&self, answer: Result<(), BackendError>) {
        if let Err(error) = answer {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert_with(|| match error {
                BackendError::Failed { reason, .. } => reason,
                error => error.to_string(),
            });
        }
    }

    /// As [`Device::note_failure`].
    pub(crate) fn note(&self, doing: &str, answer: Result<(), DriverError>) {
        if let Err(error) = answer {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            failure.get_or_insert_with(|| format!("{doing}: {}", describe(&error)));
        }
    }
}

impl Memory {
    /// Its address on the device.
    pub fn pointer(&self) -> CUdeviceptr {
        self.pointer
    }

    pub fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn device(&self) -> &Arc<Device> {
        &self.device
    }
}

impl Pinned {
    /// Its address for the device, which is that for the host.
    pub(super) fn pointer(&self) -> CUdeviceptr {
        self.pointer.expose_provenance() as CUdeviceptr
    }

    /// The first `len` elements. The device must not be writing them.
    pub fn slice<T: bytemuck::Pod>(&self, len: usize) -> &[T] {
        assert!(len * size_of::<T>() <= self.bytes, "a slice inside its buffer");
        // SAFETY: inside the allocation, which is page-aligned and initialised; `Pod` allows any bits.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), len) }
    }

    /// The first `len` elements. The device must not be using them.
    pub fn slice_mut<T: bytemuck::Pod>(&mut self, len: usize) -> &mut [T] {
        assert!(len * size_of::<T>() <= self.bytes, "a slice inside its buffer");
        // SAFETY: as for `slice`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), len) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `Device::allocate`, used no more. The call waits for what the device still does with it.
            // A failure means that the context is broken, and with it the memory is gone.
            _ = unsafe { result::free_sync(self.pointer) };
        }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: allocated by `Device::allocate_pinned`, used no more.
            _ = unsafe { result::free_host(self.pointer) };
        }
    }
}

/// Loads the image for the device's architecture; where the driver refuses that, the kernels are compiled here.
fn load_module(capability: (i32, i32), folders: &[PathBuf]) -> Result<CUmodule, BackendError> {
    use CUresult::*;
    let (major, minor) = (capability.0 as u32, capability.1 as u32);
    // SAFETY: the context is current on this thread; the image is a whole one, as the compiler gave it.
    let load = |image: &[u8]| unsafe { result::module::load_data(image.as_ptr().cast()) };
    let image = image::image(major, minor).map_err(|error| libraries::unavailable(error.to_string()))?;
    let refused = match load(&image) {
        Ok(module) => return Ok(module),
        Err(error) => error,
    };
    let is_unsuitable = matches!(
        refused.0,
        CUDA_ERROR_NO_BINARY_FOR_GPU
            | CUDA_ERROR_INVALID_IMAGE
            | CUDA_ERROR_INVALID_PTX
            | CUDA_ERROR_UNSUPPORTED_PTX_VERSION
            | CUDA_ERROR_JIT_COMPILER_NOT_FOUND
            | CUDA_ERROR_JIT_COMPILATION_DISABLED
    );
    if !is_unsuitable {
        return Err(failed("loading the kernels", &refused));
    }
    tracing::info!(major, minor, "the driver has no use for the kernels' images: they are compiled");
    let compiled = libraries::nvrtc(folders)
        .and_then(|nvrtc| image::compile(&nvrtc, major, minor).map_err(|error| error.to_string()));
    let compiled = compiled.map_err(|reason| {
        libraries::unavailable(format!(
            "the driver refuses the kernels for compute capability {major}.{minor} ({}), and they cannot be compiled here: {reason}; \
             a newer driver, or NVIDIA's NVRTC beside cuBLASLt, is needed",
            describe(&refused)
        ))
    })?;
    load(&compiled).map_err(|error| failed("loading the kernels that were compiled", &error))
}

/// Finds every kernel in the device's module, which stays loaded as long as the process.
fn load_kernels(
    capability: (i32, i32),
    folders: &[PathBuf],
) -> Result<HashMap<&'static str, CUfunction>, BackendError> {
    let module = load_module(capability, folders)?;
    let mut kernels = HashMap::new();
    for &(name, shared_bytes) in KERNELS {
        let c_name = CString::new(name).expect("names of kernels have no zero byte");
        // SAFETY: the module is loaded and stays so.
        let function = unsafe { result::module::get_function(module, c_name) }.map_err(|error| failed(name, &error))?;
        if shared_bytes > DEFAULT_SHARED_BYTES {
            // As much as several blocks of a multiprocessor need together, or the driver may leave room for one only.
            const ALL: i32 = 100;
            for (attribute, value) in [
                (CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared_bytes as i32),
                (CUfunction_attribute::CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, ALL),
            ] {
                // SAFETY: as above.
                unsafe { result::function::set_function_attribute(function, attribute, value) }
                    .map_err(|error| failed(name, &error))?;
            }
        }
        kernels.insert(name, function);
    }
    Ok(kernels)
}

pub(super) fn failed(doing: &str, error: &DriverError) -> BackendError {
    BackendError::Failed { device: "CUDA", reason: format!("{doing}: {}", describe(error)) }
}

/// Name and meaning of a driver's error.
pub(super) fn describe(error: &DriverError) -> String {
    let text = |text: Result<&std::ffi::CStr, DriverError>| text.map(|text| text.to_string_lossy().into_owned());
    match (text(error.error_name()), text(error.error_string())) {
        (Ok(name), Ok(meaning)) => format!("{name}: {meaning}"),
        _ => format!("driver error {}", error.0 as u32),
    }
}
