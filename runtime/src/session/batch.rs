//! Sessions of one model that decode together: their next tokens go through the model in one pass, which reads the
//! weights once for all of them.

use std::borrow::BorrowMut;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::tick::{Flow, Part, Pass, Tick, TickBudget};
use super::{Session, SessionOptions, memory, no_runner};
use crate::backend::{Backend, Budget, Group, Members, OpTime, Progress, Runner, RunnerConfig};
use crate::engine::Lease;
use crate::error::{Error, ErrorKind, Result};
use crate::model::Model;

/// Ticks several sessions of one model at once.
///
/// Sessions that make tokens share passes over the weights; those that compute prompts do so one by one in between, and
/// take turns with the passes. Every session keeps its own cache, sampling, stop rules and events, is prompted, polled
/// and cancelled as ever, and may be in one tick and not in the next, or be ticked by itself in between.
///
/// A session gets the tokens that it would get by itself, as far as numbers do not depend on how many rows a matrix is
/// multiplied with: the CPU computes each row alone; GPUs round differently with the number of rows, which can tip a
/// choice between two tokens that are almost equally likely. Deterministic sessions promise more than that and are
/// therefore stepped one by one, as are those that differ from the batch's options, and all sessions on backends that
/// compute no passes (see [`Self::shares_passes`]).
pub struct Batch {
    model: Arc<Model>,
    config: RunnerConfig,
    place: Option<Place>,
    /// Whether the weights are there in this tick.
    is_here: bool,
    /// Tells this batch's passes from those of others.
    name: Arc<()>,
    /// The last pass, and the indices of its members by row while it is under way.
    pass: u64,
    rows: Vec<usize>,
    /// Where the next pass begins to take members, and who is the next to work alone.
    first: usize,
    next_alone: usize,
    /// Whether the next tick begins with a pass or with what sessions do alone.
    passes_first: bool,
    slots: Vec<Slot>,
}

/// What computes passes, and the weights it computes with.
struct Place {
    group: Option<Box<dyn Group>>,
    backend: Arc<dyn Backend>,
    #[expect(dead_code, reason = "held as long as the group")]
    lease: Option<Lease>,
}

/// A session in a tick.
struct Slot {
    /// What stopped it.
    flow: Result<Flow>,
    /// Whether it is done in this tick.
    is_over: bool,
    /// Tokens of its answer before.
    made: usize,
}

/// The runners of a pass.
struct Rows<'a, S> {
    sessions: &'a mut [S],
    rows: &'a [usize],
}

impl<S: BorrowMut<Session>> Members for Rows<'_, S> {
    fn runner(&mut self, row: usize) -> Result<&mut dyn Runner> {
        let index = self.rows.get(row).copied();
        match index.and_then(|index| self.sessions.get_mut(index)).map(|session| &mut session.borrow_mut().place) {
            Some(Some(place)) => Ok(&mut *place.runner),
            _ => Err(no_runner()),
        }
    }
}

impl std::fmt::Debug for Batch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Batch").field("most", &self.config.max_tokens).finish_non_exhaustive()
    }
}

impl Batch {
    /// A batch whose passes have room for `most` sessions made with `options`; more than that take turns. Backends may
    /// take fewer at a time.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`] if `most` is 0, else as [`Session::new`].
    pub fn new(model: &Arc<Model>, most: usize, options: &SessionOptions) -> Result<Self> {
        let most = u32::try_from(most).ok().filter(|most| *most > 0);
        let most = most.ok_or_else(|| Error::new(ErrorKind::InvalidInput, "a batch has 1 to 2^32 - 1 sessions"))?;
        let config = RunnerConfig { max_tokens: most, ..options.runner_config(model.config(), model.engine())? };
        let backend = model.backend()?.ok_or_else(|| Error::new(ErrorKind::Evicted, "the weights are on their way"))?;
        Ok(Self {
            place: Some(Place::new(model, backend, &config)?),
            model: Arc::clone(model),
            is_here: true,
            config,
            name: Arc::new(()),
            pass: 0,
            rows: Vec::new(),
            first: 0,
            next_alone: 0,
            passes_first: true,
            slots: Vec::new(),
        })
    }

    /// The model.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// Whether the backend computes passes over several sessions. Otherwise, a tick of the batch ticks them in turn.
    pub fn shares_passes(&self) -> bool {
        self.place.as_ref().is_some_and(|place| place.group.is_some())
    }

    /// Passes begun so far.
    pub fn passes(&self) -> u64 {
        self.pass
    }

