//! Who is who in a meshd mesh: identities, keys, roster, certificates and the rules of joining.
//!
//! No sockets and no clock of its own: time is a parameter, bytes come in and go out. What this package decides is decided the
//! same way in a test, in a simulation of a thousand nodes and on a Pi. Only [`store`] touches the system, by files.
//!
//! | module | question it answers |
//! | --- | --- |
//! | [`identity`] | what is a name? |
//! | [`keys`], [`signed`] | who made these bytes? |
//! | [`roster`] | who is a member, under which name, and who may admit others? |
//! | [`token`], [`approval`], [`fleet`], [`join`] | how does a host become one, without either side trusting the network? |
//! | [`merge`] | how does a whole mesh move into another one? |
//! | [`bundle`], [`issue`], [`verify`] | which certificates are made, for whom, and which are believed? |
//! | [`time`], [`clock`] | what time is it, and who says so? |
//! | [`store`], [`backup`], [`recovery`] | how does all this outlive a power cut, the disk, and the theft of whom all trust? |
//!
//! Everything that comes from outside enters by a function that takes bytes or text, bounds them, and gives a value that cannot
//! be invalid or an error: [`roster::Roster::from_bytes`], [`roster::Entry::from_bytes`], [`token::TokenTable::from_bytes`],
//! [`fleet::FleetToken::from_file`], [`fleet::Fleet::from_bytes`], [`token::JoinToken`]'s and [`approval::ApprovalCode`]'s `FromStr`, [`token::MergeToken`]'s, [`join::Joiner::receive`], [`join::Suitor::receive`], [`join::Admission::receive`], [`merge::Word::from_bytes`], [`merge::Words::from_bytes`], [`verify::verify_svid`],
//! [`verify::node_key`], [`bundle::Root::parse`], [`store::decode`], [`backup::Backup::open`], [`recovery::RecoveryKey`]'s `FromStr` and the parsers of [`identity`]. None of them panics.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::expect_used))]

pub mod approval;
pub mod backup;
pub mod bundle;
pub mod clock;
pub mod fleet;
pub mod identity;
pub mod issue;
pub mod join;
pub mod keys;
pub mod merge;
pub mod recovery;
pub mod roster;
pub mod signed;
pub mod store;
pub mod time;
pub mod token;
pub mod verify;
