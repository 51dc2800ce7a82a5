//! Rotation, norms, activations, embeddings, and matrices as files have them.

use super::*;

#[test]
fn rotation_of_rows() {
    if !is_on_machine("rows::rotation_of_rows", &[&[]]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("rotation_of_rows"));
    for (heads, kv_heads, head_dim, rotary_dim, norms, halves, kv) in [
        (4, 2, 64, 64, true, true, cuda::KV_F16),
        (3, 1, 12, 8, false, false, cuda::KV_F32),
        (2, 2, 80, 32, true, false, cuda::KV_F16),
        (1, 1, 16, 0, false, true, cuda::KV_F16),
        (4, 2, 64, 64, true, true, cuda::KV_Q8),
        (2, 1, 80, 32, true, false, cuda::KV_Q8),
        (1, 1, 12, 8, false, true, cuda::KV_Q8),
    ] {
        let (tokens, first, context, layer) = (3usize, 7u32, 20usize, 1u32);
        // Positions that lie elsewhere.
        let elsewhere = 4 * rng.below(2) as usize;
        let own = context - elsewhere;
        let all = heads + 2 * kv_heads;
        let stride = all * head_dim + 3;
        let qkv = rng.values(tokens * stride, 1.0);
        let buffer = device.upload(&qkv);
        // The second of two tables.
        let rope = rng.values(2 * context * rotary_dim.max(2), 1.0);
        let rope_buffer = device.upload(&rope);
        let norm: Vec<Vec<f32>> = (0..2).map(|_| rng.values(head_dim, 1.0)).collect();
        let norm_buffers: Vec<Buffer> = norm.iter().map(|norm| device.upload(norm)).collect();
        let size = match kv {
            cuda::KV_F32 => 4,
            cuda::KV_F16 => 2,
            _ => 1,
        };
        let lines = 2 * 2 * kv_heads;
        // Contexts of a multiple of four have no gap between the scales of lines.
        let scale_row = if kv == cuda::KV_Q8 { cuda::scale_bytes(head_dim as u32) as usize } else { 0 };
        let cache_bytes = lines * own * (head_dim * size + scale_row);
        let cache = device.zeros(cache_bytes);
        let q = device.poisoned::<u16>(tokens * heads * head_dim);
        let rows: Vec<Row> = (0..tokens as u32)
            .map(|t| Row {
                cache: cache.address(),
                prefix: 0,
                rope: rope_buffer.address(),
                context: context as u32,
                position: first + t,
                shared: elsewhere as u32,
                own: own as u32,
            })
            .collect();
        let row_buffer = device.upload(&rows);
        let address = |i: usize| if norms { norm_buffers[i].address() } else { 0 };
        let arguments = RopeAppendArgs {
            qkv: buffer.address(),
            q: if halves { q.address() } else { 0 },
            q_norm: address(0),
            k_norm: address(1),
            rows: row_buffer.address(),
            qkv_stride: stride as u32,
            q_stride: (heads * head_dim) as u32,
            heads: heads as u32,
            kv_heads: kv_heads as u32,
            head_dim: head_dim as u32,
            rotary_dim: rotary_dim as u32,
            layer,
            kv,
            eps: 1e-6,
            table: 1,
            layers: 2,
            pad: 0,
        };
        let shared = cuda::rope_append_shared(head_dim as u32, kv == cuda::KV_Q8);
        device.run("rope_append", [(all as u32).div_ceil(8), tokens as u32, 1], 256, shared, &arguments);
        let after: Vec<f32> = device.download(&buffer, qkv.len());
        let found_q: Vec<u16> = device.download(&q, tokens * heads * head_dim);
        let bytes: Vec<u8> = device.download(&cache, cache_bytes);
        for t in 0..tokens {
            for head in 0..all {
                let x = &qkv[t * stride + head * head_dim..][..head_dim];
                let which = usize::from(head >= heads);
                let normed = norms && head < heads + kv_heads;
                let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / head_dim as f64;
                let value = |i: usize| match normed {
                    true => f64::from(x[i]) / (mean + 1e-6).sqrt() * f64::from(norm[which][i]),
                    false => f64::from(x[i]),
                };
                let half = rotary_dim / 2;
                let turn = |i: usize| {
                    let at = ((context + first as usize + t) * half + i) * 2;
                    (f64::from(rope[at]), f64::from(rope[at + 1]))
                };
                for i in 0..head_dim {
                    let expected = match i {
                        _ if head >= heads + kv_heads || i >= rotary_dim => value(i),
                        i if i < half => value(i) * turn(i).0 - value(i + half) * turn(i).1,
                        i => value(i) * turn(i - half).0 + value(i - half) * turn(i - half).1,
                    };
                    let mut allowed = 2e-3 * (1.0 + expected.abs());
                    let found = match head.checked_sub(heads) {
                        None if halves => f16::from_bits(found_q[(t * heads + head) * head_dim + i]).to_f32(),
                        None => after[t * stride + head * head_dim + i],
                        Some(line) => {
                            let line = layer as usize * 2 * kv_heads + line;
                            let row = line * own + first as usize + t - elsewhere;
                            let at = (row * head_dim + i) * size;
                            match kv {
                                cuda::KV_F32 => f32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")),
                                cuda::KV_F16 => f16::from_le_bytes([bytes[at], bytes[at + 1]]).to_f32(),
                                _ => {
                                    let scale_at = lines * own * head_dim + row * scale_row + i / 32 * 2;
                                    let scale = f16::from_le_bytes([bytes[scale_at], bytes[scale_at + 1]]).to_f32();
                                    allowed = f64::from(scale) * 0.57 + 1e-5;
                                    f32::from(bytes[at] as i8) * scale
                                }
                            }
                        }
                    };
                    assert!((f64::from(found) - expected).abs() < allowed, "token {t}, head {head}, {i}");
                }
            }
        }
    }
}

