// A multiprocessor on the CPU: runs the CUDA kernels of this project thread by thread, to test their arithmetic and
// indexing where there is no GPU. It takes the place of shaders/src/prelude/device.cuh and hopper.cuh.
//
// Every thread of a block is a fiber; collective operations wait for the threads they need. The order of threads, and
// whether an asynchronous operation happens when it is asked for or at the last moment that the program allows, are
// random, so that missing waits and barriers show as wrong results. What it can not show: speed, and races between
// blocks, which run one after the other.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

namespace machine {

struct Dim {
    u32 x, y, z;
};

struct Kernel {
    const char* name;
    u32 args_bytes, threads;
    void (*body)(const void* args);
};
std::vector<Kernel>& kernels();
struct Registration {
    Registration(const char* name, u32 args_bytes, u32 threads, void (*body)(const void*)) {
        kernels().push_back({name, args_bytes, threads, body});
    }
};

// Runs a kernel to its end; false if it deadlocks or touches what it may not, with the reason in `error`.
bool run(const Kernel& kernel, const void* args, Dim grid, Dim block, u32 shared_bytes, const char** error);
// Sets the seed of the random choices.
void seed(u64 value);

// Of the running thread.
extern Dim thread_index, block_index, block_dim, grid_dim;
extern u8* shared;

[[noreturn]] void fail(const char* reason);
u32 random_below(u32 n);

// Waits until all lanes of the warp (group 32) or of four warps (128) have come with the same `all`, which is then
// called once with what they brought.
void meet(u32 group, void* mine, void (*all)(void** theirs));
void barrier(u32 id, u32 threads);
// Lets other threads run; `progress` tells that something changed.
void yield();
void progress();

// Asynchronous copies of 16 bytes of this thread.
void copy(void* to, const void* from, bool valid);
void copy_commit();
void copy_wait(u32 most);

// Barriers of bulk copies, eight bytes of shared memory.
void phase_init(u64* barrier, u32 arrivals);
void phase_arrive(u64* barrier, u32 bytes);
void phase_wait(u64* barrier, u32 parity);
void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier);

// Asynchronous matrix products of four warps; columns are 8 n.
void group_mma(float* d, u32* a, u64 b, u32 n);
void group_commit();
void group_wait(u32 most);

float half_to_float(u16 bits);
u16 half_from_double(double value);

// Checks that memory of the device or shared memory is touched.
void check_global(const void* p, u64 bytes);
void check_shared(const void* p, u64 bytes);

}  // namespace machine

#define DEVICE inline
#define UNROLL
#define UNROLL_1
#define UNROLL_4
#define HAS_ASYNC_COPY 1
#define HAS_WGMMA 1
#define KERNEL(name, Args, threads, blocks)                                                                            \
    static void name##_body(const Args& args);                                                                         \
    static machine::Registration name##_registration{#name, sizeof(Args), threads, [](const void* args) {              \
                                                         name##_body(*static_cast<const Args*>(args));                 \
                                                     }};                                                               \
    static void name##_body(const Args& args)

#define threadIdx machine::thread_index
#define blockIdx machine::block_index
#define blockDim machine::block_dim
#define gridDim machine::grid_dim

DEVICE u32 min(u32 a, u32 b) { return a < b ? a : b; }
DEVICE u32 max(u32 a, u32 b) { return a > b ? a : b; }
DEVICE i32 min(i32 a, i32 b) { return a < b ? a : b; }
DEVICE i32 max(i32 a, i32 b) { return a > b ? a : b; }
DEVICE float rsqrtf(float x) { return float(1 / std::sqrt(double(x))); }
DEVICE float exp_fast(float x) { return float(std::exp(double(x))); }

DEVICE u8* shared_memory() { return machine::shared; }
DEVICE u32 shared_address(const void* p) { return u32(static_cast<const u8*>(p) - machine::shared); }
DEVICE u32 lane_id() { return threadIdx.x & 31u; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }

