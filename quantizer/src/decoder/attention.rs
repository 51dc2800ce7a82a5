//! Causal attention of one sequence with grouped heads, forward and backward, and the rotary embedding.

use super::Decoder;
use crate::math::{View, gemm};

/// Rotates the heads of `x` (tokens, heads * head_dim) by their positions, or back.
pub(super) fn rotate(decoder: &Decoder, x: &mut [f32], heads: usize, back: bool) {
    let head_dim = decoder.config.head_dim;
    let half = decoder.config.ropes[0].rotary_dim / 2;
    let sign = if back { -1.0 } else { 1.0 };
    for (row, angles) in x.chunks_exact_mut(heads * head_dim).zip(decoder.rope.chunks_exact(2 * half)) {
        for head in row.chunks_exact_mut(head_dim) {
            for (i, angle) in angles.chunks_exact(2).enumerate() {
                let (cos, sin) = (angle[0], sign * angle[1]);
                let (a, b) = (head[i], head[i + half]);
                head[i] = a * cos - b * sin;
                head[i + half] = b * cos + a * sin;
            }
        }
    }
}

/// Attention of one sequence. `q` (t, heads * head_dim) and `k` are rotated; returns the output (t, heads * head_dim)
/// and, if asked for, the probabilities (heads, t, t).
pub(super) fn attention(
    decoder: &Decoder,
    layer: usize,
    (q, k, v): (&[f32], &[f32], &[f32]),
    keep: bool,
) -> (Vec<f32>, Vec<f32>) {
    let (heads, kv_heads, dim) = heads(decoder);
    let (q_width, kv_width) = (heads * dim, kv_heads * dim);
    let t = q.len() / q_width;
    let window = decoder.config.layers[layer].window.map_or(usize::MAX, |w| w as usize);
    let scale = 1.0 / (dim as f32).sqrt();
    let mut out = vec![0.0; t * q_width];
    let mut kept = vec![0.0; if keep { heads * t * t } else { 0 }];
    let mut scores = vec![0.0; t * t];
    for head in 0..heads {
        let kv = head / (heads / kv_heads) * dim;
        let qh = View::strided(&q[head * dim..], dim, q_width);
        gemm(decoder.threads, scale, qh, View::strided(&k[kv..], dim, kv_width).t(), 0.0, &mut scores, t);
        decoder.threads.rows(&mut scores, t, |first, rows| {
            for (i, row) in rows.chunks_exact_mut(t).enumerate() {
                softmax(row, first + i, window);
            }
        });
        gemm(
            decoder.threads,
            1.0,
            View::new(&scores, t),
            View::strided(&v[kv..], dim, kv_width),
            0.0,
            &mut out[head * dim..],
            q_width,
        );
        if keep {
            kept[head * t * t..][..t * t].copy_from_slice(&scores);
        }
    }
    (out, kept)
}

/// Softmax over the positions that token `i` sees; the others become 0.
fn softmax(row: &mut [f32], i: usize, window: usize) {
    let first = (i + 1).saturating_sub(window);
    let seen = &mut row[first..=i];
    let max = seen.iter().fold(f32::NEG_INFINITY, |m, &s| m.max(s));
    let mut sum = 0.0;
    for s in seen.iter_mut() {
        *s = (*s - max).exp();
        sum += *s;
    }
    for s in seen {
        *s /= sum;
    }
    row[..first].fill(0.0);
    row[i + 1..].fill(0.0);
}

/// Gradients of q, k and v from that of the output; arguments as in [`attention`].
pub(super) fn attention_back(
    decoder: &Decoder,
    (q, k, v): (&[f32], &[f32], &[f32]),
    probabilities: &[f32],
    d_out: &[f32],
) -> (Vec<f32>, Vec<f32>, Vec<f32>) {
    let (heads, kv_heads, dim) = heads(decoder);
    let (q_width, kv_width) = (heads * dim, kv_heads * dim);
    let t = q.len() / q_width;
    let scale = 1.0 / (dim as f32).sqrt();
    let threads = decoder.threads;
    let (mut dq, mut dk, mut dv) = (vec![0.0; q.len()], vec![0.0; k.len()], vec![0.0; v.len()]);
    let mut ds = vec![0.0; t * t];
    for head in 0..heads {
        let kv = head / (heads / kv_heads) * dim;
        let p = &probabilities[head * t * t..][..t * t];
        let d = View::strided(&d_out[head * dim..], dim, q_width);
        gemm(threads, 1.0, View::new(p, t).t(), d, 1.0, &mut dv[kv..], kv_width);
        gemm(threads, 1.0, d, View::strided(&v[kv..], dim, kv_width).t(), 0.0, &mut ds, t);
        for (ds, p) in ds.chunks_exact_mut(t).zip(p.chunks_exact(t)) {
            let mean = crate::math::dot(ds, p);
            for (ds, &p) in ds.iter_mut().zip(p) {
                *ds = p * (*ds - mean);
            }
        }
        let s = View::new(&ds, t);
        gemm(threads, scale, s, View::strided(&k[kv..], dim, kv_width), 0.0, &mut dq[head * dim..], q_width);
        gemm(threads, scale, s.t(), View::strided(&q[head * dim..], dim, q_width), 1.0, &mut dk[kv..], kv_width);
    }
    (dq, dk, dv)
}

fn heads(decoder: &Decoder) -> (usize, usize, usize) {
    (decoder.config.num_attention_heads, decoder.config.num_key_value_heads, decoder.config.head_dim)
}
