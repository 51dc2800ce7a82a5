//! `awqua tune` in a build without GPU kernels through wgpu.

use crate::output::Outcome;

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

pub fn run(_: &Args) -> Outcome {
    let message = "this build has no kernels to tune: it lacks the feature `wgpu`";
    Err(awqua::Error::new(awqua::ErrorKind::Unsupported, message).into())
}