DEVICE float h_to_f32(u16 x) { return machine::half_to_float(x); }
DEVICE u16 h_from_f32(float x) { return machine::half_from_double(x); }
DEVICE float h2_low(u32 x) { return h_to_f32(u16(x)); }
DEVICE float h2_high(u32 x) { return h_to_f32(u16(x >> 16)); }
template <class F>
DEVICE u32 h2_map(F f, u32 a, u32 b, u32 c) {
    const u16 low = machine::half_from_double(f(h2_low(a), h2_low(b), h2_low(c)));
    const u16 high = machine::half_from_double(f(h2_high(a), h2_high(b), h2_high(c)));
    return low | u32(high) << 16;
}
DEVICE u32 h2_add(u32 a, u32 b) { return h2_map([](double x, double y, double) { return x + y; }, a, b, 0); }
DEVICE u32 h2_sub(u32 a, u32 b) { return h2_map([](double x, double y, double) { return x - y; }, a, b, 0); }
DEVICE u32 h2_mul(u32 a, u32 b) { return h2_map([](double x, double y, double) { return x * y; }, a, b, 0); }
DEVICE u32 h2_fma(u32 a, u32 b, u32 c) { return h2_map([](double x, double y, double z) { return x * y + z; }, a, b, c); }
template <u32 MASK>
DEVICE u32 and_or(u32 a, u32 value) {
    return (a & MASK) | value;
}
DEVICE u32 h2_from_f32(float low, float high) { return u32(h_from_f32(low)) | u32(h_from_f32(high)) << 16; }
DEVICE u32 byte_perm(u32 a, u32 b, u32 selector) {
    const u64 both = a | u64(b) << 32;
    u32 d = 0;
    for (int i = 0; i < 4; i++) d |= u32(both >> (selector >> 4 * i & 7) * 8 & 0xff) << 8 * i;
    return d;
}
DEVICE u32 h2_dup(u32 bits) { return (bits & 0xffff) * 0x10001u; }
DEVICE float as_f32(u32 bits) {
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
}
DEVICE u32 as_u32(float x) {
    u32 bits;
    std::memcpy(&bits, &x, 4);
    return bits;
}
DEVICE float exp2_approx(float x) { return float(std::exp2(double(x))); }

template <class T>
struct alignas(sizeof(T) * 4) Vec4 {
    T x, y, z, w;
};
typedef Vec4<u32> U4;
typedef Vec4<float> F4;
struct alignas(8) U2 {
    u32 x, y;
};
struct alignas(8) F2 {
    float x, y;
};
template <class T>
DEVICE T load_checked(const T* p) {
    machine::check_global(p, sizeof(T));
    if (reinterpret_cast<uintptr_t>(p) % sizeof(T)) machine::fail("a misaligned load");
    return *p;
}
template <class T>
DEVICE T load_fresh(const T* p) {
    return load_checked(p);
}
template <class T>
DEVICE T load_weights(const T* p) {
    return load_checked(p);
}
DEVICE u32 load_host(const u32* p) { return *static_cast<const volatile u32*>(p); }
DEVICE void store_host(u64* p, u64 v) { *static_cast<volatile u64*>(p) = v; }

DEVICE void copy_async16(void* to, const void* from) { machine::copy(to, from, true); }
DEVICE void copy_async16_of_run(void* to, const void* from) { machine::copy(to, from, true); }
DEVICE void copy_async16(void* to, const void* from, bool valid) { machine::copy(to, from, valid); }
DEVICE void copy_async_commit() { machine::copy_commit(); }
template <int N>
DEVICE void copy_async_wait() {
    machine::copy_wait(N);
}

DEVICE void block_sync() { machine::barrier(0, 0); }
DEVICE void group_sync(u32 id, u32 threads) { machine::barrier(id, threads); }
DEVICE void warp_sync() {
    machine::meet(32, nullptr, [](void**) {});
}
DEVICE void fence_device() {}
DEVICE u32 atomic_add(u32* p, u32 v) {
    machine::check_global(p, 4);
    const u32 old = *p;
    *p += v;
    return old;
}
DEVICE u32 atomic_add_shared(u32* p, u32 v) {
    machine::check_shared(p, 4);
    const u32 old = *p;
    *p += v;
    return old;
}

