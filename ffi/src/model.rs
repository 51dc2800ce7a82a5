//! Models: loading as ticks, what they are, their tokenizer and chat template.

use std::ffi::c_char;
use std::mem::offset_of;
use std::sync::Arc;
use std::time::Duration;

use runtime::session::TickBudget;
use runtime::session::chat::ChatMessage;
use runtime::{CancelToken, HeadBits, Load, LoadBudget, LoadStage, Model as RuntimeModel};

use crate::boundary::guard;
use crate::engine::{awqua_engine, fixed};
use crate::handle::{self, Handle, Object};
use crate::layout::{self, Out, Sized32, layout};
use crate::session::{awqua_session_desc, session_options};
use crate::source::{awqua_file, awqua_io, source};
use crate::status::awqua_status::{self, *};
use crate::status::{Failure, Outcome};
use crate::text::{self, awqua_str};

/// As a time or a number of bytes: as much as there is.
pub const AWQUA_NO_LIMIT: u64 = u64::MAX;

/// How much one tick may do. At least one piece of work is done, however small the budget is.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_budget {
    /// sizeof(awqua_budget).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Microseconds of the calling thread, looked at between pieces of well under a millisecond. 0 does one piece,
    /// AWQUA_NO_LIMIT all there is until the GPU has to be waited for. 2000.
    pub cpu_us: u64,
    /// Microseconds of work that the GPU may have queued when the call returns, what earlier ticks left included, as
    /// far as measurements of earlier work tell. Prompts are cut into chunks accordingly. 4000.
    pub gpu_us: u64,
    /// For a model: bytes of weights handed over. AWQUA_NO_LIMIT.
    pub load_bytes: u64,
    /// For a model: GPU kernels compiled; each may take some milliseconds that nobody can cut. 1.
    pub load_kernels: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_budget {
    const NAME: &'static str = "awqua_budget";
    const FIRST: usize = 16;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        cpu_us: 2000,
        gpu_us: 4000,
        load_bytes: AWQUA_NO_LIMIT,
        load_kernels: 1,
        reserved: 0,
    };
}

layout!(awqua_budget, 40, {
    struct_size: 0, flags: 4, cpu_us: 8, gpu_us: 16, load_bytes: 24, load_kernels: 32, reserved: 36,
});

fn micros(n: u64) -> Option<Duration> {
    (n != AWQUA_NO_LIMIT).then(|| Duration::from_micros(n))
}

impl awqua_budget {
    /// For a session.
    pub fn tick(&self) -> TickBudget {
        TickBudget { host: micros(self.cpu_us), device: micros(self.gpu_us) }
    }

    fn load(&self) -> LoadBudget {
        let bytes = Some(self.load_bytes).filter(|&bytes| bytes != AWQUA_NO_LIMIT);
        LoadBudget { host: micros(self.cpu_us), bytes, kernels: Some(self.load_kernels), on_threads: false }
    }
}

/// The bytes of `files` are copied when the model is made, instead of read where they are.
pub const AWQUA_MODEL_COPY_FILES: u32 = 1;
/// An output head that is stored in half or single precision is rounded to 8 bits while it is loaded: less memory to
/// read for every token, and less of it, for a change of the logits below one in a thousand.
pub const AWQUA_MODEL_HEAD_8: u32 = 2;
/// The same to 4 bits, which changes what some models say.
pub const AWQUA_MODEL_HEAD_4: u32 = 4;

/// Which model to load.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_model_desc {
    /// sizeof(awqua_model_desc).
    pub struct_size: u32,
    /// AWQUA_MODEL_* flags.
    pub flags: u32,
    /// Folder of the checkpoint; with `files` or `io` what messages call it.
    pub path: awqua_str,
    /// The files of the checkpoint, if they are in memory. They stay where and as they are until the model and its
    /// sessions are freed, unless AWQUA_MODEL_COPY_FILES is set.
    pub files: *const awqua_file,
    /// Number of `files`.
    pub n_files: u64,
    /// Functions that read the files, if they are neither in a folder nor in memory. Copied.
    pub io: *const awqua_io,
}

// SAFETY: repr(C), u32 first, no padding; integers and a text.
unsafe impl Sized32 for awqua_model_desc {
    const NAME: &'static str = "awqua_model_desc";
    const FIRST: usize = offset_of!(Self, files);
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        path: awqua_str::EMPTY,
        files: std::ptr::null(),
        n_files: 0,
        io: std::ptr::null(),
    };
}

layout!(awqua_model_desc, 48, { struct_size: 0, flags: 4, path: 8, files: 24, n_files: 32, io: 40 });

