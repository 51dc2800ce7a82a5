//! Sessions: one conversation each, and what they hold.

use std::ffi::{c_char, c_void};

use runtime::backend::KvType;
use runtime::session::Phase;
use runtime::{CancelToken, SessionOptions};

use crate::boundary::guard;
use crate::handle::{self, Handle, Object};
use crate::layout::{self, Out, Sized32, layout};
use crate::model::{awqua_model, check_flags};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text;

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
    /// A byte, and a half-precision scale for every 32 elements of a key or a value: about half the memory of
    /// AWQUA_KV_F16. Models whose keys have a few elements far larger than the others, such as Qwen2, lose much accuracy.
    AWQUA_KV_Q8 = 3,
}

/// The same library, adapter, session description and request give the same tokens, whatever the budgets of the ticks
/// are, whatever the session did before, and also across the loss of a device. Prompts are computed in chunks that end
/// at multiples of `chunk`, and only whole ones are used again.
pub const AWQUA_SESSION_DETERMINISTIC: u32 = 1;
/// On the CPU, multiply in single precision, with weights as their formats define them. Without it, where 4-bit weights
/// have groups of 32 or its multiples, activations are rounded to 16 bits, and a half-precision output layer of 8 MiB or
/// more beside such weights to 8, once for all sessions; both are faster. GPUs ignore it.
pub const AWQUA_SESSION_EXACT: u32 = 2;
/// Have forks keep the memory of their common start once even if the session is deterministic and the GPU, through wgpu,
/// has matrix units or subgroups: attention is then computed by kernels that read the start apart, which are slower. See
/// awqua_session_fork. The CPU and CUDA, where they share in any case, ignore it.
pub const AWQUA_SESSION_SHARE_FORKS: u32 = 4;

/// Capacities of a session, fixed when it is made; all zero behind `struct_size` is the default.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_session_desc {
    /// sizeof(awqua_session_desc).
    pub struct_size: u32,
    /// AWQUA_SESSION_* flags.
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
    /// The weights are on their way back.
    AWQUA_PHASE_LOADING = 3,
    /// The device was lost; nothing happens until awqua_engine_recover.
    AWQUA_PHASE_LOST = 4,
}

impl From<Phase> for awqua_phase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Idle => Self::AWQUA_PHASE_IDLE,
            Phase::Loading => Self::AWQUA_PHASE_LOADING,
            Phase::Prefill => Self::AWQUA_PHASE_PREFILL,
            Phase::Decode => Self::AWQUA_PHASE_DECODE,
            Phase::Lost => Self::AWQUA_PHASE_LOST,
        }
    }
}

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
    /// Bytes held for the session on the device, without those that it shares with others.
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
    pub inner: runtime::Session,
}

impl Object for Session {
    const KIND: &'static str = "awqua_session";
    const MAGIC: u32 = 0x4151_5345;
    type Anytime = CancelToken;
}

impl Session {
    /// Refuses to change what an answer in the making works on.
    pub fn require_idle(&self) -> Outcome<()> {
        match self.inner.is_busy() {
            false => Ok(()),
            true => Err(Failure::state("an answer is being made")),
        }
    }
}

impl awqua_session {
    pub fn handle(session: *const Self) -> *const Handle<Session> {
        session.cast()
    }
}

/// Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_desc_init(desc: *mut awqua_session_desc) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_session_desc_init", || unsafe { layout::init(desc) })
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
            let inner = runtime::Session::new(model.loaded()?, &session_options(&desc)?)?;
            *out = Handle::into_c(Session { inner }, CancelToken::default());
            Ok(AWQUA_OK)
        })
    }
}

