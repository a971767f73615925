//! An authority's office: the root it signs with, the one that is to follow, and the tokens and codes it has given out.
//!
//! Owns which of the two pairs of root files is which: that is read off `signs` and the roster, so it does not matter when the plug was pulled.

use meshd_ca::approval::Approvals;
use meshd_ca::bundle::RootId;
use meshd_ca::issue::Issuer;
use meshd_ca::store::{Store, StoreError};
use meshd_ca::token::TokenTable;

use super::{MembershipError, ROOT_CERTIFICATE, ROOT_KEY, ROOT2_CERTIFICATE, ROOT2_KEY, TOKENS};

/// The name of the root that this authority began to sign with. A founder signs from the beginning and needs none.
pub(super) const SIGNS: &str = "signs";
/// Key and certificate of a root. There are two places: while one root signs, the one that is to follow is made in the other.
pub(super) const ROOTS: [(&str, &str); 2] = [(ROOT_KEY, ROOT_CERTIFICATE), (ROOT2_KEY, ROOT2_CERTIFICATE)];

/// What an authority has besides its membership.
pub(super) struct Office {
    pub(super) issuer: Issuer,
    /// Where that is: one of [`ROOTS`].
    pub(super) place: usize,
    /// The root that is to follow.
    pub(super) next: Option<Issuer>,
    pub(super) tokens: TokenTable,
    /// In memory only: a person types again after a restart.
    pub(super) approvals: Approvals,
    /// Whether everybody believes the root, so that it may be used.
    pub(super) signs: bool,
}

impl Office {
    /// The office whose files are in `store`; none where they are missing.
    pub(super) fn load(store: &Store) -> Result<Option<Self>, MembershipError> {
        let signs = store.load(SIGNS)?.and_then(|s| std::str::from_utf8(&s.bytes).ok()?.parse::<RootId>().ok());
        let read = |(key, root): (&str, &str)| -> Result<Option<Issuer>, MembershipError> {
            let (Some(key), Some(root)) = (store.load(key)?, store.load(root)?) else { return Ok(None) };
            Ok(Some(Issuer::from_parts(&key.bytes, &root.bytes)?))
        };
        let is_active = |issuer: &Issuer| Some(RootId::of(issuer.root_der())) == signs;
        let [first, second] = ROOTS.map(read);
        // A root that is named as the one that signs does; what is in the other place is whole, or on the way to be made or destroyed.
        let (place, issuer, next) = match (first, second) {
            (first, Ok(Some(second))) if is_active(&second) => (1, second, first.ok().flatten()),
            (Ok(Some(first)), second) => (0, first, second.ok().flatten()),
            // The other place may be where it was, and be damaged.
            (Ok(None), second) => return second.map(|_| None),
            (Err(error), _) => return Err(error),
        };
        let signs = is_active(&issuer);
        let tokens = match store.load(TOKENS)? {
            Some(saved) => TokenTable::from_bytes(&saved.bytes)?,
            None => TokenTable::default(),
        };
        Ok(Some(Self { issuer, place, next, tokens, approvals: Approvals::default(), signs }))
    }

    /// The root it signs with, or will.
    pub(super) fn root(&self) -> RootId {
        RootId::of(self.issuer.root_der())
    }

    /// A root that signed before the one of now: its key is of no use to anybody but a thief. `published` are the roots in the roster,
    /// oldest first.
    pub(super) fn forget_old(&mut self, store: &Store, published: &[RootId]) -> Result<(), StoreError> {
        let place = |root: RootId| published.iter().position(|r| *r == root);
        let old = |next: &Issuer| place(RootId::of(next.root_der())).is_some_and(|at| Some(at) < place(self.root()));
        if self.signs && self.next.as_ref().is_some_and(old) {
            self.next = None;
        }
        if self.next.is_none() {
            let (key, root) = ROOTS[1 - self.place];
            let there = |name| !matches!(store.load(name), Ok(None));
            // Without its certificate a key is nothing.
            for name in [root, key].into_iter().filter(|name| there(*name)) {
                store.remove(name)?;
            }
        }
        Ok(())
    }
}
