//! What members say to each other: the mesh port, the member API and the wire side of joining.
//!
//! Control connections are HTTP/2 over TLS 1.3 between pinned node keys; no date is ever checked on them (design section 4).

mod budget;
pub(crate) mod crowd;
pub(crate) mod frames;
pub(crate) mod front;
pub(crate) mod gossip;
pub(crate) mod issuance;
pub(crate) mod join;
pub(crate) mod key;
pub(crate) mod link;
pub(crate) mod rewound;
pub(crate) mod serve;
pub(crate) mod waiting;
