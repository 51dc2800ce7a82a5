//! Activations rounded to 16 bits.

use super::super::kernels::Kernels;
use super::super::pool::{Parts, Pool};
use super::super::{Zeros, fitting, mismatch};
use super::rows::{BYTE_GROUP, OCTET, Shape};
use super::{PANEL, Panel};
use crate::backend::{Op, Program, RunnerConfig};
use crate::error::Result;

/// Largest magnitude of a rounded activation: both bytes of a code are then at most 127 in magnitude, which lets
/// kernels for bytes compute with `256 * high + low`.
const MAX_CODE: f32 = 127.0 * 256.0 + 127.0;
/// Spans with nothing larger count as zeros, so that no scale is a subnormal number.
const TINY: f32 = 1e-30;

/// How a span is rounded.
pub(super) struct Round {
    /// What a unit of a code is.
    pub(super) scale: f32,
    /// Codes of a unit.
    pub(super) inverse: f32,
}

impl Round {
    /// For a span with the largest magnitude `largest`; `None` if that is all zeros.
    pub(super) fn of(largest: f32) -> Option<Self> {
        let scale = largest / MAX_CODE;
        // NaN is no zero.
        (!matches!(largest.partial_cmp(&TINY), Some(std::cmp::Ordering::Less)))
            .then(|| Self { scale, inverse: 1.0 / scale })
    }
}

/// Rounded rows.
#[derive(Clone, Copy)]
pub(in crate::backend::cpu) struct Inputs<'a> {
    /// Columns.
    pub(in crate::backend::cpu) k: usize,
    /// Columns that share a scale.
    pub(in crate::backend::cpu) span: usize,
    /// (rows, k); an octet's columns in the order 0, 4, 1, 5, 2, 6, 3, 7.
    pub(in crate::backend::cpu) codes: &'a [i16],
    /// The codes of a single row as [`Kernels::split_row`] leaves them, for products that take them so; else nothing.
    pub(in crate::backend::cpu) bytes: &'a [i8],
    /// Whether [`Kernels::split`] made planes of bytes of each span's codes, for products of many rows.
    pub(in crate::backend::cpu) planes: bool,
    /// (rows, k / span)
    pub(in crate::backend::cpu) scales: &'a [f32],
    /// The rounded activations of each span added up, in the same order.
    pub(in crate::backend::cpu) sums: &'a [f32],
}

impl Inputs<'_> {
    /// The rows `rows`.
    pub(super) fn rows(&self, rows: std::ops::Range<usize>) -> Self {
        let (k, spans) = (self.k, self.k / self.span);
        Self {
            bytes: &[],
            codes: &self.codes[rows.start * k..rows.end * k],
            scales: &self.scales[rows.start * spans..rows.end * spans],
            sums: &self.sums[rows.start * spans..rows.end * spans],
            ..*self
        }
    }

    /// # Panics
    /// Unless this is one row for matrices of the shape, with its bytes where `bytes` says that they are needed.
    pub(in crate::backend::cpu) fn check_row(&self, shape: &Shape, bytes: bool) {
        assert!(self.k == shape.k && self.span == shape.span() && self.codes.len() == self.k && !self.planes);
        assert!(self.scales.len() * self.span == self.k && self.sums.len() == self.scales.len());
        assert!(!bytes || self.bytes.len() == 2 * self.k);
    }

    /// # Panics
    /// Unless these are `tokens` rows with the columns of the panel, whose first span is `first`.
    pub(super) fn check_panel(&self, panel: &Panel, first: usize, tokens: usize) {
        assert!(!self.planes && !panel.planes && panel.blocks == 1 && panel.spans * panel.span <= PANEL);
        self.check_spans(panel, first, tokens);
    }

    /// # Panics
    /// Unless these are `tokens` rows in planes with the columns of the panel, whose first span is `first`.
    #[cfg(target_arch = "x86_64")]
    pub(super) fn check_planes(&self, panel: &Panel, first: usize, tokens: usize) {
        assert!(self.planes && panel.planes && panel.blocks * panel.spans * panel.span <= 2 * PANEL);
        self.check_spans(panel, first, tokens);
    }

    fn check_spans(&self, panel: &Panel, first: usize, tokens: usize) {
        assert!(self.span == panel.span && (first + panel.spans) * self.span <= self.k);
        assert!(self.codes.len() == tokens * self.k && self.sums.len() == self.scales.len());
        assert!(self.scales.len() * self.span == self.codes.len());
    }
}

/// Memory for rounded rows.
pub(in crate::backend::cpu) struct Activations {
    rows: usize,
    k: usize,
    span: usize,
    planes: bool,
    codes: Zeros<i16>,
    scales: Zeros<f32>,
    sums: Zeros<f32>,
}

