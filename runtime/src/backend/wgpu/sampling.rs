//! Token choice on the device: biases, penalties and mask, then argmax or top-k and a draw; four bytes come back.

use awqua_shaders::{Kernel, Variant, argmax, argmax_reduce, bias, mask, penalize, sample, top_k, uniform_bytes};
use wgpu::BufferUsages;

use super::WgpuBackend;
use super::device::Gpu;
use super::readback::Readback;
use crate::error::Result;
use crate::session::sampler::{SampleRequest, Sampling};

/// A kernel with its bindings.
pub(super) struct Stage {
    pipeline: std::sync::Arc<super::pipelines::Pipeline>,
    bind_group: wgpu::BindGroup,
}

impl Stage {
    /// Binds the uniform block that begins at the byte of `uniforms`, then `storage`.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn new(
        backend: &WgpuBackend,
        kernel: &'static Kernel,
        (uniforms, offset): (&wgpu::Buffer, u64),
        storage: &[&wgpu::Buffer],
    ) -> Result<Self> {
        let gpu = &backend.gpu;
        let pipeline = backend.pipelines.get(gpu, kernel, Variant::default())?;
        let size = pipeline.bindings.first().map_or(16, |binding| u64::from(binding.min_size));
        let params = wgpu::BufferBinding { buffer: uniforms, offset, size: wgpu::BufferSize::new(size) };
        let storage: Vec<_> = storage.iter().map(|buffer| (*buffer).clone()).collect();
        let bind_group = gpu.scoped("bind groups", 0, || pipeline.bind(gpu, params, uniforms, &storage))?;
        Ok(Self { pipeline, bind_group })
    }

    pub(super) fn run(&self, pass: &mut wgpu::ComputePass<'_>, [x, y, z]: [u32; 3]) {
        pass.set_pipeline(&self.pipeline.compute);
        pass.set_bind_group(0, &self.bind_group, &[]);
        pass.dispatch_workgroups(x, y, z);
    }
}

fn is_penalized(s: &Sampling) -> bool {
    s.repetition_penalty != 1.0 || s.presence_penalty != 0.0 || s.frequency_penalty != 0.0
}

/// Whether the token with the best score is asked for, whatever it is.
pub(super) fn is_plain(request: &SampleRequest<'_>) -> bool {
    let penalized = !request.recent.is_empty() && is_penalized(request.sampling);
    request.sampling.temperature == 0.0 && request.bias.is_empty() && request.mask.is_none() && !penalized
}

/// Slots of the uniform buffer.
const SAMPLE_SLOT: u64 = 0;
const ARGMAX_SLOT: u64 = 1;
const ARGMAX_REDUCE_SLOT: u64 = 2;
const BIAS_SLOT: u64 = 3;
const MASK_SLOT: u64 = 4;
const PLAIN_SLOT: u64 = 5;
const TOP_K_SLOT: u64 = 6;

/// Most tokens with a bias of a choice that the kernels make.
const MAX_BIASES: u32 = 4096;

/// Every kernel of this file.
pub(super) static KERNELS: [&Kernel; 7] = [
    &bias::KERNEL,
    &penalize::KERNEL,
    &mask::KERNEL,
    &argmax::KERNEL,
    &argmax_reduce::KERNEL,
    &top_k::KERNEL,
    &sample::KERNEL,
];

/// The sampling kernels bound to buffers of one session.
pub(super) struct Sampler {
    vocab: u32,
    /// Copy of the logits row that biases, penalties and the mask change.
    scores: wgpu::Buffer,
    /// (capacity) pairs of id and bits of the bias.
    biases: wgpu::Buffer,
    /// (vocab) bits.
    mask_words: wgpu::Buffer,
    /// (capacity) pairs of id and count.
    recent: wgpu::Buffer,
    recent_capacity: usize,
    uniforms: wgpu::Buffer,
    slot_bytes: u64,
    result: wgpu::Buffer,
    bias: Stage,
    penalize: Stage,
    mask: Stage,
    argmax: [Stage; 2],
    /// The same from the logits themselves to the token of the next step, and the element that it begins at.
    plain: [Stage; 2],
    plain_offset: u32,
    reduce: argmax_reduce::Params,
    /// As many as the largest k can need.
    top_k: Vec<Stage>,
    /// By buffer that the last top-k pass wrote.
    sample: [Stage; 2],
    bytes: u64,
}

