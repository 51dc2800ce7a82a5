//! `awqua quantize`: floating point in, packed codes out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, ModelConfig};
use awqua_quantizer::calibration::Calibration;
use awqua_quantizer::math::Threads;
use awqua_quantizer::method::Method;
use awqua_quantizer::quantize::{self, Format, GroupSize, QuantizeOptions, QuantizeReport};
use awqua_quantizer::rtn::Report;
use awqua_quantizer::{RtnOptions, quantize_rtn};

use crate::output::{self, Failure, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder in f16, bf16 or f32
    dir: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// How codes are chosen
    #[arg(long, value_enum, default_value_t = MethodArg::Awq)]
    method: MethodArg,
    /// Bits of a code
    #[arg(long, value_name = "2|3|4|8", default_value_t = 4)]
    bits: u32,
    /// Input features that share a scale, or `channel` for whole rows [default: the largest of 128, 64, 32 that divides all]
    #[arg(long, value_name = "N", value_parser = group_size)]
    group_size: Option<GroupSize>,
    /// Zero points in the middle of the range
    #[arg(long)]
    symmetric: bool,
    /// Dialect to write [default: awq-gemm for 4 bits, else pack-quantized]
    #[arg(long, value_enum)]
    format: Option<FormatArg>,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Calibrate every block with what the exact model puts out instead of the blocks packed before it
    #[arg(long)]
    no_propagate: bool,
    /// Seed of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Threads [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    threads: Option<u16>,
    /// JSON that replaces parts of the method (scale, clip, compensate, learn), for experiments
    #[arg(long, value_name = "JSON", hide = true)]
    recipe: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::Args)]
pub struct CalibrationArgs {
    /// JSON file of token ids to calibrate with: a list of sequences
    #[arg(long, value_name = "FILE")]
    calib_ids: Option<PathBuf>,
    /// Sequences to calibrate with
    #[arg(long, value_name = "N", default_value_t = 32)]
    calib_samples: usize,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 512)]
    calib_length: usize,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum MethodArg {
    /// Round to nearest, without calibration data
    Rtn,
    /// Activation-aware scales and clipping
    Awq,
    /// Error compensation
    Gptq,
    /// Activation-aware scales and clipping, then error compensation
    AwqGptq,
    /// awq-gptq, then rounding learned block by block: best, and slow
    Learned,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum FormatArg {
    /// AutoAWQ `gemm`, 4 bits
    AwqGemm,
    /// compressed-tensors `pack-quantized`
    PackQuantized,
    /// GPTQ version 2
    GptqV2,
}

fn group_size(text: &str) -> Result<GroupSize, String> {
    match text {
        "channel" | "-1" => Ok(GroupSize::Channel),
        _ => text.parse().map(GroupSize::Features).map_err(|_| format!("`{text}` is neither a number nor `channel`")),
    }
}

impl CalibrationArgs {
    /// The calibration tokens for the model in folder `dir`.
    pub fn load(&self, dir: &Path) -> Outcome<Calibration> {
        if let Some(file) = &self.calib_ids {
            let bytes = std::fs::read(file).map_err(|e| Error::io(file, &e))?;
            let sequences: Vec<Vec<u32>> = serde_json::from_slice(&bytes).map_err(|_| {
                Error::new(ErrorKind::InvalidFile, "expected a list of lists of token ids").in_file(file)
            })?;
            let name = file.file_name().unwrap_or_default().to_string_lossy();
            return Ok(Calibration::of_ids(&name, sequences));
        }
        let checkpoint = Checkpoint::open(dir)?;
        let config = ModelConfig::from_json(checkpoint.config()).map_err(|e| e.in_file(dir.join("config.json")))?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint, config.vocab_size)?.ok_or_else(|| {
            Error::new(ErrorKind::Tokenizer, "the folder has no tokenizer.json to encode calibration text with")
                .in_file(dir)
        })?;
        Ok(Calibration::standard(&tokenizer, self.calib_samples, self.calib_length)?)
    }
}

