//! Twin of `gemv_w4_rope.wgsl`; the formula and the mapping are in its header.

use crate::gemv_w4::{Case, Data};
use crate::trial::Expected;
use crate::w4;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 256;

params! {
    /// Uniform at binding 0; up to `eps` as in [`gemv_w4::Params`].
    Params {
        /// Outputs: (heads + 2 * kv_heads) * head_dim.
        n: u32,
        /// Inputs; a multiple of 8.
        k: u32,
        /// Chunks of 32 inputs, the last one padded.
        chunks: u32,
        /// Inputs of a group.
        group_size: u32,
        /// [`gemv_w4::group_shift`] of the group size.
        group_shift: u32,
        /// Groups of a row.
        groups: u32,
        /// Elements of a row of out.
        out_stride: u32,
        /// First output column.
        out_offset: u32,
        /// Not read.
        bias_offset: u32,
        /// As in [`gemv_w4::Params`], without accumulation and staging.
        flags: u32,
        /// Not read: all rows.
        row_mode: u32,
        /// Added to the mean of squares under [`crate::FLAG_NORM`].
        eps: f32,
        /// Query heads.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head; a multiple of 4.
        head_dim: u32,
        /// Leading elements that are rotated; a multiple of 4, 0 for none.
        rotary_dim: u32,
        /// Positions of the session.
        context: u32,
        /// Position at which the cache begins.
        prefix: u32,
        /// Unused.
        pad: [u32; 2],
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "gemv_w4_rope",
    body: include_str!("gemv_w4_rope.wgsl"),
    preludes: &[
        Prelude::Step,
        Prelude::W4,
        Prelude::Elem,
        Prelude::Stage,
        Prelude::Kv,
        Prelude::GemvW4Chunk,
        Prelude::GemvW4,
        Prelude::GemvW4Pair,
        Prelude::Append,
    ],
    constants: &[("WG", WG)],
    sizes: gemv_w4::SIZES,
    params: Params::FIELDS,
    trials,
};

/// Whether the kernel can rotate heads of this shape: neighbours of a cache word have to stay neighbours, and in 8 bits a
/// workgroup has to have the two groups of a word of scales.
pub fn handles(head_dim: u32, rotary_dim: u32, kv: Kv) -> bool {
    match kv {
        Kv::F16 | Kv::F32 => head_dim.is_multiple_of(4) && rotary_dim.is_multiple_of(4),
        Kv::Q8 => head_dim.is_multiple_of(2 * kv::GROUP) && [0, head_dim].contains(&rotary_dim),
    }
}

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    crate::grid((params.n / 2).div_ceil(w4::TILE_N as u32), rows)
}

/// The product, then [`rope_append::reference`]: (q by row, k cache, v cache), elements in f32.
fn reference(params: &Params, data: &Data, rope: &[[f32; 2]]) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let rotation = rope_append::Params {
        heads: params.heads,
        kv_heads: params.kv_heads,
        head_dim: params.head_dim,
        rotary_dim: params.rotary_dim,
        qkv_stride: params.n,
        context: params.context,
        prefix: params.prefix,
        pad: 0,
    };
    let mut qkv = Vec::new();
    for row in 0..data.rows {
        let x = data.input(row);
        let bias = |n| w4::bias_of(params.flags, &data.bias, n);
        qkv.extend((0..params.n as usize).map(|n| (data.matrix.product(n, &x) + bias(n)) as f32));
    }
    let elements = (params.kv_heads * (params.context - params.prefix) * params.head_dim) as usize;
    let (mut keys, mut values) = (trial::poisoned(elements), trial::poisoned(elements));
    rope_append::reference(&rotation, &data.step, &mut qkv, rope, &mut keys, &mut values);
    let mut out = trial::poisoned((data.rows * params.out_stride) as usize);
    let q = (params.heads * params.head_dim) as usize;
    for (row, qkv) in qkv.chunks(params.n as usize).enumerate() {
        let at = row * params.out_stride as usize + params.out_offset as usize;
        out[at..at + q].copy_from_slice(&qkv[..q]);
    }
    (out, keys, values)
}

