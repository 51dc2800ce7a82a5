//! A program as kernel calls: addresses resolved once, sizes computed from each step.

use std::sync::Arc;

use awqua_shaders::cuda::{self, EmbedArgs, GluArgs, NormArgs, ScaleArgs};
use awqua_shaders::{Cost, RowMode, Step};

mod attention;
mod experts;
mod fuse;
mod kernels;
mod linear;

use super::CudaBackend;
use super::driver::{Function, Launch, Stream};
use super::memory::Memory;
use super::weights::{CudaDense, CudaWeight};
use crate::backend::{Activation, BufferId, NormKind, Op, Program, Rows, Span, WeightId};
use crate::error::{Error, ErrorKind, Result};
use crate::tensor::WeightShape;

/// The kernel calls of a program.
pub(super) struct Plan {
    /// One entry an operation or a run of them that is computed together, in order.
    pub(super) ops: Vec<PlannedOp>,
    /// Makes the rows of the last hidden state, where no operation of `ops` does.
    pub(super) hidden: Option<PlannedOp>,
}

/// The kernel calls of one operation or of several.
pub(super) struct PlannedOp {
    rows: RowMode,
    /// Most rows that the calls are for, ascending; the last ones are for any number.
    levels: Vec<(u32, Vec<Call>)>,
}

/// Makes the launches of one kernel for a step.
type Call = Box<dyn Fn(&Step, &mut Vec<Work>) + Send + Sync>;

/// A launch and what it is about.
pub(super) struct Work {
    pub(super) name: &'static str,
    pub(super) launch: Launch,
    /// What it moves and computes at least.
    pub(super) cost: Cost,
}

impl PlannedOp {
    /// The rows it works on.
    pub(super) fn rows(&self) -> RowMode {
        self.rows
    }

    /// Adds the launches for this step; none if no row takes part.
    pub(super) fn work(&self, step: &Step, work: &mut Vec<Work>) {
        let rows = self.rows.count(step);
        if rows == 0 {
            return;
        }
        if let Some((_, calls)) = self.levels.iter().find(|(most, _)| rows <= *most) {
            calls.iter().for_each(|call| call(step, work));
        }
    }

    /// An operation whose calls do not depend on the number of rows.
    fn always(rows: RowMode, calls: Vec<Call>) -> Self {
        Self { rows, levels: vec![(u32::MAX, calls)] }
    }
}

impl Plan {
    /// Plans `program` and makes the buffers that it needs.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] or [`ErrorKind::InvalidTensor`] where weights do not fit the program,
    /// [`ErrorKind::OutOfMemory`], or a device error.
    pub(super) fn new(
        backend: &Arc<CudaBackend>,
        program: &Program,
        memory: &mut Memory,
        stream: &Stream,
    ) -> Result<Self> {
        let held = backend.hold()?;
        let weights = held.as_deref().unwrap_or_default();
        let mut planner = Planner { backend, weights, program, memory, stream, ready: None, hidden: None };
        let mut planned = Vec::new();
        let mut ops = program.ops.as_slice();
        while !ops.is_empty() {
            let (op, count) = planner.next(ops)?;
            planned.push(op);
            ops = &ops[count..];
        }
        Ok(Self { ops: planned, hidden: planner.hidden })
    }
}

struct Planner<'a> {
    backend: &'a CudaBackend,
    weights: &'a [CudaWeight],
    program: &'a Program,
    memory: &'a mut Memory,
    stream: &'a Stream,
    /// The buffer whose inputs the last operation left instead of f32 rows, and what they are divided by.
    ready: Option<(BufferId, f32)>,
    hidden: Option<PlannedOp>,
}

