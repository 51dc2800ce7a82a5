//! Token choice: one pure definition that the CPU runs and the GPU kernels are checked against.

use crate::error::{Error, ErrorKind, Result};

/// How the next token is chosen.
#[derive(Debug, Clone, PartialEq)]
pub struct Sampling {
    /// 0 takes the most likely token; otherwise logits are divided by it.
    pub temperature: f32,
    /// Keep the k most likely tokens; 0 keeps all.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all.
    pub min_p: f32,
    /// Positive logits of recent tokens are divided by it, negative ones multiplied; 1 changes nothing.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every recent token.
    pub presence_penalty: f32,
    /// Subtracted from a recent token's logit once per occurrence.
    pub frequency_penalty: f32,
    /// How many of the last tokens count as recent.
    pub penalty_window: usize,
}

impl Default for Sampling {
    fn default() -> Self {
        Self {
            temperature: 0.7,
            top_k: 40,
            top_p: 0.95,
            min_p: 0.0,
            repetition_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            penalty_window: 256,
        }
    }
}

impl Sampling {
    /// Always the most likely token.
    pub fn greedy() -> Self {
        Self { temperature: 0.0, top_k: 0, top_p: 1.0, ..Self::default() }
    }

    /// Checks every value.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] naming the first value out of range.
    pub fn validate(&self) -> Result<()> {
        let bad = |name: &str, range: &str, value: f32| {
            Err(Error::new(ErrorKind::InvalidInput, format!("`{name}` must be {range}, got {value}")))
        };
        if !(self.temperature >= 0.0 && self.temperature.is_finite()) {
            return bad("temperature", "finite and at least 0", self.temperature);
        }
        if !(self.top_p > 0.0 && self.top_p <= 1.0) {
            return bad("top_p", "above 0 and at most 1", self.top_p);
        }
        if !(0.0..=1.0).contains(&self.min_p) {
            return bad("min_p", "from 0 to 1", self.min_p);
        }
        if !(self.repetition_penalty > 0.0 && self.repetition_penalty.is_finite()) {
            return bad("repetition_penalty", "finite and above 0", self.repetition_penalty);
        }
        if !self.presence_penalty.is_finite() {
            return bad("presence_penalty", "finite", self.presence_penalty);
        }
        if !self.frequency_penalty.is_finite() {
            return bad("frequency_penalty", "finite", self.frequency_penalty);
        }
        Ok(())
    }
}

/// One choice, complete: the settings, the recent tokens and the random number.
#[derive(Debug, Clone, Copy)]
pub struct SampleRequest<'a> {
    /// The settings, already validated.
    pub sampling: &'a Sampling,
    /// Distinct recent tokens with their number of occurrences, ids below the vocabulary size.
    pub recent: &'a [(u32, u32)],
    /// Uniform in [0, 1).
    pub uniform: f32,
    /// Added to the logits of these distinct ids before anything else; negative infinity bans a token.
    pub bias: &'a [(u32, f32)],
    /// Tokens that may be chosen, if not all: bit `id % 32` of word `id / 32`; ids behind the last word may not.
    pub mask: Option<&'a [u32]>,
}

impl<'a> SampleRequest<'a> {
    /// A choice without recent tokens, biases and mask, with random number 0.
    pub fn new(sampling: &'a Sampling) -> Self {
        Self { sampling, recent: &[], uniform: 0.0, bias: &[], mask: None }
    }

    /// A copy that can wait for its logits.
    #[cfg(any(feature = "wgpu", feature = "cuda"))]
    pub(crate) fn kept(&self) -> KeptRequest {
        KeptRequest {
            sampling: self.sampling.clone(),
            recent: self.recent.to_vec(),
            uniform: self.uniform,
            bias: self.bias.to_vec(),
            mask: self.mask.map(<[u32]>::to_vec),
        }
    }
}

