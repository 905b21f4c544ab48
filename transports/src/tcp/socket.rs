//! Sockets: how they are made, and what the kernel says about them.

use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};

use super::TcpOptions;

fn family(ip: IpAddr) -> AddressFamily {
    if ip.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 }
}

fn new(ip: IpAddr, options: &TcpOptions) -> io::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(family(ip), SocketType::STREAM, flags, None)?;
    // Before connecting: the window's scale is settled then. Connections that are accepted inherit it.
    if let Some(bytes) = options.receive_buffer {
        sockopt::set_socket_recv_buffer_size(&socket, bytes)?;
    }
    if let Some(bytes) = options.send_buffer {
        sockopt::set_socket_send_buffer_size(&socket, bytes)?;
    }
    Ok(socket)
}

/// Listens at one of these ports.
pub(crate) fn listen(
    ip: IpAddr,
    ports: RangeInclusive<u16>,
    options: &TcpOptions,
) -> io::Result<TcpListener> {
    let mut taken = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports {
        let socket = new(ip, options)?;
        sockopt::set_socket_reuseaddr(&socket, true)?;
        match rustix::net::bind(&socket, &SocketAddr::new(ip, port)) {
            Ok(()) => {}
            Err(e @ Errno::ADDRINUSE) => {
                taken = e.into();
                continue;
            }
            Err(e) => return Err(e.into()),
        }
        match rustix::net::listen(&socket, 1024) {
            Ok(()) => return Ok(socket.into()),
            Err(e @ Errno::ADDRINUSE) => taken = e.into(),
            Err(e) => return Err(e.into()),
        }
    }
    Err(taken)
}

/// Begins to connect; the socket becomes writable when that has succeeded or failed. A host that stops answering during
/// the handshake, in which nothing waits for long, ends the connection.
pub(super) fn begin_connect(to: SocketAddr, options: &TcpOptions) -> io::Result<TcpStream> {
    let socket = new(to.ip(), options)?;
    sockopt::set_tcp_user_timeout(&socket, options.peer_timeout.as_millis() as u32)?;
    match rustix::net::connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS | Errno::INTR) => Ok(socket.into()),
        Err(e) => Err(e.into()),
    }
}

/// Whether a connection that was begun has come about, once the socket is writable.
pub(super) fn connected(stream: &TcpStream) -> io::Result<()> {
    Ok(sockopt::socket_error(stream)??)
}

/// Sets what a connection between ranks needs.
pub(super) fn tune(stream: &TcpStream, options: &TcpOptions) -> io::Result<()> {
    stream.set_nonblocking(true)?;
    sockopt::set_tcp_nodelay(stream, true)?;
    // Within a host there is no bottleneck to be found, and to send at the pace of one, as BBR does, costs up to a third.
    // Every system has Reno; one that forbids it keeps its own.
    if stream.peer_addr()?.ip() == stream.local_addr()?.ip() {
        let _ = sockopt::set_tcp_congestion(stream, "reno");
    }
    // A connection on which nothing is under way notices in this way that its peer's host is gone; one with
    // data under way is looked at by `silent`. TCP_USER_TIMEOUT would do for both, but it also ends connections to
    // peers that are alive and don't read for long.
    const PROBES: u32 = 4;
    let every = (options.peer_timeout / (PROBES + 1)).max(Duration::from_secs(1));
    sockopt::set_tcp_user_timeout(stream, 0)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, every)?;
    sockopt::set_tcp_keepintvl(stream, every)?;
    sockopt::set_tcp_keepcnt(stream, PROBES)?;
    Ok(())
}

/// For how long the peer's host has acknowledged nothing although it was asked to: zero if nothing was asked.
pub(super) fn silent(stream: &TcpStream) -> Duration {
    let mut info = std::mem::MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: (1) `info` has `len` bytes; (2) a tcp_info is valid from zeros, which stay where an older kernel writes
    // less.
    let info = unsafe {
        let at = info.as_mut_ptr().cast();
        if libc::getsockopt(stream.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, at, &mut len) != 0 {
            return Duration::ZERO;
        }
        info.assume_init()
    };
    let asked = info.tcpi_retransmits > 0 || info.tcpi_probes > 0;
    if asked { Duration::from_millis(info.tcpi_last_ack_recv.into()) } else { Duration::ZERO }
}

/// Bytes that the kernel hasn't sent yet, for the peer has no room.
pub(super) fn held_back(stream: &TcpStream) -> usize {
    const SIOCOUTQNSD: libc::Ioctl = 0x894B;
    let mut bytes: libc::c_int = 0;
    // SAFETY: the request writes an int, which lives until the call returns.
    let asked = unsafe { libc::ioctl(stream.as_raw_fd(), SIOCOUTQNSD, &raw mut bytes) };
    if asked == 0 { bytes as usize } else { 0 }
}

/// Wakes a thread that polls.
#[derive(Debug)]
pub(super) struct Wake(OwnedFd);

impl Wake {
    pub(super) fn new() -> io::Result<Wake> {
        Ok(Wake(eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?))
    }

    pub(super) fn ring(&self) {
        // It fails when it has been rung 2^64 times, and then it is readable as well.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Makes the rings so far forgotten.
    pub(super) fn hush(&self) {
        let _ = rustix::io::read(&self.0, &mut [0; 8]);
    }
}

impl AsFd for Wake {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.0.as_fd()
    }
}
