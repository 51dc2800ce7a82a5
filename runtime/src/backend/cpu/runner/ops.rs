//! The operations of a program.

use std::ops::Range;
use std::sync::Arc;

use super::super::integer::rows::Shape;
use super::super::pool::Parts;
use super::super::weights::{Matrix, Weights};
use super::super::{attention, integer, matmul, mismatch, softcap};
use super::{CpuRunner, EMBEDDED};
use crate::backend::{Activation, BufferId, NormKind, Op, Span, WeightId};
use crate::error::Result;
use crate::tensor::Weight;

/// How a product is computed.
pub(super) enum Way {
    /// In single precision, with weights as their format defines them.
    Single,
    /// In integers, with the codes of a packed matrix.
    Blocks(Shape),
    /// In integers, with a dense matrix rounded to 8 bits.
    Rounded(Shape),
}

fn vector(weights: &Weights, id: WeightId) -> Result<&[f32]> {
    match weights.plain(id.0 as usize) {
        Some(Weight::Vector(vector)) => Ok(vector),
        _ => Err(mismatch("a vector")),
    }
}

impl CpuRunner {
    /// Computes the units `part` of an operation of the step under way.
    pub(super) fn run_op(&mut self, weights: &Weights, op: &Op, part: Range<usize>) -> Result<()> {
        let n_tokens = self.cursor.tokens.len();
        let position = self.cursor.position as usize;
        match *op {
            Op::Embed { table, out, scale } => {
                self.embed(weights.matrix(table.0 as usize), out, scale, part.clone())?;
                self.embedded += part.len();
                if self.embedded >= EMBEDDED {
                    self.embedded = 0;
                    if let Some(mapped) =
                        weights.plain(table.0 as usize).filter(|_| !self.is_multiplied(weights, table))
                    {
                        mapped.release();
                    }
                }
                Ok(())
            }
            Op::Norm { rows, .. } => {
                let first = self.rows(rows).start;
                self.norm(weights, op, first, part)
            }
            Op::Linear { x, weight, bias, out, accumulate, rows } => {
                let range = self.rows(rows);
                let bias = bias.map(|bias| vector(weights, bias)).transpose()?;
                self.linear(weights, (x, range), weight, (out, bias, accumulate), part)
            }
            Op::RopeAppend { qkv, layer, rope } => {
                let width = self.width(qkv);
                attention::rope_append(
                    &mut self.pool,
                    &mut self.buffers[qkv.0 as usize][part.start * width..part.end * width],
                    width,
                    &mut self.caches[layer as usize],
                    rope.map(|table| &self.ropes[table as usize][..]),
                    &self.program.attention,
                    position + part.start,
                    &*self.backend.kernels,
                );
                Ok(())
            }
            Op::Attention { qkv, out, layer, scale, softcap, window } => {
                let qkv_width = self.width(qkv);
                let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
                attention::attention(
                    &mut self.pool,
                    &self.scratch,
                    &*self.backend.kernels,
                    &attention::Inputs {
                        qkv: &self.buffers[qkv.0 as usize],
                        qkv_width,
                        cache: &self.caches[layer as usize],
                        shape: self.program.attention,
                        position,
                        n_tokens,
                        scale,
                        softcap,
                        window: window.map_or(usize::MAX, |w| w as usize),
                    },
                    &mut self.partials,
                    part,
                    &mut output,
                );
                self.buffers[out.0 as usize] = output;
                Ok(())
            }
            Op::Glu { x, out, activation } => {
                self.glu(x, out, activation, part);
                Ok(())
            }
            Op::Route { logits, routes, top_k, renormalise } => {
                self.route(logits, routes, top_k as usize, renormalise, part);
                Ok(())
            }
            Op::Experts { x, weight, count, routes, out } => {
                if part.start == 0 {
                    self.gather(x, routes, count as usize)?;
                }
                let first = weight.0 as usize;
                let experts: Vec<_> = (first..first + count as usize).map(|id| weights.matrix(id)).collect();
                let stride = self.width(out.buffer);
                let blocks = self.blocks_of_experts(weights, weight, count).map(|_| {
                    let blocks = experts.iter().filter_map(|matrix| match matrix {
                        Matrix::Blocks(rows) => Some(*rows),
                        Matrix::Plain(_) => None,
                    });
                    blocks.collect::<Vec<_>>()
                });
                if let Some(matrix) = blocks.as_ref().and_then(|blocks| blocks.first()).filter(|_| part.start == 0) {
                    let kernels = &*self.backend.kernels;
                    let together = self.gathered.groups.iter().map(|group| group.rows.len()).max().unwrap_or(0);
                    self.rounded.round(&mut self.pool, kernels, matrix.shape(), &self.gathered.x, together)?;
                }
                let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
                let to = &mut output[out.offset as usize..];
                let result = match blocks {
                    Some(blocks) => integer::matmul(
                        &mut self.pool,
                        &self.workers,
                        &*self.backend.kernels,
                        &self.rounded.inputs(),
                        &blocks,
                        &self.gathered.groups,
                        part,
                        integer::Target {
                            out: to,
                            stride,
                            bias: None,
                            accumulate: false,
                            order: Some(&self.gathered.order),
                        },
                    ),
                    None => matmul::experts(
                        &mut self.pool,
                        &self.scratch,
                        &*self.backend.kernels,
                        &experts,
                        &self.gathered.groups,
                        &self.gathered.order,
                        part,
                        &self.gathered.x,
                        to,
                        stride,
                    ),
                };
                self.buffers[out.buffer.0 as usize] = output;
                result
            }
            Op::Combine { x, routes, out } => {
                let (width, top_k) = (self.width(out), self.per_token(x));
                let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
                for t in part {
                    let route = &self.buffers[routes.0 as usize][2 * top_k * t..][..top_k];
                    let rows = &self.buffers[x.0 as usize][top_k * width * t..][..top_k * width];
                    for (&weight, row) in route.iter().zip(rows.chunks_exact(width)) {
                        self.backend.kernels.axpy(weight, row, &mut output[width * t..][..width]);
                    }
                }
                self.buffers[out.0 as usize] = output;
                Ok(())
            }
            Op::Gate { x, gate } => {
                let width = self.width(x);
                let mut output = std::mem::take(&mut self.buffers[x.0 as usize]);
                for t in part {
                    let factor = 1.0 / (1.0 + (-self.buffers[gate.0 as usize][t]).exp());
                    output[width * t..][..width].iter_mut().for_each(|v| *v *= factor);
                }
                self.buffers[x.0 as usize] = output;
                Ok(())
            }
            Op::Scale { x, scale, cap, .. } => {
                let width = self.width(x);
                for value in &mut self.buffers[x.0 as usize][part.start * width..part.end * width] {
                    *value = softcap(*value * scale, cap);
                }
                Ok(())
            }
            Op::Arrange { x, order, factors, out, rows } => {
                let first = self.rows(rows).start;
                let [order, factors] = [order, factors].map(|id| id.and_then(|id| weights.plain(id.0 as usize)));
                self.arrange(x, order, factors, out, first, part)
            }
        }
    }