/// What loading is busy with.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum awqua_load_stage {
    /// Configuration, headers, tokenizer.
    AWQUA_LOAD_FILES = 0,
    /// Driver, and trials of the kernels.
    AWQUA_LOAD_DEVICE = 1,
    /// Weights on their way to the device.
    AWQUA_LOAD_WEIGHTS = 2,
    /// Kernels being compiled.
    AWQUA_LOAD_KERNELS = 3,
    /// Nothing: the model is ready.
    AWQUA_LOAD_READY = 4,
}

/// How far loading is; done / total is the share of the weights.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_load_progress {
    /// sizeof(awqua_load_progress).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Bytes of weights handed over.
    pub done: u64,
    /// Bytes of all weights; 0 before they are known.
    pub total: u64,
    /// An awqua_load_stage.
    pub stage: u32,
    /// 0.
    pub reserved: u32,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_load_progress {
    const NAME: &'static str = "awqua_load_progress";
    const FIRST: usize = 24;
    const INIT: Self =
        Self { struct_size: size_of::<Self>() as u32, flags: 0, done: 0, total: 0, stage: 0, reserved: 0 };
}

layout!(awqua_load_progress, 32, { struct_size: 0, flags: 4, done: 8, total: 16, stage: 24, reserved: 28 });

impl From<runtime::LoadProgress> for awqua_load_progress {
    fn from(progress: runtime::LoadProgress) -> Self {
        let stage = match progress.stage {
            LoadStage::Files => awqua_load_stage::AWQUA_LOAD_FILES,
            LoadStage::Device => awqua_load_stage::AWQUA_LOAD_DEVICE,
            LoadStage::Weights => awqua_load_stage::AWQUA_LOAD_WEIGHTS,
            LoadStage::Kernels => awqua_load_stage::AWQUA_LOAD_KERNELS,
            LoadStage::Ready => awqua_load_stage::AWQUA_LOAD_READY,
        };
        Self { done: progress.done, total: progress.total, stage: stage as u32, ..Self::INIT }
    }
}

/// Memory that a model and a session on it take, in bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct awqua_estimate {
    /// sizeof(awqua_estimate).
    pub struct_size: u32,
    /// 0.
    pub flags: u32,
    /// Weights in host memory: all of them on the CPU, but for dense ones that are computed with where a file is mapped.
    pub weights_host_bytes: u64,
    /// Weights in device memory.
    pub weights_device_bytes: u64,
    /// A session in host memory, at most: its KV cache and what a step needs.
    pub session_host_bytes: u64,
    /// A session in device memory, at most.
    pub session_device_bytes: u64,
}

// SAFETY: repr(C), u32 first, no padding; integers.
unsafe impl Sized32 for awqua_estimate {
    const NAME: &'static str = "awqua_estimate";
    const FIRST: usize = 40;
    const INIT: Self = Self {
        struct_size: size_of::<Self>() as u32,
        flags: 0,
        weights_host_bytes: 0,
        weights_device_bytes: 0,
        session_host_bytes: 0,
        session_device_bytes: 0,
    };
}

layout!(awqua_estimate, 40, {
    struct_size: 0, flags: 4, weights_host_bytes: 8, weights_device_bytes: 16, session_host_bytes: 24,
    session_device_bytes: 32,
});

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
    /// "cpu", "wgpu" or "cuda", NUL-terminated; "none" while the weights are away.
    pub backend: [c_char; 16],
    /// Adapter or processor, cut if it is longer.
    pub device: [c_char; 128],
    /// Tells these weights from others: of names, shapes and a part of the values of all tensors.
    pub identity: u64,
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
        identity: 0,
    };
}

layout!(awqua_model_info, 184, {
    struct_size: 0, flags: 4, vocab_size: 8, n_layers: 12, hidden_size: 16, max_context: 20, weight_bytes: 24,
    backend: 32, device: 48, identity: 176,
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
    load: Load,
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

/// Fills a budget with its defaults, as far as its `struct_size` goes, which has to be set before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_budget_init(budget: *mut awqua_budget) -> awqua_status {
    // SAFETY: the caller's promise.
    guard("awqua_budget_init", || unsafe { layout::init(budget) })
}

/// Fills a description with its defaults, as far as its `struct_size` goes, which has to be set before.
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
            check_flags(desc.flags, AWQUA_MODEL_COPY_FILES | AWQUA_MODEL_HEAD_8 | AWQUA_MODEL_HEAD_4)?;
            let head_bits = match (desc.flags & AWQUA_MODEL_HEAD_8, desc.flags & AWQUA_MODEL_HEAD_4) {
                (0, 0) => HeadBits::Sixteen,
                (_, 0) => HeadBits::Eight,
                (0, _) => HeadBits::Four,
                _ => return Err(Failure::invalid("AWQUA_MODEL_HEAD_8 and AWQUA_MODEL_HEAD_4 exclude each other")),
            };
            let load = match source(&desc)? {
                Some(source) => Load::source(&engine.inner, source),
                None => {
                    let path = desc.path.get_optional("path")?;
                    Load::path(&engine.inner, path.ok_or_else(|| Failure::invalid("`path` is empty"))?)
                }
            };
            let load = load.head_bits(head_bits);
            *out = Handle::into_c(Model { load, loaded: None }, CancelToken::default());
            Ok(AWQUA_OK)
        })
    }
}

