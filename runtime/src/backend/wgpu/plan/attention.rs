//! Attention: splits of the positions, then their combination.

use awqua_shaders::{
    FLAG_STAGE, FLAG_WHOLE, Heads, Reduce, RowMode, Step, Variant, attention, attention_coop, attention_few,
    attention_reduce, attention_subgroup,
};

use super::{Draft, DraftOp, Launch, Planner, unsupported};
use crate::backend::{BufferId, Op};
use crate::error::Result;

impl Planner<'_> {
    pub(super) fn attention(
        &mut self,
        qkv: BufferId,
        out: BufferId,
        layer: u32,
        (scale, softcap): (f32, Option<f32>),
        window: Option<u32>,
        rest: &[Op],
    ) -> Result<DraftOp> {
        let cap = softcap.unwrap_or(0.0);
        let shape = self.program.attention;
        if shape.head_dim > attention::HEAD_DIM_MAX {
            return Err(unsupported(&format!("heads of {} elements, more than 256", shape.head_dim)));
        }
        let heads = shape.heads * shape.head_dim;
        self.fits(qkv.into(), heads + 2 * shape.kv_heads * shape.head_dim)?;
        self.fits(out.into(), heads)?;
        let kv = self.variant().kv;
        let whole = self.width(out)? == heads;
        let target = if whole { self.stage_target(out, None, rest)? } else { None };
        let mut levels = Vec::new();
        // The number of splits is laid out in the partial buffers, so few and many tokens have parameters of their own.
        let few_tokens = attention::FEW_TOKENS.min(self.few_rows);
        let prefix = self.memory.shared();
        // The kernels on matrix units and in subgroups read one cache.
        let one_cache = prefix == 0 && !self.memory.share_forks;
        let coop = self.backend.coop && attention_coop::handles(shape.head_dim, kv) && one_cache;
        for (most, staged) in [(few_tokens, true), (self.few_rows, true), (u32::MAX, false)] {
            // Rows that the packed matrix behind it takes at once are staged.
            if coop && (!staged || most > few_tokens) {
                let mut drafts = vec![self.attention_coop(qkv, out, layer, (scale, cap), window)?];
                if let Some(target) = target.as_ref().filter(|_| staged) {
                    drafts.push(self.stage(out, target.norm, target.of, RowMode::All)?);
                }
                levels.push((most, drafts));
                continue;
            }
            let context = self.memory.context;
            let window = window.unwrap_or(0);
            let subgroups = most <= few_tokens && one_cache && self.has_subgroups_for(shape.head_dim, self.stride(qkv));
            let split_len = match subgroups {
                true => attention_subgroup::split_len(context),
                false => attention::split_len(most, context),
            };
            let splits_max = attention::splits_max(window, split_len, context);
            let params = attention::Params {
                heads: shape.heads,
                kv_heads: shape.kv_heads,
                head_dim: shape.head_dim,
                qkv_stride: self.stride(qkv),
                context,
                scale,
                window,
                splits_max,
                split_len,
                cap,
                prefix,
                ..Default::default()
            };
            let ((keys, values), (first_keys, first_values)) =
                (self.memory.cache(layer)?, self.memory.shared_cache(layer)?);
            let (partial_out, partial_ml) = (&self.memory.partial_out, &self.memory.partial_ml);
            let mut storage =
                vec![self.buffer(qkv), keys.clone(), values.clone(), partial_out.clone(), partial_ml.clone()];
            let launch = move |step: &Step| {
                let seen = (step.position + step.n_tokens).min(if window == 0 { u32::MAX } else { window });
                Launch {
                    grid: attention::grid(&params, step.position, step.n_tokens),
                    cost: attention::cost(&params, kv, seen, step.n_tokens),
                }
            };
            let target = target.as_ref().filter(|_| staged);
            let staged_out = target.map_or(&self.memory.unread, |target| &target.buffer).clone();
            let first = if subgroups {
                let params = attention_subgroup::Params {
                    heads: params.heads,
                    kv_heads: params.kv_heads,
                    head_dim: params.head_dim,
                    qkv_stride: params.qkv_stride,
                    context,
                    scale,
                    window,
                    splits_max,
                    split_len,
                    cap,
                    out_stride: self.stride(out),
                    flags: if target.is_some() { FLAG_STAGE } else { 0 },
                    stage_quads: target.map_or(0, |target| target.quads),
                    ..Default::default()
                };
                storage.extend([self.buffer(out), staged_out.clone()]);
                let variant = Variant { heads: Heads::of(shape.heads, shape.kv_heads), ..self.variant() };
                self.draft(&attention_subgroup::KERNEL, variant, &params, storage, launch)?
            } else {
                let eights = most <= few_tokens && attention_few::handles(shape.head_dim, params.qkv_stride);
                let kernel = if eights { &attention_few::KERNEL } else { &attention::KERNEL };
                storage.extend([first_keys.clone(), first_values.clone()]);
                self.draft(kernel, self.variant(), &params, storage, launch)?
            };
            let params = attention_reduce::Params {
                heads: shape.heads,
                head_dim: shape.head_dim,
                out_stride: self.stride(out),
                window,
                splits_max,
                split_len,
                flags: if target.is_some() { FLAG_STAGE } else { 0 } | if subgroups { FLAG_WHOLE } else { 0 },
                stage_quads: target.map_or(0, |target| target.quads),
            };
            let storage =
                vec![partial_out.clone(), partial_ml.clone(), self.buffer(out), staged_out, self.memory.dummy.clone()];
            let launch = move |step: &Step| Launch {
                // Nothing is left to do for tokens with one split each.
                grid: match subgroups && attention_subgroup::is_whole(window, split_len, step) {
                    true => [0; 3],
                    false => attention_reduce::grid(&params, step.n_tokens),
                },
                cost: attention_reduce::cost(
                    &params,
                    attention::splits(window, split_len, step.position, step.n_tokens),
                    step.n_tokens,
                ),
            };
            let reduce = self.draft(&attention_reduce::KERNEL, self.variant(), &params, storage, launch)?;
            levels.push((most, vec![first, reduce]));
        }
        self.ready = target.map(|target| target.of);
        Ok(DraftOp { rows: RowMode::All, levels })
    }

    /// Whether subgroups add up the scores of heads of `head_dim` elements in rows of `qkv_stride`.
    pub(super) fn has_subgroups_for(&self, head_dim: u32, qkv_stride: u32) -> bool {
        let (least, _) = self.backend.gpu.summary.subgroup.unwrap_or_default();
        self.backend.reduce == Reduce::Subgroup && attention_subgroup::handles(head_dim, qkv_stride, least)
    }

    /// Many tokens on matrix units.
    fn attention_coop(
        &mut self,
        qkv: BufferId,
        out: BufferId,
        layer: u32,
        (scale, cap): (f32, f32),
        window: Option<u32>,
    ) -> Result<Draft> {
        let shape = self.program.attention;
        let window = window.unwrap_or(0);
        let params = attention_coop::Params {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            qkv_stride: self.stride(qkv),
            out_stride: self.stride(out),
            context: self.memory.context,
            scale,
            window,
            cap,
            ..Default::default()
        };
        let (keys, values) = self.memory.cache(layer)?;
        let storage = vec![self.buffer(qkv), keys.clone(), values.clone(), self.buffer(out)];
        let kv = self.variant().kv;
        let launch = move |step: &Step| {
            let seen = (step.position + step.n_tokens).min(if window == 0 { u32::MAX } else { window });
            Launch {
                grid: attention_coop::grid(&params, step.n_tokens),
                cost: attention_coop::cost(&params, kv, seen, step.n_tokens),
            }
        };
        self.draft(&attention_coop::KERNEL, self.variant(), &params, storage, launch)
    }
}
