//! From a kernel's arguments to its launch: which variant, how many blocks and threads, how much shared memory.

use std::ffi::c_void;

use crate::args::Layout;
use crate::ops::{
    AddNorm, AllReduceNorm, Attention, AttentionCombine, Embed, GatherRows, Gemm, GemmReduce, MAX_GROUP, MAX_HEAD_DIM,
    MAX_PARTS, MAX_PEERS, RopeAppend, SPLIT_TOKENS, Sample,
};

/// A kernel with its grid and arguments: what `cuLaunchKernel` takes, with [`Self::args`] as the only kernel parameter.
#[derive(Clone, Copy, Debug)]
pub struct Launch {
    pub kernel: &'static str,
    pub grid: [u32; 3],
    /// Threads of a block, in one dimension.
    pub threads: u32,
    /// Dynamic shared memory; above 48 KiB the function needs `MAX_DYNAMIC_SHARED_SIZE_BYTES` first, see [`KERNELS`].
    pub shared_bytes: u32,
    args: [u64; ARG_WORDS],
    args_bytes: usize,
}

const ARG_WORDS: usize = 32;

impl Launch {
    fn new<T: Layout>(kernel: &'static str, grid: [u32; 3], threads: u32, shared_bytes: u32, args: &T) -> Self {
        const { assert!(size_of::<T>() <= ARG_WORDS * 8 && align_of::<T>() <= 8) };
        let mut words = [0; ARG_WORDS];
        // SAFETY: a `Layout` has no padding, fits the words and needs no more alignment than they have.
        unsafe { std::ptr::from_mut(&mut words).cast::<T>().write(*args) };
        Self { kernel, grid, threads, shared_bytes, args: words, args_bytes: size_of::<T>() }
    }

    /// The struct of arguments, which lives as long as `self`.
    pub fn args(&self) -> *const c_void {
        self.args.as_ptr().cast()
    }

    pub fn args_bytes(&self) -> usize {
        self.args_bytes
    }
}

/// Every kernel, with the most dynamic shared memory that a launch of it asks for.
pub const KERNELS: &[(&str, u32)] = &[
    ("embed", 0),
    ("add_norm", 0),
    ("all_reduce_norm", 0),
    ("rope_append", 0),
    ("attention_decode_64", Attention::shared_bytes(16, 64)),
    ("attention_decode_128", Attention::shared_bytes(16, 128)),
    ("attention_decode_192", Attention::shared_bytes(16, 192)),
    ("attention_prefill_64", Attention::shared_bytes(64, 64)),
    ("attention_prefill_128", Attention::shared_bytes(64, 128)),
    ("attention_prefill_192", Attention::shared_bytes(64, 192)),
    ("attention_combine", 0),
    ("gemm_8", Gemm::shared_bytes(8)),
    ("gemm_16", Gemm::shared_bytes(16)),
    ("gemm_32", Gemm::shared_bytes(32)),
    ("gemm_64", Gemm::shared_bytes(64)),
    ("gemm_reduce", 0),
    ("gather_rows", 0),
    ("sample", 0),
];

impl Embed {
    pub fn launch(&self) -> Launch {
        Launch::new("embed", [self.rows, 1, 1], warps_for(self.hidden / 8, 256), 0, self)
    }
}

impl AddNorm {
    pub fn launch(&self) -> Launch {
        assert!(self.y.address == 0 || self.indices.address == 0, "a gathered row has nothing added to it");
        Launch::new("add_norm", [self.rows, 1, 1], norm_threads(self.hidden), 0, self)
    }
}

impl AllReduceNorm {
    /// Of one launch. With more, NCCL's transfers are as fast; and all blocks must be on the device at once, on every rank, as they wait
    /// for each other.
    pub const MAX_ROWS: u32 = 8;
    /// Blocks that share a row.
    pub(crate) const SLICES: u32 = 8;
    /// Words of an area before its numbers.
    pub(crate) const FLAGS: u32 = Self::MAX_ROWS * Self::SLICES * MAX_PEERS;

    /// Bytes of an area, and of `counts`.
    pub const fn bytes(hidden: usize) -> (usize, usize) {
        let (rows, slices) = (Self::MAX_ROWS as usize, Self::SLICES as usize);
        (4 * (Self::FLAGS as usize + 2 * rows * hidden), 4 * (rows * slices + rows))
    }

    pub fn launch(&self, rows: u32) -> Launch {
        assert!(matches!(self.ranks, 2 | 4 | 8) && self.rank < self.ranks, "rank {} of {}", self.rank, self.ranks);
        assert!(rows <= Self::MAX_ROWS, "{rows} rows");
        Launch::new("all_reduce_norm", [Self::SLICES, rows, 1], norm_threads(self.hidden), 0, self)
    }
}

impl RopeAppend {
    pub fn launch(&self) -> Launch {
        let width = (self.heads + 2 * self.kv_heads) * self.head_dim;
        Launch::new("rope_append", [self.rows, 1, 1], warps_for(width / 8, 512), 0, self)
    }
}

impl Attention {
    /// Tokens that one tile of a prefill may hold.
    pub fn tile_tokens(heads: u32, kv_heads: u32) -> u32 {
        MAX_GROUP / (heads / kv_heads)
    }

