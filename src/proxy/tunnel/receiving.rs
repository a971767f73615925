//! From the wire to the application: whole records, opened where they lie and handed on several at a time.
//!
//! Owns what was read and not handed on, and what may come between data: alerts and new keys. Invariant: bytes are handed on only after
//! their record was found good, in order, and an end is told only where the peer said one.

use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use rustls::AlertDescription;
use tokio::task::yield_now;

use super::buffers::{Buffer, SLOT, SLOTS};
use super::stream::{Stream, writable, write_all};
use super::{Keys, TURN, Version, broken};
use crate::identity::traffic::{Kind, RecordError, Traffic, record_length};
use crate::proxy::Fault;
use crate::proxy::edges::Count;
use crate::proxy::header::Verdict;

/// How often a peer may renew its keys without saying anything in between. Each costs us a few hashes.
const MAX_RENEWALS: u32 = 32;
/// Pieces of data handed to the application in one call.
const PIECES: usize = 16;

pub(super) struct Receiving {
    traffic: Traffic,
    renewals: u32,
    /// Bytes from the wire that were not handed on yet.
    pub(super) held: Option<Held>,
    /// What came in one record with the header, and behind it.
    pub(super) early: Vec<u8>,
    /// The last read filled its buffer.
    busy: bool,
    /// The kernel was asked to have room for whole records, see [`Receiving::lean`].
    pub(super) roomy: bool,
    /// There was no buffer, and the kernel has the beginning of a record.
    pub(super) begun: bool,
    /// The direction has ended; what is behind it is the next stream's.
    pub(super) over: bool,
    /// What broke the tunnel behind records that are good. Boxed: every connection at rest keeps room for it.
    fault: Option<Box<Fault>>,
}

pub(super) struct Held {
    pub(super) buffer: Buffer,
    start: usize,
    end: usize,
}

impl Held {
    /// A buffer of which so much is filled.
    pub(super) fn new(buffer: Buffer, end: usize) -> Self {
        Self { buffer, start: 0, end }
    }
}

/// What some whole records were: where in the buffer their data lies. Narrow numbers, because a connection at rest keeps room for it.
#[derive(Default)]
pub(super) struct Batch {
    pieces: [Range<u32>; PIECES],
    /// Pieces that were written.
    done: u32,
    count: u32,
    pub(super) ended: bool,
}

impl Receiving {
    /// With what came behind the handshake.
    pub(super) fn new(traffic: Traffic, left: Option<(Buffer, usize)>) -> Self {
        let held = left.map(|(buffer, end)| Held::new(buffer, end));
        Self { traffic, renewals: 0, held, early: Vec::new(), busy: false, roomy: false, begun: false, over: false, fault: None }
    }

    /// Out of the tunnel to the application.
    #[allow(clippy::manual_async_fn)] // as `Sending::send`
    pub(super) fn receive(
        &mut self,
        wire: &impl Stream,
        app: &impl Stream,
        keys: &Keys,
        version: Version,
        mut verdict: bool,
        count: Count<'_>,
    ) -> impl Future<Output = Result<(), Fault>> {
        async move {
            if !self.early.is_empty() {
                write_all(app, &mut [IoSlice::new(&self.early)]).await.map_err(Fault::App)?;
                count.add(self.early.len());
                self.early = Vec::new();
            }
            let mut turn = 0;
            loop {
                let Some(mut batch) = self.next(wire, Some(app), keys, version, verdict).await? else {
                    let write = |bytes: &[u8]| {
                        let written = app.try_write_vectored(&[IoSlice::new(bytes)])?;
                        count.add(written);
                        Ok(written)
                    };
                    if Box::pin(self.lean(wire, Some(app), keys, version, &mut verdict, write)).await? {
                        return self.ended(app, verdict);
                    }
                    continue;
                };
                if let Some(held) = &self.held {
                    if verdict && !batch.is_empty() {
                        match Verdict::decode(held.buffer[batch.pieces[0].start as usize]) {
                            Verdict::Accepted => batch.pieces[0].start += 1,
                            Verdict::Refused(why) => return Err(Fault::Refused(why)),
                        }
                        verdict = false;
                        keys.accept();
                    }
                    batch.write(&held.buffer, app, count).await.map_err(Fault::App)?;
                }
                self.release();
                turn += usize::from(self.busy);
                if turn == TURN {
                    turn = 0;
                    yield_now().await;
                }
                if batch.ended {
                    return self.ended(app, verdict);
                }
            }
        }
    }

