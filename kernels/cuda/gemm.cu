// y = x · Wᵀ for few rows: bound by reading W once. W's rows are the tall side of the tensor cores' tiles and x's rows the narrow one, so
// eight rows cost no more than one. Every sum is one chain over its part of the columns, sixteen at a time in order, whatever the tile,
// so a row's bits do not depend on the rows beside it.
#include "device.h"

static constexpr u32 TILE_N = GEMM_TILE_N, STAGE_COLS = GEMM_STAGE_COLS, STAGES = GEMM_STAGES;
// 16-byte groups of a stage's row. Group g of row r lies at g ^ (r % 8), so that neither the copies nor ldmatrix meet in a bank.
static constexpr u32 GROUPS = STAGE_COLS / 8;

DEVICE float relu2(float v) { return v > 0.0f ? v * v : 0.0f; }

// Two bf16 operands need a NaN to stay one; v > 0 is false for it.
DEVICE float stored(float v, u32 store) { return store == STORE_RELU2_BF16 && v == v ? relu2(v) : v; }

// Starts copying rows first .. first + count of a [limit, cols] matrix, columns col .. col + STAGE_COLS; zeros beyond `limit` and `end`.
template <u32 count>
DEVICE void copy_stage(bf16* to, const bf16* matrix, u32 first, u32 limit, u64 cols, u32 col, u32 end) {
    for (u32 i = threadIdx.x; i < count * GROUPS; i += 128) {
        const u32 r = i / GROUPS, g = i % GROUPS;
        const bool valid = first + r < limit && col + g * 8 < end;
        const bf16* from = valid ? matrix + (first + r) * cols + col + g * 8 : matrix;
        copy_async(to + r * STAGE_COLS + (g ^ r % 8) * 8, from, valid);
    }
}

// Grid (tiles of ROWS rows, tiles of TILE_N columns of y, parts); each of four warps has 32 of W's rows.
template <u32 ROWS>
DEVICE void multiply(const Gemm& args) {
    constexpr u32 NARROW = ROWS / 8;
    constexpr u32 STAGE = (TILE_N + ROWS) * STAGE_COLS;
    DYNAMIC_SHARED(shared);
    bf16* stages = reinterpret_cast<bf16*>(shared);
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const u32 first_row = blockIdx.x * ROWS, first_n = blockIdx.y * TILE_N;
    const u32 length = args.cols / args.parts, begin = blockIdx.z * length, end = begin + length;
    const u32 steps = ceil_div(length, STAGE_COLS);

    const auto start_stage = [&](u32 step) {
        bf16* w = stages + step % STAGES * STAGE;
        if (step < steps) {
            copy_stage<TILE_N>(w, args.w, first_n, args.n, args.cols, begin + step * STAGE_COLS, end);
            copy_stage<ROWS>(w + TILE_N * STAGE_COLS, args.x, first_row, args.rows, args.cols, begin + step * STAGE_COLS, end);
        }
        commit_copies();
    };
    for (u32 step = 0; step < STAGES - 1; ++step) start_stage(step);

    float sums[2][NARROW][4] = {};
    for (u32 step = 0; step < steps; ++step) {
        wait_copies<STAGES - 2>();
        // This step's copies of all threads are there, and nobody still reads the stage that is filled next.
        __syncthreads();
        start_stage(step + STAGES - 1);
        const bf16* w = stages + step % STAGES * STAGE + warp * 32 * STAGE_COLS;
        const bf16* x = stages + step % STAGES * STAGE + TILE_N * STAGE_COLS;
        UNROLL
        for (u32 k = 0; k < GROUPS; k += 2) {
            u32 a[2][4];
            UNROLL
            for (u32 m = 0; m < 2; ++m) {
                const u32 r = m * 16 + lane % 16;
                load_matrices(a[m], w + r * STAGE_COLS + ((k + lane / 16) ^ r % 8) * 8);
            }
            if constexpr (NARROW == 1) {
                // Lanes 16.. name rows again whose words nobody uses.
                u32 b[4];
                load_matrices(b, x + lane % 8 * STAGE_COLS + ((k + lane / 8 % 2) ^ lane % 8) * 8);
                UNROLL
                for (u32 m = 0; m < 2; ++m) mma(sums[m][0], a[m], b[0], b[1]);
            } else {
                UNROLL
                for (u32 n = 0; n < NARROW; n += 2) {
                    u32 b[4];
                    const u32 r = n * 8 + lane / 16 * 8 + lane % 8;
                    load_matrices(b, x + r * STAGE_COLS + ((k + lane / 8 % 2) ^ r % 8) * 8);
                    UNROLL
                    for (u32 m = 0; m < 2; ++m) {
                        mma(sums[m][n], a[m], b[0], b[1]);
                        mma(sums[m][n + 1], a[m], b[2], b[3]);
                    }
                }
            }
        }
    }
    wait_copies<0>();

    UNROLL
    for (u32 m = 0; m < 2; ++m) {
        UNROLL
        for (u32 n = 0; n < NARROW; ++n) {
            UNROLL
            for (u32 i = 0; i < 4; ++i) {
                const u32 row = first_row + n * 8 + lane % 4 * 2 + i % 2, column = first_n + warp * 32 + m * 16 + i / 2 * 8 + lane / 4;
                if (row >= args.rows || column >= args.n) continue;
                const u64 at = static_cast<u64>(row) * args.n + column;
                const float v = sums[m][n][i];
                if (args.parts > 1)
                    static_cast<float*>(args.out)[static_cast<u64>(blockIdx.z) * args.rows * args.n + at] = v;
                else if (args.store == STORE_F32)
                    static_cast<float*>(args.out)[at] = v;
                else
                    static_cast<bf16*>(args.out)[at].bits = static_cast<u16>(pack_bf16(stored(v, args.store), 0.0f));
            }
        }
    }
}

KERNEL(gemm_8, Gemm, 128) { multiply<8>(args); }
KERNEL(gemm_16, Gemm, 128) { multiply<16>(args); }
KERNEL(gemm_32, Gemm, 128) { multiply<32>(args); }
KERNEL(gemm_64, Gemm, 128) { multiply<64>(args); }

// Four sums a thread.
KERNEL(gemm_reduce, GemmReduce, 256) {
    const u64 at = static_cast<u64>(blockIdx.x) * blockDim.x + threadIdx.x;
    if (at >= args.count / 4) return;
    const float4* partials = reinterpret_cast<const float4*>(args.partials);
    const float4 sum = tree_sum(args.parts, [&](u32 part) { return partials[part * (args.count / 4) + at]; });
    if (args.store == STORE_F32) {
        static_cast<float4*>(args.out)[at] = sum;
    } else {
        const u32 low = pack_bf16(stored(sum.x, args.store), stored(sum.y, args.store));
        static_cast<uint2*>(args.out)[at] = make_uint2(low, pack_bf16(stored(sum.z, args.store), stored(sum.w, args.store)));
    }
}
