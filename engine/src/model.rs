//! Nemotron's forward pass, written once over [`Backend`] and [`Collective`].
//!
//! This rank holds the layers of its pipeline stage and, of each, its share of heads and FFN. Products whose input is split over
//! ranks (attention output, MLP down) are summed over the tensor-parallel group.

use std::time::Duration;

use crate::backend::{Backend, Begun, HeadShape, NormTo, StepBatch};
use crate::checkpoint::{CheckpointSource, Tensor, TensorName};
use crate::collective::Collective;
use crate::config::Mesh;
use crate::rank::EngineError;
use crate::request::Choice;
use crate::spec::{LOGIT_ROWS, Limits};

/// One rank's part of the model, with its KV cache and the activations of one step.
pub struct Model<B: Backend, C> {
    /// First, so that it goes first: a device that waits for a rank gives nothing back.
    collective: C,
    backend: B,
    /// Rows of the vocabulary from `first_id` on; stage 0.
    embedding: Option<Embedding<B>>,
    layers: Vec<Layer<B>>,
    /// Last stage.
    head: Option<Head<B>>,
    shape: HeadShape,
    norm_eps: f32,
    /// Parts of this rank's sums; see [`ModelConfig::reduction_chunks`](crate::config::ModelConfig::reduction_chunks).
    chunks: usize,
    /// Residual stream, [tokens, hidden]
    x: B::Buffer,
    /// Normalised input of a product, [tokens, hidden]
    h: B::Operand,
    /// [tokens, (heads + 2 · kv_heads) · head_dim]
    qkv: B::Buffer,
    /// [tokens, heads · head_dim]
    attended: B::Operand,
    /// [tokens, ffn]
    ffn: B::Operand,
    /// This rank's summand of a row-parallel product, [tokens, hidden]
    partial: B::Buffer,
}

struct Embedding<B: Backend> {
    /// [vocab / tp, hidden]
    table: B::Matrix,
    first_id: u32,
}

struct Layer<B: Backend> {
    attention_norm: B::Norm,
    /// [(heads + 2 · kv_heads) · head_dim, hidden]: q, k, v
    qkv: B::Matrix,
    /// [hidden, heads · head_dim]
    output: B::Matrix,
    mlp_norm: B::Norm,
    /// [ffn, hidden]
    up: B::Matrix,
    /// [hidden, ffn]
    down: B::Matrix,
    kv: B::KvCache,
}

struct Head<B: Backend> {
    norm: B::Norm,
    /// [vocab / tp, hidden]; of a reward model [attributes, hidden] on every rank
    matrix: B::Matrix,
    /// [attributes] of a reward model
    bias: Option<Vec<f32>>,
    /// [LOGIT_ROWS, hidden]
    x: B::Buffer,
    h: B::Operand,
    /// This rank's columns, [LOGIT_ROWS, vocab / tp]; with one rank the product goes straight to `logits`.
    local: Option<B::Buffer>,
    /// [LOGIT_ROWS, vocab or attributes], complete on tensor-parallel rank 0
    logits: B::Buffer,
    is_sampling: bool,
}

