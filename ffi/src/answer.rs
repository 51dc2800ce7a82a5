//! What a session makes: answers and embeddings, tick by tick, and the events that tell of them.

use std::ffi::c_char;
use std::mem::offset_of;

use runtime::session::{ContextShift, Event, Phase, Tick, TickBudget};
use runtime::{GenerateOptions, Grammar, Sampling, StopReason};

use crate::boundary::guard;
use crate::handle::{self, Handle};
use crate::layout::{self, Out, Sized32, layout};
use crate::model::{awqua_budget, awqua_message, check_flags, messages, render};
use crate::session::{Session, awqua_phase, awqua_session};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome, status_of};
use crate::text::{self, awqua_str};

/// Go on after the model's end-of-turn ids.
pub const AWQUA_REQUEST_IGNORE_EOS: u32 = 1;
/// Take sampling values from the model's authors where they recommend some, instead of from the request.
pub const AWQUA_REQUEST_MODEL_SAMPLING: u32 = 2;
/// When the context is full, forget the older half of what follows the first `shift_keep` tokens, compute the rest again
/// at its new positions and go on, instead of stopping.
pub const AWQUA_REQUEST_SHIFT: u32 = 4;

/// What an answer has to look like. Only tokens that can still lead there are chosen, so an answer that comes to its end
/// has this form, and one that is cut off is the start of such an answer. End-of-turn ids count, even with
/// AWQUA_REQUEST_IGNORE_EOS. A library that was built without grammars, and a model whose tokenizer does not work token
/// by token, refuse them with AWQUA_ERR_UNSUPPORTED. The first grammar of a model takes longer to begin with.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_grammar {
    /// Anything.
    AWQUA_GRAMMAR_NONE = 0,
    /// A JSON value that fits the JSON schema in `grammar`. What of JSON Schema is not enforced is refused.
    AWQUA_GRAMMAR_JSON_SCHEMA = 1,
    /// A text that the regular expression in `grammar` matches as a whole.
    AWQUA_GRAMMAR_REGEX = 2,
    /// A text of the grammar in `grammar`, in llguidance's Lark format.
    AWQUA_GRAMMAR_LARK = 3,
}

/// What is added to the logit of a token.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_logit_bias {
    /// Token id.
    pub id: u32,
    /// Added before anything else; negative infinity bans the token.
    pub bias: f32,
}

layout!(awqua_logit_bias, 8, { id: 0, bias: 4 });

/// How to answer. Not all defaults are zero: start from AWQUA_REQUEST_INIT or awqua_request_init.
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
    /// Biases of tokens. Copied.
    pub biases: *const awqua_logit_bias,
    /// Ids that are never chosen. Copied.
    pub banned_ids: *const u32,
    /// Number of `biases`.
    pub n_biases: u32,
    /// Number of `banned_ids`.
    pub n_banned_ids: u32,
    /// For AWQUA_REQUEST_SHIFT: leading tokens that are never forgotten, such as a system prompt.
    pub shift_keep: u32,
    /// An awqua_grammar.
    pub grammar_kind: u32,
    /// The schema, expression or grammar. Copied.
    pub grammar: awqua_str,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; numbers and pointers.
unsafe impl Sized32 for awqua_request {
    const NAME: &'static str = "awqua_request";
    const FIRST: usize = offset_of!(Self, biases);
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
        biases: std::ptr::null(),
        banned_ids: std::ptr::null(),
        n_biases: 0,
        n_banned_ids: 0,
        shift_keep: 0,
        grammar_kind: 0,
        grammar: awqua_str::EMPTY,
    };
}

layout!(awqua_request, 128, {
    struct_size: 0, flags: 4, max_tokens: 8, top_k: 12, top_p: 16, min_p: 20, temperature: 24, repetition_penalty: 28,
    presence_penalty: 32, frequency_penalty: 36, penalty_window: 40, n_stops: 44, seed: 48, stops: 56, stop_ids: 64,
    n_stop_ids: 72, reserved: 76, biases: 80, banned_ids: 88, n_biases: 96, n_banned_ids: 100, shift_keep: 104,
    grammar_kind: 108, grammar: 112,
});

