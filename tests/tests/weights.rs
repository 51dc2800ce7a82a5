//! Every kind of weight on the CPU and on every GPU adapter against the naive interpretation: as an embedding table, as a
//! linear layer for few and many rows, and as a head, with inputs in another order.

#![allow(clippy::print_stdout, reason = "what is skipped is part of a test's output")]

use std::sync::Arc;

use awqua::backend::{
    AttentionShape, Backend, BufferDesc, BufferId, KvType, LogitsRows, NormKind, Op, Program, Rows, Runner,
    RunnerConfig, Step, WeightId, cpu,
};
use awqua::tensor::{
    BlockMatrix, Bytes, DenseType, GgmlType, Levels, Offset, PackedMatrix, W4Matrix, Weight, row_words,
};
use awqua_shaders::Rng;
use awqua_tests::oracle::{Dequantised, Oracle};
use half::f16;

const HIDDEN: usize = 256;
const FFN: usize = 512;
const VOCAB: usize = 70;
/// More than the GPU takes one by one.
const TOKENS: usize = 40;

/// A weight of `n` x `k` of some kind.
type Make = fn(&mut Rng, usize, usize) -> Weight;

/// Every kind by name.
const KINDS: &[(&str, Make)] = &[
    ("w4, zero points", |rng, n, k| w4(rng, n, k, 32, Offset::Zero)),
    ("w4, biases", |rng, n, k| w4(rng, n, k, 64, Offset::Bias)),
    ("w4, products rounded", |rng, n, k| w4(rng, n, k, 64, Offset::RoundedBias)),
    ("w4, bfloat16", |rng, n, k| w4(rng, n, k, 128, Offset::ZeroBf16)),
    ("w4, products rounded to bfloat16", |rng, n, k| w4(rng, n, k, 64, Offset::RoundedBiasBf16)),
    ("2 bits", |rng, n, k| packed(rng, n, k, 2, 64, false, DenseType::F16)),
    ("3 bits", |rng, n, k| packed(rng, n, k, 3, 32, false, DenseType::F16)),
    ("3 bits, wide, a short last group", |rng, n, k| packed(rng, n, k, 3, 96, true, DenseType::BF16)),
    ("4 bits, wide", |rng, n, k| packed(rng, n, k, 4, 64, true, DenseType::BF16)),
    ("4 bits, a short last group", |rng, n, k| packed(rng, n, k, 4, 96, false, DenseType::F16)),
    ("5 bits", |rng, n, k| packed(rng, n, k, 5, 32, false, DenseType::F32)),
    ("6 bits", |rng, n, k| packed(rng, n, k, 6, 32, true, DenseType::F32)),
    ("8 bits, one group a row", |rng, n, k| packed(rng, n, k, 8, k, false, DenseType::F16)),
    ("codebook", codebook),
    ("Q4_K", |rng, n, k| blocks(rng, n, k, GgmlType::Q4K)),
    ("Q5_K", |rng, n, k| blocks(rng, n, k, GgmlType::Q5K)),
    ("Q6_K", |rng, n, k| blocks(rng, n, k, GgmlType::Q6K)),
];

fn half(value: f32) -> u32 {
    u32::from(f16::from_f32(value).to_bits())
}

/// Scale and offset of a group of codes of `bits` bits whose weights are about 1 / 16.
fn numbers(rng: &mut Rng, bits: u32, offset: Offset) -> (f32, f32) {
    let largest = (1u32 << bits) as f32;
    let scale = rng.range(0.05, 0.15) / largest;
    match offset {
        Offset::Zero | Offset::ZeroBf16 => (scale, rng.below(1 << bits) as f32),
        _ => (scale, rng.range(-0.06, -0.04)),
    }
}

fn w4(rng: &mut Rng, n: usize, k: usize, group_size: usize, offset: Offset) -> Weight {
    let qweight = (0..n * k / 8).map(|_| rng.next_u32()).collect();
    let params = (0..n * k / group_size).map(|_| numbers(rng, 4, offset)).map(|(s, o)| half(s) | half(o) << 16);
    Weight::W4(W4Matrix::new((n, k), group_size, qweight, params.collect(), offset).unwrap())
}

