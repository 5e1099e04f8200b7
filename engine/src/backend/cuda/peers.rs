//! Sums of few rows over the devices of one host in one kernel: each rank reads what the others have staged in their memory.
//!
//! Ranks are processes, so each opens the others' memory by handles of the driver's. Where one cannot (another host, a device that is hidden
//! from it, no path between two devices), all of them leave it to NCCL.

use std::sync::Arc;

use cudarc::driver::result;
use cudarc::driver::sys::{
    CUdeviceptr, CUipcMem_flags, CUipcMemHandle, CUresult, cuDeviceCanAccessPeer, cuIpcCloseMemHandle,
    cuIpcGetMemHandle, cuIpcOpenMemHandle_v2,
};
use nemotron_kernels::Ptr;
use nemotron_kernels::ops::{AllReduceNorm, MAX_PEERS};

use super::device::{Device, Memory, Pinned, describe};
use super::{Buffer, CudaBackend};
use crate::backend::{BackendError, NormTo};

/// A smaller allocation may share a piece of memory with others, and a handle is of the whole piece.
const PIECE_BYTES: usize = 2 << 20;

/// What one rank lends to the others of its group.
pub(crate) struct PeerArea {
    area: Memory,
    counts: Memory,
    stop: Pinned,
    hidden: usize,
}

/// How a rank's area is found by the others. All zeros if it cannot be lent.
#[derive(Clone, Copy, bytemuck::Zeroable, bytemuck::Pod)]
#[repr(C)]
pub(crate) struct Card {
    uuid: [u8; 16],
    handle: [u8; 64],
}

/// The areas of all ranks of a group, opened; others' are closed before this rank's own is given back.
pub(crate) struct PeerSums {
    areas: Areas,
    own: PeerArea,
}

/// Where a rank finds the areas of its group. While another rank has one of these, the memory that it was opened from must stay.
pub(crate) struct Areas {
    addresses: [Ptr<u32>; MAX_PEERS as usize],
    rank: usize,
    ranks: usize,
    _opened: Vec<Opened>,
}

/// Memory of another process.
struct Opened {
    device: Arc<Device>,
    pointer: CUdeviceptr,
}

impl PeerArea {
    /// For rows of `hidden` numbers.
    ///
    /// # Errors
    /// There is no memory for it.
    pub(crate) fn new(device: &Arc<Device>, hidden: usize) -> Result<Self, BackendError> {
        let (area, counts) = AllReduceNorm::bytes(hidden);
        let what = "sums with other ranks";
        let area = device.allocate(what, area.next_multiple_of(PIECE_BYTES))?;
        let (counts, stop) = (device.allocate(what, counts)?, device.allocate_pinned(what, size_of::<u32>())?);
        device.fill(&area, 0);
        device.fill(&counts, 0);
        Ok(Self { area, counts, stop, hidden })
    }

    /// Bytes of the device's memory that it takes.
    pub(crate) fn bytes(hidden: usize) -> usize {
        let (area, counts) = AllReduceNorm::bytes(hidden);
        area.next_multiple_of(PIECE_BYTES) + counts
    }

    pub(crate) fn card(&self) -> Card {
        let mut handle = CUipcMemHandle { reserved: [0; 64] };
        // SAFETY: the pointer is to a live value, the address that of an allocation.
        let lent = unsafe { cuIpcGetMemHandle(&raw mut handle, self.area.pointer()) };
        match (lent, self.area.device().context().uuid()) {
            (CUresult::CUDA_SUCCESS, Ok(uuid)) => {
                Card { uuid: uuid.bytes.map(|byte| byte as u8), handle: handle.reserved.map(|byte| byte as u8) }
            }
            _ => bytemuck::Zeroable::zeroed(),
        }
    }

