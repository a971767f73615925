//! Tasks behind one pointer each.
//!
//! The runtime's part of a task is in the program once for every type of future, and twice where it can run on either scheduler; every
//! other library that takes a future does the same. So whatever is begun seldom goes through here, where all futures of one result are of
//! one type. The tasks of a connection do not: they would pay an allocation for it.

use std::ops::{Deref, DerefMut};
use std::pin::Pin;

use tokio::task::{JoinHandle, JoinSet};

/// A future whose type is forgotten.
type Boxed<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Runs a future beside this one.
pub(crate) fn spawn<T: Send + 'static>(future: impl Future<Output = T> + Send + 'static) -> JoinHandle<T> {
    let future: Boxed<T> = Box::pin(future);
    tokio::spawn(future)
}

/// Runs what may block on a thread for that.
pub(crate) fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let work: Box<dyn FnOnce() -> T + Send> = Box::new(work);
    tokio::task::spawn_blocking(work)
}

/// Tasks that end with the set: a [`JoinSet`].
pub(crate) struct Tasks<T>(JoinSet<T>);

impl<T: Send + 'static> Tasks<T> {
    /// None yet.
    pub(crate) fn new() -> Self {
        Self(JoinSet::new())
    }
    /// Runs one more.
    pub(crate) fn spawn(&mut self, future: impl Future<Output = T> + Send + 'static) {
        let future: Boxed<T> = Box::pin(future);
        self.0.spawn(future);
    }
    /// Waits for all of them.
    pub(crate) async fn join_all(self) -> Vec<T> {
        self.0.join_all().await
    }
}

impl<T> Deref for Tasks<T> {
    type Target = JoinSet<T>;
    fn deref(&self) -> &JoinSet<T> {
        &self.0
    }
}
impl<T> DerefMut for Tasks<T> {
    fn deref_mut(&mut self) -> &mut JoinSet<T> {
        &mut self.0
    }
}

/// What an HTTP/2 connection runs its tasks with.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Executor;

impl<F: Future<Output: Send + 'static> + Send + 'static> hyper::rt::Executor<F> for Executor {
    fn execute(&self, future: F) {
        spawn(future);
    }
}
