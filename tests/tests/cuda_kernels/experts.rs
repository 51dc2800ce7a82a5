//! Mixtures of experts: the choice, rows brought together by expert, their products, and the sum.

use awqua_shaders::cuda::{
    CombineArgs, Experts, GateArgs, GemmExpertsArgs, GemvDenseExpertsArgs, GemvW4ExpertsArgs, GroupArgs, RouteArgs,
    SLOTS_OF_TILES, expert_tiles,
};
use awqua_shaders::{Step, combine, gate, route};

use super::*;

const NONE: u32 = u32::MAX;

#[test]
fn choices_are_those_of_the_twin() {
    if !is_on_machine("experts::choices_are_those_of_the_twin", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("choices_are_those_of_the_twin"));
    let own = [(1024, 32, 9, true), (33, 32, 17, false), (31, 1, 8, true)];
    for (experts, top_k, tokens, renormalise) in route::cases().into_iter().chain(own) {
        let (logits_stride, routes_stride) = (experts + 1, 2 * top_k + 2);
        // Few different values, so that some are equal; the order of the twin knows two zeros.
        let logits: Vec<f32> = (0..tokens * logits_stride).map(|_| rng.range(-9.0, 9.0).round() / 2.0 + 0.0).collect();
        let params = route::Params {
            experts,
            top_k,
            logits_stride,
            routes_stride,
            renormalise: u32::from(renormalise),
            ..Default::default()
        };
        let step = Step { n_tokens: tokens, ..Step::default() };
        let before = vec![f32::from_bits(0x7fc0_dead); (tokens * routes_stride) as usize];
        let mut expected = before.clone();
        route::reference(&params, &step, &logits, &mut expected);
        let (from, to) = (device.upload(&logits), device.upload(&before));
        let arguments = RouteArgs {
            logits: from.address(),
            routes: to.address(),
            tokens,
            logits_stride,
            routes_stride,
            experts,
            top_k,
            renormalise: u32::from(renormalise),
        };
        let grid = [tokens.div_ceil(cuda::ROUTE_WARPS), 1, 1];
        device.run("route", grid, cuda::ROUTE_WARPS * 32, cuda::route_shared(experts), &arguments);
        let found: Vec<f32> = device.download(&to, expected.len());
        for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
            let label = format!("{top_k} of {experts} experts: value {i} is {found}, expected {expected}");
            match i as u32 % routes_stride < top_k {
                true => assert!((found - expected).abs() <= 4e-6, "{label}"),
                false => assert_eq!(found.to_bits(), expected.to_bits(), "{label}"),
            }
        }
    }
}

/// Whatever the logits are, a token's experts are distinct ones of the layer, and their weights numbers.
#[test]
fn wrong_logits_choose_experts_that_are_there() {
    if !is_on_machine("experts::wrong_logits_choose_experts_that_are_there", &ALL_CAPABILITIES[..1]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("wrong_logits_choose_experts_that_are_there"));
    let (experts, top_k, tokens) = (40u32, 6u32, 30u32);
    let odd = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN, 0.0];
    let logits: Vec<f32> = (0..tokens * experts).map(|_| odd[rng.below(6) as usize]).collect();
    let (from, to) = (device.upload(&logits), device.poisoned::<f32>((tokens * 2 * top_k) as usize));
    let arguments = RouteArgs {
        logits: from.address(),
        routes: to.address(),
        tokens,
        logits_stride: experts,
        routes_stride: 2 * top_k,
        experts,
        top_k,
        renormalise: 0,
    };
    device.run("route", [4, 1, 1], 256, cuda::route_shared(experts), &arguments);
    let found: Vec<f32> = device.download(&to, (tokens * 2 * top_k) as usize);
    for row in found.chunks(2 * top_k as usize) {
        let (weights, numbers) = row.split_at(top_k as usize);
        assert!(weights.iter().all(|w| (0.0..=1.0).contains(w)), "{row:?}");
        let mut numbers: Vec<u32> = numbers.iter().map(|n| *n as u32).collect();
        numbers.sort_unstable();
        numbers.dedup();
        assert!(numbers.len() == top_k as usize && numbers.iter().all(|n| *n < experts), "{row:?}");
    }
}

