//! The handshake of a tunnel, driven record by record so that nothing behind it is read by rustls.
//!
//! Owns the bytes from the first of the ClientHello to the last of the Finished. What it leaves is the keys and the bytes that came behind.

use std::io;
use std::sync::Arc;

use rustls::client::{ClientConnectionData, UnbufferedClientConnection};
use rustls::server::{ServerConnectionData, UnbufferedServerConnection};
use rustls::unbuffered::{ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, UnbufferedStatus};
use rustls::{ClientConfig, CommonState, ExtractedSecrets, ServerConfig};
use rustls_pki_types::ServerName;

use super::buffers::{Buffer, dialling};
use super::stream::{Stream, readable, write_all};
use crate::identity::traffic::{HEADER, MAX_RECORD, Schedule};

/// Bytes that were received and not used yet.
pub struct Input {
    buffer: Buffer,
    have: usize,
    /// The buffer is for the handshake only: nothing behind it is read.
    lent: bool,
}

impl Input {
    /// None yet. Whoever has one bounds how many there are and for how long.
    pub fn empty() -> Self {
        let buffer = Buffer::small();
        Self { lent: buffer.is_none(), buffer: buffer.unwrap_or_else(Buffer::at_hand), have: 0 }
    }

    /// What is there.
    pub fn bytes(&self) -> &[u8] {
        &self.buffer[..self.have]
    }

    /// Waits for more.
    ///
    /// # Errors
    /// The connection's own, `UnexpectedEof` at its end, `InvalidData` when there is no room: more than any handshake needs.
    pub async fn more(&mut self, wire: &impl Stream) -> io::Result<()> {
        self.more_until(wire, self.buffer.len()).await
    }

    async fn more_until(&mut self, wire: &impl Stream, end: usize) -> io::Result<()> {
        if self.have >= end {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a handshake that does not end"));
        }
        loop {
            readable(wire).await?;
            match wire.try_read(&mut self.buffer[self.have..end]) {
                Ok(0) => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the connection ended in the handshake")),
                Ok(n) => {
                    self.have += n;
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    }

    /// Waits until the record at `from` is whole; where it ends.
    async fn record(&mut self, from: usize, wire: &impl Stream) -> io::Result<usize> {
        loop {
            let mut end = from + HEADER;
            if let Some((header, _)) = self.bytes().get(from..).and_then(|b| b.split_first_chunk::<HEADER>()) {
                let len = HEADER + usize::from(u16::from_be_bytes([header[3], header[4]]));
                if len > MAX_RECORD {
                    return Err(io::Error::new(io::ErrorKind::InvalidData, "not TLS"));
                }
                end = from + len;
                if end <= self.have {
                    return Ok(end);
                }
            }
            let room = self.buffer.len();
            self.more_until(wire, if self.lent { end.min(room) } else { room }).await?;
        }
    }

    fn discard(&mut self, n: usize) {
        self.buffer.copy_within(n..self.have, 0);
        self.have -= n;
    }

    /// The buffer and how much of it is filled; none when it is empty.
    pub(super) fn left(self) -> Option<(Buffer, usize)> {
        (self.have > 0).then_some((self.buffer, self.have))
    }
}

/// One side of a handshake.
trait Side {
    type Data;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data>;
    fn common(&self) -> &CommonState;
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error>;
    /// The dialler's last flight waits for the first application data, so that both leave in one packet.
    const LAST_FLIGHT_WAITS: bool;
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, kernel)| (secrets, Schedule::Client(kernel)))
    }
    const LAST_FLIGHT_WAITS: bool = true;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;
    fn process<'c, 'i>(&'c mut self, input: &'i mut [u8]) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(input)
    }
    fn common(&self) -> &CommonState {
        self
    }
    fn finish(self) -> Result<(ExtractedSecrets, Schedule), rustls::Error> {
        self.dangerous_into_kernel_connection().map(|(secrets, kernel)| (secrets, Schedule::Server(kernel)))
    }
    const LAST_FLIGHT_WAITS: bool = false;
}

