//! `bench/counts`: how many instructions and allocations the hot paths take, and whether that grew.
//!
//! Wall clocks say little on a machine that does something else as well. Instructions are the same each time: valgrind's callgrind counts
//! them, on a processor that valgrind makes up and that has the same instructions (AES, AVX2; no AVX-512) on every machine that has
//! these. What they do not say: what the kernel takes, and how many instructions a real processor does at once.

mod lab;
mod ledger;
mod paths;
mod pipe;

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};
use ledger::{Counts, Ledger};
use stats_alloc::{INSTRUMENTED_SYSTEM, Region, StatsAlloc};

#[global_allocator]
static ALLOCATOR: &StatsAlloc<std::alloc::System> = &INSTRUMENTED_SYSTEM;

const EXAMPLES: &str = "\
Examples:
  bench/counts             count, and fail where a path takes more than bench/counts.txt says
  bench/counts --accept    write what was counted into bench/counts.txt";

/// Counts the instructions and allocations of meshd's hot paths with valgrind
#[derive(Debug, Parser)]
#[command(name = "bench/counts", after_help = EXAMPLES)]
struct Cli {
    /// What is compared with
    #[arg(long, default_value = "bench/counts.txt", value_name = "FILE")]
    against: PathBuf,
    /// Writes the counts there
    #[arg(long)]
    accept: bool,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// Takes all paths, or the one that is named: what is run under valgrind
    #[command(hide = true)]
    Paths { only: Option<String> },
}

fn main() -> Result<ExitCode> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Paths { only }) => {
            // One thread: what is counted takes its turns in the same order each time.
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            paths::all(&runtime, &mut Paths(only))?;
            Ok(ExitCode::SUCCESS)
        }
        None => compare(&cli),
    }
}

/// Measures one path after another, or one of them.
struct Paths(Option<String>);

impl paths::Measure for Paths {
    fn wants(&self, start: &str) -> bool {
        self.0.as_ref().is_none_or(|only| only.starts_with(start))
    }

    fn path(&mut self, name: &str, times: u64, mut work: impl FnMut()) {
        if self.0.as_ref().is_some_and(|only| only != name) {
            return;
        }
        let region = Region::new(ALLOCATOR);
        callgrind_counts_what_this_calls(&mut work);
        let change = region.change();
        println!("{name} {times} {}", change.allocations + change.reallocations);
    }
}

/// callgrind counts while it is in here.
#[inline(never)]
fn callgrind_counts_what_this_calls(work: &mut dyn FnMut()) {
    work();
    // A jump at the end would be no return.
    std::hint::black_box(());
}

fn compare(cli: &Cli) -> Result<ExitCode> {
    let counted = count()?;
    if cli.accept {
        std::fs::write(&cli.against, counted.to_string()).with_context(|| format!("cannot write {}", cli.against.display()))?;
        print!("{counted}");
        return Ok(ExitCode::SUCCESS);
    }
    let text = std::fs::read_to_string(&cli.against).with_context(|| format!("cannot read {}", cli.against.display()))?;
    let (report, grown) = counted.beside(&text.parse()?);
    print!("{report}");
    if grown == 0 {
        return Ok(ExitCode::SUCCESS);
    }
    println!(
        "{grown} of the paths take more than before. If that is worth it: bench/counts --accept, and say why in the commit."
    );
    Ok(ExitCode::FAILURE)
}

/// Runs this program under valgrind, once for each path: what one leaves behind changes no other.
fn count() -> Result<Ledger> {
    ensure!(
        cfg!(target_arch = "x86_64") && std::arch::is_x86_feature_detected!("avx2"),
        "the counts are those of an x86-64 processor with AVX2"
    );
    let dir = Scratch::new()?;
    let all = run(Command::new(std::env::current_exe()?).arg("paths"))?;
    let names: Vec<&str> = all.lines().filter_map(|line| line.split(' ').next()).collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let mut ledger = Ledger::default();
    for some in names.chunks(threads) {
        let counted: Vec<Result<Counts>> = std::thread::scope(|scope| {
            let running: Vec<_> = some.iter().map(|name| scope.spawn(|| one(&dir.0, name))).collect();
            running.into_iter().map(|r| r.join().unwrap_or_else(|_| Err(anyhow::anyhow!("a defect in bench/counts")))).collect()
        });
        for (name, counts) in some.iter().zip(counted) {
            ledger.add(name, counts.with_context(|| format!("cannot count {name}"))?);
        }
    }
    Ok(ledger)
}

fn one(dir: &Path, name: &str) -> Result<Counts> {
    let file = dir.join(name);
    let mut valgrind = Command::new("valgrind");
    valgrind.args(["--tool=callgrind", "--collect-atstart=no", "--toggle-collect=*callgrind_counts_what_this_calls*"]);
    valgrind.arg(format!("--callgrind-out-file={}", file.display())).arg(std::env::current_exe()?).args(["paths", name]);
    let said = run(&mut valgrind)?;
    let words: Vec<&str> = said.split_whitespace().collect();
    let [_, times, allocations] = words[..] else { anyhow::bail!("not a measurement: {said}") };
    let (times, allocations): (u64, u64) = (times.parse()?, allocations.parse()?);
    Ok(Counts { instructions: summary(&file)? / times, allocations: allocations as f64 / times as f64 })
}

fn run(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{} does not start", command.get_program().display()))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}

/// The instructions in one of callgrind's files.
fn summary(file: &Path) -> Result<u64> {
    let text = std::fs::read_to_string(file).with_context(|| format!("callgrind wrote no {}", file.display()))?;
    let line = text.lines().find_map(|line| line.strip_prefix("summary: ").or(line.strip_prefix("totals: ")));
    line.and_then(|n| n.trim().parse().ok()).with_context(|| format!("no sum in {}", file.display()))
}

/// A directory that is gone when it is not needed any more.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self> {
        let dir = std::env::temp_dir().join(format!("meshd-counts-{}", std::process::id()));
        std::fs::create_dir(&dir)?;
        Ok(Self(dir))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
