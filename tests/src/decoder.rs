//! Small decoders with random weights, as programs and weights in the order of their ids: what backends are compared on.
#![allow(missing_docs, reason = "shapes of test data")]

use std::sync::Arc;

use awqua::backend::{
    Activation, AttentionShape, Backend, BufferDesc, BufferId, KvType, LogitsRows, NormKind, Op, Program, Rows, Runner,
    RunnerConfig, Span, WeightId,
};
use awqua::tensor::{Bytes, DenseMatrix, DenseType, Offset, W4Matrix, Weight};
use half::{bf16, f16};

/// Positions that the steps of [`STEPS`] need.
pub const CONTEXT: u32 = 160;
/// Most tokens of one of them.
pub const MAX_TOKENS: u32 = 40;

/// Shapes of a small decoder.
#[derive(Debug, Clone)]
pub struct Case {
    pub name: &'static str,
    pub hidden: usize,
    pub ffn: usize,
    pub vocab: usize,
    pub layers: u32,
    pub shape: AttentionShape,
    pub qk_norm: bool,
    pub bias: bool,
    pub style: Style,
    pub window: Option<u32>,
    /// Rotary tables; layer i uses table i modulo this, no rotation at 0.
    pub rope_tables: u32,
    pub projections: Projection,
    pub embedding: DenseType,
    pub head: Projection,
    pub kv: KvType,
}

/// What differs between families of decoders.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Style {
    /// Norms in front, SiLU.
    Llama,
    /// Norms in front and behind, GELU, factors, bounded scores.
    Gemma,
    /// Layer norms, of heads with weights of their own, attention and MLP side by side.
    StableLm,
    /// Norms behind, of all heads together.
    Olmo,
    /// Of as many experts as given, three for a token.
    Experts(u32),
}

/// How the projections are stored.
#[derive(Debug, Clone, Copy)]
pub enum Projection {
    /// Group size 0 is one group a row.
    W4 {
        group_size: usize,
        offset: Offset,
    },
    Dense(DenseType),
}

