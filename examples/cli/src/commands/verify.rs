//! `awqua verify`: every check that needs no other program.

use std::path::PathBuf;

use awqua::checkpoint::Checkpoint;
use awqua::model::{Severity, verify};
use serde::Serialize;

use crate::output::{self, Failure, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Print {"ok","findings":[...]}
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let findings = verify(&checkpoint)?;
    let ok = !findings.iter().any(|f| f.severity == Severity::Error);
    if args.json {
        #[derive(Serialize)]
        struct Report<'a> {
            ok: bool,
            findings: &'a [awqua::model::Finding],
        }
        output::json(&Report { ok, findings: &findings })?;
    } else {
        for f in &findings {
            let severity = if f.severity == Severity::Error { "error" } else { "warning" };
            let tensor = f.tensor.as_deref().map(|t| format!("tensor `{t}`: ")).unwrap_or_default();
            output::line(&format!("{severity}: {tensor}{}", f.message))?;
        }
        output::line(&format!("{} tensors, {} findings", checkpoint.tensors().len(), findings.len()))?;
    }
    if ok { Ok(()) } else { Err(Failure::Negative) }
}
