//! Matrices: packed and dense, for few and for many rows.

use awqua_shaders::{
    Elem, FLAG_ACCUMULATE, FLAG_BIAS, FLAG_NORM, FLAG_STAGE, FLAG_STAGE_NORM, Groups, RowMode, Size, Step, Variant,
    gemm_dense, gemm_packed, gemm_w4, gemm_w4_coop, gemv_dense, gemv_dense_rows, gemv_dense_rows_coop, gemv_packed,
    gemv_w4, gemv_w4_rows, gemv_w4_rows_coop,
};

use super::super::WgpuBackend;
use super::super::tuning::{Form, Site};
use super::super::weights::{GpuDense, GpuPacked, GpuW4, GpuWeight, W4Part};
use super::stage::Target;
use super::{Draft, DraftOp, Launch, Planner, dense, unsupported};
use crate::backend::{BufferId, Op, Span, WeightId};
use crate::error::{Error, ErrorKind, Result};

/// Most rows of a matmul that read the weights once a row instead of once a tile of rows. A tile is computed whole
/// however few its rows: 64 of them take an H100 as long as 40 single rows (8B shapes, group size 128), and fewer where
/// arithmetic is dearer than memory.
pub(super) fn gemv_rows(device_kind: &str) -> u32 {
    match device_kind {
        "discrete" => 32,
        "cpu" => 8,
        _ => 16,
    }
}

/// Most rows that packed matrices take without tiles of rows, at once or one by one.
pub(in super::super) const MOST_FEW_ROWS: u32 = 96;

/// The same on a device. On matrix units 96 rows at once take an H100 22.2 ms and in tiles 24.9, 128 rows 28.7 and 25.2
/// (7B shape, group size 128).
pub(super) fn few_rows(backend: &WgpuBackend) -> u32 {
    if backend.coop { MOST_FEW_ROWS } else { gemv_rows(backend.gpu.summary.kind) }
}

/// Subgroups of 32 that keep an H100 busy; matrices of fewer outputs get more slices of K.
const BUSY_SUBGROUPS: u32 = 2560;

/// The size for a product of one row with so many workgroups where nothing was tuned, at most `largest`.
pub(in super::super) fn usual_size(largest: Size, workgroups: u32) -> Size {
    let busy = |size: &Size| workgroups.saturating_mul(size.invocations() / 32) >= BUSY_SUBGROUPS;
    [Size::Small, Size::Medium].into_iter().filter(|size| *size < largest).find(busy).unwrap_or(largest)
}

/// A linear layer of the program.
pub(super) struct Linear {
    pub(super) x: BufferId,
    pub(super) weight: WeightId,
    pub(super) bias: Option<WeightId>,
    pub(super) out: Span,
    pub(super) accumulate: bool,
    pub(super) rows: RowMode,
    /// Many rows of x lie ready in half precision.
    pub(super) is_halved: bool,
}

/// A packed matrix with staged inputs.
pub(super) struct Gemv<'a> {
    /// The buffer whose staged form is the input.
    pub(super) input: BufferId,
    /// Added to the mean of squares of the norm in front, if there is one.
    pub(super) norm_eps: Option<f32>,
    pub(super) matrix: &'a GpuW4,
    pub(super) part: &'a W4Part,
    pub(super) bias: Option<WeightId>,
    pub(super) out: Span,
    pub(super) accumulate: bool,
    /// [`RowMode::All`] or [`RowMode::Compacted`]: staged rows are compacted.
    pub(super) rows: RowMode,
    pub(super) target: Option<&'a Target>,
    /// [`Form::One`] or [`Form::Rows`].
    pub(super) form: Form,
}

/// Dispatches on packed matrices for few rows.
pub(super) struct Few {
    /// For a row at a time.
    pub(super) one: Vec<Draft>,
    /// For several at once; empty where no kernel does that.
    pub(super) several: Vec<Draft>,
}

