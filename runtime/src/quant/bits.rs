//! Runs of fields of 2 to 8 bits in little-endian words.

use std::borrow::Cow;

/// Packs fields without gaps: element i is at bit `i * bits` of the run, and may straddle two words.
pub(super) fn pack(values: impl IntoIterator<Item = u8>, bits: u32, out: &mut Vec<u32>) {
    let (mut word, mut filled) = (0u64, 0);
    for value in values {
        word |= u64::from(value) << filled;
        filled += bits;
        if filled >= 32 {
            out.push(word as u32);
            word >>= 32;
            filled -= 32;
        }
    }
    if filled > 0 {
        out.push(word as u32);
    }
}

/// The first `out.len()` fields of a run; fields straddle words if `dense`, else a word holds only whole ones.
pub(super) fn unpack(words: impl IntoIterator<Item = u32>, bits: u32, dense: bool, out: &mut [u8]) {
    let mask = (1u64 << bits) - 1;
    let (mut held, mut filled) = (0u64, 0);
    let mut words = words.into_iter();
    for out in out {
        if filled < bits {
            let next = u64::from(words.next().unwrap_or(0));
            if dense {
                held |= next << filled;
                filled += 32;
            } else {
                held = next;
                filled = 32 / bits * bits;
            }
        }
        *out = (held & mask) as u8;
        held >>= bits;
        filled -= bits;
    }
}

/// The transpose of a row-major matrix of `columns` columns.
pub(super) fn transpose<T: Copy>(values: &[T], columns: usize) -> Cow<'_, [T]> {
    if columns <= 1 || values.len() == columns {
        return Cow::Borrowed(values);
    }
    let rows = values.len() / columns;
    let mut out = values.to_vec();
    // In squares that touch whole cache lines on both sides.
    const SIDE: usize = 32;
    for first_row in (0..rows).step_by(SIDE) {
        for first_column in (0..columns).step_by(SIDE) {
            for column in first_column..columns.min(first_column + SIDE) {
                for row in first_row..rows.min(first_row + SIDE) {
                    out[column * rows + row] = values[row * columns + column];
                }
            }
        }
    }
    Cow::Owned(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_come_back_at_every_width_and_length() {
        for bits in [2, 3, 4, 5, 6, 8] {
            for count in [1, 10, 31, 32, 33, 64, 100] {
                let values: Vec<u8> = (0..count).map(|i| (i * 37 % 251) as u8 & ((1u32 << bits) - 1) as u8).collect();
                let mut words = Vec::new();
                pack(values.iter().copied(), bits, &mut words);
                assert_eq!(words.len(), crate::tensor::row_words(count, bits));
                let mut back = vec![0; count];
                unpack(words.iter().copied(), bits, true, &mut back);
                assert_eq!(back, values, "{bits} x {count}");
                // Without straddling: as many whole fields a word as fit.
                let mut words = Vec::new();
                values.chunks((32 / bits) as usize).for_each(|chunk| pack(chunk.iter().copied(), bits, &mut words));
                unpack(words.iter().copied(), bits, false, &mut back);
                assert_eq!(back, values, "{bits} x {count}");
            }
        }
    }

    #[test]
    fn transposing_twice_changes_nothing() {
        let values: Vec<u8> = (0..24).collect();
        assert_eq!(transpose(&transpose(&values, 4), 6).as_ref(), values);
        assert_eq!(transpose(&values, 4)[..6], [0, 4, 8, 12, 16, 20]);
    }
}
