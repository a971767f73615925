//! This process as the kernel sees it, under the names that every Prometheus client library uses.
//!
//! Owns the look into `/proc/self` (proc(5)). What cannot be read is left out.

use std::fs::{read_dir, read_to_string};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use meshd_ca::time::UnixTime;
use rustix::param::{clock_ticks_per_second, page_size};
use rustix::process::{Resource, getrlimit};

use super::metrics::Page;
use crate::intercept::process::since_boot;

/// Of `/proc/self/stat`, what is shown.
#[derive(Debug, PartialEq)]
struct Stat {
    cpu_ticks: u64,
    threads: u64,
    started_ticks: u64,
    virtual_bytes: u64,
    resident_pages: u64,
}

impl Stat {
    fn parse(text: &str) -> Option<Self> {
        // The second field is a name in parentheses that may contain anything.
        let (_, rest) = text.rsplit_once(')')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Numbered as in proc_pid_stat(5), where the state is 3.
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        Some(Self {
            cpu_ticks: field(14)? + field(15)?,
            threads: field(20)?,
            started_ticks: field(22)?,
            virtual_bytes: field(23)?,
            resident_pages: field(24)?,
        })
    }
}

/// Adds what there is to say at `now`.
pub(super) fn measure(page: &mut Page, now: UnixTime) {
    if let Some(stat) = read_to_string("/proc/self/stat").ok().as_deref().and_then(Stat::parse) {
        let second = clock_ticks_per_second() as f64;
        page.counter("process_cpu_seconds_total", "CPU time of this process, user and system", stat.cpu_ticks as f64 / second);
        page.gauge("process_threads", "Threads of this process", stat.threads);
        page.gauge("process_virtual_memory_bytes", "Address space of this process", stat.virtual_bytes);
        let resident = stat.resident_pages * page_size() as u64;
        page.gauge("process_resident_memory_bytes", "Memory of this process that is in RAM", resident);
        let age = since_boot().saturating_sub(Duration::from_secs_f64(stat.started_ticks as f64 / second));
        page.gauge("process_start_time_seconds", "When this process started, in seconds since 1970", started(now, age));
    }
    if let Ok(open) = read_dir("/proc/self/fd") {
        // One of them is the directory itself.
        page.gauge("process_open_fds", "Open file descriptors", open.count().saturating_sub(1));
    }
    if let Some(most) = getrlimit(Resource::Nofile).current {
        page.gauge("process_max_fds", "Open file descriptors that are allowed", most);
    }
}

/// The time of the start. Computed anew each time, because the clock may have been set since, but steady: it is taken for a restart
/// when it changes.
fn started(now: UnixTime, age: Duration) -> u64 {
    static LAST: AtomicU64 = AtomicU64::new(0);
    const SET: u64 = 3;
    let computed = now.0.saturating_sub(age.as_secs());
    let last = LAST.load(Relaxed);
    if last != 0 && computed.abs_diff(last) <= SET {
        return last;
    }
    LAST.store(computed, Relaxed);
    computed
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces() {
        let text = "7 (a) b) (c) S 1 7 7 0 -1 4194304 100 0 0 0 11 22 0 0 20 0 5 0 4242 9000000 321 18446744073709551615 1 1 0";
        let stat = Stat { cpu_ticks: 33, threads: 5, started_ticks: 4242, virtual_bytes: 9_000_000, resident_pages: 321 };
        assert_eq!(Stat::parse(text), Some(stat));
        assert_eq!(Stat::parse("7 (short) S 1"), None);
        assert_eq!(Stat::parse(""), None);
    }

    #[test]
    fn this_process_is_small_young_and_has_files() {
        let mut page = Page::default();
        let now = UnixTime(1_800_000_000);
        measure(&mut page, now);
        let mut text = String::new();
        super::super::metrics::render(page, super::super::metrics::Format::Prometheus, &mut text).unwrap();
        let value = |name: &str| -> f64 {
            let line = text.lines().find(|l| l.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
            line.rsplit(' ').next().unwrap().parse().unwrap()
        };
        assert!((1e6..1e9).contains(&value("process_resident_memory_bytes")));
        assert!((3.0..1000.0).contains(&value("process_open_fds")));
        assert!(value("process_open_fds") <= value("process_max_fds"));
        assert!(value("process_threads") >= 1.0);
        let age = now.0 as f64 - value("process_start_time_seconds");
        assert!((0.0..3600.0).contains(&age), "{age}");
        assert!(value("process_cpu_seconds_total") >= 0.0);
    }
}