impl<'a> Planner<'a> {
    pub(super) fn linear(&mut self, op: &Linear, ready: Option<BufferId>, rest: &[Op]) -> Result<DraftOp> {
        if op.x == op.out.buffer {
            return Err(unsupported("a linear layer can not write to its input"));
        }
        let backend = self.backend;
        let no_matrix = || unsupported("a linear layer needs a matrix");
        let (n, k) = backend.weight(op.weight)?.dims().ok_or_else(no_matrix)?;
        self.fits(op.out, n)?;
        if self.width(op.x)? != k {
            let message = format!("expected {} input features, found {k}", self.width(op.x)?);
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        match backend.weight(op.weight)? {
            GpuWeight::W4(matrix) => self.linear_w4(matrix, op, ready, rest),
            GpuWeight::Packed(matrix) => self.linear_packed(matrix, op),
            GpuWeight::Dense(matrix) => self.linear_dense(matrix, op),
            GpuWeight::Vector { .. } | GpuWeight::Order { .. } | GpuWeight::Expert { .. } => Err(no_matrix()),
        }
    }

    fn linear_w4(&mut self, matrix: &'a GpuW4, op: &Linear, ready: Option<BufferId>, rest: &[Op]) -> Result<DraftOp> {
        let whole = op.out.offset == 0 && matrix.parts.len() == 1 && self.width(op.out.buffer)? == matrix.n;
        let target = match op.rows {
            RowMode::All if whole => self.stage_target(op.out.buffer, Some(op.x), rest)?,
            _ => None,
        };
        let few = self.few(|planner, form| {
            let mut drafts = Vec::new();
            if ready != Some(op.x) || op.rows != RowMode::All {
                drafts.push(planner.stage(op.x, None, op.x, op.rows)?);
            }
            for part in &matrix.parts {
                drafts.push(planner.gemv(&Gemv {
                    input: op.x,
                    norm_eps: None,
                    matrix,
                    part,
                    bias: op.bias,
                    out: op.out,
                    accumulate: op.accumulate,
                    rows: if op.rows == RowMode::All { RowMode::All } else { RowMode::Compacted },
                    target: target.as_ref(),
                    form,
                })?);
            }
            Ok(drafts)
        })?;
        let many = if self.pass.is_none() { self.gemm(matrix, op)? } else { Vec::new() };
        self.ready = target.map(|target| target.of);
        Ok(DraftOp { rows: op.rows, levels: self.levels(few, many) })
    }

    /// What `draft` plans for the forms that few rows come in.
    pub(super) fn few(&mut self, mut draft: impl FnMut(&mut Self, Form) -> Result<Vec<Draft>>) -> Result<Few> {
        let one = if self.pass.is_none() { draft(self, Form::One)? } else { Vec::new() };
        let several = match self.pass.is_some() || self.backend.takes_rows() {
            true => draft(self, Form::Rows)?,
            false => Vec::new(),
        };
        Ok(Few { one, several })
    }

    /// By rows of a step: dispatches for few, and for `many`. A pass has few rows, and several.
    pub(super) fn levels(&self, few: Few, many: Vec<Draft>) -> Vec<(u32, Vec<Draft>)> {
        if self.pass.is_some() {
            return vec![(u32::MAX, few.several)];
        }
        let mut levels = vec![(self.few_rows, few.one), (u32::MAX, many)];
        if !few.several.is_empty() {
            levels[0].0 = (self.backend.least_rows() - 1).min(self.few_rows);
            levels.insert(1, (self.few_rows, few.several));
        }
        levels
    }

    /// Few rows from staged inputs.
    pub(super) fn gemv(&mut self, site: &Gemv<'_>) -> Result<Draft> {
        let Gemv { matrix, part, rows, .. } = *site;
        let norm = site.target.and_then(|target| target.norm);
        let bias_len = if site.bias.is_some() { matrix.n } else { 0 };
        let bias = site.bias.map(|bias| self.vector(bias, matrix.n)).transpose()?;
        let norm_weights = norm.map(|norm| self.vector(norm, matrix.n)).transpose()?;
        let vectors = match (bias, norm_weights) {
            (Some(bias), Some(norm)) => self.joined(&bias, &norm, u64::from(matrix.n) * 4)?,
            (Some(vectors), None) | (None, Some(vectors)) => vectors,
            (None, None) => self.memory.dummy.clone(),
        };
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let params = gemv_w4::Params {
            n: part.rows,
            out_stride: self.stride(site.out.buffer),
            out_offset: site.out.offset + part.first_row,
            bias_offset: part.first_row,
            flags: matrix.flags
                | flag(site.accumulate, FLAG_ACCUMULATE)
                | flag(site.bias.is_some(), FLAG_BIAS)
                | flag(site.norm_eps.is_some(), FLAG_NORM)
                | flag(site.target.is_some(), FLAG_STAGE)
                | flag(norm.is_some(), FLAG_STAGE_NORM),
            row_mode: rows as u32,
            eps: site.norm_eps.unwrap_or(0.0),
            norm_offset: bias_len,
            stage_quads: site.target.map_or(0, |target| target.quads),
            ..matrix_params(matrix)
        };
        let staged_out = site.target.map_or(&self.memory.unread, |target| &target.buffer).clone();
        if site.form == Form::Rows && self.has_rows_kernel(matrix) {
            let out = self.buffer(site.out.buffer);
            return self.gemv_rows(matrix, part, rows_params(&params), site.input, [vectors, out, staged_out]);
        }
        let storage = vec![
            self.staged(site.input)?,
            part.qweight.clone(),
            part.group_params.clone(),
            vectors,
            self.buffer(site.out.buffer),
            staged_out,
        ];
        let launch = move |step: &Step| Launch {
            grid: gemv_w4::grid(&params, rows.count(step)),
            cost: gemv_w4::cost(&params, rows.count(step)),
        };
        let variant = self.sized(matrix, Form::One, part.rows.div_ceil(32));
        self.draft(&gemv_w4::KERNEL, variant, &params, storage, launch)
    }

    /// Whether there is a kernel for several rows of `matrix` at once.
    pub(super) fn has_rows_kernel(&self, matrix: &GpuW4) -> bool {
        // Passes are not begun without the one for any matrix.
        self.pass.is_some() || self.backend.rows_on_units(matrix) || self.backend.rows
    }

    /// Several rows at once from the staged form of `input`; `rest` are the bindings behind those of the matrix.
    pub(super) fn gemv_rows(
        &mut self,
        matrix: &GpuW4,
        part: &W4Part,
        params: gemv_w4_rows::Params,
        input: BufferId,
        [vectors, out, staged_out]: [wgpu::Buffer; 3],
    ) -> Result<Draft> {
        let rows = RowMode::from_u32(params.row_mode);
        let storage =
            vec![self.staged(input)?, part.qweight.clone(), part.group_params.clone(), vectors, out, staged_out];
        let (kernel, grid): (_, fn(&_, _) -> _) = match self.backend.rows_on_units(matrix) {
            true => (&gemv_w4_rows_coop::KERNEL, gemv_w4_rows_coop::grid),
            false => (&gemv_w4_rows::KERNEL, gemv_w4_rows::grid),
        };
        let launch = move |step: &Step| Launch {
            grid: grid(&params, rows.count(step)),
            cost: gemv_w4_rows::cost(&params, rows.count(step)),
        };
        let variant = self.sized(matrix, Form::Rows, u32::MAX);
        self.draft(kernel, variant, &params, storage, launch)
    }

    /// The variant of a gemv_w4 kernel of this form for a matrix that takes so many workgroups.
    pub(super) fn sized(&self, matrix: &GpuW4, form: Form, workgroups: u32) -> Variant {
        let site = Site { form, n: matrix.n, k: matrix.k, group_size: matrix.group_size };
        let usual = || match form {
            Form::Rows => self.backend.size,
            Form::One | Form::Pair => usual_size(self.backend.size, workgroups),
        };
        let size = self.backend.tuning.size(&site).unwrap_or_else(usual);
        Variant { size, groups: Groups::of(matrix.group_size, matrix.k), ..self.variant() }
    }

    /// Tiles of rows.
    fn gemm(&mut self, matrix: &GpuW4, op: &Linear) -> Result<Vec<Draft>> {
        let rows = op.rows;
        let coop = self.takes_halves(matrix);
        let mut drafts = Vec::new();
        if coop && !op.is_halved {
            drafts.push(self.halve(matrix.k, matrix.chunks, op)?);
        }
        let bias = match op.bias {
            Some(bias) => self.vector(bias, matrix.n)?,
            None => self.memory.dummy.clone(),
        };
        for part in &matrix.parts {
            let params = gemm_w4::Params {
                n: part.rows,
                k: matrix.k,
                chunks: matrix.chunks,
                group_size: matrix.group_size,
                groups: matrix.groups,
                x_stride: self.stride(op.x),
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset + part.first_row,
                bias_offset: part.first_row,
                flags: op.flags() | matrix.flags,
                row_mode: rows as u32,
                ..Default::default()
            };
            let x = if coop { self.halves(matrix.chunks)?.0 } else { self.buffer(op.x) };
            let mut storage =
                vec![x, part.qweight.clone(), part.group_params.clone(), bias.clone(), self.buffer(op.out.buffer)];
            if coop {
                storage.push(self.halves(matrix.chunks)?.1);
            }
            let launch = move |step: &Step| Launch {
                grid: match coop {
                    true => gemm_w4_coop::grid(&params, rows.count(step)),
                    false => gemm_w4::grid(&params, rows.count(step)),
                },
                cost: gemm_w4::cost(&params, rows.count(step)),
            };
            let kernel = if coop { &gemm_w4_coop::KERNEL } else { &gemm_w4::KERNEL };
            drafts.push(self.draft(kernel, self.variant(), &params, storage, launch)?);
        }
        Ok(drafts)
    }

    fn linear_packed(&mut self, matrix: &GpuPacked, op: &Linear) -> Result<DraftOp> {
        let rows = op.rows;
        let bias = match op.bias {
            Some(bias) => self.vector(bias, matrix.n)?,
            None => self.memory.dummy.clone(),
        };
        let variant = Variant { packed: matrix.packed, ..self.variant() };
        let elem = if matrix.is_half { variant.elem } else { Elem::F32 };
        let (mut one_by_one, mut many) = (Vec::new(), Vec::new());
        for part in &matrix.parts {
            let params = gemv_packed::Params {
                n: part.rows,
                k: matrix.k,
                row_words: matrix.row_words,
                group_size: matrix.group_size,
                groups: matrix.groups,
                x_stride: self.stride(op.x),
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset + part.first_row,
                bias_offset: part.first_row,
                flags: op.flags() | matrix.flags,
                row_mode: rows as u32,
                ..Default::default()
            };
            let storage = vec![
                self.buffer(op.x),
                part.codes.clone(),
                part.group_params.clone(),
                bias.clone(),
                self.buffer(op.out.buffer),
            ];
            let gemv = move |step: &Step| Launch {
                grid: gemv_packed::grid(&params, rows.count(step)),
                cost: gemv_packed::cost(&params, rows.count(step)),
            };
            let gemm = move |step: &Step| Launch {
                grid: gemm_packed::grid(&params, rows.count(step)),
                cost: gemm_packed::cost(&params, rows.count(step)),
            };
            one_by_one.push(self.draft(&gemv_packed::KERNEL, variant, &params, storage.clone(), gemv)?);
            many.push(self.draft(&gemm_packed::KERNEL, Variant { elem, ..variant }, &params, storage, gemm)?);
        }
        Ok(DraftOp { rows, levels: vec![(gemv_rows(self.backend.gpu.summary.kind), one_by_one), (u32::MAX, many)] })
    }

    fn linear_dense(&mut self, matrix: &GpuDense, op: &Linear) -> Result<DraftOp> {
        let rows = op.rows;
        let bias = match op.bias {
            Some(bias) => self.vector(bias, matrix.n)?,
            None => self.memory.dummy.clone(),
        };
        let variant = Variant { dense: dense(matrix.dtype), ..self.variant() };
        let on_units = self.pass.is_some()
            && gemv_dense_rows_coop::handles(variant.dense, matrix.k)
            && self.backend.pass_kernels().is_some_and(|kernels| kernels.dense_coop);
        let chunks = matrix.k.div_ceil(32);
        let (mut one_by_one, mut many) = (Vec::new(), Vec::new());
        if on_units {
            many.push(self.halve(matrix.k, chunks, op)?);
        }
        for part in &matrix.parts {
            let params = gemv_dense::Params {
                n: part.rows,
                k: matrix.k,
                row_words: matrix.row_words,
                x_stride: self.stride(op.x),
                out_stride: self.stride(op.out.buffer),
                out_offset: op.out.offset + part.first_row,
                bias_offset: part.first_row,
                flags: op.flags(),
                row_mode: rows as u32,
                ..Default::default()
            };
            if on_units {
                let params = gemv_dense_rows_coop::Params::of(&params);
                let (halves, scales) = self.halves(chunks)?;
                let storage = vec![halves, part.words.clone(), bias.clone(), self.buffer(op.out.buffer), scales];
                let gemv = move |step: &Step| Launch {
                    grid: gemv_dense_rows_coop::grid(&params, rows.count(step)),
                    cost: gemv_dense_rows_coop::cost(&params, rows.count(step)),
                };
                many.push(self.draft(&gemv_dense_rows_coop::KERNEL, variant, &params, storage, gemv)?);
                continue;
            }
            let storage = vec![self.buffer(op.x), part.words.clone(), bias.clone(), self.buffer(op.out.buffer)];
            if self.pass.is_some() {
                let gemv = move |step: &Step| Launch {
                    grid: gemv_dense_rows::grid(&params, rows.count(step)),
                    cost: gemv_dense::cost(&params, rows.count(step)),
                };
                many.push(self.draft(&gemv_dense_rows::KERNEL, variant, &params, storage, gemv)?);
                continue;
            }
            let gemv = move |step: &Step| Launch {
                grid: gemv_dense::grid(&params, rows.count(step)),
                cost: gemv_dense::cost(&params, rows.count(step)),
            };
            let gemm = move |step: &Step| Launch {
                grid: gemm_dense::grid(&params, rows.count(step)),
                cost: gemv_dense::cost(&params, rows.count(step)),
            };
            one_by_one.push(self.draft(&gemv_dense::KERNEL, variant, &params, storage.clone(), gemv)?);
            many.push(self.draft(&gemm_dense::KERNEL, variant, &params, storage, gemm)?);
        }
        let few_rows = if self.pass.is_some() { 0 } else { gemv_rows(self.backend.gpu.summary.kind) };
        Ok(DraftOp { rows, levels: vec![(few_rows, one_by_one), (u32::MAX, many)] })
    }

    /// A buffer with the first `bytes` of two others, one behind the other.
    fn joined(&mut self, a: &wgpu::Buffer, b: &wgpu::Buffer, bytes: u64) -> Result<wgpu::Buffer> {
        let buffer = self.storage("a bias with a norm", 2 * bytes)?;
        if self.dry {
            return Ok(buffer);
        }
        let gpu = &self.backend.gpu;
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("join") });
        encoder.copy_buffer_to_buffer(a, 0, &buffer, 0, bytes);
        encoder.copy_buffer_to_buffer(b, 0, &buffer, bytes, bytes);
        gpu.submit(Some(encoder.finish()));
        Ok(buffer)
    }
}

