//! The way of the weights: mapped memory that is filled while the device takes what was filled before, and what the
//! device makes of matrices as they are stored.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use awqua_shaders::{Variant, uniform_bytes, w4, w4_stored};
use wgpu::{BufferUsages, MapMode};

use super::device::{Gpu, Ticket};
use super::pipelines::{Pipeline, Pipelines};
use super::selftest;
use super::weights::GpuW4;
use crate::checkpoint::{Piece, gather};
use crate::error::{Error, ErrorKind, Result};
use crate::quant::awq::{PIECE_ALIGN, StoredGemm};

/// Most bytes of weights on their way at once, twice; small models, and devices with small buffers, take less.
const MOST: usize = 16 << 20;
/// Least.
const LEAST: usize = 64 << 10;

const PENDING: u32 = 0;
const MAPPED: u32 = 1;
const FAILED: u32 = 2;

/// What large uploads go through.
pub(super) struct Loader {
    halves: [Half; 2],
    /// The half that is filled next.
    next: usize,
    /// Most bytes of a half.
    room: usize,
    /// Undoes the layout of files; `None` where the device computes it wrongly.
    unpack: Option<Arc<Pipeline>>,
}

/// One half of the way.
struct Half {
    /// What the host writes.
    host: wgpu::Buffer,
    /// Where kernels read it.
    device: wgpu::Buffer,
    /// Of `host`.
    state: Arc<AtomicU32>,
    /// The last work on it.
    ticket: Option<Ticket>,
}

impl Half {
    /// Room for `bytes`.
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let (what, size) = ("the way of the weights", bytes as u64);
        let usage = BufferUsages::MAP_WRITE | BufferUsages::COPY_SRC;
        let host = wgpu::BufferDescriptor { label: Some(what), size, usage, mapped_at_creation: true };
        let host = gpu.scoped(what, size, || gpu.device.create_buffer(&host))?;
        let device = gpu.buffer(what, size, BufferUsages::STORAGE | BufferUsages::COPY_DST)?;
        Ok(Self { host, device, state: Arc::new(AtomicU32::new(MAPPED)), ticket: None })
    }
}

