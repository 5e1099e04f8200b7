// Answers for libnccl.so.2: ranks of one machine meet in shared memory and move bytes through it, on the stand-in driver's streams.
//
// As NCCL does, it starts without blocking if it is told so, waits for ever for a rank that is gone, and can be aborted. NCCL_STANDIN
// names what should be otherwise:
//   hang=R   rank R never joins        fail=N   the N-th exchange of a rank fails, and so does the communicator
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

extern "C" int standin_submit(void* stream, const std::function<int()>& work);
extern "C" bool standin_inside(const void* pointer, std::size_t bytes);

namespace {

enum { success = 0, system_error = 2, invalid_argument = 4, invalid_usage = 5, in_progress = 7, float32 = 7 };
constexpr int most_ranks = 16, most_splits = 4;
constexpr std::size_t piece = 64 << 10;

struct Box { std::atomic<std::uint32_t> full; std::uint32_t bytes; char data[piece]; };
struct Split { std::atomic<int> ready; int color, key; };
struct Shared {
    std::atomic<int> joined;
    // By round: a fast rank may be in the next one while a slow one still reads.
    Split split[most_splits][most_ranks];
    Box box[most_ranks][most_ranks];
};
struct Config { std::size_t size; unsigned magic, version; int blocking; };

long told(const char* name, long otherwise) {
    const char* text = std::getenv("NCCL_STANDIN");
    const std::size_t length = std::strlen(name);
    return text && !std::strncmp(text, name, length) && text[length] == '=' ? std::atol(text + length + 1) : otherwise;
}

// A process that ends before its groups are aborted leaves no memory behind.
void unlink_at_exit(const std::string& name) {
    static struct Names {
        std::mutex lock;
        std::vector<std::string> all;
        ~Names() { for (const auto& name : all) shm_unlink(name.c_str()); }
    } names;
    const std::lock_guard guard(names.lock);
    names.all.push_back(name);
}

struct Comm {
    std::string name;
    int rank, ranks, rounds = 0;
    Shared* shared = nullptr;
    std::atomic<int> state{in_progress};
    std::atomic<bool> aborted{false};
    std::thread starter;