    /// Splits of a row that stands at `position`.
    pub fn splits(position: u32) -> u32 {
        position / SPLIT_TOKENS + 1
    }

    /// Bytes of `sums` and of `stats`.
    pub fn workspace_bytes(rows: u32, heads: u32, head_dim: u32, splits: u32) -> (usize, usize) {
        let parts = rows as usize * heads as usize * splits as usize;
        (parts * head_dim as usize * 4, parts * 2 * 4)
    }

    /// q, two blocks of 64 keys and values, weights, and maxima of each warp.
    const fn shared_bytes(rows: u32, dim: u32) -> u32 {
        let warps = if rows == 16 { 4 } else { 8 };
        rows * dim * 2 + 2 * 2 * 64 * dim * 2 + rows * 64 * 2 + warps * rows * 4
    }

    pub fn launch(&self) -> Launch {
        let group = self.heads / self.kv_heads;
        assert!(
            group <= MAX_GROUP && self.head_dim <= MAX_HEAD_DIM && self.head_dim.is_multiple_of(8),
            "see Sizes::check"
        );
        // Both shapes give the same bits; the small one has less to wait for.
        let is_small = self.tiles.address == 0 && group <= 16;
        let (kernel, dim) = match (self.head_dim, is_small) {
            (..=64, true) => ("attention_decode_64", 64),
            (65..=128, true) => ("attention_decode_128", 128),
            (_, true) => ("attention_decode_192", 192),
            (..=64, false) => ("attention_prefill_64", 64),
            (65..=128, false) => ("attention_prefill_128", 128),
            (_, false) => ("attention_prefill_192", 192),
        };
        let (rows, threads) = if is_small { (16, 128) } else { (64, 256) };
        let grid = [self.num_tiles, self.kv_heads, self.splits];
        Launch::new(kernel, grid, threads, Self::shared_bytes(rows, dim), self)
    }
}

impl AttentionCombine {
    pub fn launch(&self) -> Launch {
        Launch::new("attention_combine", [self.rows, self.heads, 1], warps_for(self.head_dim / 4, 64), 0, self)
    }
}

impl Gemm {
    /// Rows of W of one block, and columns of one stage of its pipeline.
    pub(crate) const TILE_N: u32 = 128;
    pub(crate) const STAGE_COLS: u32 = 64;
    pub(crate) const STAGES: u32 = 3;

    const fn shared_bytes(rows: u32) -> u32 {
        Self::STAGES * (Self::TILE_N + rows) * Self::STAGE_COLS * 2
    }

    /// Into how many parts the sums of a matrix are best cut: enough that some 250 blocks stream weights at once, in the whole of a part's
    /// length. The bits of a row depend on it, so for equal bits on every mesh it is asked for the smallest shard that any mesh has: `n`
    /// rows and, of `chunks` on this rank (1 for matrices that are split by rows), `cols / chunks` columns.
    pub fn parts(n: u32, cols: u32, chunks: u32) -> u32 {
        let chunk = cols / chunks;
        let mut parts = 1;
        while parts < MAX_PARTS / 8
            && n.div_ceil(Self::TILE_N) * parts < 200
            && chunk / parts >= 2048
            && (chunk / parts).is_multiple_of(16)
        {
            parts *= 2;
        }
        chunks * parts
    }

    pub fn launch(&self) -> Launch {
        let Self { rows, n, cols, parts, .. } = *self;
        assert!(
            parts.is_power_of_two() && parts <= MAX_PARTS && cols.is_multiple_of(8 * parts),
            "{cols} columns in {parts} parts"
        );
        // A row's sums are the same in every tile height.
        let (kernel, tile) = match rows {
            ..=8 => ("gemm_8", 8),
            9..=16 => ("gemm_16", 16),
            17..=32 => ("gemm_32", 32),
            _ => ("gemm_64", 64),
        };
        // Tiles of rows run beside each other, so that their weights are read from memory once.
        let grid = [rows.div_ceil(tile), n.div_ceil(Self::TILE_N), parts];
        Launch::new(kernel, grid, 128, Self::shared_bytes(tile), self)
    }
}

impl GemmReduce {
    pub fn launch(&self) -> Launch {
        assert!(self.parts.is_power_of_two() && self.parts <= MAX_PARTS && self.count.is_multiple_of(4), "{self:?}");
        let blocks = self.count.div_ceil(256 * 4).min(u64::from(u32::MAX >> 1)) as u32;
        Launch::new("gemm_reduce", [blocks, 1, 1], 256, 0, self)
    }
}

impl GatherRows {
    pub fn launch(&self) -> Launch {
        Launch::new("gather_rows", [self.rows, 1, 1], warps_for(self.width / 4, 256), 0, self)
    }
}

impl Sample {
    pub fn launch(&self) -> Launch {
        Launch::new("sample", [self.num_rows, 1, 1], 1024, 0, self)
    }
}

/// Threads of whole warps, one for each of `items` up to `most`.
fn warps_for(items: u32, most: u32) -> u32 {
    items.next_multiple_of(32).clamp(32, most)
}

/// Threads that hold a row of the residual stream, at least one group of four numbers each.
fn norm_threads(hidden: u32) -> u32 {
    warps_for(hidden / 4, 1024)
}
