//! Models: loading as ticks, what they are, their tokenizer and chat template.

use std::ffi::c_char;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::sync::Arc;

use runtime::session::chat::ChatMessage;
use runtime::{CancelToken, Model as RuntimeModel};

use crate::boundary::guard;
use crate::engine::{EngineConfig, awqua_engine, fixed};
use crate::handle::{self, Handle, Object};
use crate::layout::{self, Out, Sized32, layout};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};

/// How much one tick may do.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_budget {
    /// sizeof(awqua_budget).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Microseconds of the calling thread. 0 does the smallest step there is.
    pub cpu_us: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_budget {
    const NAME: &'static str = "awqua_budget";
    const FIRST: usize = 16;
    const INIT: Self = Self { struct_size: size_of::<Self>() as u32, flags: 0, cpu_us: 2000 };
}

layout!(awqua_budget, 16, { struct_size: 0, flags: 4, cpu_us: 8 });

/// Which model to load.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_model_desc {
    /// sizeof(awqua_model_desc).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Folder of the checkpoint.
    pub path: awqua_str,
}

// SAFETY: repr(C), u32 first, no padding; integers and a text.
unsafe impl Sized32 for awqua_model_desc {
    const NAME: &'static str = "awqua_model_desc";
    const FIRST: usize = size_of::<Self>();
    const INIT: Self = Self { struct_size: size_of::<Self>() as u32, flags: 0, path: awqua_str::EMPTY };
}

layout!(awqua_model_desc, 24, { struct_size: 0, flags: 4, path: 8 });

/// How far loading is; done / total is the share.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_load_progress {
    /// sizeof(awqua_load_progress).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Parts loaded.
    pub done: u64,
    /// Parts of the model; 0 before they are known.
    pub total: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_load_progress {
    const NAME: &'static str = "awqua_load_progress";
    const FIRST: usize = 24;
    const INIT: Self = Self { struct_size: size_of::<Self>() as u32, flags: 0, done: 0, total: 0 };
}

layout!(awqua_load_progress, 24, { struct_size: 0, flags: 4, done: 8, total: 16 });

/// What a loaded model is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_model_info {
    /// sizeof(awqua_model_info).
    pub struct_size: u32,
    /// AWQUA_MODEL_* flags.
    pub flags: u32,
    /// Entries of the embedding table; token ids are below it.
    pub vocab_size: u32,
    /// Decoder layers.
    pub n_layers: u32,
    /// Width of the hidden state.
    pub hidden_size: u32,
    /// Tokens the model was trained to see at once.
    pub max_context: u32,
    /// Bytes of weights on the device.
    pub weight_bytes: u64,
    /// "cpu" or "wgpu", NUL-terminated.
    pub backend: [c_char; 16],
    /// Adapter or processor, cut if it is longer.
    pub device: [c_char; 128],
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_model_info {
    const NAME: &'static str = "awqua_model_info";
    const FIRST: usize = 176;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        vocab_size: 0,
        n_layers: 0,
        hidden_size: 0,
        max_context: 0,
        weight_bytes: 0,
        backend: [0; 16],
        device: [0; 128],
    };
}

layout!(awqua_model_info, 176, {
    struct_size: 0, flags: 4, vocab_size: 8, n_layers: 12, hidden_size: 16, max_context: 20, weight_bytes: 24,
    backend: 32, device: 48,
});

/// The model has a tokenizer.
pub const AWQUA_MODEL_TOKENIZER: u32 = 1;
/// The model has a chat template.
pub const AWQUA_MODEL_CHAT_TEMPLATE: u32 = 2;

/// One turn of a conversation.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_message {
    /// "system", "user", "assistant" or what else the model's template knows.
    pub role: awqua_str,
    /// The text.
    pub content: awqua_str,
}

layout!(awqua_message, 32, { role: 0, content: 16 });

/// Weights on a device with a tokenizer. Sessions keep what they need of it, so it may be freed first.
pub struct awqua_model {
    _opaque: [u8; 0],
}

pub struct Model {
    pub config: Arc<EngineConfig>,
    path: PathBuf,
    loaded: Option<Arc<RuntimeModel>>,
}

impl Object for Model {
    const KIND: &'static str = "awqua_model";
    const MAGIC: u32 = 0x4151_4d4f;
    type Anytime = CancelToken;
}

