//! The hosts themselves, without a mesh: they reach each other, and an eavesdropper on the link can read what they say. Without
//! this, "nothing was readable" would prove nothing.

use std::time::Duration;

use anyhow::{Result, ensure};

use crate::support::mesh::Setup;
use crate::support::scenario::{Scenario, command, scenario};
use crate::support::traffic::{Server, ask, expect_pattern, send_pattern, sockets};
use crate::support::{equal, marker, role};

pub(crate) const SCENARIOS: &[Scenario] =
    &[scenario!("hosts", plain_traffic_is_readable_on_the_link), scenario!("hosts", what_a_host_runs_dies_with_it)];

fn plain_traffic_is_readable_on_the_link() -> Result<()> {
    let lab = Setup::of(&["a", "b"]).hosts()?;
    let server = Server::answering(lab.host("b"), 8000, "got ")?;
    for to in sockets(lab.host("b"), 8000) {
        let word = marker("hosts");
        let answer = lab.readable(&word, || Ok(ask(lab.host("a"), to, &word)?))?;
        equal!(answer, format!("got {word}"), "answer over {to}");
    }
    let clients: Vec<_> = server.clients().iter().map(|c| c.ip()).collect();
    equal!(clients, crate::support::traffic::addresses(lab.host("a")).to_vec(), "clients as the server sees them");
    let bulk = Server::start(lab.host("b"), 8001, |mut stream| send_pattern(&mut stream, 7, 256))?;
    let (_, report) = lab.watched(&[], || {
        let mut stream = crate::support::traffic::connect(lab.host("a"), sockets(lab.host("b"), 8001)[0])?;
        Ok(expect_pattern(&mut stream, 7, 256)?)
    })?;
    drop(bulk);
    let bytes = report.payload(|from, _| from.port() == 8001);
    ensure!((16 << 20..17 << 20).contains(&bytes), "16 MiB were sent, the capture saw {bytes} bytes");
    Ok(())
}

fn what_a_host_runs_dies_with_it() -> Result<()> {
    let lab = Setup::of(&["a"]).hosts()?;
    let host = lab.host("a").clone();
    let greeter = host.spawn(&mut role::greeter(sockets(&host, 8000)[0], "hi"), "greeter")?;
    let (pid, dir) = (greeter.pid(), host.dir().to_owned());
    let heard = crate::support::eventually(Duration::from_secs(5), "the greeter greets", || {
        let output = host.output(&mut role::listener(sockets(&host, 8000)[0]), Duration::from_secs(5))?;
        ensure!(output.status.success());
        Ok(output.stdout)
    })?;
    equal!(heard, b"hi\n".to_vec(), "what was heard");
    let slow = host.output(command("sleep").arg("30"), Duration::from_millis(100));
    ensure!(slow.is_err(), "a program that takes too long is not waited for");
    drop(greeter);
    drop(lab);
    ensure!(!std::path::Path::new(&format!("/proc/{pid}")).exists(), "the process is still there");
    ensure!(!dir.exists(), "the directory is still there");
    Ok(())
}
