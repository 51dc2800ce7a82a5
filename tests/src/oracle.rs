//! A naive interpretation of a [`Program`]: every operation as its documentation spells it, in f64 where it sums.
//! Slow and obvious on purpose; backends are compared with it.

use awqua::backend::{Activation, BufferId, KvType, LogitsRows, NormKind, Op, Program, Rows, Span};
use awqua::tensor::{DenseType, PackedMatrix, W4Matrix, Weight};
use half::f16;

/// What a dequantised 4-bit weight is rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dequantised {
    /// To half precision, the definition of the format.
    Half,
    /// Not rounded, as kernels do that apply scales to sums.
    Exact,
}

/// The state of one session: activations, KV cache and rotary tables.
pub struct Oracle<'a> {
    program: &'a Program,
    weights: Vec<Vec<f32>>,
    context: usize,
    kv: KvType,
    buffers: Vec<Vec<f32>>,
    /// A layer: (kv_heads, context, head_dim).
    keys: Vec<Vec<f32>>,
    values: Vec<Vec<f32>>,
    rope: Vec<Vec<f32>>,
    logits_rows: usize,
}

impl<'a> Oracle<'a> {
    /// A session with an empty cache of `context` positions whose elements are rounded to `kv`.
    pub fn new(program: &'a Program, weights: &[Weight], context: usize, kv: KvType, w4: Dequantised) -> Self {
        let shape = program.attention;
        let cache =
            vec![vec![0.0; shape.kv_heads as usize * context * shape.head_dim as usize]; program.layers as usize];
        Self {
            program,
            weights: weights.iter().map(|weight| widen(weight, w4)).collect(),
            context,
            kv,
            buffers: vec![Vec::new(); program.buffers.len()],
            keys: cache.clone(),
            values: cache,
            rope: vec![vec![0.0; context * shape.rotary_dim as usize]; program.rope_tables as usize],
            logits_rows: 0,
        }
    }

    /// As `Runner::write_rope`.
    pub fn write_rope(&mut self, table: usize, first: usize, rows: &[f32]) {
        let at = first * self.program.attention.rotary_dim as usize;
        self.rope[table][at..at + rows.len()].copy_from_slice(rows);
    }

    /// As `Runner::run`; returns the logits rows.
    pub fn run(&mut self, tokens: &[u32], position: usize, logits: LogitsRows) -> Vec<f32> {
        let range = logits.range(tokens.len());
        self.logits_rows = range.len();
        for (desc, buffer) in self.program.buffers.iter().zip(&mut self.buffers) {
            buffer.resize(tokens.len() * (desc.width * desc.per_token) as usize, 0.0);
        }
        for op in &self.program.ops {
            self.op(op, tokens, position, range.clone());
        }
        let width = self.width(self.program.logits);
        self.buffers[self.program.logits.0 as usize][..range.len() * width].to_vec()
    }

    fn width(&self, id: BufferId) -> usize {
        self.program.buffers[id.0 as usize].width as usize
    }

    fn row(&self, span: Span, row: usize, len: usize) -> Vec<f32> {
        let at = row * self.width(span.buffer) + span.offset as usize;
        self.buffers[span.buffer.0 as usize][at..at + len].to_vec()
    }

    fn put(&mut self, span: Span, row: usize, values: &[f32]) {
        let at = row * self.width(span.buffer) + span.offset as usize;
        self.buffers[span.buffer.0 as usize][at..at + values.len()].copy_from_slice(values);
    }

    /// Pairs of (input row, output row).
    fn rows(&self, rows: Rows, n_tokens: usize, logits: &std::ops::Range<usize>) -> Vec<(usize, usize)> {
        match rows {
            Rows::All => (0..n_tokens).map(|t| (t, t)).collect(),
            Rows::Logits => logits.clone().enumerate().map(|(out, x)| (x, out)).collect(),
            Rows::Compacted => (0..logits.len()).map(|t| (t, t)).collect(),
        }
    }