    fn embed(&mut self, table: Matrix<'_>, out: BufferId, scale: f32, part: Range<usize>) -> Result<()> {
        let width = self.width(out);
        let backend = Arc::clone(&self.backend);
        if table.dims().1 != width {
            return Err(mismatch("a table of this width"));
        }
        let rows = self.buffers[out.0 as usize].chunks_exact_mut(width).skip(part.start);
        for (&token, out) in self.cursor.tokens[part].iter().zip(rows) {
            matmul::expand(&*backend.kernels, table, token as usize, 0, out);
            if scale != 1.0 {
                out.iter_mut().for_each(|v| *v *= scale);
            }
        }
        Ok(())
    }

    /// Whether products read a table of embeddings as it is stored.
    fn is_multiplied(&self, weights: &Weights, table: WeightId) -> bool {
        let is_head = self.program.ops.iter().any(|op| matches!(op, Op::Linear { weight, .. } if *weight == table));
        is_head && matches!(self.way(weights, table, self.program.logits), Way::Single)
    }

    /// [`Op::Route`] of the tokens `part`.
    fn route(&mut self, logits: BufferId, routes: BufferId, top_k: usize, renormalise: bool, part: Range<usize>) {
        let experts = self.width(logits);
        let mut output = std::mem::take(&mut self.buffers[routes.0 as usize]);
        for t in part {
            let logits = &self.buffers[logits.0 as usize][experts * t..][..experts];
            let (weights, numbers) = output[2 * top_k * t..][..2 * top_k].split_at_mut(top_k);
            let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let all: f32 = logits.iter().map(|l| (l - largest).exp()).sum();
            let mut last = (f32::INFINITY, 0);
            for (weight, number) in weights.iter_mut().zip(&mut *numbers) {
                // The next one in the order of falling logits, then of rising numbers.
                let after = |&(i, l): &(usize, &f32)| *l < last.0 || *l == last.0 && i > last.1;
                let behind = logits.iter().enumerate().filter(after);
                let best = behind.reduce(|a, b| if b.1 > a.1 { b } else { a });
                let (i, &logit) = best.unwrap_or((0, &f32::NEG_INFINITY));
                last = (logit, i);
                (*weight, *number) = ((logit - largest).exp() / all, i as f32);
            }
            if renormalise {
                let sum: f32 = weights.iter().sum();
                weights.iter_mut().for_each(|weight| *weight /= sum);
            }
        }
        self.buffers[routes.0 as usize] = output;
    }

