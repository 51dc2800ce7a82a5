//! `awqua inspect`: what is in a checkpoint.

use std::path::PathBuf;

use awqua::checkpoint::{Checkpoint, inspect};

use crate::output::{self, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &Args) -> Outcome {
    let checkpoint = Checkpoint::open(&args.dir)?;
    let found = inspect(&checkpoint)?;
    if args.json {
        return output::json(&found);
    }
    let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
    output::line(&format!("architecture  {}", text(found.architecture.clone())))?;
    output::line(&format!("dialect       {}", found.dialect.unwrap_or("not quantized")))?;
    if let Some(writer) = &found.writer {
        output::line(&format!("writer        {writer}"))?;
    }
    output::line(&format!("bits          {}", text(found.bits.map(|b| b.to_string()))))?;
    output::line(&format!("group size    {}", text(found.group_size.map(|g| g.to_string()))))?;
    output::line(&format!("on disk       {}", output::bytes(found.bytes_on_disk)))?;
    output::line(&format!("on a device   {} (weights, without KV cache)", output::bytes(found.device_bytes)))?;
    output::line(&format!("tensors       {}", found.tensors.len()))?;
    for tensor in &found.tensors {
        let shape: Vec<_> = tensor.shape.iter().map(ToString::to_string).collect();
        let bits = tensor.bits.map(|bits| format!("  {bits} bits")).unwrap_or_default();
        output::line(&format!(
            "  {:<56} {:<5} {:<16} {:>10}{bits}",
            tensor.name,
            tensor.dtype,
            shape.join(" x "),
            output::bytes(tensor.bytes)
        ))?;
    }
    for sentence in &found.unusual {
        output::line(&format!("unusual: {sentence}"))?;
    }
    if !found.unquantized_linears.is_empty() {
        output::line(&format!("linears that are not quantized: {}", found.unquantized_linears.join(", ")))?;
    }
    Ok(())
}
