//! Token choice on the device, biases, penalties and mask included: requests and results pass through host memory that
//! the device sees.

use std::sync::Arc;

use awqua_shaders::cuda::{self, MOST_LEFT, Place, SLICE, SLOTS, SampleArgs, SampleRequest as Request};

use super::driver::{Buffer, Function, Gpu, Launch, Pinned, Stream};
use super::memory::Memory;
use crate::error::Result;
use crate::session::sampler::SampleRequest;

/// Most candidates that the kernels keep.
const MAX_TOP_K: u32 = 256;
/// Scores whose candidates two rounds bring down to what the last one sorts.
const MOST_SCORES: u32 = MOST_LEFT / MAX_TOP_K * SLICE / MAX_TOP_K * SLICE;

/// Most tokens with a bias of a choice that the kernels make.
const MAX_BIASES: u32 = 4096;

/// Candidates of the first round.
fn first_candidates(vocab: u32) -> u64 {
    u64::from(vocab.div_ceil(SLICE)) * u64::from(MAX_TOP_K)
}

/// Bytes of a mask of tokens.
fn mask_bytes(vocab: u32) -> u64 {
    u64::from(vocab.div_ceil(32).next_multiple_of(4)) * 4
}

/// Bytes on the device for rows of `vocab` scores and at most `context` recent tokens.
pub(super) fn bytes(vocab: u32, context: u32) -> u64 {
    let pairs = u64::from(vocab.min(context).max(2)) + u64::from(vocab.clamp(2, MAX_BIASES));
    16 + mask_bytes(vocab) + (pairs + first_candidates(vocab) + u64::from(MOST_LEFT)) * 8
}

/// The calls of the three kernels for `choices` choices among `vocab` scores.
pub(super) fn launches<A: bytemuck::Pod>(
    functions: [Function; 3],
    vocab: u32,
    choices: u32,
    arguments: &A,
) -> [Launch; 3] {
    let slices = vocab.div_ceil(SLICE);
    let narrow = (slices * MAX_TOP_K).div_ceil(SLICE);
    [
        Launch::new(functions[0], [slices, choices, 1], 512, cuda::SLICE_SHARED, arguments),
        Launch::new(functions[1], [narrow, choices, 1], 512, cuda::SLICE_SHARED, arguments),
        Launch::new(functions[2], [1, choices, 1], 1024, cuda::DRAW_SHARED, arguments),
    ]
}

/// The sampling kernels of one session.
pub(super) struct Sampler {
    vocab: u32,
    requests: Pinned,
    results: Pinned,
    recent: Buffer,
    recent_capacity: usize,
    biases: Buffer,
    mask: Buffer,
    candidates: Buffer,
    turn: Buffer,
    /// Choices queued so far, as the device counts them.
    turns: u32,
    functions: [Function; 3],
}

