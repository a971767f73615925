//! A node's own word about itself: where it is, what listens there, how strict it is. Signed, bounded, verified on the way in.
//!
//! Owns the form of a record and every check of it. Who may speak is the roster's to say. A [`SignedRecord`] is always one that
//! passed: its signature is the member's own, and what it claims to run is its own to claim.

use std::net::IpAddr;

use bytes::Bytes;
use meshd_ca::bundle::RootId;
use meshd_ca::identity::{NodeId, Workload};
use meshd_ca::issue::may_hold;
use meshd_ca::keys::{KeyError, PrivateKey, Signature, sha256};
use meshd_ca::roster::{Member, Roster, Standing};
use meshd_ca::signed::Signed;
use serde::{Deserialize, Serialize};
use thiserror::Error;

/// Largest signed record in bytes, signature included.
pub const MAX_RECORD: usize = 32 * 1024;
/// Most listeners in a record.
pub const MAX_LISTENERS: usize = 512;
/// Most addresses in a record.
pub const MAX_ADDRESSES: usize = 64;
/// Most roots in each list of a record: an authority has four at most, and there are to be three of them.
pub const MAX_ROOTS: usize = 32;
/// Longest zone or version text in bytes.
pub const MAX_TEXT: usize = 64;
/// Highest sequence accepted: what JSON carries exactly (RFC 8259 §6). A node that changes every millisecond needs
/// 285,000 years to get there.
pub const MAX_SEQUENCE: u64 = (1 << 53) - 1;

/// What a signature over a record is for, see [`Signed::new`].
const CONTEXT: &str = "record";
const SIGNATURE: usize = 64;

/// What a node does about connections from members that are not secured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Accepts plaintext.
    Permissive,
    /// Refuses plaintext from members.
    Strict,
    /// Accepts plaintext and reports what strict would refuse.
    Audit,
}

/// Whether the daemon of a node is there, in its own words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Presence {
    /// It runs.
    Running,
    /// It is gone for a moment: hold connections briefly.
    Restarting,
    /// It stopped on purpose: its addresses are no longer part of the mesh.
    Stopped,
}

/// An address a node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Address {
    /// The address.
    pub ip: IpAddr,
    /// A virtual address that several nodes may hold in turn.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub shared: bool,
}

/// A TCP port somebody listens on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Listener {
    /// The port.
    pub port: u16,
    /// The address it listens on; none means every address of the node.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// What listens.
    pub workload: Workload,
}

/// What a node says about the roots of the mesh, so that an authority knows from when on it may sign with one, and from when on
/// nobody needs one any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roots {
    /// Those it verifies certificates with, at most [`MAX_ROOTS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub trusted: Vec<RootId>,
    /// Those that the certificates it shows are signed with, at most [`MAX_ROOTS`].
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shown: Vec<RootId>,
    /// The one it signs certificates with itself.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub signs: Option<RootId>,
}

impl Roots {
    fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// What a node says about itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRecord {
    /// Whose record this is.
    pub node: NodeId,
    /// Grows with each change, over restarts too; the highest is the one that counts. At most [`MAX_SEQUENCE`].
    pub sequence: u64,
    /// The mesh port.
    pub port: u16,
    /// All addresses of the node, at most [`MAX_ADDRESSES`].
    pub addresses: Vec<Address>,
    /// Where it stands, for locality; at most [`MAX_TEXT`] bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub zone: Option<String>,
    /// How strict it is.
    pub mode: Mode,
    /// Whether its daemon is there.
    pub presence: Presence,
    /// What listens there, at most [`MAX_LISTENERS`].
    pub listeners: Vec<Listener>,
    /// The version of its daemon, at most [`MAX_TEXT`] bytes.
    pub version: String,
    /// The roots it believes and uses.
    #[serde(default, skip_serializing_if = "Roots::is_empty")]
    pub roots: Roots,
}

