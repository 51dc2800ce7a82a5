//! The decoder block of every supported architecture, written once as a program.

use super::arch::{NormWeights, QkNorm};
use super::config::ModelConfig;
use super::weights::{ExpertWeights, GatedWeights, LayerWeights, Mlp, ModelWeights, Norm, Projection};
use crate::backend::{AttentionShape, BufferDesc, BufferId, NormKind, Op, Program, Rows, Span, WeightId};

/// Builds the program of a model from its configuration and the ids of its uploaded weights.
pub(super) fn build(config: &ModelConfig, weights: &ModelWeights) -> Program {
    let c = config;
    let hidden = c.hidden_size as u32;
    let shape = AttentionShape {
        heads: c.num_attention_heads as u32,
        kv_heads: c.num_key_value_heads as u32,
        head_dim: c.head_dim as u32,
        rotary_dim: c.ropes[0].rotary_dim as u32,
    };
    let mut buffers = Vec::new();
    let mut push = |name, width, logits_rows, per_token| {
        buffers.push(BufferDesc { name, width, logits_rows, per_token });
        BufferId(buffers.len() as u32 - 1)
    };
    let mut buffer = |name, width, logits_rows| push(name, width, logits_rows, 1);
    let names = &c.arch.names.norms;
    let has_dense_layers = c.layers.iter().any(|layer| !layer.sparse);
    let inter = if has_dense_layers { c.intermediate_size as u32 } else { 1 };
    let b = Buffers {
        hidden: buffer("hidden", hidden, false),
        normed: buffer("normed", hidden, false),
        qkv: buffer("qkv", (shape.heads + 2 * shape.kv_heads) * shape.head_dim, false),
        attended: buffer("attended", shape.heads * shape.head_dim, false),
        gated: [buffer("gate_up", 2 * inter, false), buffer("activated", inter, false)],
        branch: (names.attention_out.is_some() || names.mlp_out.is_some()).then(|| buffer("branch", hidden, false)),
        last: buffer("last", hidden, true),
        logits: buffer("logits", c.vocab_size as u32, true),
        experts: c.experts.map(|experts| {
            let (top_k, width) = (experts.per_token as u32, experts.intermediate_size as u32);
            let shared = experts.shared_intermediate_size.unwrap_or(1) as u32;
            ExpertBuffers {
                router: push("router", experts.count as u32, false, 1),
                routes: push("routes", 2 * top_k, false, 1),
                gate_up: push("experts' gate_up", 2 * width, false, top_k),
                activated: push("experts' activated", width, false, top_k),
                down: push("experts' down", hidden, false, top_k),
                shared_gate: push("shared expert's gate", 1, false, 1),
                shared: [
                    push("shared expert's gate_up", 2 * shared, false, 1),
                    push("shared expert's activated", shared, false, 1),
                ],
            }
        }),
    };

    let mut block = Block { config, shape, b, ops: Vec::new() };
    // The residual stream is kept divided by the factor on what is added to it, so that nothing else has to know of it:
    // norms make up for it with the number they add to the mean of squares.
    let scale = c.embedding_multiplier / c.residual_multiplier;
    block.ops.push(Op::Embed { table: weights.embedding, out: b.hidden, scale });
    for (layer, w) in weights.layers.iter().enumerate() {
        let input = block.attention(w, layer);
        block.mlp(w, input);
    }
    block.norm(weights.norm, b.hidden, b.last, false, Rows::Logits);
    for (i, &weight) in weights.head.iter().enumerate() {
        block.ops.push(Op::Linear {
            x: b.last,
            weight,
            bias: None,
            out: b.logits.into(),
            accumulate: i > 0,
            rows: Rows::Compacted,
        });
    }
    if c.logits_multiplier != 1.0 || c.logits_softcap.is_some() {
        let (scale, cap) = (c.logits_multiplier, c.logits_softcap);
        block.ops.push(Op::Scale { x: b.logits, scale, cap, rows: Rows::Compacted });
    }

    Program {
        buffers,
        ops: block.ops,
        layers: c.num_hidden_layers as u32,
        attention: shape,
        rope_tables: c.ropes.len() as u32,
        vocab_size: c.vocab_size as u32,
        logits: b.logits,
    }
}

#[derive(Clone, Copy)]
struct Buffers {
    /// The residual stream, divided by [`ModelConfig::residual_multiplier`].
    hidden: BufferId,
    normed: BufferId,
    qkv: BufferId,
    attended: BufferId,
    /// gate and up, and their product.
    gated: [BufferId; 2],
    /// What attention and MLP add to the residual stream, where a norm comes first.
    branch: Option<BufferId>,
    last: BufferId,
    logits: BufferId,
    experts: Option<ExpertBuffers>,
}

/// Buffers of mixtures; those of experts have a row for every expert of a token.
#[derive(Clone, Copy)]
struct ExpertBuffers {
    router: BufferId,
    routes: BufferId,
    gate_up: BufferId,
    activated: BufferId,
    down: BufferId,
    shared_gate: BufferId,
    /// gate and up of the shared expert, and their product.
    shared: [BufferId; 2],
}

struct Block<'a> {
    config: &'a ModelConfig,
    shape: AttentionShape,
    b: Buffers,
    ops: Vec<Op>,
}

