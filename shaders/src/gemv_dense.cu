// y[t, n] = sum_k w[n, k] x[t, k] for few tokens, w half precision rows: the output head, and layers that are not packed.
//
// Mapping: a warp computes 16 outputs from its rows of w, up to 8 tokens at once on the matrix units; eight neighbouring
// inputs are two registers of an operand, as in prelude/w4.cuh. Blocks go over the outputs in turns, with the inputs in
// shared memory. One token: inputs are the sum of two half precision numbers, so that they lose nothing. Experts: y
// numbers the pairs of a token and an expert, each as one token.
// Few outputs, such as those of a router: a block has one of a token, in single precision.
// Traffic: weights once, inputs once a block.
#include "prelude/rows.cuh"

struct GemvDenseArgs {
    const u16* w;         // (padded to 16 rows, stride)
    const float* bias;    // (n), padded as w
    const float* x;       // (rows, x_stride) f32, of which a single one is read
    const u16* half_x;    // (tokens, x_stride) where x is null
    const float* norm;    // (k) weights of the norm in front of x, null for none
    float* out;           // (tokens, out_stride)
    float eps;
    u32 n, k;
    u32 stride;           // elements, a multiple of STAGE; zeros behind the k-th
    u32 x_stride, out_stride, out_offset;
    u32 tokens;           // at most 8
    u32 flags;            // ADD, HAS_BIAS
    float scale;          // WIDE if half_x is divided by it
};

struct GemvDenseExpertsArgs {
    GemvDenseArgs gemv;
    Experts experts;
};

// Half precision numbers of a row in shared memory, in 16-byte units that are exchanged within fours by odd rows.
DEVICE u32 input_unit(u32 row, u32 unit) { return unit ^ row % 2 * 4; }

