// CUDA's names for kernel sources that are compiled as C++ (cuda/device.h). Every CUDA thread is a fiber; the fibers take turns on one
// OS thread and give way only at barriers, warp operations and spins. This finds what a run on a device may hide:
//   - a missing barrier: warps run far ahead of each other, in either order, or threads shuffled, so a race changes the result;
//   - threads that meet at different barriers or warp operations, or not at all;
//   - shared memory that nobody wrote (it begins as NaN), and, with the sanitizers, any access outside an array;
//   - background copies used before they were waited for: they are carried out by the wait, as late as may be.
// It knows nothing of speed, bank conflicts, caches, or the order in which other devices see writes.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

using u16 = std::uint16_t;
using u32 = std::uint32_t;
using u64 = unsigned long long;

struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }

namespace emulation {

struct Index { u32 x = 0, y = 0, z = 0; };
struct Thread { Index thread, block, block_size, grid; };
// The running thread.
extern Thread* current;

using Body = void (*)(const void* args);
struct Registered { Registered(const char* name, std::size_t args_bytes, u32 most_threads, Body body); };

[[noreturn]] void fail(const char* what, const char* where);
void barrier(const char* where);
void give_way();
void* shared_variable(const void* key, std::size_t bytes, std::size_t alignment);
void* dynamic_shared();
void copy_async(void* to, const void* from, bool valid);
void commit_copies();
void wait_copies(std::size_t pending);

// When all living lanes of `mask` have come, `act` is called once with what they brought (null for absent lanes).
using Act = void (*)(void* const in[32], void* const out[32]);
void meet(u32 mask, void* in, void* out, Act act, const char* where);

inline u32 lane() { return current->thread.x % 32; }

template <class T>
T shuffle(u32 mask, T value, u32 source, const char* where) {
    struct In { T value; u32 source; } in{value, source % 32};
    T out{};
    meet(mask, &in, &out, [](void* const ins[32], void* const outs[32]) {
        for (int i = 0; i < 32; ++i) {
            if (!ins[i]) continue;
            const void* from = ins[static_cast<In*>(ins[i])->source];
            if (!from) fail("a shuffle from a lane that does not take part", "");
            *static_cast<T*>(outs[i]) = static_cast<const In*>(from)->value;
        }
    }, where);
    return out;
}

inline u32 ballot(u32 mask, bool vote, const char* where) {
    u32 out = 0;
    meet(mask, &vote, &out, [](void* const ins[32], void* const outs[32]) {
        u32 votes = 0;
        for (int i = 0; i < 32; ++i)
            if (ins[i] && *static_cast<bool*>(ins[i])) votes |= 1u << i;
        for (int i = 0; i < 32; ++i)
            if (outs[i]) *static_cast<u32*>(outs[i]) = votes;
    }, where);
    return out;
}

inline float half(u32 word, int which) {
    const u32 bits = which ? word & 0xffff0000u : word << 16;
    float value;
    std::memcpy(&value, &bits, 4);
    return value;
}

}  // namespace emulation

#define EMULATION_TEXT(x) #x
#define EMULATION_LINE(x) EMULATION_TEXT(x)
#define HERE __FILE__ ":" EMULATION_LINE(__LINE__)

#define KERNEL(name, Args, threads)                                                                   \
    static void name(const Args& args);                                                               \
    static const emulation::Registered registered_##name(                                             \
        #name, sizeof(Args), threads, [](const void* args) { name(*static_cast<const Args*>(args)); }); \
    static void name(const Args& args)
#define SHARED(T, name, count)                                                                  \
    T* const name = [] {                                                                        \
        static const char key = 0;                                                              \
        return static_cast<T*>(emulation::shared_variable(&key, sizeof(T) * (count), alignof(T))); \
    }()
#define DYNAMIC_SHARED(name) unsigned char* const name = static_cast<unsigned char*>(emulation::dynamic_shared())

#define threadIdx (emulation::current->thread)
#define blockIdx (emulation::current->block)
#define blockDim (emulation::current->block_size)

#define __syncthreads() emulation::barrier(HERE)
#define __ballot_sync(mask, vote) emulation::ballot(mask, (vote) != 0, HERE)
#define __shfl_sync(mask, v, from) emulation::shuffle(mask, v, from, HERE)
#define __shfl_xor_sync(mask, v, bits) emulation::shuffle(mask, v, emulation::lane() ^ (bits), HERE)
#define __shfl_up_sync(mask, v, by) \
    emulation::shuffle(mask, v, emulation::lane() < (by) ? emulation::lane() : emulation::lane() - (by), HERE)