impl Block<'_> {
    /// Adds attention to the residual stream; returns what it read.
    fn attention(&mut self, w: &LayerWeights, layer: usize) -> BufferId {
        let b = self.b;
        let AttentionShape { heads, kv_heads, head_dim, .. } = self.shape;
        let input = self.input(w.attention_in);
        self.project(input, b.qkv, &w.qkv);
        if let Some([q, k]) = w.qk_norms {
            self.norm_heads(q, 0, heads);
            self.norm_heads(k, heads * head_dim, kv_heads);
        }
        let per_layer = self.config.layers[layer];
        let layer = layer as u32;
        self.ops.push(Op::RopeAppend { qkv: b.qkv, layer, rope: per_layer.rope });
        self.ops.push(Op::Attention {
            qkv: b.qkv,
            out: b.attended,
            layer,
            scale: self.config.attention_multiplier,
            softcap: self.config.attention_softcap,
            window: per_layer.window,
        });
        self.add(b.attended, &w.o, w.attention_out);
        input
    }

    /// Adds the MLP to the residual stream; `attention_input` is what attention read.
    fn mlp(&mut self, w: &LayerWeights, attention_input: BufferId) {
        let input = if self.config.parallel_residual { attention_input } else { self.input(w.mlp_in) };
        match &w.mlp {
            Mlp::Dense(mlp) => self.gated(input, mlp, self.b.gated, None, w.mlp_out),
            Mlp::Sparse(mlp) => self.mixture(input, mlp),
        }
    }

    /// Adds a mixture of experts to the residual stream.
    fn mixture(&mut self, input: BufferId, w: &ExpertWeights) {
        let (Some(config), Some(e)) = (self.config.experts, self.b.experts) else { return };
        let (count, top_k, renormalise) = (config.count as u32, config.per_token as u32, config.renormalise);
        self.linear(input, &w.router, e.router.into(), false);
        self.ops.push(Op::Route { logits: e.router, routes: e.routes, top_k, renormalise });
        for p in &w.gate_up {
            let out = Span { buffer: e.gate_up, offset: p.offset };
            self.ops.push(Op::Experts { x: input, weight: p.weight, count, routes: e.routes, out });
        }
        self.ops.push(Op::Glu { x: e.gate_up, out: e.activated, activation: self.config.activation });
        let (weight, out) = (w.down.weight, e.down.into());
        self.ops.push(Op::Experts { x: e.activated, weight, count, routes: e.routes, out });
        if let Some((shared, gate)) = &w.shared {
            self.linear(input, gate, e.shared_gate.into(), false);
            self.gated(input, shared, e.shared, Some(e.shared_gate), None);
        }
        self.ops.push(Op::Combine { x: e.down, routes: e.routes, out: self.b.hidden });
    }

    fn gated(
        &mut self,
        input: BufferId,
        w: &GatedWeights,
        [gate_up, activated]: [BufferId; 2],
        gate: Option<BufferId>,
        norm: Option<Norm>,
    ) {
        self.project(input, gate_up, &w.gate_up);
        self.ops.push(Op::Glu { x: gate_up, out: activated, activation: self.config.activation });
        self.ops.extend(gate.map(|gate| Op::Gate { x: activated, gate }));
        self.add(activated, &w.down, norm);
    }

    /// The residual stream behind a norm, if there is one.
    fn input(&mut self, norm: Option<Norm>) -> BufferId {
        match norm {
            Some(norm) => {
                self.norm(norm, self.b.hidden, self.b.normed, false, Rows::All);
                self.b.normed
            }
            None => self.b.hidden,
        }
    }

    /// A norm of whole rows.
    fn norm(&mut self, norm: Norm, x: BufferId, out: BufferId, accumulate: bool, rows: Rows) {
        let eps = self.config.rms_norm_eps;
        let m = self.config.residual_multiplier;
        self.ops.push(Op::Norm {
            kind: self.kind(),
            x: x.into(),
            weight: norm.weight,
            bias: norm.bias,
            out: out.into(),
            dim: self.config.hidden_size as u32,
            segments: 1,
            eps: if x == self.b.hidden { eps / (m * m) } else { eps },
            accumulate,
            rows,
        });
    }

    /// The norm of `heads` heads from column `offset` of q, k and v on.
    fn norm_heads(&mut self, weight: WeightId, offset: u32, heads: u32) {
        let head_dim = self.shape.head_dim;
        let span = Span { buffer: self.b.qkv, offset };
        let (dim, segments) = match self.config.qk_norm {
            QkNorm::Whole => (heads * head_dim, 1),
            QkNorm::None | QkNorm::Heads | QkNorm::LayerPerHead => (head_dim, heads),
        };
        self.ops.push(Op::Norm {
            kind: self.kind(),
            x: span,
            weight,
            bias: None,
            out: span,
            dim,
            segments,
            eps: self.config.rms_norm_eps,
            accumulate: false,
            rows: Rows::All,
        });
    }

    fn kind(&self) -> NormKind {
        match self.config.arch.norm {
            NormWeights::Layer => NormKind::Layer,
            NormWeights::Rms | NormWeights::RmsPlusOne => NormKind::Rms,
        }
    }

    fn project(&mut self, x: BufferId, out: BufferId, projections: &[Projection]) {
        for p in projections {
            let out = Span { buffer: out, offset: p.offset };
            self.linear(x, p, out, false);
        }
    }

    fn linear(&mut self, x: BufferId, p: &Projection, out: Span, accumulate: bool) {
        self.ops.push(Op::Linear { x, weight: p.weight, bias: p.bias, out, accumulate, rows: Rows::All });
    }

    /// Adds a projection to the residual stream, behind a norm if there is one.
    fn add(&mut self, x: BufferId, p: &Projection, norm: Option<Norm>) {
        match (norm, self.b.branch) {
            (Some(norm), Some(branch)) => {
                self.linear(x, p, branch.into(), false);
                self.norm(norm, branch, self.b.hidden, true, Rows::All);
            }
            _ => self.linear(x, p, self.b.hidden.into(), true),
        }
    }
}