/// A cache of 8 bits takes numbers of any size: scales and what codes stand for are numbers of half precision.
#[test]
fn large_numbers_in_eight_bits() {
    if !is_on_machine("rows::large_numbers_in_eight_bits", &ALL_CAPABILITIES[..1]) {
        return;
    }
    const LARGEST_SCALE: f32 = 515.5;
    let (device, mut rng) = (Device::open(), rng("large_numbers_in_eight_bits"));
    let (head_dim, context) = (64usize, 8usize);
    for largest in [1.0f32, 60_000.0, 65_468.0, 65_500.0, 65_504.0, 65_520.0, 70_000.0, 1e9, 3e38] {
        // One head each of queries, keys and values; the largest number is a key, and minus it a value.
        let mut qkv = rng.values(3 * head_dim, largest);
        (qkv[head_dim + 5], qkv[2 * head_dim + 40]) = (largest, -largest);
        let buffer = device.upload(&qkv);
        let codes = 2 * context * head_dim;
        let cache = device.zeros(codes + 2 * context * cuda::scale_bytes(head_dim as u32) as usize);
        let (context, position) = (context as u32, 3);
        let row = Row { cache: cache.address(), context, position, own: context, ..Default::default() };
        let context = context as usize;
        let row_buffer = device.upload(&[row]);
        let arguments = RopeAppendArgs {
            qkv: buffer.address(),
            rows: row_buffer.address(),
            qkv_stride: 3 * head_dim as u32,
            q_stride: head_dim as u32,
            heads: 1,
            kv_heads: 1,
            head_dim: head_dim as u32,
            kv: cuda::KV_Q8,
            layers: 1,
            ..Default::default()
        };
        device.run("rope_append", [1, 1, 1], 256, cuda::rope_append_shared(head_dim as u32, true), &arguments);
        let bytes: Vec<u8> = device.download(&cache, cache.bytes() as usize);
        for line in 0..2 {
            for group in 0..2 {
                let x = &qkv[(line + 1) * head_dim + group * 32..][..32];
                let most = x.iter().fold(0.0f32, |m, v| m.max(v.abs()));
                let at = codes + (line * context + 3) * 4 + group * 2;
                let found = f16::from_le_bytes([bytes[at], bytes[at + 1]]);
                assert_eq!(found, f16::from_f32((most / 127.0).min(LARGEST_SCALE)), "largest {most}");
                let scale = found.to_f32();
                for (i, v) in x.iter().enumerate() {
                    let code = f32::from(bytes[(line * context + 3) * head_dim + group * 32 + i] as i8);
                    let expected = (v / scale).clamp(-127.0, 127.0);
                    assert!((code - expected).abs() <= 0.501, "{v} became {code} of {scale}");
                    assert!(f16::from_f32(code * scale).is_finite());
                }
            }
        }
    }
}

