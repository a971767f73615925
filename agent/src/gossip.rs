//! Gossip.