pub fn cases() -> Vec<Case> {
    let w4 = |group_size, offset| Projection::W4 { group_size, offset };
    let shape = |heads, kv_heads, head_dim, rotary_dim| AttentionShape { heads, kv_heads, head_dim, rotary_dim };
    vec![
        Case {
            name: "grouped queries, zero points",
            hidden: 64,
            ffn: 96,
            vocab: 300,
            layers: 2,
            shape: shape(4, 2, 16, 16),
            qk_norm: false,
            bias: true,
            style: Style::Llama,
            window: None,
            rope_tables: 1,
            projections: w4(32, Offset::Zero),
            embedding: DenseType::F16,
            head: Projection::Dense(DenseType::F16),
            kv: KvType::F16,
        },
        Case {
            name: "odd widths, window, norms per head",
            hidden: 40,
            ffn: 72,
            vocab: 301,
            layers: 2,
            shape: shape(6, 2, 12, 8),
            qk_norm: true,
            bias: false,
            style: Style::Llama,
            window: Some(5),
            rope_tables: 2,
            projections: w4(8, Offset::Bias),
            embedding: DenseType::BF16,
            head: w4(8, Offset::Bias),
            kv: KvType::F32,
        },
        Case {
            name: "dense half precision with odd rows",
            hidden: 37,
            ffn: 45,
            vocab: 129,
            layers: 1,
            shape: shape(3, 1, 10, 10),
            qk_norm: true,
            bias: true,
            style: Style::Llama,
            window: None,
            rope_tables: 0,
            projections: Projection::Dense(DenseType::F16),
            embedding: DenseType::F32,
            head: Projection::Dense(DenseType::F32),
            kv: KvType::F16,
        },
        Case {
            name: "dense bfloat16, one head",
            hidden: 33,
            ffn: 50,
            vocab: 77,
            layers: 2,
            shape: shape(1, 1, 32, 16),
            qk_norm: false,
            bias: false,
            style: Style::Llama,
            window: Some(200),
            rope_tables: 1,
            projections: Projection::Dense(DenseType::BF16),
            embedding: DenseType::BF16,
            head: Projection::Dense(DenseType::BF16),
            kv: KvType::F32,
        },
        Case {
            name: "wide heads, one group a row",
            hidden: 48,
            ffn: 64,
            vocab: 100,
            layers: 1,
            shape: shape(2, 1, 128, 128),
            qk_norm: false,
            bias: true,
            style: Style::Llama,
            window: None,
            rope_tables: 1,
            projections: w4(0, Offset::Zero),
            embedding: DenseType::F32,
            head: w4(0, Offset::Zero),
            kv: KvType::F16,
        },
        Case {
            name: "norms behind, bounded scores",
            hidden: 96,
            ffn: 128,
            vocab: 200,
            layers: 2,
            shape: shape(4, 2, 32, 32),
            qk_norm: true,
            bias: false,
            style: Style::Gemma,
            window: Some(9),
            rope_tables: 2,
            projections: w4(32, Offset::Zero),
            embedding: DenseType::BF16,
            head: Projection::Dense(DenseType::BF16),
            kv: KvType::F16,
        },
        Case {
            name: "layer norms side by side",
            hidden: 64,
            ffn: 96,
            vocab: 200,
            layers: 2,
            shape: shape(4, 4, 16, 4),
            qk_norm: true,
            bias: true,
            style: Style::StableLm,
            window: None,
            rope_tables: 1,
            projections: w4(32, Offset::Zero),
            embedding: DenseType::F16,
            head: w4(32, Offset::Zero),
            kv: KvType::F32,
        },
        Case {
            name: "packed experts",
            hidden: 64,
            ffn: 40,
            vocab: 200,
            layers: 2,
            shape: shape(4, 2, 16, 16),
            qk_norm: false,
            bias: false,
            style: Style::Experts(5),
            window: None,
            rope_tables: 1,
            projections: w4(8, Offset::Zero),
            embedding: DenseType::F16,
            head: Projection::Dense(DenseType::F16),
            kv: KvType::F16,
        },
        Case {
            name: "dense experts",
            hidden: 50,
            ffn: 33,
            vocab: 150,
            layers: 1,
            shape: shape(2, 1, 16, 16),
            qk_norm: false,
            bias: false,
            style: Style::Experts(7),
            window: None,
            rope_tables: 1,
            projections: Projection::Dense(DenseType::BF16),
            embedding: DenseType::F16,
            head: Projection::Dense(DenseType::F16),
            kv: KvType::F32,
        },
        Case {
            name: "norms behind only",
            hidden: 64,
            ffn: 128,
            vocab: 200,
            layers: 2,
            shape: shape(4, 1, 16, 16),
            qk_norm: true,
            bias: false,
            style: Style::Olmo,
            window: None,
            rope_tables: 1,
            projections: w4(64, Offset::Bias),
            embedding: DenseType::F16,
            head: Projection::Dense(DenseType::F16),
            kv: KvType::F16,
        },
    ]
}

/// xorshift64*, enough for test data.
pub struct Rng(pub u64);

impl Rng {
    pub fn word(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    /// Uniform in [-scale, scale).
    pub fn value(&mut self, scale: f32) -> f32 {
        (self.word() as f32 / 2_147_483_648.0 - 1.0) * scale
    }

    pub fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.value(scale)).collect()
    }
}

/// A program with its weights in the order of their ids.
pub struct Model {
    pub program: Arc<Program>,
    pub weights: Vec<Weight>,
    /// First and number of matrices of experts.
    pub stacks: Vec<(u32, u32)>,
}

impl Model {
    /// Brings the weights to `backend`, those of experts in stacks.
    ///
    /// # Panics
    /// If one does not fit, or gets another id than its number.
    pub fn upload(&self, backend: &mut dyn Backend) {
        for (i, weight) in self.weights.iter().enumerate() {
            let name = format!("weight {i}");
            let stack = self.stacks.iter().find(|(first, count)| (*first..first + count).contains(&(i as u32)));
            let id = match stack {
                Some(&(first, count)) => {
                    let index = i - first as usize;
                    let id = backend.reserve_in_stack(&name, &weight.shape(), index, count as usize);
                    let id = id.expect("the weight fits");
                    backend.fill(id, weight.clone()).expect("the rows fit");
                    id
                }
                None => backend.upload(&name, weight.clone()).expect("the weight fits"),
            };
            assert_eq!(id, WeightId(i as u32));
        }
    }
}