impl<B: Backend, C: Collective<B>> Model<B, C> {
    /// Runs a step through this rank's stage: tokens enter at stage 0, the residual stream goes from stage to stage.
    pub fn forward(&mut self, batch: &StepBatch) -> Result<(), EngineError> {
        let Self { backend, collective, shape, norm_eps: eps, chunks, x, h, qkv, attended, ffn, partial, .. } = self;
        if B::CHOOSES && batch.is_ahead() {
            collective.share_choices(backend)?;
        }
        let Begun::Rows(rows) = backend.begin(batch)? else { return Ok(()) };
        match &self.embedding {
            Some(embedding) => {
                backend.embed(&embedding.table, embedding.first_id, &batch.tokens, x);
                collective.all_reduce(rows, x)?;
            }
            None => collective.recv_previous(rows, x)?,
        }
        let mut layers = self.layers.iter_mut().peekable();
        if let Some(first) = layers.peek() {
            backend.layer_norm(rows, x, &first.attention_norm, *eps, h);
        }
        while let Some(layer) = layers.next() {
            backend.linear(rows, h, &layer.qkv, qkv);
            backend.rope_append(batch, shape, qkv, &mut layer.kv);
            backend.attention(batch, shape, qkv, &layer.kv, attended);
            backend.linear_chunked(rows, attended, &layer.output, *chunks, partial);
            let norm = NormTo { norm: &layer.mlp_norm, eps: *eps, out: h };
            collective.all_reduce_add(backend, rows, x, partial, Some(norm))?;

            backend.linear_relu2(rows, h, &layer.up, ffn);
            backend.linear_chunked(rows, ffn, &layer.down, *chunks, partial);
            let norm = layers.peek().map(|next| NormTo { norm: &next.attention_norm, eps: *eps, out: h });
            collective.all_reduce_add(backend, rows, x, partial, norm)?;
        }
        if self.head.is_none() {
            collective.send_next(rows, x)?;
        }
        Ok(backend.end()?)
    }

    /// Computes the logits of at most [`LOGIT_ROWS`] rows of the last step; whether this rank samples from them.
    /// All ranks of the last stage call it for the same rows.
    pub fn compute_logits(&mut self, rows: &[u32]) -> Result<bool, EngineError> {
        let Self { backend, collective, norm_eps, x, head, .. } = self;
        let Some(head) = head else { return Ok(false) };
        backend.gather_rows(x, rows, &mut head.x);
        backend.layer_norm(rows.len(), &head.x, &head.norm, *norm_eps, &mut head.h);
        match &mut head.local {
            None => backend.linear(rows.len(), &head.h, &head.matrix, &mut head.logits),
            Some(local) => {
                backend.linear(rows.len(), &head.h, &head.matrix, local);
                collective.gather_columns(rows.len(), local, &mut head.logits)?;
            }
        }
        Ok(head.is_sampling)
    }

    /// The first `rows` rows that [`Self::compute_logits`] computed, [rows, vocab], or a reward model's values, [rows, attributes], to be
    /// changed at will.
    ///
    /// # Errors
    /// The device failed, or a rank of the group is gone.
    pub fn logits(&mut self, rows: usize) -> Result<&mut [f32], EngineError> {
        self.finish(None)?;
        let head = self.head.as_mut().expect("only the last stage samples");
        let logits = self.backend.fetch(rows, &mut head.logits)?;
        if let Some(bias) = &head.bias {
            for values in logits.chunks_mut(bias.len()) {
                values.iter_mut().zip(bias).for_each(|(value, bias)| *value += bias);
            }
        }
        Ok(logits)
    }

    /// Lets the device choose a token from each row of the logits; false if it leaves that to the host.
    pub fn choose(&mut self, choices: &[Choice], vocab: usize) -> bool {
        let head = self.head.as_mut().expect("only the last stage samples");
        self.backend.choose(choices, vocab, &mut head.logits)
    }

    /// Ends what the device is asked for in this step, see [`Backend::close`].
    pub fn close(&self) -> usize {
        self.backend.close()
    }

    /// See [`Backend::chosen`].
    pub fn chosen(&self, step: usize, slot: u32) -> Option<u32> {
        self.backend.chosen(step, slot)
    }

    /// For how long this rank has waited for others, see [`Collective::waited`].
    pub fn waited(&self) -> Duration {
        self.collective.waited()
    }

    /// Whether the device has done a step, or everything; waits for it a moment.
    ///
    /// # Errors
    /// The device failed, or a rank of the group is gone.
    pub fn is_done(&self, step: Option<usize>) -> Result<bool, EngineError> {
        let is_done = self.backend.poll(step)?;
        self.collective.check()?;
        Ok(is_done)
    }

    /// Waits until [`Self::is_done`].
    ///
    /// # Errors
    /// As there.
    pub fn finish(&self, step: Option<usize>) -> Result<(), EngineError> {
        while !self.is_done(step)? {}
        Ok(())
    }