    /// Bytes held for passes, besides those of the sessions.
    pub fn bytes(&self) -> u64 {
        self.place.as_ref().and_then(|place| place.group.as_ref()).map_or(0, |group| group.bytes())
    }

    /// Works within the budget, which is that of all of them, on what `sessions` were begun with; what became of each is
    /// in `ticks`, in order, as [`Session::tick`] returns it. Does not wait for the device, and does one piece at least
    /// where there is one to do. If all are waiting or idle, ticking again at once is in vain.
    ///
    /// # Errors
    /// [`ErrorKind::InvalidInput`], nothing having been done, if a session is of another model;
    /// [`ErrorKind::OutOfMemory`] or a device error if passes can not be computed after weights came back: sessions were
    /// not ticked then, and can be, one by one.
    pub fn tick<S: BorrowMut<Session>>(
        &mut self,
        sessions: &mut [S],
        budget: &TickBudget,
        ticks: &mut Vec<Result<Tick>>,
    ) -> Result<()> {
        let started = Instant::now();
        ticks.clear();
        if sessions.iter().any(|session| !Arc::ptr_eq(session.borrow().model(), &self.model)) {
            return Err(of_another_model());
        }
        let deadline = budget.host.and_then(|host| started.checked_add(host));
        let inner = Budget { deadline, device: budget.device };
        self.slots.clear();
        for session in sessions.iter_mut() {
            let session = session.borrow_mut();
            let begun = session.begin_tick();
            let made = session.made();
            // Whatever the others keep the tick busy with, what was cancelled ends in it.
            let begun = begun.and_then(|()| session.heed_cancel());
            let flow = begun.map(|ended| if ended { Flow::Idle } else { Flow::Budget });
            self.slots.push(Slot { is_over: !matches!(flow, Ok(Flow::Budget)), flow, made });
        }
        self.attach(sessions)?;
        self.find_rows(sessions);
        self.work(sessions, &inner);
        for (slot, session) in self.slots.drain(..).zip(sessions) {
            ticks.push(session.borrow_mut().end_tick(slot.flow, slot.made, started));
        }
        Ok(())
    }

    /// Blocks until the device finished something, so that a tick in which all of `sessions` were waiting can go on.
    ///
    /// # Errors
    /// A device error other than its loss, which the next tick tells.
    pub fn wait<S: BorrowMut<Session>>(&mut self, sessions: &mut [S]) -> Result<()> {
        if let Some(Place { group: Some(group), backend, .. }) = &mut self.place
            && !backend.is_lost()
            && group.queued().is_ok_and(|queued| !queued.is_zero())
        {
            return match group.wait() {
                Err(error) if error.kind() == ErrorKind::DeviceLost => Ok(()),
                waited => waited,
            };
        }
        match sessions.iter_mut().map(BorrowMut::borrow_mut).find(|session| session.is_busy()) {
            Some(session) => session.wait(),
            None => Ok(()),
        }
    }

    /// Device time of every operation of a pass that gives each of `sessions` the token `id` at the end of its cache, which
    /// stays as it is.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] where the device can not tell or there are no passes over so many or such sessions,
    /// [`ErrorKind::InvalidInput`] for a session of another model, a busy one, an id outside the vocabulary, or while a
    /// pass of others is under way, [`ErrorKind::ContextFull`], or a device error.
    pub fn profile<S: BorrowMut<Session>>(&mut self, sessions: &mut [S], id: u32) -> Result<Vec<OpTime>> {
        if sessions.iter().any(|session| !Arc::ptr_eq(session.borrow().model(), &self.model)) {
            return Err(of_another_model());
        }
        if !self.rows.is_empty() {
            return Err(Error::new(ErrorKind::InvalidInput, "a pass is under way"));
        }
        self.attach(sessions)?;
        let Some(Place { group: Some(group), .. }) = &mut self.place else {
            return Err(Error::new(ErrorKind::Unsupported, "this backend computes no passes over several sessions"));
        };
        let rows: Vec<usize> = (0..sessions.len()).collect();
        if !(group.least()..=group.most()).contains(&rows.len()) {
            let message = format!("passes are over {} to {} sessions, not {}", group.least(), group.most(), rows.len());
            return Err(Error::new(ErrorKind::Unsupported, message));
        }
        let joined = sessions.iter_mut().try_for_each(|session| session.borrow_mut().join_profile(&mut **group, id));
        let times = joined.and_then(|()| group.profile(&mut Rows { sessions, rows: &rows }));
        group.abandon();
        times
    }

