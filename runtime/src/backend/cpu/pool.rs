//! The threads of one session: the caller's alone, a small pool of its own, or the host's. No global state; threads of
//! our own end with the session.

use std::any::Any;
use std::marker::PhantomData;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;

use crate::backend::Jobs;

/// Iterations a waiting thread spins before it sleeps: a few tens of microseconds, about the distance between two
/// operations of one decode step, so that threads sleep between tokens but not inside one.
const SPINS: usize = 4000;

type Job = dyn Fn(usize, usize) + Sync;

/// Threads that share the work of one operation: `workers` beside the calling one, or the host's `jobs`.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    jobs: Option<Jobs>,
}

struct Shared {
    state: Mutex<State>,
    wake: Condvar,
    /// Copy of `State::generation` for spinning without the lock.
    generation: AtomicUsize,
    /// Next task of the current job.
    next: AtomicUsize,
    /// Workers still inside the current job.
    busy: AtomicUsize,
    stop: AtomicBool,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Default)]
struct State {
    generation: usize,
    tasks: usize,
    job: Option<JobPtr>,
}

/// Borrow of the caller's closure with its lifetime erased.
#[derive(Clone, Copy)]
struct JobPtr(*const Job);

// SAFETY: the closure is `Sync`, and `Pool::run` does not return before every worker has finished calling it.
unsafe impl Send for JobPtr {}

/// A slice that the tasks of a job write, each parts of its own.
pub(super) struct Parts<'a, T> {
    first: *mut T,
    len: usize,
    borrow: PhantomData<&'a mut [T]>,
}

// SAFETY: no two threads have the same element, by the promise that `part` asks for.
unsafe impl<T: Send> Sync for Parts<'_, T> {}

impl<'a, T> Parts<'a, T> {
    pub(super) fn new(slice: &'a mut [T]) -> Self {
        Self { first: slice.as_mut_ptr(), len: slice.len(), borrow: PhantomData }
    }

    /// `len` elements from `at` on.
    ///
    /// # Safety
    /// Parts that are in use at the same time must not overlap.
    ///
    /// # Panics
    /// If they are not inside the slice.
    #[allow(clippy::mut_from_ref, reason = "disjointness is the caller's promise")]
    pub(super) unsafe fn part(&self, at: usize, len: usize) -> &mut [T] {
        assert!(at <= self.len && len <= self.len - at);
        // SAFETY: in bounds by the assertion, disjoint by the caller's promise, and borrowed for as long as `self`.
        unsafe { std::slice::from_raw_parts_mut(self.first.add(at), len) }
    }
}

impl Pool {
    /// A pool of `threads` threads in all, at least 1. If the system refuses a thread, the pool is smaller.
    pub(super) fn new(threads: usize) -> Self {
        let shared = Arc::new(Shared {
            state: Mutex::default(),
            wake: Condvar::new(),
            generation: AtomicUsize::new(0),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
        });
        let workers = (1..threads.max(1))
            .map_while(|worker| {
                let shared = Arc::clone(&shared);
                let name = format!("awqua-cpu-{worker}");
                std::thread::Builder::new().name(name).spawn(move || work(&shared, worker)).ok()
            })
            .collect();
        Self { shared, workers, jobs: None }
    }

    /// A pool that runs on the host's threads and has none of its own.
    pub(super) fn on(jobs: Jobs) -> Self {
        let mut pool = Self::new(1);
        pool.jobs = Some(jobs);
        pool
    }

    /// Threads that run jobs, the caller's included.
    pub(super) fn threads(&self) -> usize {
        match &self.jobs {
            Some(jobs) => jobs.0.threads().max(1),
            None => self.workers.len() + 1,
        }
    }

