//! The CPU's matrix products by instruction set, against what memory delivers: `cargo bench -p awqua-tests --bench cpu`,
//! with the numbers of threads as arguments (1 without any). One thread is timed in seconds of the processor, which other
//! programs do not change; more are timed by the clock.

use std::time::Instant;

use awqua::backend::cpu::measure::{Case, TOKENS, measure, read_bandwidth};

#[expect(clippy::print_stdout, reason = "the table is what this prints")]
fn main() {
    // Cargo adds `--bench`.
    let mut threads: Vec<usize> = std::env::args().skip(1).filter_map(|a| a.parse().ok()).collect();
    if threads.is_empty() {
        threads.push(1);
    }
    let start = Instant::now();
    let wall = || start.elapsed().as_secs_f64();
    for threads in threads {
        let clock: &dyn Fn() -> f64 = if threads == 1 && processor_seconds().is_some() {
            &|| processor_seconds().unwrap_or_default()
        } else {
            &wall
        };
        println!("{threads} threads, memory {:.1} GB/s", read_bandwidth(threads, clock).unwrap());
        println!(
            "| matrix | group | isa | M = 1, GB/s | in cache, GB/s | M = {TOKENS}, GFLOP/s |\n|---|---|---|---|---|---|"
        );
        for (n, k, group_size) in [
            (3_072, 576, Some(64)),
            (576, 1_536, Some(64)),
            (9_728, 896, Some(128)),
            (3_072, 576, Some(32)),
            (4_096, 4_096, Some(128)),
            (22_016, 4_096, Some(128)),
            (49_152, 576, None),
        ] {
            for found in measure(Case { n, k, group_size }, threads, clock).unwrap() {
                let group = group_size.map_or("8 bits".into(), |g| g.to_string());
                println!(
                    "| {n} x {k} | {group} | {} | {:.1} | {:.1} | {:.1} |",
                    found.isa, found.memory, found.cache, found.operations
                );
            }
        }
    }
}

/// Seconds that the calling thread has run, where the system tells.
fn processor_seconds() -> Option<f64> {
    let line = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    Some(line.split(' ').next()?.parse::<f64>().ok()? * 1e-9)
}
