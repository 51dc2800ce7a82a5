// Products of up to ROWS rows with 32 outputs on matrix units, given the constants WG and ROWS: each subgroup of 32 has a
// chunk of 32 inputs of them in a part of workgroup memory of its own.

const LANES: u32 = 32u;
const SUBGROUPS: u32 = WG / LANES;
// vec4s from one row of a tile in workgroup memory to the next: ten, so that the eight rows that a subgroup reads at once
// lie in different banks.
const ROW_VECS: u32 = 10u;
const W_VECS: u32 = LANES * ROW_VECS;
const X_VECS: u32 = ROWS * ROW_VECS;
// Elements of an accumulator.
const PIECE: u32 = 256u;
const_assert ROWS == 16u;

var<workgroup> w_tile: array<vec4<f16>, SUBGROUPS * W_VECS>;
var<workgroup> x_tile: array<vec4<f16>, SUBGROUPS * X_VECS>;
// An accumulator of each subgroup.
var<workgroup> sums: array<f32, SUBGROUPS * PIECE>;

// Adds the products of the subgroup's tiles: 16 outputs an accumulator.
fn multiply(subgroup: u32, c0: ptr<function, coop_mat16x16<f32,C>>, c1: ptr<function, coop_mat16x16<f32,C>>) {
    for (var half = 0u; half < 2u; half++) {
        let w_at = subgroup * W_VECS + half * 4u;
        let a = coopLoadT<coop_mat16x16<f16,A>>(&x_tile[subgroup * X_VECS + half * 4u], ROW_VECS);
        let b0 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at], ROW_VECS);
        *c0 = coopMultiplyAdd(a, b0, *c0);
        let b1 = coopLoad<coop_mat16x16<f16,B>>(&w_tile[w_at + 16u * ROW_VECS], ROW_VECS);
        *c1 = coopMultiplyAdd(a, b1, *c1);
    }
}