    /// Calls `job(task, worker)` once for every task below `tasks`, in any order and on any worker below
    /// [`Self::threads`], and returns when all calls have returned.
    ///
    /// # Panics
    /// If `job` panics, after the other calls have ended.
    pub(super) fn run(&mut self, tasks: usize, job: &(dyn Fn(usize, usize) + Sync)) {
        if tasks > 1
            && let Some(jobs) = &self.jobs
        {
            // A host that calls with a worker number out of range would break what callers build on it.
            let threads = self.threads();
            return jobs.0.run(tasks, &|task, worker| {
                assert!(worker < threads && task < tasks, "the host's jobs run task {task} on worker {worker}");
                job(task, worker);
            });
        }
        if self.workers.is_empty() || tasks <= 1 {
            (0..tasks).for_each(|task| job(task, 0));
            return;
        }
        // SAFETY: only the lifetime changes. The pointer is used by workers between here and the wait for
        // `busy == 0` below, which happens even if `job` panics, so the borrow outlives every use.
        let erased: *const Job =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const Job>(job) };
        {
            let mut state = self.shared.state.lock().unwrap_or_else(|e| e.into_inner());
            state.generation = state.generation.wrapping_add(1);
            state.tasks = tasks;
            state.job = Some(JobPtr(erased));
            self.shared.next.store(0, Ordering::Relaxed);
            self.shared.busy.store(self.workers.len(), Ordering::Relaxed);
            self.shared.generation.store(state.generation, Ordering::Release);
        }
        self.shared.wake.notify_all();
        let mine = catch_unwind(AssertUnwindSafe(|| drain(&self.shared, tasks, job, 0)));
        let mut spins = 0;
        while self.shared.busy.load(Ordering::Acquire) != 0 {
            spins += 1;
            if spins < SPINS {
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
        let theirs = self.shared.panic.lock().unwrap_or_else(|e| e.into_inner()).take();
        if let Err(payload) = mine {
            resume_unwind(payload);
        }
        if let Some(payload) = theirs {
            resume_unwind(payload);
        }
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Release);
        {
            let mut state = self.shared.state.lock().unwrap_or_else(|e| e.into_inner());
            state.generation = state.generation.wrapping_add(1);
            self.shared.generation.store(state.generation, Ordering::Release);
        }
        self.shared.wake.notify_all();
        for worker in self.workers.drain(..) {
            // A worker's panics were caught and reported by `run`.
            let _ = worker.join();
        }
    }
}

fn drain(shared: &Shared, tasks: usize, job: &(dyn Fn(usize, usize) + Sync), worker: usize) {
    loop {
        let task = shared.next.fetch_add(1, Ordering::Relaxed);
        if task >= tasks {
            return;
        }
        job(task, worker);
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        let mut spins = 0;
        while shared.generation.load(Ordering::Acquire) == seen && spins < SPINS {
            spins += 1;
            std::hint::spin_loop();
        }
        let (tasks, job) = {
            let mut state = shared.state.lock().unwrap_or_else(|e| e.into_inner());
            while state.generation == seen {
                state = shared.wake.wait(state).unwrap_or_else(|e| e.into_inner());
            }
            seen = state.generation;
            (state.tasks, state.job)
        };
        if shared.stop.load(Ordering::Acquire) {
            return;
        }
        if let Some(job) = job {
            // SAFETY: `run` published this pointer with the generation just seen and waits for `busy` to reach 0
            // before its borrow of the closure ends.
            let job = unsafe { &*job.0 };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drain(shared, tasks, job, worker))) {
                *shared.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(payload);
            }
            shared.busy.fetch_sub(1, Ordering::Release);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let mut pool = Pool::new(threads);
            for tasks in [0, 1, 2, 7, 1000] {
                let counts: Vec<AtomicUsize> = (0..tasks).map(|_| AtomicUsize::new(0)).collect();
                pool.run(tasks, &|task, worker| {
                    assert!(worker < threads);
                    counts[task].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.iter().all(|c| c.load(Ordering::Relaxed) == 1));
            }
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let mut pool = Pool::new(3);
        let result = catch_unwind(AssertUnwindSafe(|| {
            pool.run(100, &|task, _| assert!(task != 50));
        }));
        assert!(result.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|task, _| {
            sum.fetch_add(task, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
