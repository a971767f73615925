//! Where this node's SVIDs come from: its own root key when it is an authority that signs, another authority otherwise.
//!
//! Owns the request, the proof of possession, which authority is asked first and which is left alone for a while because it failed, and the
//! check that what came back is what was asked for. Decides no names: the authority does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use meshd_ca::identity::{NodeId, SpiffeId, Workload};
use meshd_ca::issue::{IssueError, Leaf};
use meshd_ca::keys::{PrivateKey, sha256};
use meshd_ca::roster::Member;
use meshd_ca::verify::verify_svid;
use rustls_pki_types::CertificateDer;
use thiserror::Error;
use tokio::time::{Instant, timeout};

use super::link::{LinkError, Links};
use super::serve::{MAX_SVIDS, SvidAnswer, SvidRequest, Wanted, possession};
use crate::clock::Clock;
use crate::identity::svids::Issuance;
use crate::membership::{Membership, MembershipError};

/// How often, and in what steps, it is looked whether an address of the authority has become known.
const FIRST_WORD: usize = 40;
const STEP: Duration = Duration::from_millis(50);

/// How long an authority may take while there is another one to be asked: dead hosts answer nothing at all.
const ONE: Duration = Duration::from_secs(4);
/// How long one that failed is asked after the others; doubled with each further failure.
const FIRST_PAUSE: Duration = Duration::from_secs(5);
const LONGEST_PAUSE: Duration = Duration::from_secs(600);

