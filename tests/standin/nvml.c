// Answers for NVML on a machine without devices: healthy H100s, but for what NVML_STANDIN names.
//   devices=N      how many                     free=GIB       free memory of device 0
//   ecc=N          uncorrected errors of it     pid=N          a process that computes on it
//   xid=N          the event that it reports once, after=MS milliseconds
#include <stdlib.h>
#include <string.h>
#include <time.h>

typedef int result; // nvmlReturn_t
enum { SUCCESS = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7, TIMEOUT = 10 };

static long told(const char *name, long otherwise) {
    const char *text = getenv("NVML_STANDIN");
    size_t length = strlen(name);
    for (; text && *text; text = strchr(text, ',') ? strchr(text, ',') + 1 : "")
        if (!strncmp(text, name, length) && text[length] == '=') return atol(text + length + 1);
    return otherwise;
}

// A handle is the device's number plus one.
static long index_of(void *device) { return (long)device - 1; }
static long of_first(void *device, const char *name, long otherwise) {
    return index_of(device) == 0 ? told(name, otherwise) : otherwise;
}

result nvmlInit_v2(void) { return SUCCESS; }
result nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(result code) { return code == NOT_FOUND ? "Not Found" : "an error"; }
result nvmlSystemGetDriverVersion(char *text, unsigned length) {
    strncpy(text, "550.54.15", length);
    return SUCCESS;
}
result nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12040; return SUCCESS; }
result nvmlSystemGetCudaDriverVersion(int *version) { return nvmlSystemGetCudaDriverVersion_v2(version); }
result nvmlDeviceGetCount_v2(unsigned *count) { *count = told("devices", 8); return SUCCESS; }
result nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= told("devices", 8)) return INVALID_ARGUMENT;
    *device = (void *)(long)(index + 1);
    return SUCCESS;
}
result nvmlDeviceGetIndex(void *device, unsigned *index) { *index = index_of(device); return SUCCESS; }
result nvmlDeviceGetName(void *device, char *text, unsigned length) {
    strncpy(text, "NVIDIA H100 80GB HBM3", length);
    return SUCCESS;
}
result nvmlDeviceGetMemoryInfo_v2(void *device, struct { unsigned version; unsigned long long total, reserved, free, used; } *memory) {
    memory->total = 81559ull << 20;
    memory->reserved = 0;
    memory->free = (unsigned long long)of_first(device, "free", 79) << 30;
    memory->used = memory->total - memory->free;
    return SUCCESS;
}
result nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return SUCCESS; }
result nvmlDeviceGetComputeRunningProcesses_v3(
    void *device, unsigned *count, struct { unsigned pid; unsigned long long bytes; unsigned gpu, compute; } *processes) {
    long pid = of_first(device, "pid", 0);
    unsigned room = *count;
    *count = pid != 0;
    if (pid && !room) return INSUFFICIENT_SIZE;
    if (pid) {
        memset(processes, 0, sizeof *processes);
        processes->pid = pid;
    }
    return SUCCESS;
}
result nvmlDeviceGetTotalEccErrors(void *device, int kind, int counter, unsigned long long *count) {
    *count = of_first(device, "ecc", 0);
    return SUCCESS;
}
result nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) { *reasons = 1; return SUCCESS; }
result nvmlDeviceGetP2PStatus(void *one, void *other, int index, int *status) { *status = 0; return SUCCESS; }
result nvmlEventSetCreate(void **set) { *set = malloc(1); return SUCCESS; }
result nvmlEventSetFree(void *set) { free(set); return SUCCESS; }
result nvmlDeviceRegisterEvents(void *device, unsigned long long types, void *set) { return SUCCESS; }
result nvmlEventSetWait_v2(
    void *set, struct { void *device; unsigned long long type, data; unsigned gpu, compute; } *event, unsigned ms) {
    static int is_reported = 0;
    long xid = is_reported ? 0 : told("xid", 0), wait = xid ? told("after", 0) : ms;
    struct timespec pause = {wait / 1000, wait % 1000 * 1000000};
    nanosleep(&pause, NULL);
    if (!xid) return TIMEOUT;
    is_reported = 1;
    memset(event, 0, sizeof *event);
    event->device = (void *)1;
    event->type = 8; // nvmlEventTypeXidCriticalError
    event->data = xid;
    return SUCCESS;
}
