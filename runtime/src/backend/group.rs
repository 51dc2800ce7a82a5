//! Several sessions in one pass: each adds the next token of its own, and the weights are read once for all of them.
//!
//! A pass is what [`Runner::begin`] and [`Runner::advance`] are for one session: resumable, bounded by budgets, never
//! waiting for a device. It leaves every member as if the member had made the step itself, with its logits ready, so
//! members may come from steps of their own and go back to them between any two passes.

use std::any::Any;
use std::time::Duration;

use super::{Budget, OpTime, Program, Progress, Runner, RunnerConfig};
use crate::error::{Error, ErrorKind, Result};
use crate::session::sampler::SampleRequest;

/// The token that a member's step is over.
#[derive(Debug, Clone, Copy)]
pub enum Next<'a> {
    /// One that the host knows.
    Token(u32),
    /// The one that this chooses from the logits of the member's last step, on the device; [`Runner::poll_ahead`] of the
    /// member tells it to the host.
    Chosen(&'a SampleRequest<'a>),
}

/// The runners of the members of a pass, by row.
pub trait Members {
    /// The runner that joined as number `row`, counted from 0.
    ///
    /// # Errors
    /// [`ErrorKind::Evicted`] if it has none any more.
    fn runner(&mut self, row: usize) -> Result<&mut dyn Runner>;
}

/// What computes passes over single tokens of several runners of one backend.
pub trait Group: Send {
    /// Most members of a pass.
    fn most(&self) -> usize;

    /// Fewest members of a pass that is faster than their own steps.
    fn least(&self) -> usize {
        2
    }

    /// Whether `runner` can take part: it is of this backend, with capacities that this group was made for.
    fn takes(&self, runner: &dyn Runner) -> bool;

    /// Makes `runner`, whose last step is complete, the next member of the pass that is gathered; `position` is that of
    /// the token. False, having done nothing, where the backend can not make this choice ahead of the host.
    ///
    /// # Errors
    /// [`ErrorKind::ContextFull`] if the token leaves the member's context, [`ErrorKind::InvalidInput`] if the pass has
    /// begun or is full, or for a runner that the group does not take, or a device error.
    fn join(&mut self, runner: &mut dyn Runner, next: &Next<'_>, position: u32) -> Result<bool>;

    /// Computes or queues a piece of the pass over those that joined; [`Progress::Done`] once it is complete on the
    /// host's side, and others may join.
    ///
    /// # Errors
    /// As [`Runner::advance`]; [`Self::abandon`] has to follow.
    fn advance(&mut self, members: &mut dyn Members, budget: &Budget) -> Result<Progress>;

    /// Device time of every operation of a pass over those that joined, which neither moves the members on nor leaves
    /// logits with them; [`Self::abandon`] has to follow.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device can not tell, or a device error.
    fn profile(&mut self, members: &mut dyn Members) -> Result<Vec<OpTime>> {
        let _ = members;
        Err(Error::new(ErrorKind::Unsupported, "the operations of a pass are not timed on this backend"))
    }

    /// Forgets the pass, as far as it is not queued, and who joined. Positions of the members' caches from their tokens
    /// on are undefined; choices are taken back by [`Runner::retract_ahead`].
    fn abandon(&mut self);

    /// Blocks until the device finished something of the group's; at once if nothing is queued.
    ///
    /// # Errors
    /// A device error.
    fn wait(&mut self) -> Result<()>;

    /// Estimated device time of what is queued and not finished by now.
    ///
    /// # Errors
    /// A device error.
    fn queued(&mut self) -> Result<Duration>;

    /// Bytes held for the group.
    fn bytes(&self) -> u64;
}

/// `runner` as the backend's own type.
///
/// # Errors
/// [`ErrorKind::InvalidInput`] if it is of another backend.
pub(super) fn own<R: Runner>(runner: &mut dyn Runner) -> Result<&mut R> {
    let other = || Error::new(ErrorKind::InvalidInput, "a session of another backend can not take part in this pass");
    (runner as &mut dyn Any).downcast_mut().ok_or_else(other)
}

/// Checks what a member of capacities `config` joins with.
///
/// # Errors
/// As [`Group::join`].
pub(super) fn check_next(next: &Next<'_>, position: u32, program: &Program, config: &RunnerConfig) -> Result<()> {
    if position >= config.context {
        let message = format!("position {position} leaves the context of {}", config.context);
        return Err(Error::new(ErrorKind::ContextFull, message));
    }
    match *next {
        Next::Token(token) if token >= program.vocab_size => {
            let message = format!("token id {token} is not below the vocabulary size {}", program.vocab_size);
            Err(Error::new(ErrorKind::InvalidInput, message))
        }
        _ => Ok(()),
    }
}
