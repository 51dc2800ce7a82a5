//! How many threads are worth starting.

use std::sync::OnceLock;

/// Processors that this process may run on, as the system said when it was asked first: to find out takes some thirty
/// system calls on Linux, and a model is loaded in hundreds of pieces.
pub(crate) fn processors() -> usize {
    static PROCESSORS: OnceLock<usize> = OnceLock::new();
    *PROCESSORS.get_or_init(|| std::thread::available_parallelism().map_or(1, usize::from))
}
