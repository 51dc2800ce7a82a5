// Which rows the products of a block take and make: those of the step's tokens, or those that go through one expert of a
// mixture.
//
// The matrices of a layer's experts lie one behind the other, each of whole pairs of row tiles. A *pair* is a token and
// one of its experts, token * top_k + i. group.cu brings the pairs of an expert together: slot after slot, a whole number
// of tiles of slots an expert.
#pragma once
#include "w4.cuh"

// No expert, pair or row.
constexpr u32 NONE = 0xffffffff;

// The experts of the step's tokens. One token has no slots.
struct Experts {
    const float* routes;  // (tokens, routes_stride): top_k weights, then the numbers of the experts
    const u32* tiles;     // the expert of each tile of slots; NONE behind the last one
    const u32* slots;     // the pair in each slot, or NONE
    u32 row_tiles;        // row tiles from one expert's matrix to the next
    u32 top_k;
    u32 share;            // pairs that share a row of inputs: top_k, or 1
    u32 routes_stride;
};

// The number of a pair's expert.
DEVICE u32 expert_of(const float* routes, u32 stride, u32 top_k, u32 pair) {
    return u32(load_fresh(routes + u64(pair / top_k) * stride + top_k + pair % top_k));
}

// The step's tokens from `first` on, through the whole matrix.
struct AllRows {
    u32 first, tokens;
    DEVICE u32 first_tile() const { return 0; }
    // Rows below it are there.
    DEVICE u32 count() const { return tokens; }
    DEVICE bool has(u32 row) const { return first + row < tokens; }
    DEVICE u32 input(u32 row) const { return first + row; }
    DEVICE u32 output(u32 row) const { return has(row) ? first + row : NONE; }
};

// One token's pair `pair`.
struct OnePair {
    u32 tile, pair, row;
    DEVICE OnePair(const Experts& experts, u32 pair)
        : tile(expert_of(experts.routes, experts.routes_stride, experts.top_k, pair) * experts.row_tiles), pair(pair),
          row(pair / experts.share) {}
    DEVICE u32 first_tile() const { return tile; }
    DEVICE u32 count() const { return 1; }
    DEVICE bool has(u32 row) const { return row == 0; }
    DEVICE u32 input(u32) const { return row; }
    DEVICE u32 output(u32) const { return pair; }
};

// The pairs of a tile of eight slots, which all lanes of a warp ask for together; inputs lie by pair.
struct EightSlots {
    u32 tile, pair, row;
    DEVICE EightSlots(const Experts& experts, u32 number, u32 expert)
        : tile(expert * experts.row_tiles), pair(load_fresh(experts.slots + number * 8 + lane_id() % 8)),
          row(pair / experts.share) {}
    DEVICE u32 first_tile() const { return tile; }
    DEVICE u32 count() const { return 8; }
    DEVICE bool has(u32 at) const { return shfl(pair, at) != NONE; }
    DEVICE u32 input(u32 at) const { return shfl(row, at); }
    DEVICE u32 output(u32 at) const { return shfl(pair, at); }
};

// The pairs of a tile of 64 slots; inputs lie by slot, f32 rows go where their pairs are.
struct ManySlots {
    const u32* slots;
    u32 tile, first;
    bool by_slot;
    DEVICE ManySlots(const Experts& experts, const Product& p, u32 number, u32 expert)
        : slots(experts.slots), tile(expert * experts.row_tiles), first(number * 64), by_slot(p.target == TO_GLU) {}
    DEVICE u32 first_tile() const { return tile; }
    DEVICE u32 output(u32 row) const {
        const u32 pair = load_fresh(slots + first + row);
        return by_slot && pair != NONE ? first + row : pair;
    }
};