    fn ended(&mut self, app: &impl Stream, verdict: bool) -> Result<(), Fault> {
        self.over = false;
        match verdict {
            true => Err(Fault::NoVerdict),
            false => app.end().map_err(Fault::App),
        }
    }

    /// The number of the next record.
    pub(super) fn used(&self) -> u64 {
        self.traffic.used()
    }

    pub(super) fn go_back_to(&mut self, record: u64) {
        self.traffic.go_back_to(record);
    }

    /// The next whole records, some data or an end. `app` is who will get them: nothing is read while it takes nothing. None when there is
    /// no buffer to be had and nothing in hand: [`Receiving::lean`] goes on.
    pub(super) async fn next<W: Stream, A: Stream>(
        &mut self,
        wire: &W,
        app: Option<&A>,
        keys: &Keys,
        version: Version,
        unanswered: bool,
    ) -> Result<Option<Batch>, Fault> {
        loop {
            if let Some(batch) = self.batch(keys, version, unanswered)? {
                return Ok(Some(batch));
            }
            if !self.fill(wire, app).await? {
                return Ok(None);
            }
        }
    }

    /// What is in hand, if it is something.
    pub(super) fn batch(&mut self, keys: &Keys, version: Version, unanswered: bool) -> Result<Option<Batch>, Fault> {
        let mut batch = Batch::default();
        if let Some(fault) = self.fault.take() {
            return Err(*fault);
        }
        if let Err(fault) = self.open(&mut batch, keys, version, unanswered) {
            if batch.is_empty() {
                return Err(fault);
            }
            self.fault = Some(Box::new(fault));
        }
        batch.ended = self.over;
        Ok((batch.ended || !batch.is_empty()).then_some(batch))
    }

    /// Reads once; not if there is no buffer to be had.
    async fn fill(&mut self, wire: &impl Stream, app: Option<&impl Stream>) -> Result<bool, Fault> {
        self.release();
        if let Some(held) = &mut self.held {
            // The rest of a record is to come: it and what is behind it go to the front, of a large buffer if much is coming.
            let rest = held.start..held.end;
            let length = rest.len();
            if self.busy
                && held.buffer.slots() < SLOTS
                && let Some(mut larger) = Buffer::larger()
            {
                larger[..length].copy_from_slice(&held.buffer[rest]);
                held.buffer = larger;
            } else {
                held.buffer.copy_within(rest, 0);
            }
            (held.start, held.end) = (0, length);
        }
        loop {
            if let (None, Some(app)) = (&self.held, app) {
                writable(app).await.map_err(Fault::App)?;
            }
            let begun = std::mem::take(&mut self.begun);
            let ready = poll_fn(|context| {
                let ready = wire.poll_readable(context);
                if ready.is_pending() {
                    self.shrink();
                }
                ready
            });
            // Should the kernel have no room for the rest, nothing would ever stir: then it is looked whether there is a buffer by now.
            let still = match begun {
                false => ready.await.map(|()| false),
                true => {
                    Box::pin(async {
                        tokio::select! { ready = ready => ready.map(|()| false), () = wire.a_moment() => Ok(true) }
                    })
                    .await
                }
            };
            let still = still.map_err(Fault::Tunnel)?;
            if self.held.is_none() {
                self.held = Buffer::fitting(self.busy).map(|buffer| Held::new(buffer, 0));
            }
            let Some(held) = &mut self.held else {
                if still {
                    self.begun = true;
                    continue;
                }
                return Ok(false);
            };
            let room = &mut held.buffer[held.end..];
            match if still { wire.read_now(&mut [IoSliceMut::new(room)]) } else { wire.try_read(room) } {
                Ok(0) => return Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => {
                    held.end += n;
                    self.busy = held.end >= SLOT;
                    return Ok(true);
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.release(),
                Err(e) => return Err(Fault::Tunnel(e)),
            }
        }
    }

    /// Gives a buffer back that has nothing in it.
    pub(super) fn release(&mut self) {
        if self.held.as_ref().is_some_and(|h| h.start == h.end) {
            self.held = None;
        }
    }

    /// Nothing comes at the moment: what there is waits in as little as possible.
    fn shrink(&mut self) {
        self.release();
        if let Some(held) = &mut self.held
            && held.buffer.slots() > 1
        {
            let rest = held.start..held.end;
            let length = rest.len();
            if let Some(mut smaller) = Buffer::small()
                && length <= smaller.len()
            {
                smaller[..length].copy_from_slice(&held.buffer[rest]);
                *held = Held::new(smaller, length);
            }
        }
    }

    /// Opens the whole records in hand, as many as fit a batch.
    fn open(&mut self, batch: &mut Batch, keys: &Keys, version: Version, unanswered: bool) -> Result<(), Fault> {
        let Some(held) = &mut self.held else { return Ok(()) };
        while (batch.count as usize) < PIECES && !self.over {
            let Some(length) = record_length(&held.buffer[held.start..held.end]).map_err(broken)? else { break };
            if held.start + length > held.end {
                break;
            }
            let record = &mut held.buffer[held.start..][..length];
            let (kind, content) = self.traffic.open(record).map_err(broken)?;
            let place = held.start + content.start..held.start + content.end;
            held.start += length;
            match kind {
                Kind::Data if !content.is_empty() => {
                    self.renewals = 0;
                    batch.add(place);
                }
                Kind::Data => self.over = version == Version::Two,
                Kind::Alert => self.over = alert(&held.buffer[place], version, unanswered)?,
                Kind::Handshake => {
                    // KeyUpdate is the only message there is after the handshake: nobody makes tickets.
                    let asked = match held.buffer[place] {
                        [24, 0, 0, 1, asked @ 0..=1] => asked == 1,
                        _ => return Err(broken(RecordError::Malformed)),
                    };
                    self.renewals += 1;
                    if self.renewals > MAX_RENEWALS {
                        return Err(broken(RecordError::Exhausted));
                    }
                    let next = keys.schedule.lock().unwrap_or_else(PoisonError::into_inner).next_receiving();
                    self.traffic = next.map_err(|e| Fault::Tunnel(io::Error::other(e)))?;
                    if asked {
                        keys.owed.store(true, Ordering::Relaxed);
                    }
                }
            }
        }
        Ok(())
    }
}

impl Batch {
    fn add(&mut self, place: Range<usize>) {
        // Buffers are much smaller than 4 GiB.
        self.pieces[self.count as usize] = place.start as u32..place.end as u32;
        self.count += 1;
    }