struct Builder {
    pub rng: Rng,
    pub weights: Vec<Weight>,
    /// First and number of matrices of experts.
    pub stacks: Vec<(u32, u32)>,
    pub ops: Vec<Op>,
}

impl Builder {
    fn push(&mut self, weight: Weight) -> WeightId {
        self.weights.push(weight);
        WeightId(self.weights.len() as u32 - 1)
    }

    fn vector(&mut self, len: usize, center: f32, scale: f32) -> WeightId {
        let values = self.rng.values(len, scale).iter().map(|v| v + center).collect();
        self.push(Weight::Vector(values))
    }

    fn dense(&mut self, n: usize, k: usize, dtype: DenseType, scale: f32) -> WeightId {
        let values = self.rng.values(n * k, scale);
        let bytes = match dtype {
            DenseType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            DenseType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            DenseType::BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
        };
        let matrix = DenseMatrix::new(n, k, dtype, Bytes::owned(bytes)).expect("the bytes fit the shape");
        self.push(Weight::Dense(matrix))
    }

    fn matrix(&mut self, n: usize, k: usize, projection: Projection) -> WeightId {
        let scale = 1.5 / (k as f32).sqrt();
        let (group_size, offset) = match projection {
            Projection::Dense(dtype) => return self.dense(n, k, dtype, scale),
            Projection::W4 { group_size: 0, offset } => (k, offset),
            Projection::W4 { group_size, offset } => (group_size, offset),
        };
        let qweight = (0..n * k / 8).map(|_| self.rng.word()).collect();
        let params = |rng: &mut Rng| {
            let s = f16::from_f32((rng.value(0.5) + 1.0) * scale / 8.0);
            let o = match offset {
                Offset::Zero => f16::from_f32((rng.word() % 16) as f32),
                _ => f16::from_f32(-8.0 * s.to_f32()),
            };
            u32::from(s.to_bits()) | u32::from(o.to_bits()) << 16
        };
        let group_params = (0..n * (k / group_size)).map(|_| params(&mut self.rng)).collect();
        self.push(Weight::W4(W4Matrix { n, k, group_size, qweight, group_params, offset }))
    }

    fn linear(&mut self, case: &Case, x: u32, (n, k): (usize, usize), out: Span, bias: bool, accumulate: bool) {
        let weight = self.matrix(n, k, case.projections);
        let bias = bias.then(|| self.vector(n, 0.0, 0.5));
        self.ops.push(Op::Linear { x: BufferId(x), weight, bias, out, accumulate, rows: Rows::All });
    }

    fn norm(&mut self, kind: NormKind, x: Span, out: Span, (dim, segments): (usize, u32), rows: Rows) {
        let own_weights = kind == NormKind::Layer && segments > 1;
        let weight = self.vector(if own_weights { dim * segments as usize } else { dim }, 1.0, 0.3);
        let bias = (kind == NormKind::Layer && segments == 1).then(|| self.vector(dim, 0.0, 0.3));
        let accumulate = x == span(BRANCH, 0);
        let dim = dim as u32;
        self.ops.push(Op::Norm { kind, x, weight, bias, out, dim, segments, eps: 1e-5, accumulate, rows });
    }

    /// A matrix for each of `count` experts; the first one.
    fn experts(&mut self, case: &Case, count: u32, n: usize, k: usize) -> WeightId {
        let ids: Vec<_> = (0..count).map(|_| self.matrix(n, k, case.projections)).collect();
        self.stacks.push((ids[0].0, count));
        ids[0]
    }

    /// Adds a projection to the residual stream, behind a norm in the styles that have one.
    fn residual(&mut self, case: &Case, x: u32, k: usize, bias: bool) {
        if matches!(case.style, Style::Gemma | Style::Olmo) {
            self.linear(case, x, (case.hidden, k), span(BRANCH, 0), bias, false);
            self.norm(NormKind::Rms, span(BRANCH, 0), span(HIDDEN, 0), (case.hidden, 1), Rows::All);
        } else {
            self.linear(case, x, (case.hidden, k), span(HIDDEN, 0), bias, true);
        }
    }
}

