//! Two-generation files.
use std::path::Path;
use thiserror::Error;
use zeroize::Zeroizing;
#[derive(Debug, Error)]
pub enum StoreError {
    #[error("busy")]
    Busy,
}
#[derive(Debug, PartialEq, Eq)]
pub struct Loaded {
    pub bytes: Zeroizing<Vec<u8>>,
    /** The newest generation was lost: this is the one before. */
    pub fallback: bool,
    /** Others could read the file; that is mended now. */
    pub exposed: bool,
}
#[derive(Debug)]
pub struct Store {}
impl Store {
    pub fn open(_dir: &Path) -> Result<Self, StoreError> {
        todo!()
    }
    pub fn load(&self, _name: &str) -> Result<Option<Loaded>, StoreError> {
        todo!()
    }
    pub fn save(&self, _name: &str, _bytes: &[u8]) -> Result<(), StoreError> {
        todo!()
    }
    pub fn remove(&self, _name: &str) -> Result<(), StoreError> {
        todo!()
    }
}
