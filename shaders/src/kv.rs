//! Element types of the KV cache, and their rows as words.

use crate::trial;

/// Element type of the KV cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kv {
    /// Half precision, two to a word, the even element in the low half.
    F16,
    /// Single precision bits.
    F32,
    /// Signed bytes, four to a word, and half-precision scales for [`GROUP`] of them each behind all rows: word w of the
    /// [`scale_words`] of a row holds those of its groups w and w + [`scale_words`], the first in the low half.
    Q8,
}

/// Elements of a head that share a scale; the last group of a head may be shorter.
pub const GROUP: u32 = 32;
/// The largest scale: 127 times it is a number of half precision, so that every backend may widen codes to that.
pub const LARGEST_SCALE: f32 = 515.5;

/// Words of the scales of a row.
pub const fn scale_words(head_dim: u32) -> u32 {
    head_dim.div_ceil(2 * GROUP)
}

/// The scales of a row, (2 * [`scale_words`]), by group instead of as they lie in its words.
pub fn scales_by_group(by_word: &[u16], by_group: &mut [u16]) {
    let words = by_word.len() / 2;
    by_group.iter_mut().enumerate().for_each(|(group, to)| *to = by_word[group % words * 2 + group / words]);
}

/// What [`scales_by_group`] takes.
pub fn scales_by_word(by_group: &[u16], by_word: &mut [u16]) {
    let words = by_group.len() / 2;
    by_word.iter_mut().enumerate().for_each(|(i, to)| *to = by_group[i / 2 + i % 2 * words]);
}

impl Kv {
    /// Whether the kernels read and write heads of so many elements: whole words.
    pub const fn handles(self, head_dim: u32) -> bool {
        head_dim.is_multiple_of(match self {
            Self::F16 | Self::F32 => 2,
            Self::Q8 => 4,
        })
    }

    /// Words of a key or a value.
    pub const fn row_words(self, head_dim: u32) -> u64 {
        match self {
            Self::F16 => head_dim as u64 / 2,
            Self::F32 => head_dim as u64,
            Self::Q8 => head_dim as u64 / 4 + scale_words(head_dim) as u64,
        }
    }

    /// Word that marks a cache before a run: NaN, in 8 bits as a scale.
    pub(crate) const fn poison(self) -> u32 {
        match self {
            Self::F16 | Self::Q8 => trial::POISON_F16,
            Self::F32 => trial::POISON,
        }
    }

    /// A cache of `values`, (positions, kv_heads, head_dim), and what it holds of them. In 8 bits the positions of a head
    /// lie together, otherwise the heads of a position.
    pub(crate) fn pack(self, values: &[f32], [kv_heads, head_dim]: [u32; 2]) -> (Vec<u32>, Vec<f32>) {
        let words = match self {
            Self::F16 => trial::pack_halves(values),
            Self::F32 => trial::words(values),
            Self::Q8 => pack_codes(&rows_in_turn(values, head_dim as usize, kv_heads as usize), head_dim as usize),
        };
        let left = self.unpack(&words, [kv_heads, head_dim]);
        (words, left)
    }

    /// The elements of a cache, (positions, kv_heads, head_dim).
    pub(crate) fn unpack(self, words: &[u32], [kv_heads, head_dim]: [u32; 2]) -> Vec<f32> {
        match self {
            Self::F16 => trial::unpack_halves(words),
            Self::F32 => words.iter().map(|&word| f32::from_bits(word)).collect(),
            Self::Q8 => {
                let values = unpack_codes(words, head_dim as usize);
                let positions = values.len() / (kv_heads * head_dim) as usize;
                rows_in_turn(&values, head_dim as usize, positions)
            }
        }
    }
}

/// Of rows of `len` elements, (n, m), those that are (m, n).
fn rows_in_turn(values: &[f32], len: usize, m: usize) -> Vec<f32> {
    let rows: Vec<&[f32]> = values.chunks(len).collect();
    let in_turn = (0..m).flat_map(|first| rows.iter().skip(first).step_by(m));
    in_turn.flat_map(|row| row.iter().copied()).collect()
}

/// Codes of all rows, then scales. A group with NaN has NaN for its scale.
fn pack_codes(values: &[f32], head_dim: usize) -> Vec<u32> {
    let row_scales = scale_words(head_dim as u32) as usize;
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in values.chunks(head_dim) {
        let mut of_row = vec![0u32; row_scales];
        for (i, group) in row.chunks(GROUP as usize).enumerate() {
            let most = group.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            let unknown = group.iter().any(|v| v.is_nan());
            let scale = half::f16::from_f32((most / 127.0).min(LARGEST_SCALE));
            let bits = if unknown { half::f16::NAN } else { scale }.to_bits();
            of_row[i % row_scales] |= u32::from(bits) << (16 * (i / row_scales));
            let wide = scale.to_f32();
            let code = |v: f32| if wide > 0.0 { (v / wide).clamp(-127.0, 127.0).round_ties_even() as i8 } else { 0 };
            codes.extend(group.iter().map(|&v| code(v) as u8));
        }
        scales.extend(of_row);
    }
    codes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]])).chain(scales).collect()
}

/// What [`pack_codes`] made words of.
fn unpack_codes(words: &[u32], head_dim: usize) -> Vec<f32> {
    let row_scales = scale_words(head_dim as u32) as usize;
    let rows = words.len() / (head_dim / 4 + row_scales);
    let (codes, scales) = words.split_at(rows * (head_dim / 4));
    let scale = |row: usize, group: usize| {
        let word = scales[row * row_scales + group % row_scales];
        half::f16::from_bits((word >> (16 * (group / row_scales))) as u16).to_f32()
    };
    let codes = codes.iter().flat_map(|word| word.to_le_bytes());
    codes
        .enumerate()
        .map(|(i, code)| f32::from(code as i8) * scale(i / head_dim, i % head_dim / GROUP as usize))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Rng;

    #[test]
    fn rows_of_8_bits_come_back_within_half_a_step() {
        let mut rng = Rng::new(3);
        for head_dim in [4, 32, 80, 96, 256] {
            let mut values = rng.values(3 * head_dim as usize, 4.0);
            values[head_dim as usize..2 * head_dim as usize].fill(0.0);
            let (words, left) = Kv::Q8.pack(&values, [3, head_dim]);
            assert_eq!(words.len() as u64, 3 * Kv::Q8.row_words(head_dim));
            for (value, left) in values.iter().zip(left) {
                // The largest one may lie beyond the last code by what the scale was rounded by.
                assert!((value - left).abs() <= 4.0 / 127.0 * 0.57, "{value} became {left}");
            }
        }
    }

    #[test]
    fn scales_have_two_orders() {
        // Three words: groups 0 and 3, 1 and 4, 2 and none.
        let (mut by_group, mut by_word) = ([0; 6], [0; 6]);
        scales_by_group(&[10, 13, 11, 14, 12, 0], &mut by_group);
        assert_eq!(by_group, [10, 11, 12, 13, 14, 0]);
        scales_by_word(&by_group, &mut by_word);
        assert_eq!(by_word, [10, 13, 11, 14, 12, 0]);
    }

    #[test]
    fn numbers_beyond_half_precision_saturate() {
        let values = [65_500.0, -65_504.0, 7e4, -3e38];
        for value in values {
            let (_, left) = Kv::Q8.pack(&[value, 0.0, 1.0, -value], [1, 4]);
            assert!((left[0].abs() - 127.0 * LARGEST_SCALE).abs() <= 64.0 && left[0] == -left[3], "{left:?}");
        }
    }
}
