//! The full check of a checkpoint: that every tensor is there, has the shape the model asks for, and holds values that can
//! be computed with.

use std::collections::BTreeMap;

use serde::Serialize;

use super::config::ModelConfig;
use super::head::HeadBits;
use super::{load, weights};
use crate::checkpoint::{Checkpoint, TensorView};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::{self, Dialect, LinearWeight, Part, Quantization, Scheme, part_of};
use crate::session::chat::ChatTemplate;
use crate::session::tokenizer::Tokenizer;
use crate::tensor::{Levels, Weight};

/// One thing that [`verify`] found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Whether the checkpoint can still be used.
    pub severity: Severity,
    /// Stable name of the error kind, see [`crate::ErrorKind::name`].
    pub kind: &'static str,
    /// File it concerns.
    pub file: Option<String>,
    /// Tensor it concerns.
    pub tensor: Option<String>,
    /// What was expected and found.
    pub message: String,
}

/// Weight of a [`Finding`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Unusual, but loads and runs.
    Warning,
    /// Does not load, or computes nonsense.
    Error,
}

/// Reads every tensor and checks what [`Checkpoint::open`] cannot see in the headers: that packed modules are complete and
/// decode, that scales and weights are finite and have the signs their dialect gives them, that descriptions agree with
/// each other, and, if the configuration names an architecture that this build runs, that everything the model needs is
/// there in its shape.
///
/// # Errors
/// Those of reading the quantization configuration; everything found in tensors is a [`Finding`].
pub fn verify(checkpoint: &Checkpoint) -> Result<Vec<Finding>> {
    let quantization = Quantization::of(checkpoint)?;
    let mut findings = Vec::new();
    for name in checkpoint.unlisted() {
        findings.push(warning(checkpoint.get(name)?, "in a shard, but not listed in the index"));
    }
    // Packed modules by name, with the tensor that stands for them in messages.
    let mut modules = BTreeMap::new();
    let mut scales = Agreement::default();
    for tensor in checkpoint.tensors() {
        match part_of(checkpoint, &tensor.name) {
            Some((module, Part::Codes)) => {
                modules.insert(module, tensor);
            }
            Some((_, Part::Scales)) => scales.add(tensor),
            Some(_) => {}
            None => check_dense(tensor, &mut findings),
        }
        tensor.release();
    }
    scales.report(&mut findings);
    let mut centers = Vec::new();
    for (module, codes) in modules {
        match verify_packed(checkpoint, quantization.as_ref(), module, codes) {
            Err(error) => findings.push(finding(&error)),
            Ok((scheme, linear)) => check_values(&scheme, &linear, codes, &mut centers, &mut findings),
        }
        codes.release();
    }
    check_centers(checkpoint, quantization.as_ref(), &centers, &mut findings);
    if let Some(q) = &quantization {
        for tensor in checkpoint.tensors() {
            // A dense linear where the configuration says packed is found by the same question that loading asks.
            let is_matrix = tensor.shape.len() == 2 && tensor.dense_type().is_ok();
            let module = tensor.name.strip_suffix(".weight").filter(|_| is_matrix);
            if let Some(module) = module.filter(|_| part_of(checkpoint, &tensor.name).is_none())
                && let Err(error) = quant::scheme_of_stored(checkpoint, Some(q), module)
            {
                findings.push(finding(&error));
            }
        }
    }
    check_model(checkpoint, &mut findings);
    Ok(findings)
}

fn verify_packed(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    module: &str,
    codes: &TensorView,
) -> Result<(Scheme, LinearWeight)> {
    let scheme = quant::scheme_of_stored(checkpoint, quantization, module)?;
    let shape = scheme.and_then(|scheme| quant::stored_shape(checkpoint, scheme, module));
    let (Some(scheme), Some((n, k))) = (scheme, shape) else {
        return Err(codes.error("packed codes that the configuration does not account for"));
    };
    quant::load_packed(checkpoint, scheme, module, n, k).map(|linear| (scheme, linear))
}

