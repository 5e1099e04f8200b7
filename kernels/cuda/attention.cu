// Causal attention over a paged cache with grouped queries, for decode and prefill alike.
//
// A block computes the rows of one tile (tokens · the query heads of one KV head) over one split of SPLIT_TOKENS positions, in blocks of
// KEYS keys with a running maximum. What a row's result is made of is fixed: scores are chains over the head in steps of 16; weights are
// rounded to bf16; their sum, and those of the values, are chains over the keys in steps of 16; splits are joined in order. So it has the
// same bits in any tile, in decode and in prefill. Keys that a row does not see have weight 0 and change nothing.
#include "device.h"

static constexpr u32 KEYS = 64;

// Elements of a row of DIM in shared memory lie in 16-byte groups; group g of row r lies at g with its low bits turned by r % 8, so
// that ldmatrix reads eight rows without meeting in a bank.
template <u32 DIM>
DEVICE u32 place(u32 row, u32 group) {
    return row * DIM + (group ^ row % 8) * 8;
}

// ROWS rows, computed by ROWS / 8 + 2 … warps: 16 rows by four warps, 64 by eight. Warps share out keys for scores and dimensions for sums.
template <u32 ROWS, u32 DIM, u32 WARPS>
DEVICE void attend(const Attention& args) {
    constexpr u32 THREADS = WARPS * 32, GROUPS = DIM / 8, TALL = ROWS / 16;
    constexpr u32 KEY_TILES = KEYS / 8 / WARPS;                       // of a warp, 8 keys each
    constexpr u32 DIM_TILES = (DIM / 8 + WARPS - 1) / WARPS;          // of a warp, 8 dimensions each
    DYNAMIC_SHARED(shared);
    bf16* queries = reinterpret_cast<bf16*>(shared);                  // [ROWS, DIM]
    bf16* cache = queries + ROWS * DIM;                               // [2 stages][keys, values][KEYS, DIM]
    bf16* weights = cache + 4 * KEYS * DIM;                           // [ROWS, KEYS]
    float* maxima = reinterpret_cast<float*>(weights + ROWS * KEYS);  // [WARPS, ROWS]

    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 kv_head = blockIdx.y, group = args.heads / args.kv_heads, split = blockIdx.z;
    AttentionTile tile;
    if (args.tiles) {
        tile = args.tiles[blockIdx.x];
    } else {
        const u32 position = args.positions[blockIdx.x];
        tile = {blockIdx.x, position == NO_ROW ? 0u : 1u, position, args.first_pages[blockIdx.x]};
    }
    const u32 rows = tile.num_tokens * group;
    const u32 split_begin = split * SPLIT_TOKENS;
    if (tile.num_tokens == 0 || split_begin >= tile.first_position + tile.num_tokens) return;
    const u32 split_end = min(split_begin + SPLIT_TOKENS, tile.first_position + tile.num_tokens);
    const u32 blocks = ceil_div(split_end - split_begin, KEYS);
    const u32 groups_used = args.head_dim / 8;

    // Head of a row's query, and of its result.
    const auto head_of = [&](u32 r) {
        return static_cast<u64>(tile.first_row + r / group) * args.heads + kv_head * group + r % group;
    };
    for (u32 i = threadIdx.x; i < ROWS * GROUPS; i += THREADS) {
        const u32 r = i / GROUPS, g = i % GROUPS;
        const bool valid = r < rows && g < groups_used;
        copy_async(queries + place<DIM>(r, g), valid ? args.q + head_of(r) * args.head_dim + g * 8 : args.q, valid);
    }
    const auto start_block = [&](u32 block) {
        bf16* keys = cache + block % 2 * 2 * KEYS * DIM;
        if (block < blocks) {
            for (u32 i = threadIdx.x; i < KEYS * GROUPS; i += THREADS) {
                const u32 r = i / GROUPS, g = i % GROUPS, position = split_begin + block * KEYS + r;
                const bool valid = position < split_end && g < groups_used;
                const bf16* key = args.kv;
                if (valid) {
                    const u32 page = args.page_table[tile.first_page + position / args.page_tokens];
                    const u64 part = (static_cast<u64>(page) * args.kv_heads + kv_head) * 2;
                    key += (part * args.page_tokens + position % args.page_tokens) * args.head_dim + g * 8;
                }
                copy_async(keys + place<DIM>(r, g), key, valid);
                // Values that nobody sees must be zeros: a weight of 0 does not hide a NaN.
                const u64 to_value = static_cast<u64>(args.page_tokens) * args.head_dim;
                copy_async(keys + KEYS * DIM + place<DIM>(r, g), valid ? key + to_value : key, valid);
            }
        }
        commit_copies();
    };
    start_block(0);

    const float scale = rsqrtf(static_cast<float>(args.head_dim)) * 1.44269504f;  // log2 e: weights are powers of 2
    float top[TALL][2], total[TALL][4] = {}, sums[TALL][DIM_TILES][4] = {};
    UNROLL
    for (u32 m = 0; m < TALL; ++m) top[m][0] = top[m][1] = -infinity();

    for (u32 block = 0; block < blocks; ++block) {
        start_block(block + 1);
        wait_copies<1>();
        __syncthreads();
        const bf16* keys = cache + block % 2 * 2 * KEYS * DIM;
        const bf16* values = keys + KEYS * DIM;

        // Scores of this warp's keys.
        float scores[TALL][KEY_TILES][4] = {};
        UNROLL
        for (u32 k = 0; k < GROUPS; k += 2) {
            u32 b[4];
            if constexpr (KEY_TILES == 2) {
                const u32 r = warp * 16 + lane / 16 * 8 + lane % 8;
                load_matrices(b, keys + place<DIM>(r, k + lane / 8 % 2));
            } else {
                const u32 r = warp * 8 + lane % 8;
                load_matrices(b, keys + place<DIM>(r, k + lane / 8 % 2));
            }
            UNROLL
            for (u32 m = 0; m < TALL; ++m) {
                u32 a[4];
                load_matrices(a, queries + place<DIM>(m * 16 + lane % 16, k + lane / 16));
                UNROLL
                for (u32 n = 0; n < KEY_TILES; ++n) mma(scores[m][n], a, b[2 * n], b[2 * n + 1]);
            }
        }

        // Each row's largest score: a maximum has the same bits in any order.
        UNROLL
        for (u32 m = 0; m < TALL; ++m) {
            UNROLL
            for (u32 h = 0; h < 2; ++h) {
                const u32 r = m * 16 + h * 8 + lane / 4;
                const u32 position = tile.first_position + r / group;
                float most = -infinity();
                UNROLL
                for (u32 n = 0; n < KEY_TILES; ++n) {
                    UNROLL
                    for (u32 i = 0; i < 2; ++i) {
                        const u32 key = split_begin + block * KEYS + (warp * KEY_TILES + n) * 8 + lane % 4 * 2 + i;
                        float& score = scores[m][n][h * 2 + i];
                        score = r < rows && key <= position ? score * scale : -infinity();
                        most = fmaxf(most, score);
                    }
                }
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 1));
                most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, 2));
                if (lane % 4 == 0) maxima[warp * ROWS + r] = most;
            }
        }
        __syncthreads();

        UNROLL
        for (u32 m = 0; m < TALL; ++m) {
            UNROLL
            for (u32 h = 0; h < 2; ++h) {
                const u32 r = m * 16 + h * 8 + lane / 4;
                float most = top[m][h];
                for (u32 w = 0; w < WARPS; ++w) most = fmaxf(most, maxima[w * ROWS + r]);
                // A row that has seen nothing yet has no maximum to be relative to.
                const float base = most == -infinity() ? 0.0f : most;
                const float shrink = exp2f(top[m][h] - base);
                top[m][h] = most;
                UNROLL
                for (u32 n = 0; n < KEY_TILES; ++n) {
                    const u32 column = (warp * KEY_TILES + n) * 8 + lane % 4 * 2;
                    const float p0 = exp2f(scores[m][n][h * 2] - base), p1 = exp2f(scores[m][n][h * 2 + 1] - base);
                    *reinterpret_cast<u32*>(weights + place<KEYS>(r, column / 8) + column % 8) = pack_bf16(p0, p1);
                }
                total[m][h * 2] *= shrink;
                total[m][h * 2 + 1] *= shrink;
                UNROLL
                for (u32 n = 0; n < DIM_TILES; ++n) {
                    sums[m][n][h * 2] *= shrink;
                    sums[m][n][h * 2 + 1] *= shrink;
                }
            }
        }
        __syncthreads();

        // Weighted sums of values, this warp's dimensions; with ones in place of values the same gives the sum of weights.
        UNROLL
        for (u32 k = 0; k < KEYS / 16; k += 2) {
            u32 a[2][TALL][4];
            UNROLL
            for (u32 m = 0; m < TALL; ++m) {
                UNROLL
                for (u32 j = 0; j < 2; ++j) {
                    load_matrices(a[j][m], weights + place<KEYS>(m * 16 + lane % 16, (k + j) * 2 + lane / 16));
                    mma(total[m], a[j][m], 0x3f803f80u, 0x3f803f80u);
                }
            }
            UNROLL
            for (u32 n = 0; n < DIM_TILES; ++n) {
                const u32 g = n * WARPS + warp;
                if (g < GROUPS) {
                    u32 b[4];
                    load_matrices_transposed(b, values + place<DIM>(k * 16 + lane, g));
                    UNROLL
                    for (u32 m = 0; m < TALL; ++m) {
                        mma(sums[m][n], a[0][m], b[0], b[1]);
                        mma(sums[m][n], a[1][m], b[2], b[3]);
                    }
                }
            }
        }
        // The weights, the maxima and this block's place may be overwritten.
        __syncthreads();
    }
    wait_copies<0>();

    UNROLL
    for (u32 m = 0; m < TALL; ++m) {
        UNROLL
        for (u32 h = 0; h < 2; ++h) {
            const u32 r = m * 16 + h * 8 + lane / 4;
            const u32 position = tile.first_position + r / group;
            if (r >= rows || position < split_begin) continue;
            const u64 head = head_of(r);
            const bool is_whole = position < SPLIT_TOKENS;
            const u64 part = head * args.splits + split;
            if (!is_whole && warp == 0 && lane % 4 == 0) {
                args.stats[part * 2] = top[m][h];
                args.stats[part * 2 + 1] = total[m][h * 2];
            }
            UNROLL
            for (u32 n = 0; n < DIM_TILES; ++n) {
                const u32 d = (n * WARPS + warp) * 8 + lane % 4 * 2;
                if (d >= args.head_dim) continue;
                const float x = sums[m][n][h * 2], y = sums[m][n][h * 2 + 1];
                if (is_whole) {
                    const float sum = total[m][h * 2];
                    *reinterpret_cast<u32*>(args.out + head * args.head_dim + d) = pack_bf16(x / sum, y / sum);
                } else {
                    *reinterpret_cast<float2*>(args.sums + part * args.head_dim + d) = {x, y};
                }
            }
        }
    }
}

