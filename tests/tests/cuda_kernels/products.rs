//! Products of packed and dense matrices.

use super::*;

fn gemv_name(tokens: usize, any: bool, per_stage: u32) -> (&'static str, u32, u32) {
    match (tokens, any, per_stage) {
        (1, false, 1) => ("gemv_w4_1_128", 1, 1),
        (1, false, 2) => ("gemv_w4_1_64", 1, 2),
        (1, false, _) => ("gemv_w4_1_32", 1, 4),
        (1, true, _) => ("gemv_w4_1_any", 1, 4),
        (2..=8, false, 1) => ("gemv_w4_8_128", 8, 1),
        (2..=8, false, _) => ("gemv_w4_8_32", 8, 4),
        (2..=8, true, _) => ("gemv_w4_8_any", 8, 4),
        (_, false, 1) => ("gemv_w4_16_128", 16, 1),
        (..) => ("gemv_w4_16_any", 16, 4),
    }
}

#[test]
fn few_rows_of_packed_matrices() {
    if !is_on_machine("products::few_rows_of_packed_matrices", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("few_rows_of_packed_matrices"));
    for shape in shapes() {
        let w = packed(&device, shape, &mut rng);
        let (n, k) = (shape.n, shape.k);
        let stages = (k as u32).div_ceil(STAGE);
        let weights = w.weights(false);
        for tokens in [1, 2, 7, 8, 9, 16] {
            let x = rounded(&random_rows(tokens, k, &mut rng));
            let halves = device.upload(&inputs(&x, false));
            let products = multiply(&weights, &x);
            for warps in [1, 2, 4, 8, 16] {
                let any = w.flags != 0 || rng.below(4) == 0;
                let (name, at_once, per_stage) = gemv_name(tokens, any, w.per_stage());
                let shared = cuda::gemv_shared(at_once, per_stage, warps, stages);
                if shared > device.gpu.limits.shared {
                    continue;
                }
                let add = rng.below(2) == 0;
                let (bias, bias_buffer) = bias_of(&device, n, &mut rng);
                let out = Out::new(&device, tokens, n, add, &mut rng);
                let mut product = out.target(w.product());
                product.bias = bias_buffer.address();
                product.flags |= cuda::HAS_BIAS | if add { cuda::ADD } else { 0 };
                let arguments = GemvW4Args {
                    product,
                    half_x: halves.address(),
                    k: k as u32,
                    x_stride: (k as u32).next_multiple_of(STAGE),
                    tokens: tokens as u32,
                    ..Default::default()
                };
                device.run(name, [product.pairs, 1, 1], warps * 32, shared, &arguments);
                let mut expected = products.clone();
                with_bias(&mut expected, &bias);
                let label = format!("{name}, {shape:?}, {tokens} tokens, {warps} warps");
                out.check(&device, &label, &expected, add, 3e-6);
            }
        }
    }
}

#[test]
fn a_row_through_a_norm() {
    if !is_on_machine("products::a_row_through_a_norm", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("a_row_through_a_norm"));
    for shape in shapes() {
        let w = packed(&device, shape, &mut rng);
        let (n, k) = (shape.n, shape.k);
        for normed in [true, false] {
            let x = &random_rows(1, k, &mut rng)[0];
            let norm: Vec<f32> = rng.values(k, 0.5).iter().map(|v| v + 1.0).collect();
            let eps = 1e-5;
            let mean = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
            let factor = 1.0 / (mean + f64::from(eps)).sqrt();
            let seen: Vec<f32> = match normed {
                true => x.iter().zip(&norm).map(|(x, w)| (f64::from(*x) * factor * f64::from(*w)) as f32).collect(),
                false => x.clone(),
            };
            let (x_buffer, norm_buffer) = (device.upload(x), device.upload(&norm));
            let out = Out::new(&device, 1, n, false, &mut rng);
            let product = out.target(w.product());
            let arguments = GemvW4Args {
                product,
                x: x_buffer.address(),
                norm: if normed { norm_buffer.address() } else { 0 },
                eps,
                k: k as u32,
                tokens: 1,
                ..Default::default()
            };
            let (name, at_once, per_stage) = gemv_name(1, w.flags != 0, w.per_stage());
            let shared = cuda::gemv_shared(at_once, per_stage, 4, product.stages);
            device.run(name, [product.pairs, 1, 1], 128, shared, &arguments);
            // Inputs are rounded to half precision.
            let expected = multiply(&w.weights(false), &[seen]);
            out.check(&device, &format!("{name}, {shape:?}, norm {normed}"), &expected, false, 6e-4);
        }
    }
}

