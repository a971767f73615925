//! The same conversation for a whole mesh ([`crate::merge`]): nobody is admitted by it, the hosts of that mesh are invited.
//!
//! `H` names a token for a mesh, `C` is as ever, `P` has the MAC, which is over its own body too, and in JSON who the hosts are; `W` the MAC of the
//! authority and what that means there. The token is used by whoever proves to have it first, and by nobody else afterwards.

use std::collections::BTreeSet;

use super::*;
use crate::merge::{Answer, INVITED, MAX_OFFER, Mesh, Offer};
use crate::token::MergeToken;

impl Proofs {
    fn of_offer(&self, said: &Transcript, body: &[u8]) -> [u8; 32] {
        mac(&self.joiner, &[b"m", &self.binding, &said.hash(), &sha256(&[body])])
    }
}

/// The side of the mesh that wants to move, in one connection.
pub struct Suitor {
    token: MergeToken,
    offer: Vec<u8>,
    channel: Channel,
    said: Transcript,
    state: State,
}

enum State {
    Greeted,
    Offered(Box<Proofs>),
    Over,
}

impl Suitor {
    /// Begins; `name` is the own one. Returns the first message too.
    ///
    /// # Errors
    /// As [`Joiner::start`].
    pub fn start(token: MergeToken, channel: Channel, name: HostName, offer: &Offer) -> Result<(Self, Vec<u8>), JoinError> {
        let node = channel.theirs.node_id();
        if channel.mine == channel.theirs {
            return Err(JoinError::OwnToken);
        }
        if !same(node.as_bytes(), &token.token().pin) {
            return Err(JoinError::WrongAuthority(node));
        }
        let (method, id) = (Method::Merge, Some(token.token().id));
        let hello = Hello { method, token: id, nonce: random::<32>()?.to_vec(), name, past: 0, leaves: None };
        let message = encode(HELLO, &hello);
        let mut said = Transcript::default();
        said.add(&message);
        // Strings and numbers only: writing them to memory cannot fail.
        let offer = serde_json::to_vec(offer).unwrap_or_default();
        Ok((Self { token, offer, channel, said, state: State::Greeted }, message))
    }

    /// Longest message that may come next, in bytes.
    pub fn limit(&self) -> usize {
        if matches!(self.state, State::Offered(_)) { MAX_OFFER } else { MAX_MESSAGE }
    }

    /// Takes the authority's next message.
    ///
    /// # Errors
    /// Why the hosts are not invited; a second call after that, or after the end, is [`JoinError::Protocol`].
    pub fn receive(&mut self, message: &[u8]) -> Result<Step<Answer>, JoinError> {
        let state = std::mem::replace(&mut self.state, State::Over);
        if message.first() == Some(&REFUSAL) && !matches!(state, State::Over) {
            return Err(JoinError::Refused(decode(message, REFUSAL)?));
        }
        match state {
            State::Greeted => self.offer(message),
            State::Offered(proofs) => self.believe(message, &proofs).map(Step::Done),
            State::Over => Err(JoinError::Protocol),
        }
    }

    fn offer(&mut self, message: &[u8]) -> Result<Step<Answer>, JoinError> {
        let challenge: Challenge = decode(message, CHALLENGE)?;
        let token = self.token.token();
        if challenge.mesh != Some(token.mesh) {
            return Err(JoinError::WrongMesh);
        }
        self.said.add(message);
        let Channel { exporter, mine, theirs } = &self.channel;
        let proofs = Proofs::new(&token.secret[..], token.mesh, exporter, mine, theirs);
        let proof = [&[PROOF][..], &proofs.of_offer(&self.said, &self.offer), &self.offer].concat();
        self.said.add(&proof);
        self.state = State::Offered(Box::new(proofs));
        Ok(Step::Send(proof))
    }

    fn believe(&self, message: &[u8], proofs: &Proofs) -> Result<Answer, JoinError> {
        let (proof, body) = body(message, WELCOME, MAX_OFFER)?.split_first_chunk::<32>().ok_or(JoinError::Protocol)?;
        if !same(proof, &proofs.of_authority(&self.said, body)) {
            return Err(JoinError::WrongProof);
        }
        let answer: Answer = serde_json::from_slice(body).map_err(|_| JoinError::Protocol)?;
        if answer.mesh.id != self.token.token().mesh {
            return Err(JoinError::WrongMesh);
        }
        Ok(answer)
    }
}

