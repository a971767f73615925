//! Real responders on a network of their own: one that ended is replaced, and the neighbours hear of us again. A flood needs a host of its
//! own: `tests/namespaced/edge/network.rs`.

use std::net::UdpSocket;
use std::process::Command;

use meshd_agent::source::mdns::tag_matches;
use tokio::time::timeout;

use super::*;

/// Set in the copy of a test that runs inside a network namespace of its own.
const INSIDE: &str = "MESHD_TEST_INSIDE_NAMESPACE";
const LONG: Duration = Duration::from_secs(60);

/// Runs the test `name` again in a namespace with one interface, `lan0`; whether this is that run.
fn inside(name: &str) -> bool {
    if std::env::var_os(INSIDE).is_some() {
        return true;
    }
    let setup = "ip link set lo up && (ip link add lan0 type dummy || ip link add lan0 type veth peer name lan1 && \
                 ip link set lan1 up) && ip link set lan0 multicast on up && ip address add 10.77.0.1/24 dev lan0 && \
                 ip route add 224.0.0.0/4 dev lan0";
    let can = Command::new("unshare").args(["-Urn", "sh", "-c", setup]).output();
    if !can.as_ref().is_ok_and(|o| o.status.success()) {
        eprintln!("SKIPPED {name}: no network namespace, or neither dummy nor veth in it: {can:?}");
        return false;
    }
    let run = format!("{setup} && exec \"$0\" --exact daemon::responder::tests::{name} --nocapture");
    let me = std::env::current_exe().unwrap();
    let out = Command::new("unshare").args(["-Urn", "sh", "-c", &run]).arg(me).env(INSIDE, "1").output().unwrap();
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains("1 passed"), "{text}");
    false
}

fn config(instance: &str) -> MdnsConfig {
    MdnsConfig { udp_port: 5353, port: 6374, instance: instance.into(), interfaces: BTreeSet::from(["lan0".to_owned()]) }
}

fn mesh() -> MeshId {
    MeshId::from_bytes([7; 10])
}

/// Waits until the neighbour hears of our mesh under a tag that is not `before`. Every announcement has a tag of its own.
async fn heard(neighbour: &mut Sightings, before: Option<Tag>) -> Tag {
    let announced = async {
        loop {
            let News::Seen(sighting) = neighbour.next().await.unwrap() else { continue };
            if let Some(tag) = sighting.tag.filter(|t| tag_matches(mesh(), t) && Some(*t) != before) {
                return tag;
            }
        }
    };
    timeout(LONG, announced).await.expect("the neighbour hears of us")
}

#[test]
fn one_that_ended_is_replaced() {
    if inside("one_that_ended_is_replaced") {
        run(async {
            let (_neighbour, mut sightings) = Mdns::start(config("neighbour")).unwrap();
            let mut responder = Responder::new(config("we"));
            responder.announce(Some(mesh()));
            let first = heard(&mut sightings, None).await;
            // The library's thread ends; only the sightings of it are left to us.
            let (mdns, orphans) = responder.running.take().unwrap();
            drop(mdns);
            responder.running = Some((Mdns::start(config("bystander")).unwrap().0, orphans));
            let working = tokio::spawn(async move {
                loop {
                    responder.next().await;
                }
            });
            heard(&mut sightings, Some(first)).await;
            working.abort();
        });
    }
}

#[test]
fn a_port_that_is_held_alone_is_had_when_it_is_free() {
    if inside("a_port_that_is_held_alone_is_had_when_it_is_free") {
        run(async {
            // Without SO_REUSEADDR and SO_REUSEPORT, as a careless program does it.
            let selfish = UdpSocket::bind("0.0.0.0:5353").unwrap();
            let mut responder = Responder::new(config("we"));
            assert!(responder.running.is_none(), "a responder that hears nothing was taken for one");
            responder.announce(Some(mesh()));
            drop(selfish);
            let (_neighbour, mut sightings) = Mdns::start(config("neighbour")).unwrap();
            let working = tokio::spawn(async move {
                loop {
                    responder.next().await;
                }
            });
            heard(&mut sightings, None).await;
            working.abort();
        });
    }
}

fn run(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(test);
}