/// There is nothing to do until the GPU finishes something, so ticking again at once is in vain.
pub const AWQUA_TICK_WAITING: u32 = 1;

/// What a tick did.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_tick_result {
    /// sizeof(awqua_tick_result).
    pub struct_size: u32,
    /// AWQUA_TICK_WAITING, or 0.
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
    /// Estimated microseconds of work that the GPU has queued.
    pub gpu_queued_us: u64,
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
        gpu_queued_us: 0,
    };
}

layout!(awqua_tick_result, 48, {
    struct_size: 0, flags: 4, phase: 8, new_tokens: 12, prompt_done: 16, prompt_total: 20, answer_tokens: 24,
    reserved: 28, cpu_us: 32, gpu_queued_us: 40,
});

impl From<&Tick> for awqua_tick_result {
    fn from(tick: &Tick) -> Self {
        Self {
            flags: if tick.is_waiting { AWQUA_TICK_WAITING } else { 0 },
            phase: awqua_phase::from(tick.phase) as u32,
            new_tokens: tick.new_tokens as u32,
            prompt_done: tick.prompt_done as u32,
            prompt_total: tick.prompt_total as u32,
            answer_tokens: tick.answer_tokens as u32,
            cpu_us: tick.host_time.as_micros() as u64,
            gpu_queued_us: tick.device_queued.as_micros() as u64,
            ..Self::INIT
        }
    }
}

/// What an event says. Later versions may add kinds; pass over those you do not know.
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
    /// More of the prompt was computed: `done` of `total` tokens, those found in the cache included.
    AWQUA_EVENT_PROGRESS = 4,
    /// The device was lost. The answer is kept and goes on after awqua_engine_recover.
    AWQUA_EVENT_DEVICE_LOST = 5,
    /// Memory is short: something did not fit, or awqua_engine_trim was called. What could be given back was.
    AWQUA_EVENT_MEMORY_PRESSURE = 6,
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
    /// The grammar allows nothing more, or an embedding is complete.
    AWQUA_STOP_COMPLETE = 6,
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
    /// Out: prompt tokens computed.
    pub done: u32,
    /// Out: tokens of the prompt.
    pub total: u32,
}

// SAFETY: repr(C), u32 first, no padding on 64-bit targets and none that is read elsewhere; numbers and a pointer.
unsafe impl Sized32 for awqua_event {
    const NAME: &'static str = "awqua_event";
    const FIRST: usize = offset_of!(Self, done);
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
        done: 0,
        total: 0,
    };
}

layout!(awqua_event, 64, {
    struct_size: 0, flags: 4, kind: 8, reason: 12, status: 16, reserved: 20, text: 24, text_capacity: 32, text_len: 40,
    text_waiting: 48, done: 56, total: 60,
});

fn stop_reason(reason: &StopReason) -> awqua_stop_reason {
    match reason {
        StopReason::Eos(_) => awqua_stop_reason::AWQUA_STOP_EOS,
        StopReason::StopString(_) => awqua_stop_reason::AWQUA_STOP_TEXT,
        StopReason::MaxTokens => awqua_stop_reason::AWQUA_STOP_MAX_TOKENS,
        StopReason::ContextFull => awqua_stop_reason::AWQUA_STOP_CONTEXT_FULL,
        StopReason::Cancelled => awqua_stop_reason::AWQUA_STOP_CANCELLED,
        StopReason::Complete => awqua_stop_reason::AWQUA_STOP_COMPLETE,
    }
}

