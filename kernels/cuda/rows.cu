// Kernels that move rows: embedding and gather.
#include "device.h"

// One block a row.
KERNEL(embed, Embed, 256) {
    const u32 token = args.tokens[blockIdx.x];
    // Ids below first_id wrap around to large numbers.
    const u32 id = (token & CHOSEN ? args.chosen[token & ~CHOSEN] : token) - args.first_id;
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
