//! Device time of every dispatch of a step, by timestamps between them.

use wgpu::{BufferUsages, Features};

use super::device::Gpu;
use super::plan::Plan;
use super::readback::Readback;
use crate::backend::OpTime;
use crate::error::{Error, ErrorKind, Result};

/// Timestamps of a query set at most.
const QUERIES: usize = wgpu::QUERY_SET_MAX_QUERIES as usize;

/// Runs the dispatches of `plan` for `step`.
///
/// # Errors
/// [`ErrorKind::Unsupported`] if the device has no timestamps inside passes, or a device error.
pub(super) fn run(gpu: &Gpu, plan: &Plan, step: &awqua_shaders::Step) -> Result<Vec<OpTime>> {
    if !gpu.features.contains(Features::TIMESTAMP_QUERY | Features::TIMESTAMP_QUERY_INSIDE_PASSES) {
        let message = format!("`{}` offers no timestamps between dispatches", gpu.summary.name);
        return Err(Error::new(ErrorKind::Unsupported, message));
    }
    let dispatches: Vec<_> = plan.ops.iter().flat_map(|op| op.dispatches(step)).collect();
    let period = f64::from(gpu.queue.get_timestamp_period()) * 1e-9;
    let mut times = Vec::with_capacity(dispatches.len());
    for part in dispatches.chunks(QUERIES - 1) {
        let count = part.len() as u32 + 1;
        let bytes = u64::from(count) * 8;
        let resolved = gpu.buffer("timestamps", bytes, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)?;
        let readback = Readback::new(gpu, bytes)?;
        let queries = gpu.scoped("timestamps", bytes, || {
            gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count,
            })
        })?;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("profile") });
        let mut names = Vec::with_capacity(part.len());
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.write_timestamp(&queries, 0);
            for (i, dispatch) in part.iter().enumerate() {
                let launch = dispatch.launch(step);
                let [x, y, z] = launch.grid;
                pass.set_pipeline(&dispatch.pipeline.compute);
                pass.set_bind_group(0, &dispatch.bind_group, &[]);
                pass.dispatch_workgroups(x, y, z);
                pass.write_timestamp(&queries, i as u32 + 1);
                names.push((format!("{} {x}x{y}x{z}", dispatch.pipeline.label()), launch.cost));
            }
        }
        encoder.resolve_query_set(&queries, 0..count, &resolved, 0);
        readback.submit_and_read(gpu, encoder, (&resolved, 0), bytes, |bytes| {
            let ticks: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
            for ((name, cost), ends) in names.into_iter().zip(ticks.windows(2)) {
                let seconds = ends[1].saturating_sub(ends[0]) as f64 * period;
                times.push(OpTime { name, seconds, bytes: cost.bytes, flops: cost.flops });
            }
        })?;
    }
    Ok(times)
}
