//! Another node key for this host, while it carries traffic.
//!
//! The node key is who this process is, in everything it does. So the process does not change it: it has the key replaced, and then hands over to the next
//! one, which starts with the new key, as after an upgrade. Order, and where the plug may be pulled: the new key is on disk -> an authority signs that it has
//! the old one's place -> that is on disk, and from here on every start is one with the new key -> the next process takes over. When the authority has signed
//! and its answer is lost, this host hears of it from whomever it speaks to next (`control/link.rs`), and goes on from there by itself.

use hyper::StatusCode;

use super::{Daemon, before};
use crate::admin::local::No;
use crate::api::KeyRotated;
use crate::control::key;
use crate::control::link::LinkError;

/// `POST /v1/key`.
pub(crate) async fn rotate(daemon: &Daemon) -> Result<KeyRotated, No> {
    let no = |why: String, remedy: &str| No::new(StatusCode::CONFLICT, "the node key was not replaced", why, remedy);
    let member = daemon.member()?;
    if daemon.before.is_full() {
        let why = format!("{} older processes still have connections, and one more would be left", before::MAX_OLDER);
        return Err(no(why, "`meshd status` shows them; try again when one of them has ended"));
    }
    if member.membership.moves().is_some() {
        let why = "this mesh moves into another one, which was told of this host by the key that it has";
        return Err(no(why.into(), "`meshd status` says when it is there; then run the command again"));
    }
    let (membership, old) = (&member.membership, member.me());
    let next = membership.next_key().await.map_err(|e| no(e.to_string(), ""))?;
    let asked = key::ask(membership, &member.links, &next, |node| member.hears(node)).await;
    asked.map_err(|failed| match failed {
        None => no("there is no authority that could do it".into(), ""),
        Some(LinkError::Refused(_, _, why)) => no(why, ""),
        Some(error) => no(error.to_string(), "try again when an authority is in reach: `meshd authority list`"),
    })?;
    let node = next.public().node_id();
    tracing::info!(%old, new = %node, "this host has another node key: handing over to the process that has it");
    match daemon.upgrade().await {
        Ok(upgraded) => Ok(KeyRotated { old, node, upgraded }),
        Err(No(status, failed)) => Err(No::new(
            status,
            "the node key was replaced, and the process that has the new one did not start",
            failed.why.unwrap_or_default(),
            "it is tried again every 30 s; or restart meshd, which then starts with the new key",
        )),
    }
}
