//! Random runs of kernels with the outcome their twins expect; what a test harness executes on a device.

use crate::Step;

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
