//! What the bits mean: every weight dialect on disk, to and from the canonical form.
//!
//! [`load_linear`] is the one door for a model loader: it asks the [`Quantization`] how a module is packed, checks every
//! tensor of it and returns the canonical [`W4Matrix`], or the dense matrix of a module that is not packed.

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{W4Matrix, Weight};

mod affine;
pub mod awq;
mod bits;
mod canonical;
pub mod compressed;
mod config;
pub mod gptq;
mod rows;

pub use affine::AffineMatrix;
pub use config::{Dialect, Quantization, Scheme};
pub use rows::{ROW_STEP, linear_shape, load_rows};

/// Loads the weight of the linear module `prefix` (its name without `.weight`) of `n` outputs and `k` inputs.
///
/// Packed weights are repacked to the canonical form, one allocation of n * k / 2 bytes, and their file pages are
/// released; dense weights stay views of the file.
///
/// # Errors
/// [`ErrorKind::InvalidTensor`] if a tensor is missing or has the wrong type, shape or values;
/// [`ErrorKind::InvalidConfig`] if configuration and tensors contradict each other; [`ErrorKind::Unsupported`];
/// [`ErrorKind::OutOfMemory`].
pub fn load_linear(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<Weight> {
    load_module(checkpoint, scheme_of_stored(checkpoint, quantization, prefix)?, prefix, n, k)
}

/// As [`load_linear`], for a module whose scheme is known.
fn load_module(checkpoint: &Checkpoint, scheme: Option<Scheme>, prefix: &str, n: usize, k: usize) -> Result<Weight> {
    match scheme {
        Some(scheme) if scheme.bits == 4 && scheme.dialect != Dialect::GptqV2 => {
            load_packed(checkpoint, scheme, prefix, n, k).map(Weight::W4)
        }
        Some(scheme) => load_affine(checkpoint, scheme, prefix, n, k)?
            .to_weight()
            .map_err(|error| error.in_file(checkpoint.dir()).in_tensor(prefix)),
        None => checkpoint.dense_matrix(&format!("{prefix}.weight"), n, k).map(Weight::Dense),
    }
}

/// Decodes the packed module `prefix` of shape (n, k).
///
/// # Errors
/// As [`load_linear`].
pub fn load_packed(checkpoint: &Checkpoint, scheme: Scheme, prefix: &str, n: usize, k: usize) -> Result<W4Matrix> {
    let shape = Shape::of(checkpoint, prefix, (n, k), scheme)?;
    match scheme.dialect {
        Dialect::AwqGemm => awq::decode_gemm(checkpoint, prefix, shape),
        Dialect::AwqGemv => awq::decode_gemv(checkpoint, prefix, shape),
        Dialect::AwqGemvFast => awq::decode_gemv_fast(checkpoint, prefix, shape),
        Dialect::PackQuantized if scheme.bits == 4 => compressed::decode(checkpoint, prefix, shape, scheme.symmetric),
        Dialect::PackQuantized | Dialect::GptqV2 => match load_affine(checkpoint, scheme, prefix, n, k)?.to_weight()? {
            Weight::W4(matrix) => Ok(matrix),
            _ => {
                let message = format!("codes of {} bits do not fit the 4-bit form", scheme.bits);
                Err(Error::new(ErrorKind::Unsupported, message).in_file(checkpoint.dir()).in_tensor(prefix))
            }
        },
    }
}

/// Decodes the packed module `prefix` of shape (n, k) to its codes, of any width that the dialect has.
///
/// # Errors
/// As [`load_linear`]; [`ErrorKind::Unsupported`] for the AWQ dialects, which [`load_packed`] reads.
pub fn load_affine(checkpoint: &Checkpoint, scheme: Scheme, prefix: &str, n: usize, k: usize) -> Result<AffineMatrix> {
    let group_size = scheme.group_size.unwrap_or(k);
    match scheme.dialect {
        Dialect::PackQuantized => {
            compressed::decode_affine(checkpoint, prefix, (n, k), scheme.bits, group_size, scheme.symmetric)
        }
        Dialect::GptqV2 => gptq::decode(checkpoint, prefix, (n, k), scheme.bits, group_size),
        Dialect::AwqGemm | Dialect::AwqGemv | Dialect::AwqGemvFast => {
            let message = format!("{} has 4 bits, found {}", scheme.dialect.name(), scheme.bits);
            Err(Error::new(ErrorKind::Unsupported, message).in_file(checkpoint.dir()).in_tensor(prefix))
        }
    }
}

/// How the module is packed according to both the configuration and the tensors that are there, which have to agree.
fn scheme_of_stored(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
) -> Result<Option<Scheme>> {
    let dense = checkpoint.tensor(&format!("{prefix}.weight"));
    let packed =
        ["qweight", "weight_packed"].iter().find_map(|suffix| checkpoint.tensor(&format!("{prefix}.{suffix}")));
    let contradiction = |tensor: &TensorView, message: String| {
        Err(Error::new(ErrorKind::InvalidConfig, message).in_file(&tensor.file).in_tensor(&tensor.name))
    };
    let scheme = quantization.map(|q| q.scheme_of(prefix)).transpose()?.flatten();
    match (scheme, packed, dense) {
        (_, Some(packed), Some(_)) => contradiction(packed, format!("`{prefix}.weight` is stored as well")),
        (Some(scheme), Some(packed), None) => {
            let expected = scheme.dialect.codes_suffix();
            if packed.name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) != Some(expected) {
                let dialect = scheme.dialect.name();
                return contradiction(
                    packed,
                    format!("the configuration says {dialect}, expected `{prefix}.{expected}`"),
                );
            }
            Ok(Some(scheme))
        }
        // AutoAWQ excludes by substring, and some writers list one that also fits modules they did pack.
        (None, Some(_), None) if quantization.is_some_and(|q| q.dialect() != Dialect::PackQuantized) => {
            Ok(quantization.map(Quantization::scheme))
        }
        (None, Some(packed), None) => contradiction(packed, "the configuration does not say it is quantized".into()),
        // Heads, embeddings and the like are left dense by every writer, without being listed.
        (Some(scheme), None, Some(dense)) if prefix.split('.').any(|part| part == "layers") => contradiction(
            dense,
            format!(
                "the configuration says {}, expected `{prefix}.{}`",
                scheme.dialect.name(),
                scheme.dialect.codes_suffix()
            ),
        ),
        (Some(scheme), None, None) => Ok(Some(scheme)),
        (_, None, _) => Ok(None),
    }
}