impl<'a> Planner<'a> {
    /// Plans the first operations of `ops`; also returns how many.
    fn next(&mut self, ops: &[Op]) -> Result<(PlannedOp, usize)> {
        let ready = self.ready.take();
        if let Some(fused) = self.fused(ops)? {
            return Ok(fused);
        }
        let op = match ops[0] {
            Op::Embed { table, out, scale } => self.embed(table, out, scale)?,
            Op::Norm { .. } => self.norm(&ops[0])?,
            Op::Linear { x, rows, .. } => {
                let site = self.site(&ops[0])?;
                self.linears(input_of(x, ready), row_mode(rows), &[site])?
            }
            Op::RopeAppend { qkv, layer, rope } => self.rope_append(qkv, layer, rope, [None, None], &ops[1..])?,
            Op::Attention { .. } => self.attention(&ops[0], &ops[1..])?,
            Op::Glu { x, out, activation } => self.glu(x, out, activation)?,
            Op::Scale { x, scale, cap, rows } => self.scale(x, scale, cap, row_mode(rows))?,
            Op::Route { logits, routes, top_k, renormalise } => {
                self.route(logits, routes, top_k, renormalise, &ops[1..])?
            }
            Op::Experts { x, .. } => self.experts(&ops[0], input_of(x, ready))?,
            Op::Combine { x, routes, out } => self.combine(x, routes, out)?,
            Op::Gate { x, gate } => self.gate(x, gate)?,
            Op::Arrange { .. } => return Err(unsupported(NO_ARRANGING)),
        };
        Ok((op, 1))
    }

    fn embed(&mut self, table: WeightId, out: BufferId, scale: f32) -> Result<PlannedOp> {
        let (address, out_stride) = self.rows(out)?;
        let table = self.dense(table)?;
        self.fits(out.into(), table.k)?;
        let function = self.backend.gpu.function("embed")?;
        let arguments = EmbedArgs {
            table: table.rows.address(),
            tokens: self.memory.address(self.memory.tokens),
            places: self.memory.address(self.memory.place),
            rows: self.memory.address(self.memory.rows),
            out: address,
            width: table.k,
            table_stride: table.stride,
            out_stride,
            separate: u32::from(self.memory.separate),
            scale,
            pad: 0,
        };
        let width = u64::from(table.k);
        let call = call("embed", function, 256, 0, move |step| {
            let n = u64::from(step.n_tokens);
            ([step.n_tokens, 1, 1], arguments, Cost { bytes: n * width * 6, flops: 0 })
        });
        Ok(PlannedOp::always(RowMode::All, vec![call]))
    }

    fn norm(&mut self, op: &Op) -> Result<PlannedOp> {
        let Op::Norm { kind, x, weight, bias, out, dim, segments, eps, accumulate, rows } = *op else {
            return Err(unsupported("this operation is no norm"));
        };
        let rows = row_mode(rows);
        self.fits(x, dim.saturating_mul(segments))?;
        self.fits(out, dim.saturating_mul(segments))?;
        let (weight, len) = self.any_vector(weight)?;
        let own = len == dim.saturating_mul(segments) && segments > 1;
        if !own && len != dim {
            return Err(Error::new(ErrorKind::InvalidTensor, format!("expected a vector of {dim}, found {len}")));
        }
        let bias = bias.map_or(Ok(0), |bias| self.vector(bias, dim))?;
        let ((x_address, x_stride), (out_address, out_stride)) = (self.rows(x.buffer)?, self.rows(out.buffer)?);
        let function = self.backend.gpu.function("norm_rows")?;
        let flag = |condition: bool, flag: u32| if condition { flag } else { 0 };
        let arguments = NormArgs {
            x: x_address,
            weight,
            bias,
            out: out_address,
            dim,
            x_stride,
            out_stride,
            x_offset: x.offset,
            out_offset: out.offset,
            first_row: 0,
            weight_step: if own { dim } else { 0 },
            flags: flag(kind == NormKind::Layer, cuda::CENTER) | flag(accumulate, cuda::ADD),
            eps,
            pad: 0,
        };
        let call = call("norm_rows", function, 256, cuda::BLOCK_SUM_SHARED, move |step| {
            let n = rows.count(step);
            let first_row = if rows == RowMode::Logits { step.logits_start } else { 0 };
            let elements = u64::from(n) * u64::from(dim) * u64::from(segments);
            let cost = Cost { bytes: elements * 8, flops: elements * 3 };
            ([segments, n, 1], NormArgs { first_row, ..arguments }, cost)
        });
        Ok(PlannedOp::always(rows, vec![call]))
    }

