//! [`Products`] with the kernels that run models.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use awqua_shaders::{Dense, Kernel, RowMode, Step, Variant, gemm_dense, round_groups, uniform_bytes};
use wgpu::BufferUsages;

use super::device::{Gpu, lock};
use super::pipelines::Pipelines;
use super::readback::Readback;
use super::weights::{GpuDense, GpuWeight};
use super::{WgpuOptions, selftest};
use crate::backend::{Products, Resident, RoundingGrid};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::{DenseType, WeightShape};

/// Bytes of inputs or outputs of one dispatch.
const PIECE_BYTES: usize = 64 << 20;

/// Opens the adapter that `options` name, or the preferred one, for products.
///
/// # Errors
/// As [`super::open`].
pub fn products(options: &WgpuOptions) -> Result<Arc<dyn Products>> {
    let gpu = super::open_gpu(options)?;
    let pipelines = Pipelines::new(&gpu, None);
    let products = GpuProducts {
        pipelines,
        work: Mutex::new(Work { x: None, out: None, readback: None }),
        held: Arc::default(),
        gpu,
    };
    selftest::pass(&products.gpu, &products.pipelines, &gemm_dense::KERNEL, variant())?;
    selftest::pass(&products.gpu, &products.pipelines, &round_groups::KERNEL, variant())?;
    Ok(Arc::new(products))
}

/// All kernels here read single precision.
fn variant() -> Variant {
    Variant { dense: Dense::F32, ..Variant::default() }
}

struct GpuProducts {
    gpu: Gpu,
    pipelines: Pipelines,
    work: Mutex<Work>,
    held: Arc<Held>,
}

/// Buffers of the latest size, used again.
struct Work {
    x: Option<wgpu::Buffer>,
    out: Option<wgpu::Buffer>,
    readback: Option<Readback>,
}

/// Bytes on the device.
#[derive(Debug, Default)]
struct Held {
    now: AtomicU64,
    peak: AtomicU64,
}

impl Held {
    fn add(&self, bytes: u64) {
        let now = self.now.fetch_add(bytes, Ordering::Relaxed) + bytes;
        self.peak.fetch_max(now, Ordering::Relaxed);
    }
}

/// A dense matrix that gives its memory back.
struct Place {
    matrix: GpuDense,
    bytes: u64,
    held: Arc<Held>,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.matrix.parts.iter().for_each(|part| part.words.destroy());
        self.held.now.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl std::fmt::Debug for GpuProducts {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("GpuProducts").field(&self.gpu.summary.name).finish()
    }
}

impl GpuProducts {
    fn reserve(&self, n: usize, k: usize) -> Result<Place> {
        let shape = WeightShape::Dense { n, k, dtype: DenseType::F32 };
        let bytes = super::weights::bytes(&shape);
        match GpuWeight::reserve(&self.gpu, "a matrix", &shape)? {
            GpuWeight::Dense(matrix) => {
                self.held.add(bytes);
                Ok(Place { matrix, bytes, held: self.held.clone() })
            }
            _ => Err(mismatch("a dense matrix")),
        }
    }

    /// Appends a dispatch to the encoder.
    fn dispatch(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        kernel: &'static Kernel,
        params: &[u8],
        step: &Step,
        storage: &[wgpu::Buffer],
        grid: [u32; 3],
    ) -> Result<()> {
        let gpu = &self.gpu;
        let pipeline = self.pipelines.get(gpu, kernel, variant())?;
        let uniform = |bytes: &[u8]| {
            let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
            let buffer = gpu.buffer("parameters", bytes.len() as u64, usage)?;
            gpu.queue.write_buffer(&buffer, 0, bytes);
            Ok::<_, Error>(buffer)
        };
        let (params, step) = (uniform(params)?, uniform(uniform_bytes(step))?);
        let group =
            gpu.scoped("a product", 0, || pipeline.bind(gpu, params.as_entire_buffer_binding(), &step, storage))?;
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        pass.set_pipeline(&pipeline.compute);
        pass.set_bind_group(0, &group, &[]);
        pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        Ok(())
    }

