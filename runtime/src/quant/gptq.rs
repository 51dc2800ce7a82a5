//! GPTQ checkpoints: AutoGPTQ's format and GPTQModel's second one (`gptq_v2`), 2, 3, 4 and 8 bits.
//!
//! Layout after GPTQModel's `nn_modules/qlinear` with N output and K input features, G = ceil(K / group size) groups, b
//! bits: `qweight` i32 (ceil(K b / 32), N), a bit string along the inputs for each output; `qzeros` i32 (G,
//! ceil(N b / 32)), along the outputs; `scales` f16 (G, N); `g_idx` i32 (K), the group of each input feature. The first
//! format stores zero points less one, in one of two ways, see [`ZeroPoints`].

use half::f16;

use crate::checkpoint::{Checkpoint, Dtype};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{Offset, row_words};

use super::bits::{pack, transpose, unpack};
use super::build::{Rows, affine, numbers, order};
use super::canonical::release;
use super::{AffineMatrix, InputTransform, LinearWeight, Scheme, Shape, ZeroPoints, words};

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

pub(super) fn decode(checkpoint: &Checkpoint, prefix: &str, shape: Shape, scheme: Scheme) -> Result<LinearWeight> {
    let Shape { n, k, group_size, groups } = shape;
    let Scheme { bits, symmetric, act_order, .. } = scheme;
    let name = |suffix: &str| format!("{prefix}.{suffix}");
    let (k_words, n_words) = (row_words(k, bits), row_words(n, bits));
    let qweight = checkpoint.get(&name("qweight"))?;
    qweight.expect_dtype(Dtype::I32)?;
    qweight.expect_shape(&[k_words, n])?;
    let scales = checkpoint.require(&name("scales"), &[groups, n])?;
    let order = match checkpoint.tensor(&name("g_idx")) {
        Some(g_idx) => order(g_idx, k, group_size)?,
        None if act_order && groups > 1 => {
            return Err(qweight.error(format!("`desc_act` needs `{}`, which is missing", name("g_idx"))));
        }
        None => None,
    };
    let zeros = match checkpoint.tensor(&name("qzeros")) {
        Some(qzeros) => {
            qzeros.expect_dtype(Dtype::I32)?;
            qzeros.expect_shape(&[groups, n_words])?;
            let zeros = zero_points(&qzeros.bytes()?, (groups, n), bits, scheme.zeros);
            let middle = 1 << (bits - 1);
            if let Some(i) = zeros.iter().position(|&zero| zero != middle).filter(|_| symmetric) {
                let message = format!(
                    "expected zero points of {middle}, the configuration says `sym`, found {} at {i}",
                    zeros[i]
                );
                return Err(qzeros.error(message));
            }
            qzeros.release();
            zeros
        }
        // Written by tools that know only symmetric weights.
        None if symmetric => vec![1 << (bits - 1); groups * n],
        None => return Err(qweight.error(format!("`{}` is missing", name("qzeros")))),
    };

    let mut words_of_inputs: Vec<u32> = qweight.reserve(k_words * n)?;
    words_of_inputs.extend(words(&qweight.bytes()?));
    // A column of words is the bit string of an output.
    let codes = transpose(&words_of_inputs, n).into_owned();
    let mut rows = Rows { n, k, bits, group_size, codes };
    if let Some(order) = &order {
        rows = rows.reordered(order);
    }
    let (values, rounding) = numbers(scales)?;
    let values = transpose(&values, n);
    let zeros = transpose(&zeros, n);
    let levels = affine(Offset::Zero, &values, zeros.iter().map(|&zero| f32::from(zero)));
    release(&[qweight, scales]);
    let weight = rows.weight(levels, rounding).map_err(|error| qweight.error(error.message()))?;
    Ok(LinearWeight { weight, input: InputTransform { order, factors: None } })
}

/// Zero points (groups, n) as they are meant.
fn zero_points(packed: &[u8], (groups, n): (usize, usize), bits: u32, stored: ZeroPoints) -> Vec<u8> {
    let n_words = row_words(n, bits);
    let mask = ((1u32 << bits) - 1) as u8;
    let added = |column: usize| {
        let ZeroPoints::WordsLessOne(bits) = stored else { return 0 };
        match (bits, column % 3) {
            (2, _) => 0x5555_5555,
            // Ones in every field would be 0x49249249, 0x92492492, 0x24924924: the first and the last are exchanged.
            (3, 0) => 0x2492_4924,
            (3, 1) => 0x9249_2492,
            (3, _) => 0x4924_9249,
            (4, _) => 0x1111_1111,
            _ => 0x0101_0101u32,
        }
    };
    let mut zeros = vec![0; groups * n];
    for (zeros, packed) in zeros.chunks_exact_mut(n).zip(packed.chunks_exact(4 * n_words)) {
        unpack(words(packed).enumerate().map(|(column, word)| word.wrapping_add(added(column))), bits, true, zeros);
        if stored == ZeroPoints::FieldsLessOne {
            zeros.iter_mut().for_each(|zero| *zero = zero.wrapping_add(1) & mask);
        }
    }
    zeros
}
