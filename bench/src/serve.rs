//! The service behind everything that is measured: the first byte of a connection says what it is for.

use std::net::SocketAddr;

use anyhow::Result;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// Takes bytes and answers each [`BLOCK`] of them with one. (Not their end: half-close does not get through every proxy.)
pub(crate) const SINK: u8 = b'S';
/// Sends zeros for ever.
pub(crate) const SOURCE: u8 = b'D';
/// Answers each request, for as long as they come.
pub(crate) const ANSWER: u8 = b'E';
/// Answers one request and closes first.
pub(crate) const ANSWER_ONCE: u8 = b'O';
/// See [`SINK`].
pub(crate) const BLOCK: usize = 1 << 20;
/// The length of a request and of an answer in bytes.
pub(crate) const REQUEST: usize = 64;
/// See [`REQUEST`].
pub(crate) const REPLY: usize = 128;

/// Serves on `at` until the process ends.
///
/// # Errors
/// When it cannot listen.
pub(crate) async fn serve(at: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(at).await?;
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(async move { _ = one(stream).await });
    }
}

async fn one(mut stream: TcpStream) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    let wish = stream.read_u8().await?;
    match wish {
        SINK => {
            let (mut buffer, mut block) = (vec![0; 256 * 1024], 0);
            loop {
                match stream.read(&mut buffer).await? {
                    0 => return Ok(()),
                    n => block += n,
                }
                while block >= BLOCK {
                    block -= BLOCK;
                    stream.write_u8(b'.').await?;
                }
            }
        }
        SOURCE => {
            let zeros = vec![0; 256 * 1024];
            loop {
                stream.write_all(&zeros).await?;
            }
        }
        _ => {
            let (mut request, reply) = ([0; REQUEST], [b'.'; REPLY]);
            loop {
                stream.read_exact(&mut request).await?;
                stream.write_all(&reply).await?;
                if wish == ANSWER_ONCE {
                    return stream.shutdown().await;
                }
            }
        }
    }
}
