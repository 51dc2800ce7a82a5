//! The last step of every reader: rows of codes and the numbers of their groups as the form that fits them.

use half::f16;

use super::canonical::pack_params;
use crate::checkpoint::{Dtype, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Bytes, DenseMatrix, DenseType, Levels, Offset, PackedMatrix, W4Matrix, Weight, row_words};

use super::bits::{pack, unpack};
use super::words;

/// Rows of codes without gaps: code i at bit `i * bits` of a row, rows of whole words.
pub(super) struct Rows {
    pub(super) n: usize,
    pub(super) k: usize,
    pub(super) bits: u32,
    pub(super) group_size: usize,
    /// (n, row words)
    pub(super) codes: Vec<u32>,
}

impl Rows {
    /// The weights: in the canonical 4-bit form if they fit it, else packed, or dense where no kernel knows the groups.
    /// Nothing is rounded but the weights themselves, as `rounding` says.
    pub(super) fn weight(self, levels: Levels, rounding: DenseType) -> Result<Weight> {
        let Self { n, k, bits, group_size, codes } = self;
        match levels {
            Levels::Affine(offset, params)
                if bits == 4 && k.is_multiple_of(8) && group_size.is_multiple_of(8) && k.is_multiple_of(group_size) =>
            {
                W4Matrix::new((n, k), group_size, codes, params, offset.rounded_to(rounding)).map(Weight::W4)
            }
            levels => {
                let matrix = PackedMatrix { n, k, bits, group_size, codes, levels, rounding };
                if group_size.is_multiple_of(8) || group_size >= k {
                    matrix.check()?;
                    return Ok(Weight::Packed(matrix));
                }
                dense(&matrix).map(Weight::Dense)
            }
        }
    }

    /// The same with column i taken from `order[i]`.
    pub(super) fn reordered(mut self, order: &[u32]) -> Self {
        let width = row_words(self.k, self.bits);
        let (mut row, mut moved) = (vec![0; self.k], Vec::with_capacity(width));
        for words in self.codes.chunks_exact_mut(width) {
            unpack(words.iter().copied(), self.bits, true, &mut row);
            moved.clear();
            pack(order.iter().map(|&from| row[from as usize]), self.bits, &mut moved);
            words.copy_from_slice(&moved);
        }
        self
    }
}

/// The weights of a matrix that no kernel reads as it is.
fn dense(matrix: &PackedMatrix) -> Result<DenseMatrix> {
    let (n, k) = (matrix.n, matrix.k);
    let mut bytes = Vec::new();
    bytes
        .try_reserve_exact(n * k * matrix.rounding.size())
        .map_err(|_| Error::new(ErrorKind::OutOfMemory, format!("expanding {n} x {k} weights")))?;
    let mut row = vec![0.0; k];
    for i in 0..n {
        matrix.expand(i, 0, &mut row);
        match matrix.rounding {
            DenseType::F16 => bytes.extend(row.iter().flat_map(|&w| f16::from_f32(w).to_le_bytes())),
            DenseType::BF16 => bytes.extend(row.iter().flat_map(|&w| half::bf16::from_f32(w).to_le_bytes())),
            DenseType::F32 => bytes.extend(row.iter().flat_map(|&w| w.to_le_bytes())),
        }
    }
    DenseMatrix::new(n, k, matrix.rounding, Bytes::owned(bytes))
}

/// Whether half precision holds the numbers of a tensor exactly. Those that are in it need not be read.
pub(super) fn is_half(tensor: &TensorView) -> Result<bool> {
    match tensor.dense_type()? {
        DenseType::F16 => Ok(true),
        _ => Ok(numbers(tensor)?.0.into_iter().all(fits_half)),
    }
}

fn fits_half(value: f32) -> bool {
    f16::from_f32(value).to_f32() == value
}

/// Scale and offset of every group; in half precision if that holds them exactly.
pub(super) fn affine(offset: Offset, scales: &[f32], offsets: impl Iterator<Item = f32> + Clone) -> Levels {
    if scales.iter().all(|&s| fits_half(s)) && offsets.clone().all(fits_half) {
        let pairs = scales.iter().zip(offsets);
        return Levels::Affine(offset, pairs.map(|(&s, o)| pack_params(f16::from_f32(s), f16::from_f32(o))).collect());
    }
    Levels::AffineWide(offset, scales.iter().zip(offsets).map(|(&s, o)| [s, o]).collect())
}

/// Finite floating-point numbers in file order, and their type.
pub(super) fn numbers(tensor: &TensorView) -> Result<(Vec<f32>, DenseType)> {
    let dtype = tensor.dense_type()?;
    let values = tensor.to_f32()?;
    match values.iter().position(|v| !v.is_finite()) {
        Some(i) => Err(tensor.error(format!("expected finite numbers, found {} at element {i}", values[i]))),
        None => Ok((values, dtype)),
    }
}

/// The order of columns that sorts them by group, from the group of each input; `None` if they are sorted.
///
/// # Errors
/// [`ErrorKind::InvalidTensor`] if the groups are not those of `k` inputs in groups of `group_size`.
pub(super) fn order(g_idx: &TensorView, k: usize, group_size: usize) -> Result<Option<Vec<u32>>> {
    g_idx.expect_dtype(Dtype::I32)?;
    g_idx.expect_shape(&[k])?;
    let groups: Vec<usize> = words(&g_idx.bytes()?).map(|group| group as usize).collect();
    let n_groups = k.div_ceil(group_size);
    if let Some(i) = groups.iter().position(|&group| group >= n_groups) {
        let found = groups[i] as u32 as i32;
        return Err(g_idx.error(format!("expected groups below {n_groups}, found {found} at element {i}")));
    }
    if groups.iter().enumerate().all(|(i, &group)| group == i / group_size) {
        return Ok(None);
    }
    // A stable counting sort.
    let mut next = vec![0; n_groups];
    groups.iter().for_each(|&group| next[group] += 1);
    let mut start = 0;
    for (group, next) in next.iter_mut().enumerate() {
        let expected = group_size.min(k - group * group_size);
        if *next != expected {
            return Err(g_idx.error(format!("expected {expected} inputs in group {group}, found {next}")));
        }
        (*next, start) = (start, start + *next);
    }
    let mut order = vec![0; k];
    for (i, &group) in groups.iter().enumerate() {
        order[next[group]] = i as u32;
        next[group] += 1;
    }
    Ok(Some(order))
}