/// Tokens and their experts.
struct Mixture {
    experts: u32,
    top_k: u32,
    tokens: u32,
    stride: u32,
    routes: Vec<f32>,
}

impl Mixture {
    /// Distinct experts a token; mostly those of small numbers, so that some have many rows and some none.
    fn random(experts: u32, top_k: u32, tokens: u32, rng: &mut Rng) -> Self {
        let stride = 2 * top_k + 1;
        let mut routes = vec![f32::from_bits(0x7fc0_dead); (tokens * stride) as usize];
        for row in routes.chunks_mut(stride as usize) {
            let mut left: Vec<u32> = (0..experts).collect();
            for i in 0..top_k as usize {
                row[i] = rng.range(0.0, 1.0);
                let at = rng.below(left.len() as u32).min(rng.below(left.len() as u32));
                row[top_k as usize + i] = left.swap_remove(at as usize) as f32;
            }
        }
        Self { experts, top_k, tokens, stride, routes }
    }

    fn pairs(&self) -> u32 {
        self.tokens * self.top_k
    }

    fn expert(&self, pair: u32) -> u32 {
        self.routes[(pair / self.top_k * self.stride + self.top_k + pair % self.top_k) as usize] as u32
    }

    /// Groups the pairs on the device; buffers of tiles and slots.
    fn group(&self, device: &Device, routes: &Buffer, tile: u32) -> (u32, Buffer, Buffer) {
        let all_tiles = expert_tiles(tile, self.experts, self.top_k, self.tokens);
        // Some more than are written.
        let tiles = device.poisoned::<u32>(all_tiles as usize + 3);
        let slots = device.poisoned::<u32>((all_tiles * tile) as usize + 3);
        let arguments = GroupArgs {
            routes: routes.address(),
            tiles: tiles.address(),
            slots: slots.address(),
            tokens: self.tokens,
            top_k: self.top_k,
            experts: self.experts,
            tile,
            all_tiles,
            routes_stride: self.stride,
        };
        device.run("group", [1, 1, 1], 512, cuda::group_shared(self.experts), &arguments);
        (all_tiles, tiles, slots)
    }

    fn of(&self, routes: &Buffer, grouped: Option<(&Buffer, &Buffer)>, row_tiles: u32, is_shared: bool) -> Experts {
        Experts {
            routes: routes.address(),
            tiles: grouped.map_or(0, |(tiles, _)| tiles.address()),
            slots: grouped.map_or(0, |(_, slots)| slots.address()),
            row_tiles,
            top_k: self.top_k,
            share: if is_shared { self.top_k } else { 1 },
            routes_stride: self.stride,
        }
    }
}

#[test]
fn rows_are_brought_together_by_expert() {
    if !is_on_machine("experts::rows_are_brought_together_by_expert", ALL_CAPABILITIES) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("rows_are_brought_together_by_expert"));
    for (experts, top_k, tokens) in [(1, 1, 1), (8, 2, 40), (300, 4, 9), (2, 2, 150), (1024, 32, 50), (33, 3, 700)] {
        for tile in SLOTS_OF_TILES {
            let mixture = Mixture::random(experts, top_k, tokens, &mut rng);
            let routes = device.upload(&mixture.routes);
            let (all_tiles, tiles, slots) = mixture.group(&device, &routes, tile);
            let tiles: Vec<u32> = device.download(&tiles, all_tiles as usize + 3);
            let slots: Vec<u32> = device.download(&slots, (all_tiles * tile) as usize + 3);
            let label = format!("{top_k} of {experts} experts, {tokens} tokens, tiles of {tile}");
            let of_tiles = |number: u32| tiles[..all_tiles as usize].iter().filter(move |e| **e == number).count();
            let mut seen = vec![false; mixture.pairs() as usize];
            for (at, &pair) in slots[..(all_tiles * tile) as usize].iter().enumerate() {
                let expert = tiles[at / tile as usize];
                if pair == NONE {
                    continue;
                }
                assert!(!std::mem::replace(&mut seen[pair as usize], true), "{label}: pair {pair} twice");
                assert_eq!(expert, mixture.expert(pair), "{label}: pair {pair}");
                // Pairs come first.
                assert!(at % tile as usize == 0 || slots[at - 1] != NONE, "{label}: a hole in front of slot {at}");
            }
            assert!(seen.iter().all(|seen| *seen), "{label}");
            for expert in 0..experts {
                let rows = (0..mixture.pairs()).filter(|pair| mixture.expert(*pair) == expert).count();
                assert_eq!(of_tiles(expert), rows.div_ceil(tile as usize), "{label}: expert {expert}");
            }
            let used = tiles.iter().position(|e| *e == NONE).unwrap_or(all_tiles as usize);
            assert!(tiles[used..all_tiles as usize].iter().all(|e| *e == NONE), "{label}");
            assert!(
                tiles[all_tiles as usize..]
                    .iter()
                    .chain(&slots[(all_tiles * tile) as usize..])
                    .all(|v| *v == 0x7fc0_dead)
            );
        }
    }
}