impl awqua_model {
    pub fn handle(model: *const Self) -> *const Handle<Model> {
        model.cast()
    }
}

impl Model {
    /// The model, if it is loaded.
    pub fn loaded(&self) -> Outcome<&Arc<RuntimeModel>> {
        self.loaded.as_ref().ok_or_else(|| Failure::state("the model is not loaded yet"))
    }
}

/// Texts of C as messages.
///
/// # Safety
/// `messages` must be readable for `count` messages with readable texts.
pub unsafe fn messages(messages: *const awqua_message, count: u64) -> Outcome<Vec<ChatMessage>> {
    // SAFETY: the caller's promise, for all three.
    let messages = unsafe { text::slice(messages, count, "messages") }?;
    messages
        .iter()
        // SAFETY: as above.
        .map(|m| unsafe { Ok(ChatMessage::new(m.role.get("role")?, m.content.get("content")?)) })
        .collect()
}

/// The rendered conversation with the opening of the answer.
pub fn render(model: &RuntimeModel, messages: &[ChatMessage], open_answer: bool) -> Outcome<String> {
    let template = model
        .chat_template()
        .ok_or_else(|| Failure::new(AWQUA_ERR_TEMPLATE, "the model has no chat template; prompt it with plain text"))?;
    Ok(template.render_messages(messages, open_answer)?)
}

/// Fills a budget with its defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_budget_init(budget: *mut awqua_budget) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_budget_init", || unsafe { layout::init(budget) })
}

/// Fills a description with its defaults.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_desc_init(desc: *mut awqua_model_desc) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_model_desc_init", || unsafe { layout::init(desc) })
}

/// Begins to load a model; nothing is opened before the first tick.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_create(
    engine: *const awqua_engine,
    desc: *const awqua_model_desc,
    model: *mut *mut awqua_model,
) -> awqua_status {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        handle::shared("awqua_model_create", awqua_engine::handle(engine), |engine, ()| {
            let (desc, out) = (layout::read(desc)?, text::out(model, "model")?);
            let path = desc.path.get_optional("path")?.ok_or_else(|| Failure::invalid("`path` is empty"))?;
            let model = Model { config: Arc::clone(&engine.config), path: path.into(), loaded: None };
            *out = Handle::into_c(model, CancelToken::default());
            Ok(AWQUA_OK)
        })
    }
}

/// Goes on loading: AWQUA_PENDING until it returns AWQUA_OK, then the model is ready. Once awqua_model_cancel was
/// called it returns AWQUA_ERR_CANCELLED one time and gives back what was loaded; the next tick starts anew, as it
/// does after any failure. `budget` may be NULL for its defaults, `progress` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_tick(
    model: *mut awqua_model,
    budget: *const awqua_budget,
    progress: *mut awqua_load_progress,
) -> awqua_status {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        handle::exclusive("awqua_model_tick", model.cast::<Handle<Model>>(), |model, cancel| {
            let _budget = layout::read_or_init(budget)?;
            let out = if progress.is_null() { None } else { Some(Out::new(progress)?) };
            let mut at = awqua_load_progress { done: 1, total: 1, ..awqua_load_progress::INIT };
            if model.loaded.is_none() {
                let result = RuntimeModel::open_with_progress(&model.path, &model.config.load, &mut |p| {
                    at = awqua_load_progress { done: p.done, total: p.total, ..at };
                    if cancel.is_cancelled() { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
                });
                cancel.reset();
                model.loaded = Some(result?);
            }
            if let Some(out) = out {
                out.write(&at);
            }
            Ok(AWQUA_OK)
        })
    }
}

/// Stops loading at the next tick. Any thread, any time.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_cancel(model: *const awqua_model) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::anytime("awqua_model_cancel", awqua_model::handle(model), |cancel| {
            cancel.cancel();
            Ok(AWQUA_OK)
        })
    }
}

/// Frees a model; NULL is fine. Its sessions live on, and its weights with them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_free(model: *mut awqua_model) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe { handle::free("awqua_model_free", model.cast::<Handle<Model>>()) }
}

/// Copies the text of the last failed call on `model`, as awqua_last_error does.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_last_error(
    model: *const awqua_model,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    let handle = awqua_model::handle(model);
    // SAFETY: the caller's promise.
    unsafe { handle::last_error("awqua_model_last_error", handle, buffer, capacity, length) }
}

