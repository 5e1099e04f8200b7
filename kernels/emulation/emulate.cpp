// Runs kernels on the CPU (emulate.h). The C interface at the end is what tests and stand-in driver libraries call.
#include "emulate.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#undef threadIdx
#undef blockIdx
#undef blockDim

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

Thread* current = nullptr;

namespace {

constexpr std::size_t STACK = 64 * 1024;
constexpr std::size_t ARENA = 256 * 1024;
// What a block may use on the smallest device that we compile for.
constexpr std::size_t MOST_SHARED = 163 * 1024;

struct Kernel { std::size_t args_bytes; u32 most_threads; Body body; };
std::map<std::string, Kernel>& kernels() {
    static std::map<std::string, Kernel> all;
    return all;
}

enum class State { ready, spinning, at_barrier, in_warp, done };
struct Copy { void* to; const void* from; bool valid; };
struct Block;

struct Fiber {
    Thread thread;
    Block* block = nullptr;
    State state = State::done;
    void* sp = nullptr;
    char* stack = nullptr;
    void* fake_stack = nullptr;
    const char* where = "";
    u32 mask = 0;
    void *in = nullptr, *out = nullptr;
    Act act = nullptr;
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
};

struct Variable { const void* key; std::size_t at; };

// A block that is running, with its threads and shared memory.
struct Block {
    const char* name = "";
    Body body = nullptr;
    const void* args = nullptr;
    std::vector<std::unique_ptr<Fiber>> fibers;
    u32 threads = 0, alive = 0, at_barrier = 0;
    char* arena = nullptr;
    std::size_t used = 0, shared_bytes = 0;
    std::vector<Variable> variables;
};

// What one launch asks for.
struct Launch { const char* name; const Kernel* kernel; Index grid; u32 threads; std::size_t shared; const void* args; };

struct Order { int kind = 0; u64 seed = 1; } order;
Fiber* running = nullptr;
void* scheduler_sp = nullptr;
[[maybe_unused]] const void* scheduler_stack = nullptr;
[[maybe_unused]] std::size_t scheduler_size = 0;
std::string error;

extern "C" void emulation_switch(void** save, void* load);
// Leaves the callee-saved registers of System V x86-64 on the old stack and takes them from the new one.
asm(R"(
.text
.globl emulation_switch
.hidden emulation_switch
.type emulation_switch, @function
emulation_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size emulation_switch, .-emulation_switch
)");

void leave([[maybe_unused]] bool for_good) {
    Fiber* self = running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(for_good ? nullptr : &self->fake_stack, scheduler_stack, scheduler_size);
#endif
    emulation_switch(&self->sp, scheduler_sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self->fake_stack, &scheduler_stack, &scheduler_size);
#endif
}

void enter(Fiber& fiber) {
    running = &fiber;
    current = &fiber.thread;
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, STACK);
#endif
    emulation_switch(&scheduler_sp, fiber.sp);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
    running = nullptr;
    current = nullptr;
}

void release_warp(Block& block, u32 warp, u32 mask) {
    void *ins[32] = {}, *outs[32] = {};
    Fiber* first = nullptr;
    for (u32 lane = 0; lane < 32 && warp * 32 + lane < block.threads; ++lane) {
        Fiber& fiber = *block.fibers[warp * 32 + lane];
        if (!(mask >> lane & 1) || fiber.state == State::done) continue;
        if (fiber.state != State::in_warp || fiber.mask != mask) return;
        if (first && fiber.where != first->where && std::strcmp(fiber.where, first->where))
            fail("lanes of a warp meet at different operations:", (std::string(first->where) + " and " + fiber.where).c_str());
        first = &fiber;
        ins[lane] = fiber.in, outs[lane] = fiber.out;
    }
    if (!first) return;
    first->act(ins, outs);
    for (u32 lane = 0; lane < 32; ++lane)
        if (ins[lane]) block.fibers[warp * 32 + lane]->state = State::ready;
}

