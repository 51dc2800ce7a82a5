//! Attention over a cache.

use super::*;

/// The kernels for few tokens and for many.
fn names_of(kv_type: u32, head_dim: usize) -> [&'static str; 2] {
    cuda::attention_names(head_dim as u32, kv_type == cuda::KV_Q8).expect("a head that they are compiled for")
}

/// A cache with one session's keys and values of a layer, and what attention has to give.
struct Attention {
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    context: usize,
    keys: Vec<f32>,
    values: Vec<f32>,
    /// The first positions, which are shared, and what holds them; what holds the others.
    shared: usize,
    prefix: Option<Buffer>,
    cache: Buffer,
    scale: f32,
    /// Bound of scores, 0 for none.
    cap: f32,
}

impl Attention {
    fn new(
        device: &Device,
        (heads, kv_heads, head_dim): (usize, usize, usize),
        context: usize,
        (shared, seen): (usize, usize),
        kv: u32,
        rng: &mut Rng,
    ) -> Self {
        let half = |v: &f32| f16::from_f32(*v).to_f32();
        let len = kv_heads * context * head_dim;
        let (mut keys, mut values) = (rng.values(len, 2.0), rng.values(len, 1.0));
        for all in [&mut keys, &mut values] {
            match kv {
                cuda::KV_F16 => all.iter_mut().for_each(|v| *v = half(v)),
                cuda::KV_Q8 => *all = unpack(&pack(all, head_dim), head_dim),
                _ => {}
            }
        }
        // What lies behind the last position is whatever was there.
        for all in [&mut keys, &mut values] {
            for (i, v) in all.iter_mut().enumerate() {
                if i / head_dim % context >= seen {
                    *v = if kv == cuda::KV_Q8 { 6e4 } else { f32::NAN };
                }
            }
        }
        // Layer 1 of 2.
        let both: Vec<f32> = vec![f32::NAN; 2 * len].into_iter().chain(keys.clone()).chain(values.clone()).collect();
        let cache_of = |positions: std::ops::Range<usize>| {
            let lines = both.chunks(context * head_dim);
            let part: Vec<f32> =
                lines.flat_map(|line| &line[positions.start * head_dim..positions.end * head_dim]).copied().collect();
            match kv {
                cuda::KV_F32 => device.upload(&part),
                cuda::KV_F16 => device.upload(&part.iter().map(|v| f16::from_f32(*v).to_bits()).collect::<Vec<_>>()),
                _ => device.upload(&cache_of_8_bits(&part, head_dim, positions.len())),
            }
        };
        let prefix = (shared > 0).then(|| cache_of(0..shared));
        let cache = cache_of(shared..context);
        let scale = 1.0 / (head_dim as f32).sqrt();
        let cap = if rng.below(3) == 0 { 2.5 } else { 0.0 };
        Self { heads, kv_heads, head_dim, context, keys, values, shared, prefix, cache, scale, cap }
    }

    fn kernel_scale(&self) -> f32 {
        if self.cap > 0.0 { self.scale / self.cap } else { self.scale * std::f32::consts::LOG2_E }
    }

    fn kernel_cap(&self) -> f32 {
        self.cap * std::f32::consts::LOG2_E
    }

    fn rows(&self, device: &Device, first: usize, tokens: usize) -> Buffer {
        let rows: Vec<Row> = (0..tokens)
            .map(|t| Row {
                cache: self.cache.address(),
                prefix: self.prefix.as_ref().map_or(0, |prefix| prefix.address()),
                rope: 0,
                context: self.context as u32,
                position: (first + t) as u32,
                shared: self.shared as u32,
                own: (self.context - self.shared) as u32,
            })
            .collect();
        device.upload(&rows)
    }

