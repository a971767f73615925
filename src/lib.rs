//! bytes

pub mod intercept;
