//! Gradients of a block's weights from the gradient of its output.

use super::attention::{attention, attention_back, rotate};
use super::forward::{Projected, inverse_rms, silu};
use super::{Block, Decoder, Slot};
use crate::math::{Threads, View, gemm};

/// Gradients of the weights of a block, in the order of [`Slot::ALL`], and of the norms.
#[derive(Debug, Clone)]
pub struct Gradients {
    /// (n, k) each.
    pub weights: Vec<Vec<f32>>,
    /// (hidden).
    pub input_norm: Vec<f32>,
    /// (hidden).
    pub post_norm: Vec<f32>,
    /// (n) each, in the order of [`Slot::ALL`]; empty where there is none.
    pub biases: Vec<Vec<f32>>,
}

/// What the forward pass of one sequence leaves for the backward pass.
#[derive(Debug)]
pub(crate) struct Trace {
    x: Vec<f32>,
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    raw_q: Vec<f32>,
    raw_k: Vec<f32>,
    probabilities: Vec<f32>,
    attended: Vec<f32>,
    middle: Vec<f32>,
    mlp_normed: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    activated: Vec<f32>,
    /// Output of the block.
    pub(crate) out: Vec<f32>,
}

impl Decoder {
    /// As [`Decoder::forward`] of one sequence, keeping what [`Decoder::backward`] needs.
    pub(crate) fn trace(&self, block: &Block, x: &[f32]) -> Trace {
        let normed = self.attention_input(block, x);
        let Projected { q, k, v, raw_q, raw_k } = self.project(block, &normed);
        let (attended, probabilities) = attention(self, block.layer, (&q, &k, &v), true);
        let mut middle = x.to_vec();
        block.linear(Slot::O).accumulate(self, &attended, &mut middle);
        let mlp_normed = self.mlp_input(block, &middle);
        let gate = block.linear(Slot::Gate).forward(self, &mlp_normed);
        let up = block.linear(Slot::Up).forward(self, &mlp_normed);
        let activated: Vec<f32> = gate.iter().zip(&up).map(|(&g, &u)| silu(g) * u).collect();
        let mut out = middle.clone();
        block.linear(Slot::Down).accumulate(self, &activated, &mut out);
        let x = x.to_vec();
        Trace {
            x,
            normed,
            q,
            k,
            v,
            raw_q,
            raw_k,
            probabilities,
            attended,
            middle,
            mlp_normed,
            gate,
            up,
            activated,
            out,
        }
    }

