//! The UDP sockets of this network namespace, from `/proc/net/udp` and `udp6` (proc_net_udp(5)).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bound on the sockets looked at.
const MAX_SOCKETS: usize = 65_536;

/// One socket; the far end is unspecified unless it is connected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UdpSocket {
    pub(super) local: SocketAddr,
    pub(super) remote: SocketAddr,
    pub(super) inode: u64,
}

/// Every socket, of both families.
pub(super) fn sockets() -> Vec<UdpSocket> {
    let texts = ["udp", "udp6"].map(|name| std::fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap_or_default());
    texts.iter().flat_map(|text| text.lines().skip(1)).filter_map(parse).take(MAX_SOCKETS).collect()
}

fn parse(line: &str) -> Option<UdpSocket> {
    let words: Vec<&str> = line.split_whitespace().collect();
    Some(UdpSocket { local: address(words.get(1)?)?, remote: address(words.get(2)?)?, inode: words.get(9)?.parse().ok()? })
}

/// `0100007F:14E9`: words of four bytes as the kernel has them in memory, and the port.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let word = |at: usize| u32::from_str_radix(ip.get(at..at + 8)?, 16).ok().map(u32::to_ne_bytes);
    let ip: IpAddr = match ip.len() {
        8 => Ipv4Addr::from(word(0)?).into(),
        32 => {
            let all: Vec<u8> = (0..4).filter_map(|i| word(i * 8)).flatten().collect();
            Ipv6Addr::from(<[u8; 16]>::try_from(all).ok()?).to_canonical()
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, u16::from_str_radix(port, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_the_sockets_it_opened() {
        for bind in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(socket) = std::net::UdpSocket::bind(bind) else { continue };
            let local = socket.local_addr().unwrap();
            let far = SocketAddr::new(local.ip(), 4242);
            socket.connect(far).unwrap();
            let found = sockets().into_iter().find(|s| s.local == local).expect("our socket");
            assert_eq!(found.remote, far);
        }
        assert!(parse("garbage").is_none() && address("0100007F").is_none() && address("01:00").is_none());
    }
}
