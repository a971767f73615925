//! bytes

pub mod api;
pub mod config;
pub mod daemon;
pub mod demo;
