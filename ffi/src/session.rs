//! Sessions: one conversation each, answered tick by tick.

use std::ffi::c_char;

use runtime::{Sampling, SessionOptions};

use crate::boundary::guard;
use crate::driver::{Driver, Request, Shared};
use crate::events::Event;
use crate::handle::{self, Handle, Object};
use crate::layout::{self, Out, Sized32, layout};
use crate::model::{awqua_budget, awqua_message, awqua_model, check_flags, messages, render};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};

/// Element type of the KV cache.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_kv_type {
    /// What suits the device.
    AWQUA_KV_DEFAULT = 0,
    /// 2 bytes.
    AWQUA_KV_F16 = 1,
    /// 4 bytes; adds no rounding.
    AWQUA_KV_F32 = 2,
}

/// Capacities of a session, fixed when it is made; all zero behind `struct_size` is the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_session_desc {
    /// sizeof(awqua_session_desc).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Tokens the KV cache holds; 0 takes the model's length, at most 4096.
    pub context: u32,
    /// An awqua_kv_type.
    pub kv_type: u32,
    /// Most prompt tokens computed at a time; 0 takes 256. A tick takes fewer when its budget is short.
    pub chunk: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_session_desc {
    const NAME: &'static str = "awqua_session_desc";
    const FIRST: usize = 24;
    const INIT: Self =
        Self { struct_size: size_of::<Self>() as u32, flags: 0, context: 0, kv_type: 0, chunk: 0, reserved: 0 };
}

layout!(awqua_session_desc, 24, { struct_size: 0, flags: 4, context: 8, kv_type: 12, chunk: 16, reserved: 20 });

/// Go on after the model's end-of-turn ids.
pub const AWQUA_REQUEST_IGNORE_EOS: u32 = 1;
/// Take sampling values from the model's authors where they recommend some, instead of from the request.
pub const AWQUA_REQUEST_MODEL_SAMPLING: u32 = 2;

/// How to answer. Start from AWQUA_REQUEST_INIT or awqua_request_init; not all defaults are zero.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_request {
    /// sizeof(awqua_request).
    pub struct_size: u32,
    /// AWQUA_REQUEST_* flags.
    pub flags: u32,
    /// Most new tokens. 512.
    pub max_tokens: u32,
    /// Keep the k most likely tokens; 0 keeps all. 40.
    pub top_k: u32,
    /// Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all. 0.95.
    pub top_p: f32,
    /// Drop tokens less likely than this times the most likely one; 0 keeps all. 0.
    pub min_p: f32,
    /// 0 takes the most likely token; otherwise logits are divided by it. 0.7.
    pub temperature: f32,
    /// Positive logits of recent tokens are divided by it, negative ones multiplied; 1 changes nothing. 1.
    pub repetition_penalty: f32,
    /// Subtracted from the logit of every recent token. 0.
    pub presence_penalty: f32,
    /// Subtracted from a recent token's logit once per occurrence. 0.
    pub frequency_penalty: f32,
    /// How many of the last tokens count as recent. 256.
    pub penalty_window: u32,
    /// Number of `stops`.
    pub n_stops: u32,
    /// Seed of PCG-32 (XSH RR 64/32), from which one number is drawn a token. 0.
    pub seed: u64,
    /// Texts that end the answer; neither they nor anything behind them is part of it. Copied.
    pub stops: *const awqua_str,
    /// Further ids that end the answer. Copied.
    pub stop_ids: *const u32,
    /// Number of `stop_ids`.
    pub n_stop_ids: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; numbers and pointers.
unsafe impl Sized32 for awqua_request {
    const NAME: &'static str = "awqua_request";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        max_tokens: 512,
        top_k: 40,
        top_p: 0.95,
        min_p: 0.0,
        temperature: 0.7,
        repetition_penalty: 1.0,
        presence_penalty: 0.0,
        frequency_penalty: 0.0,
        penalty_window: 256,
        n_stops: 0,
        seed: 0,
        stops: std::ptr::null(),
        stop_ids: std::ptr::null(),
        n_stop_ids: 0,
        reserved: 0,
    };
}

