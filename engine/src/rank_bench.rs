//! One rank's part of a model alone on a device: what its steps cost when the other ranks cost nothing. The shapes, kernels and memory are
//! those of the real run; weights are random, and collectives leave their buffers as they are.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::cuda::{CudaBackend, CudaOptions, Device};
use crate::backend::{ComputeType, StepBatch};
use crate::checkpoint::RandomWeights;
use crate::collective::alone::{NcclAlone, try_alone};
use crate::collective::nccl::NcclCollective;
use crate::config::{Mesh, ModelConfig};
use crate::model::Model;
use crate::rank::EngineError;
use crate::spec::{LOGIT_ROWS, Limits};

/// What is measured of.
#[derive(Clone, Debug)]
pub struct BenchSpec {
    pub config: ModelConfig,
    pub mesh: Mesh,
    pub rank: usize,
    pub ordinal: usize,
    pub library_folders: Vec<PathBuf>,
    /// Positions in the cache before each decoded token.
    pub context: usize,
    /// Rows that decode together at most.
    pub max_batch: usize,
    /// Tokens of the longest prompt.
    pub max_prompt: usize,
}

/// What the device itself can do, measured beside the steps.
#[derive(Clone, Copy, Debug, serde::Serialize)]
pub struct Ceilings {
    /// Bytes/s of a copy inside the device's memory, reads and writes both counted.
    pub copy_gb_s: f64,
    /// Operations/s of a large bf16 product.
    pub matmul_tflops: f64,
}

/// A loaded rank.
pub struct RankBench {
    model: Model<CudaBackend, Option<NcclCollective>>,
    ceilings: Ceilings,
    device: Arc<Device>,
    library_folders: Vec<PathBuf>,
    context: usize,
    pages_per_row: usize,
}

const PAGE_TOKENS: usize = 16;

impl RankBench {
    /// Measures the device's ceilings, then loads the rank.
    ///
    /// # Errors
    /// The device is not usable or too small.
    pub fn load(spec: BenchSpec) -> Result<Self, EngineError> {
        let BenchSpec { config, mesh, rank, context, max_batch, max_prompt, .. } = spec;
        let longest = max_prompt.max(context + 1);
        let pages_per_row = longest.div_ceil(PAGE_TOKENS);
        let limits = Limits {
            page_tokens: PAGE_TOKENS,
            num_pages: pages_per_row.max((context + 1).div_ceil(PAGE_TOKENS) * max_batch),
            max_step_tokens: max_prompt.max(max_batch),
            max_sequences: max_batch,
        };
        let options = CudaOptions {
            ordinal: spec.ordinal,
            library_folders: spec.library_folders.clone(),
            limits,
            max_context: config.max_context.max(longest),
        };
        let backend = CudaBackend::new(&options, ComputeType::Bf16)?;
        let product_size = config.hidden_size.next_multiple_of(128).min(8192);
        let (copy, product) = (backend.copy_bandwidth()?, backend.product_flops(product_size)?);
        let ceilings = Ceilings { copy_gb_s: copy / 1e9, matmul_tflops: product / 1e12 };
        let device = Arc::clone(backend.device());
        let source = RandomWeights::new(config);
        let model = Model::load(backend, None, &source, mesh, rank, &limits, |_| {})?;
        Ok(Self { model, ceilings, device, library_folders: spec.library_folders, context, pages_per_row })
    }

    /// What NCCL does on this device, with this rank alone.
    ///
    /// # Errors
    /// It is not there, or does not work.
    pub fn nccl(&self) -> Result<NcclAlone, EngineError> {
        Ok(try_alone(&self.device, &self.library_folders)?)
    }

    pub fn ceilings(&self) -> Ceilings {
        self.ceilings
    }

    /// The time of a step in which `rows` rows decode one token each, the median of several; logits included where this rank has them.
    ///
    /// # Errors
    /// The device failed.
    pub fn decode(&mut self, rows: usize) -> Result<Duration, EngineError> {
        let mut batch = StepBatch::default();
        let pages_per_row = (self.context + 1).div_ceil(PAGE_TOKENS);
        for row in 0..rows {
            let first = (row * pages_per_row) as u32;
            let pages: Vec<u32> = (first..first + pages_per_row as u32).collect();
            batch.push(self.context as u32, &[row as u32], &pages);
        }
        batch.num_generated = rows;
        let wanted: Vec<u32> = (0..rows as u32).collect();
        self.median(&batch, &wanted)
    }

    /// The time of a step that computes a prompt of `tokens` tokens, the median of several.
    ///
    /// # Errors
    /// The device failed.
    pub fn prefill(&mut self, tokens: usize) -> Result<Duration, EngineError> {
        let mut batch = StepBatch::default();
        let ids: Vec<u32> = (0..tokens as u32).collect();
        let pages: Vec<u32> = (0..self.pages_per_row as u32).collect();
        batch.push(0, &ids, &pages);
        self.median(&batch, &[tokens as u32 - 1])
    }

    fn median(&mut self, batch: &StepBatch, wanted: &[u32]) -> Result<Duration, EngineError> {
        /// The first two record what later ones replay.
        const WARM_UP: usize = 3;
        const RUNS: usize = 11;
        let mut times = Vec::with_capacity(RUNS);
        for run in 0..WARM_UP + RUNS {
            let start = Instant::now();
            self.model.forward(batch)?;
            for rows in wanted.chunks(LOGIT_ROWS) {
                self.model.compute_logits(rows)?;
            }
            self.model.finish(None)?;
            if run >= WARM_UP {
                times.push(start.elapsed());
            }
        }
        times.sort_unstable();
        Ok(times[RUNS / 2])
    }
}