    /// Opens the areas of all ranks of the group; `cards` is in the order of ranks, of which this one is number `rank`.
    ///
    /// # Errors
    /// Why a rank's area cannot be reached.
    pub(crate) fn open(&self, cards: &[Card], rank: usize) -> Result<Areas, String> {
        let mut addresses = [Ptr::NULL; MAX_PEERS as usize];
        if cards.len() > addresses.len() {
            return Err(format!("{} ranks are more than {}", cards.len(), addresses.len()));
        }
        let mut opened = Vec::new();
        for (peer, card) in cards.iter().enumerate() {
            addresses[peer] = Ptr::new(if peer == rank {
                self.area.pointer()
            } else {
                let other = Opened::new(self.area.device(), card)
                    .map_err(|reason| format!("the device of rank {peer} of the group {reason}"))?;
                opened.push(other);
                opened[opened.len() - 1].pointer
            });
        }
        Ok(Areas { addresses, rank, ranks: cards.len(), _opened: opened })
    }
}

impl Opened {
    fn new(device: &Arc<Device>, card: &Card) -> Result<Self, String> {
        let error = |error| format!("cannot be reached: {}", describe(&error));
        let own = device.context().cu_device();
        let mut devices = 0..result::device::get_count().map_err(error)?;
        let other = devices.find_map(|ordinal| {
            let other = result::device::get(ordinal).ok()?;
            let uuid = result::device::get_uuid(other).ok()?;
            (uuid.bytes.map(|byte| byte as u8) == card.uuid).then_some(other)
        });
        let other = other.ok_or("is not visible here")?;
        let mut reaches = 0;
        // SAFETY: the pointer is to a live value.
        unsafe { cuDeviceCanAccessPeer(&raw mut reaches, own, other) }.result().map_err(error)?;
        if reaches == 0 {
            return Err("has no path to this one".into());
        }
        let mut pointer = 0;
        let handle = CUipcMemHandle { reserved: card.handle.map(|byte| byte as std::ffi::c_char) };
        let flags = CUipcMem_flags::CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS as u32;
        // SAFETY: the pointer is to a live value, and the handle is one that the driver gave another rank.
        unsafe { cuIpcOpenMemHandle_v2(&raw mut pointer, handle, flags) }.result().map_err(error)?;
        Ok(Self { device: Arc::clone(device), pointer })
    }
}

impl Drop for Opened {
    fn drop(&mut self) {
        if self.device.bind().is_ok() {
            // SAFETY: opened by `new`, used no more.
            _ = unsafe { cuIpcCloseMemHandle(self.pointer) };
        }
    }
}

impl PeerSums {
    pub(crate) fn new(own: PeerArea, areas: Areas) -> Self {
        Self { areas, own }
    }

    /// Whether it is for sums of so many rows.
    pub(crate) fn takes(&self, rows: usize, x: &Buffer) -> bool {
        rows <= AllReduceNorm::MAX_ROWS as usize && x.width() == self.own.hidden
    }

    /// x += the sum of all ranks' y, then what follows of it.
    pub(crate) fn add(&self, rows: usize, x: &mut Buffer, y: &Buffer, norm: Option<NormTo<'_, CudaBackend>>) {
        let (scale, shift, out, eps) = norm.map_or((Ptr::NULL, Ptr::NULL, Ptr::NULL, 0.0), NormTo::addresses);
        let reduce = AllReduceNorm {
            areas: self.areas.addresses,
            own_flags: self.areas.addresses[self.areas.rank],
            counts: Ptr::new(self.own.counts.pointer()),
            stop: Ptr::new(self.own.stop.pointer()),
            y: Ptr::new(y.address()),
            x: Ptr::new(x.address()),
            scale,
            shift,
            out,
            hidden: self.own.hidden as u32,
            rank: self.areas.rank as u32,
            ranks: self.areas.ranks as u32,
            eps,
        };
        // SAFETY: the areas are as large as the kernel wants, and all ranks launch it for the same rows of the same step.
        unsafe { self.own.area.device().launch(&reduce.launch(rows as u32)) };
    }
}

impl Drop for PeerSums {
    fn drop(&mut self) {
        // Kernels that wait for a rank that is gone end, so that memory can be given back.
        self.own.stop.slice_mut::<u32>(1)[0] = 1;
    }
}