void release_barrier(Block& block) {
    if (!block.alive || block.at_barrier != block.alive) return;
    block.at_barrier = 0;
    const char* where = nullptr;
    for (u32 i = 0; i < block.threads; ++i) {
        Fiber& fiber = *block.fibers[i];
        if (fiber.state != State::at_barrier) continue;
        if (where && std::strcmp(where, fiber.where))
            fail("threads of a block meet at different barriers:", (std::string(where) + " and " + fiber.where).c_str());
        where = fiber.where;
        fiber.state = State::ready;
    }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack, &scheduler_size);
#endif
    Fiber& self = *running;
    Block& block = *self.block;
    block.body(block.args);
    for (const auto& group : self.groups)
        if (!group.empty()) fail("a thread ends without having waited for its copies", "");
    if (!self.open.empty()) fail("a thread ends with copies that it has not committed", "");
    self.groups.clear();
    self.state = State::done;
    --block.alive;
    release_barrier(block);
    const u32 warp = self.thread.thread.x / 32;
    for (u32 lane = 0; lane < 32 && warp * 32 + lane < block.threads; ++lane) {
        Fiber& fiber = *block.fibers[warp * 32 + lane];
        if (fiber.state == State::in_warp) release_warp(block, warp, fiber.mask);
    }
    leave(true);
    std::abort();
}

void begin(Block& block, const Launch& launch, Index index) {
    block.name = launch.name, block.body = launch.kernel->body, block.args = launch.args;
    block.threads = block.alive = launch.threads;
    block.at_barrier = 0;
    if (!block.arena) block.arena = static_cast<char*>(std::aligned_alloc(1024, ARENA));
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block.arena, ARENA);
#endif
    // All bits set is a NaN both as f32 and as bf16.
    std::memset(block.arena, 0xff, std::max(block.used, launch.shared));
#if defined(__SANITIZE_ADDRESS__)
    ASAN_POISON_MEMORY_REGION(block.arena, ARENA);
    ASAN_UNPOISON_MEMORY_REGION(block.arena, launch.shared);
#endif
    block.shared_bytes = launch.shared;
    block.used = (launch.shared + 127) / 128 * 128 + 128;
    block.variables.clear();
    while (block.fibers.size() < launch.threads) block.fibers.push_back(std::make_unique<Fiber>());
    for (u32 i = 0; i < launch.threads; ++i) {
        Fiber& fiber = *block.fibers[i];
        fiber.thread = {{i, 0, 0}, index, {launch.threads, 1, 1}, launch.grid};
        fiber.block = &block;
        fiber.open.clear();
        fiber.groups.clear();
        if (!fiber.stack) {
            void* stack = mmap(nullptr, STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
            if (stack == MAP_FAILED) throw std::runtime_error("no memory for the stack of a thread");
            mprotect(stack, 4096, PROT_NONE);
            fiber.stack = static_cast<char*>(stack);
        }
#if defined(__SANITIZE_ADDRESS__)
        ASAN_UNPOISON_MEMORY_REGION(fiber.stack + 4096, STACK - 4096);
#endif
        void** top = reinterpret_cast<void**>(fiber.stack + STACK);
        *--top = nullptr;
        *--top = reinterpret_cast<void*>(&fiber_main);
        for (int i = 0; i < 6; ++i) *--top = nullptr;
        fiber.sp = top;
        fiber.state = State::ready;
    }
}

// Lets the threads of `turn` from `first` on go as far as they can alone; `true` if one of them moved.
bool advance(const std::vector<Fiber*>& turn, std::size_t first, std::size_t count) {
    bool moved = false;
    for (bool again = true; again;) {
        again = false;
        for (std::size_t i = first; i < std::min(first + count, turn.size()); ++i) {
            if (turn[i]->state != State::ready) continue;
            enter(*turn[i]);
            if (!error.empty()) return false;
            again = moved = true;
        }
    }
    return moved;
}

