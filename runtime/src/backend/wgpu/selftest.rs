//! Which kernel variants to trust: of what the device offers, the first that computes as the kernels' CPU twins do.
//!
//! Drivers do offer half precision or subgroup operations that go wrong in some shader; a model that talks nonsense
//! is the worst way to find out.

use std::collections::VecDeque;

use awqua_shaders::{
    Elem, Kernel, Reduce, Rng, Size, Trial, Variant, attention, attention_coop, attention_subgroup, gemm_w4,
    gemm_w4_coop, gemv_w4, gemv_w4_rows, gemv_w4_rows_coop, norm, uniform_bytes,
};
use wgpu::{BufferUsages, Features};

use super::WgpuOptions;
use super::device::{Gpu, MATRIX_FEATURES};
use super::pipelines::Pipelines;
use super::readback::Readback;
use crate::error::{Error, ErrorKind, Result};

/// Kernels that together use every variant axis and the features that go wrong most.
static KERNELS: [&Kernel; 4] = [&norm::KERNEL, &gemv_w4::KERNEL, &gemm_w4::KERNEL, &attention::KERNEL];

/// The variants in use.
pub(super) struct Choice {
    pub(super) elem: Elem,
    pub(super) reduce: Reduce,
    pub(super) size: Size,
    /// Whether products of several rows run on matrix units.
    pub(super) coop: bool,
    /// Whether few rows go through other products at once; not known with matrix units.
    pub(super) rows: bool,
    /// What was chosen and why, for people.
    pub(super) reason: String,
}

/// The choice in the making: a sequence of trials, each of which may have to wait for the device.
pub(super) struct SelfTest {
    /// Variants still to be tried, the preferred one first.
    candidates: VecDeque<(Elem, Reduce)>,
    size: Size,
    /// Whether subgroups are large enough for [`attention_subgroup`].
    wide: bool,
    /// Why earlier candidates were refused.
    refused: String,
    /// Kernels and trials of the candidate still to be run.
    kernels: VecDeque<&'static Kernel>,
    trials: VecDeque<(&'static Kernel, Trial)>,
    flight: Option<Flight>,
    stage: Stage,
    /// Whether there is a third stage.
    tries_rows: bool,
}

/// What is tried.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    /// A candidate.
    Candidate,
    /// The kernels on matrix units of the one that passed.
    Units,
    /// Where those are not offered or failed: its kernel for several rows at once.
    Rows,
}

impl SelfTest {
    /// Nothing tried yet.
    pub(super) fn new(gpu: &Gpu, options: &WgpuOptions) -> Self {
        let f16 = gpu.features.contains(Features::SHADER_F16) && !options.force_f32;
        let subgroup = gpu.features.contains(Features::SUBGROUP) && !options.force_no_subgroup;
        let candidates = [
            (f16 && subgroup, Elem::F16, Reduce::Subgroup),
            (subgroup, Elem::F32, Reduce::Subgroup),
            (f16, Elem::F16, Reduce::Workgroup),
            (true, Elem::F32, Reduce::Workgroup),
        ];
        // Elsewhere nobody has measured yet that large workgroups pay.
        let fits = |size: &Size| size.invocations() <= gpu.limits.max_compute_invocations_per_workgroup;
        let size = match gpu.summary.kind {
            "discrete" => [Size::Large, Size::Medium].into_iter().find(fits).unwrap_or(Size::Small),
            _ => Size::Small,
        };
        let offered = candidates.into_iter().filter(|(offered, ..)| *offered);
        let wide = gpu.summary.subgroup.is_some_and(|(least, _)| least >= attention_subgroup::LEAST_SUBGROUP);
        let mut test = Self {
            candidates: offered.map(|(_, elem, reduce)| (elem, reduce)).collect(),
            size,
            wide,
            refused: String::new(),
            kernels: VecDeque::new(),
            trials: VecDeque::new(),
            flight: None,
            stage: Stage::Candidate,
            tries_rows: gpu.summary.kind != "cpu" || options.rows_on_software,
        };
        test.kernels = test.kernels_of_candidate();
        test
    }