/// Reads a request of C; `None` is the default one.
///
/// # Safety
/// `request` must be NULL or readable for its `struct_size`, with readable arrays and texts.
unsafe fn request(pointer: *const awqua_request, model: &runtime::Model) -> Outcome<GenerateOptions> {
    // SAFETY: the caller's promise, for all of them.
    let (r, stop, stop_ids, biases, banned) = unsafe {
        let r = layout::read_or_init(pointer)?;
        let stops = text::slice(r.stops, r.n_stops.into(), "stops")?;
        let stops = stops.iter().map(|s| Ok(s.get("stops")?.to_owned())).collect::<Outcome<Vec<_>>>()?;
        let stop_ids = text::slice(r.stop_ids, r.n_stop_ids.into(), "stop_ids")?;
        let biases = text::slice(r.biases, r.n_biases.into(), "biases")?;
        (r, stops, stop_ids, biases, text::slice(r.banned_ids, r.n_banned_ids.into(), "banned_ids")?)
    };
    check_flags(r.flags, AWQUA_REQUEST_IGNORE_EOS | AWQUA_REQUEST_MODEL_SAMPLING | AWQUA_REQUEST_SHIFT)?;
    // SAFETY: the caller's promise.
    let grammar = unsafe { r.grammar.get("grammar") }?;
    let grammar = match r.grammar_kind {
        0 if grammar.is_empty() => None,
        0 => return Err(Failure::invalid("`grammar` is given, but `grammar_kind` is AWQUA_GRAMMAR_NONE")),
        1 => Some(Grammar::JsonSchema(grammar.to_owned())),
        2 => Some(Grammar::Regex(grammar.to_owned())),
        3 => Some(Grammar::Lark(grammar.to_owned())),
        other => return Err(Failure::invalid(format!("`grammar_kind` is {other}, expected an awqua_grammar"))),
    };
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
    Ok(GenerateOptions {
        max_tokens: r.max_tokens as usize,
        sampling,
        seed: r.seed,
        bias: biases.iter().map(|b| (b.id, b.bias)).collect(),
        banned: banned.to_vec(),
        ignore_eos: r.flags & AWQUA_REQUEST_IGNORE_EOS != 0,
        stop,
        stop_ids: stop_ids.to_vec(),
        grammar,
        shift: (r.flags & AWQUA_REQUEST_SHIFT != 0).then_some(ContextShift { keep: r.shift_keep as usize }),
        ..GenerateOptions::default()
    })
}

/// Fills a request with its defaults, as far as its `struct_size` goes, which has to be set before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_request_init(request: *mut awqua_request) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_request_init", || unsafe { layout::init(request) })
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
        handle::exclusive(name, session.cast::<Handle<Session>>(), |session, cancel| {
            session.require_idle()?;
            let options = self::request(request, session.inner.model())?;
            let prompt = prompt(session.inner.model())?;
            cancel.reset();
            session.inner.begin(&prompt, GenerateOptions { cancel: cancel.clone(), ..options })?;
            Ok(AWQUA_OK)
        })
    }
}

