//! Where this node's SVIDs come from: its own root key when it is an authority, another authority otherwise.
//!
//! Owns the request, the proof of possession, and the check that what came back is what was asked for. Decides no names: the authority does.

use std::sync::Arc;
use std::time::Duration;

use meshd_ca::identity::{SpiffeId, Workload};
use meshd_ca::issue::Leaf;
use meshd_ca::keys::PrivateKey;
use meshd_ca::roster::Member;
use meshd_ca::verify::verify_svid;
use rustls_pki_types::CertificateDer;
use thiserror::Error;

use super::link::{LinkError, Links};
use super::serve::{MAX_SVIDS, SvidAnswer, SvidRequest, Wanted, possession};
use crate::clock::Clock;
use crate::identity::svids::Issuance;
use crate::membership::{Membership, MembershipError};

/// How often, and in what steps, it is looked whether an address of the authority has become known.
const FIRST_WORD: usize = 40;
const STEP: Duration = Duration::from_millis(50);

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
}

impl Issuance for Authorities {
    type Error = IssuanceError;

    async fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, IssuanceError> {
        let me = self.membership.me();
        if self.membership.is_authority().await {
            let wanted: Vec<_> = wanted.iter().map(|(w, k)| (w.clone(), *k.public())).collect();
            return Ok(self.membership.issue(me, &wanted, self.lifetime).await?);
        }
        let mut leaves = Vec::with_capacity(wanted.len());
        for some in wanted.chunks(MAX_SVIDS) {
            leaves.extend(self.ask(some).await?);
        }
        Ok(leaves)
    }
}

impl Authorities {
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
        let mut failure = IssuanceError::NoAuthority;
        let authorities: Vec<_> = self.membership.roster().authorities().map(Member::node).filter(|n| *n != me).collect();
        for authority in authorities {
            // Just after the start nobody has told us yet where the authority is; that is no failure.
            for _ in 0..FIRST_WORD {
                if self.links.knows(authority) {
                    break;
                }
                tokio::time::sleep(STEP).await;
            }
            match self.links.post(authority, "/v1/svid", body.clone()).await {
                Ok(answer) => return self.read(&request, &answer),
                Err(error @ LinkError::Refused(..)) => failure = IssuanceError::Refused(error),
                Err(error) => failure = IssuanceError::Unreachable(error),
            }
        }
        Err(failure)
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
            // Our own clock may be slow: an SVID that has just been issued is not refused for beginning in our future.
            let der = CertificateDer::from(certificate.0);
            let peer =
                verify_svid(std::slice::from_ref(&der), &bundle, &roster, self.clock.now()).map_err(|e| wrong(&e.to_string()))?;
            let expected = SpiffeId::new(roster.trust_domain().clone(), wanted.workload.clone());
            if peer.id != expected || peer.holder != self.membership.me() {
                return Err(wrong("a certificate for somebody else"));
            }
            Ok(Some(Leaf { der: der.to_vec(), id: peer.id, not_before: self.clock.now(), not_after: peer.not_after }))
        };
        request.wanted.iter().zip(answer.leaves).map(check).collect()
    }
}
