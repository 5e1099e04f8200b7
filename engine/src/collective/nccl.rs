//! Collectives of CUDA ranks, over buffers in device memory, by NCCL.
//!
//! A sum must have the same bits whatever rows are beside a row, and NCCL's own all-reduce cuts a buffer by its length. So NCCL only
//! moves data, and our kernel adds, in the binary tree over ranks of [`super`]: of a short buffer every rank gets all summands; of a long
//! one it gets its share of each, and the sums of the shares go round. That moves as many bytes as a ring does.
//!
//! Where the devices of a group see each other's memory, the sums of a few rows go without NCCL ([`PeerSums`]): a row has the same bits
//! either way, as both add in that order.

use std::ffi::{CStr, c_char, c_int, c_void};
use std::path::PathBuf;
use std::ptr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cudarc::driver::sys::{CUDA_MEMCPY2D, CUmemorytype, cuMemcpy2DAsync_v2};
use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{GemmReduce, Store};

use super::{Collective, CollectiveError};
use crate::backend::cuda::libraries::functions;
use crate::backend::cuda::peers::{Card, PeerArea, PeerSums};
use crate::backend::cuda::{Buffer, CudaBackend, Device, Memory};
use crate::backend::{Backend, BackendError, NormTo};
use crate::config::{Mesh, ModelConfig};
use crate::spec::LOGIT_ROWS;

/// Sums of at most so many bytes go in one exchange.
const SHORT_BYTES: usize = 512 << 10;
const FLOAT: usize = 4;
/// How long a call is waited for without sleeping.
const PATIENCE: Duration = Duration::from_millis(1);

const NAMES: &[&str] = &["libnccl.so.2", "libnccl.so"];

// Values of nccl.h.
const SUCCESS: c_int = 0;
const IN_PROGRESS: c_int = 7;
const FLOAT32: c_int = 7;
const MAGIC: u32 = 0xcafe_beef;
/// The version whose layout [`Config`] has; newer libraries know it.
const CONFIG_VERSION: u32 = 22_403;
const UNSET: c_int = c_int::MIN;

type Comm = *mut c_void;

/// `ncclUniqueId`: by which ranks find each other.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t`
#[repr(C)]
struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Padding in older versions.
    traffic_class: c_int,
}

functions! {
    NAMES;
    version = "ncclGetVersion" (*mut c_int) -> c_int;
    get_unique_id = "ncclGetUniqueId" (*mut UniqueId) -> c_int;
    init_rank = "ncclCommInitRankConfig" (*mut Comm, c_int, UniqueId, c_int, *mut Config) -> c_int;
    split = "ncclCommSplit" (Comm, c_int, c_int, *mut Comm, *mut Config) -> c_int;
    async_error = "ncclCommGetAsyncError" (Comm, *mut c_int) -> c_int;
    abort = "ncclCommAbort" (Comm) -> c_int;
    all_gather = "ncclAllGather" (*const c_void, *mut c_void, usize, c_int, Comm, *mut c_void) -> c_int;
    send = "ncclSend" (*const c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    recv = "ncclRecv" (*mut c_void, usize, c_int, c_int, Comm, *mut c_void) -> c_int;
    group_start = "ncclGroupStart" () -> c_int;
    group_end = "ncclGroupEnd" () -> c_int;
    error_string = "ncclGetErrorString" (c_int) -> *const c_char;
}

/// The library.
pub struct Nccl {
    functions: Functions,
}

impl Nccl {
    /// # Errors
    /// It is not installed, or too old.
    pub fn load(folders: &[PathBuf]) -> Result<Arc<Self>, BackendError> {
        Ok(Arc::new(Self { functions: Functions::load(folders)? }))
    }

    /// A new identity of a group of ranks. The process must live until all of them have joined.
    ///
    /// # Errors
    /// NCCL finds no network interface.
    pub fn unique_id(&self) -> Result<UniqueId, CollectiveError> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the pointer is to a live value of the type.
        let answer = unsafe { (self.functions.get_unique_id)(&raw mut id) };
        match answer {
            SUCCESS => Ok(id),
            code => Err(CollectiveError::Nccl {
                ranks: "all ranks".into(),
                doing: "creating the group's identity",
                reason: self.describe(code),
            }),
        }
    }

    /// As 10000 · major + 100 · minor + patch.
    pub(super) fn version(&self) -> c_int {
        let mut version = 0;
        // SAFETY: the pointer is to a live value.
        unsafe { (self.functions.version)(&raw mut version) };
        version
    }

    fn describe(&self, code: c_int) -> String {
        // SAFETY: NCCL answers any number with a static text.
        let text = unsafe { CStr::from_ptr((self.functions.error_string)(code)) };
        format!("{} ({code})", text.to_string_lossy())
    }
}

