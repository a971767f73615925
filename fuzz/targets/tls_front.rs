//! The mesh port: arbitrary first bytes of a connection, over a real one. None of them becomes a member, a tunnel or a join, and
//! what they cost and draw in answer is bounded.
#![no_main]

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener as Listener, TcpStream as Client};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use libfuzzer_sys::fuzz_target;
use meshd::fuzzing::handshake;
use meshd::identity::provider;
use meshd::identity::svids::{Issuance, Patience, Svids};
use meshd::identity::tls::{DataTls, NodeTls};
use meshd::identity::verifier::{SvidVerifier, Trust};
use meshd_ca::identity::{SpiffeId, Workload};
use meshd_ca::issue::Leaf;
use meshd_ca::keys::PrivateKey;
use meshd_fuzz::{NOW, WORLD, within};
use socket2::SockRef;
use tokio::net::TcpStream;
use tokio::runtime::{Builder, Runtime};

/// The most that may be answered to somebody unknown: a hello, a certificate and a proof are about a kilobyte.
const MOST_ANSWERED: usize = 4096;
/// The most that one handshake may allocate: the hello may have 64 KiB, and is held a few times over.
const MOST_ALLOCATED: usize = 1 << 20;

struct Own;

impl Issuance for Own {
    type Error = String;
    async fn issue(&self, wanted: &[(Workload, &PrivateKey)]) -> Result<Vec<Option<Leaf>>, String> {
        let domain = WORLD.roster.trust_domain();
        let leaf = |(workload, key): &(Workload, &PrivateKey)| {
            let id = SpiffeId::new(domain.clone(), workload.clone());
            WORLD.issuer.issue(&id, key.public(), WORLD.node(0), Duration::from_secs(3600), NOW).ok()
        };
        Ok(wanted.iter().map(leaf).collect())
    }
}

struct Port {
    runtime: Runtime,
    listener: Listener,
    data: DataTls,
    node: NodeTls,
}

fn port() -> Port {
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime");
    let crypto = provider::provider(true);
    let trust = Arc::new(ArcSwap::from_pointee(Trust::from(WORLD.roster())));
    let verifier = Arc::new(SvidVerifier::new(trust, Arc::new(|| NOW), crypto.clone()));
    let svids = Svids::new(WORLD.node(0), verifier, Patience::default());
    runtime.block_on(async {
        let mut changes = svids.changes();
        tokio::select! {
            _ = svids.run(&Own) => {}
            changed = changes.changed() => changed.expect("issued"),
        }
    });
    assert!(svids.own().is_some());
    let data = DataTls { svids, listeners: Arc::new(|_| None) };
    let node = NodeTls::new(&crypto, &WORLD.keys[0]).expect("a certificate");
    Port { runtime, listener: Listener::bind("127.0.0.1:0").expect("a port"), data, node }
}

thread_local!(static PORT: Port = port());

fuzz_target!(|data: &[u8]| PORT.with(|port| {
    let mut client = Client::connect(port.listener.local_addr().expect("an address")).expect("a connection");
    let (server, _) = port.listener.accept().expect("a connection");
    // No port is worn out by the thousands that follow.
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).expect("an option");
    server.set_nonblocking(true).expect("an option");
    let seen = SockRef::from(&server).try_clone().expect("a descriptor");
    client.write_all(data).expect("room");
    client.shutdown(Shutdown::Write).expect("an end");
    let end = within(MOST_ALLOCATED, || {
        port.runtime.block_on(async {
            let server = TcpStream::from_std(server).expect("a stream");
            let handshake = handshake(server, port.data.clone(), port.node.clone());
            tokio::time::timeout(Duration::from_secs(5), handshake).await
        })
    });
    let end = end.expect("a connection that has ended is still waited for");
    assert!(end.is_err(), "bytes alone became {end:?}");
    drop(seen);
    let (mut answered, mut buffer) = (0, [0; 4096]);
    client.set_read_timeout(Some(Duration::from_secs(5))).expect("an option");
    while let Ok(n @ 1..) = client.read(&mut buffer) {
        answered += n;
    }
    assert!(answered <= MOST_ANSWERED, "{answered} bytes of answer to {} bytes", data.len());
}));
