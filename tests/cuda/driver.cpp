// A CUDA driver that runs on the CPU: the functions that the backend uses, over the machine of machine.h, for tests. As a
// library called libcuda.so it takes the place of NVIDIA's. Everything happens at once, in the order of the calls.
//
// AWQUA_MACHINE_CAPABILITY (90 unless given) is the compute capability it claims, AWQUA_MACHINE_PROCESSORS (4) the number
// of multiprocessors, AWQUA_MACHINE_SEED the start of its random choices, AWQUA_MACHINE_DRIVER the version it speaks,
// AWQUA_MACHINE_BROKEN a function that fails. What a kernel does wrong goes to the standard error.
#define AWQUA_MACHINE "machine.h"
#include "kernels.cu"

#include <sys/mman.h>

#include <chrono>
#include <map>
#include <mutex>
#include <string>

namespace {

constexpr int SUCCESS = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, NO_DEVICE = 100, NOT_FOUND = 500,
              LAUNCH_FAILED = 719;
constexpr u64 PAGE = 4096;

struct Allocation {
    u64 bytes, mapped;
    u8* start;
};
struct Recorded {
    const machine::Kernel* kernel;
    machine::Dim grid, block;
    u32 shared;
    std::vector<u64> args;
};
struct Graph {
    std::vector<Recorded> launches;
};
struct Stream {
    Graph* recording = nullptr;
};
struct Event {
    std::chrono::steady_clock::time_point time;
};
struct LaunchConfig {
    u32 grid_x, grid_y, grid_z, block_x, block_y, block_z, shared;
    Stream* stream;
    void* attributes;
    u32 n_attributes;
};
struct Copy2d {
    size_t src_x, src_y;
    int src_type;
    const void* src_host;
    u64 src_device;
    void* src_array;
    size_t src_pitch;
    size_t dst_x, dst_y;
    int dst_type;
    void* dst_host;
    u64 dst_device;
    void* dst_array;
    size_t dst_pitch;
    size_t width, height;
};

// One call at a time.
std::recursive_mutex one;
std::map<u64, Allocation> allocations;
u64 in_use = 0;
bool started = false, lost = false;

u64 number(const char* name, u64 otherwise) {
    const char* text = std::getenv(name);
    return text ? std::strtoull(text, nullptr, 10) : otherwise;
}
u64 memory_size() { return number("AWQUA_MACHINE_MEMORY", u64(8) << 30); }

// Whether `bytes` from `address` on lie in one allocation.
bool there(u64 address, u64 bytes) {
    auto next = allocations.upper_bound(address);
    if (next == allocations.begin()) return false;
    --next;
    return address + bytes <= next->first + next->second.bytes;
}

int status(const char* function) {
    const char* broken = std::getenv("AWQUA_MACHINE_BROKEN");
    if (broken && std::strcmp(broken, function) == 0) return 999;
    if (lost) return LAUNCH_FAILED;
    return started ? SUCCESS : NOT_INITIALIZED;
}

// Memory whose end is that of a page, in front of one that can not be touched.
void* guarded(u64 bytes) {
    const u64 size = (bytes + 15) / 16 * 16, mapped = (size + PAGE - 1) / PAGE * PAGE + PAGE;
    void* map = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (map == MAP_FAILED) return nullptr;
    u8* const end = static_cast<u8*>(map) + mapped - PAGE;
    mprotect(end, PAGE, PROT_NONE);
    u8* const start = end - size;
    std::memset(start, 0x7e, size);
    allocations[reinterpret_cast<u64>(start)] = {size, mapped, static_cast<u8*>(map)};
    in_use += size;
    return start;
}
bool release(u64 address) {
    auto found = allocations.find(address);
    if (found == allocations.end()) return false;
    in_use -= found->second.bytes;
    munmap(found->second.start, found->second.mapped);
    allocations.erase(found);
    return true;
}

int run(const Recorded& launch) {
    const char* error = "";
    if (machine::run(*launch.kernel, launch.args.data(), launch.grid, launch.block, launch.shared, &error)) return SUCCESS;
    std::fprintf(stderr, "kernel %s: %s\n", launch.kernel->name, error);
    lost = true;
    return LAUNCH_FAILED;
}

}  // namespace

namespace machine {
void check_global(const void* p, u64 bytes) {
    if (!there(reinterpret_cast<u64>(p), bytes)) fail("an address outside of all memory");
}
}  // namespace machine

#define FUNCTION extern "C" __attribute__((visibility("default"))) int
#define CHECK_STATUS                                                                                                   \
    const std::lock_guard<std::recursive_mutex> guard(one);                                                            \
    if (int code = status(__func__)) return code

