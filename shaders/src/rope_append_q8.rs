//! Twin of `rope_append_q8.wgsl`; the formula and the mapping are in its header. Also what a cache of 8 bits is.

use crate::trial::{Expected, Values};
use crate::*;

pub use crate::rope_append::{Params, reference};

/// Invocations of a workgroup.
pub const WG: u32 = 64;
/// Elements of a head that share a scale; the last group of a head may be shorter.
pub const GROUP: usize = 32;

/// The kernel.
pub static KERNEL: Kernel = Kernel {
    name: "rope_append_q8",
    body: include_str!("rope_append_q8.wgsl"),
    preludes: &[Prelude::Step],
    constants: &[("WG", WG), ("HEAD_DIM_MAX", attention::HEAD_DIM_MAX)],
    sizes: &[],
    params: Params::FIELDS,
    trials,
};

/// Whether the kernels read and write heads of this size in 8 bits: eight elements at a time.
pub fn handles(head_dim: u32) -> bool {
    head_dim.is_multiple_of(8) && head_dim <= attention::HEAD_DIM_MAX
}

/// Dispatch for `rows` tokens.
pub fn grid(params: &Params, rows: u32) -> [u32; 3] {
    [params.heads + 2 * params.kv_heads, 1, rows]
}

/// The row in, q out, codes and scales to the cache.
pub fn cost(params: &Params, rows: u32) -> Cost {
    let cost = rope_append::cost(params, Kv::F32, rows);
    let lines = u64::from(rows) * u64::from(2 * params.kv_heads);
    let saved = lines * (4 * u64::from(params.head_dim) - row_bytes(params.head_dim));
    Cost { bytes: cost.bytes - saved, ..cost }
}

/// Words of the scales of a row.
pub const fn scale_words(head_dim: u32) -> u32 {
    head_dim.div_ceil(2 * GROUP as u32)
}

/// Bytes of a key or a value.
pub const fn row_bytes(head_dim: u32) -> u64 {
    head_dim as u64 + 4 * scale_words(head_dim) as u64
}

/// Rows of `head_dim` values, a multiple of 4, as the words of a cache: codes of all rows, then scales. A row with NaN has
/// NaN for its scales.
pub fn pack(values: &[f32], head_dim: usize) -> Vec<u32> {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in values.chunks(head_dim) {
        let mut of_row = vec![0u16; 2 * scale_words(head_dim as u32) as usize];
        let unknown = row.iter().any(|v| v.is_nan());
        for (group, bits) in row.chunks(GROUP).zip(&mut of_row) {
            let most = group.iter().fold(0.0f32, |most, v| most.max(v.abs())).min(65504.0);
            let scale = half::f16::from_f32(most / 127.0);
            *bits = if unknown { half::f16::NAN } else { scale }.to_bits();
            let wide = scale.to_f32();
            let code = |v: f32| if wide > 0.0 { (v / wide).clamp(-127.0, 127.0).round_ties_even() as i8 } else { 0 };
            codes.extend(group.iter().map(|&v| code(v) as u8));
        }
        scales.extend(of_row);
    }
    let codes = codes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    codes.chain(scales.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16)).collect()
}

/// What [`pack`] made words of.
pub fn unpack(words: &[u32], head_dim: usize) -> Vec<f32> {
    let row_words = head_dim / 4 + scale_words(head_dim as u32) as usize;
    let (codes, scales) = words.split_at(words.len() / row_words * (head_dim / 4));
    let scale = |row: usize, group: usize| {
        let word = scales[row * scale_words(head_dim as u32) as usize + group / 2];
        half::f16::from_bits((word >> (16 * (group % 2))) as u16).to_f32()
    };
    let codes = codes.iter().flat_map(|word| word.to_le_bytes());
    codes.enumerate().map(|(i, code)| f32::from(code as i8) * scale(i / head_dim, i % head_dim / GROUP)).collect()
}

/// (heads, kv_heads, head_dim, rotary_dim, position, tokens): parts of groups, whole ones, an odd number of them.
pub fn cases() -> Vec<[u32; 6]> {
    vec![[1, 1, 8, 8, 0, 1], [4, 2, 64, 64, 5, 3], [3, 3, 80, 20, 1, 4], [2, 1, 32, 16, 3, 2], [8, 2, 256, 0, 7, 1]]
}

fn trials(_variant: Variant, rng: &mut Rng) -> Vec<Trial> {
    let mut trials = Vec::new();
    for (i, case) in cases().into_iter().enumerate() {
        let [.., head_dim, _, _, _] = case;
        let rope_append::Data { params, step, mut qkv, rope } = rope_append::data(case, i % 2 == 1, rng);
        let lines = (params.kv_heads * (params.context - params.prefix)) as usize;
        let elements = lines * head_dim as usize;
        let cache = vec![trial::POISON_F16; lines * (row_bytes(head_dim) / 4) as usize];
        let storage = vec![trial::words(&qkv), trial::words(rope.as_flattened()), cache.clone(), cache];
        let (mut k, mut v) = (trial::poisoned(elements), trial::poisoned(elements));
        reference(&params, &step, &mut qkv, &rope, &mut k, &mut v);
        // A rotated number may be rounded to the neighbour of its code, and a scale to its own.
        let close = |binding, values: Vec<f32>| {
            let groups = values.chunks(head_dim as usize).flat_map(|row| row.chunks(GROUP));
            let tolerance = groups.flat_map(|group| {
                let most = group.iter().filter(|v| v.is_finite()).fold(0.0f32, |most, v| most.max(v.abs()));
                vec![most / 127.0 * 0.57 + rope_append::ROTATION * 60.0; group.len()]
            });
            let tolerance = tolerance.collect();
            let values = Values::Q8(values, head_dim as usize);
            Expected { binding, start: None, values, tolerance, rms: 0.0 }
        };
        trials.push(Trial {
            label: rope_append::label(&params, &step),
            params: bytemuck::bytes_of(&params).to_vec(),
            step,
            storage,
            grid: grid(&params, step.n_tokens),
            expected: vec![Expected::near(2, qkv, rope_append::ROTATION), close(4, k), close(5, v)],
        });
    }
    trials
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_within_half_a_step() {
        let mut rng = Rng::new(3);
        for head_dim in [8, 32, 80, 256] {
            let mut values = rng.values(3 * head_dim, 4.0);
            values[head_dim..2 * head_dim].fill(0.0);
            let words = pack(&values, head_dim);
            assert_eq!(4 * words.len() as u64, 3 * row_bytes(head_dim as u32));
            for (value, found) in values.iter().zip(unpack(&words, head_dim)) {
                assert!((value - found).abs() <= 4.0 / 127.0 * 0.57);
            }
        }
    }
}