/// Goes on loading: AWQUA_PENDING until it returns AWQUA_OK, then the model is ready. Never waits for the GPU. Once
/// awqua_model_cancel was called it returns AWQUA_ERR_CANCELLED one time and gives back what was loaded; the next tick
/// starts anew, as it does after any failure. A ready model whose weights are coming back (see awqua_model_restore and
/// awqua_engine_recover) goes on with that. `budget` may be NULL for its defaults, `progress` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_tick(
    model: *mut awqua_model,
    budget: *const awqua_budget,
    progress: *mut awqua_load_progress,
) -> awqua_status {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        handle::exclusive("awqua_model_tick", model.cast::<Handle<Model>>(), |model, cancel| {
            let budget = layout::read_or_init(budget)?;
            let out = if progress.is_null() { None } else { Some(Out::new(progress)?) };
            let ready = model.tick(cancel, &budget.load())?;
            if let Some(out) = out {
                out.write(&model.progress().into());
            }
            Ok(if ready { AWQUA_OK } else { AWQUA_PENDING })
        })
    }
}

/// Loads to the end, for tools that have nothing else to do. Cancelled as ticks are.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_run(model: *mut awqua_model) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::exclusive("awqua_model_run", model.cast::<Handle<Model>>(), |model, cancel| {
            // Short enough to notice a cancel soon.
            let budget = LoadBudget { host: Some(Duration::from_millis(20)), ..LoadBudget::default() };
            while !model.tick(cancel, &budget)? {
                match &model.loaded {
                    Some(loaded) => loaded.wait()?,
                    None => model.load.wait()?,
                }
            }
            Ok(AWQUA_OK)
        })
    }
}

impl Model {
    fn tick(&mut self, cancel: &CancelToken, budget: &LoadBudget) -> Outcome<bool> {
        if let Some(loaded) = &self.loaded {
            cancel.reset();
            return Ok(loaded.tick(budget)?);
        }
        if cancel.is_cancelled() {
            cancel.reset();
            self.load.restart();
            return Err(Failure::new(AWQUA_ERR_CANCELLED, "loading was cancelled"));
        }
        self.loaded = self.load.tick(budget)?;
        if let Some(loaded) = &self.loaded {
            let on = loaded.backend_info();
            log::info!("a model of {} bytes was loaded with {} on {}", on.weight_bytes, on.backend, on.device);
        }
        Ok(self.loaded.is_some())
    }

    fn progress(&self) -> runtime::LoadProgress {
        self.loaded.as_ref().map_or_else(|| self.load.progress(), |loaded| loaded.progress())
    }
}

/// Memory that the model and a session on it take, read from the headers of its files; also before loading. `desc` may
/// be NULL for a default session.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_estimate(
    model: *const awqua_model,
    desc: *const awqua_session_desc,
    estimate: *mut awqua_estimate,
) -> awqua_status {
    // SAFETY: the caller's promise, for all three.
    unsafe {
        handle::shared("awqua_model_estimate", awqua_model::handle(model), |model, _| {
            let (desc, out) = (layout::read_or_init(desc)?, Out::new(estimate)?);
            let found = model.load.estimate(&session_options(&desc)?)?;
            out.write(&awqua_estimate {
                weights_host_bytes: found.weights.host,
                weights_device_bytes: found.weights.device,
                session_host_bytes: found.session.host,
                session_device_bytes: found.session.device,
                ..awqua_estimate::INIT
            });
            Ok(AWQUA_OK)
        })
    }
}

/// Gives the memory of a loaded model's weights back. Its sessions keep their caches, and their ticks fail with
/// AWQUA_ERR_EVICTED, keeping the answer, until awqua_model_restore. Its files stay open.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_evict(model: *const awqua_model) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::shared("awqua_model_evict", awqua_model::handle(model), |model, _| {
            model.loaded()?.evict();
            log::info!("the weights of a model were evicted");
            Ok(AWQUA_OK)
        })
    }
}

/// Begins to bring evicted weights back from the files; the ticks of the model or of its sessions go on with it. Does
/// nothing if they are there.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_model_restore(model: *const awqua_model) -> awqua_status {
    // SAFETY: the caller's promise.
    unsafe {
        handle::shared("awqua_model_restore", awqua_model::handle(model), |model, _| {
            model.loaded()?.restore();
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
                identity: model.identity(),
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
