//! bytes

pub mod identity;
pub mod proxy;
