// Kernels that move rows: embedding, gather, and the hand-over of sampled tokens to the next step.
#include "device.h"

// One block a row.
KERNEL(embed, Embed, 256) {
    // Ids below first_id wrap around to large numbers.
    const u32 id = args.tokens[blockIdx.x] - args.first_id;
    const uint4* from = reinterpret_cast<const uint4*>(args.table + static_cast<u64>(id) * args.hidden);
    float4* to = reinterpret_cast<float4*>(args.x + static_cast<u64>(blockIdx.x) * args.hidden);
    for (u32 i = threadIdx.x; i < args.hidden / 8; i += blockDim.x) {
        uint4 words = make_uint4(0, 0, 0, 0);
        if (id < args.vocab) words = from[i];
        to[2 * i] = make_float4(__uint_as_float(words.x << 16), __uint_as_float(words.x & 0xffff0000u), __uint_as_float(words.y << 16),
                                __uint_as_float(words.y & 0xffff0000u));
        to[2 * i + 1] = make_float4(__uint_as_float(words.z << 16), __uint_as_float(words.z & 0xffff0000u),
                                    __uint_as_float(words.w << 16), __uint_as_float(words.w & 0xffff0000u));
    }
}

// One block a row.
KERNEL(gather_rows, GatherRows, 256) {
    const float4* from = reinterpret_cast<const float4*>(args.x + static_cast<u64>(args.indices[blockIdx.x]) * args.width);
    float4* to = reinterpret_cast<float4*>(args.out + static_cast<u64>(blockIdx.x) * args.width);
    for (u32 i = threadIdx.x; i < args.width / 4; i += blockDim.x) to[i] = from[i];
}

// One thread a row.
KERNEL(advance, Advance, 128) {
    const u32 row = blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= args.rows || args.positions[row] == NO_ROW) return;
    const u32 token = args.sampled[row];
    args.tokens[row] = token;
    args.positions[row] += 1;
    if (!args.sample_rows) return;
    SampleRow& next = args.sample_rows[row];
    next.position += 1;
    if (next.num_until_unmasked > 0 && --next.num_until_unmasked == 0) next.num_masked = 0;
    if (next.num_seen > 0) args.ids[next.first_seen + next.num_seen++] = token;
}
