//! `awqua synth`: a checkpoint of a real shape with random weights.

use std::path::PathBuf;

use awqua_quantizer::synth::{Shape, Weights, synthesize};

use crate::output::{self, Outcome, Unit};

#[derive(clap::Args)]
pub struct Args {
    /// Folder to write; must not exist or be empty
    #[arg(short, long, value_name = "DIR")]
    out: PathBuf,
    /// Sizes
    #[arg(long, value_enum)]
    shape: Size,
    /// How the weights are stored
    #[arg(long, value_enum, default_value_t = WeightsArg::AwqGemm)]
    weights: WeightsArg,
    /// Layers, if not those of the shape
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    layers: Option<u32>,
    /// The same seed gives the same bytes
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum Size {
    /// Llama-3.2-1B
    #[value(name = "1b")]
    B1,
    /// Llama-2-7B
    #[value(name = "7b")]
    B7,
    /// Llama-3-8B
    #[value(name = "8b")]
    B8,
    /// Mixtral-8x7B
    Mixtral,
}

#[derive(clap::ValueEnum, Debug, Clone, Copy)]
enum WeightsArg {
    /// AutoAWQ `gemm`, 4 bits
    AwqGemm,
    /// Half precision, to quantize
    F16,
}

pub fn run(args: &Args) -> Outcome {
    let mut shape = match args.shape {
        Size::B1 => Shape::B1,
        Size::B7 => Shape::B7,
        Size::B8 => Shape::B8,
        Size::Mixtral => Shape::MIXTRAL,
    };
    shape.layers = args.layers.map_or(shape.layers, |layers| layers as usize);
    let weights = match args.weights {
        WeightsArg::AwqGemm => Weights::AwqGemm,
        WeightsArg::F16 => Weights::F16,
    };
    let bar = output::progress("writing", Unit::Bytes);
    let result = synthesize(&args.out, &shape, weights, args.seed, &mut |done, total| {
        bar.set_length(total);
        bar.set_position(done);
        Ok(())
    });
    bar.finish_and_clear();
    result?;
    output::line(&format!("{}: {} layers of random weights", args.out.display(), shape.layers))
}