    fn op(&mut self, op: &Op, tokens: &[u32], position: usize, logits: std::ops::Range<usize>) {
        let shape = self.program.attention;
        let (heads, kv_heads) = (shape.heads as usize, shape.kv_heads as usize);
        let dim = shape.head_dim as usize;
        match *op {
            Op::Embed { table, out, scale } => {
                let width = self.width(out);
                for (t, &token) in tokens.iter().enumerate() {
                    let row = &self.weights[table.0 as usize][token as usize * width..][..width];
                    let row: Vec<f32> = row.iter().map(|v| v * scale).collect();
                    self.put(out.into(), t, &row);
                }
            }
            Op::Norm { kind, x, weight, bias, out, dim, segments, eps, accumulate, rows } => {
                for (from, to) in self.rows(rows, tokens.len(), &logits) {
                    for segment in 0..segments {
                        let shift = |s: Span| Span { offset: s.offset + segment * dim, ..s };
                        let values: Vec<f64> =
                            self.row(shift(x), from, dim as usize).into_iter().map(f64::from).collect();
                        let mean = values.iter().sum::<f64>() / f64::from(dim);
                        let center = if kind == NormKind::Layer { mean } else { 0.0 };
                        let squares = values.iter().map(|v| (v - center).powi(2)).sum::<f64>() / f64::from(dim);
                        let scale = 1.0 / (squares + f64::from(eps)).sqrt();
                        let weight = &self.weights[weight.0 as usize];
                        let own = if weight.len() > dim as usize { (segment * dim) as usize } else { 0 };
                        let mut result = self.row(shift(out), to, dim as usize);
                        for (i, r) in result.iter_mut().enumerate() {
                            let mut v = (values[i] - center) * scale * f64::from(weight[own + i]);
                            v += bias.map_or(0.0, |b| f64::from(self.weights[b.0 as usize][i]));
                            *r = if accumulate { *r } else { 0.0 } + v as f32;
                        }
                        self.put(shift(out), to, &result);
                    }
                }
            }
            Op::Linear { x, weight, bias, out, accumulate, rows } => {
                let k = self.width(x);
                let n = self.weights[weight.0 as usize].len() / k;
                for (from, to) in self.rows(rows, tokens.len(), &logits) {
                    let input = self.row(x.into(), from, k);
                    let mut result = if accumulate { self.row(out, to, n) } else { vec![0.0; n] };
                    for (i, (r, w)) in result.iter_mut().zip(self.weights[weight.0 as usize].chunks(k)).enumerate() {
                        let mut sum: f64 = w.iter().zip(&input).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum();
                        sum += bias.map_or(0.0, |b| f64::from(self.weights[b.0 as usize][i]));
                        *r += sum as f32;
                    }
                    self.put(out, to, &result);
                }
            }
            Op::RopeAppend { qkv, layer, rope } => {
                for t in 0..tokens.len() {
                    let mut row = self.row(qkv.into(), t, (heads + 2 * kv_heads) * dim);
                    if let Some(table) = rope {
                        for head in row[..(heads + kv_heads) * dim].chunks_mut(dim) {
                            self.rotate(head, table as usize, position + t);
                        }
                    }
                    self.put(qkv.into(), t, &row[..heads * dim]);
                    for h in 0..kv_heads {
                        let at = (h * self.context + position + t) * dim;
                        let caches = [(&mut self.keys, heads + h), (&mut self.values, heads + kv_heads + h)];
                        for (cache, head) in caches {
                            let held = &mut cache[layer as usize][at..at + dim];
                            held.copy_from_slice(&row[head * dim..][..dim]);
                            round(held, self.kv);
                        }
                    }
                }
            }
            Op::Attention { qkv, out, layer, scale, softcap, window } => {
                for t in 0..tokens.len() {
                    let last = position + t;
                    let first = window.map_or(0, |w| (last + 1).saturating_sub(w as usize));
                    let q = self.row(qkv.into(), t, heads * dim);
                    let mut result = vec![0.0; heads * dim];
                    for h in 0..heads {
                        let cache = h / (heads / kv_heads) * self.context;
                        let row = |j: usize| (cache + j) * dim..(cache + j + 1) * dim;
                        let score = |j: usize| {
                            let key = &self.keys[layer as usize][row(j)];
                            let dot = |(a, b): (&f32, &f32)| f64::from(*a) * f64::from(*b);
                            let score = f64::from(scale) * q[h * dim..][..dim].iter().zip(key).map(dot).sum::<f64>();
                            bounded(score, softcap)
                        };
                        let scores: Vec<f64> = (first..=last).map(score).collect();
                        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                        for (j, s) in (first..=last).zip(&scores) {
                            let p = (s - max).exp() / sum;
                            for (r, v) in result[h * dim..][..dim].iter_mut().zip(&self.values[layer as usize][row(j)])
                            {
                                *r += (p * f64::from(*v)) as f32;
                            }
                        }
                    }
                    self.put(out.into(), t, &result);
                }
            }
            Op::Arrange { x, order, factors, out, rows } => {
                let width = self.width(out);
                for (from, to) in self.rows(rows, tokens.len(), &logits) {
                    let row = self.row(x.into(), from, self.width(x));
                    let moved: Vec<f32> = (0..width)
                        .map(|i| {
                            let column = order.map_or(i, |id| self.weights[id.0 as usize][i] as usize);
                            row[column] * factors.map_or(1.0, |id| self.weights[id.0 as usize][i])
                        })
                        .collect();
                    self.put(out.into(), to, &moved);
                }
            }
            Op::Scale { x, scale, cap, rows } => {
                for (from, to) in self.rows(rows, tokens.len(), &logits) {
                    let row = self.row(x.into(), from, self.width(x));
                    let row: Vec<f32> =
                        row.iter().map(|v| bounded(f64::from(*v) * f64::from(scale), cap) as f32).collect();
                    self.put(x.into(), to, &row);
                }
            }
            Op::Route { logits, routes, top_k, renormalise } => {
                for t in 0..tokens.len() {
                    let logits = self.row(logits.into(), t, self.width(logits));
                    let largest = logits.iter().fold(f32::NEG_INFINITY, |m, l| m.max(*l));
                    let exp = |l: f32| (f64::from(l) - f64::from(largest)).exp();
                    let mut best: Vec<usize> = (0..logits.len()).collect();
                    best.sort_by(|a, b| logits[*b].total_cmp(&logits[*a]));
                    best.truncate(top_k as usize);
                    let over = if renormalise { best.clone() } else { (0..logits.len()).collect() };
                    let sum: f64 = over.iter().map(|&i| exp(logits[i])).sum();
                    let weights = best.iter().map(|&i| (exp(logits[i]) / sum) as f32);
                    let row: Vec<f32> = weights.chain(best.iter().map(|&i| i as f32)).collect();
                    self.put(routes.into(), t, &row);
                }
            }
            Op::Experts { x, weight, count, routes, out } => {
                let (k, top_k) = (self.width(x), self.width(routes) / 2);
                let per_token = self.program.buffers[x.0 as usize].per_token as usize;
                for pair in 0..tokens.len() * top_k {
                    let route = self.row(routes.into(), pair / top_k, 2 * top_k);
                    let expert = route[top_k + pair % top_k] as u32;
                    assert!(expert < count);
                    let input = self.row(x.into(), if per_token == 1 { pair / top_k } else { pair }, k);
                    let rows = self.weights[(weight.0 + expert) as usize].chunks(k);
                    let dot = |w: &[f32]| w.iter().zip(&input).map(|(w, x)| f64::from(*w) * f64::from(*x)).sum::<f64>();
                    let result: Vec<f32> = rows.map(|w| dot(w) as f32).collect();
                    self.put(out, pair, &result);
                }
            }
            Op::Combine { x, routes, out } => {
                let (width, top_k) = (self.width(out), self.width(routes) / 2);
                for t in 0..tokens.len() {
                    let route = self.row(routes.into(), t, 2 * top_k);
                    let mut row = self.row(out.into(), t, width);
                    for i in 0..top_k {
                        let part = self.row(x.into(), t * top_k + i, width);
                        row.iter_mut().zip(part).for_each(|(r, v)| *r += route[i] * v);
                    }
                    self.put(out.into(), t, &row);
                }
            }
            Op::Gate { x, gate } => {
                for t in 0..tokens.len() {
                    let factor = 1.0 / (1.0 + (-self.row(gate.into(), t, 1)[0]).exp());
                    let row: Vec<f32> = self.row(x.into(), t, self.width(x)).iter().map(|v| v * factor).collect();
                    self.put(x.into(), t, &row);
                }
            }
            Op::Glu { x, out, activation } => {
                let width = self.width(out);
                for t in 0..tokens.len() * self.program.buffers[x.0 as usize].per_token as usize {
                    let row = self.row(x.into(), t, 2 * width);
                    let activate = |v: f32| activation_of(activation).of(f64::from(v)) as f32;
                    let result: Vec<f32> = (0..width).map(|i| activate(row[i]) * row[width + i]).collect();
                    self.put(out.into(), t, &result);
                }
            }
        }
    }