const HIDDEN: u32 = 0;
const NORMED: u32 = 1;
const QKV: u32 = 2;
const ATTENTION: u32 = 3;
const GATE_UP: u32 = 4;
const PRODUCT: u32 = 5;
const LAST: u32 = 6;
const LOGITS: u32 = 7;
const BRANCH: u32 = 8;
const ROUTER: u32 = 9;
const ROUTES: u32 = 10;
const EXPERTS_GATE_UP: u32 = 11;
const EXPERTS_PRODUCT: u32 = 12;
const EXPERTS_DOWN: u32 = 13;
const EXPERTS_GATE: u32 = 14;
/// Experts of a token.
const TOP_K: u32 = 3;

fn span(buffer: u32, offset: usize) -> Span {
    Span { buffer: BufferId(buffer), offset: offset as u32 }
}

pub fn build(case: &Case) -> Model {
    let shape = case.shape;
    let (heads, kv_heads, dim) = (shape.heads as usize, shape.kv_heads as usize, shape.head_dim as usize);
    let (hidden, ffn) = (case.hidden, case.ffn);
    let qkv = (heads + 2 * kv_heads) * dim;
    let mut b =
        Builder { rng: Rng(0x9E37_79B9 + hidden as u64), weights: Vec::new(), stacks: Vec::new(), ops: Vec::new() };

    let table = b.dense(case.vocab, hidden, case.embedding, 1.0);
    let style = case.style;
    let gemma = style == Style::Gemma;
    let kind = if style == Style::StableLm { NormKind::Layer } else { NormKind::Rms };
    b.ops.push(Op::Embed { table, out: BufferId(HIDDEN), scale: if gemma { 3.5 } else { 1.0 } });
    for layer in 0..case.layers {
        let input = if style == Style::Olmo { HIDDEN } else { NORMED };
        if input == NORMED {
            b.norm(kind, span(HIDDEN, 0), span(NORMED, 0), (hidden, 1), Rows::All);
        }
        b.linear(case, input, (qkv, hidden), span(QKV, 0), case.bias, false);
        if case.qk_norm && style == Style::Olmo {
            b.norm(kind, span(QKV, 0), span(QKV, 0), (heads * dim, 1), Rows::All);
            b.norm(kind, span(QKV, heads * dim), span(QKV, heads * dim), (kv_heads * dim, 1), Rows::All);
        } else if case.qk_norm {
            b.norm(kind, span(QKV, 0), span(QKV, 0), (dim, shape.heads), Rows::All);
            b.norm(kind, span(QKV, heads * dim), span(QKV, heads * dim), (dim, shape.kv_heads), Rows::All);
        }
        let rope = layer.checked_rem(case.rope_tables);
        b.ops.push(Op::RopeAppend { qkv: BufferId(QKV), layer, rope });
        b.ops.push(Op::Attention {
            qkv: BufferId(QKV),
            out: BufferId(ATTENTION),
            layer,
            scale: 1.0 / (dim as f32).sqrt(),
            softcap: gemma.then_some(1.5),
            window: case.window.filter(|_| !gemma || layer == 0),
        });
        b.residual(case, ATTENTION, heads * dim, case.bias);
        if !matches!(style, Style::Olmo | Style::StableLm) {
            b.norm(kind, span(HIDDEN, 0), span(NORMED, 0), (hidden, 1), Rows::All);
        }
        if let Style::Experts(count) = style {
            let x = BufferId(input);
            let routes = BufferId(ROUTES);
            let dense = Case { projections: Projection::Dense(DenseType::F16), ..case.clone() };
            b.linear(&dense, input, (count as usize, hidden), span(ROUTER, 0), false, false);
            let renormalise = layer % 2 == 0;
            b.ops.push(Op::Route { logits: BufferId(ROUTER), routes, top_k: TOP_K, renormalise });
            // Packed gates and ups are one matrix, dense ones two.
            let stacked = matches!(case.projections, Projection::W4 { .. });
            let (n, offsets): (usize, &[usize]) = if stacked { (2 * ffn, &[0]) } else { (ffn, &[0, ffn]) };
            for &offset in offsets {
                let weight = b.experts(case, count, n, hidden);
                b.ops.push(Op::Experts { x, weight, count, routes, out: span(EXPERTS_GATE_UP, offset) });
            }
            let activation = Activation::Silu;
            b.ops.push(Op::Glu { x: BufferId(EXPERTS_GATE_UP), out: BufferId(EXPERTS_PRODUCT), activation });
            let weight = b.experts(case, count, hidden, ffn);
            b.ops.push(Op::Experts { x: BufferId(EXPERTS_PRODUCT), weight, count, routes, out: span(EXPERTS_DOWN, 0) });
            b.linear(&dense, input, (1, hidden), span(EXPERTS_GATE, 0), false, false);
            b.linear(case, input, (ffn, hidden), span(GATE_UP, 0), false, false);
            b.linear(case, input, (ffn, hidden), span(GATE_UP, ffn), case.bias, false);
            b.ops.push(Op::Glu { x: BufferId(GATE_UP), out: BufferId(PRODUCT), activation });
            b.ops.push(Op::Gate { x: BufferId(PRODUCT), gate: BufferId(EXPERTS_GATE) });
            b.residual(case, PRODUCT, ffn, false);
            b.ops.push(Op::Combine { x: BufferId(EXPERTS_DOWN), routes, out: BufferId(HIDDEN) });
            continue;
        }
        b.linear(case, input, (ffn, hidden), span(GATE_UP, 0), false, false);
        b.linear(case, input, (ffn, hidden), span(GATE_UP, ffn), case.bias, false);
        let activation = if gemma { Activation::GeluTanh } else { Activation::Silu };
        b.ops.push(Op::Glu { x: BufferId(GATE_UP), out: BufferId(PRODUCT), activation });
        b.residual(case, PRODUCT, ffn, false);
    }
    b.norm(kind, span(HIDDEN, 0), span(LAST, 0), (hidden, 1), Rows::Logits);
    let weight = b.matrix(case.vocab, hidden, case.head);
    let out = span(LOGITS, 0);
    b.ops.push(Op::Linear { x: BufferId(LAST), weight, bias: None, out, accumulate: false, rows: Rows::Compacted });
    if gemma {
        b.ops.push(Op::Scale { x: BufferId(LOGITS), scale: 1.0, cap: Some(3.0), rows: Rows::Compacted });
    }

    let (experts, per_token) = if let Style::Experts(count) = style { (count as usize, TOP_K) } else { (1, 1) };
    let buffer = |name, width: usize, logits_rows| BufferDesc { name, width: width as u32, logits_rows, per_token: 1 };
    let program = Program {
        buffers: vec![
            buffer("hidden", hidden, false),
            buffer("normed", hidden, false),
            buffer("qkv", qkv, false),
            buffer("attention", heads * dim, false),
            buffer("gate_up", 2 * ffn, false),
            buffer("product", ffn, false),
            buffer("last", hidden, true),
            buffer("logits", case.vocab, true),
            buffer("branch", hidden, false),
            buffer("router", experts, false),
            buffer("routes", 2 * TOP_K as usize, false),
            BufferDesc { per_token, ..buffer("experts' gate_up", 2 * ffn, false) },
            BufferDesc { per_token, ..buffer("experts' product", ffn, false) },
            BufferDesc { per_token, ..buffer("experts' down", hidden, false) },
            buffer("experts' gate", 1, false),
        ],
        ops: b.ops,
        layers: case.layers,
        attention: shape,
        rope_tables: case.rope_tables,
        vocab_size: case.vocab as u32,
        logits: BufferId(LOGITS),
    };
    Model { program: Arc::new(program), weights: b.weights, stacks: b.stacks }
}

