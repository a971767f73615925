//! Who owns a socket.
use super::netlink::NetlinkError;
use std::net::SocketAddr;
/// A socket as the kernel describes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketInfo {
    /// Local.
    pub local: SocketAddr,
    /// Remote.
    pub remote: SocketAddr,
    /// Owner.
    pub uid: u32,
    /// 0 when no process holds it.
    pub inode: u32,
    /// `None` on kernels before 5.9.
    pub cgroup: Option<u64>,
    /// An IPv6 listener that takes IPv6 only.
    pub v6only: bool,
}
/// Open diag socket (Send + Sync; belongs to the netns it was opened in).
#[derive(Debug)]
pub struct SockDiag;
impl SockDiag {
    /// Opens.
    pub fn open() -> Result<SockDiag, NetlinkError> {
        todo!()
    }
    /// The socket with exactly this source and destination (the client's own view).
    pub fn find(&self, _source: SocketAddr, _destination: SocketAddr) -> Result<Option<SocketInfo>, NetlinkError> {
        todo!()
    }
    /// Every TCP listener.
    pub fn listeners(&self) -> Result<Vec<SocketInfo>, NetlinkError> {
        todo!()
    }
}