    /// Has passes computed with the weights as they are now.
    fn attach<S: BorrowMut<Session>>(&mut self, sessions: &mut [S]) -> Result<()> {
        // Weights that are away, or on their way, are for the sessions to see to, one by one.
        let backend = self.model.backend();
        self.is_here = matches!(backend, Ok(Some(_)));
        let backend = match backend {
            Ok(Some(backend)) => backend,
            Ok(None) => return Ok(()),
            Err(_) => {
                self.forget_pass(sessions);
                return Ok(());
            }
        };
        if self.place.as_ref().is_some_and(|place| Arc::ptr_eq(&place.backend, &backend)) {
            return Ok(());
        }
        // Sessions begin their last step anew with other weights.
        self.forget_pass(sessions);
        self.place = None;
        self.place = Some(Place::new(&self.model, backend, &self.config)?);
        Ok(())
    }

    /// Forgets the pass under way, whose members begin anew or fail.
    fn forget_pass<S: BorrowMut<Session>>(&mut self, sessions: &mut [S]) {
        for session in sessions.iter_mut() {
            let session = session.borrow_mut();
            if session.part_of(&self.name, self.pass).is_some() {
                session.forget_pass();
            }
        }
        if let Some(Place { group: Some(group), .. }) = &mut self.place {
            group.abandon();
        }
        self.rows.clear();
    }

    /// Finds the members of the pass under way; if one is missing, the others leave it, too, and begin another.
    fn find_rows<S: BorrowMut<Session>>(&mut self, sessions: &mut [S]) {
        let missing = usize::MAX;
        self.rows.iter_mut().for_each(|index| *index = missing);
        for (index, session) in sessions.iter().enumerate() {
            if let Some(row) = session.borrow().part_of(&self.name, self.pass)
                && let Some(at) = self.rows.get_mut(row)
            {
                *at = index;
            }
        }
        if !self.rows.contains(&missing) {
            return;
        }
        if let Some(Place { group: Some(group), .. }) = &mut self.place {
            group.abandon();
        }
        for index in std::mem::take(&mut self.rows).into_iter().filter(|index| *index != missing) {
            if let Err(error) = sessions[index].borrow_mut().leave_pass() {
                self.slots[index] = Slot { flow: Err(error), is_over: true, ..self.slots[index] };
            }
        }
    }

    fn work<S: BorrowMut<Session>>(&mut self, sessions: &mut [S], budget: &Budget) {
        // Passes and prompts take turns, so that neither starves the other where a budget is short.
        let mut passes = self.passes_first;
        self.passes_first = !self.passes_first;
        loop {
            let mut goes_on = false;
            if passes && self.is_here {
                goes_on |= self.advance_pass(sessions, budget);
                if goes_on && budget.is_over() {
                    return;
                }
            }
            passes = true;
            let (decoding, _) = self.count(sessions);
            let n = sessions.len();
            let next = self.next_alone.checked_rem(n).unwrap_or(0);
            for index in (next..n).chain(0..next) {
                let session = sessions[index].borrow();
                let in_pass = self.is_here && !self.rows.is_empty() && session.part_of(&self.name, self.pass).is_some();
                let shared = decoding >= self.least() && self.part(session) != Part::Never;
                if self.slots[index].is_over || in_pass {
                    continue;
                }
                if shared && self.part(session) == Part::Ready {
                    self.slots[index].flow = Ok(Flow::Waiting);
                    continue;
                }
                let Some(mine) = share(budget, self.place.as_mut(), sessions, Some(index)) else {
                    self.slots[index].flow = Ok(Flow::Waiting);
                    continue;
                };
                let mut worked = true;
                match sessions[index].borrow_mut().piece(&mine, shared) {
                    Ok(None) => goes_on = true,
                    Ok(Some(flow)) => {
                        worked = flow == Flow::Budget;
                        self.slots[index].is_over = matches!(flow, Flow::Idle | Flow::Loading);
                        self.slots[index].flow = Ok(flow);
                    }
                    Err(error) => {
                        self.slots[index].flow = Err(error);
                        self.slots[index].is_over = true;
                    }
                }
                if worked {
                    self.next_alone = index + 1;
                    if budget.is_over() {
                        return;
                    }
                }
            }
            if !goes_on {
                return;
            }
        }
    }

    /// Fewest sessions that make tokens in passes.
    fn least(&self) -> usize {
        self.place.as_ref().and_then(|place| place.group.as_ref()).map_or(usize::MAX, |group| group.least())
    }

    /// What a session adds to passes.
    fn part(&self, session: &Session) -> Part {
        match &self.place {
            Some(Place { group: Some(group), backend, .. }) if self.is_here => session.part(&**group, backend),
            _ => Part::Never,
        }
    }