FUNCTION cuInit(u32) {
    const std::lock_guard<std::recursive_mutex> guard(one);
    started = true;
    machine::seed(number("AWQUA_MACHINE_SEED", 1));
    return status(__func__);
}
FUNCTION cuDriverGetVersion(int* version) {
    *version = int(number("AWQUA_MACHINE_DRIVER", 13000));
    return SUCCESS;
}
FUNCTION cuGetErrorString(int code, const char** text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == LAUNCH_FAILED ? "a kernel failed" : "something failed";
    return SUCCESS;
}
FUNCTION cuDeviceGetCount(int* count) {
    CHECK_STATUS;
    *count = int(number("AWQUA_MACHINE_DEVICES", 1));
    return SUCCESS;
}
FUNCTION cuDeviceGet(int* device, int index) {
    CHECK_STATUS;
    *device = index;
    return index == 0 ? SUCCESS : NO_DEVICE;
}
FUNCTION cuDeviceGetName(char* name, int size, int) {
    CHECK_STATUS;
    std::snprintf(name, size_t(size), "machine on the CPU");
    return SUCCESS;
}
FUNCTION cuDeviceGetUuid_v2(u8* uuid, int) {
    CHECK_STATUS;
    std::memset(uuid, 0x42, 16);
    return SUCCESS;
}
FUNCTION cuDeviceTotalMem_v2(size_t* bytes, int) {
    CHECK_STATUS;
    *bytes = memory_size();
    return SUCCESS;
}
FUNCTION cuDeviceGetAttribute(int* value, int which, int) {
    CHECK_STATUS;
    const int capability = int(number("AWQUA_MACHINE_CAPABILITY", 90));
    switch (which) {
        case 16: *value = int(number("AWQUA_MACHINE_PROCESSORS", 4)); break;
        case 75: *value = capability / 10; break;
        case 76: *value = capability % 10; break;
        case 97:
            *value = capability >= 90 ? 232448 : capability == 80 ? 166912 : capability > 80 ? 101376 : 65536;
            break;
        default: return INVALID_VALUE;
    }
    return SUCCESS;
}
FUNCTION cuDevicePrimaryCtxRetain(void** context, int) {
    CHECK_STATUS;
    *context = &allocations;
    return SUCCESS;
}
FUNCTION cuDevicePrimaryCtxRelease_v2(int) { return SUCCESS; }
FUNCTION cuCtxPushCurrent_v2(void*) { return status(__func__) == NOT_INITIALIZED ? NOT_INITIALIZED : SUCCESS; }
FUNCTION cuCtxPopCurrent_v2(void**) { return SUCCESS; }
FUNCTION cuCtxGetStreamPriorityRange(int* least, int* greatest) {
    *least = 0;
    *greatest = -5;
    return SUCCESS;
}
FUNCTION cuMemGetInfo_v2(size_t* free, size_t* total) {
    CHECK_STATUS;
    *total = memory_size();
    *free = *total > in_use ? *total - in_use : 0;
    return SUCCESS;
}
FUNCTION cuMemAlloc_v2(u64* address, size_t bytes) {
    CHECK_STATUS;
    if (in_use + bytes > memory_size()) return OUT_OF_MEMORY;
    void* const memory = guarded(bytes);
    *address = reinterpret_cast<u64>(memory);
    return memory ? SUCCESS : OUT_OF_MEMORY;
}
FUNCTION cuMemFree_v2(u64 address) {
    const std::lock_guard<std::recursive_mutex> guard(one);
    return release(address) ? SUCCESS : INVALID_VALUE;
}
FUNCTION cuMemHostAlloc(void** host, size_t bytes, u32) {
    CHECK_STATUS;
    *host = guarded((bytes + PAGE - 1) / PAGE * PAGE);
    return *host ? SUCCESS : OUT_OF_MEMORY;
}
FUNCTION cuMemFreeHost(void* host) {
    const std::lock_guard<std::recursive_mutex> guard(one);
    return release(reinterpret_cast<u64>(host)) ? SUCCESS : INVALID_VALUE;
}
FUNCTION cuMemHostGetDevicePointer_v2(u64* address, void* host, u32) {
    *address = reinterpret_cast<u64>(host);
    return SUCCESS;
}
FUNCTION cuMemcpyHtoDAsync_v2(u64 to, const void* from, size_t bytes, Stream*) {
    CHECK_STATUS;
    if (!there(to, bytes)) return INVALID_VALUE;
    std::memcpy(reinterpret_cast<void*>(to), from, bytes);
    return SUCCESS;
}
FUNCTION cuMemcpyDtoHAsync_v2(void* to, u64 from, size_t bytes, Stream*) {
    CHECK_STATUS;
    if (!there(from, bytes)) return INVALID_VALUE;
    std::memcpy(to, reinterpret_cast<const void*>(from), bytes);
    return SUCCESS;
}
FUNCTION cuMemcpy2DAsync_v2(const Copy2d* copy, Stream*) {
    CHECK_STATUS;
    constexpr int HOST = 1, DEVICE_MEMORY = 2;
    const u8* from = copy->src_type == HOST ? static_cast<const u8*>(copy->src_host)
                                            : reinterpret_cast<const u8*>(copy->src_device);
    u8* to = copy->dst_type == HOST ? static_cast<u8*>(copy->dst_host) : reinterpret_cast<u8*>(copy->dst_device);
    const u64 from_end = (copy->height - 1) * copy->src_pitch + copy->width;
    const u64 to_end = (copy->height - 1) * copy->dst_pitch + copy->width;
    if (copy->src_type == DEVICE_MEMORY && !there(copy->src_device, from_end)) return INVALID_VALUE;
    if (copy->dst_type == DEVICE_MEMORY && !there(copy->dst_device, to_end)) return INVALID_VALUE;
    for (size_t row = 0; row < copy->height; row++) {
        std::memcpy(to + row * copy->dst_pitch, from + row * copy->src_pitch, copy->width);
    }
    return SUCCESS;
}
FUNCTION cuMemsetD8Async(u64 address, u8 value, size_t bytes, Stream*) {
    CHECK_STATUS;
    if (!there(address, bytes)) return INVALID_VALUE;
    std::memset(reinterpret_cast<void*>(address), value, bytes);
    return SUCCESS;
}
FUNCTION cuStreamCreateWithPriority(Stream** stream, u32, int priority) {
    CHECK_STATUS;
    const char* expected = std::getenv("AWQUA_MACHINE_PRIORITY");
    if (expected && std::atoi(expected) != priority) return INVALID_VALUE;
    *stream = new Stream;
    return SUCCESS;
}
FUNCTION cuStreamDestroy_v2(Stream* stream) {
    delete stream;
    return SUCCESS;
}
FUNCTION cuStreamWaitEvent(Stream*, Event*, u32) { return status(__func__); }
FUNCTION cuStreamSynchronize(Stream*) { return status(__func__); }
FUNCTION cuStreamBeginCapture_v2(Stream* stream, int) {
    CHECK_STATUS;
    stream->recording = new Graph;
    return SUCCESS;
}
FUNCTION cuStreamEndCapture(Stream* stream, Graph** graph) {
    CHECK_STATUS;
    *graph = stream->recording;
    stream->recording = nullptr;
    return SUCCESS;
}
FUNCTION cuGraphInstantiateWithFlags(Graph** exec, Graph* graph, u64) {
    CHECK_STATUS;
    *exec = new Graph(*graph);
    return SUCCESS;
}
FUNCTION cuGraphDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}
FUNCTION cuGraphExecDestroy(Graph* graph) {
    delete graph;
    return SUCCESS;
}
FUNCTION cuGraphLaunch(Graph* graph, Stream*) {
    CHECK_STATUS;
    for (const Recorded& launch : graph->launches) {
        if (int code = run(launch)) return code;
    }
    return SUCCESS;
}
FUNCTION cuEventCreate(Event** event, u32) {
    CHECK_STATUS;
    *event = new Event;
    return SUCCESS;
}
FUNCTION cuEventDestroy_v2(Event* event) {
    delete event;
    return SUCCESS;
}
FUNCTION cuEventRecord(Event* event, Stream*) {
    CHECK_STATUS;
    event->time = std::chrono::steady_clock::now();
    return SUCCESS;
}
FUNCTION cuEventQuery(Event*) { return status(__func__); }
FUNCTION cuEventSynchronize(Event*) { return status(__func__); }
FUNCTION cuEventElapsedTime(float* milliseconds, Event* from, Event* to) {
    *milliseconds = std::chrono::duration<float, std::milli>(to->time - from->time).count();
    return status(__func__);
}
FUNCTION cuModuleLoadData(void** module, const void*) {
    CHECK_STATUS;
    *module = &allocations;
    return SUCCESS;
}
FUNCTION cuModuleUnload(void*) { return SUCCESS; }
FUNCTION cuModuleGetFunction(const machine::Kernel** function, void*, const char* name) {
    CHECK_STATUS;
    for (const machine::Kernel& kernel : machine::kernels()) {
        if (std::strcmp(kernel.name, name) == 0) {
            *function = &kernel;
            return SUCCESS;
        }
    }
    return NOT_FOUND;
}
FUNCTION cuFuncSetAttribute(void*, int, int) { return status(__func__); }
FUNCTION cuLaunchKernelEx(const LaunchConfig* config, const machine::Kernel* kernel, void** args, void**) {
    CHECK_STATUS;
    if (config->grid_x == 0 || config->grid_y == 0 || config->grid_z == 0 || config->grid_y > 65535 ||
        config->grid_z > 65535) {
        std::fprintf(stderr, "kernel %s: an impossible grid\n", kernel->name);
        return INVALID_VALUE;
    }
    int most = 0;
    cuDeviceGetAttribute(&most, 97, 0);
    if (config->shared > u32(most)) {
        std::fprintf(stderr, "kernel %s: %u bytes of shared memory\n", kernel->name, config->shared);
        return INVALID_VALUE;
    }
    Recorded launch{kernel,
                    {config->grid_x, config->grid_y, config->grid_z},
                    {config->block_x, config->block_y, config->block_z},
                    config->shared,
                    std::vector<u64>((kernel->args_bytes + 7) / 8)};
    std::memcpy(launch.args.data(), args[0], kernel->args_bytes);
    if (config->stream && config->stream->recording) {
        config->stream->recording->launches.push_back(std::move(launch));
        return SUCCESS;
    }
    return run(launch);
}
