//! `awqua tune`: finds the fastest kernels for this adapter, which later runs use.

use std::path::PathBuf;

use awqua::backend::wgpu::{self, Candidate, DeviceChoice, MatrixShape, WgpuOptions};
use awqua::{BackendChoice, LoadOptions};
use serde::Serialize;

use crate::cache;
use crate::output::{self, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file whose matrices are tuned for [default: those of common models]
    dir: Option<PathBuf>,
    /// Use the first adapter whose name contains this
    #[arg(long, value_name = "SUBSTRING")]
    device: Option<String>,
    /// Use only the GPU kernels that run everywhere: no f16 arithmetic, no subgroups
    #[arg(long)]
    portable_kernels: bool,
    /// Keep nothing
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Report {
    device: String,
    /// Where the choices are kept.
    file: Option<PathBuf>,
    candidates: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    kernel: String,
    n: u32,
    k: u32,
    group_size: u32,
    rows: u32,
    /// Median device time of one dispatch.
    seconds: Option<f64>,
    /// Why the candidate is out.
    #[serde(skip_serializing_if = "Option::is_none")]
    refused: Option<String>,
    bytes: u64,
    usual: bool,
    chosen: bool,
}

pub fn run(args: &Args) -> Outcome {
    let options = WgpuOptions {
        device: args.device.clone().map_or(DeviceChoice::Best, DeviceChoice::Named),
        force_f32: args.portable_kernels,
        force_no_subgroup: args.portable_kernels,
        ..Default::default()
    };
    let shapes = match &args.dir {
        Some(dir) => model_shapes(args, dir)?,
        None => wgpu::usual_shapes(&options)?,
    };
    let saved = cache::tuning();
    let mut rows: Vec<Row> = Vec::new();
    if !args.json {
        output::line(&format!("{:<31} {:>6} {:>6} {:>5} {:>10} {:>8}", "kernel", "N", "K", "rows", "us", "GB/s"))?;
    }
    let mut printed = Ok(());
    let tuned = wgpu::tune(&options, &shapes, saved.as_deref().map(Vec::as_slice), &mut |candidates| {
        let found: Vec<Row> = candidates.iter().map(Row::of).collect();
        if !args.json && printed.is_ok() {
            printed = found.iter().try_for_each(Row::print);
        }
        rows.extend(found);
    })?;
    printed?;
    let file = match args.dry_run {
        true => None,
        false => Some(cache::keep_tuning(&tuned.saved)?),
    };
    if args.json {
        return output::json(&Report { device: tuned.device, file, candidates: rows });
    }
    output::line(&format!("{}: * is chosen, - is what runs untuned", tuned.device))?;
    match file {
        Some(file) => output::line(&format!("kept in {}", file.display())),
        None => Ok(()),
    }
}

/// Those of the packed matrices of a model.
fn model_shapes(args: &Args, dir: &std::path::Path) -> Outcome<Vec<MatrixShape>> {
    let options = LoadOptions {
        backend: BackendChoice::Wgpu,
        device: args.device.clone(),
        portable_kernels: args.portable_kernels,
        ..Default::default()
    };
    Ok(wgpu::shapes_of(&*awqua::Model::open(dir, &options)?)?)
}

impl Row {
    fn of(candidate: &Candidate) -> Self {
        let MatrixShape { n, k, group_size } = candidate.shape;
        Self {
            kernel: candidate.kernel.clone(),
            n,
            k,
            group_size,
            rows: candidate.rows,
            seconds: candidate.seconds.as_ref().ok().copied(),
            refused: candidate.seconds.as_ref().err().cloned(),
            bytes: candidate.bytes,
            usual: candidate.is_usual,
            chosen: candidate.is_chosen,
        }
    }

    fn print(&self) -> Outcome {
        let mark = |is: bool, mark: &'static str| if is { mark } else { "" };
        let marks = format!("{}{}", mark(self.usual, " -"), mark(self.chosen, " *"));
        let Self { kernel, n, k, rows, .. } = self;
        match (self.seconds, &self.refused) {
            (Some(s), _) => {
                let rate = self.bytes as f64 / s / 1e9;
                output::line(&format!("{kernel:<31} {n:>6} {k:>6} {rows:>5} {:>10.2} {rate:>8.0}{marks}", s * 1e6))
            }
            (None, reason) => {
                let reason = reason.as_deref().unwrap_or_default();
                output::line(&format!("{kernel:<31} {n:>6} {k:>6} {rows:>5} refused: {reason}"))
            }
        }
    }
}
