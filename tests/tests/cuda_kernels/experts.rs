//! Mixtures of experts: products with the chosen experts' matrices.

use awqua_shaders::cuda::{GemmExpertsArgs, GemvDenseExpertsArgs, GemvW4ExpertsArgs};

use super::routing::Mixture;
use super::*;

/// (N, K, group size, offset, fractions) of every expert and (experts, top_k), ragged in all directions.
fn stacks() -> Vec<(Shape, u32, u32)> {
    let shape = |n, k, group_size, offset, fractions| Shape { n, k, group_size, offset, fractions };
    let zero = Offset::Zero;
    let mut all = vec![
        (shape(1, 8, 8, zero, false), 1, 1),
        (shape(70, 256, 128, zero, false), 5, 2),
        (shape(32, 320, 64, zero, false), 8, 3),
        (shape(33, 96, 32, zero, false), 4, 4),
        (shape(64, 256, 128, zero, true), 3, 1),
        (shape(37, 192, 64, Offset::Bias, false), 6, 2),
        (shape(40, 160, 32, Offset::Bias, false), 7, 2),
    ];
    if is_fast() {
        all.extend([
            (shape(4096, 2048, 128, zero, false), 4, 2),
            (shape(1536, 1024, 64, zero, false), 16, 4),
            (shape(200, 14336, 128, zero, false), 4, 2),
        ]);
    }
    all
}

/// The matrices of `experts` one behind the other; rows of padding are random.
fn stack(device: &Device, shape: Shape, experts: u32, rng: &mut Rng) -> (Packed, usize) {
    let rows = shape.n.next_multiple_of(2 * TILE as usize);
    (packed(device, Shape { n: rows * experts as usize, ..shape }, rng), rows)
}

/// Products of one matrix of a stack, with rows as targets.
fn product_of(w: &Packed, n: usize, out: &Out) -> Product {
    Product { n: n as u32, pairs: (n as u32).div_ceil(2 * TILE), ..out.target(w.product()) }
}

/// Rows of pairs: (products, sums of magnitudes).
fn expected(
    mixture: &Mixture,
    weights: &[f32],
    (n, rows): (usize, usize),
    x: &[Vec<f32>],
    is_shared: bool,
) -> Vec<Vec<(f64, f64)>> {
    let k = x[0].len();
    let one = |pair: u32| {
        let first = mixture.expert(pair) as usize * rows * k;
        let row = if is_shared { pair / mixture.top_k } else { pair };
        multiply(&weights[first..first + n * k], &x[row as usize..][..1]).swap_remove(0)
    };
    (0..mixture.pairs()).map(one).collect()
}

fn gemv_experts_name(one: bool, any: bool, per_stage: u32) -> (&'static str, u32) {
    match (one, any, per_stage) {
        (true, false, 1) => ("gemv_w4_1_experts_128", 1),
        (true, false, _) => ("gemv_w4_1_experts_32", 4),
        (true, true, _) => ("gemv_w4_1_experts_any", 4),
        (false, false, 1) => ("gemv_w4_8_experts_128", 1),
        (false, false, _) => ("gemv_w4_8_experts_32", 4),
        (false, true, _) => ("gemv_w4_8_experts_any", 4),
    }
}