impl Linear {
    fn flags(&self) -> u32 {
        let accumulate = if self.accumulate { FLAG_ACCUMULATE } else { 0 };
        accumulate | if self.bias.is_some() { FLAG_BIAS } else { 0 }
    }
}

/// The same for several rows at once.
pub(in super::super) fn rows_params(params: &gemv_w4::Params) -> gemv_w4_rows::Params {
    gemv_w4_rows::Params {
        n: params.n,
        k: params.k,
        chunks: params.chunks,
        group_size: params.group_size,
        group_shift: params.group_shift,
        groups: params.groups,
        out_stride: params.out_stride,
        out_offset: params.out_offset,
        bias_offset: params.bias_offset,
        flags: params.flags,
        row_mode: params.row_mode,
        eps: params.eps,
        norm_offset: params.norm_offset,
        stage_quads: params.stage_quads,
        ..Default::default()
    }
}

/// What every gemv_w4 kernel has to know of a matrix; the rest is zero.
pub(in super::super) fn matrix_params(matrix: &GpuW4) -> gemv_w4::Params {
    gemv_w4::Params {
        n: matrix.n,
        k: matrix.k,
        chunks: matrix.chunks,
        group_size: matrix.group_size,
        group_shift: gemv_w4::group_shift(matrix.group_size, matrix.k),
        groups: matrix.groups,
        flags: matrix.flags,
        ..Default::default()
    }
}