/// As [`gemv_w4::cost`].
pub fn cost(params: &Params, rows: u32) -> Cost {
    w4::cost(params.n, params.k, params.groups, rows)
}

/// (heads, kv_heads, head_dim, rotary_dim, k, group_size, position, tokens, flags): full, partial and no rotation, heads
/// that end within a tile, heads of one and of several pairs of groups that share a scale.
pub fn cases() -> Vec<[u32; 9]> {
    vec![
        [1, 1, 4, 4, 8, 8, 0, 1, 0],
        [4, 2, 64, 64, 256, 64, 5, 3, FLAG_NORM],
        [3, 3, 80, 20, 72, 24, 1, 2, FLAG_BIAS | FLAG_OFFSET_IS_BIAS],
        [2, 1, 128, 128, 4352, 128, 3, 1, FLAG_NORM | FLAG_BIAS],
        [2, 2, 32, 0, 64, 32, 7, 1, FLAG_NORM],
        [1, 1, 256, 0, 40, 40, 2, 2, FLAG_BIAS],
    ]
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (i, [heads, kv_heads, head_dim, rotary_dim, k, group_size, position, n_tokens, flags]) in
        cases().into_iter().enumerate()
    {
        if Groups::of(group_size, k) > variant.groups || !handles(head_dim, rotary_dim, variant.kv) {
            continue;
        }
        let n = (heads + 2 * kv_heads) * head_dim;
        let case = Case { n, k, group_size, tokens: n_tokens, row_mode: RowMode::All, flags };
        let mut data = Data::random(case, n, 1.0, variant.elem, rng);
        data.step.position = position;
        let context = position + n_tokens + 2;
        let shared = data.params;
        let params = Params {
            n,
            k,
            chunks: shared.chunks,
            group_size,
            group_shift: shared.group_shift,
            groups: shared.groups,
            out_stride: shared.out_stride,
            out_offset: shared.out_offset,
            flags: shared.flags,
            eps: shared.eps,
            heads,
            kv_heads,
            head_dim,
            rotary_dim,
            context,
            prefix: if i % 2 == 1 { position } else { 0 },
            ..Params::default()
        };
        let rope: Vec<[f32; 2]> = (0..(context * rotary_dim / 2).max(1))
            .map(|_| {
                let (sin, cos) = rng.range(-3.0, 3.0).sin_cos();
                [cos, sin]
            })
            .collect();
        let elements = (kv_heads * (context - params.prefix) * head_dim) as usize;
        let kv = variant.kv;
        let cache = vec![kv.poison(); elements / head_dim as usize * kv.row_words(head_dim) as usize];
        let mut storage = data.storage();
        storage.extend([
            trial::words(&data.bias),
            trial::words(rope.as_flattened()),
            trial::words(&trial::poisoned((n_tokens * params.out_stride) as usize)),
            cache.clone(),
            cache,
        ]);
        let (out, keys, values) = reference(&params, &data, &rope);
        // A rotation mixes two products; the largest deviation of any bounds them all.
        let mut product = 0.0_f32;
        for row in 0..n_tokens {
            let x = data.input(row);
            for n in 0..n as usize {
                product = product.max(data.matrix.tolerance(n, &x, variant.elem == Elem::F16));
            }
        }
        let bound =
            |values: &[f32]| -> Vec<f32> { values.iter().map(|v| 1.5 * product + 3e-6 * v.abs() + 1e-4).collect() };
        let cached = |binding, values: Vec<f32>| {
            let allowed = bound(&values);
            rope_append::cached(binding, kv, [kv_heads, head_dim], values, &allowed)
        };
        let tolerance = bound(&out);
        trials.push(Trial {
            label: format!(
                "{heads}/{kv_heads} heads of {head_dim}, {rotary_dim} rotated, {n_tokens} at {position}, {case:?}"
            ),
            params: bytemuck::bytes_of(&params).to_vec(),
            step: data.step,
            storage,
            grid: grid(&params, n_tokens),
            expected: vec![Expected::close(7, out, tolerance), cached(8, keys), cached(9, values)],
        });
    }
    trials
}
