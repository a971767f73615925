//! A connection without a kernel: two queues in memory. What one end writes the other can read at once.

use std::collections::VecDeque;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use meshd::proxy::tunnel::Stream;

/// Bytes that fit until somebody reads.
const ROOM: usize = 1 << 16;

#[derive(Default)]
struct Queue {
    bytes: VecDeque<u8>,
    ended: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

/// One end.
pub(crate) struct Pipe {
    incoming: Arc<Mutex<Queue>>,
    outgoing: Arc<Mutex<Queue>>,
}

/// Both ends of a connection.
pub(crate) fn pipe() -> (Pipe, Pipe) {
    let queue = || Arc::new(Mutex::new(Queue { bytes: VecDeque::with_capacity(ROOM), ..Queue::default() }));
    let (a, b) = (queue(), queue());
    (Pipe { incoming: a.clone(), outgoing: b.clone() }, Pipe { incoming: b, outgoing: a })
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Stream for Pipe {
    fn poll_readable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut queue = lock(&self.incoming);
        if !queue.bytes.is_empty() || queue.ended {
            return Poll::Ready(Ok(()));
        }
        queue.reader = Some(context.waker().clone());
        Poll::Pending
    }

    fn poll_writable(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut queue = lock(&self.outgoing);
        if queue.bytes.len() < ROOM {
            return Poll::Ready(Ok(()));
        }
        queue.writer = Some(context.waker().clone());
        Poll::Pending
    }

    fn try_read_vectored(&self, into: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        let mut queue = lock(&self.incoming);
        if queue.bytes.is_empty() && !queue.ended {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut done = 0;
        for piece in into {
            loop {
                let n = queue.bytes.read(&mut piece[..])?;
                done += n;
                if n == piece.len() || n == 0 {
                    break;
                }
                piece.advance(n);
            }
        }
        if let Some(writer) = queue.writer.take() {
            writer.wake();
        }
        Ok(done)
    }

    fn try_write_vectored(&self, from: &[IoSlice<'_>]) -> io::Result<usize> {
        let mut queue = lock(&self.outgoing);
        let room = ROOM.saturating_sub(queue.bytes.len());
        if room == 0 {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let mut done = 0;
        for piece in from {
            let fits = piece.len().min(room - done);
            queue.bytes.write_all(&piece[..fits])?;
            done += fits;
        }
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
        Ok(done)
    }

    fn peek(&self) -> io::Result<usize> {
        let queue = lock(&self.incoming);
        match queue.bytes.is_empty() {
            true if !queue.ended => Err(io::ErrorKind::WouldBlock.into()),
            empty => Ok(usize::from(!empty)),
        }
    }

    fn try_peek(&self) -> io::Result<usize> {
        self.peek()
    }

    fn try_look(&self, into: &mut [u8], least: usize) -> io::Result<usize> {
        let queue = lock(&self.incoming);
        let there = queue.bytes.len().min(into.len());
        into.iter_mut().zip(&queue.bytes).for_each(|(to, from)| *to = *from);
        if there < least && !(there == 0 && queue.ended) { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(there) }
    }

    fn take(&self, into: &mut [u8]) -> io::Result<()> {
        lock(&self.incoming).bytes.read_exact(into)
    }

    async fn more(&self) -> io::Result<bool> {
        std::future::poll_fn(|context| self.poll_readable(context)).await?;
        Ok(lock(&self.incoming).ended)
    }

    fn end(&self) -> io::Result<()> {
        let mut queue = lock(&self.outgoing);
        queue.ended = true;
        if let Some(reader) = queue.reader.take() {
            reader.wake();
        }
        Ok(())
    }

    async fn broken_off(&self) -> io::Error {
        std::future::pending().await
    }
}