    Comm(std::string name_, int rank_, int ranks_) : name(std::move(name_)), rank(rank_), ranks(ranks_) {
        const int file = shm_open(name.c_str(), O_RDWR | O_CREAT, 0600);
        unlink_at_exit(name);
        if (file < 0 || ftruncate(file, sizeof(Shared))) return;
        void* map = mmap(nullptr, sizeof(Shared), PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
        close(file);
        if (map != MAP_FAILED) shared = static_cast<Shared*>(map);
    }
    template <class Ready> bool wait(Ready ready) {
        while (!ready() && !aborted) std::this_thread::sleep_for(std::chrono::milliseconds(1));
        return !aborted;
    }
    void join(bool hangs) {
        if (hangs) return;
        ++shared->joined;
        if (!wait([this] { return shared->joined >= ranks; })) return;
        // The name is needed no more; it is gone even if a rank is killed from here on.
        shm_unlink(name.c_str());
        state = success;
    }
};

struct Transfer {
    int peer;
    bool sends;
    char* at;
    std::size_t left;
};

int drive(Comm& comm, std::vector<Transfer> transfers) {
    static std::atomic<long> exchanges{0};
    if (++exchanges == told("fail", -1)) return comm.state = system_error, 0;
    for (bool open = true; open;) {
        bool moved = open = false;
        for (Transfer& t : transfers) {
            if (!t.left) continue;
            open = true;
            Box& box = t.sends ? comm.shared->box[comm.rank][t.peer] : comm.shared->box[t.peer][comm.rank];
            if (box.full.load(std::memory_order_acquire) == (t.sends ? 1u : 0u)) continue;
            if (t.sends) box.bytes = std::uint32_t(t.left < piece ? t.left : piece);
            std::memcpy(t.sends ? box.data : t.at, t.sends ? t.at : box.data, box.bytes);
            t.at += box.bytes;
            t.left -= box.bytes;
            box.full.store(t.sends ? 1 : 0, std::memory_order_release);
            moved = true;
        }
        if (comm.aborted || comm.state != success) return 0;
        if (open && !moved) std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    return 0;
}

struct Pending { Comm* comm; void* stream; Transfer transfer; };
thread_local bool is_grouped = false;
thread_local std::vector<Pending> group;

int transfer(const void* at, std::size_t count, int type, int peer, Comm* comm, void* stream, bool sends) {
    if (comm->state != success) return comm->state == in_progress ? int(invalid_usage) : comm->state.load();
    if (type != float32 || peer < 0 || peer >= comm->ranks || !standin_inside(at, count * 4)) return invalid_argument;
    group.push_back({comm, stream, {peer, sends, static_cast<char*>(const_cast<void*>(at)), count * 4}});
    return success;
}

}  // namespace

extern "C" {

struct Id { char bytes[128]; };
int ncclGetVersion(int* version) { return *version = 22403, success; }
const char* ncclGetErrorString(int code) { return code == system_error ? "unhandled system error" : "an error"; }
int ncclGetUniqueId(Id* id) {
    static std::atomic<int> serial{0};
    std::memset(id, 0, sizeof *id);
    std::snprintf(id->bytes, sizeof id->bytes, "/nccl-standin-%d-%d", getpid(), serial++);
    return success;
}
int ncclCommInitRankConfig(Comm** out, int ranks, Id id, int rank, const Config* config) {
    if (ranks < 1 || ranks > most_ranks || rank < 0 || rank >= ranks || config->magic != 0xcafebeef || config->blocking != 0 || !id.bytes[0])
        return invalid_argument;
    auto comm = std::make_unique<Comm>(id.bytes, rank, ranks);
    if (!comm->shared) return system_error;
    *out = comm.release();
    (*out)->starter = std::thread([c = *out] { c->join(c->rank == told("hang", -1)); });
    return in_progress;
}
int ncclCommSplit(Comm* comm, int color, int key, Comm** out, const void*) {
    if (comm->state != success || comm->rounds == most_splits) return invalid_usage;
    const int round = comm->rounds++;
    Split* splits = comm->shared->split[round];
    Split& own = splits[comm->rank];
    own.color = color, own.key = key, own.ready = 1;
    for (int peer = 0; peer < comm->ranks; ++peer)
        if (!comm->wait([&] { return splits[peer].ready == 1; })) return system_error;
    int rank = 0, ranks = 0;
    for (int peer = 0; peer < comm->ranks; ++peer) {
        const Split& other = splits[peer];
        if (other.color != color) continue;
        ++ranks;
        rank += other.key < key;
    }
    auto* child = *out = new Comm(comm->name + "-" + std::to_string(round) + "-" + std::to_string(color), rank, ranks);
    if (!child->shared) return system_error;
    child->join(false);
    return success;
}
int ncclCommGetAsyncError(Comm* comm, int* state) { return *state = comm->state, success; }
int ncclCommAbort(Comm* comm) {
    comm->aborted = true;
    if (comm->starter.joinable()) comm->starter.join();
    shm_unlink(comm->name.c_str());
    // What the stream still does with it ends by itself; its memory stays.
    return success;
}

int ncclSend(const void* from, std::size_t count, int type, int peer, Comm* comm, void* stream) {
    return is_grouped ? transfer(from, count, type, peer, comm, stream, true) : int(invalid_usage);
}
int ncclRecv(void* to, std::size_t count, int type, int peer, Comm* comm, void* stream) {
    return is_grouped ? transfer(to, count, type, peer, comm, stream, false) : int(invalid_usage);
}
int ncclGroupStart() { return is_grouped = true, success; }
int ncclGroupEnd() {
    is_grouped = false;
    if (group.empty()) return success;
    std::vector<Transfer> transfers;
    for (const Pending& pending : group) transfers.push_back(pending.transfer);
    Comm* comm = group[0].comm;
    void* stream = group[0].stream;
    group.clear();
    return standin_submit(stream, [=] { return drive(*comm, transfers); }) ? int(system_error) : int(success);
}
int ncclAllGather(const void* from, void* to, std::size_t count, int type, Comm* comm, void* stream) {
    if (comm->state != success) return comm->state == in_progress ? int(invalid_usage) : comm->state.load();
    const std::size_t bytes = count * 4;
    if (type != float32 || !standin_inside(from, bytes) || !standin_inside(to, bytes * comm->ranks)) return invalid_argument;
    return standin_submit(stream, [=] {
        auto* source = static_cast<char*>(const_cast<void*>(from));
        auto* target = static_cast<char*>(to);
        std::memmove(target + comm->rank * bytes, source, bytes);
        std::vector<Transfer> transfers;
        for (int peer = 0; peer < comm->ranks; ++peer) {
            if (peer == comm->rank) continue;
            transfers.push_back({peer, true, target + comm->rank * bytes, bytes});
            transfers.push_back({peer, false, target + peer * bytes, bytes});
        }
        return drive(*comm, transfers);
    }) ? int(system_error) : int(success);
}

}  // extern "C"
