//! What the bits mean: every weight dialect on disk, to and from the forms that backends compute with.
//!
//! [`load_linear`] is the one door for a model loader: it asks the [`Quantization`] how a module is packed, checks every
//! tensor of it and returns its weights without any further loss, or the dense matrix of a module that is not packed.

use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::Weight;

mod affine;
pub mod awq;
mod bits;
mod bitsandbytes;
mod build;
mod canonical;
pub mod compressed;
mod config;
mod dialect;
mod gguf;
pub mod gptq;
mod mlx;
mod modelopt;
mod rows;

pub use affine::AffineMatrix;
pub use config::{Quantization, Scheme, ZeroPoints};
pub use dialect::{Dialect, Part, part_of, stored_shape};
pub use rows::{LinearShape, ROW_STEP, linear_shape, load_rows, table_shape};

/// The weights of a linear module, and what has to be done to its inputs before they meet them.
#[derive(Debug, Clone)]
pub struct LinearWeight {
    /// The matrix, its columns in the order of [`InputTransform::order`].
    pub weight: Weight,
    /// What happens to the inputs.
    pub input: InputTransform,
}

/// The inputs of a matrix: column i of it meets input `order[i]`, multiplied with `factors[i]`.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct InputTransform {
    /// A permutation of the inputs; `None` leaves them where they are.
    pub order: Option<Vec<u32>>,
    /// A factor a column of the matrix; `None` for ones.
    pub factors: Option<Vec<f32>>,
}

impl From<Weight> for LinearWeight {
    fn from(weight: Weight) -> Self {
        Self { weight, input: InputTransform::default() }
    }
}

impl LinearWeight {
    /// Writes row `row` of the matrix that acts on the inputs as they come, order and factors included.
    ///
    /// # Panics
    /// If the row is out of range or `out` is not as long as a row.
    pub fn expand_row(&self, row: usize, out: &mut [f32]) {
        self.weight.expand_row(row, out);
        if let Some(factors) = &self.input.factors {
            out.iter_mut().zip(factors).for_each(|(w, factor)| *w *= factor);
        }
        if let Some(order) = &self.input.order {
            let stored = out.to_vec();
            order.iter().zip(stored).for_each(|(&to, w)| out[to as usize] = w);
        }
    }
}

/// Loads the weight of the linear module `prefix` (its name without `.weight`) of `n` outputs and `k` inputs.
///
/// Weights that are used as they are stored stay views of the file, dense and K-quantized ones; others are repacked
/// once, without expanding them, and their file pages are released.
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
) -> Result<LinearWeight> {
    load_module(checkpoint, scheme_of_stored(checkpoint, quantization, prefix)?, prefix, n, k)
}