/// Why an SVID could not be had.
#[derive(Debug, Error)]
pub(crate) enum IssuanceError {
    /// This node is an authority and could not issue.
    #[error(transparent)]
    Own(#[from] MembershipError),
    /// No authority answers.
    #[error("no authority answers: {0}")]
    Unreachable(LinkError),
    /// The authority answers, and says no.
    #[error("the authority says no: {0}")]
    Refused(LinkError),
    /// One of them took too long, and so did the others.
    #[error("no authority answers in time, {0} neither")]
    Silent(NodeId),
    /// No other member is an authority.
    #[error("no authority is known")]
    NoAuthority,
    /// The authority sent something else than what was asked for.
    #[error("the authority's answer is not what was asked for: {0}")]
    Answer(String),
    /// A key could not sign.
    #[error(transparent)]
    Key(#[from] meshd_ca::keys::KeyError),
}

/// Asks for SVIDs, wherever they are to be had.
pub(crate) struct Authorities {
    pub(crate) membership: Arc<Membership>,
    pub(crate) links: Arc<Links>,
    pub(crate) clock: Clock,
    /// How long SVIDs live that this node issues to itself.
    pub(crate) lifetime: Duration,
    /// Whether a node is heard.
    pub(crate) hears: Box<dyn Fn(NodeId) -> bool + Send + Sync>,
    pub(crate) failures: Failures,
}

/// The authorities that failed lately: how often in a row, and until when they are asked last.
#[derive(Default)]
pub(crate) struct Failures(Mutex<HashMap<NodeId, (u32, Instant)>>);

impl Failures {
    fn note(&self, node: NodeId, failed: bool, now: Instant) {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if failed {
            let times = all.get(&node).map_or(0, |(times, _)| *times);
            let pause = FIRST_PAUSE.saturating_mul(1 << times.min(16)).min(LONGEST_PAUSE);
            all.insert(node, (times + 1, now + pause));
        } else {
            all.remove(&node);
        }
    }

    /// Authorities in the order in which `me` asks them: those that failed lately last, those that are heard first, and among equals
    /// each node in another order, but always the same, so that the work is shared.
    fn order(&self, mut nodes: Vec<NodeId>, me: NodeId, hears: impl Fn(NodeId) -> bool, now: Instant) -> Vec<NodeId> {
        let all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let failed = |node: &NodeId| all.get(node).map(|(_, until)| *until).filter(|until| *until > now);
        nodes.sort_by_cached_key(|node| (failed(node), !hears(*node), sha256(&[me.as_bytes(), node.as_bytes()])));
        nodes
    }
}

impl Issuance for Authorities {
    type Error = IssuanceError;

    async fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, IssuanceError> {
        let me = self.membership.me();
        if self.membership.signs().borrow().is_some() {
            let own: Vec<_> = wanted.iter().map(|(w, k)| (w.clone(), *k.public())).collect();
            match self.membership.issue(me, &own, self.lifetime).await {
                // Its root has ended before another one could take its place: others may help.
                Err(MembershipError::Issue(IssueError::RootNotInDate)) if !self.others().is_empty() => {}
                issued => return Ok(issued?),
            }
        }
        let mut leaves = Vec::with_capacity(wanted.len());
        for some in wanted.chunks(MAX_SVIDS) {
            leaves.extend(self.ask(some).await?);
        }
        Ok(leaves)
    }
}

impl Authorities {
    /// The other authorities.
    fn others(&self) -> Vec<NodeId> {
        let me = self.membership.me();
        self.membership.roster().authorities().map(Member::node).filter(|n| *n != me).collect()
    }

    async fn ask(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, IssuanceError> {
        let me = self.membership.me();
        let wanted = wanted
            .iter()
            .map(|(workload, key)| {
                Ok(Wanted { workload: workload.clone(), key: *key.public(), proof: key.sign(&possession(me, workload))? })
            })
            .collect::<Result<Vec<_>, IssuanceError>>()?;
        let request = SvidRequest { wanted };
        let body = serde_json::to_vec(&request).map_err(|e| IssuanceError::Answer(e.to_string()))?;
        let order = self.failures.order(self.others(), me, &self.hears, Instant::now());
        let (mut failure, mut left) = (IssuanceError::NoAuthority, order.len());
        for authority in order {
            left -= 1;
            let asked = self.ask_one(authority, body.clone());
            // The last one has all the time there is.
            let answer = if left == 0 { Ok(asked.await) } else { timeout(ONE, asked).await };
            // An answer that is of no use is a failure like any other: its clock may be the one that is wrong.
            let leaves = match answer {
                Ok(Ok(answer)) => self.read(&request, &answer),
                Ok(Err(error @ LinkError::Refused(..))) => Err(IssuanceError::Refused(error)),
                Ok(Err(error)) => Err(IssuanceError::Unreachable(error)),
                Err(_) => Err(IssuanceError::Silent(authority)),
            };
            self.failures.note(authority, leaves.is_err(), Instant::now());
            failure = match leaves {
                Ok(leaves) => return Ok(leaves),
                Err(error) => error,
            };
            tracing::debug!(%authority, error = %failure, others = left, "an authority did not issue");
        }
        Err(failure)
    }

    async fn ask_one(&self, authority: NodeId, body: Vec<u8>) -> Result<bytes::Bytes, LinkError> {
        // Just after the start nobody has told us yet where the authority is; that is no failure.
        for _ in 0..FIRST_WORD {
            if self.links.knows(authority) {
                break;
            }
            tokio::time::sleep(STEP).await;
        }
        self.links.post(authority, "/v1/svid", body).await
    }

    fn read(&self, request: &SvidRequest, answer: &[u8]) -> Result<Vec<Option<Leaf>>, IssuanceError> {
        let wrong = |what: &str| IssuanceError::Answer(what.into());
        let answer: SvidAnswer = serde_json::from_slice(answer).map_err(|e| wrong(&e.to_string()))?;
        if answer.leaves.len() != request.wanted.len() {
            return Err(wrong("another number of certificates"));
        }
        let roster = self.membership.roster();
        let bundle = roster.bundle();
        let check = |(wanted, certificate): (&Wanted, super::serve::Certificate)| {
            if certificate.0.is_empty() {
                return Ok(None);
            }
            let der = CertificateDer::from(certificate.0);
            let peer = verify_svid(std::slice::from_ref(&der), &bundle, &roster, self.clock.now()).map_err(|e| {
                // Issued just now, and of another time: the authority's clock is not ours.
                self.clock.doubt();
                wrong(&e.to_string())
            })?;
            let expected = SpiffeId::new(roster.trust_domain().clone(), wanted.workload.clone());
            if peer.id != expected || peer.holder != self.membership.me() {
                return Err(wrong("a certificate for somebody else"));
            }
            Ok(Some(Leaf { der: der.to_vec(), id: peer.id, not_before: self.clock.now(), not_after: peer.not_after }))
        };
        request.wanted.iter().zip(answer.leaves).map(check).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn who_failed_is_asked_last_for_a_while_and_longer_each_time() {
        let node = |n: u8| NodeId::from_bytes([n; 16]);
        let (me, all) = (node(9), vec![node(1), node(2), node(3)]);
        let failures = Failures::default();
        let order = |heard: &[NodeId]| failures.order(all.clone(), me, |n| heard.contains(&n), Instant::now());
        let usual = order(&all);
        assert_eq!(order(&all), usual, "always the same");
        let of_others: std::collections::BTreeSet<_> =
            (10..40).map(|n| failures.order(all.clone(), node(n), |_| true, Instant::now())[0]).collect();
        assert_eq!(of_others.len(), 3, "the work is shared");
        assert_eq!(order(&[usual[2]])[0], usual[2], "one that is heard comes first");
        let moment = Duration::from_millis(1);
        let mut pause = FIRST_PAUSE;
        for _ in 0..20 {
            failures.note(usual[0], true, Instant::now());
            assert_eq!(order(&all)[2], usual[0]);
            assert_eq!(order(&usual[..1])[2], usual[0], "also when it is the only one heard");
            tokio::time::advance(pause - moment).await;
            assert_eq!(order(&all)[2], usual[0]);
            tokio::time::advance(2 * moment).await;
            assert_eq!(order(&all), usual);
            pause = (2 * pause).min(LONGEST_PAUSE);
        }
        // All failed: the one whose pause is over first.
        usual.iter().rev().for_each(|n| failures.note(*n, true, Instant::now()));
        assert_eq!(order(&all)[2], usual[0]);
        failures.note(usual[0], false, Instant::now());
        assert_eq!(order(&all)[0], usual[0], "one answer and all is forgotten");
    }
}
