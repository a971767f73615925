//! Finds the first way back to the others: knocks at every address that might be a member's, until somebody answers.
//!
//! Once one link is open, records and gossip say where everybody is. From then on it knocks, at leisure, where this mesh is announced by somebody
//! of whom nothing is known: he was let in while the network was parted, say, by an authority that has died since, and nobody else can tell of him.
//! Every address is a hint; what answers proves who it is.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use meshd_agent::source::mdns::tag_matches;
use tokio::time::Instant;

use super::{Daemon, Member, acquire};
use crate::task::Tasks;

/// How often, while nobody is heard: soon at first, then at leisure.
const PAUSES: [Duration; 5] = [
    Duration::from_millis(250),
    Duration::from_millis(500),
    Duration::from_secs(1),
    Duration::from_secs(2),
    Duration::from_secs(5),
];
/// How often it is looked, while somebody is heard, whether that is so.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is knocked at those of whom nothing is known, while somebody is heard.
const STRANGERS: Duration = Duration::from_secs(60);
/// Addresses knocked at in one round.
const MAX_ADDRESSES: usize = 64;

/// Knocks for ever. `first` is tried before everything else, for instance the address the join went through.
pub(crate) async fn knock(daemon: Arc<Daemon>, member: Arc<Member>, first: Vec<SocketAddr>) {
    // Whoever answers asks at once who we are: have an answer.
    let mut catalog = member.watch_catalog();
    let _ = catalog.wait_for(|c| c.record(member.me()).is_some()).await;
    let (mut rounds, mut greeted) = (0, Instant::now());
    loop {
        let lonely = || member.membership.roster().active().count() > 1 && member.links.linked().is_empty();
        if lonely() {
            let mut knocks = knock_at(&member, hints(&daemon, &member, &first).await);
            while knocks.join_next().await.is_some() && lonely() {}
            tokio::time::sleep(PAUSES[rounds]).await;
            rounds = (rounds + 1).min(PAUSES.len() - 1);
            continue;
        }
        rounds = 0;
        if greeted.elapsed() >= STRANGERS {
            greeted = Instant::now();
            let strangers = acquire::strangers(daemon.lan(), &member, member.mesh());
            let mut addresses: Vec<SocketAddr> = strangers.into_iter().flat_map(|s| s.addresses).collect();
            acquire::some_of(&mut addresses, MAX_ADDRESSES);
            let mut knocks = knock_at(&member, addresses);
            while knocks.join_next().await.is_some() {}
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Where a member may be, best first.
async fn hints(daemon: &Daemon, member: &Member, first: &[SocketAddr]) -> Vec<SocketAddr> {
    let mesh = member.mesh();
    let seen = daemon.lan().seen();
    let ours = seen.into_iter().filter(|s| s.tag.is_some_and(|t| tag_matches(mesh, &t)));
    let on_lan: Vec<SocketAddr> = ours.flat_map(|s| s.addresses).collect();
    let configured = acquire::peer_addresses(&daemon.config()).await;
    let mut all: Vec<SocketAddr> = first.iter().copied().chain(configured).chain(on_lan).collect();
    for record in member.catalog().records().map(|r| r.record()) {
        all.extend(record.addresses.iter().map(|a| SocketAddr::new(a.ip, record.port)));
    }
    all
}

/// Knocks at the first of these.
fn knock_at(member: &Member, mut addresses: Vec<SocketAddr>) -> Tasks<()> {
    let own = member.own_addresses();
    let mut tried = BTreeSet::new();
    addresses.retain(|a| !own.contains(&a.ip()) && tried.insert(*a));
    addresses.truncate(MAX_ADDRESSES);
    let mut knocks = Tasks::new();
    for address in addresses {
        let links = member.links.clone();
        knocks.spawn(async move {
            match links.prove(address).await {
                Ok(owner) => tracing::debug!(%address, node = %owner, "a member answers"),
                Err(error) => tracing::debug!(%address, %error, "nobody of this mesh answers"),
            }
        });
    }
    knocks
}
