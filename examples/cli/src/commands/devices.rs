//! `awqua devices`: what could be run on.

use serde::Serialize;

use crate::output::{self, Outcome};

#[derive(clap::Args)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

#[derive(Serialize)]
struct Devices {
    cpu: Cpu,
    /// Devices of the CUDA backend, none in builds without it.
    cuda: Vec<Cuda>,
    adapters: Vec<Adapter>,
}

#[derive(Serialize)]
struct Cpu {
    device: String,
    variant: String,
}

#[derive(Serialize)]
struct Cuda {
    name: String,
    capability: String,
    multiprocessors: u32,
    memory_bytes: u64,
    /// Kernels the start-up test chose and why, or why there are none.
    variant: String,
}

#[derive(Serialize)]
struct Adapter {
    name: String,
    api: String,
    kind: String,
    driver: String,
    f16: bool,
    subgroup: Option<(u32, u32)>,
    max_buffer_bytes: u64,
    max_binding_bytes: u64,
    workgroup_bytes: u32,
    /// Kernel variant the start-up test chose and why, or why there is none.
    variant: String,
}

pub fn run(args: &Args) -> Outcome {
    let info = awqua::backend::cpu::open().info();
    let devices =
        Devices { cpu: Cpu { device: info.device, variant: info.variant }, cuda: cuda(), adapters: adapters() };
    if args.json {
        return output::json(&devices);
    }
    output::line(&format!("cpu    {}\n       kernels: {}", devices.cpu.device, devices.cpu.variant))?;
    for d in &devices.cuda {
        let memory = output::bytes(d.memory_bytes);
        output::line(&format!(
            "cuda   {} ({}, {} multiprocessors, {memory})",
            d.name, d.capability, d.multiprocessors
        ))?;
        output::line(&format!("       kernels: {}", d.variant))?;
    }
    for a in &devices.adapters {
        output::line(&format!("wgpu   {} ({}, {}, {})", a.name, a.api, a.kind, a.driver))?;
        let subgroup = a.subgroup.map_or("none".into(), |(min, max)| format!("{min} to {max}"));
        output::line(&format!("       f16 {}, subgroups {subgroup}", if a.f16 { "yes" } else { "no" }))?;
        output::line(&format!(
            "       buffer {}, binding {}, workgroup memory {}",
            output::bytes(a.max_buffer_bytes),
            output::bytes(a.max_binding_bytes),
            output::bytes(a.workgroup_bytes.into())
        ))?;
        output::line(&format!("       kernels: {}", a.variant))?;
    }
    if devices.adapters.is_empty() {
        output::line("wgpu   no adapter")?;
    }
    Ok(())
}

#[cfg(feature = "cuda")]
fn cuda() -> Vec<Cuda> {
    use awqua::backend::cuda::{self, CudaChoice, CudaOptions};
    cuda::devices()
        .into_iter()
        .map(|d| {
            let variant = match d.unusable {
                Some(reason) => format!("none: {reason}"),
                None => {
                    let device = CudaChoice::Named(d.index.to_string());
                    let options = CudaOptions { device, ..Default::default() };
                    cuda::open(&options).map_or_else(|e| format!("none: {e}"), |backend| backend.info().variant)
                }
            };
            Cuda {
                name: d.name,
                capability: format!("{}.{}", d.capability.0, d.capability.1),
                multiprocessors: d.multiprocessors,
                memory_bytes: d.memory_bytes,
                variant,
            }
        })
        .collect()
}

#[cfg(not(feature = "cuda"))]
fn cuda() -> Vec<Cuda> {
    Vec::new()
}

#[cfg(feature = "wgpu")]
fn adapters() -> Vec<Adapter> {
    use awqua::backend::wgpu::{self, DeviceChoice, WgpuOptions};
    wgpu::adapters()
        .into_iter()
        .map(|a| {
            let variant = match a.unusable.clone() {
                Some(reason) => format!("none: {reason}"),
                None => {
                    let device = DeviceChoice::Named(a.index.to_string());
                    let options = WgpuOptions { device, ..Default::default() };
                    wgpu::open(&options).map_or_else(|e| format!("none: {e}"), |backend| backend.info().variant)
                }
            };
            Adapter {
                name: a.name,
                api: a.api.to_owned(),
                kind: a.kind.to_owned(),
                driver: a.driver,
                f16: a.f16,
                subgroup: a.subgroup,
                max_buffer_bytes: a.max_buffer_bytes,
                max_binding_bytes: a.max_binding_bytes,
                workgroup_bytes: a.workgroup_bytes,
                variant,
            }
        })
        .collect()
}

#[cfg(not(feature = "wgpu"))]
fn adapters() -> Vec<Adapter> {
    Vec::new()
}