#[test]
fn rows_of_all_kinds() {
    if !is_on_machine("rows::rows_of_all_kinds", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("rows_of_all_kinds"));
    for (k, tokens) in [(8_usize, 1), (200, 3), (1030, 2), (4096, 5)] {
        let stride = k.next_multiple_of(4) + 4;
        let mut x = vec![0.0; (tokens + 1) * stride];
        for row in x.chunks_mut(stride) {
            row[..k].copy_from_slice(&rng.activations(k));
        }
        let norm: Vec<f32> = rng.values(k.next_multiple_of(4), 1.0);
        let (x_buffer, norm_buffer) = (device.upload(&x), device.upload(&norm));
        let padded = k.next_multiple_of(STAGE as usize);
        for (tiled, normed) in [(false, true), (true, true), (true, false)] {
            let room = if tiled { 128 } else { tokens } * padded;
            let out = device.zeros(room * 2);
            let arguments = StageArgs {
                x: x_buffer.address(),
                norm: if normed { norm_buffer.address() } else { 0 },
                out: out.address(),
                slots: 0,
                eps: 1e-5,
                k: k as u32,
                x_stride: stride as u32,
                first_row: 1,
                out_stride: (if tiled { padded / CHUNK as usize } else { padded }) as u32,
                out_tiled: u32::from(tiled),
                share: 0,
                pad: 0,
            };
            device.run("stage", [tokens as u32, 1, 1], 256, cuda::BLOCK_SUM_SHARED, &arguments);
            let found: Vec<u16> = device.download(&out, room);
            for t in 0..tokens {
                let row = &x[(t + 1) * stride..][..k];
                let mean = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
                let factor = if normed { 1.0 / (mean + 1e-5).sqrt() } else { 1.0 / f64::from(WIDE) };
                for i in 0..k {
                    let expected = f64::from(row[i]) * factor * if normed { f64::from(norm[i]) } else { 1.0 };
                    let at = if tiled { tile_offset(t, i, padded / CHUNK as usize) } else { t * padded + i };
                    let found = f64::from(f16::from_bits(found[at]).to_f32());
                    assert!((found - expected).abs() <= 6e-4 * expected.abs() + 1e-6, "stage {k}, token {t}, {i}");
                }
            }
        }
        norms(&device, &x, k, stride, &mut rng);
        let width = k / 2;
        for activation in [cuda::SILU, cuda::GELU_TANH, cuda::GELU] {
            let out = device.poisoned::<f32>(tokens * width);
            let arguments = GluArgs {
                x: x_buffer.address(),
                out: out.address(),
                width: width as u32,
                x_stride: stride as u32,
                out_stride: width as u32,
                activation,
            };
            device.run("glu", [(width as u32).div_ceil(256), tokens as u32, 1], 256, 0, &arguments);
            let found: Vec<f32> = device.download(&out, tokens * width);
            for t in 0..tokens {
                let row = &x[t * stride..];
                let value = |i: usize| activate(f64::from(row[i]), activation) * f64::from(row[width + i]);
                let expected: Vec<_> =
                    (0..width).map(|i| (value(i), value(i).abs() + f64::from(row[width + i].abs()))).collect();
                assert_near("glu", &found[t * width..][..width], &expected, 1e-5);
            }
        }
        for cap in [0.0, 30.0f32] {
            let buffer = device.upload(&x);
            let scale = 0.3;
            let arguments = ScaleArgs {
                x: buffer.address(),
                width: k as u32,
                x_stride: stride as u32,
                scale: if cap > 0.0 { scale / cap } else { scale },
                cap,
            };
            device.run("scale", [(k as u32).div_ceil(256), tokens as u32 + 1, 1], 256, 0, &arguments);
            let found: Vec<f32> = device.download(&buffer, x.len());
            for (i, (found, x)) in found.iter().zip(&x).enumerate() {
                let scaled = f64::from(*x) * f64::from(scale);
                let expected = match cap {
                    _ if i % stride >= k => f64::from(*x),
                    0.0 => scaled,
                    cap => f64::from(cap) * (scaled / f64::from(cap)).tanh(),
                };
                assert!(
                    (f64::from(*found) - expected).abs() <= 1e-5 * (1.0 + expected.abs()),
                    "scale: {found}, {expected}"
                );
            }
        }
    }
}

fn activate(v: f64, activation: u32) -> f64 {
    match activation {
        cuda::SILU => v / (1.0 + (-v).exp()),
        cuda::GELU_TANH => 0.5 * v * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (v + 0.044715 * v.powi(3))).tanh()),
        // The integral of the bell curve by Simpson's rule.
        _ => {
            let end = (v / std::f64::consts::SQRT_2).clamp(-6.0, 6.0);
            let n = 2000;
            let f = |i: usize| {
                (-(end * i as f64 / n as f64).powi(2)).exp()
                    * if i == 0 || i == n {
                        1.0
                    } else if i % 2 == 1 {
                        4.0
                    } else {
                        2.0
                    }
            };
            let erf = 2.0 / std::f64::consts::PI.sqrt() * end / n as f64 / 3.0 * (0..=n).map(f).sum::<f64>();
            0.5 * v * (1.0 + erf)
        }
    }
}

