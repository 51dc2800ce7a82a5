//! Random runs of kernels with the outcome their twins expect; what a test harness executes on a device.

use crate::{Kv, Step};

/// Word that marks f32 and u32 outputs before a run: a NaN, so that a read of it shows.
pub const POISON: u32 = 0x7fc0_dead;
/// Word that marks half precision outputs: two NaNs.
pub const POISON_F16: u32 = 0x7e11_7e11;

/// One dispatch with all its data.
#[derive(Debug, Clone)]
pub struct Trial {
    /// Shape of the case, for messages.
    pub label: String,
    /// Bytes of the uniform at binding 0.
    pub params: Vec<u8>,
    /// The uniform at binding 1, for kernels that have it.
    pub step: Step,
    /// Words of the storage buffers from binding 2 on, before the run; outputs are poisoned.
    pub storage: Vec<Vec<u32>>,
    /// Workgroups.
    pub grid: [u32; 3],
    /// What the buffers hold after the run.
    pub expected: Vec<Expected>,
}

/// Content of one storage buffer after a run.
#[derive(Debug, Clone)]
pub struct Expected {
    /// Binding index.
    pub binding: u32,
    /// Word from which on `values` lie in the buffer; `None` if they are all of it.
    pub start: Option<usize>,
    /// The words, decoded; places the kernel must not touch hold the poison.
    pub values: Values,
    /// Largest absolute difference of each value; empty for bit equality of all.
    pub tolerance: Vec<f32>,
    /// Largest root mean square difference relative to that of the values; 0 is not checked.
    pub rms: f32,
}

/// Values of a buffer of words.
#[derive(Debug, Clone, PartialEq)]
pub enum Values {
    /// A word each.
    F32(Vec<f32>),
    /// Half a word each, the low half first.
    F16(Vec<f32>),
    /// A word each.
    U32(Vec<u32>),
    /// A cache of these kv_heads and head_dim, (positions, kv_heads, head_dim).
    Cache(Kv, [u32; 2], Vec<f32>),
}

/// A small xorshift generator: the same numbers for the same seed on every machine.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    /// A generator; any seed will do.
    pub fn new(seed: u64) -> Self {
        let mut rng = Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        for _ in 0..8 {
            rng.next_u32();
        }
        rng
    }

    /// Uniform 32 bits.
    pub fn next_u32(&mut self) -> u32 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 32) as u32
    }

    /// Uniform in 0..n, for n of at least 1.
    pub fn below(&mut self, n: u32) -> u32 {
        ((u64::from(self.next_u32()) * u64::from(n)) >> 32) as u32
    }

    /// Uniform in [low, high).
    pub fn range(&mut self, low: f32, high: f32) -> f32 {
        low + (high - low) * (self.next_u32() >> 8) as f32 / (1 << 24) as f32
    }

    /// `n` numbers uniform in [-scale, scale).
    pub fn values(&mut self, n: usize, scale: f32) -> Vec<f32> {
        (0..n).map(|_| self.range(-scale, scale)).collect()
    }

    /// `n` activations: mostly below 1, one in fifty an outlier of some hundreds.
    pub fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| if self.below(50) == 0 { self.range(-500.0, 500.0) } else { self.range(-1.0, 1.0) }).collect()
    }
}

impl Expected {
    /// f32 words within `tolerance` of `values`; NaN stands for NaN.
    pub fn close(binding: u32, values: Vec<f32>, tolerance: Vec<f32>) -> Self {
        Self { binding, start: None, values: Values::F32(values), tolerance, rms: 0.0 }
    }

    /// f32 words within `relative` times the largest finite magnitude of `values`.
    pub fn near(binding: u32, values: Vec<f32>, relative: f32) -> Self {
        let largest = values.iter().filter(|v| v.is_finite()).fold(0.0_f32, |m, v| m.max(v.abs()));
        let tolerance = vec![relative * largest; values.len()];
        Self::close(binding, values, tolerance)
    }