layout!(awqua_request, 80, {
    struct_size: 0, flags: 4, max_tokens: 8, top_k: 12, top_p: 16, min_p: 20, temperature: 24, repetition_penalty: 28,
    presence_penalty: 32, frequency_penalty: 36, penalty_window: 40, n_stops: 44, seed: 48, stops: 56, stop_ids: 64,
    n_stop_ids: 72, reserved: 76,
});

/// What a session is doing.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum awqua_phase {
    /// Nothing; it waits for a prompt.
    AWQUA_PHASE_IDLE = 0,
    /// It computes the prompt.
    AWQUA_PHASE_PREFILL = 1,
    /// It makes tokens.
    AWQUA_PHASE_DECODE = 2,
}

/// What a tick did.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_tick_result {
    /// sizeof(awqua_tick_result).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// The awqua_phase behind the tick.
    pub phase: u32,
    /// New tokens this tick made.
    pub new_tokens: u32,
    /// Prompt tokens computed so far, those found in the cache included.
    pub prompt_done: u32,
    /// Tokens of the prompt.
    pub prompt_total: u32,
    /// New tokens since the prompt.
    pub answer_tokens: u32,
    /// 0.
    pub reserved: u32,
    /// Microseconds the call took.
    pub cpu_us: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_tick_result {
    const NAME: &'static str = "awqua_tick_result";
    const FIRST: usize = 40;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        phase: 0,
        new_tokens: 0,
        prompt_done: 0,
        prompt_total: 0,
        answer_tokens: 0,
        reserved: 0,
        cpu_us: 0,
    };
}

layout!(awqua_tick_result, 40, {
    struct_size: 0, flags: 4, phase: 8, new_tokens: 12, prompt_done: 16, prompt_total: 20, answer_tokens: 24,
    reserved: 28, cpu_us: 32,
});

/// What an event says.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_event_kind {
    /// No event.
    AWQUA_EVENT_NONE = 0,
    /// More text of the answer, in `text`.
    AWQUA_EVENT_TEXT = 1,
    /// The answer is complete, for `reason`.
    AWQUA_EVENT_DONE = 2,
    /// The answer failed with `status`; awqua_session_last_error has the text. The session can be prompted again.
    AWQUA_EVENT_ERROR = 3,
}

/// Why an answer is complete.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_stop_reason {
    /// It is not.
    AWQUA_STOP_NONE = 0,
    /// The model ended its turn, or made one of the request's stop ids.
    AWQUA_STOP_EOS = 1,
    /// One of the request's stop texts appeared.
    AWQUA_STOP_TEXT = 2,
    /// The request's number of tokens was made.
    AWQUA_STOP_MAX_TOKENS = 3,
    /// The context is full.
    AWQUA_STOP_CONTEXT_FULL = 4,
    /// The caller cancelled.
    AWQUA_STOP_CANCELLED = 5,
}

/// An event, and the caller's memory for its text.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_event {
    /// sizeof(awqua_event).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Out: an awqua_event_kind.
    pub kind: u32,
    /// Out: an awqua_stop_reason.
    pub reason: u32,
    /// Out: an awqua_status.
    pub status: i32,
    /// 0.
    pub reserved: u32,
    /// In: where text goes; may be NULL with a capacity of 0.
    pub text: *mut c_char,
    /// In: bytes at `text`. No NUL is written.
    pub text_capacity: u64,
    /// Out: bytes written, always whole characters. Text that does not fit comes with the next event.
    pub text_len: u64,
    /// Out: bytes of text that wait for the next event.
    pub text_waiting: u64,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; numbers and a pointer.
unsafe impl Sized32 for awqua_event {
    const NAME: &'static str = "awqua_event";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        kind: 0,
        reason: 0,
        status: 0,
        reserved: 0,
        text: std::ptr::null_mut(),
        text_capacity: 0,
        text_len: 0,
        text_waiting: 0,
    };
}

