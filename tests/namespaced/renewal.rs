//! SVIDs are renewed under load, and nobody notices.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::Instant;

use crate::support::equal;
use crate::support::mesh::Setup;
use crate::support::scenario::{Scenario, scenario};
use crate::support::traffic::{Server, connect, echo, sockets};

pub(crate) const SCENARIOS: &[Scenario] = &[scenario!("renewal", ten_thousand_connections_across_twenty_renewals)];

/// What must have happened before the load may end.
const CONNECTIONS: u64 = 10_000;
const RENEWALS: usize = 20;
/// By when it must.
const LIMIT: Duration = Duration::from_secs(300);
const CLIENTS: usize = 4;

fn ten_thousand_connections_across_twenty_renewals() -> Result<()> {
    let mesh = Setup::of(&["a", "b"]).configured("svid_lifetime = \"6s\"").start()?;
    let server = Server::echo(mesh.host("b"), 8000)?;
    // One connection is open all the time, over many lifetimes of the SVIDs it began with.
    let mut long = connect(mesh.host("a"), sockets(mesh.host("b"), 8000)[0])?;
    echo(&mut long, "from the beginning")?;
    let (done, count) = (AtomicBool::new(false), AtomicU64::new(0));
    let renewals = std::thread::scope(|scope| -> Result<usize> {
        let clients: Vec<_> = (0..CLIENTS)
            .map(|number| {
                let (mesh, done, count) = (&mesh, &done, &count);
                scope.spawn(move || -> Result<()> {
                    let targets = sockets(mesh.host("b"), 8000);
                    while !done.load(Ordering::Relaxed) {
                        let n = count.fetch_add(1, Ordering::Relaxed);
                        let mut stream = connect(mesh.host("a"), targets[number % 2])?;
                        echo(&mut stream, &format!("connection {n}"))?;
                        // Some 240 a second: more would use up the ports that wait out their time.
                        std::thread::sleep(Duration::from_millis(14));
                    }
                    Ok(())
                })
            })
            .collect();
        let (end, mut serials) = (Instant::now() + LIMIT, BTreeMap::<_, Vec<_>>::new());
        let mut fewest = 0;
        while Instant::now() < end && !clients.iter().any(|c| c.is_finished()) {
            for name in ["a", "b"] {
                for svid in mesh.at(name).identities()? {
                    ensure!(svid.expires_seconds >= 0, "{} of {name} is over", svid.workload);
                    let seen = serials.entry((name, svid.workload)).or_default();
                    if seen.last() != Some(&svid.serial) {
                        seen.push(svid.serial);
                    }
                }
            }
            echo(&mut long, "still there")?;
            // The most-renewed workload of each host is the one that is in use.
            let most = |name| serials.iter().filter(|((n, _), _)| *n == name).map(|(_, s)| s.len() - 1).max().unwrap_or(0);
            fewest = most("a").min(most("b"));
            if fewest >= RENEWALS && count.load(Ordering::Relaxed) >= CONNECTIONS {
                break;
            }
            std::thread::sleep(Duration::from_millis(300));
        }
        done.store(true, Ordering::Relaxed);
        for client in clients {
            client.join().map_err(|_| anyhow::anyhow!("a client died"))??;
        }
        Ok(fewest)
    })?;
    let count = count.load(Ordering::Relaxed);
    println!("{count} connections across {renewals} renewals");
    ensure!(count >= CONNECTIONS && renewals >= RENEWALS, "only {count} connections and {renewals} renewals");
    echo(&mut long, "to the end")?;
    drop(server);
    let failed: u64 =
        ["a", "b"].iter().map(|n| mesh.at(n).edges()).collect::<Result<Vec<_>>>()?.iter().flatten().map(|e| e.failed).sum();
    equal!(failed, 0, "failed connections that the edges show");
    Ok(())
}
