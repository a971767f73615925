//! The wire side of joining: carries the messages of `meshd_ca::join` over TLS, for the host that joins and for the authority.
//!
//! Decides nothing: what is believed, and when, is decided there. Owns timeouts, message limits and which address is tried next.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use meshd_ca::approval::ApprovalCode;
use meshd_ca::fleet::{FleetKey, Side};
use meshd_ca::identity::{HostName, MeshId, NodeId};
use meshd_ca::join::{Admission, Channel, EXPORTER_LABEL, JoinError, Joined, Joiner, Reason, Step, Suitor, Wish};
use meshd_ca::keys::PrivateKey;
use meshd_ca::merge::{Answer, Offer};
use meshd_ca::token::{JoinToken, MergeToken};
use rustls::{ClientConfig, ConnectionCommon};
use thiserror::Error;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::server::TlsStream;

use super::crowd::Crowd;
use super::frames;
use super::link::{DIAL_TIMEOUT, Dial};
use super::rewound::Rewound;
use super::waiting::Waiting;
use crate::identity::tls::NodeTls;
use crate::identity::verifier::peer_key;
use crate::membership::Membership;

/// How long the whole conversation may take.
const TIMEOUT: Duration = Duration::from_secs(15);
/// Joins in progress at once, and from one source.
const MAX_PENDING: usize = 32;
const MAX_PENDING_PER_SOURCE: usize = 8;

/// Why a join did not happen.
#[derive(Debug, Error)]
pub(crate) enum JoinFailure {
    /// No address of the mesh is known.
    #[error(
        "the token names no address and no mesh was seen on this network: make a token on a host that this one can reach, or give an address with `peers = [\"ADDRESS\"]`"
    )]
    NoAddress,
    /// Something on this host.
    #[error("{0}")]
    Local(String),
    /// Nobody answers.
    #[error("cannot reach {0}: {1}; is meshd running there, and is TCP port {port} open in its firewall?", port = .0.port())]
    Connect(SocketAddr, std::io::Error),
    /// It took too long.
    #[error("{0} did not finish the join in time")]
    Timeout(SocketAddr),
    /// The connection broke.
    #[error("the connection to {0} broke: {1}")]
    Broken(SocketAddr, std::io::Error),
    /// One of the two refused the other.
    #[error("{0}: {1}")]
    Refused(SocketAddr, JoinError),
}

/// What a host has that wants in.
#[derive(Clone, Copy)]
pub(crate) enum Ticket<'a> {
    Token(&'a JoinToken),
    /// Its own code, which a person may have typed in the mesh.
    Code(&'a ApprovalCode),
    /// The key of its fleet, whose mesh this is; and if it is in one of those already, which one it would leave.
    Fleet(MeshId, &'a FleetKey, Option<(Side, &'a Membership)>),
}

/// Joins a mesh through the first of `addresses` where the ticket is good.
///
/// # Errors
/// The most telling failure when none does: a refusal before a broken connection before an unreachable address.
pub(crate) async fn join(
    ticket: Ticket<'_>,
    addresses: &[SocketAddr],
    key: &PrivateKey,
    wish: &Wish,
    tls: Arc<ClientConfig>,
    dial: &dyn Dial,
) -> Result<Joined, JoinFailure> {
    let mut worst = JoinFailure::NoAddress;
    for &address in addresses {
        match timeout(TIMEOUT, join_at(address, ticket, key, wish, tls.clone(), dial)).await {
            Ok(Ok(joined)) => return Ok(joined),
            Ok(Err(failure)) => worst = more_telling(worst, failure),
            Err(_) => worst = more_telling(worst, JoinFailure::Timeout(address)),
        }
    }
    Err(worst)
}

/// Which of two failures says more about what is wrong; the later one if both say as much.
pub(crate) fn more_telling(a: JoinFailure, b: JoinFailure) -> JoinFailure {
    let rank = |f: &JoinFailure| match f {
        JoinFailure::NoAddress | JoinFailure::Local(_) => 0,
        JoinFailure::Connect(..) => 1,
        JoinFailure::Timeout(_) => 2,
        JoinFailure::Broken(..) => 3,
        JoinFailure::Refused(..) => 4,
    };
    if rank(&b) >= rank(&a) { b } else { a }
}