/// Why bytes are not a record to be kept.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum RecordError {
    /// Longer than [`MAX_RECORD`] or more entries than a record may have. For an own record: publish fewer listeners.
    #[error(
        "the record is larger than {MAX_RECORD} bytes, or has more than {MAX_LISTENERS} listeners, {MAX_ADDRESSES} addresses or {MAX_ROOTS} roots"
    )]
    TooLarge,
    /// Not the JSON of a record, or a field outside its limits. A peer of another version, or a hostile one.
    #[error("not a node record")]
    Malformed,
    /// Whose record it is has no place in the roster, or no longer.
    #[error("{0} is not an active member: its record is not kept")]
    Stranger(NodeId),
    /// A listener's workload is not one of this member. The member is misconfigured or hostile.
    #[error("{0} claims a workload that is not its own")]
    Workload(NodeId),
    /// Not signed by the node whose record it claims to be: forged or damaged on the way.
    #[error("the record is not signed by its node: {0}")]
    Signature(#[from] KeyError),
}

/// Which of two records of one node is newer: by sequence; where a node signed two with the same sequence, by content, so that
/// everybody settles on the same one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Version {
    /// The record's sequence.
    pub sequence: u64,
    /// The first 8 bytes of SHA-256 of the signed record.
    pub tag: u64,
}

/// A record with its node's signature, verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SignedRecord {
    record: NodeRecord,
    bytes: Bytes,
    version: Version,
}

impl SignedRecord {
    /// Signs the node's own record.
    ///
    /// # Errors
    /// [`RecordError::TooLarge`] and [`RecordError::Malformed`] when it would be refused by others,
    /// [`RecordError::Stranger`] when `key` is not the key of `record.node`, [`RecordError::Signature`] when signing failed.
    pub fn sign(key: &PrivateKey, record: NodeRecord) -> Result<Self, RecordError> {
        if key.public().node_id() != record.node {
            return Err(RecordError::Stranger(record.node));
        }
        record.check()?;
        let payload = serde_json::to_vec(&record).map_err(|_| RecordError::Malformed)?;
        let signed = Signed::new(key, CONTEXT, payload)?;
        let bytes = Bytes::from([&signed.signature.as_bytes()[..], &signed.payload].concat());
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLarge);
        }
        Ok(Self { version: version(&record, &bytes), record, bytes })
    }

    /// Verifies a record that came from elsewhere: size, form, that its node is an active member, that each listener's workload
    /// is that member's own, and the signature by the key the roster has for it. Costs one P-256 verification.
    ///
    /// # Errors
    /// See [`RecordError`]: which check failed.
    pub fn parse(bytes: &[u8], roster: &Roster) -> Result<Self, RecordError> {
        if bytes.len() > MAX_RECORD {
            return Err(RecordError::TooLarge);
        }
        let (signature, payload) = bytes.split_first_chunk::<SIGNATURE>().ok_or(RecordError::Malformed)?;
        let record: NodeRecord = serde_json::from_slice(payload).map_err(|_| RecordError::Malformed)?;
        record.check()?;
        let member = roster.member(record.node).filter(|m| m.standing == Standing::Active);
        let member = member.ok_or(RecordError::Stranger(record.node))?;
        if !record.listeners.iter().all(|l| may_hold(member, &l.workload).is_ok()) {
            return Err(RecordError::Workload(record.node));
        }
        Signed { payload: payload.to_vec(), signature: Signature::from_bytes(*signature) }.verify(&member.key, CONTEXT)?;
        let bytes = Bytes::copy_from_slice(bytes);
        Ok(Self { version: version(&record, &bytes), record, bytes })
    }

    /// Whether the record is still to be believed now that the roster says this of its node: the node is active, and the
    /// listeners' workloads are its own.
    pub fn may_be_of(&self, member: &Member) -> bool {
        member.standing == Standing::Active && self.record.listeners.iter().all(|l| may_hold(member, &l.workload).is_ok())
    }

    /// What the node says.
    pub fn record(&self) -> &NodeRecord {
        &self.record
    }

    /// The signed form: the signature (64 bytes), then the record as JSON. This is what is stored and passed on.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }

    /// How new it is.
    pub fn version(&self) -> Version {
        self.version
    }
}

