//! HTTP/1 on this host: the local API, the admin port, and the applications of the demonstration.
//!
//! hyper is in the program once for every kind of connection, body and answering function. So these are of one type each, which is
//! forgotten at the door: requests here come from people and scrapers.

use std::convert::Infallible;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::body::{Body, Frame, Incoming};
use hyper::client::conn::http1 as client;
use hyper::server::conn::http1 as server;
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

/// A connection of any kind.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

type Io = TokioIo<Box<dyn Stream>>;

fn io(stream: impl Stream + 'static) -> Io {
    TokioIo::new(Box::new(stream))
}

/// What a client may take.
pub(crate) struct Limits {
    /// How long the head of a request may take, and how long a connection may be idle.
    pub(crate) head: Duration,
    /// Most bytes of a request's head.
    pub(crate) head_size: usize,
    /// Whether there may be another request on the connection.
    pub(crate) keep_alive: bool,
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Text>, Infallible>> + Send>>;

/// Answers what is asked on a connection, until it ends.
pub(crate) fn serve<F: Future<Output = Response<Text>> + Send + 'static>(
    stream: impl Stream + 'static,
    limits: Limits,
    answer: impl Fn(Request<Incoming>) -> F + Send + 'static,
) -> impl Future<Output = hyper::Result<()>> {
    let answer: Box<dyn Fn(Request<Incoming>) -> Answer + Send> = Box::new(move |request| {
        let answer = answer(request);
        Box::pin(async move { Ok(answer.await) })
    });
    server::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .max_buf_size(limits.head_size)
        .keep_alive(limits.keep_alive)
        .serve_connection(io(stream), service_fn(answer))
}

/// What a request is sent with, and the connection, which has to be driven beside it.
pub(crate) type Asking = (client::SendRequest<Full<Bytes>>, client::Connection<Io, Full<Bytes>>);

/// Asks on a connection.
pub(crate) fn ask(stream: impl Stream + 'static) -> impl Future<Output = hyper::Result<Asking>> {
    client::handshake(io(stream))
}

/// The text of an answer: whole, or piece by piece as it is written.
pub(crate) enum Text {
    /// All of it, until it is sent.
    Whole(Option<Bytes>),
    /// What a thread writes meanwhile.
    Pieces(mpsc::Receiver<Piece>),
}

/// A piece, or the word that there is no more: an answer that ends without it was cut short, and must not look complete.
pub(crate) enum Piece {
    /// More.
    Next(Bytes),
    /// That was all.
    End,
}

impl Body for Text {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        match self.get_mut() {
            Self::Whole(bytes) => Poll::Ready(bytes.take().map(|b| Ok(Frame::data(b)))),
            Self::Pieces(receive) => Poll::Ready(match ready!(receive.poll_recv(cx)) {
                Some(Piece::Next(bytes)) => Some(Ok(Frame::data(bytes))),
                Some(Piece::End) => None,
                None => Some(Err(std::io::ErrorKind::UnexpectedEof.into())),
            }),
        }
    }

    fn is_end_stream(&self) -> bool {
        matches!(self, Self::Whole(None))
    }

    fn size_hint(&self) -> hyper::body::SizeHint {
        match self {
            Self::Whole(bytes) => hyper::body::SizeHint::with_exact(bytes.as_ref().map_or(0, |b| b.len() as u64)),
            Self::Pieces(_) => hyper::body::SizeHint::default(),
        }
    }
}
