//! How long queued work will take: estimates that follow what was measured.
//!
//! Timestamps written by the device say how long a submission took. Where a device offers none, its completion is all
//! there is, and completion is only noticed when somebody looks: that bounds the time from above, and an unfinished
//! submission bounds it from below. Estimates move when a bound contradicts them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use wgpu::{BufferUsages, Features};

use super::device::{Gpu, Ticket};
use crate::error::Result;

/// Work is estimated apart by the power of two of its tokens: few tokens wait for memory, many for arithmetic.
const CLASSES: usize = 13;
/// Seconds of a dispatch that computes nothing.
const DISPATCH_SECONDS: f64 = 3e-6;
/// Submissions measured at once.
const SLOTS: usize = 8;
/// Where nobody asks for a budget, one submission of so many is measured: the clock stops the device for microseconds.
const SELDOM: u32 = 32;

/// Class of a step of `n_tokens`.
pub(super) fn class(n_tokens: u32) -> usize {
    (n_tokens.max(1).ilog2() as usize).min(CLASSES - 1)
}

/// Estimates of one session.
pub(super) struct Pace {
    /// Seconds a multiplication or addition, by class: measured, or guessed from the kind of device.
    seconds: [f64; CLASSES],
    measured: [bool; CLASSES],
    pending: VecDeque<Pending>,
    /// Submissions since the last one that was measured.
    unmeasured: u32,
    timestamps: Option<Timestamps>,
    /// When the last submission was seen finished.
    idle_since: Instant,
}

struct Pending {
    ticket: u64,
    class: usize,
    flops: u64,
    dispatches: u32,
    submitted: Instant,
    slot: Option<usize>,
}

struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    slots: Vec<Slot>,
    /// Seconds of one tick.
    period: f64,
}

struct Slot {
    staging: wgpu::Buffer,
    state: Arc<AtomicU32>,
}

const FREE: u32 = 0;
const FLYING: u32 = 1;
const MAPPED: u32 = 2;
const FAILED: u32 = 3;