fn packed(rng: &mut Rng, n: usize, k: usize, bits: u32, group_size: usize, wide: bool, rounding: DenseType) -> Weight {
    let offset = if wide { Offset::Bias } else { Offset::Zero };
    let codes = (0..n * row_words(k, bits)).map(|_| rng.next_u32()).collect();
    let pairs: Vec<_> = (0..n * k.div_ceil(group_size)).map(|_| numbers(rng, bits, offset)).collect();
    let levels = match wide {
        true => Levels::AffineWide(offset, pairs.into_iter().map(|(s, o)| [s, o]).collect()),
        false => Levels::Affine(offset, pairs.into_iter().map(|(s, o)| half(s) | half(o) << 16).collect()),
    };
    let matrix = PackedMatrix { n, k, bits, group_size, codes, levels, rounding };
    matrix.check().unwrap();
    Weight::Packed(matrix)
}

fn codebook(rng: &mut Rng, n: usize, k: usize) -> Weight {
    let codes = (0..n * k / 8).map(|_| rng.next_u32()).collect();
    let table: [f32; 16] = std::array::from_fn(|_| rng.range(-1.0, 1.0));
    let absmax = (0..n * k / 64).map(|_| rng.range(0.05, 0.15)).collect();
    let levels = Levels::Codebook(Box::new(table), absmax);
    let matrix = PackedMatrix { n, k, bits: 4, group_size: 64, codes, levels, rounding: DenseType::F16 };
    matrix.check().unwrap();
    Weight::Packed(matrix)
}

fn blocks(rng: &mut Rng, n: usize, k: usize, ggml_type: GgmlType) -> Weight {
    let size = ggml_type.block_bytes();
    let mut bytes: Vec<u8> = (0..n * k / 256 * size).map(|_| rng.next_u32() as u8).collect();
    for block in bytes.chunks_exact_mut(size) {
        let mut put = |at: usize, value: f32| block[at..at + 2].copy_from_slice(&f16::from_f32(value).to_le_bytes());
        match ggml_type {
            GgmlType::Q6K => put(208, rng.range(0.00001, 0.00003)),
            _ => {
                put(0, rng.range(0.0001, 0.0002));
                put(2, rng.range(0.0005, 0.001));
            }
        }
    }
    Weight::Blocks(BlockMatrix::new(n, k, ggml_type, Bytes::owned(bytes)).unwrap())
}

/// Embedding, up, down with a residual, head; the inputs of down and head reordered and scaled.
fn model(make: Make, rng: &mut Rng) -> (Program, Vec<Weight>) {
    let shuffled = |rng: &mut Rng, n: usize| {
        let mut order: Vec<u32> = (0..n as u32).collect();
        (1..n).rev().for_each(|i| order.swap(i, rng.below(i as u32 + 1) as usize));
        Weight::Order(order)
    };
    let weights = vec![
        make(rng, VOCAB, HIDDEN),
        make(rng, FFN, HIDDEN),
        Weight::Vector(rng.values(FFN, 0.1)),
        make(rng, HIDDEN, FFN),
        make(rng, VOCAB, HIDDEN),
        shuffled(rng, FFN),
        Weight::Vector((0..FFN).map(|_| rng.range(0.5, 2.0)).collect()),
        shuffled(rng, HIDDEN),
        Weight::Vector(vec![1.0; HIDDEN]),
    ];
    let id = WeightId;
    let buffer = |name, width: usize, logits_rows| BufferDesc { name, width: width as u32, logits_rows, per_token: 1 };
    let (hidden, up, moved, last, arranged, logits) =
        (BufferId(0), BufferId(1), BufferId(2), BufferId(3), BufferId(4), BufferId(5));
    let linear = |x, weight, bias, out: BufferId, accumulate, rows| Op::Linear {
        x,
        weight: id(weight),
        bias,
        out: out.into(),
        accumulate,
        rows,
    };
    let ops = vec![
        Op::Embed { table: id(0), out: hidden, scale: 1.5 },
        linear(hidden, 1, Some(id(2)), up, false, Rows::All),
        Op::Arrange { x: up, order: Some(id(5)), factors: Some(id(6)), out: moved, rows: Rows::All },
        linear(moved, 3, None, hidden, true, Rows::All),
        Op::Norm {
            kind: NormKind::Rms,
            x: hidden.into(),
            weight: id(8),
            bias: None,
            out: last.into(),
            dim: HIDDEN as u32,
            segments: 1,
            eps: 1e-6,
            accumulate: false,
            rows: Rows::Logits,
        },
        Op::Arrange { x: last, order: Some(id(7)), factors: None, out: arranged, rows: Rows::Compacted },
        linear(arranged, 4, None, logits, false, Rows::Compacted),
    ];
    let program = Program {
        buffers: vec![
            buffer("hidden", HIDDEN, false),
            buffer("up", FFN, false),
            buffer("moved", FFN, false),
            buffer("last", HIDDEN, true),
            buffer("arranged", HIDDEN, true),
            buffer("logits", VOCAB, true),
        ],
        ops,
        layers: 1,
        attention: AttentionShape { heads: 1, kv_heads: 1, head_dim: 2, rotary_dim: 2 },
        rope_tables: 0,
        vocab_size: VOCAB as u32,
        logits,
    };
    (program, weights)
}

