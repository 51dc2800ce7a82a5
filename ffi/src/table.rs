//! GENERATED from the exported functions by `AWQUA_BLESS=1 cargo test -p awqua-tests --test header`.
//! New functions are appended; the order never changes.

use crate::alloc::*;
use crate::answer::*;
use crate::api::*;
use crate::batch::*;
use crate::engine::*;
use crate::log::*;
use crate::model::*;
use crate::session::*;
use crate::status::awqua_status;
use crate::text::awqua_str;
use crate::version::{AWQUA_ABI_MAJOR, AWQUA_ABI_MINOR};
use crate::vulkan::awqua_vulkan;
use std::ffi::{c_char, c_void};

/// Every function of this header, for programs that load the library at run time; see awqua_get_api. Members are
/// only ever appended.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct awqua_api {
    /// sizeof(awqua_api) of the library.
    pub struct_size: u32,
    /// awqua_abi_version of the library.
    pub abi: u32,
    /// awqua_abi_version
    pub abi_version: unsafe extern "C" fn() -> u32,
    /// awqua_version
    pub version: unsafe extern "C" fn() -> *const c_char,
    /// awqua_status_name
    pub status_name: unsafe extern "C" fn(status: i32) -> *const c_char,
    /// awqua_last_error
    pub last_error: unsafe extern "C" fn(buffer: *mut c_char, capacity: u64, length: *mut u64) -> awqua_status,
    /// awqua_get_api
    pub get_api: unsafe extern "C" fn(abi_version: u32, table_size: u32, api: *mut *const awqua_api) -> awqua_status,
    /// awqua_set_allocator
    pub set_allocator: unsafe extern "C" fn(allocator: *const awqua_allocator) -> awqua_status,
    /// awqua_memory
    pub memory: unsafe extern "C" fn(stats: *mut awqua_memory_stats) -> awqua_status,
    /// awqua_set_log
    pub set_log: unsafe extern "C" fn(callback: awqua_log_fn, user: *mut c_void, level: u32) -> awqua_status,
    /// awqua_engine_desc_init
    pub engine_desc_init: unsafe extern "C" fn(desc: *mut awqua_engine_desc) -> awqua_status,
    /// awqua_engine_free
    pub engine_free: unsafe extern "C" fn(engine: *mut awqua_engine) -> awqua_status,
    /// awqua_engine_last_error
    pub engine_last_error: unsafe extern "C" fn(
        engine: *const awqua_engine,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_device_count
    pub device_count: unsafe extern "C" fn(count: *mut u32) -> awqua_status,
    /// awqua_device_get
    pub device_get: unsafe extern "C" fn(index: u32, info: *mut awqua_device_info) -> awqua_status,
    /// awqua_budget_init
    pub budget_init: unsafe extern "C" fn(budget: *mut awqua_budget) -> awqua_status,
    /// awqua_model_desc_init
    pub model_desc_init: unsafe extern "C" fn(desc: *mut awqua_model_desc) -> awqua_status,
    /// awqua_model_create
    pub model_create: unsafe extern "C" fn(
        engine: *const awqua_engine,
        desc: *const awqua_model_desc,
        model: *mut *mut awqua_model,
    ) -> awqua_status,
    /// awqua_model_tick
    pub model_tick: unsafe extern "C" fn(
        model: *mut awqua_model,
        budget: *const awqua_budget,
        progress: *mut awqua_load_progress,
    ) -> awqua_status,
    /// awqua_model_cancel
    pub model_cancel: unsafe extern "C" fn(model: *const awqua_model) -> awqua_status,
    /// awqua_model_free
    pub model_free: unsafe extern "C" fn(model: *mut awqua_model) -> awqua_status,
    /// awqua_model_last_error
    pub model_last_error: unsafe extern "C" fn(
        model: *const awqua_model,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_model_get_info
    pub model_get_info: unsafe extern "C" fn(model: *const awqua_model, info: *mut awqua_model_info) -> awqua_status,
    /// awqua_model_tokenize
    pub model_tokenize: unsafe extern "C" fn(
        model: *const awqua_model,
        text: awqua_str,
        flags: u32,
        ids: *mut u32,
        capacity: u64,
        count: *mut u64,
    ) -> awqua_status,
    /// awqua_model_detokenize
    pub model_detokenize: unsafe extern "C" fn(
        model: *const awqua_model,
        ids: *const u32,
        count: u64,
        flags: u32,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_model_render_chat
    pub model_render_chat: unsafe extern "C" fn(
        model: *const awqua_model,
        messages: *const awqua_message,
        count: u64,
        flags: u32,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_session_desc_init
    pub session_desc_init: unsafe extern "C" fn(desc: *mut awqua_session_desc) -> awqua_status,
    /// awqua_request_init
    pub request_init: unsafe extern "C" fn(request: *mut awqua_request) -> awqua_status,
    /// awqua_session_create
    pub session_create: unsafe extern "C" fn(
        model: *const awqua_model,
        desc: *const awqua_session_desc,
        session: *mut *mut awqua_session,
    ) -> awqua_status,
    /// awqua_session_free
    pub session_free: unsafe extern "C" fn(session: *mut awqua_session) -> awqua_status,
    /// awqua_session_last_error
    pub session_last_error: unsafe extern "C" fn(
        session: *const awqua_session,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_session_begin_tokens
    pub session_begin_tokens: unsafe extern "C" fn(
        session: *mut awqua_session,
        ids: *const u32,
        count: u64,
        request: *const awqua_request,
    ) -> awqua_status,
    /// awqua_session_begin_text
    pub session_begin_text: unsafe extern "C" fn(
        session: *mut awqua_session,
        prompt: awqua_str,
        request: *const awqua_request,
    ) -> awqua_status,
    /// awqua_session_begin_chat
    pub session_begin_chat: unsafe extern "C" fn(
        session: *mut awqua_session,
        messages: *const awqua_message,
        count: u64,
        request: *const awqua_request,
    ) -> awqua_status,
    /// awqua_session_tick
    pub session_tick: unsafe extern "C" fn(
        session: *mut awqua_session,
        budget: *const awqua_budget,
        result: *mut awqua_tick_result,
    ) -> awqua_status,
    /// awqua_session_poll
    pub session_poll: unsafe extern "C" fn(session: *mut awqua_session, event: *mut awqua_event) -> awqua_status,
    /// awqua_session_cancel
    pub session_cancel: unsafe extern "C" fn(session: *const awqua_session) -> awqua_status,
    /// awqua_session_run
    pub session_run: unsafe extern "C" fn(session: *mut awqua_session) -> awqua_status,
    /// awqua_session_truncate
    pub session_truncate: unsafe extern "C" fn(session: *mut awqua_session, n_tokens: u32) -> awqua_status,
    /// awqua_engine_recover
    pub engine_recover: unsafe extern "C" fn(engine: *const awqua_engine) -> awqua_status,
    /// awqua_engine_debug_lose_device
    pub engine_debug_lose_device: unsafe extern "C" fn(engine: *const awqua_engine) -> awqua_status,
    /// awqua_engine_trim
    pub engine_trim: unsafe extern "C" fn(engine: *const awqua_engine, level: u32) -> awqua_status,
    /// awqua_engine_get_pipeline_cache
    pub engine_get_pipeline_cache: unsafe extern "C" fn(
        engine: *const awqua_engine,
        buffer: *mut c_void,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_model_run
    pub model_run: unsafe extern "C" fn(model: *mut awqua_model) -> awqua_status,
    /// awqua_model_estimate
    pub model_estimate: unsafe extern "C" fn(
        model: *const awqua_model,
        desc: *const awqua_session_desc,
        estimate: *mut awqua_estimate,
    ) -> awqua_status,
    /// awqua_model_evict
    pub model_evict: unsafe extern "C" fn(model: *const awqua_model) -> awqua_status,
    /// awqua_model_restore
    pub model_restore: unsafe extern "C" fn(model: *const awqua_model) -> awqua_status,
    /// awqua_session_save
    pub session_save: unsafe extern "C" fn(
        session: *mut awqua_session,
        buffer: *mut c_void,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_session_trim
    pub session_trim: unsafe extern "C" fn(session: *mut awqua_session) -> awqua_status,
    /// awqua_session_get_embedding
    pub session_get_embedding: unsafe extern "C" fn(
        session: *const awqua_session,
        values: *mut f32,
        capacity: u64,
        count: *mut u64,
    ) -> awqua_status,
    /// awqua_engine_create
    pub engine_create:
        unsafe extern "C" fn(desc: *const awqua_engine_desc, engine: *mut *mut awqua_engine) -> awqua_status,
    /// awqua_engine_get_info
    pub engine_get_info:
        unsafe extern "C" fn(engine: *const awqua_engine, info: *mut awqua_engine_info) -> awqua_status,
    /// awqua_engine_recover_vulkan
    pub engine_recover_vulkan:
        unsafe extern "C" fn(engine: *const awqua_engine, vulkan: *const awqua_vulkan) -> awqua_status,
    /// awqua_session_get_info
    pub session_get_info:
        unsafe extern "C" fn(session: *const awqua_session, info: *mut awqua_session_info) -> awqua_status,
    /// awqua_session_fork
    pub session_fork:
        unsafe extern "C" fn(session: *mut awqua_session, forked: *mut *mut awqua_session) -> awqua_status,
    /// awqua_session_restore
    pub session_restore:
        unsafe extern "C" fn(session: *mut awqua_session, snapshot: *const c_void, length: u64) -> awqua_status,
    /// awqua_session_begin_embedding_tokens
    pub session_begin_embedding_tokens:
        unsafe extern "C" fn(session: *mut awqua_session, ids: *const u32, count: u64) -> awqua_status,
    /// awqua_session_begin_embedding_text
    pub session_begin_embedding_text:
        unsafe extern "C" fn(session: *mut awqua_session, text: awqua_str) -> awqua_status,
    /// awqua_batch_create
    pub batch_create: unsafe extern "C" fn(
        model: *const awqua_model,
        desc: *const awqua_session_desc,
        n_sessions: u32,
        batch: *mut *mut awqua_batch,
    ) -> awqua_status,
    /// awqua_batch_free
    pub batch_free: unsafe extern "C" fn(batch: *mut awqua_batch) -> awqua_status,
    /// awqua_batch_last_error
    pub batch_last_error: unsafe extern "C" fn(
        batch: *const awqua_batch,
        buffer: *mut c_char,
        capacity: u64,
        length: *mut u64,
    ) -> awqua_status,
    /// awqua_batch_shares
    pub batch_shares: unsafe extern "C" fn(batch: *const awqua_batch, shares: *mut u32) -> awqua_status,
    /// awqua_batch_tick
    pub batch_tick: unsafe extern "C" fn(
        batch: *mut awqua_batch,
        sessions: *const *mut awqua_session,
        count: u32,
        budget: *const awqua_budget,
        results: *mut awqua_tick_result,
    ) -> awqua_status,
    /// awqua_batch_run
    pub batch_run:
        unsafe extern "C" fn(batch: *mut awqua_batch, sessions: *const *mut awqua_session, count: u32) -> awqua_status,
}

/// The table.
pub static API: awqua_api = awqua_api {
    struct_size: size_of::<awqua_api>() as u32,
    abi: AWQUA_ABI_MAJOR << 16 | AWQUA_ABI_MINOR,
    abi_version: awqua_abi_version,
    version: awqua_version,
    status_name: awqua_status_name,
    last_error: awqua_last_error,
    get_api: awqua_get_api,
    set_allocator: awqua_set_allocator,
    memory: awqua_memory,
    set_log: awqua_set_log,
    engine_desc_init: awqua_engine_desc_init,
    engine_free: awqua_engine_free,
    engine_last_error: awqua_engine_last_error,
    device_count: awqua_device_count,
    device_get: awqua_device_get,
    budget_init: awqua_budget_init,
    model_desc_init: awqua_model_desc_init,
    model_create: awqua_model_create,
    model_tick: awqua_model_tick,
    model_cancel: awqua_model_cancel,
    model_free: awqua_model_free,
    model_last_error: awqua_model_last_error,
    model_get_info: awqua_model_get_info,
    model_tokenize: awqua_model_tokenize,
    model_detokenize: awqua_model_detokenize,
    model_render_chat: awqua_model_render_chat,
    session_desc_init: awqua_session_desc_init,
    request_init: awqua_request_init,
    session_create: awqua_session_create,
    session_free: awqua_session_free,
    session_last_error: awqua_session_last_error,
    session_begin_tokens: awqua_session_begin_tokens,
    session_begin_text: awqua_session_begin_text,
    session_begin_chat: awqua_session_begin_chat,
    session_tick: awqua_session_tick,
    session_poll: awqua_session_poll,
    session_cancel: awqua_session_cancel,
    session_run: awqua_session_run,
    session_truncate: awqua_session_truncate,
    engine_recover: awqua_engine_recover,
    engine_debug_lose_device: awqua_engine_debug_lose_device,
    engine_trim: awqua_engine_trim,
    engine_get_pipeline_cache: awqua_engine_get_pipeline_cache,
    model_run: awqua_model_run,
    model_estimate: awqua_model_estimate,
    model_evict: awqua_model_evict,
    model_restore: awqua_model_restore,
    session_save: awqua_session_save,
    session_trim: awqua_session_trim,
    session_get_embedding: awqua_session_get_embedding,
    engine_create: awqua_engine_create,
    engine_get_info: awqua_engine_get_info,
    engine_recover_vulkan: awqua_engine_recover_vulkan,
    session_get_info: awqua_session_get_info,
    session_fork: awqua_session_fork,
    session_restore: awqua_session_restore,
    session_begin_embedding_tokens: awqua_session_begin_embedding_tokens,
    session_begin_embedding_text: awqua_session_begin_embedding_text,
    batch_create: awqua_batch_create,
    batch_free: awqua_batch_free,
    batch_last_error: awqua_batch_last_error,
    batch_shares: awqua_batch_shares,
    batch_tick: awqua_batch_tick,
    batch_run: awqua_batch_run,
};