#[test]
fn sums_and_gates_are_those_of_the_twins() {
    if !is_on_machine("experts::sums_and_gates_are_those_of_the_twins", &ALL_CAPABILITIES[..1]) {
        return;
    }
    let (device, mut rng) = (Device::open(), rng("sums_and_gates_are_those_of_the_twins"));
    for (width, top_k, tokens) in combine::cases().into_iter().chain([(1030, 9, 5)]) {
        let (x_stride, out_stride) = (width + 2, width + 3);
        let mixture = Mixture::random(2 * top_k, top_k, tokens, &mut rng);
        let x = rng.activations((tokens * top_k * x_stride) as usize);
        let mut out = rng.values((tokens * out_stride) as usize, 10.0);
        let (x_buffer, routes, out_buffer) = (device.upload(&x), device.upload(&mixture.routes), device.upload(&out));
        let routes_stride = mixture.stride;
        let arguments = CombineArgs {
            x: x_buffer.address(),
            routes: routes.address(),
            out: out_buffer.address(),
            width,
            top_k,
            x_stride,
            routes_stride,
            out_stride,
            pad: 0,
        };
        device.run("combine", [width.div_ceil(256), tokens, 1], 256, 0, &arguments);
        let params = combine::Params { width, top_k, x_stride, routes_stride, out_stride, ..Default::default() };
        let step = Step { n_tokens: tokens, ..Step::default() };
        combine::reference(&params, &step, &x, &mixture.routes, &mut out);
        let found: Vec<f32> = device.download(&out_buffer, out.len());
        let largest = out.iter().fold(0.0f32, |m, v| m.max(v.abs()));
        assert!(found.iter().zip(&out).all(|(f, e)| (f - e).abs() <= 2e-6 * largest), "width {width}");
    }
    for (width, tokens) in gate::cases() {
        let (stride, gate_stride) = (width + 3, 4);
        let mut x = rng.activations((tokens * stride) as usize);
        let mut by = rng.values((tokens * gate_stride) as usize, 20.0);
        by[0] = -1e30;
        let (x_buffer, gate_buffer) = (device.upload(&x), device.upload(&by));
        let arguments = GateArgs {
            x: x_buffer.address(),
            gate: gate_buffer.address(),
            width,
            x_stride: stride,
            gate_stride,
            pad: 0,
        };
        device.run("gate", [width.div_ceil(256), tokens, 1], 256, 0, &arguments);
        let step = Step { n_tokens: tokens, ..Step::default() };
        gate::reference(&gate::Params { width, stride, gate_stride, ..Default::default() }, &step, &mut x, &by);
        let found: Vec<f32> = device.download(&x_buffer, x.len());
        assert!(found.iter().zip(&x).all(|(f, e)| (f - e).abs() <= 1e-5 * e.abs() + 1e-30), "width {width}");
    }
}

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
