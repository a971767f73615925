//! The clients: each workload is one run against one address, in a process of its own on the client's host.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout};

use crate::serve::{ANSWER, ANSWER_ONCE, BLOCK, REPLY, REQUEST, SINK, SOURCE};

/// What is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Load {
    /// One stream of bytes to the service.
    Bulk1,
    /// Eight at once.
    Bulk8,
    /// A connection for each request, 32 at a time.
    Short,
    /// 1,000 requests a second over 16 connections, whether answers come or not: latency counts from when a request was due.
    Fixed,
    /// Requests over 32 connections, as fast as answers come.
    Saturated,
    /// A connection for each of 200 requests a second, beside 80 downloads that nobody reads.
    Beside,
}

/// What came of it.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(crate) struct Outcome {
    /// Seconds it took.
    pub(crate) seconds: f64,
    /// Bytes, or requests that were answered.
    pub(crate) done: u64,
    /// Connections or requests that failed, or took longer than a second where that counts.
    pub(crate) failed: u64,
    /// Half of the latencies were at most this, in microseconds.
    pub p50: f64,
    /// 99 of 100 were.
    pub p99: f64,
}

/// A request may take so long until it counts as failed.
const PATIENCE: Duration = Duration::from_secs(1);

impl Load {
    /// Runs it against `to` for `time`.
    ///
    /// # Errors
    /// When nothing can be measured at all.
    pub(crate) async fn run(self, to: SocketAddr, time: Duration) -> Result<Outcome> {
        match self {
            Self::Bulk1 => bulk(to, time, 1).await,
            Self::Bulk8 => bulk(to, time, 8).await,
            Self::Short => closed(to, time, 32, true).await,
            Self::Saturated => closed(to, time, 32, false).await,
            Self::Fixed => fixed(to, time).await,
            Self::Beside => beside(to, time).await,
        }
    }
}

async fn dial(to: SocketAddr, wish: u8) -> std::io::Result<TcpStream> {
    let mut stream = TcpStream::connect(to).await?;
    stream.set_nodelay(true)?;
    stream.write_all(&[wish]).await?;
    Ok(stream)
}

async fn request(stream: &mut TcpStream) -> std::io::Result<()> {
    stream.write_all(&[b'?'; REQUEST]).await?;
    stream.read_exact(&mut [0; REPLY]).await.map(|_| ())
}

async fn bulk(to: SocketAddr, time: Duration, streams: usize) -> Result<Outcome> {
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    for _ in 0..streams {
        tasks.spawn(async move {
            let mut stream = dial(to, SINK).await?;
            let (block, mut sent) = (vec![0x5a; BLOCK], 0);
            while begun.elapsed() < time {
                stream.write_all(&block).await?;
                sent += 1;
            }
            // Not until the service has them all.
            stream.read_exact(&mut vec![0; sent]).await?;
            Ok::<_, std::io::Error>((sent * BLOCK) as u64)
        });
    }
    let mut outcome = Outcome::default();
    while let Some(done) = tasks.join_next().await {
        outcome.done += done??;
    }
    outcome.seconds = begun.elapsed().as_secs_f64();
    Ok(outcome)
}

async fn closed(to: SocketAddr, time: Duration, clients: usize, anew: bool) -> Result<Outcome> {
    let (begun, failed) = (Instant::now(), Arc::new(AtomicU64::new(0)));
    let mut tasks = JoinSet::new();
    for _ in 0..clients {
        let failed = failed.clone();
        tasks.spawn(async move {
            let (mut latencies, mut open) = (Vec::new(), None);
            while begun.elapsed() < time {
                let asked = Instant::now();
                let one = async {
                    let mut stream = match open.take() {
                        Some(stream) => stream,
                        None => dial(to, if anew { ANSWER_ONCE } else { ANSWER }).await?,
                    };
                    request(&mut stream).await?;
                    match anew {
                        true => stream.read(&mut [0]).await.map(|_| None),
                        false => Ok(Some(stream)),
                    }
                };
                match one.await {
                    Ok(stream) => {
                        open = stream;
                        latencies.push(asked.elapsed());
                    }
                    Err(_) => _ = failed.fetch_add(1, Ordering::Relaxed),
                }
            }
            latencies
        });
    }
    let latencies = tasks.join_all().await.concat();
    Ok(summary(begun, latencies, failed.load(Ordering::Relaxed)))
}

