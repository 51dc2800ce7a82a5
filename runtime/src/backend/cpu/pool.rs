//! The threads of one session: the caller's alone, a small pool of its own, or the host's. No global state; threads of
//! our own end with the session.

use std::any::Any;
use std::cell::UnsafeCell;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crate::backend::Jobs;

/// How long a waiting thread looks for work before it sleeps: more than the distance between two operations of one
/// decode step, so that threads sleep between tokens but not inside one. A host loses no more than that.
const SPIN: Duration = Duration::from_micros(30);
/// Looks between two at the clock. A pause takes from 10 ns to 70 ns, by processor.
const LOOKS: usize = 16;

/// Tasks a thread gets on average; more balance better, fewer cost less.
pub(super) const TASKS_PER_THREAD: usize = 4;
/// Elements that take as long as it takes to wake a thread.
const WORTH: usize = 1 << 15;

type Job = dyn Fn(usize, usize) + Sync;

/// Threads that share the work of one operation: `workers` beside the calling one, or the host's `jobs`.
pub(super) struct Pool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    jobs: Option<Jobs>,
}

struct Shared {
    /// Counts jobs.
    generation: AtomicUsize,
    /// The current job. `Pool::run` alone writes it, while `gate` is 0.
    job: UnsafeCell<Option<(usize, JobPtr)>>,
    /// Workers inside the current job, and [`OPEN`] while others may still enter: a job does not wait for workers that
    /// sleep until all of it is done.
    gate: AtomicUsize,
    /// Next task of each thread's share of the current job. A thread takes those of its own first, in order: they read
    /// neighbouring weights, and often rows that its caches have from the job before. Then it takes what is left of the
    /// others'.
    next: Vec<Line>,
    stop: AtomicBool,
    /// Workers that sleep, or are about to.
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

/// A number on a cache line of its own.
#[repr(align(64))]
struct Line(AtomicUsize);

/// More workers than there can be.
const OPEN: usize = 1 << (usize::BITS - 1);

/// Borrow of the caller's closure with its lifetime erased.
#[derive(Clone, Copy)]
struct JobPtr(*const Job);

// SAFETY: the closure is `Sync`, and `Pool::run` does not return before every worker has finished calling it.
unsafe impl Send for JobPtr {}

// SAFETY: `job` alone is not `Sync`. `Pool::run`, which has the pool for itself, writes it while `gate` is 0, and opens the
// gate behind it; a worker reads it between entering an open gate and leaving it, and until then the gate is not 0.
unsafe impl Sync for Shared {}

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
            generation: AtomicUsize::new(0),
            job: UnsafeCell::new(None),
            gate: AtomicUsize::new(0),
            next: (0..threads.max(1)).map(|_| Line(AtomicUsize::new(0))).collect(),
            stop: AtomicBool::new(false),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
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

    /// Tasks to share `items` in, each of `work` elements: one where others would have to be woken for too little.
    pub(super) fn tasks(&self, items: usize, work: usize) -> usize {
        match self.threads() {
            threads if threads > 1 && items * work >= WORTH => items.min(threads * TASKS_PER_THREAD),
            _ => items.min(1),
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
        // SAFETY: only the lifetime changes. The pointer is used by workers inside the gate, which is closed and empty
        // before this function returns, even if `job` panics, so the borrow outlives every use.
        let erased: *const Job =
            unsafe { std::mem::transmute::<*const (dyn Fn(usize, usize) + Sync + '_), *const Job>(job) };
        // SAFETY: see `Shared`: the gate is closed and nobody inside.
        unsafe { *self.shared.job.get() = Some((tasks, JobPtr(erased))) };
        for share in 0..self.shared.next.len() {
            self.shared.next[share].0.store(self.shared.share(share, tasks).start, Ordering::Relaxed);
        }
        self.shared.gate.store(OPEN, Ordering::Release);
        self.shared.publish();
        let mine = catch_unwind(AssertUnwindSafe(|| drain(&self.shared, tasks, job, 0)));
        self.shared.gate.fetch_and(!OPEN, Ordering::Relaxed);
        while !spin_until(|| self.shared.gate.load(Ordering::Acquire) == 0) {
            // A worker may wait for a processor that this thread has.
            std::thread::yield_now();
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
        self.shared.stop.store(true, Ordering::Relaxed);
        self.shared.publish();
        for worker in self.workers.drain(..) {
            // A worker's panics were caught and reported by `run`.
            let _ = worker.join();
        }
    }
}

impl Shared {
    /// Shows workers a new job, or that they shall stop.
    fn publish(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
        // Either this sees the worker that is about to sleep, or that sees the new generation: both are in one order.
        if self.sleepers.load(Ordering::SeqCst) != 0 {
            drop(self.sleep.lock().unwrap_or_else(|e| e.into_inner()));
            self.wake.notify_all();
        }
    }

    /// Returns the generation once that is not `seen`.
    fn wait(&self, seen: usize) -> usize {
        let now = || self.generation.load(Ordering::SeqCst);
        if !spin_until(|| now() != seen) {
            let mut guard = self.sleep.lock().unwrap_or_else(|e| e.into_inner());
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while now() == seen {
                guard = self.wake.wait(guard).unwrap_or_else(|e| e.into_inner());
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
        now()
    }

    /// The tasks of thread `worker`.
    fn share(&self, worker: usize, tasks: usize) -> Range<usize> {
        let threads = self.next.len();
        tasks * worker / threads..tasks * (worker + 1) / threads
    }

    /// Enters the current job, if that is not over.
    fn enter(&self) -> bool {
        let inside = |gate| if gate & OPEN == 0 { None } else { Some(gate + 1) };
        self.gate.fetch_update(Ordering::Acquire, Ordering::Relaxed, inside).is_ok()
    }
}

/// Waits for `done` without sleeping, but not for long; whether it is.
fn spin_until(done: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..LOOKS {
            if done() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() > SPIN {
            return done();
        }
    }
}

fn drain(shared: &Shared, tasks: usize, job: &(dyn Fn(usize, usize) + Sync), worker: usize) {
    let threads = shared.next.len();
    for share in (worker..threads).chain(0..worker) {
        let end = shared.share(share, tasks).end;
        loop {
            let task = shared.next[share].0.fetch_add(1, Ordering::Relaxed);
            if task >= end {
                break;
            }
            job(task, worker);
        }
    }
}

fn work(shared: &Shared, worker: usize) {
    let mut seen = 0;
    loop {
        seen = shared.wait(seen);
        if shared.stop.load(Ordering::Relaxed) {
            return;
        }
        if !shared.enter() {
            continue;
        }
        // SAFETY: see `Shared`: this worker is inside the gate.
        if let Some((tasks, job)) = unsafe { *shared.job.get() } {
            // SAFETY: `run` waits for this worker to leave before its borrow of the closure ends.
            let job = unsafe { &*job.0 };
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| drain(shared, tasks, job, worker))) {
                *shared.panic.lock().unwrap_or_else(|e| e.into_inner()) = Some(payload);
            }
        }
        shared.gate.fetch_sub(1, Ordering::Release);
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
    fn workers_that_sleep_wake_up() {
        let mut pool = Pool::new(4);
        let sum = AtomicUsize::new(0);
        for round in 0..200 {
            // From where they still spin to where they long sleep.
            std::thread::sleep(Duration::from_micros(round % 5 * 20));
            pool.run(4, &|task, _| {
                sum.fetch_add(task, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 200 * 6);
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
