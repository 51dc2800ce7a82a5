//! `awqua chat`: a conversation on the terminal.

use std::io::BufRead;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use awqua::session::chat::ChatMessage;
use awqua::{ErrorKind, GenerateOptions, Model, Session};

use super::run::stream;
use crate::options::{DeviceArgs, SamplingArgs};
use crate::output::{self, Failure, Outcome};

/// Tokens of the context kept free for an answer; older turns are forgotten before it shrinks below.
const ROOM: usize = 256;

#[derive(clap::Args)]
pub struct Args {
    /// Checkpoint folder or GGUF file
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
        output::note("(/reset starts over, Ctrl-C stops an answer, /exit or Ctrl-D ends)");
        let answering = self.stop_on_interrupt()?;
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
                    self.options.cancel.reset();
                    answering.store(true, Ordering::Release);
                    let answer = self.answer(text);
                    answering.store(false, Ordering::Release);
                    match answer {
                        Ok(_) => output::line("")?,
                        Err(Failure::Library(e)) if may_go_on(e.kind()) => {
                            // The question stays unanswered and is not part of the conversation.
                            self.history.pop();
                            output::note(&format!("({e})"));
                        }
                        Err(e) => return Err(e),
                    }
                }
            }
        }
    }

    /// Makes Ctrl-C stop the answer while the returned flag is set, and end the program otherwise.
    fn stop_on_interrupt(&self) -> Outcome<Arc<AtomicBool>> {
        let answering = Arc::new(AtomicBool::new(false));
        let (flag, cancel) = (Arc::clone(&answering), self.options.cancel.clone());
        ctrlc::set_handler(move || match flag.load(Ordering::Acquire) {
            true => cancel.cancel(),
            false => std::process::exit(130),
        })
        .map_err(std::io::Error::other)?;
        Ok(answering)
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

/// Whether a conversation can continue after this failure of one turn.
fn may_go_on(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::Cancelled | ErrorKind::ContextFull | ErrorKind::Template | ErrorKind::Tokenizer)
}
