//! The choices of the members of a pass that ask for their best token, made together: a kernel for all of them instead of
//! commands of each, and one way back.

use std::sync::{Arc, Mutex};

use awqua_shaders::attention_each::MEMBERS;
use awqua_shaders::{Kernel, argmax, argmax_each, argmax_reduce, uniform_bytes};
use wgpu::BufferUsages;

use super::WgpuBackend;
use super::device::{Gpu, Ticket, lock};
use super::readback::Readback;
use super::sampling::Stage;
use crate::error::Result;

/// Every kernel of this file.
pub(super) static KERNELS: [&Kernel; 2] = [&argmax_each::KERNEL, &argmax_reduce::KERNEL];

/// The tokens of a pass on their way to the host.
pub(super) struct PassTokens {
    readback: Readback,
    /// Once they are there.
    tokens: Mutex<Option<Vec<u32>>>,
}

impl PassTokens {
    fn new(gpu: &Gpu, rows: u32) -> Result<Self> {
        Ok(Self { readback: Readback::new(gpu, u64::from(rows) * 4)?, tokens: Mutex::default() })
    }

    /// The token of a row, if it is there.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn poll(&self, gpu: &Gpu, row: usize) -> Result<Option<u32>> {
        let mut tokens = lock(&self.tokens);
        if tokens.is_none() {
            let take = |bytes: &[u8]| {
                *tokens = Some(bytes.as_chunks().0.iter().map(|b| u32::from_le_bytes(*b)).collect());
            };
            self.readback.poll(gpu, take)?;
        }
        Ok(tokens.as_ref().and_then(|tokens| tokens.get(row)).copied())
    }

    /// Takes note that the commands that bring them are submitted.
    pub(super) fn expect(&self, ticket: &Ticket) {
        self.readback.expect(ticket, self.readback.capacity());
    }

    /// Blocks until they are there, see [`Readback::wait`].
    ///
    /// # Errors
    /// A device error.
    pub(super) fn wait(&self, gpu: &Gpu) -> Result<()> {
        self.readback.wait(gpu)
    }

    /// Forgets them, for the next pass.
    fn clear(&self) {
        self.readback.cancel();
        *lock(&self.tokens) = None;
    }
}

/// The kernels bound to the logits of the members.
pub(super) struct Choices {
    /// Candidates of a row.
    blocks: u32,
    /// (rows, blocks) of key and id.
    candidates: wgpu::Buffer,
    /// Of the dispatches over [`MEMBERS`] rows each.
    params: Vec<argmax_each::Params>,
    /// Their blocks, then that of the reduction.
    uniforms: wgpu::Buffer,
    slot_bytes: u64,
    most: u32,
    /// Those dispatches.
    best: Vec<(Stage, [u32; 3])>,
    /// Binds the tokens of the pass.
    reduce: Stage,
    /// Rows that the reduction's block says.
    reduced: u32,
    /// The ways back, taken when nobody waits for their last tokens.
    tokens: Vec<Arc<PassTokens>>,
}

impl Choices {
    /// Allocates for `most` rows of `vocab` scores; the chosen tokens go to `tokens` (rows). [`Self::bind`] has to follow.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(backend: &WgpuBackend, vocab: u32, most: u32, tokens: &wgpu::Buffer) -> Result<Self> {
        let gpu = &backend.gpu;
        let blocks = argmax::blocks(vocab);
        let bytes = u64::from(blocks) * u64::from(most) * 8;
        let candidates = gpu.buffer("candidates of a pass", bytes, BufferUsages::STORAGE)?;
        let slot_bytes = u64::from(gpu.limits.min_uniform_buffer_offset_alignment.max(16));
        let firsts = (0..most).step_by(MEMBERS as usize);
        let params: Vec<_> =
            firsts.map(|first_row| argmax_each::Params { n: vocab, first_row, ..Default::default() }).collect();
        let last = params.len() as u64 * slot_bytes;
        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
        let uniforms = gpu.buffer("uniform blocks of choices", last + slot_bytes, usage)?;
        for (slot, params) in (0..).zip(&params) {
            gpu.queue.write_buffer(&uniforms, slot * slot_bytes, uniform_bytes(params));
        }
        let reduce = Stage::new(backend, &argmax_reduce::KERNEL, (&uniforms, last), &[&candidates, tokens])?;
        Ok(Self {
            blocks,
            params,
            candidates,
            uniforms,
            slot_bytes,
            most,
            best: Vec::new(),
            reduce,
            reduced: 0,
            tokens: Vec::new(),
        })
    }

    /// Bytes of its buffers.
    pub(super) fn bytes(&self) -> u64 {
        self.candidates.size() + self.uniforms.size()
    }

    /// Has the following choices read the scores in front of these buffers, by row.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn bind(&mut self, backend: &WgpuBackend, logits: &[wgpu::Buffer]) -> Result<()> {
        self.best.clear();
        for ((slot, params), rows) in (0..).zip(&self.params).zip(logits.chunks(MEMBERS as usize)) {
            // The places of members that are not there hold the first one's scores, which nobody looks at.
            let mut storage: Vec<_> = (0..MEMBERS as usize).map(|i| rows.get(i).unwrap_or(&rows[0])).collect();
            storage.push(&self.candidates);
            let uniforms = (&self.uniforms, slot * self.slot_bytes);
            let stage = Stage::new(backend, &argmax_each::KERNEL, uniforms, &storage)?;
            self.best.push((stage, argmax_each::grid(params, rows.len() as u32)));
        }
        Ok(())
    }

    /// A way back that nobody uses.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn way_back(&mut self, gpu: &Gpu) -> Result<Arc<PassTokens>> {
        if let Some(free) = self.tokens.iter().find(|tokens| Arc::strong_count(tokens) == 1) {
            free.clear();
            return Ok(Arc::clone(free));
        }
        let tokens = Arc::new(PassTokens::new(gpu, self.most)?);
        self.tokens.push(Arc::clone(&tokens));
        Ok(tokens)
    }

    /// Encodes the choices of the rows whose bits are set, to `tokens` and from there on their way back;
    /// [`PassTokens::expect`] has to follow once the commands are submitted.
    pub(super) fn encode(
        &mut self,
        gpu: &Gpu,
        encoder: &mut wgpu::CommandEncoder,
        rows: u32,
        tokens: &wgpu::Buffer,
        back: &PassTokens,
    ) {
        let params = argmax_reduce::Params { n: self.blocks, rows, ..Default::default() };
        if self.reduced != rows {
            let offset = self.uniforms.size() - self.slot_bytes;
            gpu.queue.write_buffer(&self.uniforms, offset, uniform_bytes(&params));
            self.reduced = rows;
        }
        {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            self.best.iter().for_each(|(stage, grid)| stage.run(&mut pass, *grid));
            self.reduce.run(&mut pass, argmax_reduce::grid(&params));
        }
        back.readback.bring(encoder, &[(tokens, 0, back.readback.capacity())]);
    }
}