inline float __uint_as_float(u32 bits) { float v; std::memcpy(&v, &bits, 4); return v; }
inline u32 __float_as_uint(float v) { u32 bits; std::memcpy(&bits, &v, 4); return bits; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }
inline u32 min(u32 a, u32 b) { return a < b ? a : b; }
inline u32 max(u32 a, u32 b) { return a > b ? a : b; }
inline int __popc(u32 v) { return __builtin_popcount(v); }
inline u64 __umul64hi(u64 a, u64 b) { return static_cast<u64>(static_cast<unsigned __int128>(a) * b >> 64); }
inline u64 __double2ull_rn(double v) { return static_cast<u64>(std::nearbyint(v)); }
inline u64 __double2ull_rz(double v) { return static_cast<u64>(v); }
// A fiber is not interrupted between its barriers.
template <class T> T atomicAdd(T* to, T v) { const T old = *to; *to = old + v; return old; }

inline u32 emulated_bf16(float v) {
    const u32 bits = __float_as_uint(v);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;
    return (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
}
inline u32 pack_bf16(float low, float high) { return emulated_bf16(low) | emulated_bf16(high) << 16; }

inline void mma(float (&sums)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    struct In { float c[4]; u32 a[4], b[2]; } in{{sums[0], sums[1], sums[2], sums[3]}, {a[0], a[1], a[2], a[3]}, {b0, b1}};
    emulation::meet(0xffffffffu, &in, sums, [](void* const ins[32], void* const outs[32]) {
        float a[16][16], b[8][16], c[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            if (!ins[lane]) emulation::fail("mma needs all lanes of its warp", "");
            const In& in = *static_cast<const In*>(ins[lane]);
            const int g = lane / 4, t = lane % 4 * 2;
            for (int h = 0; h < 2; ++h) {
                for (int i = 0; i < 4; ++i) a[g + i % 2 * 8][t + h + i / 2 * 8] = emulation::half(in.a[i], h);
                for (int i = 0; i < 2; ++i) b[g][t + h + i * 8] = emulation::half(in.b[i], h);
                for (int i = 0; i < 2; ++i) c[g + i * 8][t + h] = in.c[i * 2 + h];
            }
        }
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j)
                for (int k = 0; k < 16; ++k) c[i][j] += a[i][k] * b[j][k];
        for (int lane = 0; lane < 32; ++lane) {
            float* out = static_cast<float*>(outs[lane]);
            const int g = lane / 4, t = lane % 4 * 2;
            out[0] = c[g][t], out[1] = c[g][t + 1], out[2] = c[g + 8][t], out[3] = c[g + 8][t + 1];
        }
    }, "mma");
}

template <bool transposed>
void emulated_load_matrices(u32 (&words)[4], const void* row) {
    if (reinterpret_cast<std::uintptr_t>(row) % 16) emulation::fail("ldmatrix: a row is not aligned to 16 bytes", "");
    emulation::meet(0xffffffffu, &row, words, [](void* const ins[32], void* const outs[32]) {
        for (int lane = 0; lane < 32; ++lane)
            if (!ins[lane]) emulation::fail("ldmatrix needs all lanes of its warp", "");
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m)
                for (int h = 0; h < 2; ++h) {
                    const int r = transposed ? lane % 4 * 2 + h : lane / 4, c = transposed ? lane / 4 : lane % 4 * 2 + h;
                    const char* from = *static_cast<const char* const*>(ins[m * 8 + r]) + c * 2;
                    std::memcpy(reinterpret_cast<char*>(static_cast<u32*>(outs[lane]) + m) + h * 2, from, 2);
                }
    }, "ldmatrix");
}
inline void load_matrices(u32 (&words)[4], const void* row) { emulated_load_matrices<false>(words, row); }
inline void load_matrices_transposed(u32 (&words)[4], const void* row) { emulated_load_matrices<true>(words, row); }

inline void copy_async(void* shared, const void* global, bool valid) { emulation::copy_async(shared, global, valid); }
inline void commit_copies() { emulation::commit_copies(); }
template <int pending> void wait_copies() { emulation::wait_copies(pending); }

inline void store_release(u32* flag, u32 value) { __atomic_store_n(flag, value, __ATOMIC_RELEASE); }
inline u32 load_acquire(const u32* flag) { return __atomic_load_n(flag, __ATOMIC_ACQUIRE); }
inline float4 load_peer(const float4* from) { return *from; }
inline u32 arrive(u32* counter) { return __atomic_fetch_add(counter, 1u, __ATOMIC_ACQ_REL); }
inline void pause_spinning() { emulation::give_way(); }
