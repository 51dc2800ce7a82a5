//! What stands for a GPU in a build without one.

use awqua::{Error, ErrorKind};
use awqua_quantizer::device::Accelerator;

use crate::options::BackendArg;
use crate::output::Outcome;

/// Refuses to open one that was asked for by name.
pub fn open(backend: BackendArg, device: Option<&str>) -> Outcome<Option<Accelerator>> {
    match backend == BackendArg::Wgpu || device.is_some() {
        true => Err(Error::new(ErrorKind::NoDevice, "this build of awqua has no GPU backend").into()),
        false => Ok(None),
    }
}
