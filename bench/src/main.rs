//! `meshd-bench`: what connections between two hosts cost with meshd, and with what people use today.
//!
//! Two hosts out of network namespaces, one client, one service; what is in between changes. All of them take turns in each round, so that
//! whatever else the machine does meets all of them. No traffic leaves the namespaces.

mod certificates;
mod load;
mod planes;
mod processes;
mod relay;
mod report;
mod serve;

use std::io::Write;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand, ValueEnum};
use load::{Load, Outcome};
use meshd::demo::lab::{Host, Lab};
use planes::{Plane, Running, World};
use report::{Measurement, Memory};

const EXAMPLES: &str = "\
What is not installed is left out, and said: apt install haproxy nginx-light libnginx-mod-stream stunnel4

Examples:
  bench/run
  bench/run --rounds 1 --seconds 2 --planes direct,reference,meshd
  bench/run --loads short,fixed --meshd /usr/local/bin/meshd";

/// Measures meshd side by side with nothing in between, plain relays, HAProxy, nginx and stunnel
#[derive(Debug, Parser)]
#[command(name = "bench/run", after_help = EXAMPLES)]
struct Cli {
    /// How often everything is measured
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Seconds for each workload
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// What is measured [default: everything]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    planes: Vec<Plane>,
    /// With which workloads [default: all]
    #[arg(long, value_enum, value_delimiter = ',', value_name = "NAMES")]
    loads: Vec<Load>,
    /// How many idle connections are held when memory is measured; 0 leaves that out
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=50_000))]
    held: u32,
    /// For how many seconds they rest before each is asked again
    #[arg(long, default_value_t = 4, value_name = "SECONDS", value_parser = clap::value_parser!(u64).range(3..=3_600))]
    rest: u64,
    /// The meshd that is measured [default: the one built with this]
    #[arg(long, value_name = "FILE")]
    meshd: Option<PathBuf>,
    /// Where every measurement is written, a line of JSON each
    #[arg(long, default_value = "target/bench.jsonl", value_name = "FILE")]
    results: PathBuf,
    #[command(subcommand)]
    part: Option<Part>,
}

#[derive(Debug, Subcommand)]
enum Part {
    /// A part that the benchmark runs on one of its hosts
    #[command(subcommand, hide = true)]
    Role(Role),
}

#[derive(Debug, Subcommand)]
enum Role {
    Serve {
        at: SocketAddr,
    },
    Relay {
        listen: SocketAddr,
        to: SocketAddr,
        certificates: PathBuf,
        #[arg(long)]
        tls: relay::Tls,
    },
    Load {
        load: Load,
        to: SocketAddr,
        seconds: u64,
    },
    Hold {
        to: SocketAddr,
        count: usize,
        rest: u64,
    },
}

fn main() -> Result<()> {
    let cli = Cli::parse();
    match cli.part {
        Some(Part::Role(role)) => play(role),
        None => measure(&cli),
    }
}

/// Two threads, as for every plane that lets one choose.
fn play(role: Role) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async {
        match role {
            Role::Serve { at } => serve::serve(at).await,
            Role::Relay { listen, to, certificates, tls } => relay::relay(listen, to, tls, &certificates).await,
            Role::Hold { to, count, rest } => load::hold(to, count, Duration::from_secs(rest)).await,
            Role::Load { load, to, seconds } => {
                let outcome = load.run(to, Duration::from_secs(seconds)).await?;
                println!("{}", serde_json::to_string(&outcome)?);
                Ok(())
            }
        }
    })
}