/// Checked geometry of a packed matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Output features.
    pub n: usize,
    /// Input features, a positive multiple of 8.
    pub k: usize,
    /// Input features of a group, a multiple of 8 that divides `k`.
    pub group_size: usize,
    /// Groups of a row.
    pub groups: usize,
}

impl Shape {
    /// Geometry of the packed module `prefix`.
    fn of(checkpoint: &Checkpoint, prefix: &str, (n, k): (usize, usize), scheme: Scheme) -> Result<Self> {
        Self::new(n, k, scheme).map_err(|error| {
            let codes = format!("{prefix}.{}", scheme.dialect.codes_suffix());
            let file = checkpoint.tensor(&codes).map_or(checkpoint.dir(), |tensor| &tensor.file);
            error.in_file(file).in_tensor(codes)
        })
    }

    fn new(n: usize, k: usize, scheme: Scheme) -> Result<Self> {
        let group_size = scheme.group_size.unwrap_or(k);
        if n == 0 || k == 0 || !k.is_multiple_of(8) {
            let message = format!("packed weights of {n} x {k} (input features have to be a multiple of 8)");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if !k.is_multiple_of(group_size) {
            let message = format!("group size {group_size} does not divide the {k} input features");
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        Ok(Self { n, k, group_size, groups: k / group_size })
    }
}

/// Little-endian words of a tensor whose length was checked.
pub(crate) fn words(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
