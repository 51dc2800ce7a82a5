//! How long queued work will take: bytes and operations at rates that follow what was measured.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use awqua_shaders::Cost;

use super::driver::{Event, Gpu, Stream};
use super::plan::Work;
use crate::backend::Budget;
use crate::error::Result;

/// Most kernels of a piece under a deadline, which is looked at between pieces.
const KERNELS_TIMED: usize = 32;
/// The same without one.
const KERNELS: usize = 256;
/// Seconds of a kernel that does nothing.
const LAUNCH_SECONDS: f64 = 2e-6;
/// Bytes and operations a second to begin with; the first measurement corrects them.
const BYTES_A_SECOND: f64 = 5e11;
const FLOPS_A_SECOND: f64 = 5e13;

/// Estimates of one session.
pub(super) struct Pace {
    gpu: Arc<Gpu>,
    /// By class of rows: what the estimates have to be multiplied by.
    factors: [f64; 3],
    measured: [bool; 3],
    pending: VecDeque<Pending>,
    /// Events to use again.
    free: Vec<Event>,
    /// Pieces queued and finished so far.
    queued: u64,
    finished: u64,
}

struct Pending {
    begin: Event,
    end: Event,
    class: usize,
    /// Seconds before the factor.
    seconds: f64,
}

/// Class of a step of `rows` rows: kernels for one, few and many wait for different things.
pub(super) fn class(rows: u32) -> usize {
    match rows {
        0..=1 => 0,
        2..=super::memory::FEW => 1,
        _ => 2,
    }
}

/// Seconds of one kernel before the factor.
pub(super) fn seconds(cost: &Cost) -> f64 {
    LAUNCH_SECONDS + (cost.bytes as f64 / BYTES_A_SECOND).max(cost.flops as f64 / FLOPS_A_SECOND)
}

impl Pace {
    pub(super) fn new(gpu: &Arc<Gpu>) -> Self {
        Self {
            gpu: gpu.clone(),
            factors: [1.0; 3],
            measured: [false; 3],
            pending: VecDeque::new(),
            free: Vec::new(),
            queued: 0,
            finished: 0,
        }
    }

    fn event(&mut self) -> Result<Event> {
        self.free.pop().map_or_else(|| self.gpu.event(), Ok)
    }

    /// Queues a piece of `seconds` (before the factor) by `work`, and measures it; returns its number.
    ///
    /// # Errors
    /// Those of `work`, or a device error.
    pub(super) fn piece(
        &mut self,
        stream: &Stream,
        class: usize,
        seconds: f64,
        work: impl FnOnce() -> Result<()>,
    ) -> Result<u64> {
        let (begin, end) = (self.event()?, self.event()?);
        stream.record(&begin)?;
        work()?;
        stream.record(&end)?;
        self.pending.push_back(Pending { begin, end, class, seconds });
        self.queued += 1;
        Ok(self.queued)
    }

    /// Where the piece queued last ends, unless it was seen to have ended.
    pub(super) fn latest_end(&self) -> Option<&Event> {
        self.pending.back().map(|pending| &pending.end)
    }

    /// Estimated seconds of a piece.
    pub(super) fn estimate(&self, class: usize, seconds: f64) -> f64 {
        self.factors[class] * seconds
    }

    /// Estimated seconds that may be queued now; `None` if what is queued has to end first.
    pub(super) fn room(&self, budget: &Budget) -> Option<f64> {
        let Some(device) = budget.device else { return Some(f64::INFINITY) };
        let queued = self.queued();
        match device.checked_sub(queued) {
            Some(left) if !left.is_zero() => Some(left.as_secs_f64()),
            // Every budget makes progress.
            _ if queued.is_zero() => Some(0.0),
            _ => None,
        }
    }

    /// How many of the kernels in front of `work` make a piece under `budget` of at most `most` estimated seconds, one at
    /// least if there is one, and their seconds before the factor.
    pub(super) fn cut(&self, work: &[Work], class: usize, most: f64, budget: &Budget) -> (usize, f64) {
        let kernels = if budget.deadline.is_some() { KERNELS_TIMED } else { KERNELS };
        let (mut n, mut piece) = (0, 0.0);
        for work in work.iter().take(kernels) {
            let more = piece + seconds(&work.cost);
            if n > 0 && self.estimate(class, more) > most {
                break;
            }
            (n, piece) = (n + 1, more);
        }
        (n, piece)
    }

    /// Estimated time of what is queued and not finished.
    pub(super) fn queued(&self) -> Duration {
        let seconds: f64 = self.pending.iter().map(|p| self.estimate(p.class, p.seconds)).sum();
        Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX)
    }

    /// Takes note of what finished; returns the number of the last finished piece.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn settle(&mut self) -> Result<u64> {
        while let Some(first) = self.pending.front() {
            if !first.end.is_reached()? {
                break;
            }
            let Some(done) = self.pending.pop_front() else { break };
            let found = done.begin.seconds_to(&done.end)? / done.seconds;
            if found.is_finite() && found > 0.0 {
                self.learn(done.class, found);
            }
            self.free.extend([done.begin, done.end]);
            self.finished += 1;
        }
        Ok(self.finished)
    }

    /// Waits for piece `number`.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn wait_for(&mut self, number: u64) -> Result<()> {
        if let Some(ahead) = number.checked_sub(self.finished + 1)
            && let Some(pending) = self.pending.get(ahead as usize)
        {
            pending.end.wait()?;
        }
        self.settle().map(|_| ())
    }

    /// Waits for the oldest piece that is not finished, if there is one.
    ///
    /// # Errors
    /// A device error.
    pub(super) fn wait_for_any(&mut self) -> Result<()> {
        self.wait_for(self.finished + 1)
    }

    fn learn(&mut self, class: usize, found: f64) {
        if self.measured[class] {
            self.factors[class] = 0.5 * self.factors[class] + 0.5 * found;
            return;
        }
        // The guess for one class was wrong by a factor; those for the others probably are, too.
        for (factor, measured) in self.factors.iter_mut().zip(self.measured) {
            if !measured {
                *factor = found;
            }
        }
        self.measured[class] = true;
    }
}
