//! Work of loading on threads for its time. Sessions have threads of their own, in `pool`.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

/// Most threads: more do not get more out of the memory of a machine with one socket.
const MOST: usize = 16;

/// Threads that are worth having here.
pub(super) fn processors() -> usize {
    crate::processors::processors().min(MOST)
}

/// Does `work` once with every share, on at most `threads` threads, this one among them.
pub(super) fn share_out<T: Send>(shares: impl Iterator<Item = T>, threads: usize, work: impl Fn(&mut T) + Sync) {
    let shares: Vec<_> = shares.map(Mutex::new).collect();
    let next = AtomicUsize::new(0);
    let go_on = || {
        while let Some(share) = shares.get(next.fetch_add(1, Ordering::Relaxed)) {
            work(&mut share.lock().unwrap_or_else(PoisonError::into_inner));
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.min(shares.len()) {
            // What a thread that the system refuses would have done, the others do.
            let _ = std::thread::Builder::new().spawn_scoped(scope, go_on);
        }
        go_on();
    });
}