/// A [`SampleRequest`] of its own: the CPU chooses once the row has come from a device.
#[cfg(any(feature = "wgpu", feature = "cuda"))]
#[derive(Debug, Clone)]
pub(crate) struct KeptRequest {
    sampling: Sampling,
    recent: Vec<(u32, u32)>,
    uniform: f32,
    bias: Vec<(u32, f32)>,
    mask: Option<Vec<u32>>,
}

#[cfg(any(feature = "wgpu", feature = "cuda"))]
impl KeptRequest {
    /// The request.
    pub(crate) fn as_request(&self) -> SampleRequest<'_> {
        SampleRequest {
            sampling: &self.sampling,
            recent: &self.recent,
            uniform: self.uniform,
            bias: &self.bias,
            mask: self.mask.as_deref(),
        }
    }
}

/// Picks a token from `logits`, (vocab_size), which it changes.
///
/// In order: biases and mask; penalties of the recent tokens; temperature 0 takes the largest logit (the lowest id among equals; NaN
/// never wins); otherwise logits / temperature, the `top_k` largest, their softmax, the shortest prefix that reaches
/// `top_p`, those of at least `min_p` times the largest probability, and the one at `uniform` of the kept mass.
/// Candidates are ordered by logit, largest first, and by id among equals.
pub fn pick(logits: &mut [f32], request: &SampleRequest<'_>) -> u32 {
    pick_in(logits, request, &mut Vec::new())
}

/// As [`pick`], with memory for the candidates that is used again; (vocab_size) is enough for every choice.
pub fn pick_in(logits: &mut [f32], request: &SampleRequest<'_>, candidates: &mut Vec<(f32, u32)>) -> u32 {
    let s = request.sampling;
    for &(id, bias) in request.bias {
        if let Some(l) = logits.get_mut(id as usize) {
            *l += bias;
        }
    }
    if let Some(mask) = request.mask {
        for (block, logits) in logits.chunks_mut(32).enumerate() {
            let word = mask.get(block).copied().unwrap_or(0);
            for (bit, l) in logits.iter_mut().enumerate() {
                if word >> bit & 1 == 0 {
                    *l = f32::NEG_INFINITY;
                }
            }
        }
    }
    for &(id, count) in request.recent {
        if let Some(l) = logits.get_mut(id as usize) {
            *l = if *l > 0.0 { *l / s.repetition_penalty } else { *l * s.repetition_penalty };
            *l -= s.presence_penalty + s.frequency_penalty * count as f32;
        }
    }
    if s.temperature == 0.0 {
        return argmax(logits);
    }
    candidates.clear();
    let chosen = logits.iter().zip(0u32..).filter(|(l, _)| !l.is_nan() && **l != f32::NEG_INFINITY);
    candidates.extend(chosen.map(|(&l, id)| (l, id)));
    if candidates.is_empty() {
        return 0;
    }
    let order = |a: &(f32, u32), b: &(f32, u32)| b.0.total_cmp(&a.0).then(a.1.cmp(&b.1));
    if s.top_k > 0 && (s.top_k as usize) < candidates.len() {
        candidates.select_nth_unstable_by(s.top_k as usize - 1, order);
        candidates.truncate(s.top_k as usize);
    }
    candidates.sort_unstable_by(order);
    let max = candidates[0].0;
    if max.is_infinite() {
        // A softmax over infinities is not defined; the order still is.
        return candidates[0].1;
    }
    let mut total = 0.0;
    for candidate in candidates.iter_mut() {
        candidate.0 = ((candidate.0 - max) / s.temperature).exp();
        total += candidate.0;
    }
    // The largest weight is exp(0) = 1, so `min_p` compares with the weights directly.
    let (mut kept, mut mass) = (0, 0.0);
    for &(weight, _) in candidates.iter() {
        if kept > 0 && (mass >= s.top_p * total || weight < s.min_p) {
            break;
        }
        mass += weight;
        kept += 1;
    }
    let target = request.uniform * mass;
    let mut cumulated = 0.0;
    for &(weight, id) in &candidates[..kept] {
        cumulated += weight;
        if cumulated > target {
            return id;
        }
    }
    candidates[kept - 1].1
}

