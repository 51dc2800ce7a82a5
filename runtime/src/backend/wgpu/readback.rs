//! The way back: a mappable buffer made once, through which results come to the host.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use wgpu::BufferUsages;

use super::device::{Gpu, Ticket, lock};
use crate::error::{Error, ErrorKind, Result};

const PENDING: u32 = 0;
const MAPPED: u32 = 1;
const FAILED: u32 = 2;

/// A mappable buffer.
pub(super) struct Readback {
    staging: wgpu::Buffer,
    flight: Mutex<Option<Flight>>,
}

/// A read under way.
struct Flight {
    state: Arc<AtomicU32>,
    bytes: u64,
    /// The submission that it waits for.
    index: wgpu::SubmissionIndex,
}

impl Readback {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let staging = gpu.buffer("the readback buffer", bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        Ok(Self { staging, flight: Mutex::default() })
    }

    /// Bytes that fit.
    pub(super) fn capacity(&self) -> u64 {
        self.staging.size()
    }

    /// Gives `take` `bytes` of `source` from its offset on, after everything submitted before.
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn read(
        &self,
        gpu: &Gpu,
        source: (&wgpu::Buffer, u64),
        bytes: u64,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        let encoder = gpu.device.create_command_encoder(&wgpu::CommandEncoderDescriptor { label: Some("read") });
        self.submit_and_read(gpu, encoder, source, bytes, take)
    }

    /// Submits the commands of `encoder`, then does as [`Self::read`].
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn submit_and_read(
        &self,
        gpu: &Gpu,
        encoder: wgpu::CommandEncoder,
        (source, offset): (&wgpu::Buffer, u64),
        bytes: u64,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        self.begin(gpu, encoder, &[(source, offset, bytes)])?;
        match self.wait(gpu).and_then(|()| self.poll(gpu, take)) {
            Ok(_) => Ok(()),
            Err(error) => {
                self.cancel();
                Err(error)
            }
        }
    }

    /// Submits the commands of `encoder` and asks for ranges (buffer, offset, bytes), one behind the other; a read
    /// under way is forgotten. Does not wait.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn begin(
        &self,
        gpu: &Gpu,
        mut encoder: wgpu::CommandEncoder,
        sources: &[(&wgpu::Buffer, u64, u64)],
    ) -> Result<()> {
        let bytes = self.bring(&mut encoder, sources);
        let ticket = gpu.submit(Some(encoder.finish()));
        gpu.check()?;
        self.expect(&ticket, bytes);
        Ok(())
    }

    /// Has the commands of `encoder` bring ranges as [`Self::begin`] does; the bytes in all. [`Self::expect`] has to follow
    /// once the commands are submitted.
    pub(super) fn bring(&self, encoder: &mut wgpu::CommandEncoder, sources: &[(&wgpu::Buffer, u64, u64)]) -> u64 {
        self.cancel();
        let mut at = 0;
        for &(source, offset, bytes) in sources {
            encoder.copy_buffer_to_buffer(source, offset, &self.staging, at, bytes);
            at += bytes;
        }
        at
    }

    /// Asks for what the commands of the submission brought.
    pub(super) fn expect(&self, ticket: &Ticket, bytes: u64) {
        let mut flight = lock(&self.flight);
        let state = Arc::new(AtomicU32::new(PENDING));
        *flight = Some(Flight { state: state.clone(), bytes, index: ticket.index().clone() });
        self.staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
    }

    /// Whether the result of [`Self::begin`], good or bad, is there.
    pub(super) fn arrived(&self) -> bool {
        lock(&self.flight).as_ref().is_none_or(|flight| flight.state.load(Ordering::Acquire) != PENDING)
    }

    /// Blocks until the result is there, but not for what was submitted since: that keeps the device busy meanwhile.
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn wait(&self, gpu: &Gpu) -> Result<()> {
        let index = lock(&self.flight).as_ref().map(|flight| flight.index.clone());
        gpu.wait_until(index.as_ref(), || self.arrived())
    }

    /// Gives `take` what [`Self::begin`] asked for; `false` if it is not there yet.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn poll(&self, gpu: &Gpu, take: impl FnOnce(&[u8])) -> Result<bool> {
        let failed = |reason: String| Error::new(ErrorKind::Device, format!("results can not be read: {reason}"));
        let (state, bytes) = match &*lock(&self.flight) {
            Some(flight) => (flight.state.load(Ordering::Acquire), flight.bytes),
            None => return Err(failed("nothing was asked for".to_owned())),
        };
        if state == PENDING {
            return Ok(false);
        }
        let result = match state {
            MAPPED => match self.staging.get_mapped_range(0..bytes) {
                Ok(view) => {
                    take(&view);
                    Ok(true)
                }
                Err(error) => Err(failed(error.to_string())),
            },
            _ => gpu.settle().and(Err(failed("mapping failed".to_owned()))),
        };
        self.cancel();
        result
    }

    /// Forgets a read under way, so that the next one finds the buffer free.
    pub(super) fn cancel(&self) {
        if lock(&self.flight).take().is_some() {
            self.staging.unmap();
        }
    }
}
