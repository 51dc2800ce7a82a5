//! `awqua quantize`: floating point in, packed codes out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use awqua::{Error, ErrorKind};
use awqua_quantizer::calibration::Calibration;
use awqua_quantizer::device::Compute;
use awqua_quantizer::method::Method;
use awqua_quantizer::mixed::{self, Allocation, Granularity, Sensitivity, Unit};
use awqua_quantizer::plot::{Chart, Mark, Series};
use awqua_quantizer::quantize::{self, Format, GroupSize, QuantizeOptions, QuantizeReport};
use awqua_quantizer::rtn::Report;
use awqua_quantizer::{RtnOptions, quantize_rtn};

use super::calibration::CalibrationArgs;
use crate::options::{ComputeArgs, note_device};
use crate::output::{self, Failure, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder in f16, bf16 or f32
    dir: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// How codes are chosen
    #[arg(long, value_enum, default_value_t = MethodArg::AwqGptq)]
    method: MethodArg,
    /// Bits of a code
    #[arg(long, value_name = "2|3|4|5|6|8", default_value_t = 4)]
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
    #[command(flatten)]
    target: TargetArgs,
    /// Calibrate every block with what the exact model puts out instead of the blocks packed before it
    #[arg(long)]
    no_propagate: bool,
    /// Seed of the random numbers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    #[command(flatten)]
    compute: ComputeArgs,
    /// JSON that replaces the parts of the method, for experiments
    #[arg(long, value_name = "JSON", hide = true)]
    recipe: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
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
    /// awq-gptq, then rounding learned block by block; slow
    Learned,
    /// awq-gptq with weights corrected for what earlier rounding did to their inputs; for 2 bits
    Qep,
    /// qep, then scales and norms trained end to end; very slow
    Tuned,
    /// awq, then scales and norms trained end to end in one pass; slow
    AwqTuned,
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

/// Bits per module under a budget.
#[derive(clap::Args)]
struct TargetArgs {
    /// Choose the bits of every module (those of --bits that the dialect has, or none) so that the weight files have at most this size, e.g. 320MB
    #[arg(long, value_name = "SIZE", value_parser = size, conflicts_with = "target_bits")]
    target_size: Option<u64>,
    /// Choose the bits of every module so that a weight has this many on average, scales and zero points not counted
    #[arg(long, value_name = "BITS")]
    target_bits: Option<f64>,
    /// Choose for every module alone; vLLM, which fuses q, k and v as well as gate and up, cannot load the result
    #[arg(long)]
    per_module: bool,
    /// JSON file that keeps what rounding each module costs, for further targets
    #[arg(long, value_name = "FILE")]
    sensitivity: Option<PathBuf>,
    /// Write the predicted loss by size as a plot, an SVG file
    #[arg(long, value_name = "FILE")]
    curve: Option<PathBuf>,
}

fn size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let factor = match unit.trim() {
        "" | "B" => 1.0,
        "kB" | "KB" => 1e3,
        "MB" => 1e6,
        "GB" => 1e9,
        "KiB" => 1024.0,
        "MiB" => 1024.0 * 1024.0,
        "GiB" => 1024.0 * 1024.0 * 1024.0,
        _ => return Err(format!("`{unit}` is none of B, kB, MB, GB, KiB, MiB, GiB")),
    };
    match number.parse::<f64>() {
        Ok(number) if number > 0.0 => Ok((number * factor) as u64),
        _ => Err(format!("`{text}` is not a size like 320MB")),
    }
}

/// Means that the curve is shown at.
const CURVE: [f64; 13] = [2.0, 2.25, 2.5, 2.75, 3.0, 3.25, 3.5, 3.75, 4.0, 4.5, 5.0, 6.0, 8.0];