/// Norms of two segments of the first `k` columns of rows 1.. of x.
fn norms(device: &Device, x: &[f32], k: usize, stride: usize, rng: &mut Rng) {
    let (dim, tokens) = (k / 2, x.len() / stride - 1);
    let x_buffer = device.upload(x);
    let weights = rng.values(2 * dim, 1.0);
    let bias = rng.values(dim, 1.0);
    let (weight_buffer, bias_buffer) = (device.upload(&weights), device.upload(&bias));
    for (flags, own, with_bias) in [
        (0, false, false),
        (cuda::CENTER, false, true),
        (cuda::ADD, true, false),
        (cuda::ADD | cuda::CENTER, true, true),
    ] {
        let out_stride = k + 1;
        let before = rng.values(tokens * out_stride, 1.0);
        let out = device.upload(&before);
        let arguments = NormArgs {
            x: x_buffer.address(),
            weight: weight_buffer.address(),
            bias: if with_bias { bias_buffer.address() } else { 0 },
            out: out.address(),
            dim: dim as u32,
            x_stride: stride as u32,
            out_stride: out_stride as u32,
            x_offset: 0,
            out_offset: 1,
            first_row: 1,
            weight_step: if own { dim as u32 } else { 0 },
            flags,
            eps: 1e-5,
            pad: 0,
        };
        device.run("norm_rows", [2, tokens as u32, 1], 256, cuda::BLOCK_SUM_SHARED, &arguments);
        let found: Vec<f32> = device.download(&out, before.len());
        for t in 0..tokens {
            for segment in 0..2 {
                let row = &x[(t + 1) * stride + segment * dim..][..dim];
                let center = match flags & cuda::CENTER {
                    0 => 0.0,
                    _ => row.iter().map(|v| f64::from(*v)).sum::<f64>() / dim as f64,
                };
                let mean = row.iter().map(|v| (f64::from(*v) - center).powi(2)).sum::<f64>() / dim as f64;
                let factor = 1.0 / (mean + 1e-5).sqrt();
                let at = t * out_stride + 1 + segment * dim;
                let expected: Vec<_> = (0..dim)
                    .map(|i| {
                        let weight = weights[if own { segment * dim } else { 0 } + i];
                        let mut v = (f64::from(row[i]) - center) * factor * f64::from(weight);
                        v += if with_bias { f64::from(bias[i]) } else { 0.0 };
                        v += if flags & cuda::ADD != 0 { f64::from(before[at + i]) } else { 0.0 };
                        (v, v.abs() + 2.0 + center.abs() * factor)
                    })
                    .collect();
                assert_near("norm", &found[at..at + dim], &expected, 1e-5);
            }
        }
    }
}

#[test]
fn embedded_tokens() {
    if !is_on_machine("rows::embedded_tokens", &[&[]]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("embedded_tokens"));
    for (width, kind) in [(7, cuda::FROM_F16), (300, cuda::FROM_BF16), (136, cuda::FROM_F32)] {
        let vocab = 50;
        let values: Vec<f32> = rng.values(vocab * width, 1.0).iter().map(|v| bf16::from_f32(*v).to_f32()).collect();
        let bytes: Vec<u8> = match kind {
            cuda::FROM_F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            cuda::FROM_BF16 => values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect(),
            _ => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        };
        let stride = width.next_multiple_of(STAGE as usize);
        let (from, table) = (device.upload(&bytes), device.poisoned::<u16>(vocab * stride));
        let rows = RowsArgs {
            from: from.address(),
            to: table.address(),
            k: width as u32,
            stride: stride as u32,
            r#type: kind,
            pad: 0,
        };
        device.run("dense_rows", [(stride as u32).div_ceil(256), vocab as u32, 1], 256, 0, &rows);
        let ids: Vec<u32> = (0..4).map(|_| rng.below(vocab as u32)).collect();
        let tokens = device.upload(&ids);
        for separate in [false, true] {
            let place = |i: u64| {
                let (context, position) = (9 + i as u32, 3 * i as u32);
                let (shared, own) = (5 * i as u32, 11 * i as u32);
                Place { cache: 100 * i, prefix: 13 * i, rope: 7 * i, context, position, shared, own }
            };
            let places: Vec<Place> = (0..4).map(place).collect();
            let place_buffer = device.upload(&places);
            let (rows, out) = (device.poisoned::<Row>(4), device.poisoned::<f32>(4 * width));
            let arguments = EmbedArgs {
                table: table.address(),
                tokens: tokens.address(),
                places: place_buffer.address(),
                rows: rows.address(),
                out: out.address(),
                width: width as u32,
                table_stride: stride as u32,
                out_stride: width as u32,
                separate: u32::from(separate),
                scale: 2.0,
                pad: 0,
            };
            device.run("embed", [4, 1, 1], 256, 0, &arguments);
            let found: Vec<f32> = device.download(&out, 4 * width);
            for (t, id) in ids.iter().enumerate() {
                let expected: Vec<_> = values[*id as usize * width..][..width]
                    .iter()
                    .map(|v| (2.0 * f64::from(*v), f64::from(v.abs())))
                    .collect();
                assert_near("embed", &found[t * width..][..width], &expected, 1e-3);
            }
            let found: Vec<Row> = device.download(&rows, 4);
            for (t, row) in found.iter().enumerate() {
                let place = places[if separate { t } else { 0 }];
                let expected = Row {
                    cache: place.cache,
                    prefix: place.prefix,
                    rope: place.rope,
                    context: place.context,
                    position: if separate { place.position } else { t as u32 },
                    shared: place.shared,
                    own: place.own,
                };
                assert_eq!(*row, expected);
            }
        }
    }
}