/// Where NCCL writes a new communicator. It does so until the call is accepted, and after an error perhaps later: then the place is never
/// given back.
fn place() -> *mut Comm {
    Box::into_raw(Box::new(ptr::null_mut()))
}

/// Ranks that exchange data.
pub(super) struct Group {
    nccl: Arc<Nccl>,
    comm: Comm,
    /// For messages.
    ranks: String,
    /// How long a call may take to be accepted: the first ones connect the ranks.
    limit: Duration,
}

// SAFETY: a communicator may be used from any thread, one at a time.
unsafe impl Send for Group {}

impl Group {
    /// The `size` ranks that were given `id`.
    ///
    /// # Errors
    /// A rank has not joined within `limit`, or cannot be reached.
    pub(super) fn start(
        nccl: &Arc<Nccl>,
        id: UniqueId,
        size: usize,
        rank: usize,
        limit: Duration,
    ) -> Result<Self, CollectiveError> {
        let mut config = Config {
            size: size_of::<Config>(),
            magic: MAGIC,
            version: CONFIG_VERSION,
            blocking: 0,
            cga_cluster_size: UNSET,
            min_ctas: UNSET,
            max_ctas: UNSET,
            net_name: ptr::null(),
            split_share: UNSET,
            traffic_class: UNSET,
        };
        let place = place();
        // SAFETY: the pointers are to live values of the types that the function wants.
        let code = unsafe { (nccl.functions.init_rank)(place, size as c_int, id, rank as c_int, &raw mut config) };
        // SAFETY: NCCL writes it before it returns, and the same again when all have joined.
        let comm = unsafe { place.read_volatile() };
        let ranks = format!("the ranks 0 to {}", size - 1);
        if comm.is_null() {
            return Err(CollectiveError::Nccl { ranks, doing: "starting", reason: nccl.describe(code) });
        }
        let group = Self { nccl: Arc::clone(nccl), comm, ranks, limit };
        group.settle("starting", code)?;
        // SAFETY: made above; NCCL is done with it.
        drop(unsafe { Box::from_raw(place) });
        Ok(group)
    }

    pub(super) fn failed(&self, doing: &'static str) -> impl Fn(BackendError) -> CollectiveError {
        let ranks = self.ranks.clone();
        move |error| CollectiveError::Nccl { ranks: ranks.clone(), doing, reason: error.to_string() }
    }

    /// Waits until the device has done what was asked for.
    pub(super) fn wait(&self, device: &Device, doing: &'static str) -> Result<(), CollectiveError> {
        let start = Instant::now();
        while !device.poll().map_err(self.failed(doing))? {
            match self.state() {
                SUCCESS | IN_PROGRESS if start.elapsed() < self.limit => {}
                SUCCESS | IN_PROGRESS => return Err(self.late(doing)),
                code => return Err(self.error(doing, code)),
            }
        }
        Ok(())
    }

    fn late(&self, doing: &'static str) -> CollectiveError {
        CollectiveError::NcclTimeout { ranks: self.ranks.clone(), doing, seconds: self.limit.as_secs_f64() }
    }

    fn error(&self, doing: &'static str, code: c_int) -> CollectiveError {
        CollectiveError::Nccl { ranks: self.ranks.clone(), doing, reason: self.nccl.describe(code) }
    }

    /// The group's state.
    fn state(&self) -> c_int {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live.
        match unsafe { (self.nccl.functions.async_error)(self.comm, &raw mut state) } {
            SUCCESS => state,
            code => code,
        }
    }

    /// Waits until a call that answered `code` has been accepted.
    fn settle(&self, doing: &'static str, mut code: c_int) -> Result<(), CollectiveError> {
        let start = Instant::now();
        while code == IN_PROGRESS {
            // A call is accepted in some tens of microseconds, by a thread of NCCL's; only where ranks still connect it takes long.
            match start.elapsed() {
                elapsed if elapsed > self.limit => return Err(self.late(doing)),
                elapsed if elapsed > PATIENCE => std::thread::sleep(PATIENCE),
                _ => std::thread::yield_now(),
            }
            code = self.state();
        }
        if code == SUCCESS { Ok(()) } else { Err(self.error(doing, code)) }
    }

