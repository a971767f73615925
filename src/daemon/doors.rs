//! The listening sockets of this daemon, so that the next process can go on with them: no connection finds a closed port in between.
//!
//! Owns which doors are open and which were inherited; whoever opened one accepts on it. A door is closed when its holder lets go of it.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use tokio::net::TcpListener;

use crate::intercept::socket::{Mark, listen};

/// The doors, by what they are called when they are handed over.
#[derive(Debug, Default)]
pub(crate) struct Doors(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    inherited: BTreeMap<String, OwnedFd>,
    open: BTreeMap<String, Weak<TcpListener>>,
}

fn name(address: SocketAddr) -> String {
    format!("tcp {address}")
}

impl Doors {
    /// Opens one, or goes on with the one that the process before this had at the address.
    ///
    /// # Errors
    /// As [`listen`].
    pub(crate) fn open(&self, address: SocketAddr, mark: Mark) -> io::Result<Arc<TcpListener>> {
        let mut state = self.state();
        let listener = match state.inherited.remove(&name(address)) {
            // It has its options, and does not block.
            Some(fd) => TcpListener::from_std(fd.into())?,
            None => listen(address, mark)?,
        };
        let listener = Arc::new(listener);
        state.open.insert(name(address), Arc::downgrade(&listener));
        Ok(listener)
    }

    /// Each that is open now, once more.
    ///
    /// # Errors
    /// Too many open files.
    pub(crate) fn duplicate(&self) -> io::Result<BTreeMap<String, OwnedFd>> {
        let open = |(name, door): (&String, &Weak<TcpListener>)| Some((name.clone(), door.upgrade()?));
        let open: Vec<_> = self.state().open.iter().filter_map(open).collect();
        open.into_iter().map(|(name, door)| Ok((name, door.as_fd().try_clone_to_owned()?))).collect()
    }

    /// Has doors of before, for whoever opens them next.
    pub(crate) fn inherit(&self, doors: BTreeMap<String, OwnedFd>) {
        self.state().inherited.extend(doors);
    }

    /// Closes those that nobody wanted: the configuration has changed.
    pub(crate) fn close_rest(&self) {
        self.state().inherited.clear();
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::net::TcpStream;

    #[tokio::test]
    async fn a_door_stays_open_from_hand_to_hand_and_what_nobody_wants_is_closed() {
        let before = Doors::default();
        let first = before.open("127.0.0.1:0".parse().unwrap(), Mark::None).unwrap();
        let address = first.local_addr().unwrap();
        // Under its real address from here on.
        before.state().open.insert(name(address), Arc::downgrade(&first));
        let passed = before.duplicate().unwrap();
        drop(first);
        assert!(before.duplicate().unwrap().is_empty(), "closed doors are handed over");
        // It came while nobody was there.
        let waiting = TcpStream::connect(address).await.unwrap();
        let after = Doors::default();
        after.inherit(passed);
        let second = after.open(address, Mark::None).unwrap();
        assert_eq!(second.accept().await.unwrap().1, waiting.local_addr().unwrap());
        let unwanted = after.duplicate().unwrap();
        drop((second, waiting));
        after.inherit(unwanted);
        after.close_rest();
        assert!(TcpStream::connect(address).await.is_err());
    }
}