impl Admission {
    /// Whether this node may use a token for a mesh now: it was not used, or by this very node, which lost the answer.
    pub(super) fn merging(
        &self,
        token: TokenId,
        authority: &mut dyn Authority,
        now: UnixTime,
    ) -> Result<Zeroizing<[u8; 20]>, JoinError> {
        let again = may_repeat(authority.roster(), self.channel.theirs.node_id()).then_some(self.channel.theirs.node_id());
        let tokens = authority.tokens();
        let secret = tokens.usable(token, again, now).cloned().map_err(refusal)?;
        match tokens.merge(token) {
            Some(_) => Ok(secret),
            None => Err(JoinError::Refused(Reason::ForHost)),
        }
    }

    /// Hears who the hosts of another mesh are, and invites them.
    pub(super) fn invite(
        &mut self,
        message: &[u8],
        token: TokenId,
        wish: &Wish,
        authority: &mut dyn Authority,
        now: UnixTime,
    ) -> Result<Step<Admitted>, JoinError> {
        let secret = self.merging(token, authority, now)?;
        let (proof, offer) = body(message, PROOF, MAX_OFFER)?.split_first_chunk::<32>().ok_or(JoinError::Protocol)?;
        let Channel { exporter, mine, theirs } = &self.channel;
        let node = theirs.node_id();
        let proofs = Proofs::new(&secret[..], authority.roster().mesh(), exporter, theirs, mine);
        if !same(proof, &proofs.of_offer(&self.said, offer)) {
            authority.tokens().failed(token);
            return Err(JoinError::Refused(Reason::WrongProof));
        }
        let offer: Offer = serde_json::from_slice(offer).map_err(|_| JoinError::Protocol)?;
        let (roster, refused) = (authority.roster(), |reason| Err(JoinError::Refused(reason)));
        let here = Mesh::of(roster);
        if offer.from == here {
            return refused(Reason::SameMesh);
        }
        let banished = |node| roster.member(node).is_some_and(|m| matches!(m.standing, Standing::Banished | Standing::Replaced));
        let out: BTreeSet<NodeId> = offer.hosts.iter().map(|h| h.node).filter(|n| banished(*n)).collect();
        let coming: Vec<_> = offer.hosts.into_iter().filter(|h| !out.contains(&h.node)).collect();
        let renamed = roster.renamed(&coming);
        let members = u32::try_from(roster.active().count()).unwrap_or(u32::MAX);
        let trust_domain = roster.trust_domain().clone();
        let mut nodes: Vec<NodeId> = coming.into_iter().map(|h| h.node).collect();
        nodes.sort_unstable();
        nodes.dedup();
        let invitation = authority.tokens().merge(token).ok_or(JoinError::Refused(Reason::ForHost))?;
        if invitation.from.is_none() && nodes.len() > invitation.limit as usize {
            return refused(Reason::TooMany);
        }
        if invitation.from.is_some_and(|from| from != offer.from) {
            return refused(Reason::Used);
        }
        if !offer.look {
            authority.tokens().invite(token, node, offer.from, nodes.clone(), now + INVITED);
        }
        let invitation = authority.tokens().merge(token).ok_or(JoinError::Refused(Reason::ForHost))?;
        // What stands is what counts: the first time, if it was asked again.
        let (until, nodes) = match invitation.from {
            Some(_) => (invitation.until, invitation.nodes.clone()),
            None => (now + INVITED, nodes),
        };
        let new = nodes.iter().filter(|n| !authority.roster().is_active(**n)).count();
        let invited = u32::try_from(new).unwrap_or(u32::MAX);
        let answer = Answer { mesh: here, trust_domain, members, until, invited, banished: out.into_iter().collect(), renamed };
        self.said.add(message);
        let body = encode(WELCOME, &answer);
        let proof = proofs.of_authority(&self.said, &body[1..]);
        let reply = [&[WELCOME][..], &proof, &body[1..]].concat();
        let brings = Some(if offer.look { 0 } else { invited });
        Ok(Step::Finish(reply, Admitted { node, name: wish.name.clone(), by_fleet: false, brings }))
    }
}

#[cfg(test)]
mod tests;