KERNEL(attention_decode_64, Attention, 128) { attend<16, 64, 4>(args); }
KERNEL(attention_decode_128, Attention, 128) { attend<16, 128, 4>(args); }
KERNEL(attention_decode_192, Attention, 128) { attend<16, 192, 4>(args); }
KERNEL(attention_prefill_64, Attention, 256) { attend<64, 64, 8>(args); }
KERNEL(attention_prefill_128, Attention, 256) { attend<64, 128, 8>(args); }
KERNEL(attention_prefill_192, Attention, 256) { attend<64, 192, 8>(args); }

// One block a row and head; a thread has four neighbouring dimensions.
KERNEL(attention_combine, AttentionCombine, 64) {
    const u32 position = args.positions[blockIdx.x];
    if (position == NO_ROW || position < SPLIT_TOKENS) return;
    const u32 splits = position / SPLIT_TOKENS + 1;
    const u64 head = static_cast<u64>(blockIdx.x) * args.heads + blockIdx.y;
    const float2* stats = reinterpret_cast<const float2*>(args.stats) + head * args.splits;
    float top = -infinity();
    for (u32 s = 0; s < splits; ++s) top = fmaxf(top, stats[s].x);
    float total = 0.0f;
    for (u32 s = 0; s < splits; ++s) total += exp2f(stats[s].x - top) * stats[s].y;
    for (u32 i = threadIdx.x; i < args.head_dim / 4; i += blockDim.x) {
        float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        for (u32 s = 0; s < splits; ++s) {
            const float weight = exp2f(stats[s].x - top);
            const float4 v = reinterpret_cast<const float4*>(args.sums + (head * args.splits + s) * args.head_dim)[i];
            sum = make_float4(sum.x + weight * v.x, sum.y + weight * v.y, sum.z + weight * v.z, sum.w + weight * v.w);
        }
        const uint2 words = make_uint2(pack_bf16(sum.x / total, sum.y / total), pack_bf16(sum.z / total, sum.w / total));
        reinterpret_cast<uint2*>(args.out + head * args.head_dim)[i] = words;
    }
}