    /// Output (heads * head_dim) of a token at `position` with queries `q`.
    fn expected(&self, q: &[f32], position: usize, window: usize) -> Vec<f64> {
        let first = if window > 0 { (position + 1).saturating_sub(window) } else { 0 };
        let dim = self.head_dim;
        (0..self.heads)
            .flat_map(|head| {
                let line = head / (self.heads / self.kv_heads) * self.context;
                let score = |j: usize| {
                    let key = &self.keys[(line + j) * dim..][..dim];
                    let dot: f64 =
                        q[head * dim..][..dim].iter().zip(key).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                    let score = dot * f64::from(self.scale);
                    let cap = f64::from(self.cap);
                    if cap > 0.0 { cap * (score / cap).tanh() } else { score }
                };
                let scores: Vec<f64> = (first..=position).map(score).collect();
                let most = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - most).exp()).collect();
                let total: f64 = weights.iter().sum();
                let at = move |i: usize| {
                    weights
                        .iter()
                        .enumerate()
                        .map(|(j, w)| w / total * f64::from(self.values[(line + first + j) * dim + i]))
                        .sum()
                };
                (0..dim).map(at).collect::<Vec<f64>>()
            })
            .collect()
    }
}

/// Rows of `head_dim` values, a multiple of 4, as the words of a cache: codes of all rows, then scales. A row with NaN has
/// NaN for its scales.
fn pack(values: &[f32], head_dim: usize) -> Vec<u32> {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for row in values.chunks(head_dim) {
        let mut of_row = vec![0u16; 2 * (cuda::scale_bytes(head_dim as u32) / 4) as usize];
        let unknown = row.iter().any(|v| v.is_nan());
        for (group, bits) in row.chunks(cuda::KV_GROUP as usize).zip(&mut of_row) {
            let most = group.iter().fold(0.0f32, |most, v| most.max(v.abs())).min(65504.0);
            let scale = f16::from_f32(most / 127.0);
            *bits = if unknown { f16::NAN } else { scale }.to_bits();
            let wide = scale.to_f32();
            let code = |v: f32| if wide > 0.0 { (v / wide).clamp(-127.0, 127.0).round_ties_even() as i8 } else { 0 };
            codes.extend(group.iter().map(|&v| code(v) as u8));
        }
        scales.extend(of_row);
    }
    let codes = codes.chunks(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    codes.chain(scales.chunks(2).map(|pair| u32::from(pair[0]) | u32::from(pair[1]) << 16)).collect()
}

/// What [`pack`] made words of.
fn unpack(words: &[u32], head_dim: usize) -> Vec<f32> {
    let row_words = head_dim / 4 + (cuda::scale_bytes(head_dim as u32) / 4) as usize;
    let (codes, scales) = words.split_at(words.len() / row_words * (head_dim / 4));
    let scale = |row: usize, group: usize| {
        let word = scales[row * (cuda::scale_bytes(head_dim as u32) / 4) as usize + group / 2];
        f16::from_bits((word >> (16 * (group % 2))) as u16).to_f32()
    };
    let codes = codes.iter().flat_map(|word| word.to_le_bytes());
    codes
        .enumerate()
        .map(|(i, code)| f32::from(code as i8) * scale(i / head_dim, i % head_dim / cuda::KV_GROUP as usize))
        .collect()
}

/// Codes of all rows, then the scales of each line of `context` rows, with room for a multiple of four.
fn cache_of_8_bits(values: &[f32], head_dim: usize, context: usize) -> Vec<u8> {
    let words = pack(values, head_dim);
    let (codes, scales) = words.split_at(values.len() / 4);
    let row = cuda::scale_bytes(head_dim as u32) as usize / 4;
    let mut all = codes.to_vec();
    for line in scales.chunks(context * row) {
        all.extend_from_slice(line);
        all.resize(all.len() + (context.next_multiple_of(4) - context) * row, 0x7bff_7bff);
    }
    all.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Positions in front of `first` that are shared in every other case of each type of cache.
fn prefix(case: usize, first: usize, rng: &mut Rng) -> usize {
    let grain = cuda::BLOCK_POSITIONS as usize;
    match first / grain {
        most if most > 0 && (case / 2 + case).is_multiple_of(2) => (1 + rng.below(most as u32) as usize) * grain,
        _ => 0,
    }
}

#[test]
fn attention_for_few_tokens() {
    if !is_on_machine("attention::attention_for_few_tokens", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("attention_for_few_tokens"));
    let mut cases = vec![
        ((2, 2, 64), 0, 1, 0, 3),
        ((4, 2, 64), 100, 1, 0, 2),
        ((3, 1, 64), 200, 3, 70, 5),
        ((2, 1, 96), 130, 1, 0, 4),
        ((8, 1, 128), 300, 1, 0, 4),
        ((2, 2, 128), 63, 2, 33, 1),
        ((20, 1, 64), 90, 1, 0, 2),
        ((2, 1, 256), 150, 1, 0, 3),
    ];
    if is_fast() {
        cases.extend([
            ((32, 32, 128), 2047, 1, 0, 8),
            ((32, 8, 128), 8000, 2, 0, 33),
            ((64, 8, 64), 5000, 1, 1000, 17),
        ]);
    }
    let cases = cases.into_iter().flat_map(|case| [(case, cuda::KV_F16), (case, cuda::KV_Q8)]);
    for (i, ((shape @ (heads, kv_heads, head_dim), first, tokens, window, splits), kv_type)) in cases.enumerate() {
        let shared = cuda::attention_shared(head_dim as u32, kv_type == cuda::KV_Q8);
        if shared > device.gpu.limits.shared {
            continue;
        }
        let context = first + tokens + 70;
        let kv =
            Attention::new(&device, shape, context, (prefix(i, first, &mut rng), first + tokens), kv_type, &mut rng);
        let width = heads * head_dim;
        let q = rounded(&(0..tokens).map(|_| rng.values(width, 2.0)).collect::<Vec<_>>());
        let q_buffer = device.upload(&q.concat().iter().map(|v| f16::from_f32(*v).to_bits()).collect::<Vec<_>>());
        let rows = kv.rows(&device, first, tokens);
        let stride = width.next_multiple_of(STAGE as usize);
        let blocks = kv_heads * (heads / kv_heads).div_ceil(cuda::MANY_HEADS as usize);
        let partial = device.poisoned::<f32>(tokens * heads * splits * head_dim);
        let weights = device.poisoned::<f32>(tokens * heads * splits * 2);
        let arrived = device.zeros(tokens * blocks * 4);
        let [name, _] = names_of(kv_type, head_dim);
        // Twice, to see that the counters are left as they were found.
        for _ in 0..2 {
            let out = device.poisoned::<u16>(tokens * stride);
            let arguments = AttentionArgs {
                q: q_buffer.address(),
                rows: rows.address(),
                out: out.address(),
                partial: partial.address(),
                weights: weights.address(),
                arrived: arrived.address(),
                q_stride: width as u32,
                out_stride: stride as u32,
                out_tiled: 0,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                layer: 1,
                window: window as u32,
                scale: kv.kernel_scale(),
                cap: kv.kernel_cap(),
                layers: 2,
            };
            device.run(name, [splits as u32, blocks as u32, tokens as u32], 128, shared, &arguments);
            let found: Vec<u16> = device.download(&out, tokens * stride);
            for (t, q) in q.iter().enumerate() {
                for (i, expected) in kv.expected(q, first + t, window).iter().enumerate() {
                    let found = f64::from(f16::from_bits(found[t * stride + i]).to_f32());
                    let label =
                        format!("{name} {shape:?} at {first}, window {window}, {splits} splits, token {t}, {i}");
                    assert!((found - expected).abs() < 2e-3, "{label}: {found}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn attention_for_many_tokens() {
    if !is_on_machine("attention::attention_for_many_tokens", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("attention_for_many_tokens"));
    let mut cases = vec![
        ((2, 1, 64), 0, 150, 0),
        ((2, 2, 64), 37, 40, 50),
        ((1, 1, 96), 100, 70, 0),
        ((2, 1, 128), 64, 129, 90),
        ((1, 1, 256), 5, 33, 0),
    ];
    if is_fast() {
        cases.extend([((8, 2, 128), 0, 1024, 0), ((8, 8, 64), 1000, 700, 300)]);
    }
    let cases = cases.into_iter().flat_map(|case| [(case, cuda::KV_F16), (case, cuda::KV_Q8)]);
    for (i, ((shape @ (heads, kv_heads, head_dim), first, tokens, window), kv_type)) in cases.enumerate() {
        let shared = cuda::attention_coop_shared(head_dim as u32);
        if shared > device.gpu.limits.shared {
            continue;
        }
        let positions = (prefix(i, first, &mut rng), first + tokens);
        let kv = Attention::new(&device, shape, first + tokens + 9, positions, kv_type, &mut rng);
        let width = heads * head_dim;
        let q = rounded(&(0..tokens).map(|_| rng.values(width, 2.0)).collect::<Vec<_>>());
        let q_buffer = device.upload(&q.concat().iter().map(|v| f16::from_f32(*v).to_bits()).collect::<Vec<_>>());
        let rows = kv.rows(&device, first, tokens);
        let stride = width.next_multiple_of(STAGE as usize);
        let [_, name] = names_of(kv_type, head_dim);
        for tiled in [true, false] {
            let room = tokens.next_multiple_of(128) * stride;
            let out = device.poisoned::<u16>(room);
            let arguments = AttentionCoopArgs {
                q: q_buffer.address(),
                rows: rows.address(),
                out: out.address(),
                tokens: tokens as u32,
                q_stride: width as u32,
                out_stride: (if tiled { stride / CHUNK as usize } else { stride }) as u32,
                out_tiled: u32::from(tiled),
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                layer: 1,
                window: window as u32,
                scale: kv.kernel_scale(),
                cap: kv.kernel_cap(),
                layers: 2,
                pad: 0,
            };
            let grid = [(tokens as u32).div_ceil(cuda::COOP_TOKENS), heads as u32, 1];
            device.run(name, grid, 256, shared, &arguments);
            let found: Vec<u16> = device.download(&out, room);
            for (t, q) in q.iter().enumerate() {
                for (i, expected) in kv.expected(q, first + t, window).iter().enumerate() {
                    let at = if tiled { tile_offset(t, i, stride / CHUNK as usize) } else { t * stride + i };
                    let found = f64::from(f16::from_bits(found[at]).to_f32());
                    let label = format!("{name} {shape:?} at {first}, window {window}, token {t}, {i}");
                    assert!((found - expected).abs() < 2e-3, "{label}: {found}, expected {expected}");
                }
            }
        }
    }
}

#[test]
fn attention_of_any_form() {
    if !is_on_machine("attention::attention_of_any_form", &[&[]]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("attention_of_any_form"));
    for (shape @ (heads, kv_heads, head_dim), kv_type, shared) in [
        ((6, 2, 12), cuda::KV_F32, 12),
        ((3, 1, 10), cuda::KV_F16, 0),
        ((3, 1, 10), cuda::KV_F16, 20),
        ((2, 2, 300), cuda::KV_F32, 0),
        ((4, 2, 80), cuda::KV_Q8, 0),
        ((2, 2, 12), cuda::KV_Q8, 16),
    ] {
        let (first, tokens, window) = (21, 3, 13);
        let kv = Attention::new(&device, shape, 41, (shared, first + tokens), kv_type, &mut rng);
        let width = heads * head_dim;
        let stride = width + 5;
        let q: Vec<Vec<f32>> = (0..tokens).map(|_| rng.values(stride, 2.0)).collect();
        let q_buffer = device.upload(&q.concat());
        let rows = kv.rows(&device, first, tokens);
        let out = device.poisoned::<f32>(tokens * width);
        let arguments = AttentionAnyArgs {
            qkv: q_buffer.address(),
            rows: rows.address(),
            out: out.address(),
            qkv_stride: stride as u32,
            out_stride: width as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            layer: 1,
            window,
            kv: kv_type,
            scale: kv.kernel_scale(),
            cap: kv.kernel_cap(),
            layers: 2,
            pad: 0,
        };
        device.run("attention_any", [(heads as u32).div_ceil(8), tokens as u32, 1], 256, 0, &arguments);
        let found: Vec<f32> = device.download(&out, tokens * width);
        for (t, q) in q.iter().enumerate() {
            let expected: Vec<_> = kv.expected(q, first + t, window as usize).iter().map(|v| (*v, 1.0)).collect();
            assert_near(&format!("{shape:?}"), &found[t * width..(t + 1) * width], &expected, 1e-5);
        }
    }
}