/// Kernels for many rows, with the pairs of tiles and tokens of a block.
fn gemms(device: &Device, halves: bool) -> Vec<(&'static str, u32, u32, u32, u32)> {
    let name = |plain, with_halves| if halves { with_halves } else { plain };
    let warps = cuda::GEMM_WARPS * 32;
    let mut all = vec![
        (name("gemm_w4_8", "gemm_w4_8_halves"), 8, 64, warps, cuda::gemm_shared(8)),
        (name("gemm_w4_2", "gemm_w4_2_halves"), 2, 64, warps, cuda::gemm_shared(2)),
    ];
    if device.gpu.limits.capability == (9, 0) {
        let threads = cuda::COOP_THREADS;
        let coop = [
            (name("gemm_w4_coop_128", "gemm_w4_coop_128_halves"), 8, 128, threads, cuda::gemm_coop_shared(128)),
            (name("gemm_w4_coop_64", "gemm_w4_coop_64_halves"), 8, 64, threads, cuda::gemm_coop_shared(64)),
        ];
        all.extend(coop);
    }
    all.retain(|(.., shared)| *shared <= device.gpu.limits.shared);
    all
}

#[test]
fn many_rows_of_packed_matrices() {
    if !is_on_machine("products::many_rows_of_packed_matrices", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("many_rows_of_packed_matrices"));
    let mut shapes = shapes();
    // More pairs than a block takes, more chunks than are in flight.
    shapes.push(Shape { n: 300, k: 1024, group_size: 128, offset: Offset::Zero, fractions: false });
    for shape in shapes {
        let w = packed(&device, shape, &mut rng);
        let (n, k) = (shape.n, shape.k);
        let weights = w.weights(true);
        for tokens in if n * k > 1 << 20 {
            vec![200]
        } else if is_fast() {
            vec![1, 17, 64, 100, 200, 500]
        } else {
            vec![1, 17, 130]
        } {
            let x = rounded(&random_rows(tokens, k, &mut rng));
            let tiles = device.upload(&inputs(&x, true));
            let expected = multiply(&weights, &x);
            for (name, pairs, at_once, threads, shared) in gemms(&device, w.group_shift == 0) {
                let add = rng.below(2) == 0;
                let (bias, bias_buffer) = bias_of(&device, n, &mut rng);
                let out = Out::new(&device, tokens, n, add, &mut rng);
                let mut product = out.target(w.product());
                product.bias = bias_buffer.address();
                product.flags |= cuda::HAS_BIAS | if add { cuda::ADD } else { 0 };
                let arguments = GemmArgs { product, x: tiles.address(), tokens: tokens as u32, ..Default::default() };
                let grid = [(tokens as u32).div_ceil(at_once), product.pairs.div_ceil(pairs), 1];
                device.run(name, grid, threads, shared, &arguments);
                let mut expected = expected.clone();
                with_bias(&mut expected, &bias);
                // Fractional zero points are rounded twice.
                let relative = if shape.fractions { 1e-3 } else { truncated(k) };
                out.check(&device, &format!("{name}, {shape:?}, {tokens} tokens"), &expected, add, relative);
            }
        }
    }
}

/// Runs a product for `tokens` tokens by a kernel for few or for many rows.
fn run_product(device: &Device, product: Product, w: &Packed, x: &[Vec<f32>], kernel: &'static str) {
    let (k, tokens) = (x[0].len() as u32, x.len() as u32);
    let tiled = kernel.starts_with("gemm");
    let halves = device.upload(&inputs(x, tiled));
    if tiled {
        let all = gemms(device, w.group_shift == 0);
        let Some((name, pairs, at_once, threads, shared)) = all.into_iter().find(|(name, ..)| *name == kernel) else {
            return;
        };
        let arguments = GemmArgs { product, x: halves.address(), tokens, ..Default::default() };
        let grid = [tokens.div_ceil(at_once), product.pairs.div_ceil(pairs), 1];
        device.run(name, grid, threads, shared, &arguments);
    } else {
        let (name, at_once, per_stage) = gemv_name(x.len(), w.flags != 0, w.per_stage());
        let shared_of = |warps| cuda::gemv_shared(at_once, per_stage, warps, product.stages);
        let warps = [4, 2, 1].into_iter().find(|warps| shared_of(*warps) <= device.gpu.limits.shared);
        let warps = warps.expect("one warp fits");
        let (shared, x_stride) = (shared_of(warps), k.next_multiple_of(STAGE));
        let half_x = halves.address();
        let arguments = GemvW4Args { product, half_x, k, x_stride, tokens, ..Default::default() };
        device.run(name, [product.pairs, 1, 1], warps * 32, shared, &arguments);
    }
    device.stream.wait().expect("the product");
}