/// Works on the answer within `budget`, without waiting for the GPU: AWQUA_PENDING while there is more to do, AWQUA_OK
/// once the answer is complete, failed or was never begun. Its text and its end are polled as events; a failure of the
/// answer is an event as well, and the status of this call. AWQUA_ERR_EVICTED keeps the answer, which goes on after
/// awqua_model_restore; a lost device is AWQUA_PENDING in AWQUA_PHASE_LOST, and goes on after awqua_engine_recover.
/// `budget` may be NULL for its defaults, `result` may be NULL.
///
/// On the CPU nothing is allocated while tokens are made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_tick(
    session: *mut awqua_session,
    budget: *const awqua_budget,
    result: *mut awqua_tick_result,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::exclusive("awqua_session_tick", session.cast::<Handle<Session>>(), |session, _| {
            let budget = layout::read_or_init(budget)?;
            let out = if result.is_null() { None } else { Some(Out::new(result)?) };
            let tick = session.inner.tick(&budget.tick())?;
            if let Some(out) = out {
                out.write(&awqua_tick_result::from(&tick));
            }
            Ok(if session.inner.is_busy() { AWQUA_PENDING } else { AWQUA_OK })
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
            let mut event = |kind: awqua_event_kind| filled.kind = kind as u32;
            match session.inner.poll(buffer) {
                None => status = Ok(AWQUA_EMPTY),
                Some(Event::Text { written, waiting }) => {
                    event(awqua_event_kind::AWQUA_EVENT_TEXT);
                    filled.text_len = written as u64;
                    filled.text_waiting = waiting as u64;
                }
                Some(Event::TextTooLarge { waiting }) => {
                    event(awqua_event_kind::AWQUA_EVENT_TEXT);
                    filled.text_waiting = waiting as u64;
                    let message = "the buffer does not hold the next character";
                    status = Err(Failure::new(AWQUA_ERR_BUFFER_TOO_SMALL, message));
                }
                Some(Event::Progress { done, total }) => {
                    event(awqua_event_kind::AWQUA_EVENT_PROGRESS);
                    (filled.done, filled.total) = (done as u32, total as u32);
                }
                Some(Event::DeviceLost) => {
                    log::warn!("a session lost its device");
                    event(awqua_event_kind::AWQUA_EVENT_DEVICE_LOST);
                }
                Some(Event::MemoryPressure) => {
                    log::info!("a session was short of memory or asked to give some back");
                    event(awqua_event_kind::AWQUA_EVENT_MEMORY_PRESSURE);
                }
                Some(Event::Done(reason)) => {
                    event(awqua_event_kind::AWQUA_EVENT_DONE);
                    filled.reason = stop_reason(&reason) as u32;
                }
                Some(Event::Failed(error)) => {
                    event(awqua_event_kind::AWQUA_EVENT_ERROR);
                    filled.status = status_of(error.kind()) as i32;
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
        handle::anytime("awqua_session_cancel", awqua_session::handle(session), |cancel| {
            cancel.cancel();
            Ok(AWQUA_OK)
        })
    }
}

/// Ticks until the answer is complete, waiting for the GPU, for tools that have nothing else to do. Its text waits as
/// events. AWQUA_ERR_DEVICE_LOST if the device is lost; the answer is kept then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_run(session: *mut awqua_session) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive("awqua_session_run", session.cast::<Handle<Session>>(), |session, _| {
            loop {
                let tick = session.inner.tick(&TickBudget::UNLIMITED)?;
                if tick.phase == Phase::Lost {
                    return Err(Failure::new(AWQUA_ERR_DEVICE_LOST, "the device was lost"));
                }
                if !session.inner.is_busy() {
                    return Ok(AWQUA_OK);
                }
                if tick.is_waiting {
                    session.inner.wait()?;
                }
            }
        })
    }
}

/// Begins to embed the token ids `ids` as one vector: the mean of the last hidden states (behind the final norm) of all
/// of them. They replace what the session holds. awqua_session_tick does the work and makes an AWQUA_EVENT_DONE with
/// AWQUA_STOP_COMPLETE; then awqua_session_get_embedding has the result. Fails with AWQUA_ERR_STATE while an answer is
/// being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_begin_embedding_tokens(
    session: *mut awqua_session,
    ids: *const u32,
    count: u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        begin_embedding("awqua_session_begin_embedding_tokens", session, |_| {
            Ok(text::slice(ids, count, "ids")?.to_vec())
        })
    }
}

/// As awqua_session_begin_embedding_tokens, for a text.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_begin_embedding_text(
    session: *mut awqua_session,
    text: awqua_str,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        begin_embedding("awqua_session_begin_embedding_text", session, |model| {
            Ok(model.tokenizer()?.encode(text.get("text")?, true)?)
        })
    }
}

/// Body of the functions that begin an embedding.
///
/// # Safety
/// `session` must be NULL or valid.
unsafe fn begin_embedding(
    name: &'static str,
    session: *mut awqua_session,
    ids: impl FnOnce(&runtime::Model) -> Outcome<Vec<u32>>,
) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive(name, session.cast::<Handle<Session>>(), |session, cancel| {
            session.require_idle()?;
            let ids = ids(session.inner.model())?;
            cancel.reset();
            session.inner.begin_embedding(&ids, cancel.clone())?;
            Ok(AWQUA_OK)
        })
    }
}

/// Copies the last embedding, as many values as the model's hidden size. `count` gets their number, also when `capacity`
/// is too small. Fails with AWQUA_ERR_STATE if none was completed since something was begun.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_get_embedding(
    session: *const awqua_session,
    values: *mut f32,
    capacity: u64,
    count: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_session_get_embedding", awqua_session::handle(session), |session, _| {
            let embedding = session.inner.embedding().ok_or_else(|| Failure::state("no embedding is complete"))?;
            text::put(embedding, values, capacity, count).map(|()| AWQUA_OK)
        })
    }
}
