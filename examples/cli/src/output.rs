//! How the command speaks: results on standard output, everything else on standard error.

use std::io::{IsTerminal, Write};

use awqua::ErrorKind;
use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde::Serialize;

/// Why a subcommand ends early.
#[derive(Debug)]
pub enum Failure {
    /// The library refused or failed.
    Library(awqua::Error),
    /// Standard output or an own file can't be used.
    Output(std::io::Error),
    /// Arguments that parse but make no sense together.
    Usage(String),
    /// Nothing failed, but the answer is no (`verify`); already printed.
    Negative,
}

impl From<awqua::Error> for Failure {
    fn from(e: awqua::Error) -> Self {
        Self::Library(e)
    }
}

impl From<std::io::Error> for Failure {
    fn from(e: std::io::Error) -> Self {
        Self::Output(e)
    }
}

impl Failure {
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Output(_) | Self::Negative => 1,
            Self::Usage(_) => 2,
            Self::Library(e) => match e.kind() {
                ErrorKind::NoDevice | ErrorKind::Device | ErrorKind::DeviceLost | ErrorKind::OutOfMemory => 3,
                ErrorKind::Io
                | ErrorKind::InvalidFile
                | ErrorKind::InvalidConfig
                | ErrorKind::InvalidTensor
                | ErrorKind::Unsupported
                | ErrorKind::Tokenizer => 4,
                _ => 1,
            },
        }
    }
}

/// Result of a subcommand.
pub type Outcome<T = ()> = Result<T, Failure>;

/// Prints a failure as one line, or as one JSON object.
pub fn report(failure: &Failure, json: bool) {
    #[derive(Serialize)]
    struct Report<'a> {
        error: Body<'a>,
    }
    #[derive(Serialize)]
    struct Body<'a> {
        kind: &'a str,
        message: String,
        file: Option<String>,
        tensor: Option<&'a str>,
    }
    let body = match failure {
        Failure::Negative => return,
        Failure::Library(e) => Body {
            kind: e.kind().name(),
            message: e.message().to_owned(),
            file: e.file().map(|f| f.display().to_string()),
            tensor: e.tensor(),
        },
        Failure::Output(e) => Body { kind: "io", message: e.to_string(), file: None, tensor: None },
        Failure::Usage(message) => Body { kind: "usage", message: message.clone(), file: None, tensor: None },
    };
    let line = match failure {
        Failure::Library(e) => format!("error: {e}"),
        _ => format!("error: {}", body.message),
    };
    let line = if json { serde_json::to_string(&Report { error: body }).unwrap_or(line) } else { line };
    note(&line);
}

/// A line for people, on standard error. A closed standard error is nobody's loss.
pub fn note(line: &str) {
    let _ = writeln!(std::io::stderr().lock(), "{line}");
}

/// Writes `text` to standard output at once.
pub fn write(text: &str) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()
}

/// Writes a line to standard output.
pub fn line(text: &str) -> Outcome {
    write(&format!("{text}\n")).map_err(Failure::from)
}

/// Writes a value as one line of JSON.
pub fn json(value: &impl Serialize) -> Outcome {
    let text = serde_json::to_string(value).map_err(std::io::Error::from)?;
    line(&text)
}

/// A progress bar on standard error, shown on a terminal only.
pub fn progress(message: &str, unit: Unit) -> ProgressBar {
    let target =
        if std::io::stderr().is_terminal() { ProgressDrawTarget::stderr() } else { ProgressDrawTarget::hidden() };
    let bar = ProgressBar::with_draw_target(Some(0), target);
    let template = match unit {
        Unit::Parts => "{msg} [{bar:40}] {percent}%",
        Unit::Blocks => "{msg} [{bar:40}] {pos}/{len} blocks {eta}",
        Unit::Bytes => "{msg} [{bar:40}] {bytes}/{total_bytes} {eta}",
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style.progress_chars("=> "));
    }
    bar.set_message(message.to_owned());
    bar
}

/// What a progress bar counts.
pub enum Unit {
    Parts,
    Blocks,
    Bytes,
}

/// Bytes for people.
pub fn bytes(n: u64) -> String {
    match n {
        0..10_000 => format!("{n} B"),
        10_000..10_000_000 => format!("{:.1} kB", n as f64 / 1e3),
        10_000_000..10_000_000_000 => format!("{:.1} MB", n as f64 / 1e6),
        _ => format!("{:.2} GB", n as f64 / 1e9),
    }
}