impl NodeRecord {
    fn check(&self) -> Result<(), RecordError> {
        let roots = self.roots.trusted.len().max(self.roots.shown.len());
        if self.listeners.len() > MAX_LISTENERS || self.addresses.len() > MAX_ADDRESSES || roots > MAX_ROOTS {
            return Err(RecordError::TooLarge);
        }
        let text = |t: &str| t.len() <= MAX_TEXT && !t.chars().any(char::is_control);
        let ok = self.sequence <= MAX_SEQUENCE
            && self.port != 0
            && text(&self.version)
            && self.zone.as_deref().is_none_or(text)
            && self.listeners.iter().all(|l| l.port != 0);
        if ok { Ok(()) } else { Err(RecordError::Malformed) }
    }
}

fn version(record: &NodeRecord, bytes: &[u8]) -> Version {
    let mut tag = [0; 8];
    tag.copy_from_slice(&sha256(&[bytes])[..8]);
    Version { sequence: record.sequence, tag: u64::from_be_bytes(tag) }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::net::Ipv4Addr;
    use std::time::Duration;

    use meshd_ca::identity::{HostName, MeshId, TrustDomain};
    use meshd_ca::issue::Issuer;
    use meshd_ca::time::UnixTime;
    use proptest::prelude::*;

    use super::*;

    const NOW: UnixTime = UnixTime(1_700_000_000);

    /// A mesh of `n` keys, the first of which founded it and admitted the others as `host-<i>`.
    pub(crate) fn mesh(n: usize) -> (Vec<PrivateKey>, Roster) {
        let keys: Vec<PrivateKey> = (0..n).map(|_| PrivateKey::generate().unwrap()).collect();
        let mesh = MeshId::from_bytes([7; 10]);
        let domain = TrustDomain::of(mesh);
        let founder = keys[0].public().node_id();
        let root = Issuer::create(&domain, founder, NOW, Duration::from_secs(86_400 * 3650)).unwrap();
        let name = |i: usize| HostName::nearest(&format!("host-{i}"));
        let mut roster = Roster::found(mesh, domain, &keys[0], name(0), root.root_der().to_vec(), NOW).unwrap();
        for (i, key) in keys.iter().enumerate().skip(1) {
            roster.admit(&keys[0], key.public(), &name(i), NOW).unwrap();
        }
        (keys, roster)
    }

    /// A record of a node named `host-<i>`.
    pub(crate) fn record(key: &PrivateKey, i: usize, sequence: u64) -> NodeRecord {
        let host = HostName::nearest(&format!("host-{i}"));
        NodeRecord {
            node: key.public().node_id(),
            sequence,
            port: 6374,
            addresses: vec![Address { ip: Ipv4Addr::new(10, 0, 0, i as u8).into(), shared: false }],
            zone: Some("shed".into()),
            mode: Mode::Strict,
            presence: Presence::Running,
            listeners: vec![Listener { port: 80, ip: None, workload: Workload::Unit(host, "web.service".into()) }],
            version: "0.1.0".into(),
            roots: Roots { trusted: vec![RootId::of(b"root")], ..Roots::default() },
        }
    }

    #[test]
    fn what_was_signed_is_what_is_read() {
        let (keys, roster) = mesh(2);
        let signed = SignedRecord::sign(&keys[1], record(&keys[1], 1, 5)).unwrap();
        let read = SignedRecord::parse(signed.bytes(), &roster).unwrap();
        assert_eq!(read, signed);
        assert_eq!(read.record(), &record(&keys[1], 1, 5));
        assert_eq!(read.version().sequence, 5);
    }

    #[test]
    fn each_check_refuses_alone() {
        let (keys, mut roster) = mesh(3);
        let one = keys[1].public().node_id();
        let raw = |key: &PrivateKey, r: &NodeRecord| {
            let s = Signed::new(key, CONTEXT, serde_json::to_vec(r).unwrap()).unwrap();
            [&s.signature.as_bytes()[..], &s.payload].concat()
        };
        let good = record(&keys[1], 1, 1);
        let parse = |bytes: &[u8], roster: &Roster| SignedRecord::parse(bytes, roster).map(drop);
        assert_eq!(parse(&raw(&keys[1], &good), &roster), Ok(()));
        assert_eq!(parse(&raw(&keys[2], &good), &roster), Err(RecordError::Signature(KeyError::Signature)));
        let stranger = PrivateKey::generate().unwrap();
        let node = stranger.public().node_id();
        assert_eq!(parse(&raw(&stranger, &NodeRecord { node, ..good.clone() }), &roster), Err(RecordError::Stranger(node)));
        let with = |change: &dyn Fn(&mut NodeRecord)| {
            let mut r = good.clone();
            change(&mut r);
            parse(&raw(&keys[1], &r), &roster)
        };
        let listener = good.listeners[0].clone();
        assert_eq!(with(&|r| r.sequence = MAX_SEQUENCE), Ok(()));
        assert_eq!(with(&|r| r.sequence = MAX_SEQUENCE + 1), Err(RecordError::Malformed));
        assert_eq!(with(&|r| r.port = 0), Err(RecordError::Malformed));
        assert_eq!(with(&|r| r.version = "x".repeat(MAX_TEXT + 1)), Err(RecordError::Malformed));
        assert_eq!(with(&|r| r.zone = Some("a\u{1b}[0m".into())), Err(RecordError::Malformed));
        assert_eq!(with(&|r| r.listeners = vec![listener.clone(); MAX_LISTENERS + 1]), Err(RecordError::TooLarge));
        assert_eq!(with(&|r| r.roots.shown = vec![RootId::of(b""); MAX_ROOTS + 1]), Err(RecordError::TooLarge));
        assert_eq!(with(&|r| r.addresses = vec![r.addresses[0]; MAX_ADDRESSES + 1]), Err(RecordError::TooLarge));
        for theirs in [
            Workload::Host("host-2".parse().unwrap()),
            Workload::Node(keys[2].public().node_id()),
            Workload::Service("db".into()),
            Workload::ServiceAccount("default".into(), "web".into()),
        ] {
            assert_eq!(with(&|r| r.listeners[0].workload = theirs.clone()), Err(RecordError::Workload(one)));
        }
        assert_eq!(parse(&vec![0; MAX_RECORD + 1], &roster), Err(RecordError::TooLarge));
        assert_eq!(parse(&[0; 63], &roster), Err(RecordError::Malformed));
        // Another kind of document by the same key is not a record.
        let other = Signed::new(&keys[1], "roster", serde_json::to_vec(&good).unwrap()).unwrap();
        let other = [&other.signature.as_bytes()[..], &other.payload].concat();
        assert!(matches!(parse(&other, &roster), Err(RecordError::Signature(_))));
        roster.banish(&keys[0], one).unwrap();
        assert_eq!(parse(&raw(&keys[1], &good), &roster), Err(RecordError::Stranger(one)));
    }

    #[test]
    fn what_others_would_refuse_is_not_signed() {
        let (keys, _) = mesh(1);
        assert!(matches!(SignedRecord::sign(&keys[0], record(&keys[0], 0, u64::MAX)), Err(RecordError::Malformed)));
        let big = Listener { port: 1, ip: None, workload: Workload::User("host-0".parse().unwrap(), "u".repeat(200).into()) };
        let big = NodeRecord { listeners: vec![big; 500], ..record(&keys[0], 0, 1) };
        assert_eq!(SignedRecord::sign(&keys[0], big).unwrap_err(), RecordError::TooLarge);
        let other = PrivateKey::generate().unwrap();
        assert!(matches!(SignedRecord::sign(&other, record(&keys[0], 0, 1)), Err(RecordError::Stranger(_))));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn damage_is_noticed_and_does_not_panic(at in 0usize..400, bit in 0u8..8, cut in 0usize..400) {
            let (keys, roster) = mesh(1);
            let signed = SignedRecord::sign(&keys[0], record(&keys[0], 0, 3)).unwrap();
            let mut bytes = signed.bytes().to_vec();
            let at = at % bytes.len();
            bytes[at] ^= 1 << bit;
            prop_assert!(SignedRecord::parse(&bytes, &roster).is_err());
            bytes.truncate(cut % bytes.len());
            prop_assert!(SignedRecord::parse(&bytes, &roster).is_err());
        }
    }
}