impl Sampler {
    /// Allocates for rows of `vocab` scores and at most `context` recent tokens.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Arc<Gpu>, stream: &Stream, vocab: u32, context: u32) -> Result<Self> {
        let recent_capacity = vocab.min(context);
        let turn = gpu.buffer("the number of choices", 16)?;
        stream.clear(&turn)?;
        Ok(Self {
            vocab,
            requests: gpu.pinned(SLOTS as usize * size_of::<Request>())?,
            results: gpu.pinned(SLOTS as usize * 8)?,
            recent: gpu.buffer("recent tokens", u64::from(recent_capacity) * 8)?,
            recent_capacity: recent_capacity as usize,
            biases: gpu.buffer("biases", u64::from(vocab.min(MAX_BIASES)) * 8)?,
            mask: gpu.buffer("the mask of tokens", mask_bytes(vocab))?,
            candidates: gpu.buffer("candidates", (first_candidates(vocab) + u64::from(MOST_LEFT)) * 8)?,
            turn,
            turns: 0,
            functions: [gpu.function("sample_slices")?, gpu.function("sample_narrow")?, gpu.function("sample_draw")?],
        })
    }

    /// Bytes of its buffers on the device.
    pub(super) fn bytes(&self) -> u64 {
        [&self.recent, &self.biases, &self.mask, &self.candidates, &self.turn].map(Buffer::bytes).iter().sum()
    }

    /// Whether the kernels can make this choice; the others need the whole row in order.
    pub(super) fn handles(&self, request: &SampleRequest<'_>) -> bool {
        let s = request.sampling;
        let kept = s.temperature == 0.0 || (1..=MAX_TOP_K).contains(&s.top_k);
        let biases = request.bias.len() <= self.vocab.min(MAX_BIASES) as usize;
        kept && biases && self.vocab <= MOST_SCORES && request.recent.len() <= self.recent_capacity
    }

    /// The kernels that choose from the scores at `scores` and leave the token for the next step.
    pub(super) fn launches(&self, memory: &Memory, scores: u64) -> [Launch; 3] {
        let position = memory.address(memory.place) + std::mem::offset_of!(Place, position) as u64;
        let arguments = self.arguments(scores, memory.address(memory.tokens), position);
        launches(self.functions, self.vocab, 1, &arguments)
    }

    /// What the kernels need for a choice from the scores at `scores` that goes to `tokens`, with the position of its
    /// step to `position`.
    pub(super) fn arguments(&self, scores: u64, tokens: u64, position: u64) -> SampleArgs {
        let slices = self.vocab.div_ceil(SLICE);
        SampleArgs {
            scores,
            requests: self.requests.address(),
            recent: self.recent.address(),
            biases: self.biases.address(),
            mask: self.mask.address(),
            candidates: self.candidates.address(),
            turn: self.turn.address(),
            tokens,
            position,
            results: self.results.address(),
            vocab: self.vocab,
            second: slices * MAX_TOP_K,
        }
    }

    /// Hands over the request of the next choice, whose step will be at `position`; returns the number under which
    /// [`Self::token`] knows it. The kernels have to be queued behind it, once.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn request(&mut self, stream: &Stream, request: &SampleRequest<'_>, position: u32) -> Result<u32> {
        let s = request.sampling;
        let penalized = s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0;
        let recent = if penalized { request.recent } else { &[] };
        if !recent.is_empty() {
            let pairs: Vec<[u32; 2]> = recent.iter().map(|&(id, count)| [id, count]).collect();
            stream.upload(&self.recent, 0, bytemuck::cast_slice(&pairs))?;
        }
        if !request.bias.is_empty() {
            let pairs: Vec<[u32; 2]> = request.bias.iter().map(|&(id, bias)| [id, bias.to_bits()]).collect();
            stream.upload(&self.biases, 0, bytemuck::cast_slice(&pairs))?;
        }
        let mask = request.mask.map(|mask| &mask[..mask.len().min(self.vocab.div_ceil(32) as usize)]);
        if let Some(mask) = mask.filter(|mask| !mask.is_empty()) {
            stream.upload(&self.mask, 0, bytemuck::cast_slice(mask))?;
        }
        let words = Request {
            top_k: if s.temperature == 0.0 { 0 } else { s.top_k.min(self.vocab) },
            n_recent: recent.len() as u32,
            temperature: s.temperature,
            top_p: s.top_p,
            min_p: s.min_p,
            uniform: request.uniform,
            repetition: s.repetition_penalty,
            presence: s.presence_penalty,
            frequency: s.frequency_penalty,
            position,
            n_biases: request.bias.len() as u32,
            has_mask: mask.is_some().into(),
            mask_words: mask.map_or(0, |mask| mask.len() as u32),
            pad: [0; 3],
        };
        let slot = (self.turns % SLOTS) as usize;
        let size = size_of::<Request>() / 4;
        self.requests.write_words(slot * size, bytemuck::cast_slice(&[words]));
        self.turns = self.turns.wrapping_add(1);
        Ok(self.turns)
    }

    /// Forgets the last request, whose kernels were not queued.
    pub(super) fn take_back(&mut self) {
        self.turns = self.turns.wrapping_sub(1);
    }

    /// The token of choice `turn`, if it is there.
    pub(super) fn token(&self, turn: u32) -> Option<u32> {
        let word = self.results.word((turn.wrapping_sub(1) % SLOTS) as usize);
        // Scores that are all NaN have no winner; the sampler on the CPU says 0 then, too.
        ((word >> 32) as u32 == turn).then(|| Some(word as u32).filter(|token| *token < self.vocab).unwrap_or(0))
    }
}
