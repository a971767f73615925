//! The `meshd` program: parses the command line, makes the runtime the command needs, and turns its end into an exit code.

use std::process::ExitCode;
use std::thread::available_parallelism;

use clap::Parser;
use meshd::cli::{Cli, Exit, Failure, Needs};
use meshd::config::Environment;
use tokio::runtime::{Builder, Runtime};

/// musl's allocator is several times slower, and jemalloc aborts on kernels with larger pages than it was built for.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    let cli = Cli::parse();
    let environment = Environment::of_process();
    let end = match cli.needs() {
        Needs::Nothing => cli.run_here(&environment),
        needs => runtime(needs).and_then(|runtime| runtime.block_on(cli.run(&environment))),
    };
    match end {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("{failure}");
            failure.exit.into()
        }
    }
}

/// A worker per core that this process may use. With one core the threads of a larger runtime would only get in each other's way.
fn runtime(needs: Needs) -> Result<Runtime, Failure> {
    let cores = available_parallelism().map_or(1, usize::from);
    let mut builder = match needs {
        Needs::AllCores if cores > 1 => Builder::new_multi_thread(),
        _ => Builder::new_current_thread(),
    };
    let failed = |e| Failure::new(Exit::Failed, format!("cannot start: the system refused threads or an event queue ({e})"));
    builder.worker_threads(cores).enable_all().build().map_err(failed)
}