    /// Adds to `gradients` those of a loss whose gradient by the block's output is `d_out` (length, hidden), and returns
    /// the gradient by the block's input.
    pub(crate) fn backward(&self, block: &Block, trace: &Trace, d_out: &[f32], gradients: &mut Gradients) -> Vec<f32> {
        let threads = self.threads;
        let eps = self.config.rms_norm_eps;
        let add = |slot: Slot, d: &[f32], x: &[f32], gradients: &mut Gradients| {
            let linear = block.linear(slot);
            let (rows, d, x) = (d, View::new(d, linear.n), View::new(x, linear.k));
            gemm(threads, 1.0, d.t(), x, 1.0, &mut gradients.weights[slot as usize], linear.k);
            if linear.bias.is_some() {
                for row in rows.chunks_exact(linear.n) {
                    gradients.biases[slot as usize].iter_mut().zip(row).for_each(|(sum, d)| *sum += d);
                }
            }
        };

        let mut d_middle = d_out.to_vec();
        add(Slot::Down, d_out, &trace.activated, gradients);
        let mut d_gate = through(threads, block, Slot::Down, d_out);
        let mut d_up = d_gate.clone();
        let width = block.linear(Slot::Gate).n;
        threads.rows(&mut d_up, width, |first, rows| {
            for (d, &g) in rows.iter_mut().zip(&trace.gate[first * width..]) {
                *d *= silu(g);
            }
        });
        threads.rows(&mut d_gate, width, |first, rows| {
            let at = first * width;
            for ((d, &g), &u) in rows.iter_mut().zip(&trace.gate[at..]).zip(&trace.up[at..]) {
                let sigmoid = 1.0 / (1.0 + (-g).exp());
                *d *= u * sigmoid * (1.0 + g * (1.0 - sigmoid));
            }
        });
        add(Slot::Gate, &d_gate, &trace.mlp_normed, gradients);
        add(Slot::Up, &d_up, &trace.mlp_normed, gradients);
        let mut d_normed = through(threads, block, Slot::Gate, &d_gate);
        for (d, more) in d_normed.iter_mut().zip(through(threads, block, Slot::Up, &d_up)) {
            *d += more;
        }
        norm_back(&trace.middle, &block.post_norm, eps, &d_normed, &mut gradients.post_norm, &mut d_middle);

        add(Slot::O, &d_middle, &trace.attended, gradients);
        let d_attended = through(threads, block, Slot::O, &d_middle);
        let (mut dq, mut dk, dv) =
            attention_back(self, (&trace.q, &trace.k, &trace.v), &trace.probabilities, &d_attended);
        rotate(self, &mut dq, self.config.num_attention_heads, true);
        rotate(self, &mut dk, self.config.num_key_value_heads, true);
        for (d, raw, norm) in [(&mut dq, &trace.raw_q, &block.q_norm), (&mut dk, &trace.raw_k, &block.k_norm)] {
            if let Some(norm) = norm {
                let mut through_norm = vec![0.0; d.len()];
                // The norm itself is not learned.
                norm_back(raw, norm, eps, d, &mut vec![0.0; norm.len()], &mut through_norm);
                *d = through_norm;
            }
        }
        add(Slot::Q, &dq, &trace.normed, gradients);
        add(Slot::K, &dk, &trace.normed, gradients);
        add(Slot::V, &dv, &trace.normed, gradients);
        let mut d_normed = through(threads, block, Slot::Q, &dq);
        for (slot, d) in [(Slot::K, &dk), (Slot::V, &dv)] {
            let linear = block.linear(slot);
            let (d, w) = (View::new(d, linear.n), View::new(&linear.weight, linear.k));
            gemm(threads, 1.0, d, w, 1.0, &mut d_normed, linear.k);
        }
        norm_back(&trace.x, &block.input_norm, eps, &d_normed, &mut gradients.input_norm, &mut d_middle);
        d_middle
    }
}

impl Gradients {
    /// Zeros for a block.
    pub fn zeros(block: &Block) -> Self {
        Self {
            weights: block.linears.iter().map(|linear| vec![0.0; linear.weight.len()]).collect(),
            input_norm: vec![0.0; block.input_norm.len()],
            post_norm: vec![0.0; block.post_norm.len()],
            biases: block.linears.iter().map(|l| vec![0.0; l.bias.as_ref().map_or(0, Vec::len)]).collect(),
        }
    }

    /// Sets everything to zero.
    pub fn clear(&mut self) {
        let norms = [&mut self.input_norm, &mut self.post_norm];
        self.weights.iter_mut().chain(&mut self.biases).chain(norms).for_each(|gradient| gradient.fill(0.0));
    }
}

/// The gradient of a linear module's input from that of its output.
fn through(threads: Threads, block: &Block, slot: Slot, d: &[f32]) -> Vec<f32> {
    let linear = block.linear(slot);
    let mut out = vec![0.0; d.len() / linear.n * linear.k];
    gemm(threads, 1.0, View::new(d, linear.n), View::new(&linear.weight, linear.k), 0.0, &mut out, linear.k);
    out
}

