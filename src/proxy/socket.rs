//! The few socket options that decide how a connection ends.
//!
//! Invariant: a socket toward an application or service is [`abortive`] from the moment we have it, and becomes [`orderly`] only
//! after both of its directions ended cleanly. So whatever path drops it early (an error, a panic, an aborted task) resets it, and
//! a stream that was cut never looks like one that ended.

use std::io;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// Probes after which a silent peer counts as dead.
const PROBES: u32 = 6;

/// Closing sends a reset (`SO_LINGER` of zero, socket(7)).
///
/// # Errors
/// When the socket is gone.
pub fn abortive(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(Some(Duration::ZERO))
}

/// Closing ends the connection as usual: what was written is delivered, then a FIN.
///
/// # Errors
/// When the socket is gone.
pub fn orderly(stream: &TcpStream) -> io::Result<()> {
    SockRef::from(stream).set_linger(None)
}

/// No delay for small writes, and a dead other end is noticed after `silence` and a few probes (tcp(7)). What was sent and is not
/// acknowledged for as long ends the connection too.
///
/// # Errors
/// When the socket is gone.
pub fn lively(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    let interval = (silence / 3).max(Duration::from_secs(1));
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(silence).with_interval(interval).with_retries(PROBES))?;
    socket.set_tcp_user_timeout(Some(silence + interval * PROBES))
}
