// What the CUDA kernels use of the machine: types, half precision pairs, asynchronous copies, matrix units, barriers.
// Kernels contain no assembly of their own, so that another implementation of this header can run them on a CPU.
//
// Every kernel takes one structure of arguments by value and dynamic shared memory only.
#pragma once
#ifdef AWQUA_MACHINE
#include AWQUA_MACHINE
#else

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef int i32;

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define UNROLL_1 _Pragma("unroll 1")
#define UNROLL_4 _Pragma("unroll 4")
// A kernel of at most `threads` threads a block, `blocks` of which fit a multiprocessor.
#define KERNEL(name, Args, threads, blocks)                                                                            \
    extern "C" __global__ void __launch_bounds__(threads, blocks) name(const __grid_constant__ Args args)

#if __CUDA_ARCH__ >= 800
#define HAS_ASYNC_COPY 1
#else
#define HAS_ASYNC_COPY 0
#endif
// Asynchronous group matrix products and register reallocation exist on 9.0 alone.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#define HAS_WGMMA 1
#else
#define HAS_WGMMA 0
#endif

// The block's dynamic shared memory.
DEVICE u8* shared_memory() {
    extern __shared__ __align__(1024) u8 memory[];
    return memory;
}

DEVICE u32 shared_address(const void* pointer) { return static_cast<u32>(__cvta_generic_to_shared(pointer)); }

DEVICE u32 lane_id() { return threadIdx.x & 31u; }
DEVICE u32 warp_id() { return threadIdx.x >> 5; }

// The same value in all lanes, known to be so.
DEVICE u32 uniform(u32 value) { return __shfl_sync(0xffffffffu, value, 0); }

// Half precision pairs, the first in the low half.

