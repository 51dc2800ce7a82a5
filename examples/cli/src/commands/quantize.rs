//! `awqua quantize`: floating point in, packed 4 bits out.

use std::path::{Path, PathBuf};

use awqua_quantizer::rtn::Report;
use awqua_quantizer::{RtnOptions, quantize_rtn};

use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder in f16, bf16 or f32
    dir: PathBuf,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// How codes are chosen
    #[arg(long, value_enum, default_value_t = Method::Rtn)]
    method: Method,
    /// Input features that share a scale [default: the largest of 128, 64, 32 that divides all]
    #[arg(long, value_name = "N")]
    group_size: Option<usize>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum Method {
    /// Round to nearest, without calibration data
    Rtn,
}

pub fn run(args: &Args) -> Outcome {
    let Method::Rtn = args.method;
    let options = RtnOptions { group_size: args.group_size, ..Default::default() };
    let report = with_progress(&args.dir, &args.out, &options)?;
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

/// Quantizes behind a progress bar.
pub fn with_progress(source: &Path, out: &Path, options: &RtnOptions) -> Outcome<Report> {
    let bar = output::progress("packing", Unit::Bytes);
    let report = quantize_rtn(source, out, options, &mut |p| {
        bar.set_length(p.total);
        bar.set_position(p.done);
        Ok(())
    });
    bar.finish_and_clear();
    Ok(report?)
}