    /// How many sessions make tokens in passes, and how many of them are ready for the next one.
    fn count<S: BorrowMut<Session>>(&self, sessions: &[S]) -> (usize, usize) {
        let parts = sessions.iter().zip(&self.slots).filter(|(_, slot)| !slot.is_over);
        parts.map(|(session, _)| self.part(session.borrow())).fold((0, 0), |(decoding, ready), part| {
            (decoding + usize::from(part != Part::Never), ready + usize::from(part == Part::Ready))
        })
    }

    /// Begins a pass if all can take part, and computes or queues a piece of it; whether there may be more to do.
    fn advance_pass<S: BorrowMut<Session>>(&mut self, sessions: &mut [S], budget: &Budget) -> bool {
        if self.rows.is_empty() && !self.gather(sessions) {
            return false;
        }
        if self.rows.is_empty() {
            return true;
        }
        let Some(mine) = share(budget, self.place.as_mut(), sessions, None) else {
            self.tell(Flow::Waiting);
            return false;
        };
        let Some(Place { group: Some(group), .. }) = &mut self.place else { return false };
        match group.advance(&mut Rows { sessions, rows: &self.rows }, &mine) {
            Ok(Progress::Done) => {
                for index in self.rows.drain(..) {
                    sessions[index].borrow_mut().end_pass();
                }
                true
            }
            Ok(Progress::Working) => {
                self.tell(Flow::Budget);
                true
            }
            Ok(Progress::Waiting) => {
                self.tell(Flow::Waiting);
                false
            }
            Err(error) => {
                for &index in &self.rows {
                    let flow = Err(Error::new(error.kind(), error.message()));
                    self.slots[index] = Slot { flow, is_over: true, ..self.slots[index] };
                }
                self.forget_pass(sessions);
                true
            }
        }
    }

    /// Notes what stopped the members of the pass.
    fn tell(&mut self, flow: Flow) {
        for &index in &self.rows {
            self.slots[index].flow = Ok(flow);
        }
    }

    /// Gathers the members of the next pass; false if it has to wait for some of them, or there are too few.
    fn gather<S: BorrowMut<Session>>(&mut self, sessions: &mut [S]) -> bool {
        let (decoding, ready) = self.count(sessions);
        // A pass without those whose tokens are about to arrive would cost as much as one with them.
        if decoding < self.least() || ready < decoding {
            return false;
        }
        self.pass += 1;
        let n = sessions.len();
        let first = self.first % n;
        for index in (first..n).chain(0..first) {
            if self.slots[index].is_over || self.part(sessions[index].borrow()) != Part::Ready {
                continue;
            }
            let Some(Place { group: Some(group), .. }) = &mut self.place else { return false };
            if self.rows.len() == group.most() {
                break;
            }
            let pass = Pass { of: Arc::clone(&self.name), number: self.pass, row: self.rows.len(), is_chosen: false };
            match sessions[index].borrow_mut().join(&mut **group, pass) {
                Ok(true) => self.rows.push(index),
                // It makes a choice of its own first.
                Ok(false) => {}
                Err(error) => self.slots[index] = Slot { flow: Err(error), is_over: true, ..self.slots[index] },
            }
            self.first = index + 1;
        }
        true
    }
}

fn of_another_model() -> Error {
    Error::new(ErrorKind::InvalidInput, "a session of another model is not ticked with this batch")
}

impl Place {
    fn new(model: &Model, backend: Arc<dyn Backend>, config: &RunnerConfig) -> Result<Self> {
        let group = Arc::clone(&backend).group(model.program(), config)?;
        let lease = match &group {
            Some(group) => Some(model.engine().ledger().lease("a batch", memory(&*backend, group.bytes()))?),
            None => None,
        };
        Ok(Self { group, backend, lease })
    }
}

/// What of the budget is left for one session, or for the pass, besides what the others have queued; `None` if that is
/// nothing.
fn share<S: BorrowMut<Session>>(
    budget: &Budget,
    place: Option<&mut Place>,
    sessions: &mut [S],
    whose: Option<usize>,
) -> Option<Budget> {
    let Some(device) = budget.device else { return Some(*budget) };
    let mut others = Duration::ZERO;
    if let (Some(_), Some(Place { group: Some(group), .. })) = (whose, place) {
        others += group.queued().unwrap_or_default();
    }
    for (index, session) in sessions.iter_mut().enumerate() {
        if whose != Some(index)
            && let Some(place) = &mut session.borrow_mut().place
        {
            others += place.runner.queued().unwrap_or_default();
        }
    }
    let left = device.saturating_sub(others);
    (others.is_zero() || !left.is_zero()).then_some(Budget { device: Some(left), ..*budget })
}