/// What the loaded model is.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_get_info(model: *const awqua_model, info: *mut awqua_model_info) -> awqua_status {
    // SAFETY: the caller's promise, for both.
    unsafe {
        handle::shared("awqua_model_get_info", awqua_model::handle(model), |model, _| {
            let out = Out::new(info)?;
            let model = model.loaded()?;
            let (config, backend) = (model.config(), model.backend_info());
            let flag = |set: bool, flag: u32| if set { flag } else { 0 };
            let number = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
            out.write(&awqua_model_info {
                flags: flag(model.tokenizer().is_ok(), AWQUA_MODEL_TOKENIZER)
                    | flag(model.chat_template().is_some(), AWQUA_MODEL_CHAT_TEMPLATE),
                vocab_size: number(config.vocab_size),
                n_layers: number(config.num_hidden_layers),
                hidden_size: number(config.hidden_size),
                max_context: number(config.max_position_embeddings),
                weight_bytes: backend.weight_bytes,
                backend: fixed(backend.backend),
                device: fixed(&backend.device),
                ..awqua_model_info::INIT
            });
            Ok(AWQUA_OK)
        })
    }
}

/// Add what the tokenizer puts around a text, usually a begin-of-text id: right for plain text, wrong for a rendered
/// conversation, which already contains it.
pub const AWQUA_TOKENIZE_SPECIAL: u32 = 1;

/// Token ids of `text`. `count` gets their number, also when `capacity` is too small.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_tokenize(
    model: *const awqua_model,
    text: awqua_str,
    flags: u32,
    ids: *mut u32,
    capacity: u64,
    count: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_model_tokenize", awqua_model::handle(model), |model, _| {
            check_flags(flags, AWQUA_TOKENIZE_SPECIAL)?;
            let text = text.get("text")?;
            let found = model.loaded()?.tokenizer()?.encode(text, flags & AWQUA_TOKENIZE_SPECIAL != 0)?;
            text::put(&found, ids, capacity, count).map(|()| AWQUA_OK)
        })
    }
}

/// Leave out special tokens, such as the one that ends a turn.
pub const AWQUA_DETOKENIZE_SKIP_SPECIAL: u32 = 1;

/// Text of `ids`, NUL-terminated. `length` gets its length, also when `capacity` (which includes the NUL) is too small.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_detokenize(
    model: *const awqua_model,
    ids: *const u32,
    count: u64,
    flags: u32,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_model_detokenize", awqua_model::handle(model), |model, _| {
            check_flags(flags, AWQUA_DETOKENIZE_SKIP_SPECIAL)?;
            let ids = text::slice(ids, count, "ids")?;
            let text = model.loaded()?.tokenizer()?.decode(ids, flags & AWQUA_DETOKENIZE_SKIP_SPECIAL != 0)?;
            text::put_text(&text, buffer, capacity, length).map(|()| AWQUA_OK)
        })
    }
}

/// End with the opening of the assistant's turn.
pub const AWQUA_CHAT_OPEN_ANSWER: u32 = 1;

/// The conversation as the model's own template writes it, NUL-terminated. `length` gets its length, also when
/// `capacity` (which includes the NUL) is too small.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_render_chat(
    model: *const awqua_model,
    messages: *const awqua_message,
    count: u64,
    flags: u32,
    buffer: *mut c_char,
    capacity: u64,
    length: *mut u64,
) -> awqua_status {
    // SAFETY: the caller's promise, for all of them.
    unsafe {
        handle::shared("awqua_model_render_chat", awqua_model::handle(model), |model, _| {
            check_flags(flags, AWQUA_CHAT_OPEN_ANSWER)?;
            let messages = self::messages(messages, count)?;
            let text = render(model.loaded()?, &messages, flags & AWQUA_CHAT_OPEN_ANSWER != 0)?;
            text::put_text(&text, buffer, capacity, length).map(|()| AWQUA_OK)
        })
    }
}

/// Refuses flags that this version does not know.
pub fn check_flags(flags: u32, known: u32) -> Outcome<()> {
    match flags & !known {
        0 => Ok(()),
        unknown => Err(Failure::invalid(format!("`flags` has unknown bits: {unknown:#x}"))),
    }
}