    fn glu(&mut self, x: BufferId, out: BufferId, activation: Activation) -> Result<PlannedOp> {
        let width = self.width(out)?;
        self.fits(x.into(), width.saturating_mul(2))?;
        let per_token = self.per_token(x);
        if self.per_token(out) != per_token {
            return Err(unsupported("a gated product of other rows than its input's"));
        }
        if self.memory.config.max_tokens.saturating_mul(per_token) > awqua_shaders::MAX_GROUPS {
            let message = format!("{} tokens a step through {per_token} experts each", self.memory.config.max_tokens);
            return Err(unsupported(&message));
        }
        let ((x, x_stride), (out, out_stride)) = (self.rows(x)?, self.rows(out)?);
        let function = self.backend.gpu.function("glu")?;
        let arguments = GluArgs { x, out, width, x_stride, out_stride, activation: number(activation) };
        let call = call("glu", function, 256, 0, move |step| {
            let rows = step.n_tokens * per_token;
            let elements = u64::from(rows) * u64::from(width);
            let cost = Cost { bytes: elements * 12, flops: elements * 4 };
            ([width.div_ceil(256), rows, 1], arguments, cost)
        });
        Ok(PlannedOp::always(RowMode::All, vec![call]))
    }

    fn scale(&mut self, x: BufferId, scale: f32, cap: Option<f32>, rows: RowMode) -> Result<PlannedOp> {
        let width = self.width(x)?;
        let (x, x_stride) = self.rows(x)?;
        let function = self.backend.gpu.function("scale")?;
        let scale = cap.map_or(scale, |cap| scale / cap);
        let arguments = ScaleArgs { x, width, x_stride, scale, cap: cap.unwrap_or(0.0) };
        let call = call("scale", function, 256, 0, move |step| {
            let elements = u64::from(rows.count(step)) * u64::from(width);
            let cost = Cost { bytes: elements * 8, flops: elements };
            ([width.div_ceil(256), rows.count(step), 1], arguments, cost)
        });
        Ok(PlannedOp::always(rows, vec![call]))
    }

    /// The number of a rotary table.
    fn table(&self, rope: Option<u32>) -> Result<u32> {
        match rope {
            Some(table) if table >= self.program.rope_tables => {
                Err(Error::new(ErrorKind::InvalidInput, format!("the program has no rotary table {table}")))
            }
            rope => Ok(rope.unwrap_or(0)),
        }
    }

    /// The f32 rows of a buffer: their address and elements a row.
    fn rows(&mut self, id: BufferId) -> Result<(u64, u32)> {
        self.memory.activation(self.stream, self.program, id)
    }

    fn width(&self, id: BufferId) -> Result<u32> {
        match self.program.buffers.get(id.0 as usize) {
            Some(desc) => Ok(desc.width),
            None => Err(Error::new(ErrorKind::InvalidInput, format!("the program has no buffer {}", id.0))),
        }
    }

    /// Rows of a token in a buffer.
    fn per_token(&self, id: BufferId) -> u32 {
        self.program.buffers.get(id.0 as usize).map_or(1, |desc| desc.per_token)
    }

    /// Checks that `columns` columns from `span` on are there.
    fn fits(&self, span: Span, columns: u32) -> Result<()> {
        let width = self.width(span.buffer)?;
        if span.offset.checked_add(columns).is_none_or(|end| end > width) {
            let name = self.program.buffers[span.buffer.0 as usize].name;
            let message = format!("{columns} columns from {} do not fit the {width} of buffer `{name}`", span.offset);
            return Err(Error::new(ErrorKind::InvalidTensor, message));
        }
        Ok(())
    }