/// Chooses the bits of every module, if a target was given, and says what they are expected to cost.
fn choose_bits(
    args: &Args,
    calibration: &Calibration,
    options: &mut QuantizeOptions,
    compute: &Compute,
) -> Outcome<Option<Allocation>> {
    let target = &args.target;
    if target.target_size.is_none() && target.target_bits.is_none() {
        return Ok(None);
    }
    let sensitivity = sensitivity(args, calibration, options, compute)?;
    let widths = widths(options.format);
    // Any width will do here: what is asked are sizes.
    let plan = quantize::plan(&args.dir, calibration, options, compute)?;
    let mut sizes = BTreeMap::new();
    for unit in &sensitivity.units {
        for &bits in &widths {
            let bytes = unit.modules.iter().map(|name| plan.module_bytes(name, bits)).sum::<Result<u64, Error>>()?;
            sizes.insert((unit.modules[0].clone(), bits), bytes as f64);
        }
    }
    let cost = |unit: &Unit, bits: u32| sizes.get(&(unit.modules[0].clone(), bits)).copied().unwrap_or(0.0);
    let packed: f64 = sensitivity.units.iter().map(|unit| cost(unit, options.bits)).sum();
    let fixed = plan.packed_bytes()? as f64 - packed;
    let total = |allocation: &Allocation| {
        let bits = |unit: &Unit| allocation.bits_of[&unit.modules[0]];
        fixed + sensitivity.units.iter().map(|unit| cost(unit, bits(unit))).sum::<f64>()
    };
    let chosen = match (target.target_size, target.target_bits) {
        (Some(size), _) => {
            // Names of more tensors make the header a little longer than the one that was counted.
            let slack = 4096.0 + 200.0 * sensitivity.units.len() as f64;
            sensitivity.allocate(size as f64 - fixed - slack, &widths, &cost).map_err(|_| {
                let least = fixed + slack + sensitivity.units.iter().map(|u| cost(u, widths[0])).sum::<f64>();
                let message = format!(
                    "{} is less than the model takes with {} bits everywhere, {}",
                    output::bytes(size),
                    widths[0],
                    output::bytes(least as u64)
                );
                Error::new(ErrorKind::InvalidInput, message).in_file(&args.dir)
            })?
        }
        (None, bits) => sensitivity.for_mean_bits(bits.unwrap_or_default(), &widths)?,
    };
    let mut points = Vec::new();
    for bits in CURVE.into_iter().filter(|&bits| bits >= f64::from(widths[0])) {
        let allocation = sensitivity.for_mean_bits(bits, &widths)?;
        points.push((total(&allocation) / 1e6, allocation.predicted_loss));
        if !args.json {
            let (size, loss) = points[points.len() - 1];
            output::note(&format!("  {bits:.2} bits: {size:.1} MB, predicted KL {loss:.4}"));
        }
    }
    if let Some(file) = &target.curve {
        let own = vec![(total(&chosen) / 1e6, chosen.predicted_loss)];
        let series = |name: &str, points| Series { name: name.into(), points };
        let chart = Chart {
            title: "What the size costs".into(),
            x_label: "weight files, MB".into(),
            y_label: "predicted KL, nats a token".into(),
            log_y: true,
            mark: Mark::Line,
            series: vec![series("mixed", points), series("chosen", own)],
        };
        std::fs::write(file, chart.svg()).map_err(|e| Error::io(file, &e))?;
    }
    if !args.json {
        let weights: u64 = sensitivity.units.iter().map(|unit| unit.weights).sum();
        let packed = 8.0 * (total(&chosen) - fixed) / weights as f64;
        output::note(&format!(
            "chose {:.3} bits a weight, {packed:.3} with scales and zero points, {:.1} MB, predicted KL {:.4}",
            chosen.mean_bits,
            total(&chosen) / 1e6,
            chosen.predicted_loss
        ));
    }
    options.bits_of.clone_from(&chosen.bits_of);
    Ok(Some(chosen))
}

/// Bits that modules of a dialect may have; 16 leaves a module as it is.
fn widths(format: Format) -> Vec<u32> {
    mixed::WIDTHS.into_iter().filter(|&bits| bits == 16 || format.holds(bits)).collect()
}

