//! The reference relay: rustls as it is, `meshd/1`. What [`crate::proxy::tunnel`] does must be the same, byte by byte and end by end.

use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::task::Poll;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::time::timeout;
use tokio_rustls::TlsStream;

use super::differential::Wire;
use crate::proxy::Fault;
use crate::proxy::edges::{Count, Meter};
use crate::proxy::header::Verdict;
use crate::proxy::tunnel::Role;

const SMALL: usize = 8 * 1024;
const LARGE: usize = 64 * 1024;
/// So many full reads in a row make a direction a transfer; a request or answer of less is over by then.
const TRANSFER: u32 = 4;
/// After so long without a byte it is none any more: thousands of connections that once carried something must not keep 128 KiB each.
const QUIET: Duration = Duration::from_secs(1);

/// The reference: rustls as it is, `close_notify` ends a direction.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct Plain;

impl Plain {
    /// As [`Tunnel::carry`](crate::proxy::tunnel::Tunnel::carry).
    pub(super) async fn relay<W: Wire>(
        &self,
        app: &mut impl Wire,
        tunnel: &mut TlsStream<W>,
        role: Role,
        meter: Meter<'_>,
    ) -> Result<(), Fault> {
        let (from_app, to_app) = tokio::io::split(app);
        let (from_peer, to_peer) = tokio::io::split(tunnel);
        match role {
            Role::Dialler(header) => tokio::try_join!(
                send(from_app, to_peer, Lead::Now(header.encode()), meter.sent),
                receive(from_peer, to_app, true, meter.received),
            )?,
            Role::Dialled => tokio::try_join!(
                send(from_app, to_peer, Lead::WithData(vec![Verdict::Accepted.encode()]), meter.sent),
                receive(from_peer, to_app, false, meter.received),
            )?,
        };
        Ok(())
    }
}

/// Bytes of ours in front of the application's.
enum Lead {
    Now(Vec<u8>),
    WithData(Vec<u8>),
}

/// The buffer of one direction: large while it carries a transfer.
struct Buffer {
    bytes: Vec<u8>,
    full: u32,
}

impl Buffer {
    fn new() -> Self {
        Self { bytes: vec![0; SMALL], full: 0 }
    }

    /// Reads behind the first `at` bytes, and returns how many came; 0 at the end.
    async fn fill(&mut self, from: &mut (impl AsyncRead + Unpin), at: usize) -> io::Result<usize> {
        let read = if self.bytes.len() > SMALL {
            match timeout(QUIET, from.read(&mut self.bytes[at..])).await {
                Ok(read) => Some(read?),
                Err(_) => {
                    *self = Self::new();
                    None
                }
            }
        } else {
            None
        };
        let read = match read {
            Some(read) => read,
            None => from.read(&mut self.bytes[at..]).await?,
        };
        self.full = if at + read == self.bytes.len() { self.full.saturating_add(1) } else { 0 };
        Ok(read)
    }

    /// Makes room for more at once, if this is a transfer. What was read is gone then.
    fn grow(&mut self) {
        if self.full >= TRANSFER && self.bytes.len() < LARGE {
            self.bytes = vec![0; LARGE];
        }
    }
}

/// From the application into the tunnel.
async fn send(
    mut app: impl AsyncRead + Unpin,
    mut tunnel: impl AsyncWrite + Unpin,
    lead: Lead,
    count: Count<'_>,
) -> Result<(), Fault> {
    let (lead, now) = match lead {
        Lead::Now(lead) => (lead, true),
        Lead::WithData(lead) => (lead, false),
    };
    let mut buffer = Buffer::new();
    let mut before = lead.len();
    buffer.bytes[..before].copy_from_slice(&lead);
    if now {
        // The kernel tells a reset once only: ignored here, it would read as a clean end below.
        let mut said = ReadBuf::new(&mut buffer.bytes[before..]);
        match poll_fn(|context| Poll::Ready(Pin::new(&mut app).poll_read(context, &mut said))).await {
            Poll::Ready(done) => done.map_err(Fault::App)?,
            Poll::Pending => {}
        }
        let n = said.filled().len();
        count.add(n);
        tunnel.write_all(&buffer.bytes[..before + n]).await.map_err(Fault::Tunnel)?;
        tunnel.flush().await.map_err(Fault::Tunnel)?;
        before = 0;
    }
    loop {
        let n = buffer.fill(&mut app, before).await.map_err(Fault::App)?;
        let bytes = &buffer.bytes[..before + n];
        if !bytes.is_empty() {
            tunnel.write_all(bytes).await.map_err(Fault::Tunnel)?;
        }
        if n == 0 {
            // Sends what is pending, close_notify and a FIN.
            return tunnel.shutdown().await.map_err(Fault::Tunnel);
        }
        tunnel.flush().await.map_err(Fault::Tunnel)?;
        count.add(n);
        buffer.grow();
        before = 0;
    }
}

/// Out of the tunnel to the application. Only close_notify reads as an end; a bare end of the TCP connection is an error.
async fn receive(
    mut tunnel: impl AsyncRead + Unpin,
    mut app: impl AsyncWrite + Unpin,
    mut verdict: bool,
    count: Count<'_>,
) -> Result<(), Fault> {
    let mut buffer = Buffer::new();
    loop {
        let n = buffer.fill(&mut tunnel, 0).await.map_err(|e| if verdict { unanswered(e) } else { Fault::Tunnel(e) })?;
        let mut bytes = &buffer.bytes[..n];
        if verdict {
            let (first, rest) = bytes.split_first().ok_or(Fault::NoVerdict)?;
            match Verdict::decode(*first) {
                Verdict::Accepted => bytes = rest,
                Verdict::Refused(why) => return Err(Fault::Refused(why)),
            }
            verdict = false;
        }
        if n == 0 {
            return app.shutdown().await.map_err(Fault::App);
        }
        app.write_all(bytes).await.map_err(Fault::App)?;
        count.add(bytes.len());
        buffer.grow();
    }
}

/// In TLS 1.3 the dialler has finished its handshake before the other side looked at its certificate: an alert in place of the
/// verdict is that side's no.
fn unanswered(error: io::Error) -> Fault {
    let inner = error.get_ref().and_then(|e| e.downcast_ref::<rustls::Error>());
    if matches!(inner, Some(rustls::Error::AlertReceived(_))) { Fault::Handshake(error) } else { Fault::Tunnel(error) }
}
