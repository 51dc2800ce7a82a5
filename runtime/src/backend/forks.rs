//! The start of a KV cache that forks of a runner share: which copy of it is there, and for how long it is that start.

use std::sync::{Arc, Weak};

use crate::error::{Error, ErrorKind, Result};

/// Positions that several runners begin with and none writes.
pub(super) trait Start {
    /// How many.
    fn len(&self) -> u32;
}

/// The copy that forks of a runner were given last, as long as it is what the runner's own first positions hold.
pub(super) struct Lent<P>(Weak<P>);

impl<P: Start> Lent<P> {
    /// None yet.
    pub(super) fn new() -> Self {
        Self(Weak::new())
    }

    /// Positions that a fork with `n` of them shares, and the copy of them if there is one already; `own` is what the runner
    /// begins with itself. Copies are made of multiples of `grain` positions.
    pub(super) fn to_share(&self, own: Option<&Arc<P>>, n: u32, grain: u32) -> (u32, Option<Arc<P>>) {
        let most = n / grain * grain;
        let there = own.cloned().into_iter().chain(self.0.upgrade());
        // Much more than what is there is worth a copy of its own.
        let there = there.filter(|start| start.len() <= n && 2 * start.len() > most).max_by_key(|start| start.len());
        (there.as_ref().map_or(most, |start| start.len()), there)
    }

    /// Remembers what a fork was given.
    pub(super) fn lend(&mut self, start: &Arc<P>) {
        self.0 = Arc::downgrade(start);
    }

    /// Forgets the copy if a step at `position` makes it another one's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where the runner shares the position itself.
    pub(super) fn overwrite(&mut self, own: Option<&Arc<P>>, position: u32) -> Result<()> {
        if own.is_some_and(|own| position < own.len()) {
            return Err(Error::new(ErrorKind::InvalidInput, format!("position {position} is shared with others")));
        }
        if self.0.upgrade().is_some_and(|lent| position < lent.len()) {
            self.0 = Weak::new();
        }
        Ok(())
    }
}
