//! Bodies of the local API and of the calls between members: what is read can be written and is read as the same.
#![no_main]

use libfuzzer_sys::fuzz_target;
use meshd::api::{
    CreatedToken, Edge, ErrorBody, Finding, Identity, JoinRequest, Joined, NewToken, Node, Resolve, Service, Status, TokenInfo,
};
use meshd::fuzzing::{member_bodies, resolve_query, stable};
use meshd_fuzz::{WORLD, within};

fuzz_target!(|data: &[u8]| {
    let body = WORLD.named(data);
    within(1 << 20 | 512 * body.len(), || {
        stable::<JoinRequest>(&body);
        stable::<NewToken>(&body);
        stable::<CreatedToken>(&body);
        stable::<Joined>(&body);
        stable::<Status>(&body);
        stable::<Vec<Node>>(&body);
        stable::<Vec<Service>>(&body);
        stable::<Vec<Edge>>(&body);
        stable::<Vec<Identity>>(&body);
        stable::<Vec<Finding>>(&body);
        stable::<Vec<TokenInfo>>(&body);
        stable::<Resolve>(&body);
        stable::<ErrorBody>(&body);
        member_bodies(&body);
    });
    if let Ok(query) = std::str::from_utf8(data)
        && let Some(at) = resolve_query(query)
    {
        assert_eq!(resolve_query(&format!("address={at}")), Some(at));
    }
});