template <bool ONE, class Rows>
DEVICE void gemv_dense(const GemvDenseArgs& args, const Rows& which) {
    const u32 lane = lane_id(), g = lane / 4, c = lane % 4, units = args.stride / 8;
    u8* const memory = shared_memory();
    // One token: two rows, the number and what rounding took of it.
    const u32 rows = ONE ? 2 : args.tokens;
    U4* const inputs = reinterpret_cast<U4*>(memory);
    float* const scratch = reinterpret_cast<float*>(memory + rows * args.stride * 2);

    const u32 tiles = (args.n + TILE - 1) / TILE, warps = blockDim.x / 32;
    const u32 first = blockIdx.x * warps + warp_id();
    constexpr u32 AHEAD = 4;
    // Units of the rows g and g + 8, AHEAD steps of 32 inputs.
    auto row_of = [&](u32 tile, u32 r) {
        return reinterpret_cast<const U4*>(args.w + u64((which.first_tile() + tile) * TILE + g + r * 8) * args.stride) + c;
    };
    U4 w[AHEAD][2];
    if (first < tiles) {
        UNROLL for (u32 i = 0; i < AHEAD; i++) UNROLL for (u32 r = 0; r < 2; r++) {
            w[i][r] = load_weights(row_of(first, r) + i * 4);
        }
    }
    wait_for_previous();
    if (ONE) {
        const F4* const x = reinterpret_cast<const F4*>(args.x + u64(which.input(0)) * args.x_stride);
        const F4* const norm = reinterpret_cast<const F4*>(args.norm);
        const float factor = norm ? norm_factor(x, args.k, args.eps, scratch) : 1.f;
        const u32 quads = (args.k + 3) / 4;
        U2* const near = reinterpret_cast<U2*>(memory);
        each_quad(x, quads, [&](u32 i, F4 v) {
            v = normed(v, factor, norm ? norm + i : nullptr);
            const U2 high = halves(v);
            const F4 rest = {v.x - h2_low(high.x), v.y - h2_high(high.x), v.z - h2_low(high.y), v.w - h2_high(high.y)};
            near[input_unit(0, i / 2) * 2 + i % 2] = high;
            near[(units + input_unit(1, i / 2)) * 2 + i % 2] = halves(rest);
        });
        UNROLL_1 for (u32 i = threadIdx.x + quads; i < units * 2; i += blockDim.x) {
            near[input_unit(0, i / 2) * 2 + i % 2] = {0, 0};
            near[(units + input_unit(1, i / 2)) * 2 + i % 2] = {0, 0};
        }
    } else {
        UNROLL_1 for (u32 i = threadIdx.x; i < rows * units; i += blockDim.x) {
            const u32 row = i / units, unit = i % units;
            const U4* const from = reinterpret_cast<const U4*>(args.half_x + u64(row) * args.x_stride);
            inputs[row * units + input_unit(row, unit)] = load_fresh(from + unit);
        }
    }
    block_sync();
    // Lanes of other columns repeat the last row; nobody looks at their sums.
    const u32 my_row = min(g, rows - 1);
    const U4* const my_inputs = inputs + my_row * units;
    UNROLL_1 for (u32 tile = first; tile < tiles; tile += gridDim.x * warps) {
        const U4* const row_a = row_of(tile, 0);
        const U4* const row_b = row_of(tile, 1);
        float sums[2][4] = {};
        UNROLL_1 for (u32 unit = 0; unit < units; unit += AHEAD * 4) {
            UNROLL for (u32 i = 0; i < AHEAD; i++) {
                const U4 x = my_inputs[input_unit(my_row, unit + i * 4 + c)];
                const U4 p = w[i][0], q = w[i][1];
                const u32 even[4] = {p.x, q.x, p.y, q.y}, odd[4] = {p.z, q.z, p.w, q.w};
                if (unit + AHEAD * 4 < units) {
                    w[i][0] = load_weights(row_a + unit + (AHEAD + i) * 4);
                    w[i][1] = load_weights(row_b + unit + (AHEAD + i) * 4);
                }
                mma(sums[0], even, x.x, x.y);
                mma(sums[1], odd, x.z, x.w);
            }
        }
        const u32 next = tile + gridDim.x * warps;
        if (next < tiles) {
            UNROLL for (u32 i = 0; i < AHEAD; i++) UNROLL for (u32 r = 0; r < 2; r++) {
                w[i][r] = load_weights(row_of(next, r) + i * 4);
            }
        }
        UNROLL for (u32 i = 0; i < 4; i++) sums[0][i] += sums[1][i];
        UNROLL for (u32 r = 0; r < 2; r++) {
            const u32 n = tile * TILE + g + r * 8;
            UNROLL for (u32 i = 0; i < 2; i++) {
                const u32 token = ONE ? 0 : 2 * c + i;
                float v = sums[0][r * 2 + i];
                if (ONE) {
                    if (c != 0 || i != 0) continue;
                    v += sums[0][r * 2 + 1];
                } else {
                    v *= args.scale;
                }
                if (n >= args.n || token >= args.tokens) continue;
                if (args.flags & HAS_BIAS) v += args.bias[n];
                float* const out = args.out + u64(which.output(token)) * args.out_stride + args.out_offset + n;
                *out = args.flags & ADD ? load_fresh(out) + v : v;
            }
        }
    }
}

// Grid: outputs, tokens. Without a norm.
KERNEL(gemv_dense_narrow, GemvDenseArgs, 256, 4) {
    wait_for_previous();
    const u32 n = blockIdx.x, token = blockIdx.y;
    const U2* const w = reinterpret_cast<const U2*>(args.w + u64(n) * args.stride);
    float sum = 0;
    each_quad(reinterpret_cast<const F4*>(args.x + u64(token) * args.x_stride), (args.k + 3) / 4, [&](u32 i, F4 x) {
        const U2 h = load_weights(w + i);
        sum += h2_low(h.x) * x.x + h2_high(h.x) * x.y + h2_low(h.y) * x.z + h2_high(h.y) * x.w;
    });
    sum = block_sum(sum, reinterpret_cast<float*>(shared_memory()));
    if (threadIdx.x > 0) return;
    if (args.flags & HAS_BIAS) sum += args.bias[n];
    float* const out = args.out + u64(token) * args.out_stride + args.out_offset + n;
    *out = args.flags & ADD ? load_fresh(out) + sum : sum;
}

KERNEL(gemv_dense_1, GemvDenseArgs, 256, 2) { gemv_dense<true>(args, AllRows{0, 1}); }
KERNEL(gemv_dense_8, GemvDenseArgs, 256, 2) { gemv_dense<false>(args, AllRows{0, args.tokens}); }
KERNEL(gemv_dense_1_experts, GemvDenseExpertsArgs, 256, 2) {
    wait_for_previous();
    gemv_dense<true>(args.gemv, OnePair(args.experts, blockIdx.y));
}