#[test]
fn products_of_gate_and_up() {
    if !is_on_machine("products::products_of_gate_and_up", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("products_of_gate_and_up"));
    for width in [16, 48, 272] {
        let shape = Shape { n: 2 * width, k: 256, group_size: 64, offset: Offset::Zero, fractions: false };
        let w = packed(&device, shape, &mut rng);
        let cases: [(usize, &'static str); 7] = [
            (1, "gemv"),
            (5, "gemv"),
            (13, "gemv"),
            (70, "gemm_w4_8"),
            (70, "gemm_w4_2"),
            (140, "gemm_w4_coop_128"),
            (70, "gemm_w4_coop_64"),
        ];
        for (tokens, kernel) in cases {
            if kernel.contains("coop") && device.gpu.limits.capability != (9, 0) {
                continue;
            }
            if kernel == "gemm_w4_2" && cuda::gemm_shared(2) > device.gpu.limits.shared {
                continue;
            }
            let x = rounded(&(0..tokens).map(|_| rng.values(256, 2.0)).collect::<Vec<_>>());
            let stride = width.next_multiple_of(STAGE as usize);
            let tiled = kernel.starts_with("gemm");
            let room = if tiled { tokens.next_multiple_of(128) } else { tokens } * stride;
            let out = device.zeros(room * 2);
            let product = Product {
                half_out: out.address(),
                out_stride: (if tiled { stride / CHUNK as usize } else { stride }) as u32,
                out_tiled: u32::from(tiled),
                target: cuda::TO_GLU,
                ..w.product()
            };
            run_product(&device, product, &w, &x, kernel);
            let found: Vec<u16> = device.download(&out, room);
            let mut written = vec![false; room];
            for (token, row) in multiply(&w.weights(tiled), &x).iter().enumerate() {
                for i in 0..width {
                    let (gate, up) = (row[i].0, row[width + i].0);
                    let expected = gate / (1.0 + (-gate).exp()) * up / f64::from(WIDE);
                    let at = if tiled { tile_offset(token, i, stride / CHUNK as usize) } else { token * stride + i };
                    written[at] = true;
                    let found = f64::from(f16::from_bits(found[at]).to_f32());
                    let allowed =
                        2e-3 * (row[i].1 * row[width + i].1 / f64::from(WIDE)).min(expected.abs() + 0.1) + 1e-4;
                    assert!(
                        (found - expected).abs() <= allowed,
                        "{kernel}, {tokens} tokens: {found}, expected {expected}"
                    );
                }
            }
            assert!(
                found.iter().zip(&written).all(|(v, written)| *written || *v == 0),
                "{kernel}: padding was touched"
            );
        }
    }
}

#[test]
fn rotation_and_cache_behind_a_product() {
    if !is_on_machine("products::rotation_and_cache_behind_a_product", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("rotation_and_cache_behind_a_product"));
    for (heads, kv_heads, head_dim, rotary_dim) in
        [(2, 1, 64, 64), (3, 3, 64, 32), (2, 2, 128, 128), (1, 1, 96, 64), (2, 1, 64, 0)]
    {
        let (n, k) = ((heads + 2 * kv_heads) * head_dim, 192);
        let shape = Shape { n, k, group_size: 64, offset: Offset::Zero, fractions: false };
        let w = packed(&device, shape, &mut rng);
        for (tokens, kernel) in [(1, "gemv"), (6, "gemv"), (70, "gemm_w4_8"), (130, "gemm_w4_coop_128")] {
            if kernel.contains("coop") && device.gpu.limits.capability != (9, 0) {
                continue;
            }
            let x: Vec<Vec<f32>> = (0..tokens).map(|_| rng.values(k, 1.0)).collect();
            let x = rounded(&x);
            let (context, first, layer) = (200, 40, 1);
            // Positions that lie elsewhere.
            let shared = 24 * rng.below(2) as usize;
            let own = context - shared;
            // The second of two tables.
            let rope = rng.values(2 * context * rotary_dim.max(2), 1.0);
            let rope_buffer = device.upload(&rope);
            let cache_len = 2 * 2 * kv_heads * own * head_dim;
            let cache = device.poisoned::<u16>(cache_len);
            let q = device.poisoned::<u16>(tokens * heads * head_dim);
            let rows: Vec<Row> = (0..tokens as u32)
                .map(|t| Row {
                    cache: cache.address(),
                    prefix: 0,
                    rope: rope_buffer.address(),
                    context: context as u32,
                    position: first + t,
                    shared: shared as u32,
                    own: own as u32,
                })
                .collect();
            let row_buffer = device.upload(&rows);
            let product = Product {
                half_out: q.address(),
                out_stride: (heads * head_dim) as u32,
                table: 1,
                rows: row_buffer.address(),
                target: cuda::TO_ROPE,
                heads: heads as u32,
                kv_heads: kv_heads as u32,
                head_dim: head_dim as u32,
                rotary_dim: rotary_dim as u32,
                layer,
                ..w.product()
            };
            run_product(&device, product, &w, &x, kernel);
            let found_q: Vec<u16> = device.download(&q, tokens * heads * head_dim);
            let found_kv: Vec<u16> = device.download(&cache, cache_len);
            let half = rotary_dim / 2;
            let mut written = vec![false; cache_len];
            for (token, row) in multiply(&w.weights(false), &x).iter().enumerate() {
                let position = first as usize + token;
                for head in 0..heads + 2 * kv_heads {
                    for i in 0..head_dim {
                        let value = |i: usize| row[head * head_dim + i].0;
                        let turn = |i: usize| {
                            let at = ((context + position) * half + i) * 2;
                            (f64::from(rope[at]), f64::from(rope[at + 1]))
                        };
                        let expected = match i {
                            _ if head >= heads + kv_heads || i >= rotary_dim => value(i),
                            i if i < half => value(i) * turn(i).0 - value(i + half) * turn(i).1,
                            i => value(i) * turn(i - half).0 + value(i - half) * turn(i - half).1,
                        };
                        let found = match head.checked_sub(heads) {
                            None => found_q[(token * heads + head) * head_dim + i],
                            Some(line) => {
                                let line = layer as usize * 2 * kv_heads + line;
                                let at = (line * own + position - shared) * head_dim + i;
                                written[at] = true;
                                found_kv[at]
                            }
                        };
                        let found = f64::from(f16::from_bits(found).to_f32());
                        assert!(
                            (found - expected).abs() <= 2e-3 * (1.0 + expected.abs()),
                            "{kernel}, heads of {head_dim}, token {token}, head {head}, {i}: {found}, expected {expected}"
                        );
                    }
                }
            }
            let poison = [0xdead, 0x7fc0];
            let untouched = found_kv.iter().enumerate().all(|(i, v)| written[i] || *v == poison[i % 2]);
            assert!(untouched, "{kernel}: the cache was touched elsewhere");
        }
    }
}

/// Half precision rows of `stride` elements and whole pairs of tiles.
fn dense_rows(device: &Device, w: &[f32], n: usize, k: usize) -> Buffer {
    let stride = k.next_multiple_of(STAGE as usize);
    let mut rows = vec![0u16; n.next_multiple_of(2 * TILE as usize) * stride];
    for (i, v) in w.iter().enumerate() {
        rows[i / k * stride + i % k] = f16::from_f32(*v).to_bits();
    }
    device.upload(&rows)
}

#[test]
fn dense_matrices() {
    if !is_on_machine("products::dense_matrices", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("dense_matrices"));
    let mut shapes = vec![(1, 1), (37, 45), (129, 37), (64, 256), (300, 513)];
    if is_fast() {
        shapes.extend([(32000, 4096), (5000, 2048)]);
    }
    for (n, k) in shapes {
        let w: Vec<f32> = rng.values(n * k, 1.0).iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        let rows = dense_rows(&device, &w, n, k);
        let stride = (k as u32).next_multiple_of(STAGE);
        for tokens in [1, 3, 8] {
            let (bias, bias_buffer) = bias_of(&device, n, &mut rng);
            let add = rng.below(2) == 0;
            let x: Vec<Vec<f32>> = (0..tokens).map(|_| rng.activations(k)).collect();
            let norm: Vec<f32> = rng.values(k, 0.5).iter().map(|v| v + 1.0).collect();
            let out = Out::new(&device, tokens, n, add, &mut rng);
            let base = GemvDenseArgs {
                w: rows.address(),
                bias: bias_buffer.address(),
                out: out.buffer.address(),
                n: n as u32,
                k: k as u32,
                stride,
                out_stride: out.stride as u32,
                out_offset: 4,
                tokens: tokens as u32,
                flags: cuda::HAS_BIAS | if add { cuda::ADD } else { 0 },
                scale: 1.0,
                ..Default::default()
            };
            // An f32 row is padded with zeros to quads.
            let pad = |row: &[f32]| [row, &vec![0.0; k.next_multiple_of(4) - k]].concat();
            let (seen, relative) = if tokens == 1 {
                let (row, weights) = (device.upload(&pad(&x[0])), device.upload(&pad(&norm)));
                let shared = cuda::gemv_dense_shared(1, stride);
                let arguments = GemvDenseArgs { x: row.address(), norm: weights.address(), eps: 1e-5, ..base };
                device.run("gemv_dense_1", [3, 1, 1], 256, shared, &arguments);
                device.stream.wait().expect("the product");
                let mean = x[0].iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / k as f64;
                let factor = 1.0 / (mean + 1e-5).sqrt();
                let normed = |(x, w): (&f32, &f32)| (f64::from(*x) * factor * f64::from(*w)) as f32;
                (vec![x[0].iter().zip(&norm).map(normed).collect()], 1e-5)
            } else {
                let halves = device.upload(&inputs(&x, false));
                let shared = cuda::gemv_dense_shared(tokens as u32, stride);
                let arguments = GemvDenseArgs { half_x: halves.address(), x_stride: stride, ..base };
                device.run("gemv_dense_8", [3, 1, 1], 256, shared, &arguments);
                device.stream.wait().expect("the product");
                (rounded(&x), 3e-6)
            };
            let mut expected = multiply(&w, &seen);
            with_bias(&mut expected, &bias);
            out.check(&device, &format!("{n} x {k}, {tokens} tokens"), &expected, add, relative);
            // In single precision, an output a block.
            let out = Out::new(&device, tokens, n, add, &mut rng);
            let single = device.upload(&x.iter().flat_map(|row| pad(row)).collect::<Vec<f32>>());
            let arguments = GemvDenseArgs {
                x: single.address(),
                x_stride: k.next_multiple_of(4) as u32,
                out: out.buffer.address(),
                ..base
            };
            device.run("gemv_dense_narrow", [n as u32, tokens as u32, 1], 256, cuda::BLOCK_SUM_SHARED, &arguments);
            let mut expected = multiply(&w, &x);
            with_bias(&mut expected, &bias);
            out.check(&device, &format!("narrow, {n} x {k}, {tokens} tokens"), &expected, add, 1e-6);
        }
        let x = rounded(&random_rows(70, k, &mut rng));
        let tiles = device.upload(&inputs(&x, true));
        let expected = multiply(&w, &x);
        for (name, pairs) in [("gemm_dense_8", 8), ("gemm_dense_2", 2)] {
            if cuda::gemm_shared(pairs) > device.gpu.limits.shared {
                continue;
            }
            let out = Out::new(&device, 70, n, false, &mut rng);
            let product = Product {
                n: n as u32,
                stages: stride / STAGE,
                pairs: (n as u32).div_ceil(2 * TILE),
                scale: 1.0,
                ..Default::default()
            };
            let (dense, x) = (rows.address(), tiles.address());
            let arguments = GemmArgs { product: out.target(product), x, dense, tokens: 70, pad: 0 };
            let grid = [2, product.pairs.div_ceil(pairs), 1];
            device.run(name, grid, cuda::GEMM_WARPS * 32, cuda::gemm_shared(pairs), &arguments);
            out.check(&device, &format!("{name}, {n} x {k}"), &expected, false, truncated(k));
        }
    }
}