layout!(awqua_event, 56, {
    struct_size: 0, flags: 4, kind: 8, reason: 12, status: 16, reserved: 20, text: 24, text_capacity: 32, text_len: 40,
    text_waiting: 48,
});

/// What a session holds.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_session_info {
    /// sizeof(awqua_session_info).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Tokens in the KV cache.
    pub n_tokens: u32,
    /// Most tokens it holds.
    pub context: u32,
    /// An awqua_kv_type.
    pub kv_type: u32,
    /// An awqua_phase.
    pub phase: u32,
    /// Bytes held for the session on the device.
    pub bytes: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_session_info {
    const NAME: &'static str = "awqua_session_info";
    const FIRST: usize = 32;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        n_tokens: 0,
        context: 0,
        kv_type: 0,
        phase: 0,
        bytes: 0,
    };
}

layout!(awqua_session_info, 32, {
    struct_size: 0, flags: 4, n_tokens: 8, context: 12, kv_type: 16, phase: 20, bytes: 24,
});

/// One conversation with a model: its KV cache and the answer in the making.
///
/// A session makes no thread unless the engine was asked for some; everything happens inside awqua_session_tick, on
/// the thread that calls it.
pub struct awqua_session {
    _opaque: [u8; 0],
}

pub struct Session {
    driver: Driver,
}

impl Object for Session {
    const KIND: &'static str = "awqua_session";
    const MAGIC: u32 = 0x4151_5345;
    type Anytime = Shared;
}

impl awqua_session {
    fn handle(session: *const Self) -> *const Handle<Session> {
        session.cast()
    }
}

/// Reads a request of C; `None` is the default one.
///
/// # Safety
/// `request` must be NULL or readable for its `struct_size`, with readable arrays and texts.
unsafe fn request(pointer: *const awqua_request, model: &runtime::Model) -> Outcome<Request> {
    // SAFETY: the caller's promise, for all four.
    let (r, stops, stop_ids) = unsafe {
        let r = layout::read_or_init(pointer)?;
        let stops = text::slice(r.stops, r.n_stops.into(), "stops")?;
        let stops = stops.iter().map(|s| Ok(s.get("stops")?.to_owned())).collect::<Outcome<Vec<_>>>()?;
        (r, stops, text::slice(r.stop_ids, r.n_stop_ids.into(), "stop_ids")?.to_vec())
    };
    check_flags(r.flags, AWQUA_REQUEST_IGNORE_EOS | AWQUA_REQUEST_MODEL_SAMPLING)?;
    let sampling = match r.flags & AWQUA_REQUEST_MODEL_SAMPLING {
        0 => Sampling {
            temperature: r.temperature,
            top_k: r.top_k,
            top_p: r.top_p,
            min_p: r.min_p,
            repetition_penalty: r.repetition_penalty,
            presence_penalty: r.presence_penalty,
            frequency_penalty: r.frequency_penalty,
            penalty_window: r.penalty_window as usize,
        },
        _ => model.generation().sampling.clone(),
    };
    Ok(Request {
        max_tokens: r.max_tokens as usize,
        sampling,
        seed: r.seed,
        ignore_eos: r.flags & AWQUA_REQUEST_IGNORE_EOS != 0,
        stops,
        stop_ids,
    })
}

/// Fills a description with its defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_desc_init(desc: *mut awqua_session_desc) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_session_desc_init", || unsafe { layout::init(desc) })
}

/// Fills a request with its defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_request_init(request: *mut awqua_request) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_request_init", || unsafe { layout::init(request) })
}