/// What a description asks for.
pub fn session_options(desc: &awqua_session_desc) -> Outcome<SessionOptions> {
    let flags = AWQUA_SESSION_DETERMINISTIC | AWQUA_SESSION_EXACT | AWQUA_SESSION_SHARE_FORKS;
    check_flags(desc.flags, flags)?;
    let kv_type = match desc.kv_type {
        0 => None,
        1 => Some(KvType::F16),
        2 => Some(KvType::F32),
        3 => Some(KvType::Q8),
        other => return Err(Failure::invalid(format!("`kv_type` is {other}, expected an awqua_kv_type"))),
    };
    let optional = |n: u32| Some(n).filter(|&n| n > 0);
    Ok(SessionOptions {
        context: optional(desc.context),
        kv_type,
        threads: None,
        chunk: optional(desc.chunk),
        deterministic: desc.flags & AWQUA_SESSION_DETERMINISTIC != 0,
        exact: desc.flags & AWQUA_SESSION_EXACT != 0,
        share_forks: desc.flags & AWQUA_SESSION_SHARE_FORKS != 0,
    })
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
            let inner = &session.inner;
            out.write(&awqua_session_info {
                n_tokens: inner.tokens().len() as u32,
                context: inner.context(),
                kv_type: match inner.kv_type() {
                    KvType::F16 => awqua_kv_type::AWQUA_KV_F16 as u32,
                    KvType::F32 => awqua_kv_type::AWQUA_KV_F32 as u32,
                    KvType::Q8 => awqua_kv_type::AWQUA_KV_Q8 as u32,
                },
                phase: awqua_phase::from(inner.phase()) as u32,
                bytes: inner.bytes(),
                ..awqua_session_info::INIT
            });
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
            session.require_idle()?;
            session.inner.truncate(n_tokens as usize);
            Ok(AWQUA_OK)
        })
    }
}

/// Makes a session of the same capacities that holds what this one does, without computing it again: many characters on
/// one system prompt compute it once, and keep its memory once. On the CPU what nobody writes to is shared; on a GPU all
/// forks of a session share one copy of their start, in multiples of 64 tokens or more, beside the session they came
/// from, and one that goes back behind it gets its own. Either goes on as if the other one did not exist.
///
/// On CUDA and the CPU sums do not depend on where the start lies, so that deterministic sessions share it too. Where forks
/// copy instead, through wgpu: in deterministic sessions with matrix units or subgroups, whose kernels add up in another
/// order once the start lies apart, unless AWQUA_SESSION_SHARE_FORKS has them do without these kernels; and in
/// deterministic sessions of models with windows, whose sums begin anywhere. Fails with AWQUA_ERR_STATE while an answer is
/// being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_fork(
    session: *mut awqua_session,
    forked: *mut *mut awqua_session,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::exclusive("awqua_session_fork", session.cast::<Handle<Session>>(), |session, _| {
            let out = text::out(forked, "forked")?;
            session.require_idle()?;
            *out = Handle::into_c(Session { inner: session.inner.fork()? }, CancelToken::default());
            Ok(AWQUA_OK)
        })
    }
}

/// Copies what the session holds, tokens with their keys and values, to `buffer`; waits for the GPU. `length` gets the
/// needed bytes, also when `capacity` is too small. What is saved tells its model and has a checksum. Fails with
/// AWQUA_ERR_STATE while an answer is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_save(
    session: *mut awqua_session,
    buffer: *mut c_void,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::exclusive("awqua_session_save", session.cast::<Handle<Session>>(), |session, _| {
            session.require_idle()?;
            let (buffer, length) =
                (text::slice_mut(buffer.cast::<u8>(), capacity, "buffer")?, text::out(length, "length")?);
            let needed = session.inner.snapshot_bytes();
            *length = needed;
            let room = usize::try_from(needed).ok().and_then(|needed| buffer.get_mut(..needed));
            session.inner.save(room.ok_or_else(|| text::too_small(needed, capacity))?)?;
            Ok(AWQUA_OK)
        })
    }
}

/// Takes back what awqua_session_save gave, in this session or another one, in this run or a later one, on the same
/// model; it replaces what the session holds. Fails with AWQUA_ERR_INVALID_ARGUMENT, the session being as it was, for
/// bytes that are damaged or of another model, with AWQUA_ERR_CONTEXT_FULL if the tokens do not fit, and with
/// AWQUA_ERR_STATE while an answer is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_restore(
    session: *mut awqua_session,
    snapshot: *const c_void,
    length: u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::exclusive("awqua_session_restore", session.cast::<Handle<Session>>(), |session, _| {
            session.require_idle()?;
            session.inner.restore(text::slice(snapshot.cast::<u8>(), length, "snapshot")?)?;
            Ok(AWQUA_OK)
        })
    }
}

/// Gives the memory of an idle session back; its tokens are known, and computed again when they are needed. Fails with
/// AWQUA_ERR_STATE while an answer is being made.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_session_trim(session: *mut awqua_session) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive("awqua_session_trim", session.cast::<Handle<Session>>(), |session, _| {
            session.require_idle()?;
            session.inner.trim();
            Ok(AWQUA_OK)
        })
    }
}