    fn encoder(&self) -> wgpu::CommandEncoder {
        self.gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("product") })
    }

    /// A buffer of at least `bytes`: the one in `slot`, or a new one.
    fn work(&self, slot: &mut Option<wgpu::Buffer>, bytes: u64) -> Result<wgpu::Buffer> {
        match slot {
            Some(buffer) if buffer.size() >= bytes => Ok(buffer.clone()),
            _ => {
                if let Some(old) = slot.take() {
                    self.held.now.fetch_sub(old.size(), Ordering::Relaxed);
                }
                let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC;
                let buffer = self.gpu.buffer("rows", bytes, usage)?;
                self.held.add(buffer.size());
                *slot = Some(buffer.clone());
                Ok(buffer)
            }
        }
    }

    fn multiply_piece(&self, x: &[f32], place: &Place, n: usize, k: usize, out: &mut [f32]) -> Result<()> {
        let gpu = &self.gpu;
        let rows = x.len() / k;
        let stride = k.next_multiple_of(4);
        let mut work = lock(&self.work);
        let Work { x: x_slot, out: out_slot, readback } = &mut *work;
        let x_buffer = self.work(x_slot, (rows * stride * 4) as u64)?;
        let out_buffer = self.work(out_slot, (rows * n * 4) as u64)?;
        match stride == k {
            true => gpu.write(&x_buffer, 0, bytemuck::cast_slice(x))?,
            false => {
                let mut padded = vec![0f32; rows * stride];
                for (padded, row) in padded.chunks_exact_mut(stride).zip(x.chunks_exact(k)) {
                    padded[..k].copy_from_slice(row);
                }
                gpu.write(&x_buffer, 0, bytemuck::cast_slice(&padded))?;
            }
        }
        let step = Step { n_tokens: rows as u32, position: 0, logits_start: 0, logits_rows: rows as u32 };
        let mut encoder = self.encoder();
        for part in &place.matrix.parts {
            let params = gemm_dense::Params {
                n: part.rows,
                k: k as u32,
                row_words: place.matrix.row_words,
                x_stride: stride as u32,
                out_stride: n as u32,
                out_offset: part.first_row,
                bias_offset: 0,
                flags: 0,
                row_mode: RowMode::All as u32,
                pad: [0; 3],
            };
            // There is no bias; any buffer holds its place, except one that is written.
            let storage = [x_buffer.clone(), part.words.clone(), x_buffer.clone(), out_buffer.clone()];
            let grid = gemm_dense::grid(&params, rows as u32);
            self.dispatch(&mut encoder, &gemm_dense::KERNEL, uniform_bytes(&params), &step, &storage, grid)?;
        }
        let bytes = (rows * n * 4) as u64;
        if readback.as_ref().is_none_or(|readback| readback.capacity() < bytes) {
            *readback = Some(Readback::new(gpu, bytes)?);
        }
        let Some(readback) = readback else { return Err(mismatch("a readback buffer")) };
        readback.submit_and_read(gpu, encoder, (&out_buffer, 0), bytes, |found| {
            bytemuck::cast_slice_mut::<f32, u8>(out).copy_from_slice(found);
        })
    }
}

impl Products for GpuProducts {
    fn name(&self) -> String {
        format!("{} ({})", self.gpu.summary.name, self.gpu.summary.api)
    }

    fn upload(&self, weights: &[f32], k: usize) -> Result<Resident> {
        if k == 0 || !weights.len().is_multiple_of(k) {
            return Err(mismatch("whole rows"));
        }
        let n = weights.len() / k;
        let place = self.reserve(n, k)?;
        for part in &place.matrix.parts {
            let rows = &weights[part.first_row as usize * k..(part.first_row + part.rows) as usize * k];
            let (row_bytes, padded) = (k * 4, place.matrix.row_words as usize * 4);
            super::weights::write(&self.gpu, &part.words, 0, bytemuck::cast_slice(rows), row_bytes, padded)?;
        }
        Ok(Resident::new(n, k, Arc::new(place)))
    }

    fn rounded(&self, weights: &Resident, scales: &[f32], grid: &RoundingGrid) -> Result<Resident> {
        let (n, k) = (weights.n, weights.k);
        let from = place(weights)?;
        if scales.len() != k || grid.group_size == 0 || !k.is_multiple_of(grid.group_size) {
            return Err(mismatch("a scale a column, and groups that divide the columns"));
        }
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_DST;
        let scale_buffer = self.gpu.buffer("scales", (k * 4) as u64, usage)?;
        self.gpu.write(&scale_buffer, 0, bytemuck::cast_slice(scales))?;
        let to = self.reserve(n, k)?;
        let mut encoder = self.encoder();
        for (part, result) in from.matrix.parts.iter().zip(&to.matrix.parts) {
            let params = round_groups::Params {
                n: part.rows,
                k: k as u32,
                row_words: from.matrix.row_words,
                group_size: grid.group_size as u32,
                max_code: grid.max_code as f32,
                symmetric: grid.symmetric.into(),
                pad: [0; 2],
            };
            let step = Step { n_tokens: 1, position: 0, logits_start: 0, logits_rows: 1 };
            let storage = [part.words.clone(), scale_buffer.clone(), result.words.clone()];
            let groups = round_groups::grid(&params, 1);
            self.dispatch(&mut encoder, &round_groups::KERNEL, uniform_bytes(&params), &step, &storage, groups)?;
        }
        self.gpu.submit(Some(encoder.finish()));
        self.gpu.check()?;
        Ok(Resident::new(n, k, Arc::new(to)))
    }

    fn multiply(&self, x: &[f32], weights: &Resident, out: &mut [f32]) -> Result<()> {
        let (n, k) = (weights.n, weights.k);
        let place = place(weights)?;
        if !x.len().is_multiple_of(k) || out.len() != x.len() / k * n {
            return Err(mismatch("rows of the matrix's columns, and room for as many results"));
        }
        let limit = self.gpu.limits.max_storage_buffer_binding_size.min(self.gpu.limits.max_buffer_size);
        let bytes = PIECE_BYTES.min(usize::try_from(limit).unwrap_or(usize::MAX));
        let rows = (bytes / 4 / n.max(k.next_multiple_of(4))).max(1);
        for (x, out) in x.chunks(rows * k).zip(out.chunks_mut(rows * n)) {
            self.multiply_piece(x, place, n, k, out)?;
        }
        Ok(())
    }

    fn peak_bytes(&self) -> u64 {
        self.held.peak.load(Ordering::Relaxed)
    }
}

fn place(resident: &Resident) -> Result<&Place> {
    resident.place().downcast_ref().ok_or_else(|| mismatch("a matrix of this device"))
}

fn mismatch(expected: &str) -> Error {
    Error::new(ErrorKind::InvalidInput, format!("expected {expected}"))
}