    /// Whether there is no data.
    pub(super) fn is_empty(&self) -> bool {
        self.count == 0
    }

    pub(super) fn pieces(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.pieces[self.done as usize..self.count as usize].iter().map(|p| p.start as usize..p.end as usize)
    }

    /// Writes all of it, and counts what is written.
    async fn write(&mut self, buffer: &[u8], to: &impl Stream, count: Count<'_>) -> io::Result<()> {
        self.advance(0);
        while self.done < self.count {
            match self.write_once(buffer, to) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => count.add(n),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => writable(to).await?,
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Apart from [`Batch::write`], so that what the kernel is handed is not kept while it takes nothing.
    fn write_once(&mut self, buffer: &[u8], to: &impl Stream) -> io::Result<usize> {
        let mut out = [IoSlice::new(&[]); PIECES];
        out.iter_mut().zip(self.pieces()).for_each(|(out, piece)| *out = IoSlice::new(&buffer[piece]));
        let written = to.try_write_vectored(&out[..(self.count - self.done) as usize])?;
        self.advance(written);
        Ok(written)
    }

    /// Takes what was written off the front, and pieces with nothing left in them.
    fn advance(&mut self, mut written: usize) {
        for piece in &mut self.pieces[self.done as usize..self.count as usize] {
            let step = written.min(piece.len());
            piece.start += step as u32;
            written -= step;
            if piece.start < piece.end {
                break;
            }
            self.done += 1;
        }
    }
}

/// Whether an alert ends the direction. In TLS 1.3 the dialler has finished its handshake before the other side looked at its
/// certificate: any other alert in place of the verdict is that side's no.
fn alert(content: &[u8], version: Version, unanswered: bool) -> Result<bool, Fault> {
    let &[_, description] = content else { return Err(broken(RecordError::Malformed)) };
    match (AlertDescription::from(description), version) {
        (AlertDescription::CloseNotify, Version::One) => Ok(true),
        (AlertDescription::CloseNotify, Version::Two) => Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into())),
        (other, _) => {
            let error = io::Error::new(io::ErrorKind::InvalidData, rustls::Error::AlertReceived(other));
            Err(if unanswered { Fault::Handshake(error) } else { Fault::Tunnel(error) })
        }
    }
}
