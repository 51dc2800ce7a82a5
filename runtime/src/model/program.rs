//! The decoder block of every supported architecture, written once as a program.

use super::config::ModelConfig;
use super::weights::{LayerWeights, ModelWeights, Projection};
use crate::backend::{AttentionShape, BufferDesc, BufferId, Op, Program, Rows, Span};

// Buffer numbers, in the order of `buffers` below.
const HIDDEN: BufferId = BufferId(0);
const NORMED: BufferId = BufferId(1);
const QKV: BufferId = BufferId(2);
const ATTENDED: BufferId = BufferId(3);
const GATE_UP: BufferId = BufferId(4);
const ACTIVATED: BufferId = BufferId(5);
const LAST: BufferId = BufferId(6);
const LOGITS: BufferId = BufferId(7);

/// Builds the program of a model from its configuration and the ids of its uploaded weights.
pub(super) fn build(config: &ModelConfig, weights: &ModelWeights) -> Program {
    let hidden = config.hidden_size as u32;
    let head_dim = config.head_dim as u32;
    let (heads, kv_heads) = (config.num_attention_heads as u32, config.num_key_value_heads as u32);
    let buffer = |name, width| BufferDesc { name, width, logits_rows: false };
    let buffers = vec![
        buffer("hidden", hidden),
        buffer("normed", hidden),
        buffer("qkv", (heads + 2 * kv_heads) * head_dim),
        buffer("attended", heads * head_dim),
        buffer("gate_up", 2 * config.intermediate_size as u32),
        buffer("activated", config.intermediate_size as u32),
        BufferDesc { name: "last", width: hidden, logits_rows: true },
        BufferDesc { name: "logits", width: config.vocab_size as u32, logits_rows: true },
    ];

    let mut ops = vec![Op::Embed { table: weights.embedding, out: HIDDEN }];
    for (layer, w) in weights.layers.iter().enumerate() {
        attention(&mut ops, config, w, layer);
        mlp(&mut ops, config, w);
    }
    ops.push(Op::RmsNorm {
        x: HIDDEN.into(),
        weight: weights.norm,
        out: LAST.into(),
        dim: hidden,
        segments: 1,
        eps: config.rms_norm_eps,
        rows: Rows::Logits,
    });
    ops.push(Op::Linear {
        x: LAST,
        weight: weights.head,
        bias: None,
        out: LOGITS.into(),
        accumulate: false,
        rows: Rows::Compacted,
    });

    Program {
        buffers,
        ops,
        layers: config.num_hidden_layers as u32,
        attention: AttentionShape { heads, kv_heads, head_dim, rotary_dim: config.rope.rotary_dim as u32 },
        rope_tables: 1,
        vocab_size: config.vocab_size as u32,
        logits: LOGITS,
    }
}

fn attention(ops: &mut Vec<Op>, config: &ModelConfig, w: &LayerWeights, layer: usize) {
    let head_dim = config.head_dim as u32;
    let (heads, kv_heads) = (config.num_attention_heads as u32, config.num_key_value_heads as u32);
    norm(ops, config, w.input_norm);
    project(ops, NORMED, QKV, &w.qkv);
    for (norm, offset, segments) in [(w.q_norm, 0, heads), (w.k_norm, heads * head_dim, kv_heads)] {
        if let Some(weight) = norm {
            let span = Span { buffer: QKV, offset };
            let eps = config.rms_norm_eps;
            ops.push(Op::RmsNorm { x: span, weight, out: span, dim: head_dim, segments, eps, rows: Rows::All });
        }
    }
    let layer_id = layer as u32;
    ops.push(Op::RopeAppend { qkv: QKV, layer: layer_id, rope: Some(0) });
    ops.push(Op::Attention {
        qkv: QKV,
        out: ATTENDED,
        layer: layer_id,
        scale: 1.0 / (config.head_dim as f32).sqrt(),
        window: config.windows[layer],
    });
    residual(ops, ATTENDED, &w.o);
}

fn mlp(ops: &mut Vec<Op>, config: &ModelConfig, w: &LayerWeights) {
    norm(ops, config, w.post_attention_norm);
    project(ops, NORMED, GATE_UP, &w.gate_up);
    ops.push(Op::SiluMul { x: GATE_UP, out: ACTIVATED });
    residual(ops, ACTIVATED, &w.down);
}

fn norm(ops: &mut Vec<Op>, config: &ModelConfig, weight: crate::backend::WeightId) {
    ops.push(Op::RmsNorm {
        x: HIDDEN.into(),
        weight,
        out: NORMED.into(),
        dim: config.hidden_size as u32,
        segments: 1,
        eps: config.rms_norm_eps,
        rows: Rows::All,
    });
}

fn project(ops: &mut Vec<Op>, x: BufferId, out: BufferId, projections: &[Projection]) {
    for p in projections {
        ops.push(Op::Linear {
            x,
            weight: p.weight,
            bias: p.bias,
            out: Span { buffer: out, offset: p.offset },
            accumulate: false,
            rows: Rows::All,
        });
    }
}

fn residual(ops: &mut Vec<Op>, x: BufferId, p: &Projection) {
    ops.push(Op::Linear { x, weight: p.weight, bias: p.bias, out: HIDDEN.into(), accumulate: true, rows: Rows::All });
}
