//! One record without a buffer of its own, for when all that may be lent is lent.
//!
//! The bytes stay with the kernel until they have reached the other side: they are looked at, sealed or opened, written as far as there is
//! room, and only then taken. What that needs is at hand for as long as nobody is waited for, so it is always there, and who waits holds
//! nothing. The price is that a record which goes on in pieces is sealed or opened anew for each.
//!
//! Invariant: a sequence number is used again for the very record it was used for and nothing else. Of a record whose first bytes are on the
//! wire the rest follows only if it has the same tag.

use std::io::{self, IoSlice};

use super::buffers::Buffer;
use super::receiving::{Held, Receiving};
use super::stream::{Stream, readable, writable, write_all};
use super::{Keys, Said, Sending, Version, broken};
use crate::identity::traffic::{HEADER, MAX_DATA, RecordError, TAG, record_length};
use crate::proxy::Fault;
use crate::proxy::header::Verdict;

/// A record of which the first bytes are on the wire.
struct Begun {
    /// Bytes of the application in it.
    said: usize,
    ended: bool,
    tag: [u8; TAG],
    written: usize,
}

enum Step {
    Done,
    /// The other side takes nothing more at the moment.
    Full,
    /// There is nothing to be had at the moment, or not all of a record.
    Short,
}

impl Sending {
    /// As one turn of [`Sending::send`], with what goes in front and how much of that is ours. How much the application said, and whether that was its end.
    #[allow(clippy::too_many_arguments)] // as `send`
    pub(super) async fn lean(
        &mut self,
        wire: &impl Stream,
        app: &impl Stream,
        keys: &Keys,
        version: Version,
        lead: (&[u8], usize),
        now: bool,
        before: &mut Said,
    ) -> Result<(usize, bool), Fault> {
        if !self.unsent.is_empty() {
            write_all(wire, &mut [IoSlice::new(&self.unsent)]).await.map_err(Fault::Tunnel)?;
            self.unsent = Vec::new();
        }
        let mut begun = None;
        loop {
            match self.lean_once(wire, app, keys, version, lead, now, before, &mut begun)? {
                (Step::Done, said, ended) => return Ok((said, ended)),
                (Step::Full, ..) => writable(wire).await.map_err(Fault::Tunnel)?,
                (Step::Short, ..) => readable(app).await.map_err(Fault::App)?,
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // as `send`, and what is begun
    fn lean_once(
        &mut self,
        wire: &impl Stream,
        app: &impl Stream,
        keys: &Keys,
        version: Version,
        (lead, told): (&[u8], usize),
        now: bool,
        before: &mut Said,
        begun: &mut Option<Begun>,
    ) -> Result<(Step, usize, bool), Fault> {
        let mut buffer = Buffer::at_hand();
        let front = HEADER + lead.len();
        buffer[HEADER..front].copy_from_slice(lead);
        let room = &mut buffer[front..HEADER + MAX_DATA];
        let (said, ended) = match begun {
            Some(Begun { said: 0, ended, .. }) => (0, *ended),
            Some(Begun { said, ended, .. }) => match app.try_look(&mut room[..*said], *said) {
                Ok(n) if n == *said => (n, *ended),
                Ok(_) => return Err(Fault::App(io::ErrorKind::UnexpectedEof.into())),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok((Step::Short, 0, false)),
                Err(e) => return Err(Fault::App(e)),
            },
            None if now && (before.ended || room.is_empty()) => (0, before.ended),
            None => match app.try_look(room, 1) {
                Ok(n) => (n, n == 0),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && now => (0, false),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok((Step::Short, 0, false)),
                Err(e) => return Err(Fault::App(e)),
            },
        };
        let (sequence, total) = (self.traffic.used(), lead.len() + said);
        let mut end = self.seal(&mut buffer, total)?;
        let tag = if end > 0 { *buffer[..end].last_chunk().ok_or(broken(RecordError::Malformed))? } else { [0; TAG] };
        if ended {
            end += self.seal_end(&mut buffer[end..], version)?;
        }
        let done = match begun {
            // What is under one number on the wire already is all that may be.
            Some(begun) if begun.tag != tag => return Err(broken(RecordError::Forged)),
            Some(begun) => begun.written,
            None => 0,
        };
        let written = done
            + match wire.try_write_vectored(&[IoSlice::new(&buffer[done..end])]) {
                Ok(0) => return Err(Fault::Tunnel(io::ErrorKind::WriteZero.into())),
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => 0,
                Err(e) => return Err(Fault::Tunnel(e)),
            };
        if written < end {
            self.traffic.go_back_to(sequence);
            // Nothing of it has left this host: it may as well become another one.
            *begun = (written > 0).then_some(Begun { said, ended, tag, written });
            return Ok((Step::Full, 0, false));
        }
        app.take(&mut buffer[..said]).map_err(Fault::App)?;
        before.keep(&buffer[..said], ended, told, keys);
        Ok((Step::Done, said, ended))
    }
}

impl Receiving {
    /// As [`Receiving::next`] and what is done with what it finds, for one record: `sink` takes of its content what it has room for, `app`
    /// says when that is. Whether the record ended the direction. Comes back without one when it is not all there: there may be a buffer
    /// by the time it is, or by and by where the kernel has no room for a whole one.
    #[allow(clippy::too_many_arguments)] // as `next`, and who takes it
    pub(super) async fn lean<A: Stream>(
        &mut self,
        wire: &impl Stream,
        app: Option<&A>,
        keys: &Keys,
        version: Version,
        verdict: &mut bool,
        mut sink: impl FnMut(&[u8]) -> io::Result<usize>,
    ) -> Result<bool, Fault> {
        let mut given = 0;
        loop {
            if let Some(app) = app {
                writable(app).await.map_err(Fault::App)?;
            }
            let over = wire.more().await.map_err(Fault::Tunnel)?;
            match self.lean_once(wire, keys, version, verdict, &mut sink, &mut given)? {
                Step::Done => return Ok(self.over),
                Step::Full => {}
                Step::Short if over => return Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into())),
                Step::Short if given == 0 => {
                    self.begun = true;
                    return Ok(false);
                }
                Step::Short => {}
            }
        }
    }

    fn lean_once(
        &mut self,
        wire: &impl Stream,
        keys: &Keys,
        version: Version,
        verdict: &mut bool,
        sink: &mut impl FnMut(&[u8]) -> io::Result<usize>,
        given: &mut usize,
    ) -> Result<Step, Fault> {
        let mut buffer = Buffer::at_hand();
        let mut least = HEADER;
        let length = loop {
            let have = match wire.try_look(&mut buffer, least) {
                Ok(0) => return Err(Fault::Tunnel(io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => n,
                // Once only: it has the runtime wake us, whatever has come.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock && least > HEADER && !self.roomy => {
                    self.roomy = true;
                    wire.make_room().map_err(Fault::Tunnel)?;
                    continue;
                }
                // The runtime hears of what is behind it: nobody looks at the same bytes again and again.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(Step::Short),
                Err(e) => return Err(Fault::Tunnel(e)),
            };
            match record_length(&buffer[..have]).map_err(broken)? {
                Some(length) if length <= have => break length,
                Some(length) => least = length,
                None => return Err(broken(RecordError::Malformed)),
            }
        };
        let sequence = self.used();
        self.held = Some(Held::new(buffer, length));
        let opened = self.batch(keys, version, *verdict);
        let Some(held) = self.held.take() else { return Err(broken(RecordError::Malformed)) };
        let (batch, mut buffer) = (opened?, held.buffer);
        // One record has one piece, or none.
        if let Some(piece) = batch.as_ref().and_then(|batch| batch.pieces().next()) {
            let mut content = &buffer[piece];
            if *verdict {
                match Verdict::decode(content[0]) {
                    Verdict::Accepted => *given = 1,
                    Verdict::Refused(why) => return Err(Fault::Refused(why)),
                }
                *verdict = false;
                keys.accept();
            }
            content = content.get(*given..).unwrap_or_default();
            while !content.is_empty() {
                match sink(content) {
                    Ok(0) => return Err(Fault::App(io::ErrorKind::WriteZero.into())),
                    Ok(n) => (content, *given) = (&content[n..], *given + n),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                        self.go_back_to(sequence);
                        return Ok(Step::Full);
                    }
                    Err(e) => return Err(Fault::App(e)),
                }
            }
        }
        wire.take(&mut buffer[..length]).map_err(Fault::Tunnel)?;
        Ok(Step::Done)
    }
}