/// Checks the numbers of a module's groups, and the weights they make.
fn check_values(
    scheme: &Scheme,
    linear: &LinearWeight,
    codes: &TensorView,
    centers: &mut Vec<f64>,
    findings: &mut Vec<Finding>,
) {
    let (zero, negative) = scale_signs(&linear.weight);
    if zero != 0 {
        findings.push(warning(codes, format!("{zero} of its groups have the scale zero")));
    }
    // MLX and GGUF choose the sign of a scale so that the largest weight is exact.
    if negative != 0 && !matches!(scheme.dialect, Dialect::Mlx | Dialect::Gguf) {
        findings.push(finding(&codes.error(format!("{negative} of its groups have a negative scale"))));
    }
    if let Some(i) = linear.input.factors.as_ref().and_then(|factors| factors.iter().position(|&f| f <= 0.0)) {
        findings.push(finding(&codes.error(format!("the factor of input {i} is not positive"))));
    }
    let (n, k) = linear.weight.dims();
    let mut row = vec![0.0; k];
    for i in 0..n {
        linear.weight.expand_row(i, &mut row);
        if let Some(column) = row.iter().position(|w| !w.is_finite()) {
            let message = format!("weight {column} of row {i} is {}", row[column]);
            findings.push(finding(&codes.error(message)));
            return;
        }
    }
    centers.extend(center(&linear.weight));
}

/// Groups whose scale is zero, and whose scale is negative.
fn scale_signs(weight: &Weight) -> (usize, usize) {
    let halves = |params: &[u32]| {
        let is_zero = |params: &&u32| **params & 0x7fff == 0;
        let zero = params.iter().filter(is_zero).count();
        (zero, params.iter().filter(|params| !is_zero(params) && **params & 0x8000 != 0).count())
    };
    let count = |scales: &mut dyn Iterator<Item = f32>| {
        scales.fold((0, 0), |(zero, negative), s| (zero + usize::from(s == 0.0), negative + usize::from(s < 0.0)))
    };
    match weight {
        Weight::W4(matrix) => halves(&matrix.group_params),
        Weight::Packed(matrix) => match &matrix.levels {
            Levels::Affine(_, params) => halves(params),
            Levels::AffineWide(_, params) => count(&mut params.iter().map(|[s, _]| *s)),
            Levels::Codebook(_, absmax) => count(&mut absmax.iter().copied()),
        },
        _ => (0, 0),
    }
}

/// Mean square, over rows, of the mean of codes less zero points of a matrix of at most 4 bits, which is near zero for
/// trained weights. Rows are looked at one by one because a wrong offset may differ from row to row.
fn center(weight: &Weight) -> Option<f64> {
    let (n, k) = weight.dims();
    let code = |row: usize, column: usize| match weight {
        Weight::W4(m) => m.code(row, column),
        Weight::Packed(m) => m.code(row, column),
        _ => 0,
    };
    let half = |bits: u32| f64::from(half::f16::from_bits(bits as u16).to_f32());
    let (group_size, zeros): (usize, Vec<f64>) = match weight {
        Weight::W4(m) if !m.offset.is_bias() => {
            (m.group_size, m.group_params.iter().map(|params| half(params >> 16)).collect())
        }
        Weight::Packed(m) if m.bits <= 4 => match &m.levels {
            Levels::Affine(offset, params) if !offset.is_bias() => {
                (m.group_size, params.iter().map(|params| half(params >> 16)).collect())
            }
            _ => return None,
        },
        _ => return None,
    };
    let groups = k.div_ceil(group_size);
    // A sample is as good.
    let rows = (0..n).step_by((n / 64).max(1));
    let count = rows.len() as f64;
    let squares = rows.map(|row| {
        let steps = |column| f64::from(code(row, column)) - zeros[row * groups + column / group_size];
        ((0..k).map(steps).sum::<f64>() / k as f64).powi(2)
    });
    Some(squares.sum::<f64>() / count)
}

/// Zero points of GPTQ files are stored in two ways that differ by one, and only the configuration says which.
fn check_centers(
    checkpoint: &Checkpoint,
    quantization: Option<&Quantization>,
    centers: &[f64],
    findings: &mut Vec<Finding>,
) {
    let gptq = quantization.is_some_and(|q| matches!(q.dialect(), Dialect::Gptq | Dialect::GptqV2));
    let off = (centers.iter().sum::<f64>() / centers.len().max(1) as f64).sqrt();
    // Random rows of 128 weights are a quarter of a step off, wrong zero points at least one.
    if gptq && off > 0.7 {
        let message =
            format!("rows are {off:.2} steps off zero: `checkpoint_format` says the other way of storing zero points");
        let error = Error::new(ErrorKind::InvalidConfig, message).in_file(checkpoint.dir().join("config.json"));
        findings.push(finding(&error));
    }
}

