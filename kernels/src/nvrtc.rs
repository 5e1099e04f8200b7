//! NVIDIA's run-time compiler, loaded when it is asked for: it makes the images that are embedded, and stands in for them on a device that
//! none of them fits.

use std::ffi::{CString, OsStr, c_char, c_int, c_void};
use std::ptr;

use libloading::Library;

/// The compiler could not be loaded, or refused.
#[derive(Debug, thiserror::Error)]
pub enum NvrtcError {
    #[error("NVRTC is not usable ({name})")]
    Load {
        name: String,
        #[source]
        source: libloading::Error,
    },
    #[error("NVRTC's {call} failed with code {code}")]
    Call { call: &'static str, code: c_int },
    #[error("the kernels do not compile for {target}:\n{log}")]
    Compile { target: String, log: String },
}

type Program = *mut c_void;

/// The functions that are used, as the C header declares them.
pub struct Nvrtc {
    version: unsafe extern "C" fn(*mut c_int, *mut c_int) -> c_int,
    create: unsafe extern "C" fn(
        *mut Program,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> c_int,
    compile: unsafe extern "C" fn(Program, c_int, *const *const c_char) -> c_int,
    destroy: unsafe extern "C" fn(*mut Program) -> c_int,
    log_size: Size,
    log: Copy,
    ptx_size: Size,
    ptx: Copy,
    cubin_size: Size,
    cubin: Copy,
    /// Keeps the functions above alive.
    _library: Library,
}

type Size = unsafe extern "C" fn(Program, *mut usize) -> c_int;
type Copy = unsafe extern "C" fn(Program, *mut c_char) -> c_int;

/// A compiled module, and what the assembler said of its kernels.
pub struct Image {
    pub bytes: Vec<u8>,
    pub log: String,
}

impl Nvrtc {
    /// Loads the library of that name or path, such as `libnvrtc.so.12`.
    ///
    /// # Errors
    /// It is not there, or is another library.
    pub fn load(library: impl AsRef<OsStr>) -> Result<Self, NvrtcError> {
        let library = library.as_ref();
        let error = |source| NvrtcError::Load { name: library.to_string_lossy().into_owned(), source };
        // SAFETY: the initialisers of NVIDIA's library have no preconditions; the symbols have the types that its header gives them.
        unsafe {
            let library = Library::new(library).map_err(error)?;
            Ok(Self {
                version: *library.get(b"nvrtcVersion").map_err(error)?,
                create: *library.get(b"nvrtcCreateProgram").map_err(error)?,
                compile: *library.get(b"nvrtcCompileProgram").map_err(error)?,
                destroy: *library.get(b"nvrtcDestroyProgram").map_err(error)?,
                log_size: *library.get(b"nvrtcGetProgramLogSize").map_err(error)?,
                log: *library.get(b"nvrtcGetProgramLog").map_err(error)?,
                ptx_size: *library.get(b"nvrtcGetPTXSize").map_err(error)?,
                ptx: *library.get(b"nvrtcGetPTX").map_err(error)?,
                cubin_size: *library.get(b"nvrtcGetCUBINSize").map_err(error)?,
                cubin: *library.get(b"nvrtcGetCUBIN").map_err(error)?,
                _library: library,
            })
        }
    }

    /// (major, minor)
    pub fn version(&self) -> (i32, i32) {
        let (mut major, mut minor) = (0, 0);
        // SAFETY: both pointers are valid.
        unsafe { (self.version)(&raw mut major, &raw mut minor) };
        (major, minor)
    }

    /// Compiles `source` with its `headers` (name, text) for `target`: `sm_80` gives machine code, `compute_80` PTX.
    ///
    /// # Errors
    /// It does not compile; the message holds the compiler's.
    pub fn compile(&self, source: &str, headers: &[(&str, &str)], target: &str) -> Result<Image, NvrtcError> {
        let c_string = |text: &str| CString::new(text).expect("kernel sources have no NUL");
        let pointers = |strings: &[CString]| strings.iter().map(|string| string.as_ptr()).collect::<Vec<_>>();
        // No contraction of products and sums: what a kernel computes is what its source says, whatever is inlined around it, so kernels that
        // share a function give the same bits.
        let options = [&format!("--gpu-architecture={target}"), "--std=c++17", "--fmad=false", "--ptxas-options=-v"]
            .map(c_string);
        let (source, name) = (c_string(source), c_string("kernels.cu"));
        let (names, texts): (Vec<_>, Vec<_>) =
            headers.iter().map(|(name, text)| (c_string(name), c_string(text))).unzip();
        let mut program = ptr::null_mut();
        // SAFETY: the strings outlive the program.
        let code = unsafe {
            (self.create)(
                &raw mut program,
                source.as_ptr(),
                name.as_ptr(),
                headers.len() as c_int,
                pointers(&texts).as_ptr(),
                pointers(&names).as_ptr(),
            )
        };
        if code != 0 {
            return Err(NvrtcError::Call { call: "nvrtcCreateProgram", code });
        }
        // SAFETY: the program was made above, the options live.
        let code = unsafe { (self.compile)(program, options.len() as c_int, pointers(&options).as_ptr()) };
        let log = String::from_utf8_lossy(&fetch(program, self.log_size, self.log)).trim_end_matches('\0').to_owned();
        let bytes = if code != 0 {
            Vec::new()
        } else if target.starts_with("compute") {
            let mut ptx = fetch(program, self.ptx_size, self.ptx);
            ptx.truncate(ptx.iter().position(|byte| *byte == 0).unwrap_or(ptx.len()));
            ptx
        } else {
            fetch(program, self.cubin_size, self.cubin)
        };
        // SAFETY: the program is not used afterwards.
        unsafe { (self.destroy)(&raw mut program) };
        if code == 0 { Ok(Image { bytes, log }) } else { Err(NvrtcError::Compile { target: target.to_owned(), log }) }
    }
}

/// Asks for a size, then for as many bytes.
fn fetch(program: Program, size: Size, copy: Copy) -> Vec<u8> {
    let mut len = 0;
    // SAFETY: the program is alive, and the buffer has the size that was named.
    unsafe {
        size(program, &raw mut len);
        let mut bytes = vec![0_u8; len];
        copy(program, bytes.as_mut_ptr().cast());
        bytes
    }
}
