//! What processes cost: user and system time and resident memory, children included, from /proc.

use anyhow::{Context, Result};

/// Clock ticks in a second: what the kernel tells user space on every architecture (`USER_HZ`, time(7)).
const TICKS: f64 = 100.0;

/// Processes whose cost counts as one side's.
#[derive(Debug, Clone, Default)]
pub(crate) struct Side(pub(crate) Vec<u32>);

impl Side {
    /// CPU seconds used so far.
    ///
    /// # Errors
    /// When a process is gone.
    pub(crate) fn cpu(&self) -> Result<f64> {
        self.sum(|pid| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
            // The name stands in parentheses and may have any character in it; utime and stime are the 14th and 15th field.
            let fields: Vec<&str> = text.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
            let ticks = |at: usize| fields.get(at).and_then(|f| f.parse::<u64>().ok()).context("a figure in /proc/PID/stat");
            Ok((ticks(11)? + ticks(12)?) as f64 / TICKS)
        })
    }

    /// Resident memory in KiB.
    ///
    /// # Errors
    /// When a process is gone.
    pub(crate) fn memory(&self) -> Result<f64> {
        self.sum(|pid| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:")).context("no VmRSS")?;
            Ok(line.trim().trim_end_matches(" kB").trim().parse()?)
        })
    }

    fn sum(&self, of: impl Fn(u32) -> Result<f64>) -> Result<f64> {
        self.all().into_iter().map(|pid| of(pid).with_context(|| format!("process {pid} is gone"))).sum()
    }

    /// The processes and all their descendants.
    fn all(&self) -> Vec<u32> {
        let mut all = self.0.clone();
        let mut at = 0;
        while let Some(pid) = all.get(at).copied() {
            at += 1;
            let tasks = std::fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten();
            for task in tasks {
                let children = std::fs::read_to_string(task.path().join("children")).unwrap_or_default();
                all.extend(children.split_whitespace().filter_map(|c| c.parse::<u32>().ok()));
            }
        }
        all
    }
}
