//! Messages for the host's log. Without a callback the library is silent.

use std::ffi::c_void;
use std::sync::{Once, PoisonError, RwLock};

use crate::boundary::guard;
use crate::status::Failure;
use crate::status::awqua_status::{self, *};
use crate::text::awqua_str;

/// How much is logged; each level includes those before it.
#[repr(u32)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(dead_code, reason = "values the caller uses")]
pub enum awqua_log_level {
    /// Nothing.
    AWQUA_LOG_OFF = 0,
    /// Failures inside the library or a driver.
    AWQUA_LOG_ERROR = 1,
    /// Things that work, but not as they should.
    AWQUA_LOG_WARN = 2,
    /// What was opened, loaded and lost.
    AWQUA_LOG_INFO = 3,
    /// Everything the device layer says.
    AWQUA_LOG_DEBUG = 4,
}

/// Receives one message; `text` lives for the call. It may come from any thread that is inside the library, must not
/// call the library, and must not throw.
pub type awqua_log_fn = Option<unsafe extern "C" fn(user: *mut c_void, level: u32, text: awqua_str)>;

#[derive(Clone, Copy)]
struct Sink {
    callback: unsafe extern "C" fn(*mut c_void, u32, awqua_str),
    user: *mut c_void,
}
// SAFETY: the host promises that `user` may be handed to the callback on any thread.
unsafe impl Send for Sink {}
// SAFETY: as above.
unsafe impl Sync for Sink {}

static SINK: RwLock<Option<Sink>> = RwLock::new(None);

struct ToHost;

impl log::Log for ToHost {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        // Copied out, so that the host's code never runs under our lock.
        let Some(sink) = *SINK.read().unwrap_or_else(PoisonError::into_inner) else { return };
        if !self.enabled(record.metadata()) {
            return;
        }
        let text = record.args().to_string();
        let level = match record.level() {
            log::Level::Error => awqua_log_level::AWQUA_LOG_ERROR,
            log::Level::Warn => awqua_log_level::AWQUA_LOG_WARN,
            log::Level::Info => awqua_log_level::AWQUA_LOG_INFO,
            log::Level::Debug | log::Level::Trace => awqua_log_level::AWQUA_LOG_DEBUG,
        };
        let text = awqua_str { data: text.as_ptr().cast(), len: text.len() as u64 };
        // SAFETY: the host keeps the callback valid while it is set.
        unsafe { (sink.callback)(sink.user, level as u32, text) };
    }

    fn flush(&self) {}
}

/// Sends messages up to `level` (an awqua_log_level) to `callback`; NULL turns them off. Any thread, any time; a
/// message already on its way may still arrive at the old callback while this returns.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn awqua_set_log(callback: awqua_log_fn, user: *mut c_void, level: u32) -> awqua_status {
    guard("awqua_set_log", || {
        let filter = match level {
            0 => log::LevelFilter::Off,
            1 => log::LevelFilter::Error,
            2 => log::LevelFilter::Warn,
            3 => log::LevelFilter::Info,
            4 => log::LevelFilter::Debug,
            _ => return Err(Failure::invalid(format!("`level` is {level}, expected 0 to 4"))),
        };
        static ONCE: Once = Once::new();
        // `log` belongs to this library alone, so nobody else can have set one.
        ONCE.call_once(|| drop(log::set_logger(&ToHost)));
        *SINK.write().unwrap_or_else(PoisonError::into_inner) = callback.map(|callback| Sink { callback, user });
        log::set_max_level(if callback.is_some() { filter } else { log::LevelFilter::Off });
        Ok(AWQUA_OK)
    })
}