impl Pace {
    /// Estimates to begin with.
    ///
    /// # Errors
    /// [`crate::ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn new(gpu: &Gpu) -> Result<Self> {
        // Of memory-bound and compute-bound work; the first measurement replaces them.
        let (memory, compute) = match gpu.summary.kind {
            "discrete" => (0.5e-12, 0.1e-12),
            "cpu" => (200e-12, 200e-12),
            _ => (5e-12, 2e-12),
        };
        let mut seconds = [compute; CLASSES];
        for (class, seconds) in seconds.iter_mut().enumerate() {
            *seconds = (memory / f64::from(1u32 << class)).max(compute);
        }
        let timestamps = match gpu.features.contains(Features::TIMESTAMP_QUERY) {
            true => Some(Timestamps::new(gpu)?),
            false => None,
        };
        Ok(Self {
            seconds,
            measured: [false; CLASSES],
            pending: VecDeque::with_capacity(256),
            unmeasured: 0,
            timestamps,
            idle_since: Instant::now(),
        })
    }

    /// Estimated seconds of `dispatches` with `flops` in all.
    pub(super) fn estimate(&self, class: usize, flops: u64, dispatches: u32) -> f64 {
        self.seconds[class] * flops as f64 + DISPATCH_SECONDS * f64::from(dispatches)
    }

    /// Estimated time of what is submitted and not finished.
    pub(super) fn queued(&self) -> Duration {
        let seconds: f64 = self.pending.iter().map(|p| self.estimate(p.class, p.flops, p.dispatches)).sum();
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Queries for the next submission, of work of this class, if it can be measured; where no budget hangs on it
    /// (`bounded`), only as often as keeps the estimates true.
    pub(super) fn begin(&mut self, class: usize, bounded: bool) -> Option<usize> {
        let timestamps = self.timestamps.as_ref()?;
        if !bounded && self.measured[class] && self.unmeasured < SELDOM {
            self.unmeasured += 1;
            return None;
        }
        self.unmeasured = 0;
        timestamps.slots.iter().position(|slot| slot.state.load(Ordering::Acquire) == FREE)
    }

    /// Where the pass of slot `slot` writes its times.
    pub(super) fn writes(&self, slot: Option<usize>) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let (timestamps, slot) = (self.timestamps.as_ref()?, slot? as u32);
        Some(wgpu::ComputePassTimestampWrites {
            query_set: &timestamps.queries,
            beginning_of_pass_write_index: Some(2 * slot),
            end_of_pass_write_index: Some(2 * slot + 1),
        })
    }

    /// Adds the commands that bring the times of `slot` back.
    pub(super) fn resolve(&self, encoder: &mut wgpu::CommandEncoder, slot: Option<usize>) {
        if let (Some(timestamps), Some(slot)) = (&self.timestamps, slot) {
            let at = slot as u64 * wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT;
            let queries = 2 * slot as u32..2 * slot as u32 + 2;
            encoder.resolve_query_set(&timestamps.queries, queries, &timestamps.resolved, at);
            encoder.copy_buffer_to_buffer(&timestamps.resolved, at, &timestamps.slots[slot].staging, 0, 16);
        }
    }

    /// Remembers a submission.
    pub(super) fn submitted(
        &mut self,
        ticket: &Ticket,
        class: usize,
        flops: u64,
        dispatches: u32,
        slot: Option<usize>,
    ) {
        if let (Some(timestamps), Some(slot)) = (&self.timestamps, slot) {
            let Slot { staging, state } = &timestamps.slots[slot];
            state.store(FLYING, Ordering::Release);
            let state = state.clone();
            staging.map_async(wgpu::MapMode::Read, 0..16, move |result| {
                state.store(if result.is_ok() { MAPPED } else { FAILED }, Ordering::Release);
            });
        }
        let submitted = Instant::now();
        self.pending.push_back(Pending { ticket: ticket.number(), class, flops, dispatches, submitted, slot });
    }

    /// Takes note of what finished; `finished` submissions have.
    pub(super) fn settle(&mut self, finished: u64) {
        let now = Instant::now();
        while let Some(first) = self.pending.front() {
            if first.ticket > finished {
                break;
            }
            let measured = first.slot.map(|slot| self.timestamps.as_ref().and_then(|t| t.take(slot)));
            let Some(pending) = self.pending.pop_front() else { break };
            let from = pending.submitted.max(self.idle_since);
            self.idle_since = now;
            let overhead = DISPATCH_SECONDS * f64::from(pending.dispatches);
            match measured {
                Some(Some(seconds)) => self.learn(&pending, (seconds - overhead).max(seconds / 4.0)),
                Some(None) => {}
                None if self.timestamps.is_none() => {
                    let most = now.duration_since(from).as_secs_f64();
                    if most < self.estimate(pending.class, pending.flops, pending.dispatches) {
                        self.learn(&pending, (most - overhead).max(most / 4.0));
                    }
                }
                None => {}
            }
        }
        // Unfinished for longer than estimated: it takes at least that long.
        if let (None, Some(first)) = (&self.timestamps, self.pending.front()) {
            let least = now.duration_since(first.submitted.max(self.idle_since)).as_secs_f64();
            if least > self.estimate(first.class, first.flops, first.dispatches) && first.flops > 0 {
                self.seconds[first.class] = least / first.flops as f64;
            }
        }
    }

    fn learn(&mut self, pending: &Pending, seconds: f64) {
        // Small pieces are dominated by what is not arithmetic.
        if pending.flops < 1_000_000 || !seconds.is_finite() {
            return;
        }
        let found = seconds / pending.flops as f64;
        let c = pending.class;
        if self.measured[c] {
            self.seconds[c] = 0.5 * self.seconds[c] + 0.5 * found;
            return;
        }
        // The guess of one class was wrong by a factor; those of the others probably are, too.
        let factor = found / self.seconds[c];
        for (seconds, measured) in self.seconds.iter_mut().zip(self.measured) {
            if !measured {
                *seconds *= factor;
            }
        }
        self.seconds[c] = found;
        self.measured[c] = true;
    }
}

impl Timestamps {
    fn new(gpu: &Gpu) -> Result<Self> {
        let bytes = SLOTS as u64 * wgpu::QUERY_RESOLVE_BUFFER_ALIGNMENT;
        let resolved = gpu.buffer("timestamps", bytes, BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC)?;
        let slots = (0..SLOTS)
            .map(|_| {
                let usage = BufferUsages::MAP_READ | BufferUsages::COPY_DST;
                Ok(Slot { staging: gpu.buffer("timestamps read back", 16, usage)?, state: Arc::default() })
            })
            .collect::<Result<_>>()?;
        let queries = gpu.scoped("timestamp queries", 0, || {
            gpu.device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("awqua pace"),
                ty: wgpu::QueryType::Timestamp,
                count: 2 * SLOTS as u32,
            })
        })?;
        Ok(Self { queries, resolved, slots, period: f64::from(gpu.queue.get_timestamp_period()) * 1e-9 })
    }

    /// Seconds between the two times of `slot`, which is free again; `None` if they did not come.
    fn take(&self, slot: usize) -> Option<f64> {
        let Slot { staging, state } = &self.slots[slot];
        let mapped = state.load(Ordering::Acquire) == MAPPED;
        let seconds = mapped.then(|| staging.get_mapped_range(0..16).ok()).flatten().and_then(|view| {
            let bytes: [u8; 16] = view[..16].try_into().ok()?;
            let (begin, end) = (u64::from_le_bytes(*bytes.first_chunk()?), u64::from_le_bytes(*bytes.last_chunk()?));
            Some(end.checked_sub(begin)? as f64 * self.period)
        });
        staging.unmap();
        state.store(FREE, Ordering::Release);
        seconds
    }
}