/// Rows and columns of the inputs of a program's products.
fn inputs(program: &Program, config: &RunnerConfig) -> impl Iterator<Item = (u64, u64)> {
    program.ops.iter().filter_map(|op| {
        let (x, rows) = match op {
            Op::Linear { x, .. } => (x, x),
            // An input goes through several experts.
            Op::Experts { x, out, .. } => (x, &out.buffer),
            _ => return None,
        };
        let (x, rows) = (program.buffers.get(x.0 as usize)?, program.buffers.get(rows.0 as usize)?);
        Some((u64::from(rows.rows(config)), u64::from(x.width)))
    })
}

/// Most columns of an input of a program's products.
pub(in crate::backend::cpu) fn columns(program: &Program, config: &RunnerConfig) -> usize {
    inputs(program, config).map(|(_, width)| width as usize).max().unwrap_or(0)
}

/// Codes and spans of the largest inputs of a program's products.
fn capacity(program: &Program, config: &RunnerConfig) -> (u64, u64) {
    if config.exact {
        return (0, 0);
    }
    inputs(program, config).fold((0, 0), |(most_codes, most_spans), (rows, width)| {
        let spans = rows.saturating_mul(width / BYTE_GROUP as u64);
        (most_codes.max(rows.saturating_mul(width)), most_spans.max(spans))
    })
}

/// Bytes of the [`Activations`] of a session.
pub(in crate::backend::cpu) fn bytes(program: &Program, config: &RunnerConfig) -> u64 {
    let (codes, spans) = capacity(program, config);
    codes.saturating_mul(2).saturating_add(spans.saturating_mul(8))
}

impl Activations {
    /// Memory for the inputs of every product of `program`.
    pub(in crate::backend::cpu) fn new(program: &Program, config: &RunnerConfig) -> Result<Self> {
        let what = "rounded activations";
        fitting(usize::try_from(bytes(program, config)).ok(), what)?;
        let (codes, spans) = capacity(program, config);
        Self::with(codes as usize, spans as usize)
    }

    pub(in crate::backend::cpu) fn with(codes: usize, spans: usize) -> Result<Self> {
        let what = "rounded activations";
        let codes = Zeros::new(Some(codes), what)?;
        let (scales, sums) = (Zeros::new(Some(spans), what)?, Zeros::new(Some(spans), what)?);
        Ok(Self { rows: 0, k: 0, span: BYTE_GROUP, planes: false, codes, scales, sums })
    }

    /// Rounds the rows of `x`, (rows, K), for products with matrices of `shape`, each with at most `together` of them.
    pub(in crate::backend::cpu) fn round(
        &mut self,
        pool: &mut Pool,
        kernels: &dyn Kernels,
        shape: &Shape,
        x: &[f32],
        together: usize,
    ) -> Result<()> {
        let (k, span) = (shape.k, shape.span());
        let (rows, spans) = (x.len() / k, k / span);
        if x.len() != rows * k || x.len() > self.codes.len() || rows * spans > self.scales.len() {
            return Err(mismatch(&format!("rows of {k} input features")));
        }
        let planes = kernels.takes_planes(together);
        (self.rows, self.k, self.span, self.planes) = (rows, k, span, planes);
        let (codes, scales, sums) =
            (Parts::new(&mut self.codes), Parts::new(&mut self.scales), Parts::new(&mut self.sums));
        let tasks = pool.tasks(rows, k);
        pool.run(tasks, &|task, _| {
            for row in rows * task / tasks..rows * (task + 1) / tasks {
                // SAFETY: rows are dealt to tasks without overlap.
                let (codes, scales, sums) =
                    unsafe { (codes.part(row * k, k), scales.part(row * spans, spans), sums.part(row * spans, spans)) };
                let x = x[row * k..][..k].chunks_exact(span);
                let parts = x.zip(codes.chunks_exact_mut(span)).zip(scales.iter_mut().zip(sums));
                for ((x, codes), (scale, sum)) in parts {
                    (*scale, *sum) = kernels.round_span(x, codes);
                    if planes {
                        kernels.split(codes);
                    }
                }
            }
        });
        Ok(())
    }

    /// The rows that were rounded last.
    pub(in crate::backend::cpu) fn inputs(&self) -> Inputs<'_> {
        let spans = self.rows * self.k / self.span;
        Inputs {
            k: self.k,
            span: self.span,
            codes: &self.codes[..self.rows * self.k],
            bytes: &[],
            planes: self.planes,
            scales: &self.scales[..spans],
            sums: &self.sums[..spans],
        }
    }
}

/// Where in an octet of rounded activations a column is.
pub(super) const fn place(column: usize) -> usize {
    2 * (column % (OCTET / 2)) + column / (OCTET / 2)
}
