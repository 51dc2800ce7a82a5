//! Round to nearest: every group of weights gets the scale and zero point that span its own range.

use std::collections::{HashMap, HashSet};
use std::io::Write;
use std::path::Path;

use awqua::checkpoint::{Checkpoint, Dtype, TensorView};
use awqua::quant::{self, Dialect, Quantization, Scheme, awq};
use awqua::tensor::{DenseMatrix, Offset, W4Matrix};
use awqua::{Error, ErrorKind, Result};
use half::f16;
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use crate::write::{DEFAULT_SHARD_BYTES, Elements, FolderWriter, TensorSpec, copy_tensor};

/// Files that are copied beside the weights when the source has them.
pub(crate) const COMPANIONS: [&str; 10] = [
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// Last name parts of the linear modules of a decoder layer, in every architecture that names them.
const LINEARS: [&str; 12] = [
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "qkv_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "gate_up_proj",
    "w1",
    "w2",
    "w3",
];

/// What happens to tensors that are not packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Rest {
    /// Floating-point tensors become half precision, as AutoAWQ writes them.
    #[default]
    F16,
    /// They stay as they are.
    Keep,
}

/// Options of [`quantize_rtn`].
#[derive(Debug, Clone)]
pub struct RtnOptions {
    /// Input features that share a scale; `None`: the largest of 128, 64 and 32 that divides those of every linear.
    pub group_size: Option<usize>,
    /// What happens to tensors that are not packed.
    pub rest: Rest,
    /// Largest weight file, bytes.
    pub shard_bytes: u64,
}

impl Default for RtnOptions {
    fn default() -> Self {
        Self { group_size: None, rest: Rest::default(), shard_bytes: DEFAULT_SHARD_BYTES }
    }
}

/// How far [`quantize_rtn`] is; given before each tensor of the source is worked on, and again while verifying.
#[derive(Debug, Clone, Copy)]
pub struct Progress<'a> {
    /// Bytes done; a byte of the source counts once for packing and once for verifying.
    pub done: u64,
    /// Bytes there are to do.
    pub total: u64,
    /// Tensor that comes next.
    pub tensor: &'a str,
}

/// One packed module.
#[derive(Debug, Clone, Serialize)]
pub struct PackedModule {
    /// Name without `.weight`.
    pub name: String,
    /// Output and input features.
    pub shape: [usize; 2],
    /// Root of sum((w - w')^2) / sum(w^2) over the matrix; 0 for an all-zero matrix.
    pub relative_error: f64,
}

/// What [`quantize_rtn`] did.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Input features that share a scale.
    pub group_size: usize,
    /// Packed modules, sorted by name.
    pub packed: Vec<PackedModule>,
    /// Names of the other tensors, sorted.
    pub kept: Vec<String>,
    /// Bytes of the source's weight files.
    pub source_bytes: u64,
    /// Bytes of the written weight files.
    pub packed_bytes: u64,
}

