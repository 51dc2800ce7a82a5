//! Twin of `rope_append.wgsl`; the formula and the mapping are in its header.

use crate::trial::Expected;
use crate::*;

/// Invocations of a workgroup.
pub const WG: u32 = 128;

params! {
    /// Uniform at binding 0.
    Params {
        /// Query heads.
        heads: u32,
        /// Key/value heads.
        kv_heads: u32,
        /// Elements of a head; even.
        head_dim: u32,
        /// Leading elements that are rotated; even, 0 for none.
        rotary_dim: u32,
        /// Elements of a row of qkv.
        qkv_stride: u32,
        /// Positions of the session.
        context: u32,
        /// Position at which the cache begins.
        prefix: u32,
        /// Unused.
        pad: u32,
    }
}

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rope_append",
    body: include_str!("rope_append.wgsl"),
    preludes: &[Prelude::Step, Prelude::Kv, Prelude::RopeAppend],
    constants: &[("WG", WG)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, kv: Kv, rows: u32) -> [u32; 3] {
    let per_head = match kv {
        Kv::F16 | Kv::F32 => params.head_dim / 2,
        Kv::Q8 => 16 * kv::scale_words(params.head_dim),
    };
    [((params.heads + 2 * params.kv_heads) * per_head).div_ceil(WG), 1, rows]
}

/// Two products of a rotation in single precision, relative to the largest element.
pub(crate) const ROTATION: f32 = 1e-6;
/// Rounding to half precision, relative to the element.
const F16_ROUNDING: f32 = 6e-4;
/// Rounding to 8 bits, relative to the step from one code to the next.
const Q8_STEP: f32 = 0.57;

/// Rotates q in place and writes k and v to the caches, before they are rounded to the type of the cache. `k_cache`
/// and `v_cache` are elements, (context - prefix, kv_heads, head_dim).
pub fn reference(
    params: &Params,
    step: &Step,
    qkv: &mut [f32],
    rope: &[[f32; 2]],
    k_cache: &mut [f32],
    v_cache: &mut [f32],
) {
    let (heads, kv_heads, dim) = (params.heads as usize, params.kv_heads as usize, params.head_dim as usize);
    let half = params.rotary_dim as usize / 2;
    for token in 0..step.n_tokens as usize {
        let position = step.position as usize + token;
        for head in 0..heads + 2 * kv_heads {
            let start = token * params.qkv_stride as usize + head * dim;
            let mut row = qkv[start..start + dim].to_vec();
            if head < heads + kv_heads {
                for i in 0..half {
                    let [cos, sin] = rope[position * half + i];
                    let (a, b) = (row[i], row[i + half]);
                    row[i] = a * cos - b * sin;
                    row[i + half] = b * cos + a * sin;
                }
            }
            if head < heads {
                qkv[start..start + dim].copy_from_slice(&row);
                continue;
            }
            let cache = if head < heads + kv_heads { &mut *k_cache } else { &mut *v_cache };
            let at = ((position - params.prefix as usize) * kv_heads + (head - heads) % kv_heads) * dim;
            cache[at..at + dim].copy_from_slice(&row);
        }
    }
}

/// The row in, q out, k and v to the cache.
pub fn cost(params: &Params, kv: Kv, rows: u32) -> Cost {
    let head = u64::from(params.head_dim) * u64::from(rows);
    let (q, kv_elements) = (head * u64::from(params.heads), 2 * head * u64::from(params.kv_heads));
    let cached = trial::word_bytes(2 * kv.row_words(params.head_dim) * u64::from(params.kv_heads) * u64::from(rows));
    Cost { bytes: trial::word_bytes(2 * q + kv_elements) + cached, flops: 3 * (q + kv_elements / 2) }
}

/// (heads, kv_heads, head_dim, rotary_dim, position, tokens): full, partial, odd half and no rotation, parts of groups
/// that share a scale, even and odd numbers of them.
pub fn cases() -> Vec<[u32; 6]> {
    vec![
        [1, 1, 2, 2, 0, 1],
        [4, 2, 64, 64, 5, 3],
        [3, 3, 80, 20, 1, 4],
        [2, 1, 12, 6, 3, 2],
        [8, 2, 128, 0, 7, 1],
        [5, 1, 32, 16, 2, 1],
        [3, 1, 96, 96, 4, 2],
        [2, 2, 256, 64, 6, 1],
    ]
}