async fn join_at(
    address: SocketAddr,
    ticket: Ticket<'_>,
    key: &PrivateKey,
    wish: &Wish,
    tls: Arc<ClientConfig>,
    dial: &dyn Dial,
) -> Result<Joined, JoinFailure> {
    let broken = |e| JoinFailure::Broken(address, e);
    let (mut stream, channel) = connect(address, key, tls, dial).await?;
    let refused = |e| JoinFailure::Refused(address, e);
    let begun = match ticket {
        Ticket::Token(token) => Joiner::start(token.clone(), channel, wish.clone()),
        Ticket::Code(code) => Joiner::ask(code.clone(), channel, wish.clone()),
        Ticket::Fleet(mesh, key, own) => Joiner::of_fleet(mesh, key.clone(), own.map(|(side, _)| side), channel, wish.clone()),
    };
    let (mut joiner, first) = begun.map_err(refused)?;
    frames::send(&mut stream, &first).await.map_err(broken)?;
    let mut leaving = None;
    loop {
        let message = frames::receive(&mut stream, joiner.limit()).await.map_err(broken)?;
        match joiner.receive(&message).map_err(refused)? {
            Step::Send(reply) => {
                // From the proof on the others may count on us: nobody may be let in here who would then be alone.
                if let Ticket::Fleet(_, _, Some((side, own))) = ticket {
                    leaving = Some(own.begin_to_leave(side).await.ok_or_else(|| refused(JoinError::Stays))?);
                }
                frames::send(&mut stream, &reply).await.map_err(broken)?;
            }
            Step::Finish(reply, joined) => {
                frames::send(&mut stream, &reply).await.map_err(broken)?;
                return Ok(joined);
            }
            Step::Done(joined) => {
                if let Some(leaving) = leaving {
                    leaving.done();
                }
                return Ok(joined);
            }
        }
    }
}

/// A connection for a join, and what ties the conversation to it.
async fn connect(
    address: SocketAddr,
    key: &PrivateKey,
    tls: Arc<ClientConfig>,
    dial: &dyn Dial,
) -> Result<(tokio_rustls::client::TlsStream<TcpStream>, Channel), JoinFailure> {
    let unreachable = |e| JoinFailure::Connect(address, e);
    let broken = |e| JoinFailure::Broken(address, e);
    let tcp = timeout(DIAL_TIMEOUT, dial.dial(address)).await.map_err(|_| JoinFailure::Timeout(address))?.map_err(unreachable)?;
    let stream = TlsConnector::from(tls).connect(NodeTls::server_name(), tcp).await.map_err(broken)?;
    let channel = channel(stream.get_ref().1, key).map_err(broken)?;
    Ok((stream, channel))
}

/// Hands in at `address` which hosts are to be invited by a token for a mesh; `name` is the own one.
///
/// # Errors
/// When nobody answers there, or one of the two refuses the other.
pub(crate) async fn offer(
    token: &MergeToken,
    address: SocketAddr,
    key: &PrivateKey,
    name: HostName,
    offer: &Offer,
    tls: Arc<ClientConfig>,
    dial: &dyn Dial,
) -> Result<Answer, JoinFailure> {
    let (broken, refused) = (|e| JoinFailure::Broken(address, e), |e| JoinFailure::Refused(address, e));
    let conversation = async {
        let (mut stream, channel) = connect(address, key, tls, dial).await?;
        let (mut suitor, first) = Suitor::start(token.clone(), channel, name, offer).map_err(refused)?;
        frames::send(&mut stream, &first).await.map_err(broken)?;
        loop {
            let message = frames::receive(&mut stream, suitor.limit()).await.map_err(broken)?;
            match suitor.receive(&message).map_err(refused)? {
                Step::Send(reply) => frames::send(&mut stream, &reply).await.map_err(broken)?,
                Step::Finish(_, answer) | Step::Done(answer) => return Ok(answer),
            }
        }
    };
    timeout(TIMEOUT, conversation).await.map_err(|_| JoinFailure::Timeout(address))?
}