    /// All ranks' `count` floats one after another, on every rank.
    pub(super) fn all_gather(&self, device: &Device, from: u64, to: u64, count: usize) -> Result<(), CollectiveError> {
        let f = &self.nccl.functions;
        let (from, to) = (ptr::with_exposed_provenance(from as usize), ptr::with_exposed_provenance_mut(to as usize));
        // SAFETY: the caller's buffers have room for the floats, and live until the stream has passed.
        let code = unsafe { (f.all_gather)(from, to, count, FLOAT32, self.comm, device.stream().cast()) };
        self.settle("gathering", code)
    }

    /// Sends and receives at once, each (address, floats, peer).
    pub(super) fn exchange(
        &self,
        doing: &'static str,
        device: &Device,
        sends: impl IntoIterator<Item = (u64, usize, usize)>,
        recvs: impl IntoIterator<Item = (u64, usize, usize)>,
    ) -> Result<(), CollectiveError> {
        let f = &self.nccl.functions;
        let stream = device.stream().cast();
        let check = |code| if matches!(code, SUCCESS | IN_PROGRESS) { Ok(()) } else { Err(self.error(doing, code)) };
        // SAFETY: as for `all_gather`.
        unsafe {
            check((f.group_start)())?;
            for (from, count, peer) in sends {
                let from = ptr::with_exposed_provenance(from as usize);
                check((f.send)(from, count, FLOAT32, peer as c_int, self.comm, stream))?;
            }
            for (to, count, peer) in recvs {
                let to = ptr::with_exposed_provenance_mut(to as usize);
                check((f.recv)(to, count, FLOAT32, peer as c_int, self.comm, stream))?;
            }
            let code = (f.group_end)();
            self.settle(doing, code)
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Unlike destroying it, this does not wait for other ranks; but for graphs that refer to the group, which go later, and when it gives
        // memory back for the kernels of other groups, which their own aborts end. So nobody waits for it.
        let (nccl, comm) = (Arc::clone(&self.nccl), self.comm.expose_provenance());
        let abort = move || {
            // SAFETY: used no more.
            unsafe { (nccl.functions.abort)(ptr::with_exposed_provenance_mut(comm)) };
        };
        // Without a thread it stays until the process ends.
        _ = std::thread::Builder::new().name("NCCL abort".into()).spawn(abort);
    }
}

/// The groups of one rank.
pub struct NcclCollective {
    /// First, so that it goes first: nothing is given back while its kernels wait for a rank.
    peers: Option<PeerSums>,
    device: Arc<Device>,
    mesh: Mesh,
    rank: usize,
    /// `None` where the dimension is 1.
    tensor: Option<Group>,
    pipeline: Option<Group>,
    /// Other ranks' data, f32.
    received: Memory,
    /// What the groups were split from; it goes after them.
    _all: Group,
}

impl NcclCollective {
    /// Bytes that other ranks' data need: the longest sum and the longest gather.
    pub(crate) fn received_bytes(config: &ModelConfig, mesh: Mesh, max_step_tokens: usize) -> usize {
        let (sum, columns) = (max_step_tokens * config.hidden_size, LOGIT_ROWS * (config.vocab_size / mesh.tp));
        (FLOAT * (mesh.tp * sum.min(SHORT_BYTES / FLOAT)).max(sum).max(mesh.tp * columns))
            .max(mesh.tp * size_of::<Card>())
    }

    /// Joins the ranks that were given `id`; `received` has [`Self::received_bytes`], and its device is the calling thread's. With `area`
    /// the ranks of a stage sum few rows without NCCL if all of them can.
    ///
    /// # Errors
    /// A rank has not joined within `limit`, or cannot be reached.
    pub(crate) fn join(
        nccl: &Arc<Nccl>,
        device: &Arc<Device>,
        id: UniqueId,
        (mesh, rank): (Mesh, usize),
        limit: Duration,
        (received, area): (Memory, Option<PeerArea>),
    ) -> Result<Self, CollectiveError> {
        let all = Group::start(nccl, id, mesh.world_size(), rank, limit)?;
        let (stage, tp_rank) = (mesh.stage(rank), mesh.tp_rank(rank));
        let tensor_ranks = format!("the ranks {} to {} of stage {stage}", rank - tp_rank, rank - tp_rank + mesh.tp - 1);
        let split = |size, color, key, ranks| match size {
            1 => Ok(None),
            _ => all.split(color, key, ranks).map(Some),
        };
        let tensor = split(mesh.tp, stage, tp_rank, tensor_ranks)?;
        let pipeline_ranks = format!("the ranks {tp_rank} of all stages");
        let pipeline = split(mesh.pp, tp_rank, stage, pipeline_ranks)?;
        let peers = match (&tensor, area) {
            (Some(tensor), Some(area)) => tensor.open(device, &received, area, mesh.tp_rank(rank), mesh.tp)?,
            _ => None,
        };
        Ok(Self { peers, device: Arc::clone(device), mesh, rank, tensor, pipeline, received, _all: all })
    }

