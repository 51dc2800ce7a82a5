//! A text as one vector: the mean of the last hidden states of its tokens.

use super::{CancelToken, Phase, Session, StopReason, TickBudget};
use crate::backend::Budget;
use crate::error::{Error, ErrorKind, Result};

use super::tick::Flow;

/// An embedding in the making.
#[derive(Debug, Default)]
pub(super) struct Embedding {
    /// Sums of the hidden states of `count` tokens, (hidden).
    sums: Vec<f64>,
    count: usize,
    /// Tokens of the text.
    pub(super) total: usize,
    /// Hidden states are on their way.
    reading: bool,
    rows: Vec<f32>,
    pub(super) cancel: CancelToken,
}

impl Embedding {
    /// Starts over, after what was computed is gone.
    pub(super) fn restart(&mut self) {
        (self.count, self.reading) = (0, false);
        self.sums.fill(0.0);
    }
}

impl Session {
    /// Begins to embed `ids`, which replace what the cache holds: the mean of the last hidden states (after the final
    /// norm) of all of them. [`Session::tick`] does the work, [`Session::embedding`] has the result.
    ///
    /// # Errors
    /// As [`Session::begin`].
    pub fn begin_embedding(&mut self, ids: &[u32], cancel: CancelToken) -> Result<()> {
        self.require_idle()?;
        self.check_ids(ids, 0)?;
        self.reset();
        self.todo.clear();
        self.todo.ids.extend_from_slice(ids);
        self.chunked = ids.len();
        self.todo.single_from = ids.len();
        self.events.restart(0);
        self.finished = None;
        self.embedded.clear();
        let sums = vec![0.0; self.model.config().hidden_size];
        self.embedding = Some(Embedding { sums, total: ids.len(), cancel, ..Embedding::default() });
        Ok(())
    }

    /// The last embedding, (hidden_size), if it is complete and nothing was begun since.
    pub fn embedding(&self) -> Option<&[f32]> {
        Some(self.embedded.as_slice()).filter(|embedding| !embedding.is_empty())
    }

    /// The embedding of `ids`, waiting for it: see [`Session::begin_embedding`].
    ///
    /// # Errors
    /// As [`Session::begin_embedding`] and [`Session::tick`].
    pub fn embed(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        self.begin_embedding(ids, CancelToken::default())?;
        loop {
            let tick = self.tick(&TickBudget::UNLIMITED)?;
            match tick.phase {
                Phase::Idle => return Ok(self.embedded.clone()),
                Phase::Lost => {
                    self.drop_answer();
                    return Err(Error::new(ErrorKind::DeviceLost, "the device was lost"));
                }
                _ => self.wait()?,
            }
        }
    }

    /// A piece of the embedding; `None` if there may be more to do at once.
    pub(super) fn embed_piece(&mut self, budget: &Budget) -> Result<Option<Flow>> {
        let (Some(embedding), Some(place)) = (&mut self.embedding, &mut self.place) else {
            return Ok(Some(Flow::Idle));
        };
        if !embedding.reading {
            let flow = self.compute(budget)?;
            if flow.is_none()
                && let (Some(embedding), Some(place)) = (&mut self.embedding, &mut self.place)
            {
                place.runner.begin_hidden()?;
                embedding.reading = true;
            }
            return Ok(flow);
        }
        embedding.rows.clear();
        if !place.runner.poll_hidden(&mut embedding.rows)? {
            return Ok(Some(Flow::Waiting));
        }
        embedding.reading = false;
        for row in embedding.rows.chunks_exact(embedding.sums.len()) {
            embedding.count += 1;
            for (sum, value) in embedding.sums.iter_mut().zip(row) {
                *sum += f64::from(*value);
            }
        }
        if self.todo.left() == 0 {
            let mean = 1.0 / embedding.count.max(1) as f64;
            self.embedded.extend(embedding.sums.iter().map(|sum| (sum * mean) as f32));
            self.finish(StopReason::Complete)?;
        }
        Ok(None)
    }
}