/// The types of tensors that all modules should share.
#[derive(Default)]
struct Agreement<'a> {
    by_type: BTreeMap<(String, String), Vec<&'a TensorView>>,
}

impl<'a> Agreement<'a> {
    fn add(&mut self, tensor: &'a TensorView) {
        let suffix = tensor.name.rsplit('.').next().unwrap_or_default().to_owned();
        self.by_type.entry((suffix, tensor.dtype.to_string())).or_default().push(tensor);
    }

    /// Finds the tensors of a type that fewer modules have.
    fn report(self, findings: &mut Vec<Finding>) {
        let mut most: BTreeMap<&str, (&str, usize)> = BTreeMap::new();
        for ((suffix, dtype), tensors) in &self.by_type {
            let entry = most.entry(suffix).or_insert((dtype, 0));
            if tensors.len() > entry.1 {
                *entry = (dtype, tensors.len());
            }
        }
        for ((suffix, dtype), tensors) in &self.by_type {
            let (expected, _) = most[suffix.as_str()];
            // Double quant may be used for some modules only.
            if dtype != expected && suffix != "absmax" {
                for tensor in tensors {
                    let message = format!("expected dtype {expected} as in most modules, found {dtype}");
                    findings.push(finding(&tensor.error(message)));
                }
            }
        }
    }
}

fn check_dense(tensor: &TensorView, findings: &mut Vec<Finding>) {
    let Ok(dtype) = tensor.dense_type() else { return };
    let bytes = match tensor.bytes() {
        Ok(bytes) => bytes,
        Err(error) => return findings.push(finding(&error)),
    };
    // In pieces: a widened embedding of a large model does not have to fit in memory.
    let mut values = vec![0.0; 1 << 16];
    for (i, bytes) in bytes.chunks(dtype.size() << 16).enumerate() {
        let values = &mut values[..bytes.len() / dtype.size()];
        dtype.widen(bytes, values);
        if let Some(at) = values.iter().position(|value| !value.is_finite()) {
            let error = tensor.error(format!("element {} is {}", (i << 16) + at, values[at]));
            findings.push(finding(&error));
            return;
        }
    }
}

/// What a model loader asks for, short of the values.
fn check_model(checkpoint: &Checkpoint, findings: &mut Vec<Finding>) {
    let config = checkpoint.config();
    if ["architectures", "model_type"].iter().all(|key| config.get(key).is_none()) {
        return;
    }
    let config = match ModelConfig::from_json(config) {
        Ok(config) => config,
        Err(error) => {
            let error = error.in_file(checkpoint.dir().join("config.json"));
            let severity = match error.kind() {
                ErrorKind::Unsupported => Severity::Warning,
                _ => Severity::Error,
            };
            return findings.push(Finding { severity, ..finding(&error) });
        }
    };
    let mut add = |error: Error| {
        let new = finding(&error);
        if !findings.iter().any(|known| known.tensor == new.tensor && known.message == new.message) {
            findings.push(new);
        }
    };
    weights::plan(checkpoint, &config, HeadBits::Sixteen).err().into_iter().for_each(&mut add);
    load::configs(checkpoint).err().into_iter().for_each(&mut add);
    Tokenizer::from_checkpoint(checkpoint, config.vocab_size).err().into_iter().for_each(&mut add);
    ChatTemplate::from_checkpoint(checkpoint).err().into_iter().for_each(&mut add);
}

fn finding(error: &Error) -> Finding {
    Finding {
        severity: Severity::Error,
        kind: error.kind().name(),
        file: error.file().map(|file| file.display().to_string()),
        tensor: error.tensor().map(str::to_owned),
        message: error.message().to_owned(),
    }
}

fn warning(tensor: &TensorView, message: impl Into<String>) -> Finding {
    Finding { severity: Severity::Warning, ..finding(&tensor.error(message)) }
}
