//! What listens on this host: service discovery without configuration.
//!
//! One sock_diag dump a second; there is no notification to wait for without eBPF. What listens on loopback only is nobody else's
//! business and stays out.

use std::collections::BTreeSet;
use std::net::IpAddr;

use meshd_agent::record::{Listener, MAX_LISTENERS};

use super::kernel::Owners;
use crate::config::Config;
use crate::intercept::netlink::NetlinkError;
use crate::intercept::sockdiag::SockDiag;

/// Ports that are never captured: the configured ones, and those k3s needs to come up without us.
pub(crate) fn skip_ports(config: &Config) -> BTreeSet<u16> {
    const K3S: [u16; 6] = [2379, 2380, 6443, 9345, 10250, 10257];
    let mut skip = config.skip_ports.clone();
    if std::path::Path::new("/etc/rancher").exists() {
        skip.extend(K3S);
    }
    skip
}

/// Ports that are nobody's service: our own, and those never captured.
pub(crate) fn except(config: &Config) -> BTreeSet<u16> {
    let mut except = skip_ports(config);
    except.extend([config.port, config.capture_port, config.admin_port]);
    except
}

/// Everything that other hosts could connect to, without the ports in `except`; sorted, without repetition, at most
/// [`MAX_LISTENERS`].
pub(crate) fn look(diag: &SockDiag, owners: &Owners, except: &BTreeSet<u16>) -> Result<Vec<Listener>, NetlinkError> {
    let mut found: Vec<Listener> = diag
        .listeners()?
        .into_iter()
        .filter(|s| !except.contains(&s.local.port()) && s.local.port() != 0)
        .filter_map(|s| {
            let ip = s.local.ip().to_canonical();
            let link_local = matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local());
            if ip.is_loopback() || link_local {
                return None;
            }
            Some(Listener { port: s.local.port(), ip: (!ip.is_unspecified()).then_some(ip), workload: owners.workload(&s) })
        })
        .collect();
    // Several sockets on one port (SO_REUSEPORT, v4 beside v6): the first owner speaks for the port, in a stable order.
    found.sort_by_key(|l| (l.port, l.ip, l.workload.to_string()));
    found.dedup_by(|a, b| (a.port, a.ip) == (b.port, b.ip));
    if found.len() > MAX_LISTENERS {
        tracing::warn!(found = found.len(), kept = MAX_LISTENERS, "too many listeners to tell the others about");
        found.truncate(MAX_LISTENERS);
    }
    Ok(found)
}