#[test]
fn matrices_of_autoawq_files() {
    if !is_on_machine("rows::matrices_of_autoawq_files", &[&[]]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("matrices_of_autoawq_files"));
    for (n, k, group_size) in [(16, 128, 64), (48, 320, 64), (72, 200, 200), (264, 96, 32)] {
        let w = Packed::new(&device, random_matrix(n, k, group_size, Offset::Zero, false, &mut rng));
        let groups = k / group_size;
        let pack = |code: &dyn Fn(usize) -> u8| {
            // Nibbles 0 to 7 hold columns 0, 2, 4, 6, 1, 3, 5, 7.
            (0..8).fold(0u32, |word, i| word | u32::from(code([0, 2, 4, 6, 1, 3, 5, 7][i])) << (4 * i))
        };
        let mut qweight = Vec::new();
        for row in 0..k {
            qweight.extend((0..n / 8).map(|c| pack(&|i| w.matrix.code(8 * c + i, row))));
        }
        let (mut scales, mut zeros) = (Vec::new(), Vec::new());
        for group in 0..groups {
            scales.extend((0..n).map(|row| w.matrix.group(row, group).0.to_bits()));
            zeros.extend((0..n / 8).map(|c| pack(&|i| w.matrix.group(8 * c + i, group).1.to_f32() as u8)));
        }
        let product = w.product();
        let tiles = product.pairs * 2;
        let (codes, params) =
            (device.poisoned::<u8>(w.codes.bytes() as usize), device.poisoned::<u8>(w.params.bytes() as usize));
        let buffers = (device.upload(&qweight), device.upload(&scales), device.upload(&zeros));
        let arguments = W4Args {
            codes: buffers.0.address(),
            params: 0,
            scales: buffers.1.address(),
            zeros: buffers.2.address(),
            out: codes.address(),
            out_params: params.address(),
            n: n as u32,
            k: k as u32,
            groups: groups as u32,
            stages: product.stages,
            first_tile: 0,
            tiles,
            first_chunk: 0,
            first_group: 0,
        };
        // In two pieces, the second of which begins with the second chunk and the second group.
        for first in [0, 1] {
            let chunks = if first == 0 { 1 } else { 2 * product.stages - 1 };
            let from = u64::from(first) * cuda::CHUNK as u64 * (n as u64 / 8) * 4;
            let piece = W4Args { codes: arguments.codes + from, first_chunk: first, ..arguments };
            device.run("w4_awq", [chunks, tiles.div_ceil(8), 1], 256, 0, &piece);
            let rest = if first == 0 { 1 } else { groups as u32 - 1 };
            let (scales, zeros) = (u64::from(first) * n as u64 * 2, u64::from(first) * (n as u64 / 8) * 4);
            let piece = W4Args {
                scales: arguments.scales + scales,
                zeros: arguments.zeros + zeros,
                first_group: first,
                ..arguments
            };
            if rest > 0 {
                device.run("w4_awq_params", [rest, tiles.div_ceil(32), 1], 256, 0, &piece);
            }
        }
        for (found, expected, what) in [(&codes, &w.codes, "codes"), (&params, &w.params, "parameters")] {
            let bytes = expected.bytes() as usize;
            let (found, expected): (Vec<u8>, Vec<u8>) =
                (device.download(found, bytes), device.download(expected, bytes));
            assert!(found == expected, "{what} of {n} x {k} in groups of {group_size}");
        }
    }
}
