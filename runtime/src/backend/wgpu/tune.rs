//! Measures equivalent kernels on an adapter: see [`tune`].

use std::time::{Duration, Instant};

use awqua_shaders::staged::Layout;
use awqua_shaders::{
    Groups, Kernel, Rng, RowMode, Size, Step, Variant, gemv_w4, gemv_w4_rows, gemv_w4_swiglu, uniform_bytes,
};
use half::f16;
use wgpu::BufferUsages;

use super::device::Gpu;
use super::pipelines::Pipeline;
use super::plan::{matrix_params, rows_params, usual_size};
use super::readback::Readback;
use super::tuning::{Form, Site, Tuning};
use super::weights::{GpuW4, GpuWeight};
use super::{WgpuBackend, WgpuOptions, selftest};
use crate::backend::{Backend, ROW_STEP};
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;
use crate::tensor::{Offset, W4Matrix, Weight};

/// Rows of the products of several rows.
const ROWS: u32 = 8;
/// Bytes of matrices that dispatches take in turn, so that no cache holds them: of devices with memory of their own.
const COLD_BYTES: u64 = 256 << 20;
/// How long one measurement should take, and how many there are of each candidate.
const MEASUREMENT: f64 = 4e-3;
const MEASUREMENTS: usize = 5;
/// Most dispatches of a measurement.
const MOST_DISPATCHES: f64 = 200.0;
/// Share of the usual kernel's time that another one has to save.
const GAIN: f64 = 0.02;
/// Outputs of the largest matrix that is tuned for.
const MOST_OUTPUTS: u32 = 1 << 18;
/// Outputs that are compared with the plain product.
const CHECKED: usize = 16;
/// Allowed difference, relative to the sum of the magnitudes of the products.
const TOLERANCE: f64 = 4e-3;

/// Shape of a packed matrix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MatrixShape {
    /// Outputs.
    pub n: u32,
    /// Inputs.
    pub k: u32,
    /// Inputs of a group.
    pub group_size: u32,
}

/// One candidate, measured.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// Kernel and variant.
    pub kernel: String,
    /// The matrix.
    pub shape: MatrixShape,
    /// Rows of inputs.
    pub rows: u32,
    /// Median device time of a dispatch, in seconds; or why the candidate is out.
    pub seconds: std::result::Result<f64, String>,
    /// Bytes that a dispatch moves at least.
    pub bytes: u64,
    /// Whether it runs where nothing is tuned.
    pub is_usual: bool,
    /// Whether it is chosen.
    pub is_chosen: bool,
}

/// What [`tune`] found.
#[derive(Debug, Clone)]
pub struct Tuned {
    /// The adapter.
    pub device: String,
    /// For [`crate::EngineOptions::tuning`]: `saved` with the choices for this adapter, its driver and these kernels.
    pub saved: Vec<u8>,
}

/// Packed matrices of common models of a size that fits the device: 7B and 8B shapes on dedicated ones.
///
/// # Errors
/// As [`super::open`].
pub fn usual_shapes(options: &WgpuOptions) -> Result<Vec<MatrixShape>> {
    let gpu = super::open_gpu(options)?;
    let (shapes, group_size): (&[(u32, u32)], u32) = match gpu.summary.kind {
        "discrete" => (
            &[
                (4096, 4096),
                (12_288, 4096),
                (22_016, 4096),
                (4096, 11_008),
                (6144, 4096),
                (28_672, 4096),
                (4096, 14_336),
            ],
            128,
        ),
        "cpu" => (&[(960, 576), (576, 576), (3072, 576), (576, 1536)], 64),
        _ => (&[(2048, 1536), (1536, 1536), (17_920, 1536), (1536, 8960)], 128),
    };
    Ok(shapes.iter().map(|&(n, k)| MatrixShape { n, k, group_size }).collect())
}

/// Shapes of the packed matrices of a model that was loaded through wgpu.
///
/// # Errors
/// [`ErrorKind::Evicted`] or [`ErrorKind::DeviceLost`].
pub fn shapes_of(model: &Model) -> Result<Vec<MatrixShape>> {
    let backend = model.backend()?;
    let backend: Option<&dyn std::any::Any> = backend.as_deref().map(|backend| backend as _);
    let mut shapes = Vec::new();
    for weight in backend.and_then(|b| b.downcast_ref::<WgpuBackend>()).map_or(&[][..], |backend| &backend.weights) {
        if let GpuWeight::W4(matrix) = weight {
            let shape = MatrixShape { n: matrix.n, k: matrix.k, group_size: matrix.group_size };
            // Stacks of experts have kernels of their own.
            if matrix.parts.len() == 1 && matrix.n <= MOST_OUTPUTS && !shapes.contains(&shape) {
                shapes.push(shape);
            }
        }
    }
    Ok(shapes)
}