/// Room for those who are about to join.
pub(crate) fn pending() -> Crowd<IpAddr> {
    Crowd::new(MAX_PENDING, MAX_PENDING_PER_SOURCE)
}

/// Answers one host that wants to join; `pending` holds those in progress. Returns who was admitted, if anybody.
pub(crate) async fn serve(
    mut stream: TlsStream<Rewound>,
    from: SocketAddr,
    membership: Arc<Membership>,
    pending: Crowd<IpAddr>,
    waiting: &Waiting,
) -> Option<NodeId> {
    let (place, _) = pending.enter(from.ip());
    let admitted = tokio::select! {
        done = timeout(TIMEOUT, converse(&mut stream, from, &membership, waiting)) => {
            done.unwrap_or_else(|_| Err(anyhow::anyhow!("it took too long")))
        }
        () = place.lost() => Err(anyhow::anyhow!("too many want to join at once")),
    };
    match admitted {
        Ok(admitted) => admitted,
        Err(error) => {
            tracing::warn!(%from, %error, "a join failed");
            None
        }
    }
}

/// Who was admitted. Nobody, and nothing wrong with it: a host that asks without a token and was not approved yet.
async fn converse(
    stream: &mut TlsStream<Rewound>,
    from: SocketAddr,
    membership: &Membership,
    waiting: &Waiting,
) -> anyhow::Result<Option<NodeId>> {
    let channel = channel(stream.get_ref().1, membership.key())?;
    let node = channel.theirs.node_id();
    let mut admission = Admission::start(channel);
    loop {
        let message = frames::receive(stream, admission.limit()).await?;
        let step = match membership.admit(&mut admission, &message).await? {
            Ok(step) => step,
            Err(refused) => {
                // In words that give nothing away: an expired token is worth knowing, a wrong one is not.
                frames::send(stream, &refused.refusal()).await?;
                match (&refused, admission.asks()) {
                    (JoinError::Refused(Reason::NotApproved | Reason::Closed), Some(name)) => {
                        if waiting.saw(node, name, from.ip()) {
                            tracing::info!(%from, %node, %name, "a host waits for `meshd approve`");
                        }
                        return Ok(None);
                    }
                    // Such a host asks everybody it sees, and has its code typed if it is not let in so.
                    (JoinError::Refused(Reason::NotAuthority | Reason::NoFleet | Reason::Closed | Reason::Busy), _) => {
                        return Ok(None);
                    }
                    _ => return Err(refused.into()),
                }
            }
        };
        let admitted = match step {
            Step::Send(reply) => {
                frames::send(stream, &reply).await?;
                continue;
            }
            Step::Finish(reply, admitted) => {
                frames::send(stream, &reply).await?;
                admitted
            }
            Step::Done(admitted) => admitted,
        };
        match admitted.brings {
            Some(0) => tracing::info!(%from, node = %admitted.node, "a mesh asked what it would be to move here"),
            Some(hosts) => tracing::warn!(%from, node = %admitted.node, hosts, "the hosts of another mesh are invited"),
            None => tracing::info!(%from, node = %admitted.node, name = %admitted.name, "admitted a member"),
        }
        waiting.admitted(admitted.node);
        return Ok(Some(admitted.node));
    }
}

/// What ties the conversation to this one TLS connection.
fn channel<T>(tls: &ConnectionCommon<T>, key: &PrivateKey) -> std::io::Result<Channel> {
    let theirs = peer_key(tls).map_err(std::io::Error::other)?;
    let exporter = tls.export_keying_material([0; 32], EXPORTER_LABEL, None).map_err(std::io::Error::other)?;
    Ok(Channel { exporter, mine: *key.public(), theirs })
}
