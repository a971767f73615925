//! Applications that do not read what is sent to them: more of them than there are buffers. They hold what they have in hand for as long as
//! they like, and keep nobody from anything.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::time::{sleep, timeout};

use super::lab::lab;
use super::{PATIENCE, all, echo, pattern};
use crate::proxy::tunnel;

const LONG: usize = 12 << 20;

/// Says the same to everybody.
async fn library(listener: TcpListener, book: &'static [u8]) {
    loop {
        let (mut reader, _) = listener.accept().await.unwrap();
        tokio::spawn(async move {
            let _ = reader.write_all(book).await;
            let _ = reader.shutdown().await;
            let _ = reader.read_to_end(&mut Vec::new()).await;
        });
    }
}

#[tokio::test]
async fn what_nobody_reads_keeps_nobody_from_anything() {
    // Both hosts are in one process and have these together.
    let lent = tunnel::own(10);
    let lab = lab().await;
    let (books, at_books) = lab.service().await;
    let book: &'static [u8] = pattern(LONG, 7).leak();
    tokio::spawn(library(books, book));
    let (talk, at_talk) = lab.service().await;
    tokio::spawn(echo(talk));
    let (shelf, front) = (lab.a.capture(at_books).await, lab.a.capture(at_talk).await);
    let mut readers = Vec::new();
    for _ in 0..40 {
        readers.push(TcpStream::connect(shelf).await.unwrap());
    }
    // Until nothing moves any more.
    let moved = || lab.a.edges().iter().chain(&lab.b.edges()).map(|e| e.figures.bytes_in + e.figures.bytes_out).sum::<u64>();
    loop {
        let before = moved();
        sleep(Duration::from_millis(300)).await;
        if moved() == before {
            break;
        }
    }
    let (now, _) = lent();
    assert!(now.refused > 0, "there was a buffer for everybody: {now:?}");
    // Short ones and a long one, up and down.
    let words = pattern(3 << 20, 8);
    for said in [&b"x"[..], b"short", &words[..20_000], &words] {
        let mut app = TcpStream::connect(front).await.unwrap();
        let (mut from, mut to) = app.split();
        let heard = async {
            let (said, heard) = tokio::join!(
                async {
                    to.write_all(said).await.unwrap();
                    to.shutdown().await.unwrap();
                },
                async {
                    let mut heard = Vec::new();
                    from.read_to_end(&mut heard).await.unwrap();
                    heard
                }
            );
            (said, heard).1
        };
        assert!(timeout(PATIENCE, heard).await.expect("an answer beside what nobody reads") == said);
    }
    // And who begins to read at last gets all of it, one after the other and out of order.
    for mut reader in readers.drain(..).rev().step_by(9) {
        reader.shutdown().await.unwrap();
        assert!(timeout(PATIENCE, all(&mut reader)).await.expect("what was held") == book);
    }
    let (now, most) = lent();
    assert!(most <= now.bound, "{most} were lent, {} may be", now.bound);
}
