//! Mixtures of experts: the choice, rows brought together by expert, sums and gates.

use awqua_shaders::cuda::{CombineArgs, Experts, GateArgs, GroupArgs, RouteArgs, SLOTS_OF_TILES, expert_tiles};
use awqua_shaders::{Step, combine, gate, route};

use super::*;

const NONE: u32 = u32::MAX;

#[test]
fn choices_are_those_of_the_twin() {
    if !is_on_machine("routing::choices_are_those_of_the_twin", ALL_CAPABILITIES) {
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
    if !is_on_machine("routing::wrong_logits_choose_experts_that_are_there", &ALL_CAPABILITIES[..1]) {
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
pub(super) struct Mixture {
    experts: u32,
    pub(super) top_k: u32,
    tokens: u32,
    stride: u32,
    pub(super) routes: Vec<f32>,
}

impl Mixture {
    /// Distinct experts a token; mostly those of small numbers, so that some have many rows and some none.
    pub(super) fn random(experts: u32, top_k: u32, tokens: u32, rng: &mut Rng) -> Self {
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

    pub(super) fn pairs(&self) -> u32 {
        self.tokens * self.top_k
    }

    pub(super) fn expert(&self, pair: u32) -> u32 {
        self.routes[(pair / self.top_k * self.stride + self.top_k + pair % self.top_k) as usize] as u32
    }

    /// Groups the pairs on the device; buffers of tiles and slots.
    pub(super) fn group(&self, device: &Device, routes: &Buffer, tile: u32) -> (u32, Buffer, Buffer) {
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

    pub(super) fn of(
        &self,
        routes: &Buffer,
        grouped: Option<(&Buffer, &Buffer)>,
        row_tiles: u32,
        is_shared: bool,
    ) -> Experts {
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
    if !is_on_machine("routing::rows_are_brought_together_by_expert", ALL_CAPABILITIES) {
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
    if !is_on_machine("routing::sums_and_gates_are_those_of_the_twins", &ALL_CAPABILITIES[..1]) {
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