    /// The kernels that the preferred candidate is tried with.
    fn kernels_of_candidate(&self) -> VecDeque<&'static Kernel> {
        let subgroups = self.candidates.front().is_some_and(|(_, reduce)| *reduce == Reduce::Subgroup);
        KERNELS.into_iter().chain((subgroups && self.wide).then_some(&attention_subgroup::KERNEL)).collect()
    }

    /// Compiles a kernel, starts a trial or judges one; the choice once it is made. `None` is a piece of work done, or,
    /// where [`Self::is_waiting`], none yet to do.
    ///
    /// # Errors
    /// [`ErrorKind::Device`] if even the plainest variant computes wrongly, or a device error.
    pub(super) fn advance(&mut self, gpu: &Gpu, pipelines: &Pipelines) -> Result<Option<Choice>> {
        let Some(&(elem, reduce)) = self.candidates.front() else {
            let message = format!("`{}` fails the self-test{}", gpu.summary.name, self.refused);
            return Err(Error::new(ErrorKind::Device, message));
        };
        let name = match (elem, reduce) {
            (Elem::F16, Reduce::Subgroup) => "f16 with subgroups",
            (Elem::F32, Reduce::Subgroup) => "f32 with subgroups",
            (Elem::F16, Reduce::Workgroup) => "f16",
            (Elem::F32, Reduce::Workgroup) => "f32",
        };
        let variant = Variant { elem, reduce, size: self.size, ..Variant::default() };
        let passed = match self.piece(gpu, pipelines, variant) {
            Ok(false) => return Ok(None),
            Ok(true) => true,
            Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
            Err(error) => {
                self.trials.clear();
                self.kernels.clear();
                self.flight = None;
                let what = match self.stage {
                    Stage::Candidate => name,
                    Stage::Units => "matrix units",
                    Stage::Rows => "several rows at once",
                };
                self.refused += &format!("; {what} refused: {}", error.message());
                if self.stage == Stage::Candidate {
                    self.candidates.pop_front();
                    self.kernels = self.kernels_of_candidate();
                    return Ok(None);
                }
                false
            }
        };
        match self.stage {
            Stage::Candidate if elem == Elem::F16 && gpu.features.contains(MATRIX_FEATURES) => {
                self.stage = Stage::Units;
                self.kernels = [&gemm_w4_coop::KERNEL, &attention_coop::KERNEL, &gemv_w4_rows_coop::KERNEL].into();
                return Ok(None);
            }
            Stage::Units if passed => {}
            Stage::Candidate | Stage::Units if self.tries_rows => {
                self.stage = Stage::Rows;
                self.kernels = [&gemv_w4_rows::KERNEL].into();
                return Ok(None);
            }
            Stage::Candidate | Stage::Units | Stage::Rows => {}
        }
        let (coop, rows) = (passed && self.stage == Stage::Units, passed && self.stage == Stage::Rows);
        let units = if coop { " and matrix units" } else { "" };
        let reason = format!("{name}{units}{}", self.refused);
        Ok(Some(Choice { elem, reduce, size: self.size, coop, rows, reason }))
    }

    /// Whether the next piece has to wait for the device.
    pub(super) fn is_waiting(&self) -> bool {
        self.flight.as_ref().is_some_and(|flight| !flight.readback.arrived())
    }

    /// One piece of the trials of `variant`; true after the last one.
    fn piece(&mut self, gpu: &Gpu, pipelines: &Pipelines, variant: Variant) -> Result<bool> {
        gpu.finished()?;
        if let Some(flight) = &mut self.flight {
            match flight.advance(gpu)? {
                Step::Waiting | Step::Next => return Ok(false),
                Step::Done => self.flight = None,
            }
        } else if let Some((kernel, trial)) = self.trials.pop_front() {
            self.flight = Some(Flight::begin(gpu, pipelines, kernel, variant, trial)?);
            return Ok(false);
        } else if let Some(kernel) = self.kernels.pop_front() {
            pipelines.get(gpu, kernel, variant)?;
            self.trials.extend(trials_that_fit(gpu, kernel, variant).map(|trial| (kernel, trial)));
        }
        Ok(self.kernels.is_empty() && self.trials.is_empty() && self.flight.is_none())
    }
}

fn trials_that_fit(gpu: &Gpu, kernel: &Kernel, variant: Variant) -> impl Iterator<Item = Trial> {
    let limit = gpu.limits.max_storage_buffer_binding_size;
    let fits = move |trial: &Trial| trial.storage.iter().all(|words| words.len() as u64 * 4 <= limit);
    (kernel.trials)(variant, &mut Rng::new(1)).into_iter().filter(fits)
}