// Runs blocks side by side until all are done. In order, a warp goes as far as it can before the next one begins; shuffled, all threads
// go from one meeting to the next.
void run(std::vector<std::unique_ptr<Block>>& blocks, std::size_t count, std::mt19937_64& random) {
    std::vector<Fiber*> turn;
    for (std::size_t b = 0; b < count; ++b)
        for (u32 i = 0; i < blocks[b]->threads; ++i) turn.push_back(blocks[b]->fibers[i].get());
    if (order.kind == 1) std::reverse(turn.begin(), turn.end());
    for (;;) {
        if (order.kind == 2) std::shuffle(turn.begin(), turn.end(), random);
        bool moved = false, left = false, spins = false;
        for (Fiber* fiber : turn) {
            if (fiber->state != State::spinning) continue;
            fiber->state = State::ready;
            spins = true;
        }
        // What is waited for may be another process's turn.
        if (spins) std::this_thread::sleep_for(std::chrono::microseconds(20));
        for (std::size_t i = 0; i < turn.size(); i += order.kind == 2 ? 1 : 32) {
            moved |= advance(turn, i, order.kind == 2 ? 1 : 32);
            if (!error.empty()) return;
        }
        for (Fiber* fiber : turn) left |= fiber->state != State::done;
        if (!left) return;
        if (moved) continue;
        for (Fiber* fiber : turn)
            if (fiber->state != State::done) {
                error = std::string("kernel ") + fiber->block->name + ": no thread can go on; thread " +
                        std::to_string(fiber->thread.thread.x) + " waits at " + fiber->where;
                return;
            }
    }
}

std::vector<std::unique_ptr<Block>> pool;
std::mutex device;

void launch(const Launch* launches, std::size_t count) {
    const Index grid = launches[0].grid;
    for (std::size_t i = 0; i < count; ++i) {
        const Launch& l = launches[i];
        if (l.threads == 0 || l.threads % 32 || l.threads > l.kernel->most_threads)
            throw std::runtime_error("a block of " + std::to_string(l.threads) + " threads");
        if (l.grid.x != grid.x || l.grid.y != grid.y || l.grid.z != grid.z) throw std::runtime_error("grids differ");
        if (!grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535) throw std::runtime_error("the grid has an invalid size");
        if (l.shared > MOST_SHARED) throw std::runtime_error("too much shared memory");
    }
    while (pool.size() < count) pool.push_back(std::make_unique<Block>());
    std::mt19937_64 random(order.seed);
    const u64 blocks = static_cast<u64>(grid.x) * grid.y * grid.z;
    for (u64 n = 0; n < blocks; ++n) {
        const u64 b = order.kind == 1 ? blocks - 1 - n : n;
        const Index index{static_cast<u32>(b % grid.x), static_cast<u32>(b / grid.x % grid.y), static_cast<u32>(b / grid.x / grid.y)};
        for (std::size_t i = 0; i < count; ++i) begin(*pool[i], launches[i], index);
        run(pool, count, random);
        if (!error.empty()) throw std::runtime_error(error);
    }
}

}  // namespace

Registered::Registered(const char* name, std::size_t args_bytes, u32 most_threads, Body body) {
    kernels()[name] = {args_bytes, most_threads, body};
}

// Ends the launch: the fibers are left as they are and begin anew with the next one.
void fail(const char* what, const char* where) {
    const Index block = current->block;
    error = std::string("kernel ") + running->block->name + ", block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " +
            std::to_string(block.z) + "), thread " + std::to_string(current->thread.x) + ": " + what + " " + where;
    leave(false);
    std::abort();
}

void barrier(const char* where) {
    running->where = where;
    running->state = State::at_barrier;
    ++running->block->at_barrier;
    release_barrier(*running->block);
    if (running->state == State::at_barrier) leave(false);
}

void give_way() {
    running->state = State::spinning;
    leave(false);
}

