//! A service sees its true client although we stand in between.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use meshd::intercept::RuleConfig;
use meshd::intercept::sniff::Sniffer;
use meshd::intercept::socket::{self, Mark};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::owners::Process;
use crate::world::{MOMENT, Outcome, PATIENCE, Test, World, accept, at};

pub(crate) const TESTS: &[Test] = &[
    Test { name: "a_service_sees_its_clients_address", needs: &[], run: borrowed },
    Test { name: "a_killed_proxy_leaks_nothing_that_was_under_way", needs: &[], run: killed },
    Test { name: "reserved_ports_stay_reserved", needs: &[], run: reserved },
    Test { name: "connections_end_as_they_should", needs: &[], run: ends },
];

fn borrowed() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let capture = a.install(&RuleConfig::default());
    assert_eq!(capture.can_borrow_addresses(), (true, true));
    let mut sniffer = b.run(Sniffer::open)?;
    let text = b"what stays on this host";
    for (own, peer) in [(a.v4, b.v4), (a.v6, b.v6)] {
        let server = a.listen(own, 80);
        // Several at a time from one address: the kernel finds free ports.
        for port in [0, 40_000, 40_000] {
            let mut mine = a.run(|| runtime.block_on(socket::connect_as(at(peer, port), at(own, 80), Mark::Service)))?;
            let (served, seen) = accept(&server, PATIENCE).ok_or("not delivered")?;
            assert_eq!(seen.ip(), peer, "the service sees its client");
            served.set_nonblocking(true)?;
            runtime.block_on(async {
                let mut served = tokio::net::TcpStream::from_std(served)?;
                let mut buffer = vec![0; text.len()];
                mine.write_all(text).await?;
                tokio::time::timeout(PATIENCE, served.read_exact(&mut buffer)).await??;
                served.write_all(text).await?;
                tokio::time::timeout(PATIENCE, mine.read_exact(&mut buffer)).await??;
                assert_eq!(buffer, text);
                Ok::<_, Box<dyn std::error::Error>>(())
            })?;
        }
        assert_eq!(capture.counters()?.leaks_prevented, 0, "toward {own}");
    }
    // The peer's own host must hear nothing of it.
    let mut heard = false;
    sniffer.drain(MOMENT, |frame| heard |= frame.bytes.windows(text.len()).any(|window| window == text))?;
    assert!(!heard, "the delivery was on the link");
    // A service that listens on loopback only stays out of reach.
    let _hidden = a.listen("127.0.0.1".parse()?, 81);
    let reached = a.run(|| runtime.block_on(socket::connect_as(at(b.v4, 0), at(a.v4, 81), Mark::Service)));
    assert_eq!(reached.unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    Ok(())
}

/// When the process dies its rules go, but also its connections: what a service was just saying to a member must not
/// take the wire in between.
fn killed() -> Outcome {
    const TEXT: &[u8] = b"a service talks and talks";
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    for (own, peer) in [(a.v4, b.v4), (a.v6, b.v6)] {
        for port in 8000..8005 {
            let server = a.listen(own, port);
            let mut sniffer = b.run(Sniffer::open)?;
            let words = ["deliver", &at(own, port).to_string(), &at(peer, 0).to_string()];
            let mut proxy = Process::start(a, None, &words)?;
            let (mut served, seen) = accept(&server, PATIENCE).ok_or("not delivered")?;
            assert_eq!(seen.ip(), peer);
            let service = std::thread::spawn(move || {
                let block = TEXT.repeat(1000);
                while served.write_all(&block).is_ok() {}
            });
            std::thread::sleep(MOMENT);
            proxy.child.kill()?;
            proxy.child.wait()?;
            service.join().map_err(|_| "the service died")?;
            let mut heard = 0;
            sniffer.drain(MOMENT, |frame| heard += u32::from(frame.bytes.windows(TEXT.len()).any(|window| window == TEXT)))?;
            assert_eq!(heard, 0, "frames in plaintext");
        }
    }
    a.run(meshd::intercept::nft::cleanup)?;
    a.assert_clean();

    // Rules that go before the connections do let it out: why they go last, and proof that this test would hear it.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let capture = a.install(&RuleConfig::default());
    let server = a.listen(a.v4, 8000);
    let mine = a.run(|| runtime.block_on(socket::connect_as(at(b.v4, 0), at(a.v4, 8000), Mark::Service)))?;
    let (mut served, _) = accept(&server, PATIENCE).ok_or("not delivered")?;
    let mut sniffer = b.run(Sniffer::open)?;
    a.run(|| capture.remove())?;
    served.write_all(TEXT)?;
    let mut heard = false;
    sniffer.drain(MOMENT, |frame| heard |= frame.bytes.windows(TEXT.len()).any(|window| window == TEXT))?;
    assert!(heard, "without rules it goes out");
    drop(mine);
    Ok(())
}

fn reserved() -> Outcome {
    let world = World::new();
    let (a, b) = (&world.a, &world.b);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _capture = a.install(&RuleConfig::default());
    for (own, peer) in [(a.v4, b.v4), (a.v6, b.v6)] {
        let server = a.listen(own, 2049);
        let mut open = Vec::new();
        for wanted in [700, 700, 1023, 22] {
            let mine = a.run(|| runtime.block_on(socket::connect_as(at(peer, wanted), at(own, 2049), Mark::Service)))?;
            let (served, seen) = accept(&server, PATIENCE).ok_or("not delivered")?;
            assert_eq!(seen.ip(), peer);
            assert!((512..1024).contains(&seen.port()), "{wanted} became {}", seen.port());
            open.push((mine, served, seen.port()));
        }
        let ports: Vec<u16> = open.iter().map(|(_, _, port)| *port).collect();
        assert_eq!((ports[0], ports[2]), (700, 1023), "the client's own port if it is free");
        assert_ne!(ports[1], 700, "two connections cannot share it");
        // The same port toward another service is free.
        let other = a.listen(own, 2050);
        let _mine = a.run(|| runtime.block_on(socket::connect_as(at(peer, 700), at(own, 2050), Mark::Service)))?;
        assert_eq!(accept(&other, PATIENCE).ok_or("not delivered")?.1.port(), 700);
    }
    Ok(())
}

fn ends() -> Outcome {
    let world = World::new();
    let a = &world.a;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let _inside = runtime.enter();
    let listener = a.run(|| socket::listen(at(a.v4, 80), Mark::Mesh))?;
    let address: SocketAddr = listener.local_addr()?;
    let read = |clean: bool| {
        runtime.block_on(async {
            let client = a.run(|| socket::outgoing(address.ip(), Mark::Mesh))?;
            let (client, served) = tokio::join!(client.connect(address), listener.accept());
            let (client, (served, _)) = (client?, served?);
            socket::prepare(&served)?;
            socket::prepare(&client)?;
            assert!(served.nodelay()? && client.nodelay()?);
            if clean {
                socket::clean(&served)?;
            }
            drop(served);
            let mut client = client;
            tokio::time::timeout(Duration::from_secs(10), client.read(&mut [0; 8])).await.map_err(std::io::Error::other)?
        })
    };
    assert_eq!(read(true)?, 0, "a clean end is a FIN");
    assert_eq!(read(false).unwrap_err().kind(), std::io::ErrorKind::ConnectionReset, "anything else is a RST");
    // Both families can be bound side by side.
    let both: [IpAddr; 2] = ["0.0.0.0".parse()?, "::".parse()?];
    let _listeners = both.map(|ip| a.run(|| socket::listen(at(ip, 6374), Mark::Mesh)).expect("to bind both"));
    Ok(())
}
