//! `awqua run`: one prompt, one answer.

use std::io::Read;
use std::ops::ControlFlow;
use std::path::PathBuf;

use awqua::session::chat::ChatMessage;
use awqua::{GenerateOptions, Generation, Model};
use serde::Serialize;

use crate::options::{DeviceArgs, Ids, SamplingArgs};
use crate::output::{self, Failure, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
    dir: PathBuf,
    /// Prompt; `-` reads standard input
    #[arg(short, long, value_name = "TEXT", required_unless_present = "ids", conflicts_with = "ids")]
    prompt: Option<String>,
    /// Prompt as token ids
    #[arg(long, value_name = "1,2,3")]
    ids: Option<Ids>,
    /// Continue the prompt as it is, without the chat template
    #[arg(long)]
    raw: bool,
    /// System message of the chat template
    #[arg(long, value_name = "TEXT", conflicts_with_all = ["raw", "ids"])]
    system: Option<String>,
    /// Most new tokens
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 256)]
    max_tokens: usize,
    /// Go on after the model's end-of-turn tokens
    #[arg(long)]
    ignore_eos: bool,
    /// End the answer at this text; can be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// Print {"ids","text","stop",...} when done instead of streaming text
    #[arg(long)]
    pub json: bool,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Outcome {
    let model = args.device.open(&args.dir)?;
    let ids = prompt_ids(args, &model)?;
    let mut session = args.device.session(&model, ids.len().saturating_add(args.max_tokens))?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.sampling(&model)?,
        seed: args.sampling.seed,
        ignore_eos: args.ignore_eos,
        stop: args.stop.clone(),
        ..Default::default()
    };
    if args.json {
        let generation = session.generate(&ids, &options, &mut |_| ControlFlow::Continue(()))?;
        return output::json(&Answer::new(&generation));
    }
    let generation = stream(&mut session, &ids, &options)?;
    // Without a tokenizer the ids are all there is to show.
    let missing = if model.tokenizer().is_err() { join(&generation.ids) } else { String::new() };
    output::line(&missing)
}

/// Generates with the text streamed to standard output.
pub fn stream(session: &mut awqua::Session, ids: &[u32], options: &GenerateOptions) -> Outcome<Generation> {
    let mut broken = None;
    let generation = session.generate(ids, options, &mut |text| match output::write(text) {
        Ok(()) => ControlFlow::Continue(()),
        Err(e) => {
            broken = Some(e);
            ControlFlow::Break(())
        }
    })?;
    match broken {
        Some(e) => Err(e.into()),
        None => Ok(generation),
    }
}

fn join(ids: &[u32]) -> String {
    ids.iter().map(ToString::to_string).collect::<Vec<_>>().join(",")
}

fn prompt_ids(args: &Args, model: &Model) -> Outcome<Vec<u32>> {
    let text = match (&args.ids, args.prompt.as_deref()) {
        (Some(ids), _) => return Ok(ids.0.clone()),
        (None, Some("-")) => {
            let mut text = String::new();
            std::io::stdin().lock().read_to_string(&mut text)?;
            text
        }
        (None, Some(text)) => text.to_owned(),
        (None, None) => return Err(Failure::Usage("give a prompt with -p or --ids".into())),
    };
    let tokenizer = model.tokenizer()?;
    match model.chat_template() {
        Some(template) if !args.raw => {
            let mut messages = Vec::new();
            messages.extend(args.system.as_deref().map(|s| ChatMessage::new("system", s)));
            messages.push(ChatMessage::new("user", text));
            Ok(tokenizer.encode(&template.render_messages(&messages, true)?, false)?)
        }
        None if args.system.is_some() => {
            Err(Failure::Usage("--system needs a chat template, and this model has none".into()))
        }
        _ => Ok(tokenizer.encode(&text, true)?),
    }
}

#[derive(Serialize)]
struct Answer<'a> {
    ids: &'a [u32],
    text: &'a str,
    stop: &'a str,
    prefill_tokens: usize,
    prefill_seconds: f64,
    decode_seconds: f64,
    time_to_first_token: f64,
}

impl<'a> Answer<'a> {
    fn new(g: &'a Generation) -> Self {
        Self {
            ids: &g.ids,
            text: &g.text,
            stop: g.stop.name(),
            prefill_tokens: g.prefill_tokens,
            prefill_seconds: g.prefill_seconds,
            decode_seconds: g.decode_seconds,
            time_to_first_token: g.time_to_first_token,
        }
    }
}
