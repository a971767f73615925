//! Finds the first way back to the others: knocks at every address that might be a member's, until somebody answers.
//!
//! Once one link is open, records and gossip say where everybody is, and knocking stops by itself. Every address is a hint; what answers
//! proves who it is.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::source::mdns::tag_matches;

use super::{Daemon, Member, acquire};
use crate::task::Tasks;

/// How often, while nobody is heard: soon at first, then at leisure.
const PAUSES: [Duration; 6] = [
    Duration::from_millis(100),
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// Addresses knocked at in one round.
const MAX_ADDRESSES: usize = 64;

/// Knocks for ever. `first` is tried before everything else, for instance the address the join went through.
pub(crate) async fn knock(daemon: Arc<Daemon>, member: Arc<Member>, first: Vec<SocketAddr>) {
    // Whoever answers asks at once who we are: have an answer.
    let mut catalog = member.watch_catalog();
    let _ = catalog.wait_for(|c| c.record(member.me()).is_some()).await;
    let mut rounds = 0;
    loop {
        let lonely = member.membership.roster().active().count() > 1 && member.links.linked().is_empty();
        if lonely {
            round(&daemon, &member, &first).await;
            rounds += 1;
        } else {
            rounds = 0;
        }
        tokio::time::sleep(PAUSES[rounds.min(PAUSES.len() - 1)]).await;
    }
}

async fn round(daemon: &Daemon, member: &Member, first: &[SocketAddr]) {
    let mesh = member.membership.roster().mesh();
    let seen = daemon.lan().seen();
    let ours = seen.into_iter().filter(|s| s.tag.is_some_and(|t| tag_matches(mesh, &t)));
    let on_lan: Vec<SocketAddr> = ours.flat_map(|s| s.addresses).collect();
    let configured = acquire::peer_addresses(&daemon.config()).await;
    let catalog = member.catalog();
    let own = member.own_addresses();
    let mut all: Vec<SocketAddr> = first.iter().copied().chain(configured).chain(on_lan).collect();
    for record in catalog.records().map(|r| r.record()) {
        all.extend(record.addresses.iter().map(|a| SocketAddr::new(a.ip, record.port)));
    }
    let mut tried = BTreeSet::new();
    all.retain(|a| !own.contains(&a.ip()) && tried.insert(*a));
    all.truncate(MAX_ADDRESSES);
    let mut knocks = Tasks::new();
    for address in all {
        let links = member.links.clone();
        knocks.spawn(async move {
            match links.prove(address).await {
                Ok(owner) => tracing::debug!(%address, node = %owner, "a member answers"),
                Err(error) => tracing::debug!(%address, %error, "nobody of this mesh answers"),
            }
        });
    }
    while knocks.join_next().await.is_some() {
        if !member.links.linked().is_empty() {
            return;
        }
    }
}
