//! What a tunnel needs of a connection, its own and the application's: a TCP connection, or in a test what stands for one.
//!
//! Owns how to wait: one waits at a time, and needs no more than the place for one in the socket. What [`TcpStream::readable`] needs for
//! any number is kept by every connection at rest.

use std::future::{pending, poll_fn};
use std::io::{self, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::task::{Context, Poll};
use std::time::Duration;

use rustix::net::{RecvFlags, recv};
use socket2::SockRef;
use tokio::io::Interest;
use tokio::net::TcpStream;
use tokio::time::sleep;

use crate::intercept::socket::{make_room, receive};

/// A connection of bytes, both directions of which end by themselves. Whoever finds nothing to do is told `WouldBlock`.
pub trait Stream: Send + Sync {
    /// Whether there may be something to read, or the end.
    ///
    /// # Errors
    /// The connection's own, here and below.
    fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Whether there may be room to write.
    ///
    /// # Errors
    /// As above.
    fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>>;

    /// Reads what is there; 0 bytes at the end.
    ///
    /// # Errors
    /// As above.
    fn try_read(&self, into: &mut [u8]) -> io::Result<usize> {
        self.try_read_vectored(&mut [IoSliceMut::new(into)])
    }

    /// As [`Stream::try_read`], into one piece after another.
    ///
    /// # Errors
    /// As above.
    fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize>;

    /// As [`Stream::try_read_vectored`], without waiting for the runtime to hear that there is something.
    ///
    /// # Errors
    /// As above.
    fn read_now(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.try_read_vectored(into)
    }

    /// Writes as much as there is room for.
    ///
    /// # Errors
    /// As above.
    fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize>;

    /// Looks at what would be read next, of which it tells one byte, without waiting for the runtime to hear of it.
    ///
    /// # Errors
    /// As above.
    fn peek(&self) -> io::Result<usize>;

    /// As [`Stream::peek`], and where there is nothing [`Stream::poll_readable`] waits anew.
    ///
    /// # Errors
    /// As above.
    fn try_peek(&self) -> io::Result<usize>;

    /// Looks at what would be read next, all that is there and fits. `WouldBlock` when that is fewer than `least` bytes, and it is waited
    /// anew; 0 bytes at the end.
    ///
    /// # Errors
    /// As above.
    fn try_look(&self, into: &mut [u8], least: usize) -> io::Result<usize>;

    /// Has more come although nothing is taken, if that is possible. Looking again is what tells the other end of it.
    ///
    /// # Errors
    /// As above.
    fn make_room(&self) -> io::Result<()> {
        Ok(())
    }

    /// Takes what was looked at: fills `into`.
    ///
    /// # Errors
    /// As above; when it is not there.
    fn take(&self, into: &mut [u8]) -> io::Result<()>;

    /// Waits until there may be more to look at. Returns whether there will never be.
    fn more(&self) -> impl Future<Output = io::Result<bool>> + Send;

    /// Waits for as long as somebody may be kept waiting who hears of nothing. For ever where there is no clock.
    fn a_moment(&self) -> impl Future<Output = ()> + Send {
        pending()
    }

    /// Ends what is written.
    ///
    /// # Errors
    /// As above.
    fn end(&self) -> io::Result<()>;

    /// Waits until the connection is reset.
    fn broken_off(&self) -> impl Future<Output = io::Error> + Send;
}

impl Stream for TcpStream {
    fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_read_ready(context)
    }

    fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_write_ready(context)
    }

    fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        // With the last byte in hand the runtime is told at once that there is nothing more: asking the kernel again would cost each
        // message another system call.
        let mut last = None;
        let read = self.try_io(Interest::READABLE, || match receive(self, into)? {
            (n, true) if n > 0 => {
                last = Some(n);
                Err(io::ErrorKind::WouldBlock.into())
            }
            (n, _) => Ok(n),
        });
        last.map_or(read, Ok)
    }

    fn read_now(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        Ok(receive(self, into)?.0)
    }

    fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        self.try_write_vectored(from)
    }

    fn peek(&self) -> io::Result<usize> {
        SockRef::from(self).peek(&mut [MaybeUninit::uninit()])
    }

    fn try_peek(&self) -> io::Result<usize> {
        self.try_io(Interest::READABLE, || Stream::peek(self))
    }

    fn try_look(&self, into: &mut [u8], least: usize) -> io::Result<usize> {
        self.try_io(Interest::READABLE, || match recv(self, &mut *into, RecvFlags::PEEK)? {
            (_, few) if 0 < few && few < least => Err(io::ErrorKind::WouldBlock.into()),
            (_, enough) => Ok(enough),
        })
    }

    fn make_room(&self) -> io::Result<()> {
        make_room(self)
    }

    fn take(&self, mut into: &mut [u8]) -> io::Result<()> {
        while !into.is_empty() {
            match recv(self, &mut *into, RecvFlags::empty())? {
                (_, 0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                (_, taken) => into = &mut into[taken..],
            }
        }
        Ok(())
    }

    async fn more(&self) -> io::Result<bool> {
        self.ready(Interest::READABLE).await.map(|ready| ready.is_read_closed())
    }

    async fn a_moment(&self) {
        sleep(Duration::from_millis(100)).await;
    }

    fn end(&self) -> io::Result<()> {
        SockRef::from(self).shutdown(Shutdown::Write)
    }

    async fn broken_off(&self) -> io::Error {
        loop {
            match self.ready(Interest::ERROR).await.and_then(|_| self.take_error()) {
                Ok(None) => _ = self.try_io(Interest::ERROR, || Err::<(), _>(io::ErrorKind::WouldBlock.into())),
                Ok(Some(e)) | Err(e) => return e,
            }
        }
    }
}

/// Waits until there is something to read.
pub(super) async fn readable(stream: &impl Stream) -> io::Result<()> {
    poll_fn(|context| stream.poll_readable(context)).await
}

/// Waits until there is room to write.
pub(super) async fn writable(stream: &impl Stream) -> io::Result<()> {
    poll_fn(|context| stream.poll_writable(context)).await
}

/// Waits until something comes. Returns whether it is more than the end.
pub(super) async fn stirs(stream: &impl Stream) -> io::Result<bool> {
    loop {
        readable(stream).await?;
        match stream.try_peek() {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
            done => return done.map(|n| n > 0),
        }
    }
}

/// Writes all of it.
pub(super) async fn write_all(to: &impl Stream, mut pieces: &mut [IoSlice<'_>]) -> io::Result<()> {
    // Takes empty pieces off the front.
    IoSlice::advance_slices(&mut pieces, 0);
    while !pieces.is_empty() {
        match to.try_write_vectored(pieces) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => IoSlice::advance_slices(&mut pieces, n),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => writable(to).await?,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}