    /// Adds the summands of all ranks, which lie one after another.
    fn add(&self, summands: u64, count: usize, out: u64) {
        let reduce = GemmReduce {
            partials: Ptr::new(summands),
            out: Ptr::new(out),
            count: count as u64,
            parts: self.mesh.tp as u32,
            store: Store::F32 as u32,
        };
        // SAFETY: the buffers have room for the summands and for the sum.
        unsafe { self.device.launch(&reduce.launch()) };
    }

    /// One share of `count` floats, if they can be shared out evenly in the pieces that kernels work in.
    fn share(&self, count: usize) -> Option<usize> {
        let share = count / self.mesh.tp;
        (share * self.mesh.tp == count && share.is_multiple_of(4)).then_some(share)
    }
}

impl Group {
    /// The ranks of this group that name the same color, in the order of their keys.
    pub(super) fn split(&self, color: usize, key: usize, ranks: String) -> Result<Self, CollectiveError> {
        let place = place();
        // SAFETY: the communicator is live; without a configuration the new one is like it.
        let code =
            unsafe { (self.nccl.functions.split)(self.comm, color as c_int, key as c_int, place, ptr::null_mut()) };
        self.settle("splitting the ranks", code)?;
        // SAFETY: made above; NCCL has written it and is done with it.
        let comm = *unsafe { Box::from_raw(place) };
        let group = Self { nccl: Arc::clone(&self.nccl), comm, ranks, limit: self.limit };
        group.settle("splitting the ranks", group.state())?;
        Ok(group)
    }

    /// Opens the areas of all ranks, if every rank can.
    fn open(
        &self,
        device: &Arc<Device>,
        room: &Memory,
        area: PeerArea,
        rank: usize,
        ranks: usize,
    ) -> Result<Option<PeerSums>, CollectiveError> {
        let cards = self.tell(device, room, area.card(), rank, ranks)?;
        let areas = area.open(&cards, rank);
        let opened = self.tell(device, room, u32::from(areas.is_ok()), rank, ranks)?;
        let reason = match areas {
            Ok(areas) if opened.iter().all(|opened| *opened == 1) => {
                tracing::info!(ranks = self.ranks, "sums of a few rows go through the memory of the devices");
                return Ok(Some(PeerSums::new(area, areas)));
            }
            Ok(_) => "another rank cannot".to_owned(),
            Err(reason) => reason,
        };
        // All have closed what they opened, before anybody's area is given back.
        self.tell(device, room, 0, rank, ranks)?;
        tracing::info!(ranks = self.ranks, reason, "all sums go through NCCL");
        Ok(None)
    }

    /// What all ranks tell each other, by rank.
    fn tell<T: bytemuck::Pod>(
        &self,
        device: &Arc<Device>,
        room: &Memory,
        own: T,
        rank: usize,
        ranks: usize,
    ) -> Result<Vec<T>, CollectiveError> {
        let doing = "telling each other of their memory";
        let bytes = size_of::<T>();
        let mut host = device.allocate_pinned(doing, ranks * bytes).map_err(self.failed(doing))?;
        host.slice_mut::<T>(ranks)[rank] = own;
        device.upload(&host, rank * bytes, bytes, room, rank * bytes);
        let at = room.pointer();
        self.all_gather(device, at + (rank * bytes) as u64, at, bytes / FLOAT)?;
        device.download(room, 0, ranks * bytes, &mut host, 0);
        self.wait(device, doing)?;
        Ok(host.slice::<T>(ranks).to_vec())
    }
}

impl Collective<CudaBackend> for NcclCollective {
    fn all_reduce(&mut self, rows: usize, x: &mut Buffer) -> Result<(), CollectiveError> {
        let Some(group) = &self.tensor else { return Ok(()) };
        let (count, x, received) = (rows * x.width(), x.address(), self.received.pointer());
        let Some(share) = self.share(count).filter(|_| count * FLOAT > SHORT_BYTES) else {
            group.all_gather(&self.device, x, received, count)?;
            self.add(received, count, x);
            return Ok(());
        };
        let own = self.mesh.tp_rank(self.rank);
        let at = |start: u64, index: usize| start + (index * share * FLOAT) as u64;
        let peers = || 0..self.mesh.tp;
        let sends = peers().map(|peer| (at(x, peer), share, peer));
        let recvs = peers().map(|peer| (at(received, peer), share, peer));
        group.exchange("summing", &self.device, sends, recvs)?;
        self.add(received, share, at(x, own));
        group.all_gather(&self.device, at(x, own), x, share)
    }