pub fn run(args: &Args) -> Outcome {
    let method = match args.method {
        MethodArg::Rtn => Method::Rtn,
        MethodArg::Awq => Method::Awq,
        MethodArg::Gptq => Method::Gptq,
        MethodArg::AwqGptq => Method::AwqGptq,
        MethodArg::Learned => Method::Learned,
    };
    let mut options = QuantizeOptions::new(method, args.bits);
    if let Some(recipe) = &args.recipe {
        let recipe = serde_json::from_str(recipe).map_err(|e| Failure::Usage(format!("--recipe: {e}")))?;
        options.recipe = Some(recipe);
    }
    options.group_size = args.group_size.unwrap_or_default();
    options.symmetric = args.symmetric;
    options.propagate = !args.no_propagate;
    options.seed = args.seed;
    options.bits_of = BTreeMap::new();
    if let Some(format) = args.format {
        options.format = match format {
            FormatArg::AwqGemm => Format::AwqGemm,
            FormatArg::PackQuantized => Format::PackQuantized,
            FormatArg::GptqV2 => Format::GptqV2,
        };
    }
    let calibration = match method {
        Method::Rtn if options.recipe.is_none() => Calibration::none(),
        _ => args.calibration.load(&args.dir)?,
    };
    let plain = matches!(method, Method::Rtn) && options.recipe.is_none();
    if plain && options.format == Format::AwqGemm && !args.symmetric && options.group_size != GroupSize::Channel {
        return round_to_nearest(args);
    }
    let threads = args.threads.map_or_else(Threads::available, |n| Threads::new(n.into()));
    if !args.json {
        let needed = quantize::plan(&args.dir, &calibration, &options, threads)?.peak_memory(&calibration);
        output::note(&format!(
            "{} calibration tokens, at most {} of memory besides the mapped source",
            calibration.tokens(),
            output::bytes(needed)
        ));
    }
    let report = with_progress(&args.dir, &args.out, &calibration, &options, threads)?;
    if args.json {
        return output::json(&report);
    }
    let linears = || report.blocks.iter().flat_map(|block| &block.linears);
    let worst = linears().map(|linear| linear.relative_error).fold(0.0, f64::max);
    output::line(&format!(
        "{}: {} linears of {:.2} bits a weight, {} -> {}, largest relative error {worst:.4}",
        args.out.display(),
        linears().count(),
        report.bits_per_weight,
        output::bytes(report.source_bytes),
        output::bytes(report.packed_bytes)
    ))
}

/// Packs any architecture's linears without looking at what they compute.
fn round_to_nearest(args: &Args) -> Outcome {
    let group_size = match args.group_size {
        Some(GroupSize::Features(size)) => Some(size),
        _ => None,
    };
    let options = RtnOptions { group_size, ..Default::default() };
    let report = rtn_with_progress(&args.dir, &args.out, &options)?;
    if args.json {
        return output::json(&report);
    }
    let worst = report.packed.iter().map(|m| m.relative_error).fold(0.0, f64::max);
    output::line(&format!(
        "{}: {} linears in groups of {}, {} -> {}, largest relative error {worst:.4}",
        args.out.display(),
        report.packed.len(),
        report.group_size,
        output::bytes(report.source_bytes),
        output::bytes(report.packed_bytes)
    ))
}

/// Rounds to nearest behind a progress bar.
pub fn rtn_with_progress(source: &Path, out: &Path, options: &RtnOptions) -> Outcome<Report> {
    let bar = output::progress("packing", Unit::Bytes);
    let report = quantize_rtn(source, out, options, &mut |p| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        Ok(())
    });
    bar.finish_and_clear();
    Ok(report?)
}

/// Quantizes behind a progress bar.
pub fn with_progress(
    source: &Path,
    out: &Path,
    calibration: &Calibration,
    options: &QuantizeOptions,
    threads: Threads,
) -> Outcome<QuantizeReport> {
    let bar = output::progress("quantizing", Unit::Blocks);
    let report = quantize::quantize(source, out, calibration, options, threads, &mut |p| {
        bar.set_length(p.total as u64);
        bar.set_position(p.done as u64);
        Ok(())
    });
    bar.finish_and_clear();
    Ok(report?)
}
