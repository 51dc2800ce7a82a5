//! Passes over several sessions: one product of M rows a matrix, rotation and attention in each member's own cache.

use std::sync::Arc;
use std::time::Duration;

use super::super::weights::Weights;
use super::{Cpu, CpuRunner, attention};
use crate::backend::group::{check_next, own};
use crate::backend::{
    Budget, Group, KvType, LogitsRows, Members, Next, Op, Program, Progress, Runner, RunnerConfig, kv_bytes,
};
use crate::error::{Error, ErrorKind, Result};

/// Activations for the rows of a pass, threads and scratch memory; caches are those of the members.
pub(in super::super) struct CpuGroup {
    /// A runner without caches.
    rows: CpuRunner,
    /// Positions of the members, in order.
    positions: Vec<u32>,
}

impl CpuGroup {
    /// # Errors
    /// As [`crate::backend::Backend::group`].
    pub(in super::super) fn new(backend: Arc<Cpu>, program: &Program, config: &RunnerConfig) -> Result<Self> {
        let program = Arc::new(Program { layers: 0, rope_tables: 0, ..program.clone() });
        let config = RunnerConfig { max_logits_rows: config.max_tokens, ..config.clone() };
        debug_assert_eq!(kv_bytes(&program, KvType::F32, config.context), 0);
        let positions = Vec::with_capacity(config.max_tokens as usize);
        Ok(Self { rows: CpuRunner::new(backend, program, &config)?, positions })
    }

    fn accepts(&self, runner: &CpuRunner) -> bool {
        let (own, other) = (&self.rows.config, &runner.config);
        Arc::ptr_eq(&self.rows.backend, &runner.backend) && own.exact == other.exact && other.context <= own.context
    }
}

/// Computes the units `part` of an operation whose rows belong to members with caches of their own.
fn run_op(
    rows: &mut CpuRunner,
    members: &mut dyn Members,
    positions: &[u32],
    weights: &Weights,
    op: &Op,
    part: std::ops::Range<usize>,
) -> Result<()> {
    let shape = rows.program.attention;
    match *op {
        Op::RopeAppend { qkv, layer, rope } => {
            let width = rows.width(qkv);
            for row in part {
                let member = members.runner(row).and_then(own::<CpuRunner>)?;
                attention::rope_append(
                    &mut rows.pool,
                    &mut rows.buffers[qkv.0 as usize][row * width..][..width],
                    width,
                    &mut member.caches[layer as usize],
                    rope.map(|table| &member.ropes[table as usize][..]),
                    &shape,
                    positions[row] as usize,
                    &*rows.backend.kernels,
                );
            }
        }
        Op::Attention { qkv, out, layer, scale, softcap, window } => {
            let (qkv_width, out_width) = (rows.width(qkv), rows.width(out));
            let kv_heads = shape.kv_heads as usize;
            let mut output = std::mem::take(&mut rows.buffers[out.0 as usize]);
            let mut next = part.start;
            let mut done = Ok(());
            'units: while next < part.end {
                // Units are heads of a few rows.
                let first = next / kv_heads * attention::TOKENS;
                let heads = next % kv_heads..kv_heads.min(next % kv_heads + part.end - next);
                next += heads.len();
                for row in first..positions.len().min(first + attention::TOKENS) {
                    let member = match members.runner(row).and_then(own::<CpuRunner>) {
                        Ok(member) => member,
                        Err(error) => {
                            done = Err(error);
                            break 'units;
                        }
                    };
                    let inputs = attention::Inputs {
                        qkv: &rows.buffers[qkv.0 as usize][row * qkv_width..][..qkv_width],
                        qkv_width,
                        cache: &member.caches[layer as usize],
                        shape,
                        position: positions[row] as usize,
                        n_tokens: 1,
                        scale,
                        softcap,
                        window: window.map_or(usize::MAX, |window| window as usize),
                    };
                    let splits = attention::units(&shape, inputs.position, 1, inputs.window) / kv_heads;
                    attention::attention(
                        &mut rows.pool,
                        &rows.scratch,
                        &*rows.backend.kernels,
                        &inputs,
                        &mut rows.partials,
                        heads.start * splits..heads.end * splits,
                        &mut output[row * out_width..][..out_width],
                    );
                }
            }
            rows.buffers[out.0 as usize] = output;
            return done;
        }
        _ => rows.run_op(weights, op, part)?,
    }
    Ok(())
}

impl Group for CpuGroup {
    fn most(&self) -> usize {
        self.rows.config.max_tokens as usize
    }

    fn takes(&self, runner: &dyn Runner) -> bool {
        (runner as &dyn std::any::Any).downcast_ref().is_some_and(|runner| self.accepts(runner))
    }

    fn join(&mut self, runner: &mut dyn Runner, next: &Next<'_>, position: u32) -> Result<bool> {
        let invalid = |message: &str| Err(Error::new(ErrorKind::InvalidInput, message));
        let member = own::<CpuRunner>(runner)?;
        let Next::Token(token) = *next else { return Ok(false) };
        if !self.accepts(member) {
            return invalid("the session has other capacities than the pass");
        }
        let cursor = &self.rows.cursor;
        let has_begun = !self.positions.is_empty() && (cursor.op, cursor.unit) != (0, 0);
        if has_begun || self.positions.len() == self.most() {
            return invalid("the pass has begun or is full");
        }
        check_next(next, position, &self.rows.program, &member.config)?;
        member.abandon();
        member.logits_rows = 0;
        member.caches.iter_mut().for_each(|cache| cache.truncate(position as usize));
        let cursor = &mut self.rows.cursor;
        if self.positions.is_empty() {
            cursor.tokens.clear();
            cursor.position = 0;
            (cursor.op, cursor.unit) = (0, 0);
        }
        cursor.tokens.push(token);
        // For estimates of the work.
        cursor.position = cursor.position.max(position);
        cursor.logits = LogitsRows::All;
        self.positions.push(position);
        Ok(true)
    }

    fn advance(&mut self, members: &mut dyn Members, budget: &Budget) -> Result<Progress> {
        if self.positions.is_empty() {
            return Ok(Progress::Done);
        }
        let positions = &self.positions;
        let progress = self
            .rows
            .advance_by(budget, &mut |rows, weights, op, part| run_op(rows, members, positions, weights, op, part))?;
        if progress == Progress::Done {
            let logits = self.rows.program.logits;
            let hidden = self.rows.program.last_hidden().ok();
            for row in 0..self.positions.len() {
                let member = members.runner(row).and_then(own::<CpuRunner>)?;
                for buffer in [Some(logits), hidden].into_iter().flatten() {
                    let width = self.rows.width(buffer);
                    let from = &self.rows.buffers[buffer.0 as usize][row * width..][..width];
                    member.buffers[buffer.0 as usize][..width].copy_from_slice(from);
                }
                member.cursor.logits = LogitsRows::Last;
                member.logits_rows = 1;
            }
            self.positions.clear();
        }
        Ok(progress)
    }

    fn abandon(&mut self) {
        self.rows.abandon();
        self.positions.clear();
    }

    fn wait(&mut self) -> Result<()> {
        Ok(())
    }

    fn queued(&mut self) -> Result<Duration> {
        Ok(Duration::ZERO)
    }

    fn bytes(&self) -> u64 {
        self.rows.bytes()
    }
}
