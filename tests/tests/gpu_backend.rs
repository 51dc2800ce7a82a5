//! The wgpu backend against a naive interpretation of the same program, on every adapter and kernel variant.
#![cfg(feature = "wgpu")]

use std::sync::Arc;

use awqua::ErrorKind;
use awqua::backend::wgpu::{DeviceChoice, WgpuBackend, WgpuOptions, adapters};
use awqua::backend::{
    Activation, AttentionShape, Backend, BufferDesc, BufferId, KvType, LogitsRows, NormKind, Op, Program, ROW_STEP,
    Rows, Runner, RunnerConfig, Span, Step, WeightId,
};
use awqua::session::sampler::{SampleRequest, Sampling, pick};
use awqua::tensor::{Bytes, DenseMatrix, DenseType, Offset, W4Matrix, Weight};
use awqua_tests::oracle::{Dequantised, Oracle};
use half::{bf16, f16};

const CONTEXT: u32 = 160;
const MAX_TOKENS: u32 = 40;

/// Shapes of a small decoder.
#[derive(Debug, Clone)]
struct Case {
    name: &'static str,
    hidden: usize,
    ffn: usize,
    vocab: usize,
    layers: u32,
    shape: AttentionShape,
    qk_norm: bool,
    bias: bool,
    style: Style,
    window: Option<u32>,
    /// Rotary tables; layer i uses table i modulo this, no rotation at 0.
    rope_tables: u32,
    projections: Projection,
    embedding: DenseType,
    head: Projection,
    kv: KvType,
}

/// What differs between families of decoders.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Style {
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
enum Projection {
    /// Group size 0 is one group a row.
    W4 {
        group_size: usize,
        offset: Offset,
    },
    Dense(DenseType),
}

fn cases() -> Vec<Case> {
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
struct Rng(u64);

impl Rng {
    fn next(&mut self) -> u32 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 32) as u32
    }

    /// Uniform in [-scale, scale).
    fn value(&mut self, scale: f32) -> f32 {
        (self.next() as f32 / 2_147_483_648.0 - 1.0) * scale
    }

    fn values(&mut self, len: usize, scale: f32) -> Vec<f32> {
        (0..len).map(|_| self.value(scale)).collect()
    }
}

/// A program with its weights in the order of their ids.
struct Model {
    program: Arc<Program>,
    weights: Vec<Weight>,
    /// First and number of matrices of experts.
    stacks: Vec<(u32, u32)>,
}

