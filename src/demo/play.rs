//! The two applications of the demonstration: an HTTP server and an HTTP client that know nothing of a mesh.
//!
//! Each is a process of its own, started by [`super::run`] through the hidden flag `--play`, so that each can be a workload of its
//! own. Owns no claim: what is true of their traffic is looked up elsewhere.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use http_body_util::{BodyExt, Full};
use hyper::header::{CONTENT_TYPE, HOST, HeaderValue};
use hyper::{Request, Response};
use tokio::net::{TcpListener, TcpStream};

use super::units;
use crate::http1::{self, Text};
use crate::task;

/// Plays what `words` say: `serve CGROUP ADDR:PORT TEXT` or `fetch CGROUP ADDR:PORT TEXT`. A `CGROUP` of `-` is the one it was
/// started in.
///
/// # Errors
/// What kept the server from listening or the client from its answer.
pub fn play(words: &[String]) -> Result<()> {
    let [role, cgroup, address, text] = words else { bail!("play what? serve or fetch, CGROUP, ADDR:PORT, TEXT") };
    if cgroup != "-" {
        units::enter(Path::new(cgroup)).with_context(|| format!("cannot enter the cgroup {cgroup}"))?;
    }
    let address: SocketAddr = address.parse().context("not ADDR:PORT")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match role.as_str() {
        "serve" => runtime.block_on(serve(address, text)),
        "fetch" => runtime.block_on(fetch(address, text)),
        _ => bail!("play what? serve or fetch"),
    }
}

/// Answers every request with the text, the address the client has as an application sees it, and what was asked for.
async fn serve(address: SocketAddr, text: &str) -> Result<()> {
    let listener = TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))?;
    loop {
        let (stream, client) = listener.accept().await?;
        let text = text.to_owned();
        let limits = http1::Limits { head: Duration::from_secs(30), head_size: 16 << 10, keep_alive: true };
        task::spawn(http1::serve(stream, limits, move |request| {
            let body = format!("{text} for {} who asked for {}\n", client.ip().to_canonical(), request.uri().path());
            let mut response = Response::new(Text::Whole(Some(body.into())));
            response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain"));
            async move { response }
        }));
    }
}

/// Asks for `/text` and prints the answer.
async fn fetch(address: SocketAddr, text: &str) -> Result<()> {
    let stream = TcpStream::connect(address).await.with_context(|| format!("cannot connect to {address}"))?;
    let (mut sender, connection) = http1::ask(stream).await?;
    let connection = task::spawn(connection);
    let request = Request::get(format!("/{text}")).header(HOST, address.to_string()).body(Full::default())?;
    let answer = sender.send_request(request).await.context("no answer")?;
    let body = answer.into_body().collect().await.context("half an answer")?.to_bytes();
    print!("{}", String::from_utf8_lossy(&body));
    drop(sender);
    connection.await??;
    Ok(())
}