#[test]
fn experts_of_few_tokens() {
    if !is_on_machine("experts::experts_of_few_tokens", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("experts_of_few_tokens"));
    for (shape, experts, top_k) in stacks() {
        let (w, rows) = stack(&device, shape, experts, &mut rng);
        let (n, k) = (shape.n, shape.k);
        let weights = w.weights(false);
        let stride = (k as u32).next_multiple_of(STAGE);
        for tokens in [1u32, 2, 16] {
            for is_shared in [true, false] {
                let mixture = Mixture::random(experts, top_k, tokens, &mut rng);
                let inputs_of = if is_shared { tokens } else { mixture.pairs() };
                let x = rounded(&random_rows(inputs_of as usize, k, &mut rng));
                let halves = device.upload(&inputs(&x, false));
                let flat: Vec<f32> = x.iter().flat_map(|row| [&row[..], &[0.0; 8]].concat()).collect();
                let singles = device.upload(&flat);
                let routes = device.upload(&mixture.routes);
                let expected = expected(&mixture, &weights, (n, rows), &x, is_shared);
                let any = w.flags != 0 || rng.below(4) == 0;
                for warps in [1, 4, 16] {
                    // One token's inputs in single precision, too.
                    for single in if tokens == 1 { vec![false, true] } else { vec![false] } {
                        let (name, per_stage) = gemv_experts_name(tokens == 1, any, w.per_stage());
                        let at_once = if tokens == 1 { 1 } else { 8 };
                        let shared = cuda::gemv_shared(at_once, per_stage, warps, stride / STAGE);
                        if shared > device.gpu.limits.shared {
                            continue;
                        }
                        let out = Out::new(&device, mixture.pairs() as usize, n, false, &mut rng);
                        let gemv = GemvW4Args {
                            product: product_of(&w, n, &out),
                            x: if single { singles.address() } else { 0 },
                            half_x: halves.address(),
                            k: k as u32,
                            x_stride: if single { k as u32 + 8 } else { stride },
                            tokens: 1,
                            ..Default::default()
                        };
                        let row_tiles = rows as u32 / TILE;
                        let pairs = gemv.product.pairs;
                        if tokens == 1 {
                            let experts = mixture.of(&routes, None, row_tiles, is_shared);
                            let arguments = GemvW4ExpertsArgs { gemv, experts };
                            device.run(name, [pairs, top_k, 1], warps * 32, shared, &arguments);
                        } else {
                            let (all_tiles, tiles, slots) = mixture.group(&device, &routes, 8);
                            let experts = mixture.of(&routes, Some((&tiles, &slots)), row_tiles, is_shared);
                            let arguments = GemvW4ExpertsArgs { gemv, experts };
                            device.run(name, [pairs, all_tiles, 1], warps * 32, shared, &arguments);
                            device.stream.wait().expect("the kernel ends");
                        }
                        let label = format!("{name}, {shape:?}, {experts} experts, {tokens} tokens, {warps} warps");
                        out.check(&device, &label, &expected, false, 3e-6);
                    }
                }
            }
        }
    }
}

/// Brings inputs to the slots of their pairs.
fn staged_by_slot(device: &Device, x: &[Vec<f32>], slots: &Buffer, rows: u32, share: u32) -> Buffer {
    let k = x[0].len();
    let padded = k.next_multiple_of(STAGE as usize);
    let x_stride = k.next_multiple_of(4);
    let flat: Vec<f32> =
        x.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, x_stride - k))).collect();
    let from = device.upload(&flat);
    let out = device.zeros(rows as usize * padded * 2);
    let arguments = StageArgs {
        x: from.address(),
        norm: 0,
        out: out.address(),
        slots: slots.address(),
        eps: 0.0,
        k: k as u32,
        x_stride: x_stride as u32,
        first_row: 0,
        out_stride: (padded / CHUNK as usize) as u32,
        out_tiled: 1,
        share,
        pad: 0,
    };
    device.run("stage", [rows, 1, 1], 256, cuda::BLOCK_SUM_SHARED, &arguments);
    device.stream.wait().expect("the kernel ends");
    out
}

/// The kernels for experts of many tokens: name, pairs of tiles of a block, threads and shared memory.
fn expert_gemms(device: &Device, halves: bool) -> Vec<(&'static str, u32, u32, u32)> {
    let name = |plain, with_halves| if halves { with_halves } else { plain };
    let warps = cuda::GEMM_WARPS;
    let mut all =
        vec![(name("gemm_w4_8_experts", "gemm_w4_8_experts_halves"), warps, warps * 32, cuda::gemm_shared(warps))];
    if device.gpu.limits.capability == (9, 0) {
        let name = name("gemm_w4_coop_experts", "gemm_w4_coop_experts_halves");
        all.push((name, cuda::COOP_PAIRS, cuda::COOP_THREADS, cuda::gemm_coop_shared(64)));
    }
    all
}

#[test]
fn experts_of_many_tokens() {
    if !is_on_machine("experts::experts_of_many_tokens", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("experts_of_many_tokens"));
    for (shape, experts, top_k) in stacks() {
        let (w, rows) = stack(&device, shape, experts, &mut rng);
        let (n, k) = (shape.n, shape.k);
        let weights = w.weights(true);
        for tokens in if is_fast() && n * k < 1 << 20 { vec![17, 100, 700] } else { vec![17, 100] } {
            for is_shared in [true, false] {
                let mixture = Mixture::random(experts, top_k, tokens, &mut rng);
                let inputs_of = if is_shared { tokens } else { mixture.pairs() };
                // Half precision, and divided by a power of two on the way.
                let x = rounded(&random_rows(inputs_of as usize, k, &mut rng));
                let routes = device.upload(&mixture.routes);
                let (all_tiles, tiles, slots) = mixture.group(&device, &routes, 64);
                let of = mixture.of(&routes, Some((&tiles, &slots)), rows as u32 / TILE, is_shared);
                let staged = staged_by_slot(&device, &x, &slots, all_tiles * 64, of.share);
                let expected = expected(&mixture, &weights, (n, rows), &x, is_shared);
                for (name, pairs, threads, shared) in expert_gemms(&device, w.group_shift == 0) {
                    let out = Out::new(&device, mixture.pairs() as usize, n, false, &mut rng);
                    let product = Product { scale: WIDE, ..product_of(&w, n, &out) };
                    let gemm = GemmArgs { product, x: staged.address(), ..Default::default() };
                    let grid = [all_tiles, product.pairs.div_ceil(pairs), 1];
                    device.run(name, grid, threads, shared, &GemmExpertsArgs { gemm, experts: of });
                    // Inputs below the normal range lose a little where they are divided.
                    let relative = if shape.fractions { 1e-3 } else { truncated(k) + 2e-4 };
                    let label = format!("{name}, {shape:?}, {experts} experts, {tokens} tokens");
                    out.check(&device, &label, &expected, false, relative);
                }
            }
        }
    }
}

