//! Batches: several sessions of a model in one tick, whose tokens share passes over the weights.

use std::borrow::{Borrow, BorrowMut};
use std::ffi::c_char;

use runtime::session::{Phase, Tick, TickBudget};

use crate::answer::awqua_tick_result;
use crate::handle::{self, Entered, Handle, Object};
use crate::layout::{self, Out};
use crate::model::{awqua_budget, awqua_model};
use crate::session::{Session, awqua_session, awqua_session_desc, session_options};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text;

/// Most sessions of one pass: what is more is a mistake rather than a wish.
const MOST_SESSIONS: u32 = 4096;

/// Sessions of one model that decode together: their next tokens go through the model in one pass, which reads the
/// weights once for all of them, so that eight characters take little longer than one.
///
/// A batch has no members: every tick names the sessions it works on, which are prompted, polled, cancelled, ticked by
/// themselves and freed as ever between ticks. It keeps memory for its passes, and its model's.
///
/// Each session gets the tokens that it would get by itself, as far as numbers do not depend on how many are computed at
/// once: the CPU computes each by itself; GPUs round differently, which can tip a choice between two tokens that are
/// almost equally likely. Sessions with AWQUA_SESSION_DETERMINISTIC promise more and are stepped one by one, as are those
/// whose description differs from the batch's, and all sessions where passes are not shared: see awqua_batch_shares.
pub struct awqua_batch {
    _opaque: [u8; 0],
}

pub struct Batch {
    inner: runtime::Batch,
    /// Memory of a call, so that ticks allocate nothing; empty between calls, but for what became of the last tick.
    ticks: Vec<runtime::Result<Tick>>,
    sessions: Vec<Entered<'static, Session>>,
    outs: Vec<Out<awqua_tick_result>>,
}

impl Object for Batch {
    const KIND: &'static str = "awqua_batch";
    const MAGIC: u32 = 0x4151_4241;
    type Anytime = ();
}

impl awqua_batch {
    pub fn handle(batch: *const Self) -> *const Handle<Batch> {
        batch.cast()
    }
}

impl Borrow<runtime::Session> for Entered<'_, Session> {
    fn borrow(&self) -> &runtime::Session {
        &self.get().inner
    }
}

impl BorrowMut<runtime::Session> for Entered<'_, Session> {
    fn borrow_mut(&mut self) -> &mut runtime::Session {
        &mut self.get_mut().inner
    }
}

/// The sessions of a call, which it has for itself until this is dropped.
struct Inside<'a>(&'a mut Vec<Entered<'static, Session>>);

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        self.0.clear();
    }
}

impl<'a> Inside<'a> {
    /// Enters them, with `memory` to note them in.
    ///
    /// # Safety
    /// `sessions` must be NULL or readable for `count` pointers to sessions that are not freed before the result is
    /// dropped.
    unsafe fn new(
        memory: &'a mut Vec<Entered<'static, Session>>,
        sessions: *const *mut awqua_session,
        count: u32,
    ) -> Outcome<Self> {
        // SAFETY: the caller's promise.
        let pointers = unsafe { text::slice(sessions, count.into(), "sessions") }?;
        let inside = Self(memory);
        for session in pointers {
            // SAFETY: the caller's promise, as `Drop` lets go of them; one that is named twice is refused as busy.
            inside.0.push(unsafe { Entered::new(session.cast::<Handle<Session>>()) }?);
        }
        Ok(inside)
    }
}

/// Makes a batch for sessions of `model` that are made with `desc`, which may be NULL for the defaults, with room for
/// passes over `n_sessions` of them, 1 to 4096; more than that take turns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_create(
    model: *const awqua_model,
    desc: *const awqua_session_desc,
    n_sessions: u32,
    batch: *mut *mut awqua_batch,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_batch_create", awqua_model::handle(model), |model, _| {
            let (desc, out) = (layout::read_or_init(desc)?, text::out(batch, "batch")?);
            let options = session_options(&desc)?;
            if !(1..=MOST_SESSIONS).contains(&n_sessions) {
                return Err(Failure::invalid(format!("`n_sessions` is {n_sessions}, expected 1 to {MOST_SESSIONS}")));
            }
            let inner = runtime::Batch::new(model.loaded()?, n_sessions as usize, &options)?;
            *out = Handle::into_c(Batch { inner, ticks: Vec::new(), sessions: Vec::new(), outs: Vec::new() }, ());
            Ok(AWQUA_OK)
        })
    }
}

/// Frees a batch; NULL is fine. Its sessions go on by themselves, or in another batch.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_free(batch: *mut awqua_batch) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe { handle::free("awqua_batch_free", batch.cast::<Handle<Batch>>()) }
}

