//! The way back: a mappable buffer made once, through which results come to the host.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use wgpu::BufferUsages;

use super::device::Gpu;
use crate::error::{Error, ErrorKind, Result};

const PENDING: u32 = 0;
const MAPPED: u32 = 1;
const FAILED: u32 = 2;

/// A mappable buffer.
pub(super) struct Readback {
    staging: wgpu::Buffer,
}

/// A reading on its way.
pub(super) struct Reading {
    state: Arc<AtomicU32>,
    bytes: u64,
}

impl Readback {
    /// Room for `bytes`.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Gpu, bytes: u64) -> Result<Self> {
        let staging = gpu.buffer("the readback buffer", bytes, BufferUsages::MAP_READ | BufferUsages::COPY_DST)?;
        Ok(Self { staging })
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
        mut encoder: wgpu::CommandEncoder,
        (source, offset): (&wgpu::Buffer, u64),
        bytes: u64,
        take: impl FnOnce(&[u8]),
    ) -> Result<()> {
        self.encode(&mut encoder, (source, offset), bytes);
        gpu.submit(Some(encoder.finish()));
        gpu.check()?;
        let reading = self.start(bytes);
        self.finish(gpu, reading, take)
    }

    /// Adds the copy of `bytes` of `source` from its offset on.
    pub(super) fn encode(
        &self,
        encoder: &mut wgpu::CommandEncoder,
        (source, offset): (&wgpu::Buffer, u64),
        bytes: u64,
    ) {
        encoder.copy_buffer_to_buffer(source, offset, &self.staging, 0, bytes);
    }

    /// Begins to read `bytes`, after everything submitted before; [`Self::finish`] must follow.
    pub(super) fn start(&self, bytes: u64) -> Reading {
        let state = Arc::new(AtomicU32::new(PENDING));
        let callback = state.clone();
        self.staging.map_async(wgpu::MapMode::Read, 0..bytes, move |result| {
            callback.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
        });
        Reading { state, bytes }
    }

    /// Waits for what [`Self::start`] began and hands it to `take`.
    ///
    /// # Errors
    /// As [`Gpu::wait`].
    pub(super) fn finish(&self, gpu: &Gpu, reading: Reading, take: impl FnOnce(&[u8])) -> Result<()> {
        let Reading { state, bytes } = reading;
        let result = gpu.wait_until(None, || state.load(Ordering::Acquire) != PENDING).and_then(|()| {
            let failed = |reason: String| Error::new(ErrorKind::Device, format!("results can not be read: {reason}"));
            if state.load(Ordering::Acquire) == FAILED {
                gpu.settle()?;
                return Err(failed("mapping failed".to_owned()));
            }
            let view = self.staging.get_mapped_range(0..bytes).map_err(|e| failed(e.to_string()))?;
            take(&view);
            Ok(())
        });
        // Also cancels a mapping that never came, so that the next read finds the buffer free.
        self.staging.unmap();
        result
    }
}