    /// A cache of `kv` of these kv_heads and head_dim whose elements are `values`, (positions, kv_heads, head_dim), within
    /// `tolerance`; NaN stands for NaN.
    pub(crate) fn cache(binding: u32, kv: Kv, shape: [u32; 2], values: Vec<f32>, tolerance: Vec<f32>) -> Self {
        Self { binding, start: None, values: Values::Cache(kv, shape, values), tolerance, rms: 0.0 }
    }

    /// Words that have exactly these bits.
    pub fn exact(binding: u32, words: Vec<u32>) -> Self {
        Self { binding, start: None, values: Values::U32(words), tolerance: Vec::new(), rms: 0.0 }
    }

    /// Differences between the words of the buffer after a run and what is expected; `None` if all is well.
    pub fn mismatch(&self, words: &[u32]) -> Option<String> {
        let len = match &self.values {
            Values::F16(values) => values.len() / 2,
            Values::F32(values) => values.len(),
            Values::U32(values) => values.len(),
            Values::Cache(kv, [_, dim], values) => values.len() / *dim as usize * kv.row_words(*dim) as usize,
        };
        let words = match self.start {
            None => words,
            Some(start) => match words.get(start..start + len) {
                Some(words) => words,
                None => return Some(format!("binding {} ends before word {}", self.binding, start + len)),
            },
        };
        let found: Vec<f32> = match &self.values {
            Values::U32(expected) => {
                let at = expected.iter().zip(words).position(|(e, w)| e != w)?;
                return Some(format!(
                    "binding {}, word {at}: expected {:#x}, found {:#x}",
                    self.binding, expected[at], words[at]
                ));
            }
            Values::F32(_) => words.iter().map(|&word| f32::from_bits(word)).collect(),
            Values::F16(_) => unpack_halves(words),
            Values::Cache(kv, shape, _) => kv.unpack(words, *shape),
        };
        let (Values::F32(expected) | Values::F16(expected) | Values::Cache(_, _, expected)) = &self.values else {
            return None;
        };
        if found.len() != expected.len() {
            return Some(format!("binding {}: {} values, expected {}", self.binding, found.len(), expected.len()));
        }
        let (mut error_squares, mut squares) = (0.0_f64, 0.0_f64);
        for (at, (&e, &f)) in expected.iter().zip(&found).enumerate() {
            if e.is_nan() && f.is_nan() {
                continue;
            }
            let error = (e - f).abs();
            let allowed = self.tolerance[at];
            if error.is_nan() || error > allowed {
                return Some(format!(
                    "binding {}, value {at}: expected {e}, found {f}, allowed difference {allowed}",
                    self.binding
                ));
            }
            error_squares += f64::from(error).powi(2);
            squares += f64::from(e).powi(2);
        }
        let rms = (error_squares / squares.max(f64::MIN_POSITIVE)).sqrt() as f32;
        (self.rms > 0.0 && rms > self.rms)
            .then(|| format!("binding {}: relative rms difference {rms}, allowed {}", self.binding, self.rms))
    }
}

/// The words of f32 values.
pub fn words(values: &[f32]) -> Vec<u32> {
    values.iter().map(|v| v.to_bits()).collect()
}

/// `n` f32 outputs before a run.
pub fn poisoned(n: usize) -> Vec<f32> {
    vec![f32::from_bits(POISON); n]
}

/// Words of values rounded to half precision, the first of a pair in the low half; an odd last pair is filled with 0.
pub fn pack_halves(values: &[f32]) -> Vec<u32> {
    let bits = |v: f32| u32::from(half::f16::from_f32(v).to_bits());
    values.chunks(2).map(|pair| bits(pair[0]) | pair.get(1).map_or(0, |&v| bits(v) << 16)).collect()
}

/// Values of half precision pairs.
pub fn unpack_halves(words: &[u32]) -> Vec<f32> {
    let half = |bits: u32| half::f16::from_bits(bits as u16).to_f32();
    words.iter().flat_map(|&word| [half(word), half(word >> 16)]).collect()
}

/// Bytes of the 32-bit words of buffers.
pub fn word_bytes(words: u64) -> u64 {
    4 * words
}
