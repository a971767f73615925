//! The few socket options that decide how a connection ends.
//!
//! Invariant: a socket of an [`application`] or service resets when dropped, from the moment we have it until [`ended`] is called
//! after both of its directions ended cleanly. So whatever path drops it early (an error, a panic, an aborted task) resets it, and
//! a stream that was cut never looks like one that ended. A [`tunnel`] needs no reset for that: what ends it is `close_notify`, and
//! an ordinary close lets the bytes in front of a break still arrive.
//!
//! An end that is gone is noticed by keepalive, or while something is outstanding by [`super::live::Live::look_after`]. Not by
//! `TCP_USER_TIMEOUT`, which also ends a connection whose other end answers and has only not read for so long.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

use crate::intercept::socket::{Finish, finish, tell_rest};

/// Probes after which a silent peer counts as dead.
const PROBES: u32 = 6;

/// Readies the socket of an application or service, or a listener for all that it accepts from now on: dropping it sends a reset.
///
/// # Errors
/// When the connection is gone.
pub fn application(stream: &impl AsFd, silence: Duration) -> io::Result<()> {
    finish(stream, Finish::Reset)?;
    // An urgent byte is one of the stream (RFC 6093): without this, reading would leave it out.
    SockRef::from(stream).set_out_of_band_inline(true)?;
    lively(stream, silence)
}

/// Readies the socket below a tunnel: dropping it delivers what was written.
///
/// # Errors
/// When the connection is gone.
pub fn tunnel(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    finish(stream, Finish::Clean)?;
    lively(stream, silence)
}

/// Readies the socket below a tunnel that carries nothing: that its peer is gone is known before the next connection needs it.
///
/// # Errors
/// When the connection is gone.
pub fn waiting(stream: &TcpStream) -> io::Result<()> {
    const SILENCE: Duration = Duration::from_secs(3);
    const GONE: Duration = Duration::from_secs(10);
    let socket = SockRef::from(stream);
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(SILENCE).with_interval(SILENCE))?;
    socket.set_tcp_user_timeout(Some(GONE))
}

/// Readies the socket below a tunnel that was [`waiting`] for its next connection.
///
/// # Errors
/// When the connection is gone.
pub fn wanted(stream: &TcpStream, silence: Duration) -> io::Result<()> {
    SockRef::from(stream).set_tcp_user_timeout(None)?;
    lively(stream, silence)
}

/// Both directions of an application's connection ended cleanly: dropping it is not a reset any more.
///
/// # Errors
/// When the connection is gone.
pub fn ended(stream: &TcpStream) -> io::Result<()> {
    finish(stream, Finish::Clean)
}

/// After how long a dead other end is noticed: `silence` and a few probes. Both are a second at least.
pub fn patience(silence: Duration) -> Duration {
    let (silence, interval) = times(silence);
    silence + interval * PROBES
}

fn times(silence: Duration) -> (Duration, Duration) {
    let least = Duration::from_secs(1);
    (silence.max(least), (silence / 3).max(least))
}

/// No delay for small writes, and a dead other end is noticed after its [`patience`] (tcp(7)).
fn lively(stream: &impl AsFd, silence: Duration) -> io::Result<()> {
    let (silence, interval) = times(silence);
    let socket = SockRef::from(stream);
    socket.set_tcp_nodelay(true)?;
    socket.set_tcp_keepalive(&TcpKeepalive::new().with_time(silence).with_interval(interval).with_retries(PROBES))?;
    // Before Linux 4.18 each message costs one more read.
    let _ = tell_rest(stream);
    Ok(())
}