/// Finds, on the adapter that `options` name, the fastest workgroups for packed matrices of these shapes with few rows of
/// inputs. Every candidate has to compute what its CPU twin does first, and the plain product of the matrix that it is timed
/// with. `heard` is told of the candidates of a product once they are measured; `saved` is what was found earlier, here or
/// on other adapters. Takes seconds.
///
/// # Errors
/// As [`super::open`], [`ErrorKind::InvalidInput`] for shapes that no packed matrix has, or a device error.
pub fn tune(
    options: &WgpuOptions,
    shapes: &[MatrixShape],
    saved: Option<&[u8]>,
    heard: &mut dyn FnMut(&[Candidate]),
) -> Result<Tuned> {
    let mut tuning = Tuning::default();
    let (mut device, mut passed) = (None, Vec::new());
    for shape in shapes {
        // One at a time, so that the largest has room.
        let mut backend = WgpuBackend::open(&WgpuOptions { tuning: None, ..options.clone() })?;
        let matrix = random_matrix(shape)?;
        let ids = upload(&mut backend, &matrix)?;
        let matrices: Vec<&GpuW4> = ids
            .filter_map(|id| match &backend.weights[id] {
                GpuWeight::W4(matrix) if matrix.parts.len() == 1 => Some(matrix),
                _ => None,
            })
            .collect();
        if let Some(first) = matrices.first() {
            let has_sizes = |form: &Form| *form != Form::Rows || !backend.rows_on_units(first);
            for form in Form::ALL.into_iter().filter(has_sizes) {
                let bench = Bench::new(&backend, form, first, &matrix)?;
                let Some(mut candidates) = bench.measure(&matrices, &mut passed)? else { continue };
                let chosen = choose(&mut candidates);
                if let Some(size) = chosen {
                    let site = Site { form, n: shape.n, k: shape.k, group_size: shape.group_size };
                    tuning.sizes.push((site, size));
                }
                let told: Vec<Candidate> = candidates.into_iter().map(|(_, candidate)| candidate).collect();
                heard(&told);
            }
        }
        device = Some(backend.gpu.summary.clone());
    }
    let adapter = device.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "there is no packed matrix to tune for"))?;
    Ok(Tuned { device: format!("{} ({})", adapter.name, adapter.api), saved: tuning.save(saved, &adapter) })
}

/// The fastest, if it is much faster than the usual one.
fn choose(candidates: &mut [(Size, Candidate)]) -> Option<Size> {
    let seconds = |candidate: &Candidate| candidate.seconds.as_ref().copied().unwrap_or(f64::INFINITY);
    let usual = candidates.iter().find(|(_, candidate)| candidate.is_usual).map_or(f64::INFINITY, |(_, c)| seconds(c));
    let best = candidates.iter_mut().min_by(|(_, a), (_, b)| seconds(a).total_cmp(&seconds(b)))?;
    let size = best.0;
    if seconds(&best.1) < usual * (1.0 - GAIN) {
        best.1.is_chosen = true;
        return Some(size);
    }
    let usual = candidates.iter_mut().find(|(_, candidate)| candidate.is_usual && candidate.seconds.is_ok())?;
    usual.1.is_chosen = true;
    Some(usual.0)
}

/// A matrix of this shape.
fn random_matrix(shape: &MatrixShape) -> Result<W4Matrix> {
    let [n, k, group_size] = [shape.n, shape.k, shape.group_size].map(|number| number as usize);
    let divides = |a: usize, b: usize| a > 0 && b.is_multiple_of(a);
    if n == 0
        || k == 0
        || !divides(8, k)
        || !divides(8, group_size)
        || !divides(group_size, k)
        || n.checked_mul(k).is_none()
    {
        let message = format!("no packed matrix has {n} outputs, {k} inputs and groups of {group_size}");
        return Err(Error::new(ErrorKind::InvalidInput, message));
    }
    let mut rng = Rng::new(1);
    let qweight = (0..n * (k / 8)).map(|_| rng.next_u32()).collect();
    let group = |rng: &mut Rng| {
        let scale = f16::from_f32(rng.range(0.005, 0.02));
        u32::from(scale.to_bits()) | u32::from(f16::from_f32(rng.below(16) as f32).to_bits()) << 16
    };
    let group_params = (0..n * (k / group_size)).map(|_| group(&mut rng)).collect();
    Ok(W4Matrix { n, k, group_size, qweight, group_params, offset: Offset::Zero })
}