    fn rotate(&self, head: &mut [f32], table: usize, position: usize) {
        let half = self.program.attention.rotary_dim as usize / 2;
        for i in 0..half {
            let at = (position * half + i) * 2;
            let (cos, sin) = (self.rope[table][at], self.rope[table][at + 1]);
            let (a, b) = (head[i], head[i + half]);
            head[i] = a * cos - b * sin;
            head[i + half] = b * cos + a * sin;
        }
    }
}

fn bounded(value: f64, cap: Option<f32>) -> f64 {
    cap.map_or(value, |cap| f64::from(cap) * (value / f64::from(cap)).tanh())
}

/// The definition that the kernels are tested with.
fn activation_of(activation: Activation) -> awqua_shaders::Activation {
    match activation {
        Activation::Silu => awqua_shaders::Activation::Silu,
        Activation::GeluTanh => awqua_shaders::Activation::GeluTanh,
        Activation::Gelu => awqua_shaders::Activation::Gelu,
    }
}

/// A key or a value as the cache holds it.
fn round(row: &mut [f32], kv: KvType) {
    match kv {
        KvType::F16 => row.iter_mut().for_each(|value| *value = f16::from_f32(*value).to_f32()),
        KvType::F32 => {}
        KvType::Q8 => {
            for group in row.chunks_mut(32) {
                let most = group.iter().fold(0.0f32, |most, value| most.max(value.abs()));
                let scale = f16::from_f32((most / 127.0).min(515.5)).to_f32();
                for value in group.iter_mut().filter(|_| scale > 0.0) {
                    *value = (*value / scale).clamp(-127.0, 127.0).round_ties_even() * scale;
                }
            }
        }
    }
}