/// Rounds a matrix to 4 bits in groups of `group_size` input features, asymmetric.
///
/// The range of a group always includes zero, which AutoAWQ's writer omits: without it a group whose weights all have
/// one sign saturates, because the zero point cannot leave 0 to 15.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if the group size is not a multiple of 8 that divides `k`,
/// [`ErrorKind::InvalidTensor`] if a weight is not finite or too large for half-precision scales.
pub fn quantize_matrix(dense: &DenseMatrix, group_size: usize) -> Result<W4Matrix> {
    let (n, k) = (dense.n, dense.k);
    if k == 0 || group_size == 0 || !group_size.is_multiple_of(8) || k % group_size != 0 {
        let message = format!("group size {group_size} is not a multiple of 8 that divides {k} input features");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut qweight = Vec::with_capacity(n * (k / 8));
    let mut group_params = Vec::with_capacity(n * (k / group_size));
    let mut row = vec![0.0; k];
    for (i, bytes) in dense.bytes.chunks_exact(dense.row_bytes()).enumerate() {
        dense.dtype.widen(bytes, &mut row);
        for (g, group) in row.chunks_exact(group_size).enumerate() {
            let (scale, zero) = group_range(group).ok_or_else(|| {
                let message = format!("row {i}, group {g}: weights are not finite or exceed half precision");
                Error::new(ErrorKind::InvalidTensor, message)
            })?;
            let s = scale.to_f32();
            group_params.push(u32::from(scale.to_bits()) | u32::from(f16::from_f32(zero).to_bits()) << 16);
            qweight.extend(group.chunks_exact(8).map(|weights| {
                let code = |w: f32| (round(w / s) + zero).clamp(0.0, 15.0) as u32;
                weights.iter().enumerate().fold(0, |word, (t, &w)| word | code(w) << (4 * t))
            }));
        }
    }
    W4Matrix::new((n, k), group_size, qweight, group_params, Offset::Zero)
}

/// Rounds to the nearest integer, ties to even, for magnitudes up to 2^22; codes are below 32.
///
/// Adding 1.5 * 2^23 leaves no fraction bits, so the addition itself rounds. `f32::round_ties_even` means the same, but
/// is a function call on processors whose baseline has no such instruction, and that was most of the time.
fn round(x: f32) -> f32 {
    const NO_FRACTION: f32 = 12_582_912.0;
    x + NO_FRACTION - NO_FRACTION
}

/// Scale and zero point of a group, or `None` if they are not finite.
fn group_range(group: &[f32]) -> Option<(f16, f32)> {
    // f32::min and max pass over NaN, so finiteness needs its own look.
    let (mut low, mut high, mut finite) = (0f32, 0f32, true);
    for &w in group {
        low = low.min(w);
        high = high.max(w);
        finite &= w.is_finite();
    }
    // The smallest range is AutoAWQ's: it keeps the scale of an all-zero group away from zero.
    let scale = f16::from_f32((high - low).max(1e-5) / 15.0);
    let zero = round(-low / scale.to_f32()).clamp(0.0, 15.0);
    (finite && scale.is_finite()).then_some((scale, zero))
}

/// Packs the floating-point checkpoint in folder `source` and writes it to the new folder `out` in AutoAWQ's `gemm`
/// form: every linear of the decoder layers is packed, embeddings, head and norms are not.
///
/// The result is reopened and compared with what was meant before it gets its name; the same source and options give
/// the same bytes. An error from `progress` stops the work, and nothing is left behind.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the source is packed already or has a linear whose features cannot be packed,
/// [`ErrorKind::InvalidInput`] for a group size or `out` that cannot be used, and those of reading and writing.
pub fn quantize_rtn(
    source: &Path,
    out: &Path,
    options: &RtnOptions,
    progress: &mut dyn FnMut(Progress<'_>) -> Result<()>,
) -> Result<Report> {
    let checkpoint = Checkpoint::open(source)?;
    if Quantization::of(&checkpoint)?.is_some() {
        return Err(Error::new(ErrorKind::Unsupported, "the checkpoint is already quantized").in_file(source));
    }
    let linears: Vec<&TensorView> = checkpoint.tensors().filter(|tensor| is_linear(tensor)).collect();
    let group_size = choose_group_size(&linears, options.group_size).map_err(|error| error.in_file(source))?;
    let mut job = Job {
        checkpoint: &checkpoint,
        scheme: Scheme::new(Dialect::AwqGemm, 4, Some(group_size), false),
        rest: options.rest,
        digests: HashMap::new(),
        packed: Vec::new(),
        done: 0,
        total: 2 * checkpoint.tensors().map(|tensor| tensor.byte_len() as u64).sum::<u64>(),
        progress,
    };

    let writer = FolderWriter::create(out)?;
    writer.write_json("config.json", &job.config(group_size, &linears)?)?;
    for file in COMPANIONS {
        writer.copy_file(source, file)?;
    }
    job.write_weights(&writer, &linears, options.shard_bytes, group_size)?;
    let written = Checkpoint::open(writer.dir())?;
    let kept = job.verify(&written)?;
    let packed_bytes = written.bytes_on_disk();
    drop(written);
    let packed = job.packed;
    writer.finish()?;
    Ok(Report { group_size, packed, kept, source_bytes: checkpoint.bytes_on_disk(), packed_bytes })
}

/// Whether a tensor is the weight of a linear module inside a decoder layer.
fn is_linear(tensor: &TensorView) -> bool {
    let Some(module) = tensor.name.strip_suffix(".weight") else { return false };
    let mut parts = module.split('.');
    let last = parts.next_back().unwrap_or_default();
    tensor.shape.len() == 2 && LINEARS.contains(&last) && parts.any(|part| part == "layers")
}

fn choose_group_size(linears: &[&TensorView], wanted: Option<usize>) -> Result<usize> {
    let Some(first) = linears.first() else {
        return Err(Error::new(ErrorKind::Unsupported, "found no linear modules of decoder layers"));
    };
    if let Some(narrow) = linears.iter().find(|tensor| tensor.shape[0] % 8 != 0 || tensor.shape[0] == 0) {
        let message = format!("expected output features in multiples of 8, found {}", narrow.shape[0]);
        return Err(Error::new(ErrorKind::Unsupported, message).in_tensor(&narrow.name));
    }
    let misfit = |size: usize| linears.iter().find(|tensor| tensor.shape[1] % size != 0 || tensor.shape[1] == 0);
    match wanted {
        Some(size) if ![32, 64, 128].contains(&size) => {
            let message = format!("expected a group size of 32, 64 or 128, found {size}");
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
        Some(size) => match misfit(size) {
            None => Ok(size),
            Some(tensor) => {
                let message = format!("group size {size} does not divide its {} input features", tensor.shape[1]);
                Err(Error::new(ErrorKind::InvalidInput, message).in_tensor(&tensor.name))
            }
        },
        None => [128, 64, 32].into_iter().find(|&size| misfit(size).is_none()).ok_or_else(|| {
            let tensor = misfit(32).unwrap_or(first);
            let message = format!("none of 128, 64 and 32 divides its {} input features", tensor.shape[1]);
            Error::new(ErrorKind::Unsupported, message).in_tensor(&tensor.name)
        }),
    }
}

struct Job<'a> {
    checkpoint: &'a Checkpoint,
    scheme: Scheme,
    rest: Rest,
    /// Module or tensor name to the hash of what the reopened checkpoint has to hold.
    digests: HashMap<String, [u8; 32]>,
    packed: Vec<PackedModule>,
    done: u64,
    total: u64,
    progress: &'a mut dyn FnMut(Progress<'_>) -> Result<()>,
}

impl Job<'_> {
    /// The source's configuration with the quantization it now has.
    fn config(&self, group_size: usize, linears: &[&TensorView]) -> Result<Value> {
        let mut config = self.checkpoint.config().clone();
        // Readers replace every linear of a decoder layer unless a listed string is part of its name.
        let packed = |name: &str| linears.iter().any(|tensor| tensor.name == name);
        let mut excluded = Vec::new();
        for tensor in self.checkpoint.tensors() {
            let in_layer = tensor.shape.len() == 2 && tensor.name.split('.').any(|part| part == "layers");
            let Some(module) = tensor.name.strip_suffix(".weight").filter(|_| in_layer && !packed(&tensor.name)) else {
                continue;
            };
            if let Some(hit) = linears.iter().find(|linear| linear.name.contains(module)) {
                let message = format!("cannot be listed as dense without excluding `{}` too", hit.name);
                return Err(Error::new(ErrorKind::Unsupported, message).in_file(&tensor.file).in_tensor(&tensor.name));
            }
            excluded.push(module.to_owned());
        }
        config["quantization_config"] = json!({
            "quant_method": "awq",
            "bits": 4,
            "group_size": group_size,
            "zero_point": true,
            "version": "gemm",
            "modules_to_not_convert": if excluded.is_empty() { Value::Null } else { json!(excluded) },
        });
        if self.rest == Rest::F16 {
            let key = if config.get("dtype").is_some() { "dtype" } else { "torch_dtype" };
            config[key] = json!("float16");
        }
        Ok(config)
    }

    fn write_weights(
        &mut self,
        writer: &FolderWriter,
        linears: &[&TensorView],
        shard_bytes: u64,
        group_size: usize,
    ) -> Result<()> {
        let mut specs = Vec::new();
        for tensor in linears {
            let (n, k) = (tensor.shape[0], tensor.shape[1]);
            let module = tensor.name.strip_suffix(".weight").unwrap_or(&tensor.name);
            let groups = k / group_size;
            let parts = [
                ("qweight", Dtype::I32, [k, n / 8]),
                ("qzeros", Dtype::I32, [groups, n / 8]),
                ("scales", Dtype::F16, [groups, n]),
            ];
            specs.extend(parts.map(|(suffix, dtype, shape)| TensorSpec {
                name: format!("{module}.{suffix}"),
                dtype,
                shape: shape.to_vec(),
            }));
        }
        // Packed tensors fill multiples of 16 bytes; with the others in falling order of element size, every tensor
        // is aligned to its element.
        let packed: HashSet<&str> = linears.iter().map(|tensor| tensor.name.as_str()).collect();
        let mut rest: Vec<TensorSpec> = self
            .checkpoint
            .tensors()
            .filter(|tensor| !packed.contains(tensor.name.as_str()))
            .map(|tensor| TensorSpec {
                name: tensor.name.clone(),
                dtype: self.elements().of(tensor.dtype),
                shape: tensor.shape.clone(),
            })
            .collect();
        rest.sort_by(|a, b| b.dtype.bitsize().cmp(&a.dtype.bitsize()).then_with(|| a.name.cmp(&b.name)));
        specs.append(&mut rest);

        let mut pending: Option<awq::GemmTensors> = None;
        writer.write_tensors(&specs, shard_bytes, &mut |spec, out| {
            let (module, suffix) = spec.name.rsplit_once('.').unwrap_or((&spec.name, ""));
            let weight = format!("{module}.weight");
            if !packed.contains(weight.as_str()) {
                return self.write_rest(&spec.name, out);
            }
            // The three tensors of a module follow each other, so its matrix is made once and dropped after the third.
            match (suffix, pending.take()) {
                ("qweight", _) => {
                    let tensors = pending.insert(self.pack(module, &weight)?);
                    write_words(out, &tensors.qweight)
                }
                ("qzeros", Some(tensors)) => write_words(out, &pending.insert(tensors).qzeros),
                ("scales", Some(tensors)) => tensors.scales.iter().try_for_each(|s| out.write_all(&s.to_le_bytes())),
                _ => return self.write_rest(&spec.name, out),
            }
            .map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
        })
    }

    fn pack(&mut self, module: &str, weight: &str) -> Result<awq::GemmTensors> {
        let tensor = self.checkpoint.get(weight)?;
        self.report(tensor)?;
        let (n, k) = (tensor.shape[0], tensor.shape[1]);
        let dense = self.checkpoint.dense_matrix(weight, n, k)?;
        let group_size = self.scheme.group_size.unwrap_or(k);
        let matrix =
            quantize_matrix(&dense, group_size).map_err(|error| error.in_file(&tensor.file).in_tensor(weight))?;
        let relative_error = relative_error(&dense, &matrix);
        tensor.release();
        self.packed.push(PackedModule { name: module.to_owned(), shape: [n, k], relative_error });
        self.digests.insert(module.to_owned(), matrix_digest(&matrix));
        awq::encode_gemm(&matrix)
    }

    fn write_rest(&mut self, name: &str, out: &mut dyn Write) -> Result<()> {
        let tensor = self.checkpoint.get(name)?;
        self.report(tensor)?;
        let mut digest = Sha256::new();
        let mut write = |bytes: &[u8]| {
            digest.update(bytes);
            out.write_all(bytes).map_err(|error| Error::new(ErrorKind::Io, error.to_string()))
        };
        copy_tensor(tensor, self.elements(), &mut write)?;
        self.digests.insert(name.to_owned(), digest.finalize().into());
        Ok(())
    }

    /// How what is not packed is stored.
    fn elements(&self) -> Elements {
        if self.rest == Rest::F16 { Elements::Halves } else { Elements::Kept }
    }

    /// Compares the reopened checkpoint with the recorded hashes; returns the names that were not packed.
    fn verify(&mut self, written: &Checkpoint) -> Result<Vec<String>> {
        let differs = |name: &str| {
            let message = "the written checkpoint does not read back as it was meant";
            Error::new(ErrorKind::InvalidTensor, message).in_file(written.dir()).in_tensor(name)
        };
        let quantization = Quantization::of(written)?;
        let mut kept = Vec::new();
        for tensor in self.checkpoint.tensors() {
            self.report(tensor)?;
            let name = tensor.name.as_str();
            let module = name.strip_suffix(".weight").unwrap_or(name);
            if let Some(digest) = self.digests.get(module).filter(|_| module != name) {
                let (n, k) = (tensor.shape[0], tensor.shape[1]);
                match quant::load_linear(written, quantization.as_ref(), module, n, k)?.weight {
                    awqua::tensor::Weight::W4(matrix) if matrix_digest(&matrix) == *digest => {}
                    _ => return Err(differs(name)),
                }
            } else {
                let found = written.require(name, &tensor.shape)?;
                let digest: [u8; 32] = Sha256::digest(&*found.bytes()?).into();
                if self.digests.get(name) != Some(&digest) {
                    return Err(differs(name));
                }
                found.release();
                kept.push(name.to_owned());
            }
        }
        Ok(kept)
    }

    /// Reports progress before `tensor` is worked on.
    fn report(&mut self, tensor: &TensorView) -> Result<()> {
        let result = (self.progress)(Progress { done: self.done, total: self.total, tensor: &tensor.name });
        self.done += tensor.byte_len() as u64;
        result
    }
}