/// As many copies on the device as no cache holds, and their numbers.
fn upload(backend: &mut WgpuBackend, matrix: &W4Matrix) -> Result<std::ops::Range<usize>> {
    let weight = Weight::W4(matrix.clone());
    let shape = weight.shape();
    let copies = match backend.gpu.summary.kind {
        "discrete" => COLD_BYTES.div_ceil(backend.weight_bytes(&shape).max(1)).clamp(1, 16),
        _ => 1,
    };
    for _ in 0..copies {
        let id = backend.reserve("a matrix to tune with", &shape)?;
        for first in (0..matrix.n).step_by(ROW_STEP) {
            backend.fill(id, rows_of(matrix, first..matrix.n.min(first + ROW_STEP)))?;
        }
        while !backend.upload_is_settled()? {
            backend.wait()?;
        }
    }
    backend.end_of_weights();
    Ok(0..backend.weights.len())
}

/// Rows of a matrix.
fn rows_of(matrix: &W4Matrix, rows: std::ops::Range<usize>) -> Weight {
    let (words, groups) = (matrix.k / 8, matrix.groups());
    Weight::W4(W4Matrix {
        n: rows.len(),
        qweight: matrix.qweight[rows.start * words..rows.end * words].to_vec(),
        group_params: matrix.group_params[rows.start * groups..rows.end * groups].to_vec(),
        ..*matrix
    })
}

/// A product that candidates compute.
struct Bench<'a> {
    backend: &'a WgpuBackend,
    form: Form,
    rows: u32,
    kernel: &'static Kernel,
    params: Vec<u8>,
    /// The uniform at binding 0, and the step's.
    uniforms: [wgpu::Buffer; 2],
    grid: [u32; 3],
    bytes: u64,
    /// The size where nothing is tuned.
    usual: Size,
    groups: Groups,
    /// Staged inputs, a row like the other.
    x: wgpu::Buffer,
    out: wgpu::Buffer,
    staged: wgpu::Buffer,
    dummy: wgpu::Buffer,
    /// Some outputs with what they have to be, and by how much they may differ.
    checks: Vec<(usize, f64, f64)>,
}

impl<'a> Bench<'a> {
    fn new(backend: &'a WgpuBackend, form: Form, matrix: &GpuW4, plain: &W4Matrix) -> Result<Self> {
        let gpu = &backend.gpu;
        let base = matrix_params(matrix);
        let (n, k) = (matrix.n, matrix.k);
        let rows = if form == Form::Rows { ROWS } else { 1 };
        let step = Step { n_tokens: rows, position: 0, logits_start: 0, logits_rows: rows };
        let base = gemv_w4::Params { out_stride: n, row_mode: RowMode::All as u32, ..base };
        let halves = Layout { k: (n / 2) as usize, elem: backend.elem };
        let (kernel, params, grid, cost, usual): (&'static Kernel, Vec<u8>, _, _, _) = match form {
            Form::One => (
                &gemv_w4::KERNEL,
                uniform_bytes(&base).to_vec(),
                gemv_w4::grid(&base, rows),
                gemv_w4::cost(&base, rows),
                usual_size(backend.size, n.div_ceil(32)),
            ),
            Form::Pair => {
                let params = gemv_w4_swiglu::Params {
                    n,
                    k,
                    chunks: base.chunks,
                    group_size: base.group_size,
                    group_shift: base.group_shift,
                    groups: base.groups,
                    flags: base.flags,
                    row_mode: base.row_mode,
                    stage_quads: halves.quads() as u32,
                    ..Default::default()
                };
                (
                    &gemv_w4_swiglu::KERNEL,
                    uniform_bytes(&params).to_vec(),
                    gemv_w4_swiglu::grid(&params, rows),
                    gemv_w4_swiglu::cost(&params, rows),
                    usual_size(backend.size, (n / 2).div_ceil(32)),
                )
            }
            Form::Rows => {
                let params = rows_params(&base);
                (
                    &gemv_w4_rows::KERNEL,
                    uniform_bytes(&params).to_vec(),
                    gemv_w4_rows::grid(&params, rows),
                    gemv_w4_rows::cost(&params, rows),
                    backend.size.min(gemv_w4_rows::KERNEL.largest()),
                )
            }
        };
        let input = Rng::new(2).values(k as usize, 1.0);
        let layout = Layout { k: k as usize, elem: backend.elem };
        let staged: Vec<u32> = layout.stage(&input, None).repeat(rows as usize);
        let filled = |bytes: &[u8], usage| {
            let buffer = gpu.buffer("a product to tune", bytes.len() as u64, usage | BufferUsages::COPY_DST)?;
            gpu.write(&buffer, 0, bytes)?;
            Ok::<_, Error>(buffer)
        };
        let storage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        let outputs = u64::from(n) * u64::from(rows) * 4;
        let halves = (halves.words() * rows as usize) as u64 * 4;
        Ok(Self {
            backend,
            form,
            rows,
            kernel,
            uniforms: [filled(&params, BufferUsages::UNIFORM)?, filled(uniform_bytes(&step), BufferUsages::UNIFORM)?],
            params,
            grid,
            bytes: cost.bytes,
            usual,
            groups: Groups::of(matrix.group_size, k),
            x: filled(bytemuck::cast_slice(&staged), BufferUsages::STORAGE)?,
            out: gpu.buffer("outputs to tune with", outputs, storage)?,
            staged: gpu.buffer("outputs to tune with", halves, storage)?,
            dummy: gpu.buffer("a placeholder", 16, BufferUsages::STORAGE)?,
            checks: if form == Form::Pair { Vec::new() } else { checks(plain, &input) },
        })
    }