void meet(u32 mask, void* in, void* out, Act act, const char* where) {
    Fiber& self = *running;
    const u32 index = self.thread.thread.x;
    if (!(mask >> index % 32 & 1)) fail("a lane comes to a warp operation that leaves it out:", where);
    self.in = in, self.out = out, self.act = act, self.where = where, self.mask = mask;
    self.state = State::in_warp;
    release_warp(*self.block, index / 32, mask);
    if (self.state == State::in_warp) leave(false);
}

void* shared_variable(const void* key, std::size_t bytes, std::size_t alignment) {
    Block& block = *running->block;
    for (const Variable& variable : block.variables)
        if (variable.key == key) return block.arena + variable.at;
    const std::size_t at = (block.used + alignment - 1) / alignment * alignment;
    block.used = at + bytes + 64;
    block.shared_bytes += bytes;
    if (block.shared_bytes > MOST_SHARED || block.used > ARENA) fail("too much shared memory", "");
#if defined(__SANITIZE_ADDRESS__)
    ASAN_UNPOISON_MEMORY_REGION(block.arena + at, bytes);
#endif
    std::memset(block.arena + at, 0xff, bytes);
    block.variables.push_back({key, at});
    return block.arena + at;
}

void* dynamic_shared() { return running->block->arena; }

void copy_async(void* to, const void* from, bool valid) {
    if (reinterpret_cast<std::uintptr_t>(to) % 16 || (valid && reinterpret_cast<std::uintptr_t>(from) % 16))
        fail("cp.async: an address is not aligned to 16 bytes", "");
    running->open.push_back({to, from, valid});
}

void commit_copies() {
    running->groups.push_back(std::move(running->open));
    running->open.clear();
}

void wait_copies(std::size_t pending) {
    auto& groups = running->groups;
    for (; groups.size() > pending; groups.pop_front())
        for (const Copy& copy : groups.front()) {
            if (copy.valid) std::memcpy(copy.to, copy.from, 16);
            else std::memset(copy.to, 0, 16);
        }
}

}  // namespace emulation

#pragma GCC visibility push(default)
extern "C" {

struct EmulatedLaunch {
    const char* kernel;
    u32 grid[3];
    u32 threads;
    u64 shared_bytes;
    const void* args;
    // 0: not checked.
    u64 args_bytes;
};

// Bytes of a kernel's arguments, 0 if there is no such kernel.
u64 emulation_args_bytes(const char* kernel) {
    const auto found = emulation::kernels().find(kernel);
    return found == emulation::kernels().end() ? 0 : found->second.args_bytes;
}

// Runs launches of equal grids, block i of all of them side by side, as kernels of several devices that wait for each other run.
// Warps run in the order of their numbers (`kind` 0), in the opposite one (1), or all threads shuffled by `seed` (2).
// Returns null, or what is wrong, valid until this thread's next call.
const char* emulation_launch(const EmulatedLaunch* launches, u64 count, int kind, u64 seed) {
    const std::lock_guard lock(emulation::device);
    emulation::order = {kind, seed};
    thread_local std::string message;
    emulation::error.clear();
    try {
        std::vector<emulation::Launch> all;
        for (u64 i = 0; i < count; ++i) {
            const EmulatedLaunch& l = launches[i];
            const auto found = emulation::kernels().find(l.kernel);
            if (found == emulation::kernels().end()) throw std::runtime_error("no such kernel");
            if (l.args_bytes && l.args_bytes != found->second.args_bytes) throw std::runtime_error("arguments of another size");
            all.push_back({l.kernel, &found->second, {l.grid[0], l.grid[1], l.grid[2]}, l.threads, l.shared_bytes, l.args});
        }
        emulation::launch(all.data(), all.size());
        return nullptr;
    } catch (const std::exception& thrown) {
        message = std::string(launches[0].kernel) + ": " + thrown.what();
        return message.c_str();
    }
}
}
#pragma GCC visibility pop