struct Builder {
    rng: Rng,
    weights: Vec<Weight>,
    /// First and number of matrices of experts.
    stacks: Vec<(u32, u32)>,
    ops: Vec<Op>,
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
        let qweight = (0..n * k / 8).map(|_| self.rng.next()).collect();
        let params = |rng: &mut Rng| {
            let s = f16::from_f32((rng.value(0.5) + 1.0) * scale / 8.0);
            let o = match offset {
                Offset::Zero => f16::from_f32((rng.next() % 16) as f32),
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

fn build(case: &Case) -> Model {
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

fn rope_rows(table: u32, half: u32) -> Vec<f32> {
    let angle = |position: u32, i: u32| position as f32 / (10.0 + table as f32).powf(i as f32 / half as f32);
    (0..CONTEXT).flat_map(|p| (0..half).flat_map(move |i| [angle(p, i).cos(), angle(p, i).sin()])).collect()
}

fn config() -> RunnerConfig {
    RunnerConfig {
        max_tokens: MAX_TOKENS,
        max_logits_rows: MAX_TOKENS,
        context: CONTEXT,
        kv_type: None,
        threads: None,
        jobs: None,
    }
}

/// Every other weight arrives in pieces.
fn upload(options: &WgpuOptions, model: &Model) -> Arc<WgpuBackend> {
    let mut backend = WgpuBackend::open(options).expect("the adapter opens");
    for (i, weight) in model.weights.iter().enumerate() {
        let name = format!("weight {i}");
        let stack = model.stacks.iter().find(|(first, count)| (*first..first + count).contains(&(i as u32)));
        let id = if i % 2 == 0 && stack.is_none() {
            backend.upload(&name, weight.clone()).expect("the weight fits")
        } else {
            let shape = weight.shape();
            let id = match stack {
                Some(&(first, count)) => backend.reserve_in_stack(&name, &shape, i - first as usize, count as usize),
                None => backend.reserve(&name, &shape),
            };
            let id = id.expect("the weight fits");
            let rows = weight.shape().rows();
            for first in (0..rows).step_by(ROW_STEP) {
                let part = cut(weight, first..rows.min(first + ROW_STEP));
                backend.fill(id, part).expect("the rows fit");
            }
            id
        };
        assert_eq!(id, WeightId(i as u32));
        let refused = backend.fill(id, cut(weight, 0..1)).expect_err("the weight is full");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
    while !backend.upload_is_settled().expect("the device works") {
        backend.wait().expect("the device works");
    }
    Arc::new(backend)
}

fn cut(weight: &Weight, rows: std::ops::Range<usize>) -> Weight {
    match weight {
        Weight::W4(m) => Weight::W4(W4Matrix {
            n: rows.len(),
            qweight: m.qweight[rows.start * m.k / 8..rows.end * m.k / 8].to_vec(),
            group_params: m.group_params[rows.start * m.groups()..rows.end * m.groups()].to_vec(),
            ..*m
        }),
        Weight::Dense(m) => {
            let bytes =
                m.bytes.slice(rows.start * m.row_bytes()..rows.end * m.row_bytes()).expect("rows of the matrix");
            Weight::Dense(DenseMatrix { n: rows.len(), bytes, ..*m })
        }
        Weight::Vector(v) => Weight::Vector(v[rows].to_vec()),
        Weight::Packed(_) | Weight::Blocks(_) | Weight::Order(_) => panic!("no case has such a weight"),
    }
}

fn runner(options: &WgpuOptions, model: &Model, kv: KvType) -> (Arc<WgpuBackend>, Box<dyn Runner>) {
    let backend = upload(options, model);
    let max_logits_rows = if options.limit_binding.is_some() { 1 } else { MAX_TOKENS };
    let config = RunnerConfig { max_logits_rows, kv_type: Some(kv), ..config() };
    let mut runner = backend.clone().runner(&model.program, &config).expect("the runner fits");
    for table in 0..model.program.rope_tables {
        let rows = rope_rows(table, model.program.attention.rotary_dim / 2);
        let half = rows.len() / 2;
        // Two writes, the second not from row 0.
        runner.write_rope(table, 0, &rows[..half]).expect("rows fit");
        runner.write_rope(table, CONTEXT / 2, &rows[half..]).expect("rows fit");
    }
    (backend, runner)
}

/// Every adapter under every variant; prints a skip where there is none.
fn options() -> Vec<WgpuOptions> {
    let adapters: Vec<_> = adapters().into_iter().filter(|a| a.unusable.is_none()).collect();
    if adapters.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none_or(|v| v != "1"), "AWQUA_REQUIRE_GPU=1 and no adapter");
        skip("no usable GPU adapter");
    }
    let mut all = Vec::new();
    for adapter in adapters {
        for (force_f32, force_no_subgroup) in [(false, false), (true, false), (false, true), (true, true)] {
            if (force_f32 || adapter.f16) && (force_no_subgroup || adapter.subgroup.is_some()) {
                let device = DeviceChoice::Named(adapter.index.to_string());
                all.push(WgpuOptions { device, force_f32, force_no_subgroup, ..WgpuOptions::default() });
            }
        }
    }
    all
}

#[expect(clippy::print_stderr, reason = "a skipped test has to be visible")]
fn skip(reason: &str) {
    eprintln!("SKIPPED: {reason}");
}

fn tokens(rng: &mut Rng, n: usize, vocab: usize) -> Vec<u32> {
    (0..n).map(|_| rng.next() % vocab as u32).collect()
}

/// Largest difference relative to the largest expected value.
fn error(found: &[f32], expected: &[f32]) -> f32 {
    assert_eq!(found.len(), expected.len());
    let largest = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    let mut worst = 0.0f32;
    for (f, e) in found.iter().zip(expected) {
        assert!(f.is_finite(), "{f} instead of {e}");
        worst = worst.max((f - e).abs());
    }
    worst / largest
}

/// Prefill in ragged chunks, with and without logits, decode, then go back in the cache: tokens, position, logits.
const STEPS: &[(usize, u32, LogitsRows)] = &[
    (7, 0, LogitsRows::None),
    (33, 7, LogitsRows::Last),
    (1, 40, LogitsRows::Last),
    (1, 41, LogitsRows::All),
    (40, 42, LogitsRows::All),
    (3, 82, LogitsRows::Last),
    (5, 50, LogitsRows::All),
    (40, 55, LogitsRows::None),
    (40, 95, LogitsRows::None),
    (24, 135, LogitsRows::Last),
    (1, 159, LogitsRows::Last),
];

fn compare(case: &Case, options: &WgpuOptions) {
    let model = build(case);
    let (backend, mut runner) = runner(options, &model, case.kv);
    assert_eq!(runner.kv_type(), case.kv);
    assert!(runner.bytes() > 0 && backend.info().weight_bytes > 0);
    let mut oracle = Oracle::new(&model.program, &model.weights, CONTEXT as usize, case.kv, Dequantised::Exact);
    for table in 0..case.rope_tables {
        oracle.write_rope(table as usize, 0, &rope_rows(table, case.shape.rotary_dim / 2));
    }
    // Single precision differs by the order of sums, and a half precision cache can round an element to the other
    // neighbour; half precision products carry 11 bits.
    let tolerance = match (options.force_f32, case.kv) {
        (true, KvType::F32) => 1e-5,
        (true, KvType::F16) => 5e-4,
        (false, _) => 1e-2,
    };
    let mut rng = Rng(77);
    let mut logits = Vec::new();
    for &(n, position, rows) in STEPS {
        let tokens = tokens(&mut rng, n, case.vocab);
        // One row of logits is all that fits small bindings.
        let rows = if options.limit_binding.is_some() && n > 1 { LogitsRows::Last } else { rows };
        let expected = oracle.run(&tokens, position as usize, rows);
        runner.run(&Step { tokens: &tokens, position, logits: rows }).expect("the step runs");
        runner.read_logits(&mut logits).expect("the logits come back");
        let mut error = if expected.is_empty() { logits.len() as f32 } else { error(&logits, &expected) };
        // Half precision can prefer the other one of two experts that are nearly equal: few rows may be off.
        if error > tolerance && matches!(case.style, Style::Experts(_)) && !options.force_f32 {
            let rows = logits.chunks(case.vocab).zip(expected.chunks(case.vocab));
            let mut errors: Vec<f32> = rows.map(|(found, expected)| self::error(found, expected)).collect();
            errors.sort_by(f32::total_cmp);
            error = errors[errors.len() * 9 / 10];
        }
        let info = backend.info();
        assert!(
            error <= tolerance,
            "{} on {} ({}), {n} tokens at {position}: error {error} above {tolerance}",
            case.name,
            info.device,
            info.variant
        );
    }
}

#[test]
fn programs_match_the_naive_interpretation() {
    for options in options() {
        for case in cases() {
            compare(&case, &options);
        }
    }
}

#[test]
fn weights_split_over_bindings_match() {
    for options in options() {
        for case in cases() {
            // The embedding and the head take several times the limit, activations and caches just fit it.
            let case = Case { vocab: 6007, ..case };
            compare(&case, &WgpuOptions { limit_binding: Some(96 << 10), ..options.clone() });
        }
    }
}

#[test]
fn steps_split_over_submissions_match() {
    for options in options() {
        compare(&cases()[0], &WgpuOptions { submission_flops: Some(1000), ..options.clone() });
    }
}

#[test]
fn tokens_are_picked_as_on_the_cpu() {
    let case = Case { vocab: 5003, ..cases().swap_remove(0) };
    let model = build(&case);
    let base = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, ..Sampling::default() };
    let penalties =
        Sampling { repetition_penalty: 1.5, presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::greedy() };
    let samplings = [
        Sampling::greedy(),
        penalties.clone(),
        base.clone(),
        Sampling { top_k: 1, ..base.clone() },
        Sampling { top_k: 256, top_p: 1.0, temperature: 3.0, ..base.clone() },
        Sampling { top_k: 100, top_p: 1.0, min_p: 0.2, ..base.clone() },
        Sampling { temperature: 1.5, top_k: 50, ..penalties },
        // These two read the logits back.
        Sampling { top_k: 0, ..base.clone() },
        Sampling { top_k: 300, ..base },
    ];
    for options in options() {
        let (_, mut runner) = runner(&options, &model, case.kv);
        let nothing = SampleRequest { uniform: 0.5, ..SampleRequest::new(&samplings[0]) };
        assert_eq!(runner.sample(&nothing).expect_err("no logits yet").kind(), ErrorKind::InvalidInput);
        let (mut logits, mut again) = (Vec::new(), Vec::new());
        runner.run(&Step { tokens: &[1, 2, 3], position: 0, logits: LogitsRows::All }).expect("the step runs");
        runner.read_logits(&mut logits).expect("the logits come back");
        let row = &logits[2 * case.vocab..];
        let mut best: Vec<u32> = (0..case.vocab as u32).collect();
        best.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
        let recent: Vec<(u32, u32)> = best[..20].iter().map(|id| (*id, id % 3 + 1)).collect();
        for sampling in &samplings {
            for uniform in [0.0, 0.111, 0.333, 0.5, 0.777, 0.95, 0.999] {
                let request = SampleRequest { recent: &recent, uniform, ..SampleRequest::new(sampling) };
                let found = runner.sample(&request).expect("a token comes back");
                // Exponentials differ in the last bits, so the neighbours of a boundary are right, too.
                let near = [uniform, (uniform - 1e-4).max(0.0), uniform + 1e-4];
                let right = near.map(|uniform| pick(&mut row.to_vec(), &SampleRequest { uniform, ..request }));
                assert!(right.contains(&found), "{sampling:?} at {uniform}: {found} instead of {right:?}");
            }
        }
        runner.read_logits(&mut again).expect("the logits come back");
        assert!(logits == again, "sampling changed the logits");
    }
}

#[test]
fn a_lost_device_is_an_error() {
    let model = build(&cases()[0]);
    for options in options() {
        let (backend, mut runner) = runner(&options, &model, KvType::F16);
        let step = Step { tokens: &[5], position: 0, logits: LogitsRows::Last };
        runner.run(&step).expect("the step runs");
        backend.destroy();
        let sampling = Sampling::greedy();
        let request = SampleRequest::new(&sampling);
        for _ in 0..2 {
            let lost = |kind| assert_eq!(kind, ErrorKind::DeviceLost);
            lost(runner.run(&step).expect_err("the device is gone").kind());
            lost(runner.read_logits(&mut Vec::new()).expect_err("the device is gone").kind());
            lost(runner.sample(&request).expect_err("the device is gone").kind());
            lost(runner.write_rope(0, 0, &rope_rows(0, 8)).expect_err("the device is gone").kind());
            let another = backend.clone().runner(&model.program, &config());
            lost(another.err().expect("the device is gone").kind());
        }
        let mut backend = WgpuBackend::open(&options).expect("the adapter opens again");
        backend.destroy();
        let upload = backend.upload("weight", model.weights[0].clone());
        assert_eq!(upload.expect_err("the device is gone").kind(), ErrorKind::DeviceLost);
    }
}

#[test]
fn absurd_capacities_are_refused() {
    let model = build(&cases()[0]);
    let Some(options) = options().pop() else { return };
    let backend = upload(&options, &model);
    let layers = Arc::new(Program { layers: 1_000_000, ..(*model.program).clone() });
    let with = |change: fn(&mut RunnerConfig)| {
        let mut config = config();
        change(&mut config);
        config
    };
    for (program, config) in [
        (&model.program, with(|c| c.context = u32::MAX)),
        (&model.program, with(|c| c.context = 100_000_000)),
        (&model.program, with(|c| c.max_logits_rows = u32::MAX)),
        (&layers, with(|c| c.context = 1_000_000)),
    ] {
        // Only running into the limit tells a device's free memory, and the other tests need some of it.
        if Arc::ptr_eq(program, &layers) && adapters()[0].kind == "discrete" {
            continue;
        }
        let refused = backend.clone().runner(program, &config).err().expect("it can not fit");
        assert_eq!(refused.kind(), ErrorKind::OutOfMemory, "{refused}");
        assert!(refused.message().contains("bytes"), "{refused}");
    }
    let too_many = with(|c| c.max_tokens = 100_000);
    let refused = backend.clone().runner(&model.program, &too_many).err().expect("too many rows for a dispatch");
    assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    // The device still works.
    let mut runner = backend.runner(&model.program, &config()).expect("the runner fits");
    runner.run(&Step { tokens: &[1], position: 0, logits: LogitsRows::Last }).expect("the step runs");
}

#[test]
fn bad_steps_are_refused() {
    let model = build(&cases()[0]);
    let Some(options) = options().pop() else { return };
    let (_, mut runner) = runner(&options, &model, KvType::F16);
    let many = vec![0; MAX_TOKENS as usize + 1];
    let mut kind = |tokens: &[u32], position| {
        let step = Step { tokens, position, logits: LogitsRows::Last };
        runner.run(&step).expect_err("the step is bad").kind()
    };
    assert_eq!(kind(&[], 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&many, 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&[model.program.vocab_size], 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&[0, 0], CONTEXT - 1), ErrorKind::ContextFull);
    assert_eq!(kind(&[0], u32::MAX), ErrorKind::ContextFull);
    for (table, first, len) in [(1, 0, 16), (0, CONTEXT, 16), (0, 0, 15)] {
        let refused = runner.write_rope(table, first, &vec![0.0; len]).expect_err("the rows do not fit");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
}

#[test]
fn an_unknown_adapter_is_no_device() {
    let options = WgpuOptions { device: DeviceChoice::Named("no such adapter".into()), ..WgpuOptions::default() };
    assert_eq!(WgpuBackend::open(&options).err().expect("there is none").kind(), ErrorKind::NoDevice);
}

/// Runs this test again in a process whose Vulkan loader finds no driver.
#[test]
#[cfg(target_os = "linux")]
fn a_missing_driver_is_no_device() {
    const CHILD: &str = "AWQUA_TEST_WITHOUT_DRIVER";
    if std::env::var_os(CHILD).is_some() {
        assert_eq!(adapters(), []);
        let refused = WgpuBackend::open(&WgpuOptions::default()).err().expect("there is none");
        assert_eq!(refused.kind(), ErrorKind::NoDevice);
        return;
    }
    let this = std::env::current_exe().expect("a test has a path");
    let output = std::process::Command::new(this)
        .args(["--exact", "a_missing_driver_is_no_device"])
        .env(CHILD, "1")
        .env("VK_DRIVER_FILES", "/nonexistent.json")
        .env("VK_ICD_FILENAMES", "/nonexistent.json")
        .output()
        .expect("the test starts again");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