/// Makes a session on a loaded model, with an empty cache. `desc` may be NULL for the defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_create(
    model: *const awqua_model,
    desc: *const awqua_session_desc,
    session: *mut *mut awqua_session,
) -> awqua_status {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        handle::shared("awqua_session_create", awqua_model::handle(model), |model, _| {
            let (desc, out) = (layout::read_or_init(desc)?, text::out(session, "session")?);
            check_flags(desc.flags, 0)?;
            let kv_type = match desc.kv_type {
                0 => None,
                1 => Some(runtime::backend::KvType::F16),
                2 => Some(runtime::backend::KvType::F32),
                other => return Err(Failure::invalid(format!("`kv_type` is {other}, expected an awqua_kv_type"))),
            };
            let optional = |n: u32| Some(n).filter(|&n| n > 0);
            let options = SessionOptions {
                context: optional(desc.context),
                kv_type,
                threads: Some(model.config.threads),
                chunk: optional(desc.chunk),
                exact: false,
            };
            let driver = Driver::new(model.loaded()?, &options)?;
            *out = Handle::into_c(Session { driver }, Shared::default());
            Ok(AWQUA_OK)
        })
    }
}

/// Frees a session; NULL is fine.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_free(session: *mut awqua_session) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe { handle::free("awqua_session_free", session.cast::<Handle<Session>>()) }
}

/// Copies the text of the last failed call on `session`, as awqua_last_error does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_last_error(
    session: *const awqua_session,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    let handle = awqua_session::handle(session);
    // SAFETY: the caller's promise.
    unsafe { handle::last_error("awqua_session_last_error", handle, buffer, capacity, length) }
}

/// What the session holds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_get_info(
    session: *const awqua_session,
    info: *mut awqua_session_info,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::shared("awqua_session_get_info", awqua_session::handle(session), |session, _| {
            let out = Out::new(info)?;
            let inner = session.driver.session();
            out.write(&awqua_session_info {
                n_tokens: inner.tokens().len() as u32,
                context: inner.context(),
                kv_type: match inner.kv_type() {
                    runtime::backend::KvType::F16 => awqua_kv_type::AWQUA_KV_F16 as u32,
                    runtime::backend::KvType::F32 => awqua_kv_type::AWQUA_KV_F32 as u32,
                },
                phase: session.driver.phase() as u32,
                bytes: inner.bytes(),
                ..awqua_session_info::INIT
            });
            Ok(AWQUA_OK)
        })
    }
}

/// Begins to answer the token ids `ids`, which replace what the session holds; the start they share with it is not
/// computed again. Drops events of an earlier answer. `request` may be NULL for its defaults. Fails with
/// AWQUA_ERR_STATE while an answer is being made: tick it to its end or cancel it first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_begin_tokens(
    session: *mut awqua_session,
    ids: *const u32,
    count: u64,
    request: *const awqua_request,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe { begin("awqua_session_begin_tokens", session, request, |_| Ok(text::slice(ids, count, "ids")?.to_vec())) }
}

/// As awqua_session_begin_tokens, for plain text to continue.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_begin_text(
    session: *mut awqua_session,
    prompt: awqua_str,
    request: *const awqua_request,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        begin("awqua_session_begin_text", session, request, |model| {
            Ok(model.tokenizer()?.encode(prompt.get("prompt")?, true)?)
        })
    }
}

/// As awqua_session_begin_tokens, for a conversation, which the model's own template renders.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_begin_chat(
    session: *mut awqua_session,
    messages: *const awqua_message,
    count: u64,
    request: *const awqua_request,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        begin("awqua_session_begin_chat", session, request, |model| {
            let text = render(model, &self::messages(messages, count)?, true)?;
            Ok(model.tokenizer()?.encode(&text, false)?)
        })
    }
}

/// Body of the functions that begin an answer.
///
/// # Safety
/// `session` and `request` must be NULL or valid.
unsafe fn begin(
    name: &'static str,
    session: *mut awqua_session,
    request: *const awqua_request,
    prompt: impl FnOnce(&runtime::Model) -> Outcome<Vec<u32>>,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::exclusive(name, session.cast::<Handle<Session>>(), |session, shared| {
            let model = std::sync::Arc::clone(session.driver.session().model());
            let request = self::request(request, &model)?;
            session.driver.begin(shared, prompt(&model)?, request)?;
            Ok(AWQUA_OK)
        })
    }
}

