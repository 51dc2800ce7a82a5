//! The quantizer's random numbers: seeded, the same on every machine.

/// SplitMix64 (Steele, Lea and Flood 2014).
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// The sequence of `seed`.
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// The next 64 bits.
    pub fn next_u64(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// Uniform from 0 to 1, 1 excluded.
    pub fn unit(&mut self) -> f64 {
        (self.next_u64() >> 11) as f64 / (1u64 << 53) as f64
    }

    /// Uniform below `n`.
    ///
    /// # Panics
    /// If `n` is 0.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "nothing is below 0");
        ((u128::from(self.next_u64()) * n as u128) >> 64) as usize
    }

    /// `n` numbers of mean 0 and variance 1 (Box and Muller).
    pub fn normals(&mut self, n: usize) -> Vec<f32> {
        let one = |random: &mut Self| {
            let radius = (-2.0 * (1.0 - random.unit()).ln()).sqrt();
            (radius * (2.0 * std::f64::consts::PI * random.unit()).cos()) as f32
        };
        (0..n).map(|_| one(self)).collect()
    }
}