pub fn rope_rows(table: u32, half: u32) -> Vec<f32> {
    let angle = |position: u32, i: u32| position as f32 / (10.0 + table as f32).powf(i as f32 / half as f32);
    (0..CONTEXT).flat_map(|p| (0..half).flat_map(move |i| [angle(p, i).cos(), angle(p, i).sin()])).collect()
}

/// Cases that the CUDA backend computes, with its fast kernels too: heads of 64 and 128, groups that lie well.
pub fn cuda_cases() -> Vec<Case> {
    let base = cases().swap_remove(0);
    let shape = |heads, kv_heads, head_dim, rotary_dim| AttentionShape { heads, kv_heads, head_dim, rotary_dim };
    let w4 = |group_size, offset| Projection::W4 { group_size, offset };
    let mut all = cases();
    all.push(Case {
        name: "experts with fused products, groups of 32",
        hidden: 128,
        ffn: 160,
        shape: shape(4, 2, 64, 64),
        style: Style::Experts(6),
        projections: w4(32, Offset::Zero),
        ..base.clone()
    });
    all.push(Case {
        name: "experts with fused products, groups of 64, biases as offsets",
        hidden: 256,
        ffn: 64,
        style: Style::Experts(9),
        projections: w4(64, Offset::Bias),
        ..base.clone()
    });
    all.push(Case {
        name: "fused, heads of 64",
        hidden: 128,
        ffn: 208,
        shape: shape(4, 2, 64, 64),
        projections: w4(16, Offset::Zero),
        ..base.clone()
    });
    all.push(Case {
        name: "fused, heads of 64 with groups of 32, biases as offsets",
        hidden: 192,
        ffn: 160,
        shape: shape(3, 1, 64, 32),
        bias: true,
        window: Some(17),
        projections: w4(32, Offset::Bias),
        ..base.clone()
    });
    all.push(Case {
        name: "fused, heads of 128 with groups of 64",
        hidden: 256,
        ffn: 320,
        vocab: 517,
        shape: shape(4, 1, 128, 128),
        projections: w4(64, Offset::Zero),
        ..base.clone()
    });
    all.push(Case {
        name: "fast attention behind norms of heads",
        hidden: 128,
        ffn: 128,
        shape: shape(2, 2, 96, 96),
        qk_norm: true,
        projections: w4(0, Offset::Zero),
        ..base
    });
    all
}