/// Adds the gradients of a norm: to `d_weight` that of its weight, to `d_x` that of its input.
pub(super) fn norm_back(x: &[f32], weight: &[f32], eps: f32, d: &[f32], d_weight: &mut [f32], d_x: &mut [f32]) {
    let dim = weight.len();
    for (row, (x, d)) in x.chunks_exact(dim).zip(d.chunks_exact(dim)).enumerate() {
        let factor = inverse_rms(x, eps);
        let mut inner = 0.0;
        for (((&x, &d), &w), d_weight) in x.iter().zip(d).zip(weight).zip(d_weight.iter_mut()) {
            *d_weight += d * x * factor;
            inner += d * w * x;
        }
        let common = inner * factor * factor * factor / dim as f32;
        for (((out, &x), &d), &w) in d_x[row * dim..].iter_mut().zip(x).zip(d).zip(weight) {
            *out += d * w * factor - common * x;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::tiny;
    use super::*;
    use crate::random::Random;

    #[test]
    fn gradients_are_the_slopes_of_the_output() {
        for head_norms in [false, true] {
            let (decoder, block) = tiny(3, head_norms);
            let mut random = Random::new(9);
            let x = random.normals(10 * 64);
            // The loss is a fixed random combination of the outputs.
            let d_out = random.normals(10 * 64);
            let loss = |block: &Block| {
                let mut out = x.clone();
                decoder.forward(block, &mut out, &mut |_, _| {});
                out.iter().zip(&d_out).map(|(o, d)| f64::from(o * d)).sum::<f64>()
            };
            let trace = decoder.trace(&block, &x);
            let mut expected_out = x.clone();
            decoder.forward(&block, &mut expected_out, &mut |_, _| {});
            assert!(trace.out.iter().zip(&expected_out).all(|(a, b)| (a - b).abs() < 1e-4));
            let mut gradients = Gradients::zeros(&block);
            let d_x = decoder.backward(&block, &trace, &d_out, &mut gradients);

            // Along a random direction in the weights of each module, the slope is the inner product.
            let check = |name: &str, gradient: &[f32], change: &dyn Fn(&mut Block, &[f32], f32)| {
                let direction = Random::new(21).normals(gradient.len());
                let slope: f64 = gradient.iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
                let at = |step: f32| {
                    let mut moved = block.clone();
                    change(&mut moved, &direction, step);
                    loss(&moved)
                };
                let measured = (at(1e-3) - at(-1e-3)) / 2e-3;
                let size = slope.abs().max(measured.abs()).max(1.0);
                assert!((slope - measured).abs() < 0.02 * size, "{name}: {slope} against {measured}");
            };
            let add = |w: &mut [f32], d: &[f32], step: f32| w.iter_mut().zip(d).for_each(|(w, d)| *w += step * d);
            for slot in Slot::ALL {
                check(slot.module(), &gradients.weights[slot as usize], &|block, direction, step| {
                    add(&mut block.linear_mut(slot).weight, direction, step);
                });
            }
            let slope = |d_x: &[f32], direction: &[f32]| -> f64 {
                d_x.iter().zip(direction).map(|(g, d)| f64::from(g * d)).sum()
            };
            let direction = Random::new(22).normals(x.len());
            let at = |step: f32| {
                let mut out: Vec<f32> = x.iter().zip(&direction).map(|(x, d)| x + step * d).collect();
                decoder.forward(&block, &mut out, &mut |_, _| {});
                out.iter().zip(&d_out).map(|(o, d)| f64::from(o * d)).sum::<f64>()
            };
            let (found, measured) = (slope(&d_x, &direction), (at(1e-3) - at(-1e-3)) / 2e-3);
            assert!((found - measured).abs() < 0.02 * measured.abs().max(1.0), "input: {found} against {measured}");
            check("bias", &gradients.biases[Slot::Q as usize], &|block, d, step| {
                add(block.linear_mut(Slot::Q).bias.as_mut().unwrap(), d, step);
            });
            check("input_norm", &gradients.input_norm, &|block, d, step| add(&mut block.input_norm, d, step));
            check("post_norm", &gradients.post_norm, &|block, d, step| add(&mut block.post_norm, d, step));
        }
    }
}
