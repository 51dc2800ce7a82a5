//! Choices under biases, bans, penalties and masks of allowed tokens, against the sampler on the CPU.

use awqua::backend::Runner;
use awqua::session::sampler::{SampleRequest, Sampling, pick};

use crate::decoder::Rng;

/// Has `runner`, whose last logits are `row`, make choices under all sorts of constraints.
///
/// # Panics
/// At the first one that the CPU would not make.
pub fn check(runner: &mut dyn Runner, row: &[f32], rng: &mut Rng, uniforms: &[f32]) {
    let words = row.len().div_ceil(32);
    let one = |id: usize| (0..words).map(|word| if id / 32 == word { 1 << (id % 32) } else { 0 }).collect();
    let masks: [Option<Vec<u32>>; 7] = [
        None,
        Some((0..words).map(|_| rng.word() & rng.word()).collect()),
        Some(vec![u32::MAX; words]),
        // The last token only, none at all, and masks that end early or go on.
        Some(one(row.len() - 1)),
        Some(vec![0; words]),
        Some(vec![u32::MAX; words / 2]),
        Some(vec![0xff; words + 3]),
    ];
    let mut ids: Vec<u32> = (0..row.len() as u32).collect();
    ids.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
    let bans: Vec<(u32, f32)> = ids[..10].iter().map(|id| (*id, f32::NEG_INFINITY)).collect();
    let all: Vec<(u32, f32)> = ids.iter().map(|id| (*id, f32::NEG_INFINITY)).take(4096).collect();
    let shifts: Vec<(u32, f32)> = ids.iter().step_by(3).map(|id| (*id, rng.value(4.0))).take(4096).collect();
    let recent: Vec<(u32, u32)> = ids.iter().take(8).map(|id| (*id, 2)).collect();
    let warm = Sampling { temperature: 0.9, top_k: 256, top_p: 1.0, ..Sampling::default() };
    let samplings = [
        Sampling::greedy(),
        Sampling { repetition_penalty: 1.7, presence_penalty: 0.5, ..Sampling::greedy() },
        Sampling { repetition_penalty: 0.5, ..warm.clone() },
        warm,
        Sampling { top_k: 40, top_p: 0.9, ..Sampling::default() },
    ];
    for (mask, bias) in masks.iter().flat_map(|mask| [&[][..], &bans, &shifts, &all].map(|bias| (mask, bias))) {
        for (sampling, &uniform) in samplings.iter().flat_map(|s| uniforms.iter().map(move |u| (s, u))) {
            let mask = mask.as_deref();
            let request = SampleRequest { recent: &recent, uniform, bias, mask, ..SampleRequest::new(sampling) };
            let found = runner.sample(&request).expect("a token comes back");
            // Exponentials differ in the last bits, so the neighbours of a boundary are right, too.
            let near = [uniform, (uniform - 1e-4).max(0.0), (uniform + 1e-4).min(LARGEST)];
            let right = near.map(|uniform| pick(&mut row.to_vec(), &SampleRequest { uniform, ..request }));
            assert!(right.contains(&found), "{sampling:?} at {uniform}: {found} instead of {right:?}");
        }
    }
}

/// The largest number that a session draws.
pub const LARGEST: f32 = 1.0 - f32::EPSILON / 2.0;