fn matrix_digest(matrix: &W4Matrix) -> [u8; 32] {
    let mut digest = Sha256::new();
    digest.update([matrix.n, matrix.k, matrix.group_size].map(|v| (v as u64).to_le_bytes()).concat());
    let mut buffer = Vec::with_capacity(1 << 16);
    for words in [&matrix.qweight, &matrix.group_params] {
        for chunk in words.chunks(1 << 14) {
            buffer.clear();
            buffer.extend(chunk.iter().flat_map(|word| word.to_le_bytes()));
            digest.update(&buffer);
        }
    }
    digest.finalize().into()
}

fn relative_error(dense: &DenseMatrix, matrix: &W4Matrix) -> f64 {
    let (mut original, mut packed) = (vec![0.0; dense.k], vec![0.0; dense.k]);
    let (mut error, mut norm) = (0.0, 0.0);
    for (i, bytes) in dense.bytes.chunks_exact(dense.row_bytes()).enumerate() {
        dense.dtype.widen(bytes, &mut original);
        matrix.dequantize_row(i, &mut packed);
        for (&w, &p) in original.iter().zip(&packed) {
            error += f64::from(w - p).powi(2);
            norm += f64::from(w).powi(2);
        }
    }
    if norm == 0.0 { 0.0 } else { (error / norm).sqrt() }
}

fn write_words(out: &mut dyn Write, words: &[u32]) -> std::io::Result<()> {
    let mut buffer = Vec::with_capacity(1 << 16);
    words.chunks(1 << 14).try_for_each(|chunk| {
        buffer.clear();
        buffer.extend(chunk.iter().flat_map(|word| word.to_le_bytes()));
        out.write_all(&buffer)
    })
}