fn widen(weight: &Weight, w4: Dequantised) -> Vec<f32> {
    match weight {
        Weight::W4(matrix) => dequantise(matrix, w4),
        Weight::Packed(matrix) if w4 == Dequantised::Exact && matrix.rounding != DenseType::F32 => {
            widen(&Weight::Packed(PackedMatrix { rounding: DenseType::F32, ..matrix.clone() }), w4)
        }
        other => {
            let (n, k) = other.dims();
            let mut rows = vec![0.0; n * k];
            rows.chunks_exact_mut(k).enumerate().for_each(|(i, row)| other.expand_row(i, row));
            rows
        }
    }
}

fn dequantise(matrix: &W4Matrix, rounding: Dequantised) -> Vec<f32> {
    let mut out = Vec::with_capacity(matrix.n * matrix.k);
    for row in 0..matrix.n {
        for column in 0..matrix.k {
            let code = matrix.qweight[(row * matrix.k + column) / 8] >> (4 * (column % 8)) & 15;
            let params = matrix.group_params[row * matrix.groups() + column / matrix.group_size];
            let scale = f16::from_bits(params as u16).to_f32();
            let offset = f16::from_bits((params >> 16) as u16).to_f32();
            out.push(match (rounding, matrix.offset.is_bias()) {
                (Dequantised::Half, _) => matrix.offset.weight(code as u8, scale, offset, matrix.offset.rounding()),
                (Dequantised::Exact, false) => (code as f32 - offset) * scale,
                (Dequantised::Exact, true) => code as f32 * scale + offset,
            });
        }
    }
    out
}