DEVICE u32 h2_add(u32 a, u32 b) {
    u32 d;
    asm("add.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 h2_sub(u32 a, u32 b) {
    u32 d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 h2_mul(u32 a, u32 b) {
    u32 d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
DEVICE u32 h2_fma(u32 a, u32 b, u32 c) {
    u32 d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
// (a & MASK) | value, in one operation.
template <u32 MASK>
DEVICE u32 and_or(u32 a, u32 value) {
    u32 d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(a), "n"(MASK), "r"(value));
    return d;
}
DEVICE u16 h_from_f32(float x) {
    u16 d;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(d) : "f"(x));
    return d;
}
DEVICE float h_to_f32(u16 x) {
    float d;
    asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"(x));
    return d;
}
DEVICE u32 h2_from_f32(float low, float high) {
#if __CUDA_ARCH__ >= 800
    u32 d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
#else
    return u32(h_from_f32(low)) | u32(h_from_f32(high)) << 16;
#endif
}
DEVICE float h2_low(u32 x) { return h_to_f32(u16(x)); }
DEVICE float h2_high(u32 x) { return h_to_f32(u16(x >> 16)); }
// Four bytes of a (0 to 3) and b (4 to 7), as the digits of `selector` name them, the lowest first.
DEVICE u32 byte_perm(u32 a, u32 b, u32 selector) { return __byte_perm(a, b, selector); }
// Both halves are the half precision value `bits`.
DEVICE u32 h2_dup(u32 bits) { return __byte_perm(bits, bits, 0x1010); }

DEVICE float as_f32(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 as_u32(float x) { return __float_as_uint(x); }

DEVICE float exp_fast(float x) { return __expf(x); }
DEVICE float exp2_approx(float x) {
    float d;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
    return d;
}

// Memory. Activations of earlier kernels are read past the L1 cache: a kernel may begin before the one that writes them
// ends, and lines that were cached in between would be stale.

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

DEVICE U4 load_fresh(const U4* p) {
    U4 v;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
DEVICE U2 load_fresh(const U2* p) {
    U2 v;
    asm volatile("ld.global.cg.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
    return v;
}
DEVICE F4 load_fresh(const F4* p) {
    F4 v;
    asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];"
                 : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}
DEVICE float load_fresh(const float* p) {
    float v;
    asm volatile("ld.global.cg.f32 %0, [%1];" : "=f"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u32 load_fresh(const u32* p) {
    u32 v;
    asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u64 load_fresh(const u64* p) {
    u64 v;
    asm volatile("ld.global.cg.u64 %0, [%1];" : "=l"(v) : "l"(p) : "memory");
    return v;
}
DEVICE u16 load_fresh(const u16* p) {
    u16 v;
    asm volatile("ld.global.cg.u16 %0, [%1];" : "=h"(v) : "l"(p) : "memory");
    return v;
}

// Weights: read once, never written, so they need not stay in the L1 cache.
DEVICE U4 load_weights(const U4* p) {
    U4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
DEVICE U2 load_weights(const U2* p) {
    U2 v;
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

// Host memory that the device reads and writes directly.
DEVICE u32 load_host(const u32* p) {
    u32 v;
    asm volatile("ld.volatile.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
    return v;
}
DEVICE void store_host(u64* p, u64 v) {
    __threadfence_system();
    asm volatile("st.volatile.global.u64 [%0], %1;" : : "l"(p), "l"(v) : "memory");
}

// Asynchronous copies of 16 bytes to shared memory. Where the machine has none they happen at once. No cache policy is
// given: NVRTC 12.9 encodes some such copies with descriptors that 9.0 and later refuse, see build.py.

DEVICE void copy_async16(void* to, const void* from) {
#if HAS_ASYNC_COPY
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" : : "r"(shared_address(to)), "l"(from) : "memory");
#else
    *static_cast<U4*>(to) = load_fresh(static_cast<const U4*>(from));
#endif
}
// The same; its neighbours are wanted soon and may come along as far as the L2 cache. For runs too short for the memory
// to be quick with them one by one.
DEVICE void copy_async16_of_run(void* to, const void* from) {
#if HAS_ASYNC_COPY
    asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16;"
                 :
                 : "r"(shared_address(to)), "l"(from)
                 : "memory");
#else
    copy_async16(to, from);
#endif
}
// Zeros where `valid` is false; `from` is not read then.
DEVICE void copy_async16(void* to, const void* from, bool valid) {
#if HAS_ASYNC_COPY
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
                 :
                 : "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<U4*>(to) = valid ? load_fresh(static_cast<const U4*>(from)) : U4{0, 0, 0, 0};
#endif
}
DEVICE void copy_async_commit() {
#if HAS_ASYNC_COPY
    asm volatile("cp.async.commit_group;" : : : "memory");
#endif
}
// Waits until at most N of this thread's groups are under way.
template <int N>
DEVICE void copy_async_wait() {
#if HAS_ASYNC_COPY
    asm volatile("cp.async.wait_group %0;" : : "n"(N) : "memory");
#endif
}

// Barriers.

DEVICE void block_sync() { __syncthreads(); }
// Of `threads` threads that all pass this `id`, from 1 on.
DEVICE void group_sync(u32 id, u32 threads) { asm volatile("bar.sync %0, %1;" : : "r"(id), "r"(threads) : "memory"); }
DEVICE void warp_sync() { __syncwarp(); }
DEVICE void fence_device() { __threadfence(); }
DEVICE u32 atomic_add(u32* p, u32 v) { return atomicAdd(p, v); }
// In shared memory.
DEVICE u32 atomic_add_shared(u32* p, u32 v) { return atomicAdd(p, v); }

DEVICE float shfl_xor(float v, u32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE u32 shfl_xor(u32 v, u32 mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE float shfl(float v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }
DEVICE u32 shfl(u32 v, u32 lane) { return __shfl_sync(0xffffffffu, v, lane); }

DEVICE float warp_sum(float v) {
    UNROLL for (u32 m = 16; m > 0; m /= 2) v += shfl_xor(v, m);
    return v;
}
DEVICE float warp_max(float v) {
    UNROLL for (u32 m = 16; m > 0; m /= 2) v = fmaxf(v, shfl_xor(v, m));
    return v;
}

// Sum over the block, in all threads; `scratch` holds 33 numbers that no thread uses on entry.
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

// Launches that overlap: waits until the kernel before this one is done and its writes are seen, then lets the next one
// begin. Kernels read nothing that others write, and write nothing, before they wait. As the next one begins only now,
// all kernels before the previous one have ended when a kernel begins.
DEVICE void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" : : : "memory");
    asm volatile("griddepcontrol.launch_dependents;" : : : "memory");
#endif
}

// Matrix units: d += a b, (16, 16) by (16, 8) half precision, sums in f32. Lane 4 g + c holds of a rows g and g + 8,
// columns 2c, 2c + 1 (a0: row g, a1: row g + 8) and 2c + 8, 2c + 9 (a2, a3); of b rows 2c, 2c + 1 (b0) and 2c + 8,
// 2c + 9 (b1) of column g; of d rows g (d0, d1) and g + 8 (d2, d3), columns 2c, 2c + 1.
DEVICE void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                 "{%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
                 : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
}

// Four 8 x 8 half precision matrices from shared memory: lane l gives the address of row l % 8 of matrix l / 8, 16
// bytes; gets of matrix i in d[i] the elements 2c, 2c + 1 of row g. Transposed: elements (2c, g) and (2c + 1, g).
DEVICE void load_matrices(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}
DEVICE void load_matrices_transposed(u32 (&d)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
                 : "r"(shared_address(row))
                 : "memory");
}
#endif