/// Runs the trials of one kernel.
///
/// # Errors
/// [`ErrorKind::Device`] naming the kernel that computes wrongly, or a device error.
pub(super) fn pass(gpu: &Gpu, pipelines: &Pipelines, kernel: &'static Kernel, variant: Variant) -> Result<()> {
    for trial in trials_that_fit(gpu, kernel, variant) {
        let mut flight = Flight::begin(gpu, pipelines, kernel, variant, trial)?;
        loop {
            flight.readback.wait(gpu)?;
            if let Step::Done = flight.advance(gpu)? {
                break;
            }
        }
    }
    Ok(())
}

/// A trial on the device.
struct Flight {
    label: String,
    trial: Trial,
    storage: Vec<wgpu::Buffer>,
    readback: Readback,
    /// Which of the expected outputs is on its way.
    at: usize,
}

enum Step {
    /// The output is not there yet.
    Waiting,
    /// The next output was asked for.
    Next,
    /// All outputs are as expected.
    Done,
}

impl Flight {
    fn begin(
        gpu: &Gpu,
        pipelines: &Pipelines,
        kernel: &'static Kernel,
        variant: Variant,
        trial: Trial,
    ) -> Result<Self> {
        let pipeline = pipelines.get(gpu, kernel, variant)?;
        let filled = |bytes: &[u8], usage| {
            let buffer = gpu.buffer("a trial", bytes.len() as u64, usage | BufferUsages::COPY_DST)?;
            gpu.queue.write_buffer(&buffer, 0, bytes);
            Ok::<_, Error>(buffer)
        };
        let params = filled(&trial.params, BufferUsages::UNIFORM)?;
        let step = filled(uniform_bytes(&trial.step), BufferUsages::UNIFORM)?;
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC;
        let storage: Vec<_> =
            trial.storage.iter().map(|words| filled(bytemuck::cast_slice(words), usage)).collect::<Result<_>>()?;
        let largest = trial.storage.iter().map(|words| words.len() as u64 * 4).max().unwrap_or(0);
        let readback = Readback::new(gpu, largest)?;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("trial") });
        {
            let params = params.as_entire_buffer_binding();
            let bind_group = gpu.scoped("a trial", 0, || pipeline.bind(gpu, params, &step, &storage))?;
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            pass.set_pipeline(&pipeline.compute);
            pass.set_bind_group(0, &bind_group, &[]);
            let [x, y, z] = trial.grid;
            pass.dispatch_workgroups(x, y, z);
        }
        let mut flight = Self { label: kernel.label(variant), trial, storage, readback, at: 0 };
        flight.ask(gpu, encoder)?;
        Ok(flight)
    }

    /// Asks for output `at`.
    fn ask(&mut self, gpu: &Gpu, encoder: wgpu::CommandEncoder) -> Result<()> {
        // Storage bindings start at 2.
        let binding = self.trial.expected.get(self.at).and_then(|expected| (expected.binding as usize).checked_sub(2));
        let output = binding.and_then(|at| self.storage.get(at).zip(self.trial.storage.get(at)));
        let (buffer, words) = output
            .ok_or_else(|| Error::new(ErrorKind::Device, format!("{}: a trial without an output", self.label)))?;
        self.readback.begin(gpu, encoder, &[(buffer, 0, words.len() as u64 * 4)])
    }

    fn advance(&mut self, gpu: &Gpu) -> Result<Step> {
        let (expected, mut mismatch) = (&self.trial.expected[self.at], None);
        let there = self.readback.poll(gpu, |found| {
            let words: Vec<u32> = found.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect();
            mismatch = expected.mismatch(&words);
        })?;
        if let Some(mismatch) = mismatch {
            let message = format!("{}, {}: {mismatch}", self.label, self.trial.label);
            return Err(Error::new(ErrorKind::Device, message));
        }
        if !there {
            return Ok(Step::Waiting);
        }
        self.at += 1;
        if self.at == self.trial.expected.len() {
            return Ok(Step::Done);
        }
        let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("trial") });
        self.ask(gpu, encoder)?;
        Ok(Step::Next)
    }
}
