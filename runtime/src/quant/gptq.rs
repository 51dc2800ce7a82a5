//! GPTQ checkpoints of GPTQModel's second format (`gptq_v2`), whose zero points are stored as they are.
//!
//! Layout after GPTQModel's `nn_modules/qlinear` with N output and K input features, G groups, b bits: `qweight` i32
//! (K b / 32, N), the codes of 32 / b consecutive input features a word (32 of them in three words at 3 bits);
//! `qzeros` i32 (G, N b / 32), along the outputs; `scales` f16 (G, N); `g_idx` i32 (K), the group of each input feature.

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::{Error, ErrorKind, Result};

use super::bits::{dense_words, pack, transpose, unpack};
use super::canonical::{read_f16, release};
use super::{AffineMatrix, words};

/// The tensors of one linear.
#[derive(Debug, Clone, PartialEq)]
pub struct GptqTensors {
    /// (k * bits / 32, n), row-major.
    pub qweight: Vec<u32>,
    /// (groups, n * bits / 32), row-major.
    pub qzeros: Vec<u32>,
    /// (groups, n), row-major.
    pub scales: Vec<f16>,
    /// (k).
    pub g_idx: Vec<u32>,
}

/// Encodes a matrix; decoding it gives the same matrix back.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if input or output features are not a multiple of 32.
pub fn encode(matrix: &AffineMatrix) -> Result<GptqTensors> {
    let (n, k, groups, bits) = (matrix.n, matrix.k, matrix.groups(), matrix.bits);
    if n % 32 != 0 || k % 32 != 0 {
        let message = format!("gptq packs features in multiples of 32, found {n} x {k}");
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let mut rows = Vec::new();
    for row in matrix.codes.chunks_exact(k) {
        pack(row.iter().copied(), bits, &mut rows);
    }
    let mut qzeros = Vec::new();
    for zeros in transpose(&matrix.zeros, groups).chunks_exact(n) {
        pack(zeros.iter().copied(), bits, &mut qzeros);
    }
    Ok(GptqTensors {
        qweight: transpose(&rows, k * bits as usize / 32).into_owned(),
        qzeros,
        scales: transpose(&matrix.scales, groups).into_owned(),
        g_idx: (0..k).map(|i| (i / matrix.group_size) as u32).collect(),
    })
}

pub(super) fn decode(
    checkpoint: &Checkpoint,
    prefix: &str,
    (n, k): (usize, usize),
    bits: u32,
    group_size: usize,
) -> Result<AffineMatrix> {
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let qweight = checkpoint.get(&name("qweight"))?;
    if n % 32 != 0 || k % 32 != 0 || k % group_size != 0 {
        return Err(qweight.error(format!("expected multiples of 32 features in whole groups, found {n} x {k}")));
    }
    let groups = k / group_size;
    let k_words = dense_words(k, bits).unwrap_or(usize::MAX);
    let n_words = dense_words(n, bits).unwrap_or(usize::MAX);
    qweight.expect_dtype(Dtype::I32)?;
    qweight.expect_shape(&[k_words, n])?;
    let qzeros = checkpoint.require(&name("qzeros"), &[groups, n_words])?;
    qzeros.expect_dtype(Dtype::I32)?;
    let scales = checkpoint.require(&name("scales"), &[groups, n])?;
    if let Some(g_idx) = checkpoint.tensor(&name("g_idx")) {
        g_idx.expect_dtype(Dtype::I32)?;
        g_idx.expect_shape(&[k])?;
        if words(&g_idx.bytes()?).enumerate().any(|(i, group)| group as usize != i / group_size) {
            return Err(g_idx.error("groups in another order than that of the input features are not read"));
        }
    }
    let mut columns: Vec<u32> = qweight.reserve(k_words * n)?;
    columns.extend(words(&qweight.bytes()?));
    let mut codes = qweight.reserve(n * k)?;
    codes.resize(n * k, 0);
    for (row, column) in codes.chunks_exact_mut(k).zip(transpose(&columns, n).chunks_exact(k_words)) {
        unpack(column.iter().copied(), bits, true, row);
    }
    let mut zeros = vec![0; groups * n];
    for (zeros, packed) in zeros.chunks_exact_mut(n).zip(qzeros.bytes()?.chunks_exact(4 * n_words)) {
        unpack(words(packed), bits, true, zeros);
    }
    let matrix = AffineMatrix {
        n,
        k,
        bits,
        group_size,
        codes,
        scales: transpose(&read_f16(scales)?, n).into_owned(),
        zeros: transpose(&zeros, n).into_owned(),
    };
    release(&[qweight, qzeros, scales]);
    matrix.check().map_err(|error| qweight.error(error.message()))?;
    Ok(matrix)
}