    /// Brings the rows that go through the same expert together.
    fn gather(&mut self, x: BufferId, routes: BufferId, count: usize) -> Result<()> {
        let (width, per_token) = (self.width(x), self.per_token(x));
        let top_k = self.width(routes) / 2;
        let n_tokens = self.cursor.tokens.len();
        let pairs = n_tokens * top_k;
        let routes = &self.buffers[routes.0 as usize];
        let expert = |pair: usize| routes[2 * top_k * (pair / top_k) + top_k + pair % top_k] as usize;
        let gathered = &mut self.gathered;
        gathered.order.clear();
        gathered.order.extend(0..pairs);
        gathered.order.sort_by_key(|&pair| expert(pair));
        gathered.groups.clear();
        gathered.x.clear();
        for (i, &pair) in gathered.order.iter().enumerate() {
            match gathered.groups.last_mut() {
                // Without NaN among the logits a token goes through an expert once; with it, rows still fit the scratch.
                Some(group) if group.expert == expert(pair) && group.rows.len() < n_tokens => group.rows.end = i + 1,
                _ => gathered.groups.push(matmul::Group { expert: expert(pair).min(count - 1), rows: i..i + 1 }),
            }
            let row = if per_token == 1 { pair / top_k } else { pair };
            gathered.x.extend_from_slice(&self.buffers[x.0 as usize][row * width..][..width]);
        }
        Ok(())
    }

