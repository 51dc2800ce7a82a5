//! Packed matrices that are not in the 4-bit layout of [`crate::w4`]: the twin of the preludes of axis [`Packed`].

use crate::{Cost, FLAG_BF16, FLAG_OFFSET_IS_BIAS, FLAG_ROUND_PRODUCTS, FLAG_WIDE, Groups, Packed, Rng, trial, w4};

/// Inputs of a K block.
pub const BLOCK_K: usize = 256;

impl Packed {
    /// Every kind.
    pub const ALL: [Self; 11] = [
        Self::W4,
        Self::Affine2,
        Self::Affine3,
        Self::Affine4,
        Self::Affine5,
        Self::Affine6,
        Self::Affine8,
        Self::Codebook,
        Self::Q4K,
        Self::Q5K,
        Self::Q6K,
    ];

    /// Affine codes of `bits` bits, if there is a kernel for them.
    pub fn affine(bits: u32) -> Option<Self> {
        Some(match bits {
            2 => Self::Affine2,
            3 => Self::Affine3,
            4 => Self::Affine4,
            5 => Self::Affine5,
            6 => Self::Affine6,
            8 => Self::Affine8,
            _ => return None,
        })
    }

    /// Bits of a code.
    pub const fn bits(self) -> u32 {
        match self {
            Self::Affine2 => 2,
            Self::Affine3 => 3,
            Self::W4 | Self::Affine4 | Self::Codebook | Self::Q4K => 4,
            Self::Affine5 | Self::Q5K => 5,
            Self::Affine6 | Self::Q6K => 6,
            Self::Affine8 => 8,
        }
    }

    /// Name in labels.
    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::W4 => "w4",
            Self::Affine2 => "affine2",
            Self::Affine3 => "affine3",
            Self::Affine4 => "affine4",
            Self::Affine5 => "affine5",
            Self::Affine6 => "affine6",
            Self::Affine8 => "affine8",
            Self::Codebook => "codebook",
            Self::Q4K => "q4_k",
            Self::Q5K => "q5_k",
            Self::Q6K => "q6_k",
        }
    }

    /// Words of a K block on the device and bytes of it in a file, `None` for other kinds. Blocks are padded to whole
    /// words.
    pub const fn block(self) -> Option<(usize, usize)> {
        match self {
            Self::Q4K => Some((36, 144)),
            Self::Q5K => Some((44, 176)),
            Self::Q6K => Some((53, 210)),
            _ => None,
        }
    }

    /// Words of a row of `k` inputs; what `row_words` of the kernels is.
    pub const fn row_words(self, k: usize) -> usize {
        match self.block() {
            Some((words, _)) => k / BLOCK_K * words,
            // The number of chunks.
            None if matches!(self, Self::W4) => k.div_ceil(w4::CHUNK_K),
            None => (k * self.bits() as usize).div_ceil(32),
        }
    }

    /// Words of the codes of `rows` rows of `k` inputs: a word more than they fill, because reading a run of eight codes
    /// may touch it.
    pub const fn code_words(self, rows: usize, k: usize) -> usize {
        match self {
            Self::W4 => rows.next_multiple_of(w4::TILE_N) * k.div_ceil(w4::CHUNK_K) * w4::CHUNK_WORDS,
            _ => rows * self.row_words(k) + 1,
        }
    }

    /// Words of whole K blocks, each padded.
    ///
    /// # Panics
    /// If the kind has no blocks.
    pub fn block_words(self, bytes: &[u8]) -> Vec<u32> {
        let (words, block_bytes) = self.block().expect("a kind of K blocks");
        let mut out = Vec::with_capacity(bytes.len() / block_bytes * words);
        for block in bytes.chunks_exact(block_bytes) {
            let (whole, rest) = block.as_chunks::<4>();
            out.extend(whole.iter().map(|b| u32::from_le_bytes(*b)));
            if let [low, high] = rest {
                out.push(u32::from(u16::from_le_bytes([*low, *high])));
            }
        }
        out
    }
}

/// A random matrix in the layout of the device.
#[derive(Debug, Clone)]
pub struct Matrix {
    /// Kind of its words.
    pub packed: Packed,
    /// Outputs.
    pub n: usize,
    /// Inputs.
    pub k: usize,
    /// Inputs of a group; the last group of a row may be shorter.
    pub group_size: usize,
    /// Codes.
    pub codes: Vec<u32>,
    /// Numbers of the groups.
    pub params: Vec<u32>,
    /// Bits [`FLAG_OFFSET_IS_BIAS`], [`FLAG_WIDE`], [`FLAG_BF16`] and [`FLAG_ROUND_PRODUCTS`] of the kernels.
    pub flags: u32,
    tiled: Option<w4::Matrix>,
}