fn measure(cli: &Cli) -> Result<()> {
    // Before there is a second thread.
    meshd::intercept::netns::become_root().context("the benchmark needs root, or a machine where users may make namespaces")?;
    meshd::intercept::process::raise_file_limit()?;
    let (me, meshd) = planes::programs()?;
    let lab = Lab::build(&["client", "service"])?;
    // Connections that ended keep their port for a minute: there have to be enough.
    let range = || std::fs::write("/proc/sys/net/ipv4/ip_local_port_range", "10000 65535");
    lab.hosts().iter().try_for_each(|host| host.within(range).map(|_| ()))?;
    let certificates = lab.dir().join("certificates");
    std::fs::create_dir(&certificates)?;
    certificates::write(&certificates)?;
    let world = World { lab, me, meshd: cli.meshd.clone().unwrap_or(meshd), certificates };
    let wanted = if cli.planes.is_empty() { Plane::value_variants() } else { &cli.planes };
    let (mut planes, mut missing) = (Vec::new(), 0);
    for plane in wanted {
        match plane.missing(&world) {
            None => planes.push(*plane),
            Some(why) => {
                missing += 1;
                eprintln!("LEFT OUT {}: {why}", name(plane));
            }
        }
    }
    let loads = if cli.loads.is_empty() { Load::value_variants() } else { &cli.loads };
    if let Some(dir) = cli.results.parent() {
        std::fs::create_dir_all(dir)?;
    }
    let mut results = std::fs::File::create(&cli.results).with_context(|| format!("cannot write {}", cli.results.display()))?;
    let mut all = Vec::new();
    for round in 1..=cli.rounds {
        for plane in &planes {
            eprintln!("round {round} of {}: {}", cli.rounds, name(plane));
            let running = match plane.start(&world) {
                Ok(running) => running,
                Err(why) => {
                    missing += 1;
                    eprintln!("LEFT OUT {} in this round: it does not start: {why:#}", name(plane));
                    continue;
                }
            };
            let mut found = Vec::new();
            if cli.held > 0 && *plane != Plane::Direct {
                found.push((
                    String::from("memory"),
                    Outcome::default(),
                    0.0,
                    Some(memory(&world, &running, cli, &format!("hold-{}-{round}", name(plane)))?),
                ));
            }
            for load in loads {
                match run(&world, &running, *load, cli.seconds) {
                    Ok((outcome, cpu)) => found.push((name(load), outcome, cpu, None)),
                    Err(why) => {
                        missing += 1;
                        eprintln!("LEFT OUT {} over {} in this round: {why:#}", name(load), name(plane));
                    }
                }
            }
            for (load, outcome, cpu, memory) in found {
                let measurement = Measurement { round, plane: name(plane), load, outcome, cpu, memory };
                writeln!(results, "{}", serde_json::to_string(&measurement)?)?;
                all.push(measurement);
            }
        }
    }
    println!("{}\n{}", report::tables(&all), report::targets(&all));
    if missing > 0 {
        println!("{missing} left out");
    }
    println!("Every measurement is in {}.", cli.results.display());
    Ok(())
}

/// The name on the command line.
fn name(value: &impl ValueEnum) -> String {
    value.to_possible_value().map(|v| v.get_name().to_owned()).unwrap_or_default()
}

fn client(world: &World) -> &Host {
    &world.lab.hosts()[0]
}

fn run(world: &World, running: &Running, load: Load, seconds: u64) -> Result<(Outcome, f64)> {
    let cpu = || Ok::<f64, anyhow::Error>(running.client.cpu()? + running.server.cpu()?);
    let before = cpu()?;
    let mut command = Command::new(&world.me);
    command.args(["role", "load", &name(&load), &running.target.to_string(), &seconds.to_string()]);
    let output = client(world).output(&mut command, Duration::from_secs(seconds + 60))?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok((serde_json::from_slice(&output.stdout)?, cpu()? - before))
}

/// `log` is where those who hold the connections write; nobody else does.
fn memory(world: &World, running: &Running, cli: &Cli, log: &str) -> Result<Memory> {
    let both = || Ok::<_, anyhow::Error>((running.client.memory()?, running.server.memory()?));
    let idle = both()?;
    let mut command = Command::new(&world.me);
    command.args(["role", "hold", &running.target.to_string(), &cli.held.to_string(), &cli.rest.to_string()]);
    let mut process = client(world).spawn(&mut command, log)?;
    let mut said = |number: usize| loop {
        ensure!(process.running(), "the connections could not be held: {}", process.log());
        if let Some(line) = process.log().lines().nth(number) {
            return Ok(line.to_owned());
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    ensure!(said(0)? == load::HELD, "the connections could not be held");
    // What opening them needed is over.
    std::thread::sleep(Duration::from_secs(2));
    let held = both()?;
    let slowest = said(1)?;
    let slowest = slowest.parse().with_context(|| format!("after their rest: {slowest}"))?;
    Ok(Memory { idle, held, count: cli.held as usize, slowest })
}