/// Works on the answer for about as long as `budget` allows: AWQUA_PENDING while there is more to do, AWQUA_OK once
/// the answer is complete, failed or was never begun. Its text and its end are polled as events; a failure of the
/// answer is an event as well, and the status of this call. `budget` may be NULL for its defaults, `result` may be
/// NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_tick(
    session: *mut awqua_session,
    budget: *const awqua_budget,
    result: *mut awqua_tick_result,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::exclusive("awqua_session_tick", session.cast::<Handle<Session>>(), |session, shared| {
            let budget = layout::read_or_init(budget)?;
            let out = if result.is_null() { None } else { Some(Out::new(result)?) };
            let report = session.driver.tick(shared, &budget)?;
            if let Some(out) = out {
                out.write(&report);
            }
            Ok(if report.phase == awqua_phase::AWQUA_PHASE_IDLE as u32 { AWQUA_OK } else { AWQUA_PENDING })
        })
    }
}

/// Takes the next event: AWQUA_OK, or AWQUA_EMPTY if there is none. Text goes to the memory that `event` names; if
/// that does not hold even one character, fails with AWQUA_ERR_BUFFER_TOO_SMALL, `text_waiting` says how much there
/// is, and nothing is lost.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_poll(session: *mut awqua_session, event: *mut awqua_event) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::exclusive("awqua_session_poll", session.cast::<Handle<Session>>(), |session, _| {
            let mut filled = layout::read(event)?;
            let out = Out::new(event)?;
            let buffer = text::slice_mut(filled.text.cast::<u8>(), filled.text_capacity, "text")?;
            filled = awqua_event { text: filled.text, text_capacity: filled.text_capacity, ..awqua_event::INIT };
            let mut status = Ok(AWQUA_OK);
            match session.driver.events().poll(buffer) {
                Event::None => status = Ok(AWQUA_EMPTY),
                Event::Text { written, waiting } => {
                    filled.kind = awqua_event_kind::AWQUA_EVENT_TEXT as u32;
                    filled.text_len = written as u64;
                    filled.text_waiting = waiting as u64;
                }
                Event::TooSmall { waiting } => {
                    filled.kind = awqua_event_kind::AWQUA_EVENT_TEXT as u32;
                    filled.text_waiting = waiting as u64;
                    let message = "the buffer does not hold the next character";
                    status = Err(Failure::new(AWQUA_ERR_BUFFER_TOO_SMALL, message));
                }
                Event::End(crate::events::End::Done(reason)) => {
                    filled.kind = awqua_event_kind::AWQUA_EVENT_DONE as u32;
                    filled.reason = reason;
                }
                Event::End(crate::events::End::Error(failed)) => {
                    filled.kind = awqua_event_kind::AWQUA_EVENT_ERROR as u32;
                    filled.status = failed as i32;
                }
            }
            out.write(&filled);
            status
        })
    }
}

/// Ends the answer at the next tick, which makes its AWQUA_EVENT_DONE with AWQUA_STOP_CANCELLED. What the session
/// computed stays in its cache. Does nothing if no answer is being made. Any thread, any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_cancel(session: *const awqua_session) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::anytime("awqua_session_cancel", awqua_session::handle(session), |shared| {
            shared.cancel();
            Ok(AWQUA_OK)
        })
    }
}

/// Ticks until the answer is complete, for tools that have nothing else to do. Its text waits as events.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_run(session: *mut awqua_session) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive("awqua_session_run", session.cast::<Handle<Session>>(), |session, shared| {
            let budget = awqua_budget { cpu_us: u64::MAX, ..awqua_budget::INIT };
            while session.driver.tick(shared, &budget)?.phase != awqua_phase::AWQUA_PHASE_IDLE as u32 {}
            Ok(AWQUA_OK)
        })
    }
}

/// Forgets all but the first `n_tokens` tokens of the cache. Fails with AWQUA_ERR_STATE while an answer is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_truncate(session: *mut awqua_session, n_tokens: u32) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive("awqua_session_truncate", session.cast::<Handle<Session>>(), |session, _| {
            session.driver.truncate(n_tokens as usize)?;
            Ok(AWQUA_OK)
        })
    }
}