/// Gate and up of every expert and their product, as inputs by pair or by slot.
#[test]
fn gated_products_of_experts() {
    if !is_on_machine("experts::gated_products_of_experts", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("gated_products_of_experts"));
    let (experts, top_k, k) = (5, 2, 256);
    for (width, group_size) in [(48, 128), (80, 32), (16, 64)] {
        let (n, zero) = (2 * width, Offset::Zero);
        let shape = Shape { n, k, group_size, offset: zero, fractions: false };
        let (w, rows) = stack(&device, shape, experts, &mut rng);
        for tokens in [1u32, 7, 50] {
            let mixture = Mixture::random(experts, top_k, tokens, &mut rng);
            let x = rounded(&(0..tokens).map(|_| rng.values(k, 2.0)).collect::<Vec<_>>());
            let routes = device.upload(&mixture.routes);
            let tile = if tokens > 16 { 64 } else { 8 };
            let (all_tiles, tiles, slots) = mixture.group(&device, &routes, tile);
            let of = mixture.of(&routes, Some((&tiles, &slots)), rows as u32 / TILE, true);
            let stride = width.next_multiple_of(STAGE as usize);
            let tiled = tokens > 16;
            let room = if tiled { all_tiles * 64 } else { mixture.pairs() } as usize * stride;
            let slot_of: Vec<u32> = device.download(&slots, (all_tiles * tile) as usize);
            let expected = expected(&mixture, &w.weights(tiled), (n, rows), &x, true);
            let kernels = if tiled { expert_gemms(&device, w.group_shift == 0) } else { vec![("", 0, 128, 0)] };
            for (name, pairs, threads, shared) in kernels {
                let out = device.zeros(room * 2);
                let product = Product {
                    half_out: out.address(),
                    out_stride: (if tiled { stride / CHUNK as usize } else { stride }) as u32,
                    out_tiled: u32::from(tiled),
                    target: cuda::TO_GLU,
                    n: n as u32,
                    pairs: (n as u32).div_ceil(2 * TILE),
                    ..w.product()
                };
                if tiled {
                    let staged = staged_by_slot(&device, &x, &slots, all_tiles * 64, of.share);
                    let product = Product { scale: WIDE, ..product };
                    let gemm = GemmArgs { product, x: staged.address(), ..Default::default() };
                    let grid = [all_tiles, product.pairs.div_ceil(pairs), 1];
                    device.run(name, grid, threads, shared, &GemmExpertsArgs { gemm, experts: of });
                    device.stream.wait().expect("the kernel ends");
                } else {
                    let halves = device.upload(&inputs(&x, false));
                    let (name, per_stage) = gemv_experts_name(tokens == 1, false, w.per_stage());
                    let at_once = if tokens == 1 { 1 } else { 8 };
                    let shared = cuda::gemv_shared(at_once, per_stage, 4, product.stages);
                    let gemv = GemvW4Args {
                        product,
                        half_x: halves.address(),
                        k: k as u32,
                        x_stride: k as u32,
                        tokens: 1,
                        ..Default::default()
                    };
                    let grid = [product.pairs, if tokens == 1 { top_k } else { all_tiles }, 1];
                    device.run(name, grid, threads, shared, &GemvW4ExpertsArgs { gemv, experts: of });
                    device.stream.wait().expect("the kernel ends");
                }
                let found: Vec<u16> = device.download(&out, room);
                let mut written = vec![false; room];
                for (pair, row) in expected.iter().enumerate() {
                    let slot = slot_of.iter().position(|p| *p == pair as u32).expect("every pair has a slot");
                    for i in 0..width {
                        let (gate, up) = (row[i].0, row[width + i].0);
                        let right = gate / (1.0 + (-gate).exp()) * up / f64::from(WIDE);
                        let at = if tiled { tile_offset(slot, i, stride / CHUNK as usize) } else { pair * stride + i };
                        written[at] = true;
                        let found = f64::from(f16::from_bits(found[at]).to_f32());
                        let allowed =
                            2e-3 * (row[i].1 * row[width + i].1 / f64::from(WIDE)).min(right.abs() + 0.1) + 1e-4;
                        let label = format!("{name}, width {width}, {tokens} tokens, pair {pair}, {i}");
                        assert!((found - right).abs() <= allowed, "{label}: {found}, expected {right}");
                    }
                }
                let untouched = found.iter().zip(&written).all(|(v, written)| *written || *v == 0);
                assert!(untouched, "{name}, width {width}, {tokens} tokens: padding was touched");
            }
        }
    }
}

