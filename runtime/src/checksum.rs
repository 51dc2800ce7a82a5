//! A checksum against accidents: FNV-1a over 8-byte words and then bytes, 64 bits. It proves nothing against forgery.

const BASIS: u64 = 0xcbf2_9ce4_8422_2325;
const PRIME: u64 = 0x0000_0100_0000_01b3;

/// A checksum of parts; where they are parted matters.
pub(crate) struct Checksum(u64);

impl Default for Checksum {
    fn default() -> Self {
        Self(BASIS)
    }
}

impl Checksum {
    /// Adds a part.
    pub(crate) fn add(&mut self, bytes: &[u8]) {
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            // The shift brings high bits down, which multiplication alone never does.
            self.0 = (self.0 ^ u64::from_le_bytes(*word)).wrapping_mul(PRIME);
            self.0 ^= self.0 >> 29;
        }
        for byte in rest {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(PRIME);
        }
        self.0 = (self.0 ^ bytes.len() as u64).wrapping_mul(PRIME);
    }

    /// The sum so far.
    pub(crate) fn finish(&self) -> u64 {
        self.0 ^ self.0 >> 32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn checksum(bytes: &[u8]) -> u64 {
        let mut sum = Checksum::default();
        sum.add(bytes);
        sum.finish()
    }

    #[test]
    fn every_bit_and_every_length_counts() {
        let bytes: Vec<u8> = (0..61).collect();
        let mut seen = std::collections::HashSet::from([checksum(&bytes)]);
        for at in 0..bytes.len() {
            for bit in 0..8 {
                let mut changed = bytes.clone();
                changed[at] ^= 1 << bit;
                assert!(seen.insert(checksum(&changed)), "bit {bit} of byte {at}");
            }
            assert!(seen.insert(checksum(&bytes[..at])), "the first {at} bytes");
        }
        assert_ne!(checksum(&[0; 8]), checksum(&[0; 16]));
    }
}