impl Matrix {
    /// Random codes and numbers; of `flags`, those of [`Self::flags`] count where the kind has them.
    pub(crate) fn random(packed: Packed, (n, k, group_size): (usize, usize, usize), flags: u32, rng: &mut Rng) -> Self {
        if packed == Packed::W4 {
            let tiled = w4::Matrix::random(w4::Shape { n, k, group_size }, flags & FLAG_OFFSET_IS_BIAS, rng);
            let (codes, params, flags) = (tiled.words.clone(), tiled.params.clone(), tiled.flags);
            return Self { packed, n, k, group_size, codes, params, flags, tiled: Some(tiled) };
        }
        let groups = n * k.div_ceil(group_size);
        let half = |v: f32| trial::pack_halves(&[v])[0];
        let mut codes: Vec<u32> = (0..packed.code_words(n, k)).map(|_| rng.next_u32()).collect();
        let mut params = Vec::new();
        let mut kept = 0;
        match packed {
            Packed::Codebook => {
                kept = flags & FLAG_BF16;
                params.extend((0..16).map(|_| rng.range(-1.0, 1.0).to_bits()));
                params.extend((0..groups).map(|_| rng.range(0.0, 0.1).to_bits()));
            }
            Packed::Q4K | Packed::Q5K => {
                let words = packed.block().map_or(1, |(words, _)| words);
                codes.chunks_exact_mut(words).for_each(|block| {
                    block[0] = trial::pack_halves(&[rng.range(-0.001, 0.001), rng.range(-0.001, 0.001)])[0];
                });
            }
            Packed::Q6K => codes.chunks_exact_mut(53).for_each(|block| block[52] = half(rng.range(-0.0003, 0.0003))),
            _ => {
                kept = flags & (FLAG_OFFSET_IS_BIAS | FLAG_WIDE | FLAG_BF16 | FLAG_ROUND_PRODUCTS);
                let largest = (1u32 << packed.bits()) as f32;
                for _ in 0..groups {
                    let s = rng.range(-0.2, 0.2) / largest;
                    let o = match kept & FLAG_OFFSET_IS_BIAS != 0 {
                        true => rng.range(-0.2, 0.2),
                        false => rng.below(largest as u32) as f32,
                    };
                    match kept & FLAG_WIDE != 0 {
                        true => params.extend([s.to_bits(), o.to_bits()]),
                        false => params.push(trial::pack_halves(&[s, o])[0]),
                    }
                }
            }
        }
        Self { packed, n, k, group_size, codes, params, flags: kept, tiled: None }
    }

    /// Groups of a row.
    pub fn groups(&self) -> usize {
        self.k.div_ceil(self.group_size)
    }

    /// Weight of output `n` and input `k`, rounded as the flags say.
    pub fn weight(&self, n: usize, k: usize) -> f32 {
        if let Some(tiled) = &self.tiled {
            return tiled.weight(n, k);
        }
        let row = &self.codes[n * self.packed.row_words(self.k)..];
        let group = n * self.groups() + k / self.group_size;
        let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
        let float = |at: usize| f32::from_bits(self.params[at]);
        let round = |value: f32, flag: u32| match self.flags & flag != 0 {
            true => half::bf16::from_f32(value).to_f32(),
            false => value,
        };
        match self.packed {
            Packed::Codebook => {
                round(float((row[k / 8] >> (4 * (k % 8)) & 15) as usize) * float(16 + group), FLAG_BF16)
            }
            Packed::Q4K | Packed::Q5K | Packed::Q6K => {
                let words = self.packed.block().map_or(1, |(words, _)| words);
                k_weight(self.packed, &row[k / BLOCK_K * words..][..words], k % BLOCK_K)
            }
            _ => {
                let bits = self.packed.bits() as usize;
                let q = (0..bits).fold(0, |q, i| {
                    let at = k * bits + i;
                    q | (row[at / 32] >> (at % 32) & 1) << i
                }) as f32;
                let (s, o) = match self.flags & FLAG_WIDE != 0 {
                    true => (float(2 * group), float(2 * group + 1)),
                    false => (half(self.params[group]), half(self.params[group] >> 16)),
                };
                let exact = match self.flags & FLAG_OFFSET_IS_BIAS != 0 {
                    true => round(q * s, FLAG_ROUND_PRODUCTS) + o,
                    false => (q - o) * s,
                };
                round(exact, FLAG_BF16)
            }
        }
    }
}

/// Weight `i` of a K block in words.
fn k_weight(packed: Packed, block: &[u32], i: usize) -> f32 {
    let byte = |at: usize| block[at / 4] >> (8 * (at % 4)) & 255;
    let half = |at: usize| half::f16::from_bits((byte(at) | byte(at + 1) << 8) as u16).to_f32();
    let j = i / 32;
    if packed == Packed::Q6K {
        let (h, run, l) = (i / 128, i % 128 / 32, i % 32);
        let low = byte(64 * h + 32 * (run % 2) + l) >> (4 * (run / 2)) & 15;
        let high = byte(128 + 32 * h + l) >> (2 * run) & 3;
        return half(208) * f32::from(byte(192 + i / 16) as u8 as i8) * ((low | high << 4) as f32 - 32.0);
    }
    let s = |at: usize| byte(4 + at);
    let (scale, min) = match j < 4 {
        true => (s(j) & 63, s(j + 4) & 63),
        false => (s(j + 4) & 15 | (s(j - 4) >> 6) << 4, s(j + 4) >> 4 | (s(j) >> 6) << 4),
    };
    let (top, codes) = match packed {
        Packed::Q5K => ((byte(16 + i % 32) >> j & 1) << 4, 48),
        _ => (0, 16),
    };
    let q = byte(codes + 32 * (j / 2) + i % 32) >> (4 * (j % 2)) & 15 | top;
    half(0) * scale as f32 * q as f32 - half(2) * min as f32
}

/// Weights and activations once, two operations a weight and row.
pub(crate) fn cost((n, k): (u32, u32), row_words: u32, groups: u32, rows: u32) -> Cost {
    let (n, k, rows) = (u64::from(n), u64::from(k), u64::from(rows));
    let words = n * (u64::from(row_words) + u64::from(groups));
    Cost { bytes: trial::word_bytes(words) + 4 * rows * (k + n), flops: 2 * n * k * rows }
}

/// Whether a case with these groups exists in this kind.
pub(crate) fn fits(packed: Packed, k: u32, group_size: u32) -> bool {
    match packed {
        Packed::W4 => k.is_multiple_of(8) && k.is_multiple_of(group_size) && Groups::of(group_size, k) <= Groups::Any,
        _ => packed.block().is_none() || k.is_multiple_of(BLOCK_K as u32),
    }
}
