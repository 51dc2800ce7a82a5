//! `awqua logits`: the numbers before any sampling.

use std::path::PathBuf;

use awqua::CancelToken;
use serde::Serialize;

use crate::options::{DeviceArgs, Ids};
use crate::output::{self, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Token ids
    #[arg(long, value_name = "1,2,3")]
    ids: Ids,
    /// One row of logits a position instead of the last position's
    #[arg(long)]
    all: bool,
    /// Print {"logits": [vocab_size numbers]}, or a list of such lists with --all
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

#[derive(Serialize)]
struct Logits<T> {
    logits: T,
}

pub fn run(args: &Args) -> Outcome {
    let model = args.device.open(&args.dir)?;
    let ids = &args.ids.0;
    let mut session = args.device.session(&model, ids.len())?;
    let cancel = CancelToken::default();
    let mut rows: Vec<Vec<f32>> = Vec::new();
    if args.all {
        session.score(ids, &cancel, &mut |_, logits| rows.push(logits.to_vec()))?;
    } else {
        session.set_prompt(ids, &cancel)?;
        rows.push(session.logits()?.to_vec());
    }
    if args.json {
        return match args.all {
            true => output::json(&Logits { logits: rows }),
            false => output::json(&Logits { logits: &rows[0] }),
        };
    }
    for (position, row) in rows.iter().enumerate() {
        let mut order: Vec<usize> = (0..row.len()).collect();
        order.sort_by(|&a, &b| row[b].total_cmp(&row[a]));
        let position = if args.all { position } else { ids.len() - 1 };
        output::line(&format!("position {position}"))?;
        for &id in order.iter().take(10) {
            let text = model.tokenizer().and_then(|t| t.decode(&[id as u32], false)).unwrap_or_default();
            output::line(&format!("  {id:>7} {:>12.6}  {text:?}", row[id]))?;
        }
    }
    Ok(())
}
