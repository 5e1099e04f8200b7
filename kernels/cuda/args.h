// Written by `cargo run -p nemotron-kernels --bin compile-kernels` from src/ops.rs: change it there.
#pragma once

static constexpr unsigned SPLIT_TOKENS = 256u;
static constexpr unsigned NO_ROW = 4294967295u;
static constexpr unsigned GEMM_TILE_N = 128u;
static constexpr unsigned GEMM_STAGE_COLS = 64u;
static constexpr unsigned GEMM_STAGES = 3u;
static constexpr unsigned STORE_F32 = 0u;
static constexpr unsigned STORE_BF16 = 1u;
static constexpr unsigned STORE_RELU2_BF16 = 2u;
static constexpr unsigned REDUCE_ROWS = 8u;
static constexpr unsigned REDUCE_SLICES = 8u;
static constexpr unsigned REDUCE_FLAGS = 512u;
static constexpr unsigned NOT_FINITE = 4294967295u;
static constexpr unsigned CHOSEN = 2147483648u;

// x[r] = table[tokens[r] − first_id], or zeros where this rank's part of the vocabulary does not hold that id.
struct Embed {
    // [rows]; those with [`CHOSEN`] stand for ids that the host does not know yet.
    unsigned* tokens;
    // [slots]: where [`Sample`] puts tokens.
    unsigned* chosen;
    // [vocab, hidden]
    bf16* table;
    // [rows, hidden]
    float* x;
    unsigned rows;
    unsigned hidden;
    unsigned first_id;
    // Ids in `table`.
    unsigned vocab;
};

// x += y (if there is a y); out = (x − mean) / sqrt(variance + eps) · scale + shift (if there is a scale).
struct AddNorm {
    // [rows, hidden], updated in place; with `indices`, row r is x[indices[r]].
    float* x;
    // [rows, hidden] or null; null if there are `indices`.
    float* y;
    // [rows] or null.
    unsigned* indices;
    // 1 + γ, [hidden], or null.
    float* scale;
    // β, [hidden]
    float* shift;
    // [rows, hidden]
    bf16* out;
    unsigned rows;
    unsigned hidden;
    float eps;
    unsigned reserved;
};

// As [`AddNorm`] with the sum of all ranks' y, of at most [`AllReduceNorm::MAX_ROWS`] rows, over ranks that see each other's memory:
// x += tree(y of rank 0, y of rank 1, …); out = norm(x). The order of additions is that of gathering every y and adding with
// [`GemmReduce`] and [`AddNorm`], so either way gives the same bits. All ranks launch it with the same shape, as often.
struct AllReduceNorm {
    // Entry i is rank i's area, seen from this rank: its flags, u32 [blocks, 8], then numbers that it shows to the others, f32
    // [2, MAX_ROWS, hidden]. All zero before the first launch.
    unsigned* areas[8];
    // This rank's entry of `areas`.
    unsigned* own_flags;
    // [blocks + MAX_ROWS], of this rank alone: its launches of each block, and blocks that are done with each row; zero before the first.
    unsigned* counts;
    // Whatever is not 0, written by the host, ends the waiting for ranks that do not come; the results are then worthless.
    unsigned* stop;
    // This rank's summand, [rows, hidden].
    float* y;
    // [rows, hidden]
    float* x;
    // 1 + γ, [hidden], or null: no norm.
    float* scale;
    float* shift;
    // [rows, hidden]
    bf16* out;
    unsigned hidden;
    unsigned rank;
    // 2, 4 or 8
    unsigned ranks;
    float eps;
};

// Rotates queries and keys and stores keys and values at their positions.
struct RopeAppend {
    // [rows, (heads + 2 · kv_heads) · head_dim]: q, then k, then v.
    float* qkv;
    // [positions, rotary_dim]: rotary_dim / 2 cosines, then as many sines, of position · θ^(−2i / rotary_dim).
    float* rope;
    // [rows]
    unsigned* positions;
    // [rows]: where each row's pages begin in `page_table`.
    unsigned* first_pages;
    unsigned* page_table;
    // Rotated queries, [rows, heads · head_dim].
    bf16* q;
    // The layer's cache.
    bf16* kv;
    unsigned rows;
    unsigned heads;
    unsigned kv_heads;
    unsigned head_dim;
    // Even, ≤ head_dim.
    unsigned rotary_dim;
    unsigned page_tokens;
};

