//! The way of the weights: memory of the host that the device reads directly, filled while the device takes what was
//! filled before.

use std::sync::Arc;

use super::driver::{Buffer, Event, Gpu, Launch, Pinned, Stream};
use crate::checkpoint::{Piece, gather};
use crate::error::{Error, Result};
use crate::quant::awq::PIECE_ALIGN;

/// Bytes of weights on their way at once, twice: one half is filled while the device takes the other.
pub(super) const STAGING: usize = 16 << 20;

/// What uploads go through.
pub(super) struct Loader {
    gpu: Arc<Gpu>,
    pub(super) stream: Stream,
    /// The row that comes next of the last weight, or of the stack that it belongs to, and the end of its rows.
    pub(super) filled: usize,
    pub(super) end: usize,
    /// Bytes of a half.
    pub(super) room: usize,
    halves: [Half; 2],
    /// The half that is filled next.
    next: usize,
}

/// One half of the way: memory of the host, the same on the device, and the end of the work on it.
struct Half {
    host: Pinned,
    device: Buffer,
    end: Option<Event>,
}

impl Loader {
    /// With room for `room` bytes at once, twice.
    ///
    /// # Errors
    /// [`crate::error::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Arc<Gpu>, room: usize) -> Result<Self> {
        let half = || {
            let device = gpu.buffer("the way of the weights", room as u64)?;
            Ok::<_, Error>(Half { host: gpu.pinned(room)?, device, end: None })
        };
        Ok(Self {
            gpu: gpu.clone(),
            stream: gpu.stream()?,
            filled: 0,
            end: 0,
            room,
            halves: [half()?, half()?],
            next: 0,
        })
    }

    pub(super) fn gpu(&self) -> &Gpu {
        &self.gpu
    }

    /// Whether the device has taken everything.
    pub(super) fn is_settled(&self) -> Result<bool> {
        self.halves.iter().try_fold(true, |all, half| Ok(all && half.end.as_ref().map_or(Ok(true), Event::is_reached)?))
    }

    /// Brings `pieces` to the device, one behind the other at multiples of [`PIECE_ALIGN`] bytes, and queues what
    /// `use_them` makes of their addresses. The pieces are at most [`Self::room`] bytes with their alignment.
    ///
    /// # Errors
    /// Those of reading the pieces, or a device error.
    pub(super) fn pass(
        &mut self,
        pieces: &[Piece<'_>],
        use_them: impl FnOnce(&[u64]) -> Result<Vec<Launch>>,
    ) -> Result<()> {
        let half = &mut self.halves[self.next];
        if let Some(end) = half.end.take() {
            end.wait()?;
        }
        let (mut at, mut addresses, mut places) = (0, Vec::with_capacity(pieces.len()), Vec::new());
        let mut room = half.host.bytes_mut();
        for piece in pieces {
            addresses.push(half.device.address() + at as u64);
            let padded = piece.len().next_multiple_of(PIECE_ALIGN).min(room.len());
            let (place, behind) = room.split_at_mut(padded);
            places.push((&mut place[..piece.len()], *piece));
            room = behind;
            at += padded;
        }
        gather(places)?;
        self.stream.upload_pinned(&half.device, 0, &half.host, at)?;
        for launch in use_them(&addresses)? {
            // SAFETY: the callers make the arguments from what they reserved; buffers of weights live as long as the
            // backend, which waits for its stream before it frees them.
            unsafe { self.stream.launch(&Launch { overlaps: false, ..launch }) }?;
        }
        half.end = Some(super::mark(&self.gpu, &self.stream)?);
        self.next = 1 - self.next;
        Ok(())
    }
}
