//! Length-prefixed messages on a stream: how the join handshake travels. Bounded, cancel-unsafe, nothing else.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// Sends one message: a 32-bit big-endian length, then the bytes.
///
/// # Errors
/// What the stream says; `InvalidInput` for a message over 4 GiB.
pub(crate) async fn send(io: &mut (impl AsyncWrite + Unpin), message: &[u8]) -> io::Result<()> {
    let length = u32::try_from(message.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
    io.write_all(&length.to_be_bytes()).await?;
    io.write_all(message).await?;
    io.flush().await
}

/// Receives one message of at most `limit` bytes. Memory grows with what has arrived, not with what is announced.
///
/// # Errors
/// What the stream says; `UnexpectedEof` when it ends inside a message; `InvalidData` for one longer than `limit`.
pub(crate) async fn receive(io: &mut (impl AsyncRead + Unpin), limit: usize) -> io::Result<Vec<u8>> {
    let length = io.read_u32().await? as usize;
    if length > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("a message of {length} bytes, over the limit of {limit}"),
        ));
    }
    let mut message = Vec::with_capacity(length.min(4096));
    io.take(length as u64).read_to_end(&mut message).await?;
    if message.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whole_messages_or_an_error() {
        let (mut a, mut b) = tokio::io::duplex(64);
        let sender = tokio::spawn(async move {
            send(&mut a, b"hello").await.unwrap();
            send(&mut a, &[7; 100]).await.unwrap();
            a.write_all(&[0, 0, 0, 9, 1, 2]).await.unwrap();
        });
        assert_eq!(receive(&mut b, 5).await.unwrap(), b"hello");
        assert_eq!(receive(&mut b, 99).await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let mut rest = [0; 100];
        b.read_exact(&mut rest).await.unwrap();
        assert_eq!(receive(&mut b, 9).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        sender.await.unwrap();
    }
}