    /// The candidates, of which those in `passed` had their trials; `None` where the product does not exist.
    fn measure(&self, matrices: &[&GpuW4], passed: &mut Vec<String>) -> Result<Option<Vec<(Size, Candidate)>>> {
        let Some(first) = matrices.first() else { return Ok(None) };
        if self.form == Form::Pair && !first.n.is_multiple_of(2) {
            return Ok(None);
        }
        let most = self.backend.gpu.limits.max_compute_invocations_per_workgroup;
        let fits = |size: &Size| size.invocations() <= most && *size <= self.kernel.largest();
        let sizes = [Size::Small, Size::Medium, Size::Large].into_iter().filter(fits);
        let mut candidate = |size: Size| {
            let variant = Variant {
                elem: self.backend.elem,
                reduce: self.backend.reduce,
                size,
                groups: self.groups,
                ..Variant::default()
            };
            let seconds = match self.seconds(matrices, variant, passed) {
                Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
                other => other.map_err(|error| error.message().to_owned()),
            };
            let shape = MatrixShape { n: first.n, k: first.k, group_size: first.group_size };
            let kernel = self.kernel.label(variant);
            let is_usual = size == self.usual;
            let (rows, bytes) = (self.rows, self.bytes);
            Ok((size, Candidate { kernel, shape, rows, seconds, bytes, is_usual, is_chosen: false }))
        };
        Ok(Some(sizes.map(&mut candidate).collect::<Result<_>>()?))
    }