/// Largest difference from the oracle as a share of the largest logit, over steps of one and of many tokens.
fn worst(mut backend: Box<dyn Backend>, program: &Program, weights: &[Weight], exact: Dequantised) -> f32 {
    for (i, weight) in weights.iter().enumerate() {
        backend.upload(&format!("weight {i}"), weight.clone()).unwrap();
    }
    let config = RunnerConfig {
        max_tokens: TOKENS as u32,
        max_logits_rows: TOKENS as u32,
        context: TOKENS as u32,
        kv_type: Some(KvType::F32),
        threads: Some(2),
        jobs: None,
        share_forks: false,
        exact: true,
    };
    let backend: Arc<dyn Backend> = backend.into();
    let mut runner: Box<dyn Runner> = backend.runner(&Arc::new(program.clone()), &config).unwrap();
    let mut oracle = Oracle::new(program, weights, TOKENS, KvType::F32, exact);
    let tokens: Vec<u32> = (0..TOKENS as u32).map(|i| i * 37 % VOCAB as u32).collect();
    let mut worst = 0.0f32;
    for (count, rows) in
        [(1, LogitsRows::Last), (3, LogitsRows::All), (TOKENS, LogitsRows::Last), (TOKENS, LogitsRows::All)]
    {
        let expected = oracle.run(&tokens[..count], 0, rows);
        runner.run(&Step { tokens: &tokens[..count], position: 0, logits: rows }).unwrap();
        let mut found = Vec::new();
        runner.read_logits(&mut found).unwrap();
        assert_eq!(found.len(), expected.len());
        let scale = expected.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(scale > 0.01 && scale.is_finite(), "{scale}");
        worst = found.iter().zip(&expected).fold(worst, |w, (f, e)| w.max((f - e).abs() / scale));
        // The hidden states behind the logits are in their own order.
        let mut hidden = Vec::new();
        runner.read_hidden(&mut hidden).unwrap();
        assert_eq!(hidden.len(), rows.range(count).len() * HIDDEN);
    }
    worst
}

#[test]
fn every_kind_on_the_cpu() {
    for (name, make) in KINDS {
        let (program, weights) = model(*make, &mut Rng::new(5));
        let worst = worst(cpu::open(), &program, &weights, Dequantised::Half);
        assert!(worst < 1e-5, "{name}: {worst:e}");
    }
}

#[cfg(feature = "wgpu")]
#[test]
fn every_kind_on_every_gpu() {
    use awqua::backend::wgpu::{WgpuOptions, adapters, open};
    let found = adapters();
    if found.is_empty() {
        assert!(std::env::var_os("AWQUA_REQUIRE_GPU").is_none(), "AWQUA_REQUIRE_GPU is set and there is no adapter");
        println!("skipped: no GPU adapter");
        return;
    }
    for adapter in found {
        for portable in [false, true] {
            // Bindings that hold a part of a matrix only.
            for limit_binding in [None, Some(1 << 17)] {
                for (name, make) in KINDS {
                    let (program, weights) = model(*make, &mut Rng::new(6));
                    let options = WgpuOptions {
                        device: awqua::DeviceChoice::Named(adapter.index.to_string()),
                        force_f32: portable,
                        force_no_subgroup: portable,
                        limit_binding,
                        ..Default::default()
                    };
                    let worst = worst(open(&options).unwrap(), &program, &weights, Dequantised::Exact);
                    assert!(
                        worst < 4e-3,
                        "{name} on {} portable {portable} {limit_binding:?}: {worst:e}",
                        adapter.name
                    );
                }
            }
        }
    }
}
