// Residual stream and LayerNorm: a row is read once, kept in registers, and written as the next product's operand.
#include "device.h"

// Groups of four numbers that a thread holds; 1024 threads hold MAX_HIDDEN.
static constexpr u32 HELD = 8;

// Reads this thread's groups of a row: group i is number threadIdx.x + i · blockDim.x.
template <class Load>
DEVICE void load_row(float4 (&held)[HELD], u32 hidden, Load load) {
    UNROLL
    for (u32 i = 0; i < HELD; ++i) {
        const u32 at = threadIdx.x + i * blockDim.x;
        held[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
        if (at < hidden / 4) held[i] = load(at);
    }
}

// out = (row − mean) / sqrt(variance + eps) · scale + shift, statistics in two passes over the registers.
DEVICE void normalise(const float4 (&held)[HELD], u32 hidden, float eps, const float* scale, const float* shift, bf16* out, float* scratch) {
    float sum = 0.0f;
    UNROLL
    for (u32 i = 0; i < HELD; ++i) sum += (held[i].x + held[i].y) + (held[i].z + held[i].w);
    const float mean = block_sum(sum, scratch) / static_cast<float>(hidden);
    float squares = 0.0f;
    UNROLL
    for (u32 i = 0; i < HELD; ++i) {
        if (threadIdx.x + i * blockDim.x < hidden / 4) {
            const float x = held[i].x - mean, y = held[i].y - mean, z = held[i].z - mean, w = held[i].w - mean;
            squares += (x * x + y * y) + (z * z + w * w);
        }
    }
    const float inverse = rsqrtf(block_sum(squares, scratch) / static_cast<float>(hidden) + eps);
    UNROLL
    for (u32 i = 0; i < HELD; ++i) {
        const u32 at = threadIdx.x + i * blockDim.x;
        if (at < hidden / 4) {
            const float4 a = reinterpret_cast<const float4*>(scale)[at], b = reinterpret_cast<const float4*>(shift)[at];
            const float x = (held[i].x - mean) * inverse * a.x + b.x, y = (held[i].y - mean) * inverse * a.y + b.y;
            const float z = (held[i].z - mean) * inverse * a.z + b.z, w = (held[i].w - mean) * inverse * a.w + b.w;
            reinterpret_cast<uint2*>(out)[at] = make_uint2(pack_bf16(x, y), pack_bf16(z, w));
        }
    }
}

DEVICE float4 add(float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); }

// One block a row.
KERNEL(add_norm, AddNorm, 1024) {
    SHARED(float, scratch, 32);
    const u32 from = args.indices ? args.indices[blockIdx.x] : blockIdx.x;
    const u64 start = static_cast<u64>(blockIdx.x) * args.hidden;
    float4* x = reinterpret_cast<float4*>(args.x + static_cast<u64>(from) * args.hidden);
    const float4* y = args.y ? reinterpret_cast<const float4*>(args.y + start) : nullptr;
    float4 held[HELD];
    load_row(held, args.hidden, [&](u32 at) {
        float4 v = x[at];
        if (y) x[at] = v = add(v, y[at]);
        return v;
    });
    if (args.scale) normalise(held, args.hidden, args.eps, args.scale, args.shift, args.out + start, scratch);
}

// x += the sum of all ranks' numbers, groups begin .. end of a row.
template <u32 RANKS>
DEVICE void reduce_row(const AllReduceNorm& args, float4* x, u64 staged, u32 begin, u32 end) {
    ROLLED
    for (u32 at = begin + threadIdx.x; at < end; at += blockDim.x) {
        // All ranks' numbers are asked for before the first is used.
        float4 parts[RANKS];
        UNROLL
        for (u32 rank = 0; rank < RANKS; ++rank) parts[rank] = load_peer(reinterpret_cast<const float4*>(args.areas[rank] + staged) + at);
        UNROLL
        for (u32 step = 1; step < RANKS; step *= 2) {
            UNROLL
            for (u32 rank = 0; rank < RANKS; rank += 2 * step) parts[rank] = add(parts[rank], parts[rank + step]);
        }
        x[at] = add(x[at], parts[0]);
    }
}

// A block takes one slice of one row: it stages this rank's numbers, meets the same block of all ranks (it raises its own flag at each
// peer and waits for theirs), and adds what all have staged. Flags hold the number of the meeting, so they are never lowered. Meetings
// stage in two places by turns: when a rank comes to the next meeting it has read this one's numbers. The last block of a row norms it.
KERNEL(all_reduce_norm, AllReduceNorm, 1024) {
    SHARED(float, scratch, 32);
    SHARED(u32, shared, 2);
    const u32 row = blockIdx.y, block = row * REDUCE_SLICES + blockIdx.x, groups = args.hidden / 4;
    if (threadIdx.x == 0) shared[0] = ++args.counts[block];
    __syncthreads();
    const u32 meeting = shared[0];
    // Slices begin at whole lines of memory.
    const u32 length = ceil_div(ceil_div(groups, REDUCE_SLICES), 8) * 8;
    const u32 begin = min(blockIdx.x * length, groups), end = min(begin + length, groups);
    const u64 staged = REDUCE_FLAGS + static_cast<u64>(meeting % 2 * REDUCE_ROWS + row) * args.hidden;
    const u64 start = static_cast<u64>(row) * args.hidden;
    float4* x = reinterpret_cast<float4*>(args.x + start);
    UNROLL
    for (u32 rank = 0; rank < 8; ++rank) {
        if (rank != args.rank) continue;
        float4* own = reinterpret_cast<float4*>(args.areas[rank] + staged);
        for (u32 at = begin + threadIdx.x; at < end; at += blockDim.x) own[at] = reinterpret_cast<const float4*>(args.y + start)[at];
    }
    __syncthreads();
    UNROLL
    for (u32 peer = 0; peer < 8; ++peer) {
        if (threadIdx.x == peer && peer < args.ranks) store_release(args.areas[peer] + block * 8 + args.rank, meeting);
    }
    if (threadIdx.x < args.ranks) {
        const u32* flag = args.own_flags + block * 8 + threadIdx.x;
        // A peer may already have gone on to the next meeting; the difference is right even when the numbers wrap around.
        for (u32 spins = 1; static_cast<int>(load_acquire(flag) - meeting) < 0; ++spins) {
            // The host's word is far away, so it is asked for rarely.
            if (spins % 64 == 0 && load_acquire(args.stop)) break;
            pause_spinning();
        }
    }
    __syncthreads();
    if (args.ranks == 2) reduce_row<2>(args, x, staged, begin, end);
    if (args.ranks == 4) reduce_row<4>(args, x, staged, begin, end);
    if (args.ranks == 8) reduce_row<8>(args, x, staged, begin, end);
    if (!args.scale) return;
    __syncthreads();
    if (threadIdx.x == 0) shared[1] = arrive(args.counts + REDUCE_ROWS * REDUCE_SLICES + row);
    __syncthreads();
    if (shared[1] % REDUCE_SLICES != REDUCE_SLICES - 1) return;
    float4 held[HELD];
    load_row(held, args.hidden, [&](u32 at) { return load_peer(x + at); });
    normalise(held, args.hidden, args.eps, args.scale, args.shift, args.out + start, scratch);
}
