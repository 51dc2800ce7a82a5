//! A GPU for quantizing.

use awqua::backend::wgpu::{DeviceChoice, WgpuOptions, adapters, products};
use awqua_quantizer::device::Accelerator;

use crate::options::BackendArg;
use crate::output::{self, Outcome};

/// The device that was asked for. Of its own accord only a dedicated one is taken: others share the processor's memory
/// and power, and gain too little.
pub fn open(backend: BackendArg, device: Option<&str>) -> Outcome<Option<Accelerator>> {
    let dedicated = || adapters().iter().any(|adapter| adapter.kind == "discrete");
    if backend == BackendArg::Cpu || (backend == BackendArg::Auto && device.is_none() && !dedicated()) {
        return Ok(None);
    }
    let choice = device.map_or(DeviceChoice::Best, |name| DeviceChoice::Named(name.to_owned()));
    match products(&WgpuOptions { device: choice, ..Default::default() }) {
        Ok(products) => Ok(Some(Accelerator::new(products))),
        Err(error) if backend == BackendArg::Auto && device.is_none() => {
            output::note(&format!("without the GPU: {error}"));
            Ok(None)
        }
        Err(error) => Err(error.into()),
    }
}