    /// [`Op::Norm`] of the rows `part`, counted from row `first` of the input.
    fn norm(&mut self, weights: &Weights, op: &Op, first: usize, part: Range<usize>) -> Result<()> {
        let Op::Norm { kind, x, weight, bias, out, dim, segments, eps, accumulate, .. } = *op else {
            return Err(mismatch("a norm"));
        };
        let dim = dim as usize;
        let (x_width, out_width) = (self.width(x.buffer), self.width(out.buffer));
        let in_place = x.buffer == out.buffer;
        if in_place && first != 0 {
            return Err(mismatch("a norm of all rows where it is in place"));
        }
        let vector = |id| vector(weights, id);
        let (weight, bias) = (vector(weight)?, bias.map(vector).transpose()?);
        let own_weights = weight.len() > dim;
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        let (source, kernels, scratch) = (&self.buffers[x.buffer.0 as usize], &*self.backend.kernels, &self.scratch);
        let rows = Parts::new(&mut output);
        let tasks = self.pool.tasks(part.len(), dim * segments as usize);
        self.pool.run(tasks, &|task, worker| {
            let mut scratch = scratch[worker].lock().unwrap_or_else(|e| e.into_inner());
            let run = &mut scratch.weights[..dim];
            for to in part.start + part.len() * task / tasks..part.start + part.len() * (task + 1) / tasks {
                // SAFETY: rows are dealt to tasks without overlap.
                let output = unsafe { rows.part(to * out_width, out_width) };
                for segment in 0..segments as usize {
                    let x_at = x.offset as usize + segment * dim;
                    // In place, input and output have the same rows.
                    run.copy_from_slice(match in_place {
                        true => &output[x_at..x_at + dim],
                        false => &source[(first + to) * x_width + x_at..][..dim],
                    });
                    if kind == NormKind::Layer {
                        let mean = run.iter().sum::<f32>() / dim as f32;
                        run.iter_mut().for_each(|v| *v -= mean);
                    }
                    let mean = kernels.dot(run, run) / dim as f32;
                    let factor = 1.0 / (mean + eps).sqrt();
                    let weight = if own_weights { &weight[segment * dim..] } else { weight };
                    run.iter_mut().zip(weight).for_each(|(v, w)| *v = *v * factor * w);
                    if let Some(bias) = bias {
                        run.iter_mut().zip(bias).for_each(|(v, b)| *v += b);
                    }
                    let out = &mut output[out.offset as usize + segment * dim..][..dim];
                    match accumulate {
                        true => out.iter_mut().zip(&*run).for_each(|(out, v)| *out += v),
                        false => out.copy_from_slice(run),
                    }
                }
            }
        });
        self.buffers[out.buffer.0 as usize] = output;
        Ok(())
    }

    /// How the product of an operation that writes to `out` is computed.
    pub(super) fn way(&self, weights: &Weights, weight: WeightId, out: BufferId) -> Way {
        if self.config.exact {
            return Way::Single;
        }
        match weights.matrix(weight.0 as usize) {
            Matrix::Blocks(rows) => Way::Blocks(*rows.shape()),
            Matrix::Plain(_) if out == self.program.logits => {
                weights.rounded(weight.0 as usize).map_or(Way::Single, |rows| Way::Rounded(*rows.shape()))
            }
            Matrix::Plain(_) => Way::Single,
        }
    }

    /// Blocks of each of the matrices if all of them are multiplied with in integers.
    pub(super) fn blocks_of_experts(&self, weights: &Weights, first: WeightId, count: u32) -> Option<usize> {
        let mut shapes = (first.0..first.0 + count).map(|id| match weights.matrix(id as usize) {
            Matrix::Blocks(rows) if !self.config.exact => Some(rows.shape().blocks()),
            _ => None,
        });
        shapes.try_fold(0, |_, blocks| blocks)
    }

    /// Multiplies rows of a buffer with the units `part` of a matrix.
    fn linear(
        &mut self,
        weights: &Weights,
        (x, rows): (BufferId, Range<usize>),
        weight: WeightId,
        (out, bias, accumulate): (Span, Option<&[f32]>, bool),
        part: Range<usize>,
    ) -> Result<()> {
        let (x_width, stride) = (self.width(x), self.width(out.buffer));
        let backend = Arc::clone(&self.backend);
        let kernels = &*backend.kernels;
        let id = weight.0 as usize;
        let blocks = match (self.way(weights, weight, out.buffer), weights.matrix(id)) {
            (Way::Blocks(_), Matrix::Blocks(rows)) => Some(rows),
            (Way::Rounded(_), _) => weights.rounded(id),
            _ => None,
        };
        // An operation may not read what it writes.
        let mut output = std::mem::take(&mut self.buffers[out.buffer.0 as usize]);
        let to = &mut output[out.offset as usize..];
        let input = &self.buffers[x.0 as usize][rows.start * x_width..rows.end * x_width];
        let result = match blocks {
            Some(matrix) => {
                let begun = match part.start {
                    0 => self.rounded.round(&mut self.pool, kernels, matrix.shape(), input, rows.len()),
                    _ => Ok(()),
                };
                begun.and_then(|()| {
                    integer::matmul(
                        &mut self.pool,
                        &self.workers,
                        kernels,
                        &self.rounded.inputs(),
                        &[matrix],
                        &[matmul::Group { expert: 0, rows: 0..rows.len() }],
                        part,
                        integer::Target { out: to, stride, bias, accumulate, order: None },
                    )
                })
            }
            None => matmul::matmul(
                &mut self.pool,
                &self.scratch,
                kernels,
                weights.matrix(id),
                part,
                input,
                rows.len(),
                bias,
                accumulate,
                to,
                stride,
            ),
        };
        self.buffers[out.buffer.0 as usize] = output;
        result
    }