    fn weight(&self, id: WeightId) -> Result<&'a CudaWeight> {
        let none = || Error::new(ErrorKind::InvalidInput, format!("the backend holds no weight {}", id.0));
        self.weights.get(id.0 as usize).ok_or_else(none)
    }

    /// Address of a vector of `expected` elements.
    fn vector(&self, id: WeightId, expected: u32) -> Result<u64> {
        match self.any_vector(id)? {
            (address, len) if len == expected => Ok(address),
            (_, len) => {
                Err(Error::new(ErrorKind::InvalidTensor, format!("expected a vector of {expected}, found {len}")))
            }
        }
    }

    /// Address and elements of a vector.
    fn any_vector(&self, id: WeightId) -> Result<(u64, u32)> {
        match self.weight(id)? {
            CudaWeight::Vector { len, buffer } => Ok((buffer.address(), *len)),
            _ => Err(unsupported("a norm weight or bias has to be a vector")),
        }
    }

    fn dense(&self, id: WeightId) -> Result<&'a CudaDense> {
        match self.weight(id)? {
            CudaWeight::Dense(matrix) => Ok(matrix),
            _ => Err(unsupported(NO_PACKED_TABLES)),
        }
    }
}

/// The inputs in `x`, which may be what the operation before left.
fn input_of(x: BufferId, ready: Option<(BufferId, f32)>) -> linear::Input {
    match ready {
        Some((buffer, scale)) if buffer == x => linear::Input::Ready { buffer, scale },
        _ => linear::Input::Rows { buffer: x, norm: None },
    }
}

/// A call whose grid, arguments and cost follow from the step.
fn call<A: bytemuck::Pod>(
    name: &'static str,
    function: Function,
    threads: u32,
    shared: u32,
    make: impl Fn(&Step) -> ([u32; 3], A, Cost) + Send + Sync + 'static,
) -> Call {
    Box::new(move |step, work| {
        let (grid, arguments, cost) = make(step);
        work.push(Work { name, launch: Launch::new(function, grid, threads, shared, &arguments), cost });
    })
}

/// The activation as kernels know it.
fn number(activation: Activation) -> u32 {
    match activation {
        Activation::Silu => cuda::SILU,
        Activation::GeluTanh => cuda::GELU_TANH,
        Activation::Gelu => cuda::GELU,
    }
}

fn row_mode(rows: Rows) -> RowMode {
    match rows {
        Rows::All => RowMode::All,
        Rows::Logits => RowMode::Logits,
        Rows::Compacted => RowMode::Compacted,
    }
}

/// Refuses programs that cannot be planned, and weights in forms that no kernel knows.
///
/// # Errors
/// [`ErrorKind::Unsupported`].
pub(super) fn check(program: &Program, weights: &[WeightShape]) -> Result<()> {
    for op in &program.ops {
        match *op {
            Op::Route { logits, top_k, .. } => {
                let experts = program.buffers.get(logits.0 as usize).map_or(0, |desc| desc.width);
                experts::check_route(experts, top_k)?;
            }
            Op::Arrange { .. } => return Err(unsupported(NO_ARRANGING)),
            Op::Embed { table, .. } => match weights.get(table.0 as usize) {
                Some(WeightShape::Dense { .. }) => {}
                _ => return Err(unsupported(NO_PACKED_TABLES)),
            },
            _ => {}
        }
    }
    if program.attention.head_dim > 512 {
        return Err(unsupported("the CUDA backend has no attention for heads of more than 512 elements"));
    }
    weights.iter().try_for_each(super::weights::check)
}

const NO_ARRANGING: &str = "the CUDA backend neither reorders nor scales the inputs of matrices; use wgpu or the CPU";
const NO_PACKED_TABLES: &str = "the CUDA backend needs a dense embedding table; use wgpu or the CPU";

fn unsupported(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, message.to_owned())
}