    fn all_reduce_add(
        &mut self,
        backend: &CudaBackend,
        rows: usize,
        x: &mut Buffer,
        y: &mut Buffer,
        norm: Option<NormTo<'_, CudaBackend>>,
    ) -> Result<(), CollectiveError> {
        match &self.peers {
            Some(peers) if peers.takes(rows, x) => peers.add(rows, x, y, norm),
            _ => {
                self.all_reduce(rows, y)?;
                backend.add_norm(rows, x, y, norm);
            }
        }
        Ok(())
    }

    fn gather_columns(&mut self, rows: usize, x: &Buffer, out: &mut Buffer) -> Result<(), CollectiveError> {
        let Some(group) = &self.tensor else { return Ok(()) };
        let (width, count, received) = (x.width(), rows * x.width(), self.received.pointer());
        group.all_gather(&self.device, x.address(), received, count)?;
        if self.mesh.tp_rank(self.rank) > 0 {
            return Ok(());
        }
        for peer in 0..self.mesh.tp {
            let copy = CUDA_MEMCPY2D {
                srcMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
                srcDevice: received + (peer * count * FLOAT) as u64,
                srcPitch: width * FLOAT,
                dstMemoryType: CUmemorytype::CU_MEMORYTYPE_DEVICE,
                dstDevice: out.address() + (peer * width * FLOAT) as u64,
                dstPitch: out.width() * FLOAT,
                WidthInBytes: width * FLOAT,
                Height: rows,
                srcXInBytes: 0,
                srcY: 0,
                srcHost: ptr::null(),
                srcArray: ptr::null_mut(),
                dstXInBytes: 0,
                dstY: 0,
                dstHost: ptr::null_mut(),
                dstArray: ptr::null_mut(),
            };
            // SAFETY: both ranges are inside their buffers: `out` has tp times the columns.
            let answer = unsafe { cuMemcpy2DAsync_v2(&raw const copy, self.device.stream()) };
            self.device.note("placing columns", answer.result());
        }
        Ok(())
    }

    fn send_next(&mut self, rows: usize, x: &Buffer) -> Result<(), CollectiveError> {
        let Some(group) = &self.pipeline else { return Ok(()) };
        let next = self.mesh.stage(self.rank) + 1;
        let (count, own) = (rows * x.width(), self.mesh.tp_rank(self.rank));
        // All ranks of the stage hold the same, so each sends a share over its own network card.
        let part = match self.share(count) {
            Some(share) => (x.address() + (own * share * FLOAT) as u64, share, next),
            None => (x.address(), count, next),
        };
        group.exchange("handing over to the next stage", &self.device, [part], [])
    }

    fn recv_previous(&mut self, rows: usize, x: &mut Buffer) -> Result<(), CollectiveError> {
        let Some(group) = &self.pipeline else { return Ok(()) };
        let previous = self.mesh.stage(self.rank) - 1;
        let (count, own) = (rows * x.width(), self.mesh.tp_rank(self.rank));
        let doing = "taking over from the previous stage";
        let Some(share) = self.share(count) else {
            return group.exchange(doing, &self.device, [], [(x.address(), count, previous)]);
        };
        let at = x.address() + (own * share * FLOAT) as u64;
        group.exchange(doing, &self.device, [], [(at, share, previous)])?;
        match &self.tensor {
            Some(tensor) => tensor.all_gather(&self.device, at, x.address(), share),
            None => Ok(()),
        }
    }

    /// All slots' choices, a kilobyte, and only where the next step needs them. The logits are on every rank already, but to sample there too would
    /// take each of them a megabyte's placing a row, and the rows' sampling state.
    fn share_choices(&mut self, backend: &CudaBackend) -> Result<(), CollectiveError> {
        let Some(group) = &self.tensor else { return Ok(()) };
        let (address, count) = backend.choices();
        let transfer = |peer| (address, count, peer);
        let (is_first, peers) = (self.mesh.tp_rank(self.rank) == 0, self.mesh.tp);
        let sends = (1..peers).filter(|_| is_first).map(transfer);
        group.exchange("sharing choices", &self.device, sends, (!is_first).then(|| transfer(0)))
    }

    fn check(&self) -> Result<(), CollectiveError> {
        for group in self.tensor.iter().chain(&self.pipeline) {
            match group.state() {
                SUCCESS | IN_PROGRESS => {}
                code => return Err(group.error("computing together", code)),
            }
        }
        Ok(())
    }
}