    /// Loads what `rank` holds of the checkpoint and allocates its cache and activations.
    /// `progress` is told the share that is done.
    ///
    /// # Errors
    /// The mesh does not divide the model, a tensor cannot be read, or memory is short.
    pub fn load(
        backend: B,
        collective: C,
        source: &dyn CheckpointSource,
        mesh: Mesh,
        rank: usize,
        limits: &Limits,
        progress: impl Fn(f64),
    ) -> Result<Self, EngineError> {
        let config = source.config();
        mesh.check(config)?;
        let (tp, tp_rank) = (mesh.tp, mesh.tp_rank(rank));
        let shape = HeadShape::of_rank(config, tp);
        let shard = |name: TensorName| source.shard(name, mesh, rank);
        let norm = |gamma, beta| -> Result<_, EngineError> { Ok(backend.norm(&shard(gamma)?, &shard(beta)?)?) };
        let matrix = |part: Tensor| backend.matrix(&part);

        let stage_layers = mesh.layers(rank, config);
        let is_first = mesh.stage(rank) == 0;
        let is_last = mesh.stage(rank) == mesh.pp - 1;
        let vocab = config.vocab_size / tp;
        let embedding = if is_first {
            let table = matrix(shard(TensorName::Embedding)?)?;
            Some(Embedding { table, first_id: (tp_rank * vocab) as u32 })
        } else {
            None
        };
        let mut layers = Vec::with_capacity(stage_layers.len());
        for layer in stage_layers.clone() {
            let qkv = Tensor::stack([
                shard(TensorName::Query(layer))?,
                shard(TensorName::Key(layer))?,
                shard(TensorName::Value(layer))?,
            ]);
            layers.push(Layer {
                attention_norm: norm(TensorName::AttentionNormGamma(layer), TensorName::AttentionNormBeta(layer))?,
                qkv: matrix(qkv)?,
                output: matrix(shard(TensorName::Output(layer))?)?,
                mlp_norm: norm(TensorName::MlpNormGamma(layer), TensorName::MlpNormBeta(layer))?,
                up: matrix(shard(TensorName::Up(layer))?)?,
                down: matrix(shard(TensorName::Down(layer))?)?,
                kv: backend.kv_cache(limits.num_pages, limits.page_tokens, &shape)?,
            });
            progress(layers.len() as f64 / stage_layers.len() as f64);
        }
        let head = if is_last {
            let rows = LOGIT_ROWS;
            let (weight, width, bias) = match config.reward {
                None => (shard(TensorName::Head)?, config.vocab_size, None),
                Some(reward) => {
                    let bias = match reward.has_bias {
                        true => shard(TensorName::RewardBias)?.to_f32(),
                        false => vec![0.0; reward.num_attributes],
                    };
                    (shard(TensorName::RewardHead)?, reward.num_attributes, Some(bias))
                }
            };
            Some(Head {
                norm: norm(TensorName::FinalNormGamma, TensorName::FinalNormBeta)?,
                matrix: matrix(weight)?,
                x: backend.buffer(rows, config.hidden_size)?,
                h: backend.operand(rows, config.hidden_size)?,
                local: if tp > 1 && bias.is_none() { Some(backend.buffer(rows, vocab)?) } else { None },
                logits: backend.buffer(rows, width)?,
                bias,
                is_sampling: tp_rank == 0,
            })
        } else {
            None
        };
        let buffer = |width| backend.buffer(limits.max_step_tokens, width);
        let operand = |width| backend.operand(limits.max_step_tokens, width);
        let (x, h, partial) = (buffer(config.hidden_size)?, operand(config.hidden_size)?, buffer(config.hidden_size)?);
        let (qkv, attended) = (buffer(shape.qkv_width())?, operand(shape.heads * shape.head_dim)?);
        let ffn = operand(config.ffn_size / tp)?;
        Ok(Self {
            embedding,
            layers,
            head,
            shape,
            norm_eps: config.norm_eps,
            chunks: (config.reduction_chunks() / tp).max(1),
            x,
            h,
            qkv,
            attended,
            ffn,
            partial,
            backend,
            collective,
        })
    }
}
