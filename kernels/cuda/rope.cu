// Rotary position embedding, and keys and values to their pages.
#include "device.h"

// One block a row; a thread takes eight neighbouring elements of a head.
KERNEL(rope_append, RopeAppend, 512) {
    const u32 row = blockIdx.x, position = args.positions[row];
    if (position == NO_ROW) return;
    const u32 groups = args.head_dim / 8, half = args.rotary_dim / 2;
    const u32 heads = args.heads, all_heads = args.heads + 2 * args.kv_heads;
    const float* qkv = args.qkv + static_cast<u64>(row) * all_heads * args.head_dim;
    const float* cosines = args.rope + static_cast<u64>(position) * args.rotary_dim;
    const float* sines = cosines + half;
    const u32 page = args.page_table[args.first_pages[row] + position / args.page_tokens];
    for (u32 i = threadIdx.x; i < all_heads * groups; i += blockDim.x) {
        const u32 head = i / groups, first = i % groups * 8;
        const float* from = qkv + head * args.head_dim;
        float v[8];
        UNROLL
        for (u32 j = 0; j < 8; ++j) {
            const u32 at = first + j;
            v[j] = from[at];
            if (head < heads + args.kv_heads && at < args.rotary_dim) {
                if (at < half)
                    v[j] = v[j] * cosines[at] - from[at + half] * sines[at];
                else
                    v[j] = v[j] * cosines[at - half] + from[at - half] * sines[at - half];
            }
        }
        bf16* to;
        if (head < heads) {
            to = args.q + (static_cast<u64>(row) * heads + head) * args.head_dim;
        } else {
            const u32 is_value = head >= heads + args.kv_heads;
            const u32 kv_head = head - heads - (is_value ? args.kv_heads : 0);
            const u64 part = (static_cast<u64>(page) * args.kv_heads + kv_head) * 2 + is_value;
            to = args.kv + (part * args.page_tokens + position % args.page_tokens) * args.head_dim;
        }
        *reinterpret_cast<uint4*>(to + first) =
            make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
    }
}
