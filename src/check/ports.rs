//! The daemon's ports: who listens on them.

use super::By;
use super::findings::{Findings, Verdict, some_of};
use super::proc::{holders, own_sockets};
use crate::api::{Finding, code};
use crate::config::Config;
use crate::intercept::attribution::{Attribution, Owner};
use crate::intercept::sockdiag::{SockDiag, SocketInfo};

/// What there is to know of one port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Port {
    Free,
    /// This very process listens.
    Ours,
    /// Somebody else does: who, in words.
    Taken(String),
}

/// What there is to know.
pub(super) struct Facts {
    pub(super) by: By,
    /// Whether the daemon is a member, which has its mesh and capture ports open.
    pub(super) member: bool,
    /// Where a running daemon could not open the admin port, and why.
    pub(super) closed: Vec<String>,
    /// Mesh, capture and admin port; or why the kernel does not say.
    pub(super) ports: Result<[(u16, Port); 3], String>,
}

impl Facts {
    pub(super) fn read(config: &Config, by: By, member: bool) -> Self {
        Self {
            by,
            member,
            closed: Vec::new(),
            ports: look([config.port, config.capture_port, config.admin_port]).map_err(|e| e.to_string()),
        }
    }
}

fn look(ports: [u16; 3]) -> Result<[(u16, Port); 3], crate::intercept::netlink::NetlinkError> {
    let listeners = SockDiag::open()?.listeners()?;
    let own = own_sockets();
    Ok(ports.map(|port| {
        let mut there = listeners.iter().filter(|l| l.local.port() == port);
        let other = there.clone().find(|l| !own.contains(&u64::from(l.inode)));
        (
            port,
            match (other, there.next()) {
                (Some(other), _) => Port::Taken(who(other)),
                (None, Some(_)) => Port::Ours,
                (None, None) => Port::Free,
            },
        )
    }))
}

/// Whose a socket is: the process if it may be seen, and the unit.
fn who(socket: &SocketInfo) -> String {
    let process = holders(&[u64::from(socket.inode)].into()).into_iter().next().map(|(_, p)| p.to_string());
    let unit = match Attribution::open().owner(socket) {
        Owner::Unit(unit) => Some(format!("unit {unit}")),
        Owner::Container(name) => Some(format!("container {name}")),
        Owner::User(name) => Some(format!("user {name}")),
        Owner::Pod(_) => Some("a pod".into()),
        Owner::Host => None,
    };
    match (process, unit) {
        (Some(process), Some(unit)) => format!("{process}, {unit}"),
        (Some(one), None) | (None, Some(one)) => one,
        (None, None) => format!("a process of user id {}", socket.uid),
    }
}

pub(super) fn findings(facts: &Facts) -> Vec<Finding> {
    let mut found = Findings::of("ports");
    let ports = match &facts.ports {
        Ok(ports) => ports,
        Err(why) => {
            found.warn(
                code::PORT_MESH,
                "the mesh port can be had",
                format!("cannot tell: {why}"),
                "allow AF_NETLINK in the unit's sandbox",
            );
            return found.done();
        }
    };
    let kinds = [
        (code::PORT_MESH, "mesh", "port"),
        (code::PORT_CAPTURE, "capture", "capture_port"),
        (code::PORT_ADMIN, "admin", "admin_port"),
    ];
    for ((code, kind, key), (port, state)) in kinds.into_iter().zip(ports) {
        // Nothing but metrics is lost with the admin port.
        let optional = code == code::PORT_ADMIN;
        let must_listen = facts.by == By::Daemon && facts.member && !optional;
        let verdict = match state {
            Port::Ours | Port::Free if optional && !facts.closed.is_empty() => Verdict::warn(
                format!("it cannot be opened: {}", some_of(&facts.closed)),
                "set `admin_port` or `admin_address`; it is tried again every 10 s",
            ),
            Port::Ours => Verdict::ok(format!("TCP {port}")),
            Port::Free if must_listen => {
                Verdict::fail(format!("nobody listens on TCP {port}"), "restart meshd, and look at its log")
            }
            Port::Free => Verdict::ok(format!("TCP {port} is free")),
            Port::Taken(by) => {
                let hint = format!("end that program, or give meshd another port (`{key}`)");
                let closed = if optional { some_of(&facts.closed) } else { String::new() };
                let closed = if closed.is_empty() { closed } else { format!("; {closed}") };
                let detail = format!("TCP {port} is taken by {by}{closed}");
                if optional { Verdict::warn(detail, hint) } else { Verdict::fail(detail, hint) }
            }
        };
        found.add(code, format!("the {kind} port can be had"), verdict);
    }
    found.done()
}

#[cfg(test)]
mod tests {
    use super::super::findings::testing::ill;
    use super::*;
    use crate::api::Level::{Fail, Warn};

    fn with(by: By, member: bool, states: [Port; 3]) -> Vec<Finding> {
        let [mesh, capture, admin] = states;
        findings(&Facts { by, member, closed: vec![], ports: Ok([(6374, mesh), (6375, capture), (6376, admin)]) })
    }

    #[test]
    fn ports_are_ours_free_or_taken() {
        use Port::{Free, Ours};
        let other = || Port::Taken("nginx (pid 7)".into());
        assert!(ill(&with(By::Daemon, true, [Ours, Ours, Free])).is_empty());
        assert!(ill(&with(By::Command, false, [Free, Free, Free])).is_empty());
        assert!(ill(&with(By::Daemon, false, [Free, Free, Free])).is_empty());
        assert_eq!(ill(&with(By::Daemon, true, [Free, Ours, Free])), [(code::PORT_MESH, Fail)]);
        assert_eq!(ill(&with(By::Command, false, [Free, other(), Free])), [(code::PORT_CAPTURE, Fail)]);
        assert_eq!(ill(&with(By::Command, false, [other(), Free, other()])), [(code::PORT_MESH, Fail), (code::PORT_ADMIN, Warn)]);
        let closed = Facts {
            by: By::Daemon,
            member: true,
            closed: vec!["192.0.2.1:6376: no such address".into()],
            ports: Ok([(6374, Ours), (6375, Ours), (6376, Free)]),
        };
        assert_eq!(ill(&findings(&closed)), [(code::PORT_ADMIN, Warn)]);
        let unknown = Facts { by: By::Daemon, member: true, closed: vec![], ports: Err("EPERM".into()) };
        assert_eq!(ill(&findings(&unknown)), [(code::PORT_MESH, Warn)]);
    }

    #[test]
    fn a_listener_of_this_process_is_ours() {
        let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let [(_, mesh), ..] = look([port, 1, 1]).unwrap();
        assert_eq!(mesh, Port::Ours);
    }
}