/// Index of the largest value, the first among equals; NaN never wins; 0 if there is nothing else.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = (f32::NEG_INFINITY, 0);
    for (&l, id) in logits.iter().zip(0u32..) {
        if l > best.0 {
            best = (l, id);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pick_with(logits: &[f32], sampling: &Sampling, recent: &[(u32, u32)], uniform: f32) -> u32 {
        sampling.validate().unwrap();
        pick(&mut logits.to_vec(), &SampleRequest { recent, uniform, ..SampleRequest::new(sampling) })
    }

    #[test]
    fn greedy_takes_the_first_largest_and_ignores_nan() {
        let greedy = Sampling::greedy();
        assert_eq!(pick_with(&[1.0, 3.0, f32::NAN, 3.0], &greedy, &[], 0.9), 1);
        assert_eq!(pick_with(&[f32::NAN, f32::NAN], &greedy, &[], 0.9), 0);
    }

    #[test]
    fn frequencies_follow_the_softmax() {
        let sampling = Sampling { temperature: 0.5, top_k: 0, top_p: 1.0, ..Sampling::default() };
        let logits = [0.0f32, 1.0, 0.5, -1.0];
        let weights: Vec<f64> = logits.iter().map(|&l| f64::from(l / 0.5).exp()).collect();
        let total: f64 = weights.iter().sum();
        let mut counts = [0u32; 4];
        const N: u32 = 100_000;
        for i in 0..N {
            counts[pick_with(&logits, &sampling, &[], i as f32 / N as f32) as usize] += 1;
        }
        for (count, weight) in counts.iter().zip(weights) {
            assert!((f64::from(*count) / f64::from(N) - weight / total).abs() < 1e-4);
        }
    }

    #[test]
    fn filters_cut_the_tail() {
        let logits = [3.0f32, 2.0, 1.0, 0.0, 2.0];
        let base = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, ..Sampling::default() };
        let last = 0.999_999;
        assert_eq!(pick_with(&logits, &base, &[], last), 3);
        assert_eq!(pick_with(&logits, &Sampling { top_k: 3, ..base.clone() }, &[], last), 4);
        assert_eq!(pick_with(&logits, &Sampling { top_k: 2, ..base.clone() }, &[], last), 1);
        assert_eq!(pick_with(&logits, &Sampling { top_p: 0.5, ..base.clone() }, &[], last), 0);
        assert_eq!(pick_with(&logits, &Sampling { min_p: 0.3, ..base.clone() }, &[], last), 4);
    }

    #[test]
    fn penalties_apply_once_a_token_and_per_count() {
        let logits = [2.0f32, 1.9, -1.0];
        let greedy = Sampling { repetition_penalty: 2.0, ..Sampling::greedy() };
        assert_eq!(pick_with(&logits, &greedy, &[(0, 3)], 0.0), 1);
        let greedy = Sampling { frequency_penalty: 0.04, ..Sampling::greedy() };
        assert_eq!(pick_with(&logits, &greedy, &[(0, 2)], 0.0), 0);
        assert_eq!(pick_with(&logits, &greedy, &[(0, 3)], 0.0), 1);
        let greedy = Sampling { presence_penalty: 0.2, ..Sampling::greedy() };
        assert_eq!(pick_with(&logits, &greedy, &[(0, 1)], 0.0), 1);
    }

    #[test]
    fn values_out_of_range_are_refused() {
        for bad in [
            Sampling { temperature: f32::NAN, ..Sampling::default() },
            Sampling { temperature: -1.0, ..Sampling::default() },
            Sampling { top_p: 0.0, ..Sampling::default() },
            Sampling { top_p: 1.5, ..Sampling::default() },
            Sampling { min_p: -0.1, ..Sampling::default() },
            Sampling { repetition_penalty: 0.0, ..Sampling::default() },
            Sampling { presence_penalty: f32::INFINITY, ..Sampling::default() },
        ] {
            assert_eq!(bad.validate().unwrap_err().kind(), ErrorKind::InvalidInput);
        }
    }
}
