//! `awqua chat`: a conversation on the terminal.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;

use awqua::session::chat::ChatMessage;
use awqua::{GenerateOptions, Model, Session};

use super::run::stream;
use crate::options::{DeviceArgs, SamplingArgs};
use crate::output::{self, Outcome};

/// Tokens of the context kept free for an answer; older turns are forgotten before it shrinks below.
const ROOM: usize = 256;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder
    dir: PathBuf,
    /// System message
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,
    /// Most new tokens an answer
    #[arg(short = 'n', long = "max-tokens", value_name = "N", default_value_t = 1024)]
    max_tokens: usize,
    #[command(flatten)]
    sampling: SamplingArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Outcome {
    let model = args.device.open(&args.dir)?;
    let session = args.device.session(&model, 0)?;
    let options = GenerateOptions {
        max_tokens: args.max_tokens,
        sampling: args.sampling.sampling(&model)?,
        seed: args.sampling.seed,
        ..Default::default()
    };
    let history = args.system.iter().map(|s| ChatMessage::new("system", s)).collect();
    Conversation { model, session, options, history }.talk()
}

/// A conversation in progress.
pub struct Conversation {
    pub model: Arc<Model>,
    pub session: Session,
    pub options: GenerateOptions,
    pub history: Vec<ChatMessage>,
}

impl Conversation {
    /// Reads lines until the input ends or says `/exit`.
    pub fn talk(mut self) -> Outcome {
        output::note("(/reset starts over, /exit or Ctrl-D ends)");
        let system = self.history.iter().take_while(|m| m.role == "system").count();
        let mut lines = std::io::stdin().lock().lines();
        loop {
            output::write("> ")?;
            let Some(line) = lines.next().transpose()? else {
                return output::line("");
            };
            match line.trim() {
                "" => {}
                "/exit" | "/quit" => return Ok(()),
                "/reset" => {
                    self.history.truncate(system);
                    self.session.reset();
                }
                text => {
                    self.answer(text)?;
                    output::line("")?;
                }
            }
        }
    }

    /// Answers one turn, streaming, and remembers both sides.
    pub fn answer(&mut self, text: &str) -> Outcome<awqua::Generation> {
        self.history.push(ChatMessage::new("user", text));
        let ids = self.prompt()?;
        let generation = stream(&mut self.session, &ids, &self.options)?;
        self.history.push(ChatMessage::new("assistant", generation.text.clone()));
        Ok(generation)
    }

    /// Ids of the conversation so far. The unchanged beginning is reused from the cache by the session.
    fn prompt(&mut self) -> Outcome<Vec<u32>> {
        let room = ROOM.min(self.session.context() as usize / 4);
        loop {
            let tokenizer = self.model.tokenizer()?;
            let ids = match self.model.chat_template() {
                Some(template) => tokenizer.encode(&template.render_messages(&self.history, true)?, false)?,
                None => {
                    let text: Vec<_> = self.history.iter().map(|m| m.content.as_str()).collect();
                    tokenizer.encode(&text.join("\n"), true)?
                }
            };
            let first = self.history.iter().take_while(|m| m.role == "system").count();
            // The oldest question and answer go first; the last question stays even if it is too long.
            if ids.len() + room <= self.session.context() as usize || self.history.len() < first + 3 {
                return Ok(ids);
            }
            self.history.drain(first..first + 2);
        }
    }
}