template <class T>
struct Shuffle {
    T value, result;
    u32 from;
};
template <class T>
DEVICE T shuffle(T value, u32 from) {
    Shuffle<T> mine{value, value, from & 31};
    machine::meet(32, &mine, [](void** all) {
        for (u32 lane = 0; lane < 32; lane++) {
            Shuffle<T>* to = static_cast<Shuffle<T>*>(all[lane]);
            to->result = static_cast<Shuffle<T>*>(all[to->from])->value;
        }
    });
    return mine.result;
}
DEVICE float shfl_xor(float v, u32 mask) { return shuffle(v, lane_id() ^ mask); }
DEVICE u32 shfl_xor(u32 v, u32 mask) { return shuffle(v, lane_id() ^ mask); }
DEVICE float shfl(float v, u32 lane) { return shuffle(v, lane); }
DEVICE u32 shfl(u32 v, u32 lane) { return shuffle(v, lane); }
DEVICE u32 uniform(u32 value) { return shuffle(value, 0); }
DEVICE float warp_sum(float v) {
    for (u32 m = 16; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}
DEVICE float warp_max(float v) {
    for (u32 m = 16; m > 0; m /= 2) v = std::fmax(v, shfl_xor(v, m));
    return v;
}
DEVICE float block_sum(float v, float* scratch) {
    v = warp_sum(v);
    if (lane_id() == 0) scratch[warp_id()] = v;
    block_sync();
    if (warp_id() == 0) {
        float w = lane_id() < blockDim.x / 32 ? scratch[lane_id()] : 0.f;
        w = warp_sum(w);
        if (lane_id() == 0) scratch[32] = w;
    }
    block_sync();
    return scratch[32];
}

DEVICE void wait_for_previous() {}
DEVICE void let_next_begin() {}

struct Mma {
    float* d;
    const u32* a;
    u32 b[2];
};
// Element (row, k) of the first operand as the lanes hold it, and (k, column) of the second one.
DEVICE float mma_a(void** all, u32 row, u32 k) {
    const u32 lane = row % 8 * 4 + k % 8 / 2;
    const u32 pair = static_cast<Mma*>(all[lane])->a[row / 8 + k / 8 * 2];
    return k % 2 ? h2_high(pair) : h2_low(pair);
}
DEVICE float mma_b(void** all, u32 k, u32 column) {
    const u32 pair = static_cast<Mma*>(all[column * 4 + k % 8 / 2])->b[k / 8];
    return k % 2 ? h2_high(pair) : h2_low(pair);
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
    Mma mine{d, a, {b0, b1}};
    machine::meet(32, &mine, [](void** all) {
        float a[16][16], b[8][16];
        for (u32 k = 0; k < 16; k++) {
            for (u32 row = 0; row < 16; row++) a[row][k] = mma_a(all, row, k);
            for (u32 column = 0; column < 8; column++) b[column][k] = mma_b(all, k, column);
        }
        for (u32 row = 0; row < 16; row++) {
            for (u32 column = 0; column < 8; column++) {
                float sum = 0;
                for (u32 k = 0; k < 16; k++) sum += a[row][k] * b[column][k];
                static_cast<Mma*>(all[row % 8 * 4 + column / 2])->d[row / 8 * 2 + column % 2] += sum;
            }
        }
    });
}

struct Matrices {
    u32* d;
    const u8* row;
    bool transposed;
};
DEVICE void matrices(u32* d, const void* row, bool transposed) {
    machine::check_shared(row, 16);
    if (reinterpret_cast<uintptr_t>(row) % 16) machine::fail("a misaligned row of a matrix");
    Matrices mine{d, static_cast<const u8*>(row), transposed};
    machine::meet(32, &mine, [](void** all) {
        for (u32 lane = 0; lane < 32; lane++) {
            Matrices* to = static_cast<Matrices*>(all[lane]);
            for (u32 i = 0; i < 4; i++) {
                u16 pair[2];
                for (u32 j = 0; j < 2; j++) {
                    const u32 row = to->transposed ? lane % 4 * 2 + j : lane / 4;
                    const u32 column = to->transposed ? lane / 4 : lane % 4 * 2 + j;
                    const u8* from = static_cast<Matrices*>(all[i * 8 + row])->row;
                    std::memcpy(&pair[j], from + column * 2, 2);
                }
                to->d[i] = pair[0] | u32(pair[1]) << 16;
            }
        }
    });
}
DEVICE void load_matrices(u32 (&d)[4], const void* row) { matrices(d, row, false); }
DEVICE void load_matrices_transposed(u32 (&d)[4], const void* row) { matrices(d, row, true); }

DEVICE void barrier_init(u64* barrier, u32 arrivals) { machine::phase_init(barrier, arrivals); }
DEVICE void barrier_init_fence() {}
DEVICE void barrier_expect(u64* barrier, u32 bytes) { machine::phase_arrive(barrier, bytes); }
DEVICE void barrier_arrive(u64* barrier) { machine::phase_arrive(barrier, 0); }
DEVICE void barrier_wait(u64* barrier, u32 parity) { machine::phase_wait(barrier, parity); }
DEVICE void copy_bulk(void* to, const void* from, u32 bytes, u64* barrier) { machine::copy_bulk(to, from, bytes, barrier); }
template <int N>
DEVICE void registers_grow() {}
template <int N>
DEVICE void registers_shrink() {}
// Offset in shared memory; the fields that select rows of 128 bytes with exchanged units are those of the machine.
DEVICE u64 operand_descriptor(const void* start) {
    const u32 at = shared_address(start);
    if (at % 1024) machine::fail("an operand does not begin at a multiple of 1024 bytes");
    return u64(at >> 4) | u64(1) << 16 | u64(1024 >> 4) << 32 | u64(1) << 62;
}
DEVICE u64 operand_step(u64 descriptor, u32 step) { return descriptor + step * 2; }
DEVICE void group_mma_fence() {}
DEVICE void group_mma_commit() { machine::group_commit(); }
template <int N>
DEVICE void group_mma_wait() {
    machine::group_wait(N);
}
template <class T, int N>
DEVICE void hold(T (&)[N]) {}
DEVICE void group_mma_128(float (&d)[64], u32 (&a)[4], u64 b) { machine::group_mma(d, a, b, 128); }
DEVICE void group_mma_64(float (&d)[32], u32 (&a)[4], u64 b) { machine::group_mma(d, a, b, 64); }
