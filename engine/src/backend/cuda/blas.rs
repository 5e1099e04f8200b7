//! Large products by cuBLASLt.
//!
//! The algorithm of a shape is chosen once, for the largest number of rows, and used for every number: rows are filled up to whole tiles, so
//! a row's sum is taken in the same order whatever rows are beside it. Asking again for each call would choose by the number of rows.

use std::collections::HashMap;
use std::ffi::{c_int, c_void};
use std::path::PathBuf;
use std::ptr::{self, null_mut};
use std::sync::Arc;

use super::device::{Device, Memory};
use super::libraries::functions;
use crate::backend::BackendError;

/// Rows are filled up to a multiple of this.
pub(super) const ROW_TILE: usize = 128;
pub(super) const WORKSPACE_BYTES: usize = 64 << 20;

const NAMES: &[&str] = &["libcublasLt.so.13", "libcublasLt.so.12", "libcublasLt.so"];

// Values of cublasLt.h, library_types.h and cublas_api.h; they have been the same since CUDA 11.
const STATUS_SUCCESS: c_int = 0;
const R_32F: c_int = 0;
const R_16BF: c_int = 14;
const COMPUTE_32F: c_int = 68;
const OP_T: i32 = 1;
const DESC_TRANSA: c_int = 3;
const PREF_MAX_WORKSPACE_BYTES: c_int = 1;
const PREF_REDUCTION_SCHEMES: c_int = 3;
/// Of x, of a summand that is not used, and of the result.
const PREF_MIN_ALIGNMENTS: [c_int; 3] = [6, 7, 8];

type Handle = *mut c_void;
type Status = c_int;

/// `cublasLtMatmulAlgo_t`
type Algorithm = [u64; 8];

/// `cublasLtMatmulHeuristicResult_t`
#[repr(C)]
#[derive(Clone, Copy)]
struct Heuristic {
    algorithm: Algorithm,
    workspace_bytes: usize,
    state: Status,
    waves: f32,
    reserved: [c_int; 4],
}

functions! {
    NAMES;
    create = "cublasLtCreate" (*mut Handle) -> Status;
    destroy = "cublasLtDestroy" (Handle) -> Status;
    desc_create = "cublasLtMatmulDescCreate" (*mut Handle, c_int, c_int) -> Status;
    desc_set = "cublasLtMatmulDescSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
    desc_destroy = "cublasLtMatmulDescDestroy" (Handle) -> Status;
    layout_create = "cublasLtMatrixLayoutCreate" (*mut Handle, c_int, u64, u64, i64) -> Status;
    layout_destroy = "cublasLtMatrixLayoutDestroy" (Handle) -> Status;
    preference_create = "cublasLtMatmulPreferenceCreate" (*mut Handle) -> Status;
    preference_set = "cublasLtMatmulPreferenceSetAttribute" (Handle, c_int, *const c_void, usize) -> Status;
    preference_destroy = "cublasLtMatmulPreferenceDestroy" (Handle) -> Status;
    heuristic = "cublasLtMatmulAlgoGetHeuristic"
        (Handle, Handle, Handle, Handle, Handle, Handle, Handle, c_int, *mut Heuristic, *mut c_int) -> Status;
    matmul = "cublasLtMatmul"
        (Handle, Handle, *const f32, *const c_void, Handle, *const c_void, Handle, *const f32, *const c_void, Handle,
         *mut c_void, Handle, *const Algorithm, *mut c_void, usize, *mut c_void) -> Status;
}

/// A weight matrix, and the rows that a product with it can have at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct Shape {
    /// [rows, cols]
    pub(super) rows: usize,
    pub(super) cols: usize,
    /// A multiple of [`ROW_TILE`].
    pub(super) capacity: usize,
}

/// A handle of the library with a workspace.
pub(super) struct Blas {
    functions: Functions,
    algorithms: HashMap<Shape, Algorithm>,
    /// By shape and rows.
    plans: HashMap<(Shape, usize), Plan>,
    handle: Owned,
    device: Arc<Device>,
    workspace: Memory,
}

