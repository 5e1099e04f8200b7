// What every kernel source includes. The same source is compiled for a GPU by NVRTC, without any header of NVIDIA's, and as plain C++
// for the emulation on a CPU (emulation/emulate.h), where tests run it. So in a kernel:
//   - shared memory is declared with SHARED or DYNAMIC_SHARED;
//   - PTX stands only in the wrappers of this file, each of which has a twin in emulation/emulate.h;
//   - kernels are defined with KERNEL and take one struct of arguments.
#pragma once

#ifdef __CUDACC_RTC__
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
#define DEVICE __device__ __forceinline__
#define KERNEL(name, Args, threads) extern "C" __global__ void __launch_bounds__(threads, 1) name(const Args args)
#define SHARED(T, name, count) __shared__ T name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define UNROLL _Pragma("unroll")
#define ROLLED _Pragma("unroll 1")
#else
#include "emulate.h"
#define DEVICE inline
#define UNROLL
#define ROLLED
#endif

struct bf16 {
    u16 bits;
};

#include "args.h"

static constexpr u32 ALL_LANES = 0xffffffffu;

DEVICE float infinity() { return __uint_as_float(0x7f800000u); }
DEVICE u32 ceil_div(u32 a, u32 b) { return (a + b - 1) / b; }

#ifdef __CUDACC_RTC__

// Two floats as bf16, rounded to nearest even, `low` in the low half of the word.
DEVICE u32 pack_bf16(float low, float high) {
    u32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
}

// sums += a · b for one tile of 16 x 8 sums over 16, spread over a warp. With g = lane / 4 and t = lane % 4:
//   a[0..4]: row g, g + 8, g, g + 8 at columns 2t, 2t + 1 (the last two: + 8);
//   b[0..2]: column g at rows 2t, 2t + 1 (the second: + 8);
//   sums[0..4]: row g at columns 2t, 2t + 1, then row g + 8 at the same.
DEVICE void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i names row i % 8 of matrix i / 8, 16 aligned bytes. Word m of lane i is
// row i / 4 of matrix m, columns 2 (i % 4) and the next.
DEVICE void load_matrices(u32 (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same, each matrix transposed: word m of lane i is column i / 4 of matrix m, rows 2 (i % 4) and the next.
DEVICE void load_matrices_transposed(u32 (&words)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(static_cast<u32>(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Copies 16 bytes to shared memory in the background, or writes zeros if not `valid` (the source is then not read). The copying thread
// sees them after wait_copies, the others after the barrier that follows it.
DEVICE void copy_async(void* shared, const void* global, bool valid) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<u32>(__cvta_generic_to_shared(shared))),
                 "l"(global), "r"(valid ? 16 : 0)
                 : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most `pending` of this thread's latest committed groups are unfinished.
template <int pending>
DEVICE void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Flags in memory that other devices see: what was written before the store is seen by whoever loads the stored value.
DEVICE void store_release(u32* flag, u32 value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}
DEVICE u32 load_acquire(const u32* flag) {
    u32 value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
    return value;
}
// A number that another device or block wrote: not from a multiprocessor's own cache.
DEVICE float4 load_peer(const float4* from) {
    float4 v;
    asm volatile("ld.relaxed.sys.global.v4.f32 {%0,%1,%2,%3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(from)
                 : "memory");
    return v;
}
// Counts up and returns the count before. What this thread knew before it is seen by whoever counts after it, on this device.
DEVICE u32 arrive(u32* counter) {
    u32 before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;" : "=r"(before) : "l"(counter) : "memory");
    return before;
}
DEVICE void pause_spinning() { __nanosleep(40); }

#endif

// ---- reductions in a fixed order -----------------------------------------------------------------------------------------------

DEVICE float warp_sum(float v) {
    for (u32 step = 16; step > 0; step /= 2) v += __shfl_xor_sync(ALL_LANES, v, step);
    return v;
}

DEVICE float warp_max(float v) {
    for (u32 step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(ALL_LANES, v, step));
    return v;
}

// The sum over a block of whole warps, for every thread; `scratch` holds 32 floats.
DEVICE float block_sum(float v, float* scratch) {
    const u32 lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    v = warp_sum(v);
    __syncthreads();  // the last use of `scratch` is over
    if (lane == 0) scratch[warp] = v;
    __syncthreads();
    return warp_sum(lane < blockDim.x / 32 ? scratch[lane] : 0.0f);
}

// ((p0 + p1) + (p2 + p3)) + … of `count` (a power of two, at most 64) numbers that `part` returns.
template <class Part>
DEVICE float4 tree_sum(u32 count, Part part) {
    // Level i holds a finished sum of 2^i parts while bit i of the number of parts so far is set.
    float4 levels[6];
    float4 sum = part(0);
    for (u32 i = 1; i <= count; ++i) {
        u32 carry = i - 1;
        UNROLL
        for (u32 level = 0; level < 6; ++level) {
            if (carry & 1) {
                sum.x = levels[level].x + sum.x;
                sum.y = levels[level].y + sum.y;
                sum.z = levels[level].z + sum.z;
                sum.w = levels[level].w + sum.w;
                carry >>= 1;
            } else {
                if (i < count) levels[level] = sum;
                break;
            }
        }
        if (i < count) sum = part(i);
    }
    return sum;
}