    /// Checks a candidate, then times it.
    fn seconds(&self, matrices: &[&GpuW4], variant: Variant, passed: &mut Vec<String>) -> Result<f64> {
        let (gpu, pipelines) = (&self.backend.gpu, &self.backend.pipelines);
        let label = self.kernel.label(variant);
        if !passed.contains(&label) {
            selftest::pass(gpu, pipelines, self.kernel, variant)?;
            passed.push(label);
        }
        let pipeline = pipelines.get(gpu, self.kernel, variant)?;
        let groups: Vec<wgpu::BindGroup> = gpu.scoped("a product to tune", 0, || {
            let params = || wgpu::BufferBinding {
                buffer: &self.uniforms[0],
                offset: 0,
                size: wgpu::BufferSize::new(self.params.len() as u64),
            };
            let bind = |matrix: &&GpuW4| pipeline.bind(gpu, params(), &self.uniforms[1], &self.storage(matrix));
            matrices.iter().map(bind).collect()
        })?;
        // What an earlier candidate left would pass for this one's.
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("tune") });
        encoder.clear_buffer(&self.out, 0, None);
        gpu.submit(Some(encoder.finish()));
        let once = time(gpu, &pipeline, &groups, self.grid, 1)?;
        self.check()?;
        let many = (MEASUREMENT / once.max(1e-7)).clamp(1.0, MOST_DISPATCHES) as usize;
        let each = |_| time(gpu, &pipeline, &groups, self.grid, many);
        let mut times = (0..MEASUREMENTS).map(each).collect::<Result<Vec<f64>>>()?;
        times.sort_by(f64::total_cmp);
        Ok(times[MEASUREMENTS / 2])
    }

    fn storage(&self, matrix: &GpuW4) -> Vec<wgpu::Buffer> {
        let part = &matrix.parts[0];
        let mut storage = vec![self.x.clone(), part.qweight.clone(), part.group_params.clone(), self.dummy.clone()];
        if self.form != Form::Pair {
            storage.push(self.out.clone());
        }
        storage.push(self.staged.clone());
        storage
    }

    /// Compares some outputs of the last dispatch with the plain product.
    fn check(&self) -> Result<()> {
        if self.checks.is_empty() {
            return Ok(());
        }
        let gpu = &self.backend.gpu;
        let bytes = self.out.size();
        let mut wrong = None;
        Readback::new(gpu, bytes)?.read(gpu, (&self.out, 0), bytes, |bytes| {
            let rows = self.rows as usize;
            let outputs: Vec<f32> = bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            let width = outputs.len() / rows;
            let at = self.checks.iter().flat_map(|check| (0..rows).map(move |row| (row, check)));
            wrong = at
                .map(|(row, &(n, expected, allowed))| (n, f64::from(outputs[row * width + n]), expected, allowed))
                .find(|(_, found, expected, allowed)| found.is_nan() || (found - expected).abs() > *allowed);
        })?;
        match wrong {
            None => Ok(()),
            Some((n, found, expected, _)) => {
                let message = format!("{}: output {n} is {found}, not {expected}", self.kernel.name);
                Err(Error::new(ErrorKind::Device, message))
            }
        }
    }
}

/// Some outputs of the product of `matrix` and `input`.
fn checks(matrix: &W4Matrix, input: &[f32]) -> Vec<(usize, f64, f64)> {
    let half = |bits: u32| f64::from(f16::from_bits(bits as u16).to_f32());
    (0..CHECKED.min(matrix.n))
        .map(|i| {
            let n = i * (matrix.n - 1) / CHECKED.min(matrix.n).max(2).saturating_sub(1);
            let (mut sum, mut magnitude) = (0.0, 0.0);
            for (k, x) in input.iter().enumerate() {
                let code = matrix.qweight[n * (matrix.k / 8) + k / 8] >> (4 * (k % 8)) & 15;
                let group = matrix.group_params[n * matrix.groups() + k / matrix.group_size];
                let product = (f64::from(code) - half(group >> 16)) * half(group & 0xffff) * f64::from(*x);
                sum += product;
                magnitude += product.abs();
            }
            (n, sum, TOLERANCE * magnitude + 1e-6)
        })
        .collect()
}

/// Seconds of a dispatch, of `count` that take the bind groups in turn: by the device's clock if it has one.
fn time(gpu: &Gpu, pipeline: &Pipeline, groups: &[wgpu::BindGroup], grid: [u32; 3], count: usize) -> Result<f64> {
    let has_clock = gpu.features.contains(wgpu::Features::TIMESTAMP_QUERY);
    let queries = match has_clock {
        true => Some(gpu.scoped("timestamps", 16, || {
            gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            })
        })?),
        false => None,
    };
    let resolved = gpu.buffer("timestamps", 16, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)?;
    let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("tune") });
    {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: None,
            timestamp_writes: queries.as_ref().map(|query_set| wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(0),
                end_of_pass_write_index: Some(1),
            }),
        });
        pass.set_pipeline(&pipeline.compute);
        for group in groups.iter().cycle().take(count) {
            pass.set_bind_group(0, group, &[]);
            pass.dispatch_workgroups(grid[0], grid[1], grid[2]);
        }
    }
    let Some(queries) = queries else {
        let started = Instant::now();
        gpu.wait(&gpu.submit(Some(encoder.finish())))?;
        return Ok(started.elapsed().max(Duration::from_nanos(1)).as_secs_f64() / count as f64);
    };
    encoder.resolve_query_set(&queries, 0..2, &resolved, 0);
    let mut ticks = 0;
    Readback::new(gpu, 16)?.submit_and_read(gpu, encoder, (&resolved, 0), 16, |bytes| {
        let times: Vec<u64> = bytes.as_chunks().0.iter().map(|b| u64::from_le_bytes(*b)).collect();
        ticks = times[1].saturating_sub(times[0]);
    })?;
    Ok((ticks as f64 * f64::from(gpu.queue.get_timestamp_period()) * 1e-9).max(1e-9) / count as f64)
}