/// Room for [`STEPS`], on the exact path of the CPU.
pub fn config() -> RunnerConfig {
    RunnerConfig {
        max_tokens: MAX_TOKENS,
        max_logits_rows: MAX_TOKENS,
        context: CONTEXT,
        kv_type: None,
        threads: None,
        jobs: None,
        share_forks: false,
        exact: true,
    }
}

/// Writes every rotary table in two halves, the second not from row 0.
pub fn write_rope(runner: &mut dyn Runner, program: &Program) {
    for table in 0..program.rope_tables {
        let rows = rope_rows(table, program.attention.rotary_dim / 2);
        let half = rows.len() / 2;
        runner.write_rope(table, 0, &rows[..half]).expect("rows fit");
        runner.write_rope(table, CONTEXT / 2, &rows[half..]).expect("rows fit");
    }
}

pub fn tokens(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.word() % vocab as u32).collect()
}

/// Largest difference relative to the largest expected value.
pub fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let mut worst = 0.0f32;
    for (f, e) in found.iter().zip(expected) {
        assert!(f.is_finite(), "{f} instead of {e}");
        worst = worst.max((f - e).abs());
    }
    worst / largest
}

/// What [`error`] may be with a cache of 8 bits where `half` is allowed with one of half precision.
///
/// Elements that lie near the middle between two codes are rounded to either by the last bits of half precision: keys and
/// values may be a step off, 1/127 of the largest of a group, and the sums over them that much of the largest each. The
/// naive interpretation is as far from itself: with keys and values that are moved by up to 2^-11 of the largest of a row
/// before they are rounded, its logits move by up to 1.5e-2 in 8 bits and 3.5e-3 in half precision (forty short prompts of
/// the case of wide heads).
pub fn q8_error(half: f32) -> f32 {
    half + 2.0 / 127.0
}

/// Prefill in ragged chunks, with and without logits, decode, then go back in the cache, once to few tokens on both sides of
/// a split of attention: tokens, position, logits.
pub const STEPS: &[(usize, u32, LogitsRows)] = &[
    (7, 0, LogitsRows::None),
    (33, 7, LogitsRows::Last),
    (1, 40, LogitsRows::Last),
    (1, 41, LogitsRows::All),
    (40, 42, LogitsRows::All),
    (3, 82, LogitsRows::Last),
    (5, 50, LogitsRows::All),
    (40, 55, LogitsRows::None),
    (40, 95, LogitsRows::None),
    (4, 126, LogitsRows::All),
    (24, 135, LogitsRows::Last),
    (1, 159, LogitsRows::Last),
];