/// Measures what rounding costs, or takes it from the file that an earlier run wrote for the same question.
fn sensitivity(
    args: &Args,
    calibration: &Calibration,
    options: &QuantizeOptions,
    compute: &Compute,
) -> Outcome<Sensitivity> {
    let granularity = if args.target.per_module { Granularity::Module } else { Granularity::Fused };
    if let Some(file) = &args.target.sensitivity
        && let Ok(bytes) = std::fs::read(file)
    {
        let known = Sensitivity::from_json(&bytes, &args.dir, calibration, options, granularity);
        return Ok(known.map_err(|error| error.in_file(file))?);
    }
    let bar = output::progress("measuring", output::Unit::Blocks);
    let measured =
        mixed::measure(&args.dir, calibration, options, granularity, compute.clone(), &mut |done, total| {
            bar.set_length(total as u64);
            bar.set_position(done as u64);
            Ok(())
        })?;
    bar.finish_and_clear();
    if let Some(file) = &args.target.sensitivity {
        let text = serde_json::to_string(&measured).map_err(std::io::Error::from)?;
        std::fs::write(file, text).map_err(|e| Error::io(file, &e))?;
    }
    Ok(measured)
}

pub fn run(args: &Args) -> Outcome {
    let method = match args.method {
        MethodArg::Rtn => Method::Rtn,
        MethodArg::Awq => Method::Awq,
        MethodArg::Gptq => Method::Gptq,
        MethodArg::AwqGptq => Method::AwqGptq,
        MethodArg::Learned => Method::Learned,
        MethodArg::Qep => Method::Qep,
        MethodArg::Tuned => Method::Tuned,
        MethodArg::AwqTuned => Method::AwqTuned,
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
    let targeted = args.target.target_size.is_some() || args.target.target_bits.is_some();
    if targeted {
        if args.format.is_none() {
            options.format = Format::PackQuantized;
        }
        let bits = args.target.target_bits.map_or(args.bits, |bits| bits.ceil() as u32);
        let wide = widths(options.format).into_iter().find(|&width| width >= bits);
        options.bits = wide.unwrap_or(8).min(8);
    }
    let calibration = match method {
        Method::Rtn if options.recipe.is_none() && !targeted => Calibration::none(),
        _ => args.calibration.load(&args.dir)?,
    };
    let plain = matches!(method, Method::Rtn) && options.recipe.is_none() && !targeted;
    if plain && options.format == Format::AwqGemm && !args.symmetric && options.group_size != GroupSize::Channel {
        return round_to_nearest(args);
    }
    let compute = args.compute.compute()?;
    let allocation = choose_bits(args, &calibration, &mut options, &compute)?;
    if !args.json {
        let needed = quantize::plan(&args.dir, &calibration, &options, &compute)?.peak_memory(&calibration);
        output::note(&format!(
            "{} calibration tokens, at most {} of memory besides the mapped source",
            calibration.tokens(),
            output::bytes(needed)
        ));
    }
    let report = with_progress(&args.dir, &args.out, &calibration, &options, &compute)?;
    if !args.json {
        note_device(&compute);
    }
    if args.json {
        return output::json(&Printed { report: &report, allocation });
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

#[derive(serde::Serialize)]
struct Printed<'a> {
    #[serde(flatten)]
    report: &'a QuantizeReport,
    /// Where bits were chosen for a target.
    #[serde(skip_serializing_if = "Option::is_none")]
    allocation: Option<Allocation>,
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
    let bar = output::progress("packing", output::Unit::Bytes);
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
    compute: &Compute,
) -> Outcome<QuantizeReport> {
    let bar = output::progress("quantizing", output::Unit::Blocks);
    let report = quantize::quantize(source, out, calibration, options, compute.clone(), &mut |p| {
        bar.set_length(p.total as u64);
        bar.set_position(p.done as u64);
        Ok(())
    });
    bar.finish_and_clear();
    Ok(report?)
}