/// The descriptions of one call.
struct Plan {
    description: Owned,
    weights: Owned,
    x: Owned,
    out: Owned,
}

/// Something that the library made, given back when it is dropped.
struct Owned {
    handle: Handle,
    destroy: unsafe extern "C" fn(Handle) -> Status,
}

// SAFETY: the library's handles may be used from any thread, one at a time.
unsafe impl Send for Owned {}

impl Owned {
    /// What `create` puts into the place that it is given.
    fn new(
        function: &str,
        destroy: unsafe extern "C" fn(Handle) -> Status,
        create: impl FnOnce(*mut Handle) -> Status,
    ) -> Result<Self, BackendError> {
        let mut handle = null_mut();
        check(function, create(&raw mut handle)).map(|()| Self { handle, destroy })
    }
}

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: made by the library, used no more.
        unsafe { (self.destroy)(self.handle) };
    }
}

impl Blas {
    /// # Errors
    /// The library is missing or cannot use the device.
    pub(super) fn new(device: &Arc<Device>, folders: &[PathBuf]) -> Result<Self, BackendError> {
        let functions = Functions::load(folders)?;
        let workspace = device.allocate("the workspace of matrix products", WORKSPACE_BYTES)?;
        // SAFETY: the context is current on this thread since the allocation.
        let handle = Owned::new("cublasLtCreate", functions.destroy, |place| unsafe { (functions.create)(place) })?;
        let (algorithms, plans) = (HashMap::new(), HashMap::new());
        Ok(Self { functions, handle, device: Arc::clone(device), workspace, algorithms, plans })
    }

    /// Puts the product of `rows` rows of bf16 (filled up to [`ROW_TILE`]s, which must be there) on the stream; the result is f32.
    ///
    /// # Errors
    /// The library has no algorithm for the shape, or refuses the call.
    pub(super) fn multiply(
        &mut self,
        shape: Shape,
        rows: usize,
        x: u64,
        weights: u64,
        out: u64,
    ) -> Result<(), BackendError> {
        let rows = rows.next_multiple_of(ROW_TILE);
        assert!(rows <= shape.capacity, "buffers have room for whole tiles");
        let algorithm = self.algorithm(shape)?;
        let plan = self.plan(shape, rows)?;
        let (description, a, b, d) = (plan.description.handle, plan.weights.handle, plan.x.handle, plan.out.handle);
        let (one, zero): (f32, f32) = (1.0, 0.0);
        // SAFETY: the descriptions fit the buffers: `rows` ≤ capacity, and the shapes are the caller's.
        let status = unsafe {
            (self.functions.matmul)(
                self.handle.handle,
                description,
                &raw const one,
                ptr::with_exposed_provenance(weights as usize),
                a,
                ptr::with_exposed_provenance(x as usize),
                b,
                &raw const zero,
                ptr::with_exposed_provenance(out as usize),
                d,
                ptr::with_exposed_provenance_mut(out as usize),
                d,
                &raw const algorithm,
                ptr::with_exposed_provenance_mut(self.workspace.pointer() as usize),
                self.workspace.bytes(),
                self.device.stream().cast(),
            )
        };
        check("cublasLtMatmul", status)
    }

