//! Inputs of packed matrices for many rows, in half precision for matrix units: who writes them.

use awqua_shaders::{Step, gemm_w4_coop, halve, halve_glu, halve_norm};

use super::super::weights::{GpuW4, GpuWeight};
use super::fuse::{Norm, reads_before_write};
use super::linear::Linear;
use super::{Draft, Launch, Planner, activation_of};
use crate::backend::{Activation, BufferId, Op, Rows};
use crate::error::Result;

impl Planner<'_> {
    /// Whether many rows of the matrix's inputs are multiplied on matrix units.
    pub(super) fn takes_halves(&self, matrix: &GpuW4) -> bool {
        self.backend.coop && gemm_w4_coop::handles(matrix.group_size, matrix.k)
    }

    /// The matrix that a linear layer multiplies all rows of the whole of `x` with on matrix units.
    fn halved_matrix(&self, op: &Op, x: BufferId) -> Result<Option<&GpuW4>> {
        match *op {
            Op::Linear { x: from, weight, rows: Rows::All, .. } if from == x => match self.backend.weight(weight)? {
                GpuWeight::W4(matrix) if self.takes_halves(matrix) && matrix.k == self.width(x)? => Ok(Some(matrix)),
                _ => Ok(None),
            },
            _ => Ok(None),
        }
    }

    /// The `k` inputs of a layer in half precision, in so many chunks.
    pub(super) fn halve(&mut self, k: u32, chunks: u32, op: &Linear) -> Result<Draft> {
        let rows = op.rows;
        let params = halve::Params { k, chunks, x_stride: self.stride(op.x), row_mode: rows as u32 };
        let (halves, scales) = self.halves(chunks)?;
        let storage = vec![self.buffer(op.x), halves, scales];
        let launch = move |step: &Step| Launch {
            grid: halve::grid(&params, rows.count(step)),
            cost: halve::cost(&params, rows.count(step)),
        };
        self.draft(&halve::KERNEL, self.variant(), &params, storage, launch)
    }

    /// Room for the half precision inputs of a step, rows of `chunks` chunks, and for the scales of its rows.
    pub(super) fn halves(&mut self, chunks: u32) -> Result<(wgpu::Buffer, wgpu::Buffer)> {
        if let Some(made) = self.half_buffers.get(&chunks) {
            return Ok(made.clone());
        }
        let rows = u64::from(self.max_tokens.next_multiple_of(gemm_w4_coop::TILE));
        let made = (
            self.storage("half precision inputs", rows * u64::from(chunks) * 64)?,
            self.storage("scales of half precision inputs", rows * 4)?,
        );
        self.half_buffers.insert(chunks, made.clone());
        Ok(made)
    }

    /// A norm that leaves its output in half precision only, for the linear layers among `ops`, if they are all that read
    /// it and take it so.
    pub(super) fn halve_norm(&mut self, norm: Norm, ops: &[Op]) -> Result<Option<Draft>> {
        let readers = ops.iter().filter(|op| matches!(op, Op::Linear { x, .. } if *x == norm.out));
        let mut chunks = None;
        for op in readers {
            let Some(matrix) = self.halved_matrix(op, norm.out)? else { return Ok(None) };
            chunks = Some(matrix.chunks);
        }
        let Some(chunks) = chunks else { return Ok(None) };
        let k = self.width(norm.out)?;
        let params = halve_norm::Params { k, chunks, x_stride: self.stride(norm.x), eps: norm.eps };
        let (halves, scales) = self.halves(chunks)?;
        let storage = vec![self.buffer(norm.x), self.vector(norm.weight, k)?, halves, scales];
        let launch = move |step: &Step| Launch {
            grid: halve_norm::grid(&params, step.n_tokens),
            cost: halve_norm::cost(&params, step.n_tokens),
        };
        self.draft(&halve_norm::KERNEL, self.variant(), &params, storage, launch).map(Some)
    }

    /// A gated activation that leaves its output in half precision only, for the linear layer at the start of `rest`, if
    /// that is all that reads it and takes it so.
    pub(super) fn halve_glu(
        &mut self,
        x: BufferId,
        out: BufferId,
        activation: Activation,
        rest: &[Op],
    ) -> Result<Option<Draft>> {
        let Some((linear, rest)) = rest.split_first() else { return Ok(None) };
        let Some(matrix) = self.halved_matrix(linear, out)? else { return Ok(None) };
        let (k, chunks) = (matrix.k, matrix.chunks);
        if self.per_token(x) != 1 || reads_before_write(rest, out) {
            return Ok(None);
        }
        let params =
            halve_glu::Params { k, chunks, x_stride: self.stride(x), activation: activation_of(activation) as u32 };
        let (halves, scales) = self.halves(chunks)?;
        let storage = vec![self.buffer(x), halves, scales];
        let launch = move |step: &Step| Launch {
            grid: halve_glu::grid(&params, step.n_tokens),
            cost: halve_glu::cost(&params, step.n_tokens),
        };
        self.draft(&halve_glu::KERNEL, self.variant(), &params, storage, launch).map(Some)
    }
}