/// As [`load_linear`], for a module whose scheme is known.
fn load_module(
    checkpoint: &Checkpoint,
    scheme: Option<Scheme>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<LinearWeight> {
    match scheme {
        Some(scheme) => load_packed(checkpoint, scheme, prefix, n, k),
        None => checkpoint.dense_matrix(&format!("{prefix}.weight"), n, k).map(|dense| Weight::Dense(dense).into()),
    }
}

/// Loads the embedding table `prefix` of `n` rows of `k` elements, which is packed in few dialects.
///
/// # Errors
/// As [`load_linear`].
pub fn load_table(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
    n: usize,
    k: usize,
) -> Result<Weight> {
    let LinearWeight { weight, input } = load_linear(checkpoint, quantization, prefix, n, k)?;
    if input != InputTransform::default() {
        let message = "an embedding table whose columns are in another order";
        return Err(Error::new(ErrorKind::Unsupported, message).in_file(checkpoint.dir()).in_tensor(prefix));
    }
    Ok(weight)
}

/// Loads the packed module `prefix` of shape (n, k).
///
/// # Errors
/// As [`load_linear`].
pub fn load_packed(checkpoint: &Checkpoint, scheme: Scheme, prefix: &str, n: usize, k: usize) -> Result<LinearWeight> {
    let shape = Shape::of(checkpoint, prefix, (n, k), scheme)?;
    let plain = |weight: Result<Weight>| weight.map(LinearWeight::from);
    match scheme.dialect {
        Dialect::AwqGemm => plain(awq::decode_gemm(checkpoint, prefix, shape)),
        Dialect::AwqGemv => plain(awq::decode_gemv(checkpoint, prefix, shape)),
        Dialect::AwqGemvFast => plain(awq::decode_gemv_fast(checkpoint, prefix, shape, "qzeros")),
        Dialect::TinyChat => plain(awq::decode_gemv_fast(checkpoint, prefix, shape, "scaled_zeros")),
        Dialect::PackQuantized | Dialect::IntQuantized => compressed::decode(checkpoint, prefix, shape, scheme),
        Dialect::Gptq | Dialect::GptqV2 => gptq::decode(checkpoint, prefix, shape, scheme),
        Dialect::BitsAndBytes => plain(bitsandbytes::decode(checkpoint, prefix, (n, k))),
        Dialect::ModelOpt => modelopt::decode(checkpoint, prefix, shape),
        Dialect::Mlx => plain(mlx::decode(checkpoint, prefix, shape, scheme.bits)),
        Dialect::Gguf => plain(gguf::decode(checkpoint, prefix, (n, k))),
    }
}

/// How the module is packed according to both the configuration and the tensors that are there, which have to agree.
pub(crate) fn scheme_of_stored(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    prefix: &str,
) -> Result<Option<Scheme>> {
    let Stored { codes, dense } = Stored::of(checkpoint, prefix);
    let contradiction = |tensor: &TensorView, message: String| {
        Err(Error::new(ErrorKind::InvalidConfig, message).in_file(&tensor.file).in_tensor(&tensor.name))
    };
    let scheme = quantization.map(|q| q.scheme_of(prefix)).transpose()?.flatten();
    match (scheme, codes, dense) {
        (_, Some(codes), Some(_)) => contradiction(codes, format!("`{prefix}.weight` is stored as well")),
        (Some(scheme), Some(codes), None) => {
            let expected = scheme.dialect.codes_suffix();
            if codes.name.strip_prefix(prefix).and_then(|rest| rest.strip_prefix('.')) != Some(expected) {
                let dialect = scheme.dialect.name();
                return contradiction(
                    codes,
                    format!("the configuration says {dialect}, expected `{prefix}.{expected}`"),
                );
            }
            Ok(Some(scheme))
        }
        // These writers exclude by substring or regular expression, and some list one that also fits modules they did
        // pack; what they stored is unmistakable.
        (None, Some(codes), None) => match quantization.filter(|q| q.dialect().excludes_loosely()) {
            Some(quantization) => Ok(Some(quantization.scheme())),
            None => contradiction(codes, "the configuration does not say it is quantized".into()),
        },
        // Heads, embeddings and the like are left dense by every writer, without being listed.
        (Some(scheme), None, Some(dense))
            if !scheme.dialect.leaves_some_dense() && prefix.split('.').any(|part| part == "layers") =>
        {
            let (dialect, suffix) = (scheme.dialect.name(), scheme.dialect.codes_suffix());
            contradiction(dense, format!("the configuration says {dialect}, expected `{prefix}.{suffix}`"))
        }
        (Some(scheme), None, None) => Ok(Some(scheme)),
        (_, None, _) => Ok(None),
    }
}

/// What is stored of a module.
struct Stored<'a> {
    codes: Option<&'a TensorView>,
    dense: Option<&'a TensorView>,
}

impl<'a> Stored<'a> {
    fn of(checkpoint: &'a Checkpoint, prefix: &str) -> Self {
        let codes = ["qweight", "weight_packed"].iter().find_map(|s| checkpoint.tensor(&format!("{prefix}.{s}")));
        let weight = checkpoint.tensor(&format!("{prefix}.weight"));
        // bitsandbytes may store its bytes as elements of any type.
        let is_codes = weight.is_some_and(|weight| weight.dense_type().is_err())
            || bitsandbytes::state(checkpoint, prefix).is_some();
        match is_codes {
            true => Self { codes: codes.or(weight), dense: None },
            false => Self { codes, dense: weight },
        }
    }
}

/// Checked geometry of a packed matrix.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shape {
    /// Output features, at least 1.
    pub n: usize,
    /// Input features, at least 1; their product with `n` is a number of bytes that may be allocated.
    pub k: usize,
    /// Input features of a group.
    pub group_size: usize,
    /// Groups of a row, the last one maybe shorter.
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
        if n == 0 || k == 0 || group_size == 0 || n.checked_mul(k).is_none_or(|size| size > isize::MAX as usize / 8) {
            let message = format!("packed weights of {n} x {k} in groups of {group_size}");
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        if !k.is_multiple_of(group_size) && !scheme.dialect.allows_short_group() {
            let message = format!("group size {group_size} does not divide the {k} input features");
            return Err(Error::new(ErrorKind::InvalidConfig, message));
        }
        Ok(Self { n, k, group_size, groups: k.div_ceil(group_size) })
    }

    /// Checks that groups are whole and rows are whole words, as the AWQ layouts have them.
    fn expect_words(&self) -> Result<()> {
        if !self.k.is_multiple_of(8) || !self.group_size.is_multiple_of(8) {
            let message = format!("groups of {} in {} input features, not multiples of 8", self.group_size, self.k);
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        Ok(())
    }
}

/// Little-endian words of a tensor whose length was checked.
pub(crate) fn words(bytes: &[u8]) -> impl ExactSizeIterator<Item = u32> + '_ {
    bytes.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
}