/// Copies the text of the last failed call on `batch`, as awqua_last_error does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_last_error(
    batch: *const awqua_batch,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe { handle::last_error("awqua_batch_last_error", awqua_batch::handle(batch), buffer, capacity, length) }
}

/// Whether passes are shared on this device, 1 or 0; where not, a tick works on the sessions in turn.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_shares(batch: *const awqua_batch, shares: *mut u32) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::shared("awqua_batch_shares", awqua_batch::handle(batch), |batch, _| {
            *text::out(shares, "shares")? = u32::from(batch.inner.shares_passes());
            Ok(AWQUA_OK)
        })
    }
}

/// Works on the answers of `count` sessions, whose pointers are in `sessions`, as awqua_session_tick does for one;
/// `budget` is that of all of them. AWQUA_PENDING while one of them has more to do, else AWQUA_OK. A failure of an
/// answer is an event of its session; the others go on. AWQUA_ERR_EVICTED keeps all answers.
///
/// `results` may be NULL, or has room for `count` structures, one for each session, with `struct_size` set in all.
/// `cpu_us` is the time of the whole call in each.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_tick(
    batch: *mut awqua_batch,
    sessions: *const *mut awqua_session,
    count: u32,
    budget: *const awqua_budget,
    results: *mut awqua_tick_result,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::exclusive("awqua_batch_tick", batch.cast::<Handle<Batch>>(), |batch, ()| {
            let budget = layout::read_or_init(budget)?;
            let Batch { inner, ticks, sessions: memory, outs } = batch;
            let inside = Inside::new(memory, sessions, count)?;
            let sessions = &mut *inside.0;
            outs.clear();
            if !results.is_null() {
                results_of(results, count, outs)?;
            }
            inner.tick(sessions, &budget.tick(), ticks)?;
            for (session, tick) in sessions.iter().zip(&*ticks) {
                if let Err(error) = tick {
                    session.remember(error.to_string());
                }
            }
            let evicted = |tick: &runtime::Result<Tick>| {
                tick.as_ref().err().filter(|error| error.kind() == runtime::ErrorKind::Evicted).map(|e| e.to_string())
            };
            if let Some(message) = ticks.iter().find_map(evicted) {
                return Err(Failure::new(AWQUA_ERR_EVICTED, message));
            }
            for (out, tick) in outs.iter().zip(&*ticks) {
                out.write(&tick.as_ref().map_or(layout::Sized32::INIT, awqua_tick_result::from));
            }
            let busy = sessions.iter().any(|session| session.get().inner.is_busy());
            Ok(if busy { AWQUA_PENDING } else { AWQUA_OK })
        })
    }
}

/// Adds the structures of an array to `outs`, as far apart as the caller's version of them is large.
///
/// # Safety
/// `results` must be writable for `count` structures, each as large as it says, one behind the other.
unsafe fn results_of(
    results: *mut awqua_tick_result,
    count: u32,
    outs: &mut Vec<Out<awqua_tick_result>>,
) -> Outcome<()> {
    let mut at = results.cast::<u8>();
    for _ in 0..count {
        // SAFETY: the caller's promise; nothing is read or written behind the last one.
        let out = unsafe { Out::new(at.cast::<awqua_tick_result>()) }?;
        at = at.wrapping_add(out.size());
        outs.push(out);
    }
    Ok(())
}

/// Ticks until all answers are complete, waiting for the GPU, for tools that have nothing else to do. Their text waits as
/// events. AWQUA_ERR_DEVICE_LOST if the device is lost; the answers are kept then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_batch_run(
    batch: *mut awqua_batch,
    sessions: *const *mut awqua_session,
    count: u32,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::exclusive("awqua_batch_run", batch.cast::<Handle<Batch>>(), |batch, ()| {
            let Batch { inner, ticks, sessions: memory, .. } = batch;
            let inside = Inside::new(memory, sessions, count)?;
            let sessions = &mut *inside.0;
            loop {
                inner.tick(sessions, &TickBudget::UNLIMITED, ticks)?;
                let mut waiting = true;
                for (session, tick) in sessions.iter().zip(&mut *ticks) {
                    match tick {
                        Ok(tick) if tick.phase == Phase::Lost => {
                            return Err(Failure::new(AWQUA_ERR_DEVICE_LOST, "the device was lost"));
                        }
                        Ok(tick) => waiting &= tick.is_waiting || tick.phase == Phase::Idle,
                        Err(error) => {
                            session.remember(error.to_string());
                            if error.kind() == runtime::ErrorKind::Evicted {
                                return Err(Failure::new(AWQUA_ERR_EVICTED, error.to_string()));
                            }
                        }
                    }
                }
                if !sessions.iter().any(|session| session.get().inner.is_busy()) {
                    return Ok(AWQUA_OK);
                }
                if waiting {
                    inner.wait(sessions)?;
                }
            }
        })
    }
}
