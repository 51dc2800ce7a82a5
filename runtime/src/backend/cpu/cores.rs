//! How many processors are worth computing on.

use std::path::Path;

/// Share of the speed of the fastest cores that makes one of the same kind: efficiency cores have less, and favoured ones
/// of one kind differ by little.
const ALIKE: f64 = 0.8;

/// Cores of the fastest kind that this process may use, each counted once however many threads it runs: slower ones make
/// the others wait, and a core's second thread shares the units and the memory port that products are bound by. All
/// available processors where the system does not tell.
pub fn performance_cores() -> usize {
    let available = std::thread::available_parallelism().map_or(1, usize::from);
    count(Path::new("/sys/devices/system/cpu"), allowed()).unwrap_or(available).clamp(1, available)
}

/// Processors that the calling thread, and so those that it makes, may run on, where Linux tells.
fn allowed() -> Option<Vec<usize>> {
    let status = std::fs::read_to_string("/proc/thread-self/status").ok()?;
    numbers(status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"))?)
}

/// The count by the files of Linux under `root`, of the processors `allowed` or of all.
fn count(root: &Path, allowed: Option<Vec<usize>>) -> Option<usize> {
    let read = |path: std::path::PathBuf| Some(std::fs::read_to_string(path).ok()?.trim().to_owned());
    let mut usable = numbers(&read(root.join("online"))?)?;
    usable.retain(|number| allowed.as_ref().is_none_or(|allowed| allowed.contains(number)));
    let mut speeds = Vec::new();
    for &number in &usable {
        let cpu = root.join(format!("cpu{number}"));
        // Of a core's threads the first that may be used counts.
        let siblings = read(cpu.join("topology/thread_siblings_list")).and_then(|list| numbers(&list));
        if siblings.is_some_and(|siblings| siblings.iter().find(|thread| usable.contains(thread)) != Some(&number)) {
            continue;
        }
        let number = |file: &str| read(cpu.join(file))?.parse::<f64>().ok();
        // Virtual machines tell neither: there all are of one kind.
        speeds.push(number("cpu_capacity").or_else(|| number("cpufreq/cpuinfo_max_freq")).unwrap_or(1.0));
    }
    let fastest = speeds.iter().copied().fold(0.0, f64::max);
    Some(speeds.iter().filter(|&&speed| speed >= ALIKE * fastest).count())
}

/// Numbers of a list such as `0-3,8`.
fn numbers(list: &str) -> Option<Vec<usize>> {
    const MOST: usize = 1 << 16;
    let mut all = Vec::new();
    for range in list.split(',') {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let (first, last) = (first.trim().parse::<usize>().ok()?, last.trim().parse::<usize>().ok()?);
        if last >= MOST {
            return None;
        }
        all.extend(first..=last);
    }
    Some(all)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slow_cores_and_second_threads_do_not_count() {
        let root = std::env::temp_dir().join(format!("awqua-cores-{}", std::process::id()));
        let write = |file: String, text: &str| {
            let path = root.join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("online".into(), "0-7\n");
        // Two performance cores of two threads, four efficiency cores.
        for cpu in 0..8 {
            let (siblings, speed) = match cpu {
                0..4 => (format!("{}-{}\n", cpu / 2 * 2, cpu / 2 * 2 + 1), 5_000_000 - 100_000 * (cpu / 2)),
                _ => (format!("{cpu}\n"), 3_800_000),
            };
            write(format!("cpu{cpu}/topology/thread_siblings_list"), &siblings);
            write(format!("cpu{cpu}/cpufreq/cpuinfo_max_freq"), &format!("{speed}\n"));
        }
        assert_eq!(count(&root, None), Some(2));
        // Threads of one core; a core's second thread and slow cores; slow cores alone.
        for (allowed, expected) in [(vec![0, 1], 1), (vec![1, 3, 5, 6], 2), (vec![5, 6, 7], 3), (vec![], 0)] {
            assert_eq!(count(&root, Some(allowed)), Some(expected));
        }
        // A phone says how fast a core is beside the fastest one.
        for cpu in 0..8 {
            write(format!("cpu{cpu}/topology/thread_siblings_list"), &format!("{cpu}\n"));
            write(format!("cpu{cpu}/cpu_capacity"), ["250", "250", "250", "250", "870", "870", "870", "1024"][cpu]);
        }
        assert_eq!(count(&root, None), Some(4));
        write("online".into(), "nonsense");
        assert_eq!(count(&root, None), None);
        std::fs::remove_dir_all(&root).unwrap();
        assert_eq!(count(&root, None), None);
        assert!(performance_cores() >= 1);
    }

    #[test]
    fn lists_are_read_as_the_kernel_writes_them() {
        assert_eq!(numbers("0-3,8,10-11"), Some(vec![0, 1, 2, 3, 8, 10, 11]));
        assert_eq!(numbers("5"), Some(vec![5]));
        assert_eq!(numbers("0-4294967296"), None);
        assert_eq!(numbers(""), None);
    }
}