// Consecutive tokens of one sequence that are attended together; their keys and values are in the cache.
struct AttentionTile {
    unsigned first_row;
    // 0: the tile is padding; at most [`Attention::tile_tokens`].
    unsigned num_tokens;
    unsigned first_position;
    unsigned first_page;
};

// softmax(q · kᵀ / sqrt(head_dim)) · v over all positions up to the row's own. A sequence is cut into splits of
// [`SPLIT_TOKENS`] positions; rows with more than one need [`AttentionCombine`] afterwards.
struct Attention {
    // [rows, heads · head_dim]
    bf16* q;
    bf16* kv;
    unsigned* page_table;
    // [num_tiles], or null: tile i is row i alone (decode).
    AttentionTile* tiles;
    // [rows]
    unsigned* positions;
    // [rows]
    unsigned* first_pages;
    // [rows, heads · head_dim]
    bf16* out;
    // f32 [rows, heads, splits, head_dim], weighted sums of values.
    float* sums;
    // f32 [rows, heads, splits, 2]: largest scaled score (base 2), sum of weights.
    float* stats;
    unsigned num_tiles;
    unsigned heads;
    unsigned kv_heads;
    unsigned head_dim;
    unsigned page_tokens;
    // Splits of the longest row of this launch, or more.
    unsigned splits;
};

// Joins the splits of rows that have several.
struct AttentionCombine {
    float* sums;
    float* stats;
    unsigned* positions;
    // [rows, heads · head_dim]
    bf16* out;
    unsigned rows;
    unsigned heads;
    unsigned head_dim;
    // As given to [`Attention`].
    unsigned splits;
};

// y = x · Wᵀ for few rows, the sum over columns cut into `parts`.
struct Gemm {
    // [rows, cols]
    bf16* x;
    // [n, cols]
    bf16* w;
    // With one part the result as `store` says, [rows, n]; else f32 [parts, rows, n] for [`GemmReduce`].
    void* out;
    unsigned rows;
    unsigned n;
    unsigned cols;
    // A power of two; cols / parts is a multiple of 8.
    unsigned parts;
    // A [`Store`]; used with one part.
    unsigned store;
    unsigned reserved;
};

// Adds a product's parts in a binary tree and stores the sum. With one part it converts: f32 to bf16, or relu².
struct GemmReduce {
    // [parts, count]
    float* partials;
    // [count]
    void* out;
    // Elements, rows · n.
    unsigned long long count;
    unsigned parts;
    // A [`Store`].
    unsigned store;
};

// out[r] = x[indices[r]].
struct GatherRows {
    float* x;
    // [rows]
    unsigned* indices;
    // [rows, width]
    float* out;
    unsigned rows;
    unsigned width;
};

// How one row's token is chosen. The order of operations and the random number are those of the engine's sampler.
struct SampleRow {
    unsigned long long seed;
    unsigned sample;
    // Position of the new token in its row.
    unsigned position;
    // 1: the largest logit, lowest id first; only masks and biases are applied.
    unsigned greedy;
    float temperature;
    // 0: all.
    unsigned top_k;
    // 0 or 1: all.
    float top_p;
    float repetition_penalty;
    float frequency_penalty;
    float presence_penalty;
    // Ids masked now (end of sequence before the minimum length): `ids[first_masked ..][.. num_masked]`.
    unsigned first_masked;
    unsigned num_masked;
    // Biased ids: `ids[first_biased ..]`, and the biases in `biases` at the same indices.
    unsigned first_biased;
    unsigned num_biased;
    // The row's own ids, prompt then new: `ids[first_seen ..]`; none if there is no penalty.
    unsigned first_seen;
    unsigned num_seen;
    // How many of those are the prompt's.
    unsigned num_prompt;
    // Which row of the logits.
    unsigned logits_row;
    // Where in `tokens` the token goes.
    unsigned slot;
};

// tokens[rows[r].slot] = the token of rows[r], or [`NOT_FINITE`]. Changes the logits.
struct Sample {
    // [·, stride]
    float* logits;
    SampleRow* rows;
    unsigned* ids;
    float* biases;
    // [slots]
    unsigned* tokens;
    unsigned num_rows;
    // Ids that may be chosen: 0 .. vocab.
    unsigned vocab;
    // Elements from row to row, at least `vocab`.
    unsigned stride;
    unsigned reserved;
};