    fn arrange(
        &mut self,
        x: BufferId,
        order: Option<&Weight>,
        factors: Option<&Weight>,
        out: BufferId,
        first: usize,
        part: Range<usize>,
    ) -> Result<()> {
        let (x_width, width) = (self.width(x), self.width(out));
        let order = match order {
            None => None,
            Some(Weight::Order(order)) if order.len() == width && order.iter().all(|&i| (i as usize) < x_width) => {
                Some(order)
            }
            Some(_) => return Err(mismatch("an order of the input columns")),
        };
        let factors = match factors {
            None => None,
            Some(Weight::Vector(factors)) if factors.len() == width => Some(factors),
            Some(_) => return Err(mismatch("a factor for every column")),
        };
        let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
        for to in part {
            let x = &self.buffers[x.0 as usize][(first + to) * x_width..][..x_width];
            let out = &mut output[to * width..][..width];
            match order {
                Some(order) => out.iter_mut().zip(order).for_each(|(out, &i)| *out = x[i as usize]),
                None => out.copy_from_slice(&x[..width]),
            }
            if let Some(factors) = factors {
                out.iter_mut().zip(factors).for_each(|(out, factor)| *out *= factor);
            }
        }
        self.buffers[out.0 as usize] = output;
        Ok(())
    }

    fn glu(&mut self, x: BufferId, out: BufferId, activation: Activation, part: Range<usize>) {
        let width = self.width(out);
        let mut output = std::mem::take(&mut self.buffers[out.0 as usize]);
        let input = &self.buffers[x.0 as usize][part.start * 2 * width..part.end * 2 * width];
        let to = Parts::new(&mut output[part.start * width..part.end * width]);
        let (rows, kernels) = (part.len(), &*self.backend.kernels);
        let tasks = self.pool.tasks(rows, 4 * width);
        self.pool.run(tasks, &|task, _| {
            for row in rows * task / tasks..rows * (task + 1) / tasks {
                // SAFETY: rows are dealt to tasks without overlap.
                let out = unsafe { to.part(row * width, width) };
                let (gate, up) = input[row * 2 * width..][..2 * width].split_at(width);
                match activation {
                    Activation::Silu => kernels.silu(gate, up, out),
                    Activation::GeluTanh => kernels.gelu_tanh(gate, up, out),
                    Activation::Gelu => {
                        for ((&g, u), out) in gate.iter().zip(up).zip(out) {
                            *out = 0.5 * g * (1.0 + erf(g * std::f32::consts::FRAC_1_SQRT_2)) * u;
                        }
                    }
                }
            }
        });
        self.buffers[out.0 as usize] = output;
    }
}

/// The error function by Abramowitz and Stegun 7.1.26: at most 1.5e-7 off.
fn erf(v: f32) -> f32 {
    let t = 1.0 / (1.0 + 0.327_591_1 * v.abs());
    let coefficients = [1.061_405_4, -1.453_152, 1.421_413_7, -0.284_496_74, 0.254_829_6];
    let poly = coefficients.iter().fold(0.0, |sum, c| (sum + c) * t);
    v.signum() * (1.0 - poly * (-v * v).exp())
}