/// A finished handshake.
pub(super) struct Shaken<T> {
    pub(super) secrets: ExtractedSecrets,
    pub(super) schedule: Schedule,
    /// What `look` found in the connection.
    pub(super) seen: T,
    /// What is still to be sent before anything else.
    pub(super) unsent: Vec<u8>,
    /// What came behind the handshake.
    pub(super) input: Input,
}

/// Dials: `look` sees the finished connection while rustls still knows the peer's certificate.
pub(super) async fn dial<T>(
    wire: &impl Stream,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
    look: impl FnOnce(&CommonState) -> io::Result<T>,
) -> io::Result<Shaken<T>> {
    let _place = dialling().await;
    let side = UnbufferedClientConnection::new(config, name).map_err(invalid)?;
    shake(wire, side, Input::empty(), look).await
}

/// Answers a dialler whose first bytes are in `input`.
pub(super) async fn answer<T>(
    wire: &impl Stream,
    config: Arc<ServerConfig>,
    input: Input,
    look: impl FnOnce(&CommonState) -> io::Result<T>,
) -> io::Result<Shaken<T>> {
    let side = UnbufferedServerConnection::new(config).map_err(invalid)?;
    shake(wire, side, input, look).await
}

enum Next {
    Again,
    Flush,
    More,
    Done,
    Failed(rustls::Error),
}

async fn shake<S: Side, T>(
    wire: &impl Stream,
    mut side: S,
    mut input: Input,
    look: impl FnOnce(&CommonState) -> io::Result<T>,
) -> io::Result<Shaken<T>> {
    let mut out = Vec::new();
    let mut offered = 0;
    loop {
        let UnbufferedStatus { discard, state, .. } = side.process(&mut input.buffer[..offered]);
        let next = match state {
            Ok(ConnectionState::EncodeTlsData(mut some)) => {
                encode(&mut some, &mut out)?;
                Next::Again
            }
            Ok(ConnectionState::TransmitTlsData(mut all)) => {
                let last = S::LAST_FLIGHT_WAITS && all.may_encrypt_app_data().is_some();
                all.done();
                if last { Next::Again } else { Next::Flush }
            }
            Ok(ConnectionState::BlockedHandshake) => Next::More,
            Ok(ConnectionState::WriteTraffic(_)) => Next::Done,
            Ok(_) => Next::Failed(rustls::Error::HandshakeNotComplete),
            Err(error) => Next::Failed(error),
        };
        input.discard(discard);
        offered -= discard;
        match next {
            Next::Again => {}
            Next::Flush => write_all(wire, &mut [io::IoSlice::new(&std::mem::take(&mut out))]).await?,
            Next::More => offered = input.record(offered, wire).await?,
            Next::Done => break,
            Next::Failed(error) => {
                alert(&mut side, &mut input.buffer[..offered], &mut out);
                let _ = write_all(wire, &mut [io::IoSlice::new(&out)]).await;
                return Err(invalid(error));
            }
        }
    }
    if input.lent && input.have > 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "more than a hello came before it was answered"));
    }
    let seen = look(side.common())?;
    let (secrets, schedule) = side.finish().map_err(invalid)?;
    Ok(Shaken { secrets, schedule, seen, unsent: out, input })
}

fn encode<D>(some: &mut EncodeTlsData<'_, D>, out: &mut Vec<u8>) -> io::Result<()> {
    let before = out.len();
    out.resize(before + 2048, 0);
    let written = match some.encode(&mut out[before..]) {
        Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) => {
            out.resize(before + required_size, 0);
            some.encode(&mut out[before..])
        }
        done => done,
    };
    out.truncate(before + written.map_err(io::Error::other)?);
    Ok(())
}

/// What rustls has to say about a failure, so that the peer learns why.
fn alert<S: Side>(side: &mut S, input: &mut [u8], out: &mut Vec<u8>) {
    // Not a step more: rustls would look at the same bytes again.
    while side.common().wants_write() {
        // With the bytes in hand: rustls remembers how far in them it was.
        let Ok(ConnectionState::EncodeTlsData(mut some)) = side.process(input).state else { return };
        if encode(&mut some, out).is_err() {
            return;
        }
    }
}

fn invalid(error: rustls::Error) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}
