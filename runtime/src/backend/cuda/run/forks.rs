//! Forks of a session: the start that they share, and copies of the rest.

use std::sync::Arc;

use super::super::cache::{Form, GRAIN, Prefix};
use super::super::driver::{OtherRows, Rows};
use super::super::mark;
use super::CudaRunner;
use crate::backend::Sharing;
use crate::error::Result;

impl CudaRunner {
    /// How the rows of its cache lie.
    pub(super) fn form(&self) -> Form {
        Form::new(&self.program, self.memory.kv_type)
    }

    /// Positions that a fork with `n` of them shares, and the copy of them if there is one already.
    pub(super) fn to_share(&self, n: u32, sharing: Sharing) -> (u32, Option<Arc<Prefix>>) {
        // Sums are the same either way, so that what has to be exact shares as well.
        if sharing == Sharing::Never {
            return (0, None);
        }
        self.lent.to_share(self.memory.prefix.as_ref(), n, GRAIN)
    }

    /// A copy of the first `len` positions, which is there once the stream has come there.
    fn copy_prefix(&self, len: u32) -> Result<Prefix> {
        let prefix = Prefix::new(&self.backend.gpu, &self.program, self.memory.kv_type, len)?;
        self.memory.parts().try_for_each(|part| self.form().copy(&self.stream, &part, &prefix.part(), len))?;
        Ok(prefix)
    }

    /// Forgets the copy that forks share if a step at `position` makes it another one's.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] where this session shares the position itself.
    pub(in super::super) fn overwrite(&mut self, position: u32) -> Result<()> {
        self.lent.overwrite(self.memory.prefix.as_ref(), position)
    }

    /// As [`crate::backend::Runner::fork`], without waiting.
    ///
    /// # Errors
    /// [`ErrorKind::OutOfMemory`] or a device error.
    pub(super) fn forked(&mut self, n: u32, sharing: Sharing) -> Result<Self> {
        let prefix = match self.to_share(n, sharing) {
            (_, Some(prefix)) => Some(prefix),
            (0, None) => None,
            (len, None) => Some(Arc::new(self.copy_prefix(len)?)),
        };
        if let Some(prefix) = &prefix {
            self.lent.lend(prefix);
        }
        let fork = Self::behind(Arc::clone(&self.backend), &self.program, &self.config, prefix)?;
        // Its memory is cleared, then written here, then read there.
        self.stream.follow(&mark(&self.backend.gpu, &fork.stream)?)?;
        let own = fork.memory.own();
        self.memory.parts().try_for_each(|part| self.form().copy(&self.stream, &part, &own, n))?;
        let (from, to) = (self.memory.buffer(self.memory.ropes), fork.memory.buffer(fork.memory.ropes));
        let bytes = from.bytes() as usize;
        let whole = Rows { offset: 0, width: bytes, rows: 1, pitch: bytes, other_offset: 0, other_pitch: bytes };
        self.stream.copy_rows(from, whole, OtherRows::Device(to))?;
        fork.stream.follow(&mark(&self.backend.gpu, &self.stream)?)?;
        Ok(fork)
    }
}