async fn fixed(to: SocketAddr, time: Duration) -> Result<Outcome> {
    const CONNECTIONS: u32 = 16;
    const EACH: Duration = Duration::from_millis(CONNECTIONS as u64);
    let mut streams = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut stream = dial(to, ANSWER).await.context("the first connection")?;
        request(&mut stream).await.context("the first request")?;
        streams.push(stream);
    }
    let begun = Instant::now() + Duration::from_millis(20);
    let mut tasks = JoinSet::new();
    for (number, mut stream) in (0..).zip(streams) {
        tasks.spawn(async move {
            let (mut due, mut latencies, mut failed) = (begun + EACH * number / CONNECTIONS, Vec::new(), 0);
            while due < begun + time {
                sleep_until(due).await;
                match request(&mut stream).await {
                    Ok(()) => latencies.push(due.elapsed()),
                    Err(_) => {
                        failed += 1;
                        break;
                    }
                }
                due += EACH;
            }
            (latencies, failed)
        });
    }
    let done = tasks.join_all().await;
    let failed = done.iter().map(|(_, failed)| failed).sum();
    Ok(summary(begun, done.into_iter().flat_map(|(latencies, _)| latencies).collect(), failed))
}

async fn beside(to: SocketAddr, time: Duration) -> Result<Outcome> {
    const UNREAD: usize = 80;
    const EACH: Duration = Duration::from_millis(5);
    let mut held = Vec::new();
    for _ in 0..UNREAD {
        held.push(dial(to, SOURCE).await.context("a download")?);
    }
    tokio::time::sleep(Duration::from_millis(500)).await;
    let begun = Instant::now();
    let mut tasks = JoinSet::new();
    let mut due = begun;
    while due < begun + time {
        sleep_until(due).await;
        tasks.spawn(async move {
            let one = async {
                let mut stream = dial(to, ANSWER_ONCE).await?;
                request(&mut stream).await
            };
            matches!(timeout(PATIENCE, one).await, Ok(Ok(()))).then(|| due.elapsed())
        });
        due += EACH;
    }
    let (ok, failed): (Vec<_>, Vec<_>) = tasks.join_all().await.into_iter().partition(Option::is_some);
    drop(held);
    Ok(summary(begun, ok.into_iter().flatten().collect(), failed.len() as u64))
}

/// What [`hold`] says when all connections are open.
pub(crate) const HELD: &str = "held";

/// Opens `count` connections that have each carried a request, says so on standard output, asks each once more after they have rested for
/// so long, one after the other, says in how many microseconds the slowest answered, and holds them until the process is ended.
///
/// # Errors
/// When one cannot be opened, or is gone when it is asked again.
pub(crate) async fn hold(to: SocketAddr, count: usize, rest: Duration) -> Result<()> {
    let mut held = Vec::new();
    for _ in 0..count {
        let mut stream = dial(to, ANSWER).await.with_context(|| format!("connection {}", held.len()))?;
        request(&mut stream).await.with_context(|| format!("the request of connection {}", held.len()))?;
        held.push(stream);
    }
    println!("{HELD}");
    tokio::time::sleep(rest).await;
    let mut slowest = Duration::ZERO;
    for (number, stream) in held.iter_mut().enumerate() {
        let asked = Instant::now();
        request(stream).await.with_context(|| format!("the second request of connection {number}"))?;
        slowest = slowest.max(asked.elapsed());
    }
    println!("{}", slowest.as_micros());
    tokio::time::sleep(Duration::from_secs(3600)).await;
    Ok(())
}

fn summary(begun: Instant, mut latencies: Vec<Duration>, failed: u64) -> Outcome {
    let seconds = begun.elapsed().as_secs_f64();
    latencies.sort_unstable();
    let at = |share: f64| latencies.get((latencies.len() as f64 * share) as usize).map_or(0.0, |d| d.as_secs_f64() * 1e6);
    Outcome { seconds, done: latencies.len() as u64, failed, p50: at(0.5), p99: at(0.99) }
}
