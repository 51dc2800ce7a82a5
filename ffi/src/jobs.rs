//! The host's own threads for the work of the CPU.

use std::any::Any;
use std::ffi::c_void;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Mutex, PoisonError};

use runtime::backend::{Jobs, ParallelFor};

/// A piece of work. Call it from any thread, with the `context` it came with; it does not wait and does not throw.
/// `worker` tells the calls apart that run at once: below the engine's `threads`, and never used by two of them.
pub type awqua_task_fn = Option<unsafe extern "C" fn(context: *mut c_void, index: u32, worker: u32)>;

/// Calls `task` once for every index below `count`, in any order, on any threads, the calling one included or not, and
/// returns once all calls have returned. It comes from inside a tick, must not call the library, and must not throw.
pub type awqua_parallel_for_fn =
    Option<unsafe extern "C" fn(user: *mut c_void, count: u32, task: awqua_task_fn, context: *mut c_void)>;

/// The host's function as the runtime takes it; `None` for NULL.
pub fn jobs(function: awqua_parallel_for_fn, user: *mut c_void, threads: usize) -> Option<Jobs> {
    Some(Jobs(Arc::new(Host { function: function?, user, threads })))
}

struct Host {
    function: unsafe extern "C" fn(*mut c_void, u32, awqua_task_fn, *mut c_void),
    user: *mut c_void,
    threads: usize,
}

// SAFETY: the host promises a function that may be called from every thread that ticks.
unsafe impl Send for Host {}
// SAFETY: as above.
unsafe impl Sync for Host {}

/// One job while it runs.
struct Running<'a> {
    task: &'a (dyn Fn(usize, usize) + Sync),
    /// The first panic of a task, which must not unwind into the host.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

unsafe extern "C" fn call(context: *mut c_void, index: u32, worker: u32) {
    // SAFETY: `Host::run` handed this context over, and lives until every call has returned.
    let running = unsafe { &*context.cast::<Running<'_>>() };
    if let Err(panic) = catch_unwind(AssertUnwindSafe(|| (running.task)(index as usize, worker as usize))) {
        running.panic.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert(panic);
    }
}

impl ParallelFor for Host {
    fn threads(&self) -> usize {
        self.threads
    }

    fn run(&self, tasks: usize, task: &(dyn Fn(usize, usize) + Sync)) {
        let mut running = Running { task, panic: Mutex::new(None) };
        // Operations are cut into some pieces a thread, far below what 32 bits count.
        let count = u32::try_from(tasks).unwrap_or(u32::MAX);
        // SAFETY: the host's own function and argument; the context lives until it returns, and the header asks it to
        // return only then.
        unsafe { (self.function)(self.user, count, Some(call), (&raw mut running).cast()) };
        if let Some(panic) = running.panic.get_mut().unwrap_or_else(PoisonError::into_inner).take() {
            resume_unwind(panic);
        }
    }
}
