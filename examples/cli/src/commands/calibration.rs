//! Where calibration tokens come from, and `awqua calib-check`.

use std::path::{Path, PathBuf};

use awqua::checkpoint::Checkpoint;
use awqua::session::chat::ChatTemplate;
use awqua::session::tokenizer::Tokenizer;
use awqua::{Error, ErrorKind, ModelConfig};
use awqua_quantizer::calibration::{self, Calibration, check};

use crate::options::ComputeArgs;
use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct CalibrationArgs {
    /// Text to calibrate with: plain, or .jsonl of texts or of chats, which the model's own template renders
    /// [default: the set that comes with awqua]
    #[arg(long, value_name = "FILE", conflicts_with_all = ["calib_ids", "calib_domain"])]
    calib: Option<PathBuf>,
    /// JSON file of token ids to calibrate with: a list of sequences
    #[arg(long, value_name = "FILE", conflicts_with = "calib_domain")]
    calib_ids: Option<PathBuf>,
    /// Only these parts of awqua's own set, e.g. code-rust,dialogue
    #[arg(long, value_name = "NAMES", value_delimiter = ',')]
    calib_domain: Vec<String>,
    /// Most sequences to calibrate with, spread over all texts
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..))]
    calib_samples: u32,
    /// Tokens of a sequence
    #[arg(long, value_name = "N", default_value_t = 512, value_parser = clap::value_parser!(u32).range(2..))]
    calib_length: u32,
}

impl CalibrationArgs {
    /// The calibration tokens for the model in folder `dir`.
    pub fn load(&self, dir: &Path) -> Outcome<Calibration> {
        if let Some(file) = &self.calib_ids {
            let bytes = std::fs::read(file).map_err(|e| Error::io(file, &e))?;
            let sequences: Vec<Vec<u32>> = serde_json::from_slice(&bytes).map_err(|_| {
                Error::new(ErrorKind::InvalidFile, "expected a list of lists of token ids").in_file(file)
            })?;
            return Ok(Calibration::of_ids(&name(file), sequences));
        }
        let checkpoint = Checkpoint::open(dir)?;
        let config = ModelConfig::from_json(checkpoint.config()).map_err(|e| e.in_file(dir.join("config.json")))?;
        let tokenizer = Tokenizer::from_checkpoint(&checkpoint, config.vocab_size)?.ok_or_else(|| {
            Error::new(ErrorKind::Tokenizer, "the folder has no tokenizer.json to encode calibration text with")
                .in_file(dir)
        })?;
        let (count, length) = (self.calib_samples as usize, self.calib_length as usize);
        match &self.calib {
            Some(file) => {
                let texts = calibration::read_texts(file, ChatTemplate::from_checkpoint(&checkpoint)?.as_ref())?;
                let found = Calibration::of_texts(&name(file), &texts, &tokenizer, count, length);
                Ok(found.map_err(|e| e.in_file(file))?)
            }
            None => Ok(Calibration::standard(&tokenizer, &self.calib_domain, count, length)?),
        }
    }
}

fn name(file: &Path) -> String {
    file.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

#[derive(clap::Args)]
pub struct CheckArgs {
    /// Packed checkpoint folder
    dir: PathBuf,
    #[command(flatten)]
    calibration: CalibrationArgs,
    /// Sites with the largest shift to list
    #[arg(long, value_name = "N", default_value_t = 5)]
    worst: usize,
    #[command(flatten)]
    compute: ComputeArgs,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(args: &CheckArgs) -> Outcome {
    let text = args.calibration.load(&args.dir)?;
    let compute = args.compute.compute()?;
    let bar = output::progress("reading", Unit::Blocks);
    let found = check::check(&args.dir, &text.sequences, compute.clone(), &mut |done, total| {
        bar.set_length(total as u64);
        bar.set_position(done as u64);
        Ok(())
    })?;
    bar.finish_and_clear();
    if args.json {
        return output::json(&found);
    }
    output::line(&format!(
        "`{}` ({} tokens) is {:.2} octaves from the calibration, {:.1} times what two samples of that differ by: {}",
        text.name,
        found.tokens,
        found.distance,
        found.ratio,
        match found.differs {
            true => "warning, the model was calibrated on something else; measure it with `awqua eval`",
            false => "alike",
        }
    ))?;
    for site in found.sites.iter().take(args.worst) {
        output::line(&format!(
            "  layer {} {}: {:.2} octaves, {:.1} times; feature {} is {:.1} times as large",
            site.layer,
            site.site,
            site.distance,
            site.distance / site.own.max(1e-6),
            site.most.0,
            site.most.1
        ))?;
    }
    Ok(())
}