impl Sampler {
    /// Allocates and binds for rows of `vocab` scores and at most `context` recent tokens; `logits` is where the scores
    /// come from, and `tokens` where the next step looks for its token.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(
        backend: &WgpuBackend,
        vocab: u32,
        context: u32,
        logits: &wgpu::Buffer,
        tokens: &wgpu::Buffer,
    ) -> Result<Self> {
        let gpu = &backend.gpu;
        let mut bytes = 0;
        let mut storage = |what: &str, size: u64| {
            bytes += size;
            gpu.buffer(what, size, BufferUsages::STORAGE | BufferUsages::COPY_DST | BufferUsages::COPY_SRC)
        };
        let recent_capacity = vocab.min(context);
        let Sizes { score_bytes, bias_bytes, recent_bytes, mask_bytes, candidate_bytes } = sizes(vocab, context);
        let scores = storage("scores", score_bytes)?;
        let biases = storage("biases", bias_bytes)?;
        let mask_words = storage("the mask of tokens", mask_bytes)?;
        let recent = storage("recent tokens", recent_bytes)?;
        let candidates = [storage("candidates", candidate_bytes)?, storage("candidates", candidate_bytes)?];
        let result = storage("the chosen token", 16)?;

        let passes = top_k::passes(vocab, 0, sample::MAX_TOP_K).len() as u64;
        let slot_bytes = u64::from(gpu.limits.min_uniform_buffer_offset_alignment.max(64));
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = gpu.buffer("sampling uniforms", slot_bytes * (TOP_K_SLOT + passes), usage)?;
        let stage = |kernel, slot: u64, storage: &[&wgpu::Buffer]| {
            Stage::new(backend, kernel, (&uniforms, slot * slot_bytes), storage)
        };
        let [a, b] = &candidates;
        let sampler = Self {
            vocab,
            bias: stage(&bias::KERNEL, BIAS_SLOT, &[&biases, &scores])?,
            penalize: stage(&penalize::KERNEL, SAMPLE_SLOT, &[&recent, &scores])?,
            mask: stage(&mask::KERNEL, MASK_SLOT, &[&mask_words, &scores])?,
            argmax: [
                stage(&argmax::KERNEL, ARGMAX_SLOT, &[&scores, a])?,
                stage(&argmax_reduce::KERNEL, ARGMAX_REDUCE_SLOT, &[a, &result])?,
            ],
            plain: [
                stage(&argmax::KERNEL, PLAIN_SLOT, &[logits, a])?,
                stage(&argmax_reduce::KERNEL, ARGMAX_REDUCE_SLOT, &[a, tokens])?,
            ],
            plain_offset: 0,
            reduce: argmax_reduce::Params { n: argmax::blocks(vocab), rows: 1, ..Default::default() },
            // The first pass reads scores and writes to `a`; the following ones go back and forth.
            top_k: (0..passes)
                .map(|pass| {
                    let (from, to) = if pass % 2 == 0 { (b, a) } else { (a, b) };
                    stage(&top_k::KERNEL, TOP_K_SLOT + pass, &[&scores, from, to])
                })
                .collect::<Result<_>>()?,
            sample: [
                stage(&sample::KERNEL, SAMPLE_SLOT, &[a, &result])?,
                stage(&sample::KERNEL, SAMPLE_SLOT, &[b, &result])?,
            ],
            bytes: bytes + uniforms.size(),
            scores,
            biases,
            mask_words,
            recent,
            recent_capacity: recent_capacity as usize,
            slot_bytes,
            uniforms,
            result,
        };
        let params = argmax::Params { n: vocab, offset: 0, ..Default::default() };
        sampler.write(gpu, ARGMAX_SLOT, uniform_bytes(&params));
        sampler.write(gpu, PLAIN_SLOT, uniform_bytes(&params));
        sampler.write(gpu, ARGMAX_REDUCE_SLOT, uniform_bytes(&sampler.reduce));
        Ok(sampler)
    }

    /// Whether the kernels can make this choice; the others need the whole row in order.
    pub(super) fn handles(&self, request: &SampleRequest<'_>) -> bool {
        let s = request.sampling;
        let kept = s.temperature == 0.0 || (1..=sample::MAX_TOP_K).contains(&s.top_k);
        let biases = request.bias.len() <= self.vocab.min(MAX_BIASES) as usize;
        kept && biases && request.recent.len() <= self.recent_capacity
    }

    /// The commands that leave the token with the best score in front of `tokens`, without biases, penalties and mask; the
    /// scores are those of the row from element `offset` of the logits on.
    pub(super) fn encode_plain(&mut self, gpu: &Gpu, offset: u32) -> wgpu::CommandEncoder {
        if offset != self.plain_offset {
            let params = argmax::Params { n: self.vocab, offset, ..Default::default() };
            self.write(gpu, PLAIN_SLOT, uniform_bytes(&params));
            self.plain_offset = offset;
        }
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("best") });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
        let [blocks, reduce] = &self.plain;
        blocks.run(&mut pass, [argmax::blocks(self.vocab), 1, 1]);
        reduce.run(&mut pass, argmax_reduce::grid(&self.reduce));
        drop(pass);
        encoder
    }

    /// Bytes of its buffers.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Begins to pick a token from the scores that begin at the byte of `logits`; [`Self::poll`] has it.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn begin(
        &self,
        gpu: &Gpu,
        request: &SampleRequest<'_>,
        logits: (&wgpu::Buffer, u64),
        readback: &Readback,
    ) -> Result<()> {
        let encoder = self.encode(gpu, request, logits);
        readback.begin(gpu, encoder, &[(&self.result, 0, 4)])
    }

    /// Where the commands of [`Self::encode`] leave the token, in the first four bytes.
    pub(super) fn result(&self) -> &wgpu::Buffer {
        &self.result
    }

    /// The commands that pick a token from the scores that begin at the byte of `logits`.
    pub(super) fn encode(
        &self,
        gpu: &Gpu,
        request: &SampleRequest<'_>,
        (logits, offset): (&wgpu::Buffer, u64),
    ) -> wgpu::CommandEncoder {
        let s = request.sampling;
        let recent = if is_penalized(s) { request.recent } else { &[] };
        let params = sample::Params {
            vocab: self.vocab,
            offset: 0,
            n_recent: recent.len() as u32,
            top_k: s.top_k.clamp(1, self.vocab),
            temperature: s.temperature,
            top_p: s.top_p,
            min_p: s.min_p,
            uniform_number: request.uniform,
            repetition: s.repetition_penalty,
            presence: s.presence_penalty,
            frequency: s.frequency_penalty,
            ..Default::default()
        };
        self.write(gpu, SAMPLE_SLOT, uniform_bytes(&params));

        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("sample") });
        encoder.copy_buffer_to_buffer(logits, offset, &self.scores, 0, u64::from(self.vocab) * 4);
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            let mut run = |stage: &Stage, grid| stage.run(&mut pass, grid);
            // The mask comes last, as nothing brings a score back that it takes away.
            if !request.bias.is_empty() {
                let params = bias::Params { vocab: self.vocab, n: request.bias.len() as u32, ..Default::default() };
                let pairs: Vec<[u32; 2]> = request.bias.iter().map(|&(id, bias)| [id, bias.to_bits()]).collect();
                self.write(gpu, BIAS_SLOT, uniform_bytes(&params));
                gpu.queue.write_buffer(&self.biases, 0, bytemuck::cast_slice(&pairs));
                run(&self.bias, bias::grid(&params));
            }
            if !recent.is_empty() {
                let pairs: Vec<[u32; 2]> = recent.iter().map(|&(id, count)| [id, count]).collect();
                gpu.queue.write_buffer(&self.recent, 0, bytemuck::cast_slice(&pairs));
                run(&self.penalize, penalize::grid(&params));
            }
            if let Some(words) = request.mask {
                let words = &words[..words.len().min(mask::words(self.vocab) as usize)];
                let params = mask::Params { vocab: self.vocab, words: words.len() as u32, ..Default::default() };
                self.write(gpu, MASK_SLOT, uniform_bytes(&params));
                gpu.queue.write_buffer(&self.mask_words, 0, bytemuck::cast_slice(words));
                run(&self.mask, mask::grid(&params));
            }
            if s.temperature == 0.0 {
                let [blocks, reduce] = &self.argmax;
                run(blocks, [argmax::blocks(self.vocab), 1, 1]);
                run(reduce, argmax_reduce::grid(&self.reduce));
            } else {
                let passes = top_k::passes(self.vocab, 0, params.top_k);
                for (i, pass) in passes.iter().enumerate() {
                    self.write(gpu, TOP_K_SLOT + i as u64, uniform_bytes(pass));
                    run(&self.top_k[i], top_k::grid(pass));
                }
                run(&self.sample[(passes.len() + 1) % 2], sample::grid());
            }
        }
        encoder
    }

    /// The token, if it is there.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn poll(&self, gpu: &Gpu, readback: &Readback) -> Result<Option<u32>> {
        let mut token = 0;
        let there = readback.poll(gpu, |bytes| token = bytes.first_chunk().map_or(0, |b| u32::from_le_bytes(*b)))?;
        // Scores that are all NaN have no winner; the sampler on the CPU says 0 then, too.
        Ok(there.then_some(if token < self.vocab { token } else { 0 }))
    }

    fn write(&self, gpu: &Gpu, slot: u64, bytes: &[u8]) {
        gpu.queue.write_buffer(&self.uniforms, slot * self.slot_bytes, bytes);
    }
}

/// Bytes of the buffers; there are two of candidates.
struct Sizes {
    score_bytes: u64,
    bias_bytes: u64,
    recent_bytes: u64,
    mask_bytes: u64,
    candidate_bytes: u64,
}

fn sizes(vocab: u32, context: u32) -> Sizes {
    let most = top_k::kept(vocab, sample::MAX_TOP_K).max(argmax::blocks(vocab));
    Sizes {
        score_bytes: u64::from(vocab) * 4,
        bias_bytes: u64::from(vocab.min(MAX_BIASES)) * 8,
        recent_bytes: u64::from(vocab.min(context)) * 8,
        mask_bytes: u64::from(mask::words(vocab)) * 4,
        candidate_bytes: u64::from(most) * 8,
    }
}

/// Bytes that a sampler takes, but for some uniform blocks.
pub(super) fn bytes(vocab: u32, context: u32) -> u64 {
    let Sizes { score_bytes, bias_bytes, recent_bytes, mask_bytes, candidate_bytes } = sizes(vocab, context);
    score_bytes + bias_bytes + recent_bytes + mask_bytes + 2 * candidate_bytes
}