/// A cache whose elements were `values`, (positions, kv_heads, head_dim), before they were rounded, each within `tolerance`;
/// NaN where nothing was written.
pub(crate) fn cached(
    binding: u32,
    kv: Kv,
    [kv_heads, head_dim]: [u32; 2],
    mut values: Vec<f32>,
    tolerance: &[f32],
) -> Expected {
    if kv == Kv::Q8 {
        let most = 127.0 * kv::LARGEST_SCALE;
        values.iter_mut().for_each(|v| *v = v.clamp(-most, most));
    }
    let mut of_rounding = Vec::new();
    for row in values.chunks(head_dim as usize) {
        for group in row.chunks(kv::GROUP as usize) {
            let largest = group.iter().filter(|v| v.is_finite()).fold(0.0f32, |most, v| most.max(v.abs()));
            // Half a step, the largest one's more by what its scale was rounded by; a number can round to the
            // neighbour of its code, as a scale can to its own.
            let step = Q8_STEP * largest / 127.0;
            of_rounding.extend(group.iter().map(|v| match kv {
                Kv::F16 => F16_ROUNDING * v.abs(),
                Kv::F32 => 0.0,
                Kv::Q8 => step,
            }));
        }
    }
    let tolerance = of_rounding.iter().zip(tolerance).map(|(rounding, allowed)| rounding + allowed).collect();
    Expected::cache(binding, kv, [kv_heads, head_dim], values, tolerance)
}

fn trials(variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    let kv = variant.kv;
    for (i, [heads, kv_heads, head_dim, rotary_dim, position, n_tokens]) in cases().into_iter().enumerate() {
        if !kv.handles(head_dim) {
            continue;
        }
        let row = (heads + 2 * kv_heads) * head_dim;
        let context = position + n_tokens + 2;
        let prefix = if i % 2 == 1 { position } else { 0 };
        let params = Params { heads, kv_heads, head_dim, rotary_dim, qkv_stride: row + 4, context, prefix, pad: 0 };
        let step = Step { n_tokens, position, ..Step::default() };
        let mut qkv = rng.values((n_tokens * params.qkv_stride) as usize, 30.0);
        if kv == Kv::Q8 && rotary_dim == 0 {
            // Keys and values that half precision does not hold.
            let far = [65_500.0, -65_504.0, 7e4, -3e38];
            let first = (heads * head_dim) as usize;
            qkv[first..].iter_mut().step_by(3).zip(far.iter().cycle()).for_each(|(v, far)| *v = *far);
        }
        let rope: Vec<[f32; 2]> = (0..(context * rotary_dim / 2).max(1))
            .map(|_| {
                let (sin, cos) = rng.range(-3.0, 3.0).sin_cos();
                [cos, sin]
            })
            .collect();
        let elements = (kv_heads * (context - prefix) * head_dim) as usize;
        let rows = kv_heads as usize * (context - prefix) as usize;
        let cache = vec![kv.poison(); rows * kv.row_words(head_dim) as usize];
        let storage = vec![trial::words(&qkv), trial::words(rope.as_flattened()), cache.clone(), cache];
        let (mut k, mut v) = (trial::poisoned(elements), trial::poisoned(elements));
        reference(&params, &step, &mut qkv, &rope, &mut k, &mut v);
        let allowed = vec![ROTATION * 60.0; elements];
        trials.push(Trial {
            label: format!(
                "{heads}/{kv_heads} heads of {head_dim}, {rotary_dim} rotated, {n_tokens} at {position} behind {prefix}"
            ),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, kv, n_tokens),
            expected: vec![
                Expected::near(2, qkv, ROTATION),
                cached(4, kv, [kv_heads, head_dim], k, &allowed),
                cached(5, kv, [kv_heads, head_dim], v, &allowed),
            ],
        });
    }
    trials
}
