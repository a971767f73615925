//! Approval: how a host without a token is let in by a person who can read what it shows.
//!
//! The host that wants in makes a code of 80 random bits and shows it to its own root. Typed on a member, the code is a secret that
//! the host and the mesh share, so the join handshake ([`crate::join`]) proves both ends to each other with it: a mesh in which
//! nobody typed the code cannot adopt the host, and a host that does not know it is not admitted in its place.
//!
//! [`Approvals`] is what one authority was told. It is in memory only and short-lived: after a restart the person types again. Each
//! code admits one node key.

use std::fmt;
use std::str::FromStr;
use std::time::Duration;

use thiserror::Error;
use zeroize::Zeroizing;

use crate::identity::{NodeId, base32, grouped};
use crate::keys::{KeyError, random};
use crate::time::UnixTime;

/// How long a code that was typed waits for its host.
pub const LIFETIME: Duration = Duration::from_secs(600);
/// Most codes that wait at once; the oldest goes.
pub const MAX_APPROVALS: usize = 32;
/// Characters of a code without what groups them.
const CHARACTERS: usize = 16;
/// Longest text that is looked at.
const MAX_TEXT: usize = 64;

/// Why a text is no code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum CodeError {
    /// Another number of characters.
    #[error(
        "a code has {CHARACTERS} characters, in groups of four: copy what `sudo meshd status` shows on the host that is to join"
    )]
    Length,
    /// A character that no code has.
    #[error("codes have a-z and 2-7 only, and no {0:?}: is it a typing error?")]
    Character(char),
}

/// The code of a host that waits. `Debug` hides it, and it is wiped when dropped.
#[derive(Clone, PartialEq, Eq)]
pub struct ApprovalCode(Zeroizing<[u8; 10]>);

impl ApprovalCode {
    /// A new one.
    ///
    /// # Errors
    /// [`KeyError::Random`] when the system has no randomness.
    pub fn generate() -> Result<Self, KeyError> {
        Ok(Self(Zeroizing::new(random()?)))
    }

    /// As a person copies it: `abcd-efgh-ijkl-mnop`.
    pub fn to_text(&self) -> Zeroizing<String> {
        grouped(&self.0[..])
    }

    pub(crate) fn secret(&self) -> &[u8] {
        &self.0[..]
    }
}

/// Takes the text as a person types it: capitals, spaces and hyphens do not matter.
impl FromStr for ApprovalCode {
    type Err = CodeError;
    fn from_str(s: &str) -> Result<Self, CodeError> {
        if s.len() > MAX_TEXT {
            return Err(CodeError::Length);
        }
        let mut text = Zeroizing::new(String::with_capacity(MAX_TEXT));
        for character in s.chars().filter(|c| !c.is_whitespace() && *c != '-') {
            match character.to_ascii_lowercase() {
                c @ ('a'..='z' | '2'..='7') => text.push(c),
                _ => return Err(CodeError::Character(character)),
            }
        }
        let bytes = Zeroizing::new(base32().decode(text.as_bytes()).map_err(|_| CodeError::Length)?);
        Ok(Self(Zeroizing::new(bytes.as_slice().try_into().map_err(|_| CodeError::Length)?)))
    }
}

impl fmt::Debug for ApprovalCode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ApprovalCode(..)")
    }
}

/// The codes that people typed on members of this mesh, as one authority knows them.
#[derive(Debug, Default)]
pub struct Approvals(Vec<Approval>);

#[derive(Debug)]
struct Approval {
    code: ApprovalCode,
    until: UnixTime,
    admitted: Option<NodeId>,
}

impl Approvals {
    /// Notes a code, for [`LIFETIME`] from `now`. Returns whom it has admitted already; typing it again changes nothing then.
    pub fn approve(&mut self, code: ApprovalCode, now: UnixTime) -> Option<NodeId> {
        self.0.retain(|a| now < a.until);
        let until = now + LIFETIME;
        if let Some(known) = self.0.iter_mut().find(|a| a.code == code) {
            if known.admitted.is_none() {
                known.until = until;
            }
            return known.admitted;
        }
        if self.0.len() == MAX_APPROVALS {
            self.0.remove(0);
        }
        self.0.push(Approval { code, until, admitted: None });
        None
    }

    /// Whether any code waits for its host, or could be asked for again.
    pub(crate) fn any(&self, now: UnixTime) -> bool {
        self.0.iter().any(|a| now < a.until)
    }

    /// The first code in force for which `is` holds, and whom it has admitted.
    pub(crate) fn find(&self, now: UnixTime, is: impl Fn(&ApprovalCode) -> bool) -> Option<(ApprovalCode, Option<NodeId>)> {
        self.0.iter().find(|a| now < a.until && is(&a.code)).map(|a| (a.code.clone(), a.admitted))
    }

    /// Notes whom a code has admitted.
    pub(crate) fn admitted(&mut self, code: &ApprovalCode, node: NodeId) {
        if let Some(approval) = self.0.iter_mut().find(|a| a.code == *code) {
            approval.admitted = Some(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000);

    #[test]
    fn a_code_is_read_as_people_type_it() {
        let code = ApprovalCode(Zeroizing::new(*b"0123456789"));
        let text = code.to_text();
        assert_eq!(text.len(), 19);
        assert!(text.split('-').all(|group| group.len() == 4));
        let spaced = format!("  {} ", text.to_uppercase().replace('-', "  "));
        for typed in [text.as_str(), &text.replace('-', ""), &spaced] {
            assert_eq!(typed.parse::<ApprovalCode>().unwrap(), code);
        }
        assert_eq!("".parse::<ApprovalCode>(), Err(CodeError::Length));
        assert_eq!(text[..18].parse::<ApprovalCode>(), Err(CodeError::Length));
        assert_eq!(format!("{}aaaa", *text).parse::<ApprovalCode>(), Err(CodeError::Length));
        assert_eq!("x".repeat(4096).parse::<ApprovalCode>(), Err(CodeError::Length));
        assert_eq!("abcd-efgh-ijkl-mno1".parse::<ApprovalCode>(), Err(CodeError::Character('1')));
        assert_eq!(format!("{code:?}"), "ApprovalCode(..)");
    }

    #[test]
    fn codes_end_and_the_oldest_makes_room() {
        let mut approvals = Approvals::default();
        let codes: Vec<_> = (0..=MAX_APPROVALS).map(|_| ApprovalCode::generate().unwrap()).collect();
        for code in &codes {
            assert_eq!(approvals.approve(code.clone(), NOW), None);
        }
        let known = |approvals: &Approvals, code: &ApprovalCode, now| approvals.find(now, |c| c == code).is_some();
        assert!(!known(&approvals, &codes[0], NOW));
        assert!(known(&approvals, &codes[1], NOW + LIFETIME - Duration::from_secs(1)));
        assert!(!known(&approvals, &codes[1], NOW + LIFETIME));
        assert!(!approvals.any(NOW + LIFETIME));
    }

    proptest! {
        #[test]
        fn no_text_makes_the_parser_panic_and_what_it_takes_it_gives(text in ".{0,80}") {
            if let Ok(code) = text.parse::<ApprovalCode>() {
                prop_assert_eq!(code.to_text().parse::<ApprovalCode>().unwrap(), code);
            }
        }
    }
}