    /// The algorithm of a shape.
    fn algorithm(&mut self, shape: Shape) -> Result<Algorithm, BackendError> {
        if let Some(algorithm) = self.algorithms.get(&shape) {
            return Ok(*algorithm);
        }
        let plan = Plan::new(&self.functions, shape, shape.capacity)?;
        let Functions { preference_create, preference_set, preference_destroy, heuristic, .. } = self.functions;
        // SAFETY: the place is a live value.
        let create = |place| unsafe { preference_create(place) };
        let preference = Owned::new("cublasLtMatmulPreferenceCreate", preference_destroy, create)?;
        let set = |attribute, value: &[u8]| {
            // SAFETY: the value is live and has the attribute's size.
            let status = unsafe { preference_set(preference.handle, attribute, value.as_ptr().cast(), value.len()) };
            check("cublasLtMatmulPreferenceSetAttribute", status)
        };
        set(PREF_MAX_WORKSPACE_BYTES, &(WORKSPACE_BYTES as u64).to_ne_bytes())?;
        // No sum is cut into parts, whose number would be a matter of the rows.
        set(PREF_REDUCTION_SCHEMES, &0_u32.to_ne_bytes())?;
        for operand in PREF_MIN_ALIGNMENTS {
            // Rows begin anywhere, so at multiples of 16 bytes.
            set(operand, &16_u32.to_ne_bytes())?;
        }
        let mut found = 0;
        let mut result =
            Heuristic { algorithm: [0; 8], workspace_bytes: 0, state: STATUS_SUCCESS, waves: 0.0, reserved: [0; 4] };
        // SAFETY: all pointers are to live values of the types that the function wants.
        let status = unsafe {
            heuristic(
                self.handle.handle,
                plan.description.handle,
                plan.weights.handle,
                plan.x.handle,
                plan.out.handle,
                plan.out.handle,
                preference.handle,
                1,
                &raw mut result,
                &raw mut found,
            )
        };
        check("cublasLtMatmulAlgoGetHeuristic", status)?;
        if found == 0 || result.state != STATUS_SUCCESS {
            let reason = format!("cuBLASLt has no algorithm for a product of {shape:?}");
            return Err(BackendError::Failed { device: "CUDA", reason });
        }
        self.algorithms.insert(shape, result.algorithm);
        Ok(result.algorithm)
    }

    fn plan(&mut self, shape: Shape, rows: usize) -> Result<&Plan, BackendError> {
        // Not `entry`: making one can fail.
        if !self.plans.contains_key(&(shape, rows)) {
            let plan = Plan::new(&self.functions, shape, rows)?;
            self.plans.insert((shape, rows), plan);
        }
        Ok(&self.plans[&(shape, rows)])
    }
}

impl Plan {
    /// The library thinks in columns: to it, x [rows, cols] is [cols, rows], the weights are [cols, n] and are transposed, and the result is
    /// [n, rows].
    fn new(functions: &Functions, shape: Shape, rows: usize) -> Result<Self, BackendError> {
        let transposed = OP_T.to_ne_bytes();
        // SAFETY: the place is a live value.
        let create = |place| unsafe { (functions.desc_create)(place, COMPUTE_32F, R_32F) };
        let description = Owned::new("cublasLtMatmulDescCreate", functions.desc_destroy, create)?;
        // SAFETY: the value is live and has the attribute's size.
        let set = unsafe {
            (functions.desc_set)(description.handle, DESC_TRANSA, transposed.as_ptr().cast(), transposed.len())
        };
        check("cublasLtMatmulDescSetAttribute", set)?;
        let layout = |kind: c_int, rows: usize, cols: usize| {
            // SAFETY: the place is a live value.
            let create =
                |place| unsafe { (functions.layout_create)(place, kind, rows as u64, cols as u64, rows as i64) };
            Owned::new("cublasLtMatrixLayoutCreate", functions.layout_destroy, create)
        };
        Ok(Self {
            description,
            weights: layout(R_16BF, shape.cols, shape.rows)?,
            x: layout(R_16BF, shape.cols, rows)?,
            out: layout(R_32F, shape.rows, rows)?,
        })
    }
}

fn check(function: &str, status: Status) -> Result<(), BackendError> {
    match status {
        STATUS_SUCCESS => Ok(()),
        status => Err(BackendError::Failed { device: "CUDA", reason: format!("{function} returned status {status}") }),
    }
}

const _: () = assert!(size_of::<Heuristic>() == 96);
