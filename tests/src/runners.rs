//! What every backend's runners have to do alike.

use awqua::ErrorKind;
use awqua::backend::{LogitsRows, Program, Runner, Step};
use awqua::session::sampler::{SampleRequest, Sampling, pick};

use crate::decoder::{CONTEXT, MAX_TOKENS};

/// Has `runner`, fresh and with `vocab` scores a row, choose with all sorts of settings and each of `uniforms`.
///
/// # Panics
/// At the first choice that the CPU would not make.
pub fn check_choices(runner: &mut dyn Runner, vocab: usize, uniforms: &[f32]) {
    let base = Sampling { temperature: 0.8, top_k: 40, top_p: 0.95, ..Sampling::default() };
    let penalties =
        Sampling { repetition_penalty: 1.5, presence_penalty: 0.5, frequency_penalty: 0.25, ..Sampling::greedy() };
    let samplings = [
        Sampling::greedy(),
        penalties.clone(),
        base.clone(),
        Sampling { top_k: 1, ..base.clone() },
        Sampling { top_k: 256, top_p: 1.0, temperature: 3.0, ..base.clone() },
        Sampling { top_k: 100, top_p: 1.0, min_p: 0.2, ..base.clone() },
        Sampling { temperature: 1.5, top_k: 50, ..penalties },
        // These two read the logits back.
        Sampling { top_k: 0, ..base.clone() },
        Sampling { top_k: 300, ..base },
    ];
    let nothing = SampleRequest { uniform: 0.5, ..SampleRequest::new(&samplings[0]) };
    assert_eq!(runner.sample(&nothing).expect_err("no logits yet").kind(), ErrorKind::InvalidInput);
    let (mut logits, mut again) = (Vec::new(), Vec::new());
    runner.run(&Step { tokens: &[1, 2, 3], position: 0, logits: LogitsRows::All }).expect("the step runs");
    runner.read_logits(&mut logits).expect("the logits come back");
    let row = &logits[2 * vocab..];
    let mut best: Vec<u32> = (0..vocab as u32).collect();
    best.sort_by(|a, b| row[*b as usize].total_cmp(&row[*a as usize]));
    let recent: Vec<(u32, u32)> = best[..20].iter().map(|id| (*id, id % 3 + 1)).collect();
    for sampling in &samplings {
        for &uniform in uniforms {
            let request = SampleRequest { recent: &recent, uniform, ..SampleRequest::new(sampling) };
            let found = runner.sample(&request).expect("a token comes back");
            // Exponentials differ in the last bits, so the neighbours of a boundary are right, too.
            let near = [uniform, (uniform - 1e-4).max(0.0), uniform + 1e-4];
            let right = near.map(|uniform| pick(&mut row.to_vec(), &SampleRequest { uniform, ..request }));
            assert!(right.contains(&found), "{sampling:?} at {uniform}: {found} instead of {right:?}");
        }
    }
    runner.read_logits(&mut again).expect("the logits come back");
    assert!(logits == again, "sampling changed the logits");
}

/// Has `runner`, with one rotary table of `rope_width` numbers a row, refuse steps and rows.
///
/// # Panics
/// If one is taken, or refused with another error.
pub fn check_refusals(runner: &mut dyn Runner, program: &Program, rope_width: usize) {
    let many = vec![0; MAX_TOKENS as usize + 1];
    let mut kind = |tokens: &[u32], position| {
        let step = Step { tokens, position, logits: LogitsRows::Last };
        runner.run(&step).expect_err("the step is bad").kind()
    };
    assert_eq!(kind(&[], 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&many, 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&[program.vocab_size], 0), ErrorKind::InvalidInput);
    assert_eq!(kind(&[0, 0], CONTEXT - 1), ErrorKind::ContextFull);
    assert_eq!(kind(&[0], u32::MAX), ErrorKind::ContextFull);
    for (table, first, len) in [(1, 0, rope_width), (0, CONTEXT, rope_width), (0, 0, 15)] {
        let refused = runner.write_rope(table, first, &vec![0.0; len]).expect_err("the rows do not fit");
        assert_eq!(refused.kind(), ErrorKind::InvalidInput);
    }
}
