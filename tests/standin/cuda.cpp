// Answers for libcuda.so.1 on a machine without devices: an H100 whose kernels run on the CPU, by kernels/emulation.
//
// As on a device, a stream works on while its caller goes on, fresh memory holds no zeros, and whatever runs past the end of an
// allocation ends the process. CUDA_STANDIN names what should be otherwise:
//   fail=N     the N-th launch of a kernel is refused        memory=MIB   memory of a device
//   major=N    compute capability                            peers=0       devices do not see each other
//   refuse=N   the first N images are refused
// CUDA_STANDIN_LOG is a file that gets a line for each allocation, what is given back, capture, launch of a kernel or graph, and event that
// was seen to have happened.
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

struct EmulatedLaunch {
    const char* kernel;
    unsigned grid[3];
    unsigned threads;
    unsigned long long shared_bytes;
    const void* args;
    unsigned long long args_bytes;
};
extern "C" unsigned long long emulation_args_bytes(const char* kernel);
extern "C" const char* emulation_launch(const EmulatedLaunch* launches, unsigned long long count);

namespace {

using Result = int;
using Pointer = unsigned long long;
enum : Result {
    ok = 0, invalid_value = 1, out_of_memory = 2, no_device = 100, invalid_device = 101, invalid_image = 200, invalid_context = 201, no_binary = 209,
    not_found = 500, not_ready = 600, launch_failed = 719, capture_unsupported = 900,
};

long told(const char* name, long otherwise) {
    const std::size_t length = std::strlen(name);
    for (const char* text = std::getenv("CUDA_STANDIN"); text && *text;) {
        if (!std::strncmp(text, name, length) && text[length] == '=') return std::atol(text + length + 1);
        const char* comma = std::strchr(text, ',');
        text = comma ? comma + 1 : nullptr;
    }
    return otherwise;
}

void log(const std::string& line) {
    static std::FILE* file = [] {
        const char* path = std::getenv("CUDA_STANDIN_LOG");
        return path ? std::fopen((std::string(path) + "." + std::to_string(getpid())).c_str(), "a") : nullptr;
    }();
    if (file) std::fprintf(file, "%s\n", line.c_str()), std::fflush(file);
}

Result complain(Result code, const char* call, const std::string& why) {
    std::fprintf(stderr, "stand-in driver: %s: %s\n", call, why.c_str());
    return code;
}

// ---- memory ----

constexpr std::size_t page = 4096;
struct Block { std::size_t bytes; void* map; std::size_t map_bytes; };
std::mutex memory_lock;
std::map<Pointer, Block> blocks;
std::size_t in_use = 0;

std::size_t total_memory() { return std::size_t(told("memory", 81559)) << 20; }

Result allocate(Pointer* out, std::size_t bytes) {
    const std::lock_guard guard(memory_lock);
    if (bytes == 0) return invalid_value;
    if (in_use + bytes > total_memory()) return out_of_memory;
    // The allocation ends where a page begins that nobody may touch.
    const std::size_t room = (bytes + page - 1) / page * page;
    void* map = mmap(nullptr, room + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (map == MAP_FAILED) return out_of_memory;
    mprotect(static_cast<char*>(map) + room, page, PROT_NONE);
    char* start = static_cast<char*>(map) + (room - bytes) / 256 * 256;
    // Fresh memory is NaN to every kernel. Large caches would cost the machine's memory, so only their beginning is.
    std::memset(start, 0xff, bytes < (64u << 20) ? bytes : 64u << 20);
    *out = reinterpret_cast<Pointer>(start);
    blocks[*out] = {bytes, map, room + page};
    in_use += bytes;
    log("alloc " + std::to_string(bytes));
    return ok;
}

Result release(Pointer pointer) {
    const std::lock_guard guard(memory_lock);
    const auto found = blocks.find(pointer);
    if (found == blocks.end()) return complain(invalid_value, "cuMemFree", "not the start of an allocation");
    munmap(found->second.map, found->second.map_bytes);
    in_use -= found->second.bytes;
    log("free " + std::to_string(found->second.bytes));
    blocks.erase(found);
    return ok;
}

bool inside(Pointer pointer, std::size_t bytes) {
    const std::lock_guard guard(memory_lock);
    auto after = blocks.upper_bound(pointer);
    if (after == blocks.begin()) return false;
    const auto& [start, block] = *--after;
    return pointer - start + bytes <= block.bytes;
}

// ---- streams ----

using Work = std::function<Result()>;
struct Graph { std::vector<Work> work; };

// What went wrong on the device stays.
std::atomic<int> sticky{ok};

struct Stream {
    std::mutex lock;
    std::condition_variable changed;
    std::deque<Work> queue;
    unsigned long long asked = 0, done = 0;
    bool ends = false;
    Graph* capture = nullptr;
    std::thread worker{[this] { run(); }};

    void run() {
        for (;;) {
            Work work;
            {
                std::unique_lock guard(lock);
                changed.wait(guard, [this] { return ends || !queue.empty(); });
                if (queue.empty()) return;
                work = std::move(queue.front());
                queue.pop_front();
            }
            if (sticky == ok)
                if (const Result result = work()) sticky = result;
            const std::lock_guard guard(lock);
            ++done;
            changed.notify_all();
        }
    }
    void wait(unsigned long long until) {
        std::unique_lock guard(lock);
        changed.wait(guard, [&] { return done >= until; });
    }
};

struct Event {
    Stream* stream = nullptr;
    unsigned long long after = 0;
    bool seen = false;
    std::chrono::steady_clock::time_point at;
};

std::mutex streams_lock;
std::vector<Stream*> streams;

Stream* new_stream() {
    const std::lock_guard guard(streams_lock);
    return streams.emplace_back(new Stream);
}

// As on a device, memory is given back when nothing that was asked for can use it any more.
void wait_for_all() {
    std::vector<Stream*> all;
    {
        const std::lock_guard guard(streams_lock);
        all = streams;
    }
    for (Stream* stream : all) stream->wait(stream->asked);
}

Stream& default_stream() {
    static auto* stream = new_stream();
    return *stream;
}
Stream& stream_of(void* s) { return s ? *static_cast<Stream*>(s) : default_stream(); }

Result submit(void* s, Work work) {
    if (sticky != ok) return sticky;
    Stream& stream = stream_of(s);
    if (stream.capture) return stream.capture->work.push_back(std::move(work)), ok;
    const std::lock_guard guard(stream.lock);
    stream.queue.push_back(std::move(work));
    ++stream.asked;
    stream.changed.notify_all();
    return ok;
}

thread_local void* current = nullptr;
char the_context;
std::atomic<long> launches{0};

struct Function { std::string name; std::size_t args_bytes; std::size_t most_shared = 48 << 10; };
struct Module { std::map<std::string, Function> functions; };

Result copy(const char* call, void* s, void* to, const void* from, std::size_t bytes, bool to_device, bool from_device) {
    if (to_device && !inside(Pointer(to), bytes)) return complain(invalid_value, call, "it writes past an allocation");
    if (from_device && !inside(Pointer(from), bytes)) return complain(invalid_value, call, "it reads past an allocation");
    return submit(s, [=] { return std::memmove(to, from, bytes), ok; });
}

}  // namespace

extern "C" {

// For the stand-ins of cuBLASLt and NCCL.
int standin_submit(void* stream, const std::function<int()>& work) { return submit(stream, work); }
bool standin_inside(const void* pointer, std::size_t bytes) { return inside(Pointer(pointer), bytes); }

Result cuInit(unsigned) { return ok; }
Result cuDriverGetVersion(int* version) { return *version = 12040, ok; }
Result cuGetErrorName(Result code, const char** text) {
    static const std::map<int, const char*> names{{1, "CUDA_ERROR_INVALID_VALUE"}, {2, "CUDA_ERROR_OUT_OF_MEMORY"},
        {101, "CUDA_ERROR_INVALID_DEVICE"}, {209, "CUDA_ERROR_NO_BINARY_FOR_GPU"}, {719, "CUDA_ERROR_LAUNCH_FAILED"}};
    const auto found = names.find(code);
    return *text = found == names.end() ? "CUDA_ERROR_UNKNOWN" : found->second, ok;
}
Result cuGetErrorString(Result code, const char** text) { return *text = code == launch_failed ? "unspecified launch failure" : "an error", ok; }

Result cuDeviceGetCount(int* count) { return *count = int(told("devices", 8)), ok; }
Result cuDeviceGet(int* device, int ordinal) { return ordinal < told("devices", 8) ? (*device = ordinal, ok) : invalid_device; }
Result cuDeviceGetName(char* text, int length, int) { return std::snprintf(text, length, "NVIDIA H100 80GB HBM3"), ok; }
Result cuDeviceTotalMem_v2(std::size_t* bytes, int) { return *bytes = total_memory(), ok; }
Result cuDeviceGetAttribute(int* value, int attribute, int) {
    switch (attribute) {
        case 16: return *value = 132, ok;         // multiprocessors
        case 75: return *value = int(told("major", 9)), ok;
        case 76: return *value = 0, ok;
        case 97: return *value = 227 << 10, ok;   // shared memory that a block may ask for
        case 115: return *value = 1, ok;          // memory pools
        default: return *value = 0, ok;
    }
}
Result cuDevicePrimaryCtxRetain(void** context, int) { return *context = &the_context, ok; }
Result cuDevicePrimaryCtxRelease_v2(int) { return ok; }
Result cuCtxSetCurrent(void* context) { return current = context, ok; }
Result cuCtxGetCurrent(void** context) { return *context = current, ok; }
Result cuCtxSynchronize() { return sticky; }

Result cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
    if (!current) return invalid_context;
    return *total = total_memory(), *free = *total - in_use, ok;
}
Result cuMemAlloc_v2(Pointer* pointer, std::size_t bytes) { return current ? allocate(pointer, bytes) : invalid_context; }
Result cuMemFree_v2(Pointer pointer) { return wait_for_all(), release(pointer); }
Result cuMemHostAlloc(void** pointer, std::size_t bytes, unsigned) { return posix_memalign(pointer, page, bytes) ? out_of_memory : ok; }
Result cuMemFreeHost(void* pointer) { return wait_for_all(), std::free(pointer), ok; }

// Another process opens the memory through the descriptor that its owner keeps. The handle is of a whole allocation.
struct Handle { int owner, file; std::size_t room, start; char rest[40]; };
Result cuDeviceGetUuid_v2(unsigned char* uuid, int device) { return std::memset(uuid, 0, 16), uuid[0] = 0xA0, uuid[15] = char(device), ok; }
Result cuDeviceGetUuid(unsigned char* uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }
Result cuDeviceCanAccessPeer(int* can, int one, int other) { return *can = one != other && told("peers", 1), ok; }
Result cuIpcGetMemHandle(Handle* handle, Pointer pointer) {
    wait_for_all();
    const std::lock_guard guard(memory_lock);
    const auto found = blocks.find(pointer);
    if (found == blocks.end()) return complain(invalid_value, "cuIpcGetMemHandle", "not the start of an allocation");
    const std::size_t room = found->second.map_bytes - page;
    const int file = memfd_create("device memory", MFD_CLOEXEC);
    if (file < 0 || pwrite(file, found->second.map, room, 0) != ssize_t(room)) return out_of_memory;
    if (mmap(found->second.map, room, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, file, 0) == MAP_FAILED) return out_of_memory;
    return *handle = {getpid(), file, room, std::size_t(reinterpret_cast<char*>(pointer) - static_cast<char*>(found->second.map)), {}}, ok;
}
Result cuIpcOpenMemHandle_v2(Pointer* pointer, Handle handle, unsigned) {
    const int file = open(("/proc/" + std::to_string(handle.owner) + "/fd/" + std::to_string(handle.file)).c_str(), O_RDWR | O_CLOEXEC);
    if (file < 0) return invalid_context;
    void* map = mmap(nullptr, handle.room, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    if (map == MAP_FAILED) return out_of_memory;
    return *pointer = reinterpret_cast<Pointer>(map) + handle.start, ok;
}
Result cuIpcCloseMemHandle(Pointer) { return ok; }

Result cuMemcpyHtoDAsync_v2(Pointer to, const void* from, std::size_t bytes, void* s) {
    return copy("cuMemcpyHtoDAsync", s, reinterpret_cast<void*>(to), from, bytes, true, false);
}
Result cuMemcpyDtoHAsync_v2(void* to, Pointer from, std::size_t bytes, void* s) {
    return copy("cuMemcpyDtoHAsync", s, to, reinterpret_cast<void*>(from), bytes, false, true);
}
Result cuMemcpyDtoDAsync_v2(Pointer to, Pointer from, std::size_t bytes, void* s) {
    return copy("cuMemcpyDtoDAsync", s, reinterpret_cast<void*>(to), reinterpret_cast<void*>(from), bytes, true, true);
}
struct Copy2D {
    std::size_t from_x, from_y; int from_type; const void* from_host; Pointer from; void* from_array; std::size_t from_pitch;
    std::size_t to_x, to_y; int to_type; void* to_host; Pointer to; void* to_array; std::size_t to_pitch;
    std::size_t width, height;
};
Result cuMemcpy2DAsync_v2(const Copy2D* copy2d, void* s) {
    const Copy2D c = *copy2d;
    if (!c.height) return ok;
    if (!inside(c.from, (c.height - 1) * c.from_pitch + c.width) || !inside(c.to, (c.height - 1) * c.to_pitch + c.width))
        return complain(invalid_value, "cuMemcpy2DAsync", "past an allocation");
    return submit(s, [c] {
        for (std::size_t row = 0; row < c.height; ++row)
            std::memcpy(reinterpret_cast<char*>(c.to) + row * c.to_pitch, reinterpret_cast<char*>(c.from) + row * c.from_pitch, c.width);
        return ok;
    });
}
Result cuMemsetD8Async(Pointer to, unsigned char value, std::size_t bytes, void* s) {
    if (!inside(to, bytes)) return complain(invalid_value, "cuMemsetD8Async", "past an allocation");
    return submit(s, [=] { return std::memset(reinterpret_cast<void*>(to), value, bytes), ok; });
}

Result cuStreamCreate(void** s, unsigned) { return *s = new_stream(), ok; }
Result cuStreamCreateWithPriority(void** s, unsigned, int) { return *s = new_stream(), ok; }
Result cuStreamDestroy_v2(void* s) {
    auto* stream = static_cast<Stream*>(s);
    {
        const std::lock_guard guard(stream->lock);
        stream->ends = true;
        stream->changed.notify_all();
    }
    stream->worker.join();
    const std::lock_guard guard(streams_lock);
    std::erase(streams, stream);
    return delete stream, ok;
}
Result cuStreamSynchronize(void* s) {
    Stream& stream = stream_of(s);
    if (stream.capture) return complain(capture_unsupported, "cuStreamSynchronize", "the stream is captured");
    return stream.wait(stream.asked), sticky.load();
}
Result cuStreamWaitEvent(void* s, void* e, unsigned) {
    const Event event = *static_cast<Event*>(e);
    return submit(s, [event] { return event.stream->wait(event.after), ok; });
}
Result cuStreamBeginCapture_v2(void* s, int) { return stream_of(s).capture = new Graph, log("capture"), ok; }
Result cuStreamEndCapture(void* s, void** graph) { return *graph = std::exchange(stream_of(s).capture, nullptr), ok; }
Result cuStreamIsCapturing(void* s, int* status) { return *status = stream_of(s).capture != nullptr, ok; }
Result cuGraphInstantiateWithFlags(void** exec, void* graph, unsigned long long) { return *exec = new Graph(*static_cast<Graph*>(graph)), ok; }
Result cuGraphUpload(void*, void*) { return ok; }
Result cuGraphLaunch(void* exec, void* s) {
    log("graph");
    for (const Work& work : static_cast<Graph*>(exec)->work)
        if (const Result result = submit(s, work)) return result;
    return ok;
}
Result cuGraphExecDestroy(void* exec) { return delete static_cast<Graph*>(exec), ok; }
Result cuGraphDestroy(void* graph) { return delete static_cast<Graph*>(graph), ok; }

Result cuEventCreate(void** event, unsigned) { return *event = new Event, ok; }
Result cuEventRecord(void* e, void* s) {
    auto* event = static_cast<Event*>(e);
    Stream& stream = stream_of(s);
    // The time of an event is when the stream comes to it.
    if (const Result result = submit(s, [event] { return event->at = std::chrono::steady_clock::now(), ok; })) return result;
    return event->stream = &stream, event->after = stream.asked, event->seen = false, ok;
}
Result cuEventQuery(void* e) {
    auto* event = static_cast<Event*>(e);
    if (sticky != ok) return sticky;
    if (!event->stream) return ok;
    const std::lock_guard guard(event->stream->lock);
    if (event->stream->done < event->after) return not_ready;
    if (!std::exchange(event->seen, true)) log("seen");
    return ok;
}
Result cuEventSynchronize(void* e) {
    const auto* event = static_cast<Event*>(e);
    if (event->stream) event->stream->wait(event->after);
    return sticky;
}
Result cuEventElapsedTime(float* ms, void* from, void* to) {
    const auto span = static_cast<Event*>(to)->at - static_cast<Event*>(from)->at;
    return *ms = std::chrono::duration<float, std::milli>(span).count(), ok;
}
Result cuEventDestroy_v2(void* event) { return delete static_cast<Event*>(event), ok; }

Result cuModuleLoadData(void** module, const void* image) {
    static std::atomic<long> images{0};
    if (++images <= told("refuse", 0)) return no_binary;
    // Machine code is an ELF file, PTX a text.
    if (std::memcmp(image, "\177ELF", 4) && std::memcmp(image, "//", 2)) return invalid_image;
    return *module = new Module, ok;
}
Result cuModuleUnload(void* module) { return delete static_cast<Module*>(module), ok; }
Result cuModuleGetFunction(void** function, void* module, const char* name) {
    const std::size_t bytes = emulation_args_bytes(name);
    if (!bytes) return not_found;
    auto& functions = static_cast<Module*>(module)->functions;
    return *function = &functions.try_emplace(name, Function{name, bytes}).first->second, ok;
}
Result cuFuncSetAttribute(void* f, int attribute, int value) {
    if (attribute == 8) static_cast<Function*>(f)->most_shared = value;  // dynamic shared memory
    return ok;
}

Result cuLaunchKernel(void* f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared, void* s,
                      void** params, void**) {
    const Function& function = *static_cast<Function*>(f);
    if (++launches == told("fail", -1)) return launch_failed;
    if (shared > function.most_shared || by != 1 || bz != 1 || !gx || !gy || !gz || gy > 65535 || gz > 65535 || bx > 1024)
        return complain(invalid_value, function.name.c_str(), "no such launch on a device");
    log("launch " + function.name);
    // Arguments are copied when the kernel is asked for, as the driver does.
    const auto* bytes = static_cast<const char*>(params[0]);
    std::vector<unsigned long long> args((function.args_bytes + 7) / 8);
    std::memcpy(args.data(), bytes, function.args_bytes);
    return submit(s, [name = function.name, args = std::move(args), gx, gy, gz, bx, shared, size = function.args_bytes] {
        const EmulatedLaunch launch{name.c_str(), {gx, gy, gz}, bx, shared, args.data(), size};
        const char* wrong = emulation_launch(&launch, 1);
        return wrong ? complain(launch_failed, "kernel", wrong) : Result(ok);
    });
}

}  // extern "C"