impl Loader {
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Gpu, pipelines: &Pipelines) -> Result<Self> {
        let unpack = match selftest::pass(gpu, pipelines, &w4_stored::KERNEL, Variant::default()) {
            Ok(()) => Some(pipelines.get(gpu, &w4_stored::KERNEL, Variant::default())?),
            Err(error) if error.kind() == ErrorKind::DeviceLost => return Err(error),
            Err(_) => None,
        };
        let limit = gpu.limits.max_storage_buffer_binding_size.min(gpu.limits.max_buffer_size);
        let room = usize::try_from(limit).unwrap_or(usize::MAX).min(MOST) / PIECE_ALIGN * PIECE_ALIGN;
        let least = LEAST.min(room);
        Ok(Self { halves: [Half::new(gpu, least)?, Half::new(gpu, least)?], next: 0, room, unpack })
    }

    /// Fills the next half with `pieces`, one behind the other at multiples of [`PIECE_ALIGN`] bytes, and submits what
    /// `use_it` encodes with it and their places. The pieces are at most [`Self::room`] bytes. Does not wait for the device.
    ///
    /// # Errors
    /// Those of reading the pieces, or a device error.
    fn pass(
        &mut self,
        gpu: &Gpu,
        pieces: &[Piece<'_>],
        use_it: impl FnOnce(&mut wgpu::CommandEncoder, &Half, &[u64], u64) -> Result<()>,
    ) -> Result<()> {
        let bytes: usize = pieces.iter().map(|piece| piece.len().next_multiple_of(PIECE_ALIGN)).sum();
        if bytes > self.room {
            return Err(Error::new(ErrorKind::InvalidInput, format!("{bytes} bytes at once")));
        }
        let half = &mut self.halves[self.next];
        if bytes > half.host.size() as usize {
            // What is queued keeps the old one.
            *half = Half::new(gpu, bytes.next_power_of_two().min(self.room))?;
        }
        let state = half.state.clone();
        gpu.wait_until(half.ticket.as_ref().map(Ticket::index), || state.load(Ordering::Acquire) != PENDING)?;
        if state.load(Ordering::Acquire) == FAILED {
            return Err(Error::new(ErrorKind::Device, "memory for weights can not be mapped"));
        }
        let failed = |error| Error::new(ErrorKind::Device, format!("memory for weights can not be written: {error}"));
        let mut places = Vec::with_capacity(pieces.len());
        let mut at = 0;
        {
            let mut view = half.host.get_mapped_range_mut(..).map_err(failed)?;
            let mut room = view.slice(..);
            let len = room.len();
            // SAFETY: the mapping is ours until `view` goes, `len` bytes long, and nothing reads from it: pieces are
            // copied there by plain writes, which memory that combines them is made for.
            let mut room = unsafe { std::slice::from_raw_parts_mut(room.as_raw_element_ptr().as_ptr(), len) };
            let mut parts = Vec::with_capacity(pieces.len());
            for piece in pieces {
                let padded = piece.len().next_multiple_of(PIECE_ALIGN);
                let (place, behind) = room.split_at_mut(padded);
                places.push(at as u64);
                parts.push((&mut place[..piece.len()], *piece));
                room = behind;
                at += padded;
            }
            gather(parts)?;
        }
        half.host.unmap();
        half.state.store(PENDING, Ordering::Release);
        let mut encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("weights") });
        let used = use_it(&mut encoder, half, &places, at as u64);
        half.ticket = Some(gpu.submit(used.is_ok().then(|| encoder.finish())));
        let state = half.state.clone();
        half.host.map_async(MapMode::Write, .., move |result| {
            state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
        self.next = 1 - self.next;
        used?;
        gpu.check()
    }

    /// Writes `data`, whole words, to `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn write(&mut self, gpu: &Gpu, buffer: &wgpu::Buffer, offset: u64, data: &[u8]) -> Result<()> {
        let mut at = offset;
        for slice in data.chunks(self.room) {
            self.pass(gpu, &[Piece::Bytes(slice)], |encoder, half, _, _| {
                encoder.copy_buffer_to_buffer(&half.host, 0, buffer, at, slice.len() as u64);
                Ok(())
            })?;
            at += slice.len() as u64;
        }
        Ok(())
    }

    /// Whether [`Self::fill`] takes `stored` as the rows from row `first` of `to` on.
    pub(super) fn takes(&self, to: &GpuW4, stored: &StoredGemm, first: usize) -> bool {
        self.unpack.is_some()
            && (stored.k, stored.k / stored.group_size) == (to.k as usize, to.groups as usize)
            && (first | stored.n).is_multiple_of(w4::TILE_N)
            && to.takes_zeros()
            && stored.fits(self.room)
    }

    /// Brings inputs `inputs`, from a multiple of [`crate::backend::INPUT_STEP`] on, of the rows from row `first` of `to` on.
    ///
    /// # Errors
    /// Those of reading, or a device error.
    pub(super) fn fill(
        &mut self,
        gpu: &Gpu,
        to: &GpuW4,
        first: usize,
        stored: &StoredGemm,
        inputs: Range<usize>,
    ) -> Result<()> {
        let Some(unpack) = self.unpack.clone() else {
            return Err(Error::new(ErrorKind::InvalidInput, "this device does not take rows as they are stored"));
        };
        for inputs in stored.cuts(inputs, self.room) {
            let groups = stored.groups_from(&inputs);
            self.pass(gpu, &stored.pieces(&inputs), |encoder, half, places, bytes| {
                encoder.copy_buffer_to_buffer(&half.host, 0, &half.device, 0, bytes);
                let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
                pass.set_pipeline(&unpack.compute);
                for part in &to.parts {
                    let (part_first, part_end) = (part.first_row as usize, (part.first_row + part.rows) as usize);
                    let (begin, end) = (first.max(part_first), (first + stored.n).min(part_end));
                    if begin >= end {
                        continue;
                    }
                    let of_codes = w4_stored::Params {
                        n: stored.n as u32,
                        inputs: inputs.len() as u32,
                        skip: (begin - first) as u32,
                        rows: (end - begin) as u32,
                        first_row: (begin - part_first) as u32,
                        first: (inputs.start / w4::CHUNK_K) as u32,
                        per_row: to.chunks,
                        ..Default::default()
                    };
                    let of_groups = w4_stored::Params {
                        first: groups.start as u32,
                        per_row: to.groups,
                        scales: (places[1] / 4) as u32,
                        zeros: (places[2] / 4) as u32,
                        ..of_codes
                    };
                    let chunks = inputs.len().div_ceil(w4::CHUNK_K);
                    for (params, count) in [(of_codes, chunks), (of_groups, groups.len())] {
                        if count == 0 {
                            continue;
                        }
                        let usage = BufferUsages::UNIFORM | BufferUsages::COPY_DST;
                        let uniform = gpu.buffer("parameters", size_of_val(&params) as u64, usage)?;
                        gpu.queue.write_buffer(&uniform, 0, uniform_bytes(&params));
                        let storage = [half.device.clone(), part.qweight.clone(), part.group_params.clone()];
                        // The kernel has no step; the binding is not used.
                        let group = unpack.bind(gpu, uniform.as_entire_buffer_binding(), &uniform, &storage);
                        pass.set_bind_group(0, &group, &[]);
                        let [x, y, z] = w4_stored::grid(&params, count as u32);
                        pass.dispatch_workgroups(x, y, z);
                    }
                }
                Ok(())
            })?;
        }
        Ok(())
    }
}