#[test]
fn dense_experts() {
    if !is_on_machine("experts::dense_experts", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("dense_experts"));
    let mut shapes = vec![(1usize, 8usize, 1, 1), (33, 130, 5, 2), (70, 256, 4, 3)];
    if is_fast() {
        shapes.extend([(1000, 2048, 8, 2), (512, 14336, 4, 2)]);
    }
    for (n, k, experts, top_k) in shapes {
        let (rows, stride) = (n.next_multiple_of(2 * TILE as usize), k.next_multiple_of(STAGE as usize));
        let all = rows * experts as usize;
        let values: Vec<f32> = rng.values(all * k, 0.3).iter().map(|v| f16::from_f32(*v).to_f32()).collect();
        let mut halves = vec![0u16; all * stride];
        for (to, from) in halves.chunks_mut(stride).zip(values.chunks(k)) {
            to.iter_mut().zip(from).for_each(|(to, from)| *to = f16::from_f32(*from).to_bits());
        }
        let w = device.upload(&halves);
        for tokens in [1u32, 5, 40] {
            for is_shared in [true, false] {
                let mixture = Mixture::random(experts, top_k, tokens, &mut rng);
                let inputs_of = if is_shared { tokens } else { mixture.pairs() };
                let x = rounded(&random_rows(inputs_of as usize, k, &mut rng));
                let routes = device.upload(&mixture.routes);
                let expected = expected(&mixture, &values, (n, rows), &x, is_shared);
                let out = Out::new(&device, mixture.pairs() as usize, n, false, &mut rng);
                let row_tiles = rows as u32 / TILE;
                if tokens <= 16 {
                    let x_stride = k.next_multiple_of(4);
                    let pad = x_stride - k;
                    let flat: Vec<f32> =
                        x.iter().flat_map(|row| row.iter().copied().chain(std::iter::repeat_n(0.0, pad))).collect();
                    let x = device.upload(&flat);
                    let gemv = GemvDenseArgs {
                        w: w.address(),
                        x: x.address(),
                        out: out.buffer.address(),
                        n: n as u32,
                        k: k as u32,
                        stride: stride as u32,
                        x_stride: x_stride as u32,
                        out_stride: out.stride as u32,
                        out_offset: 4,
                        tokens: 1,
                        scale: 1.0,
                        ..Default::default()
                    };
                    let experts = mixture.of(&routes, None, row_tiles, is_shared);
                    let grid = [(n as u32).div_ceil(128), mixture.pairs(), 1];
                    let shared = cuda::gemv_dense_shared(1, stride as u32);
                    device.run("gemv_dense_1_experts", grid, 256, shared, &GemvDenseExpertsArgs { gemv, experts });
                    let label = format!("gemv, {n} x {k}, {tokens} tokens");
                    out.check(&device, &label, &expected, false, truncated(k));
                } else {
                    let (all_tiles, tiles, slots) = mixture.group(&device, &routes, 64);
                    let of = mixture.of(&routes, Some((&tiles, &slots)), row_tiles, is_shared);
                    let staged = staged_by_slot(&device, &x, &slots, all_tiles * 64, of.share);
                    let product = out.target(Product {
                        n: n as u32,
                        stages: stride as u32 / STAGE,
                        pairs: row_tiles / 2,
                        scale: WIDE,
                        ..Default::default()
                    });
                    let gemm = GemmArgs { product, x: staged.address(), dense: w.address(), ..Default::default() };
                    let grid = [all_tiles, product.pairs.div_ceil(8), 1];
                    let shared = cuda::gemm_shared(8);
                    device.run("gemm_dense_8_experts", grid, 256, shared, &GemmExpertsArgs { gemm, experts: of });
                    let label = format!("gemm, {n} x {k}, {tokens} tokens");
                    out.check(&device, &label, &expected, false, truncated(k) + 2e-4);
                }
            }
        }
    }
}
