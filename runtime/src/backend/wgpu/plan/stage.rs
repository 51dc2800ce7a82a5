//! Inputs of packed matrices for few rows: who stages them.

use awqua_shaders::staged::Layout;
use awqua_shaders::{FLAG_NORM, RowMode, Step, stage};

use super::super::weights::GpuWeight;
use super::fuse::Norm;
use super::{Draft, Launch, Planner};
use crate::backend::{BufferId, Op, Rows, WeightId};
use crate::error::Result;

/// Where an operation leaves its output as the staged input of the next matrix.
pub(super) struct Target {
    pub(super) buffer: wgpu::Buffer,
    /// Quads of a row.
    pub(super) quads: u32,
    /// Weights of the norm in between.
    pub(super) norm: Option<WeightId>,
    /// The buffer that the staged inputs stand for.
    pub(super) of: BufferId,
}

impl Planner<'_> {
    fn layout(&self, buffer: BufferId) -> Result<Layout> {
        Ok(Layout { k: self.width(buffer)? as usize, elem: self.backend.elem })
    }

    /// Quads of a staged row of `buffer`.
    pub(super) fn quads(&self, buffer: BufferId) -> Result<u32> {
        Ok(self.layout(buffer)?.quads() as u32)
    }

    /// The staged form of `buffer`, for few rows.
    pub(super) fn staged(&mut self, buffer: BufferId) -> Result<wgpu::Buffer> {
        if let Some(staged) = self.staged.get(&buffer) {
            return Ok(staged.clone());
        }
        let rows = u64::from(self.few_rows) * u64::from(self.per_token(buffer));
        let bytes = rows * self.layout(buffer)?.words() as u64 * 4;
        let what = format!("staged inputs `{}`", self.program.buffers[buffer.0 as usize].name);
        let staged = self.storage(&what, bytes)?;
        self.staged.insert(buffer, staged.clone());
        Ok(staged)
    }

    /// Where an operation that writes all columns of `written` for all rows may stage them, because the packed matrix
    /// of the next operations reads them, possibly through a norm; not where `input` is staged already. The caller
    /// stages them and notes it in [`Planner::ready`].
    pub(super) fn stage_target(
        &mut self,
        written: BufferId,
        input: Option<BufferId>,
        rest: &[Op],
    ) -> Result<Option<Target>> {
        let norm = rest.first().and_then(Norm::of).filter(|norm| norm.x == written);
        let (of, linear) = match norm {
            Some(norm) => (norm.out, rest.get(1)),
            None => (written, rest.first()),
        };
        let Some(&Op::Linear { x, weight, rows: Rows::All, .. }) = linear else { return Ok(None) };
        let GpuWeight::W4(matrix) = self.backend.weight(weight)? else { return Ok(None) };
        if x != of || input == Some(of) || matrix.k != self.width(written)? || self.width(of)? != matrix.k {
            return Ok(None);
        }
        Ok(Some(Target { buffer: self.staged(of)?, quads: self.quads(of)?, norm: norm.map(|norm| norm.weight), of }))
    }

    /// Stages `x`, weighted for `norm`, as the staged form of `of`.
    pub(super) fn stage(&mut self, x: BufferId, norm: Option<WeightId>, of: BufferId, rows: RowMode) -> Result<Draft> {
        let k = self.width(of)?;
        self.fits(x.into(), k)?;
        let params = stage::Params {
            k,
            x_stride: self.stride(x),
            x_offset: 0,
            flags: if norm.is_some() { FLAG_NORM } else { 0 },
            row_mode: rows as u32,
            quads: self.quads(of)?,
            per_token: self.per_token(x),
            ..Default::default()
        };
        let norm = match norm {
            Some(norm) => self.vector(norm, k)?,
            None => self.memory.dummy.clone(),
        };
        let storage = vec![self.buffer(x), norm, self.staged(of)?];
        let launch = move |step: &Step| Launch {
            grid: stage::grid(&params, rows.count(step) * params.per_token),
            cost: stage::cost(&params, rows.count(step) * params.per_token),
        };
        self.draft(&stage::KERNEL, self.variant(), &params, storage, launch)
    }
}
