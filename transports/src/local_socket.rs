//! Unix sockets in the abstract namespace, for processes of one user on one host.
//!
//! The kernel frees an abstract name with its last owner, so a crashed job leaves nothing behind and a stale
//! name can't exist. Anyone on the host may try to connect: both ends check the peer's user.

use std::io::{self, Read, Write};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};
use std::time::Duration;

use rustix::net::sockopt::socket_peercred;
use tensorwire_core::Deadline;

/// Listens under `name`; fails with `AddrInUse` while another process holds it.
pub(crate) fn listen(name: &str) -> io::Result<UnixListener> {
    UnixListener::bind_addr(&SocketAddr::from_abstract_name(name)?)
}

/// Connects to `name`, trying again until the deadline while nobody listens there yet.
pub(crate) fn connect(name: &str, deadline: Deadline) -> io::Result<UnixStream> {
    let address = SocketAddr::from_abstract_name(name)?;
    let mut pause = Duration::from_micros(200);
    loop {
        match UnixStream::connect_addr(&address) {
            Ok(stream) => {
                check_user(&stream)?;
                return Ok(stream);
            }
            Err(e) if e.kind() == io::ErrorKind::ConnectionRefused && !deadline.passed() => {
                std::thread::sleep(pause.min(deadline.remaining()));
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(e) => return Err(e),
        }
    }
}

/// Refuses a peer that runs as another user.
pub(crate) fn check_user(stream: &UnixStream) -> io::Result<()> {
    let theirs = socket_peercred(stream)?.uid;
    let ours = rustix::process::geteuid();
    if theirs == ours {
        return Ok(());
    }
    let what = format!("the other end runs as user {}, this process as {}", theirs.as_raw(), ours.as_raw());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

/// Sets how long a read or write may block to what is left until the deadline.
pub(crate) fn limit(stream: &UnixStream, deadline: Deadline) -> io::Result<()> {
    let left = deadline.remaining();
    if left.is_zero() {
        return Err(io::ErrorKind::TimedOut.into());
    }
    stream.set_read_timeout(Some(left))?;
    stream.set_write_timeout(Some(left))
}

/// The longest frame that either side accepts.
pub(crate) const MAX_FRAME: usize = 1 << 20;

/// Writes one frame: a little-endian length, then the bytes.
pub(crate) fn write_frame(stream: &mut impl Write, body: &[u8]) -> io::Result<()> {
    if body.len() > MAX_FRAME {
        let what = format!("{} bytes are more than the {MAX_FRAME} that fit", body.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
    }
    let mut frame = Vec::with_capacity(4 + body.len());
    frame.extend_from_slice(&(body.len() as u32).to_le_bytes());
    frame.extend_from_slice(body);
    stream.write_all(&frame)
}

/// Reads one frame; refuses a length beyond [`MAX_FRAME`] before it allocates.
pub(crate) fn read_frame(stream: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut head = [0; 4];
    stream.read_exact(&mut head)?;
    let len = u32::from_le_bytes(head) as usize;
    if len > MAX_FRAME {
        return Err(io::Error::new(io::ErrorKind::InvalidData, format!("a frame claims {len} bytes")));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    Ok(body)
}

/// A name that no other process has, for a socket that is published through a store.
pub(crate) fn fresh_name(purpose: &str) -> io::Result<String> {
    Ok(format!("tensorwire-{purpose}-{}-{:016x}", std::process::id(), random_u64()?))
}

/// 64 random bits from the kernel.
pub(crate) fn random_u64() -> io::Result<u64> {
    let mut bytes = [0; 8];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(u64::from_ne_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_round_trip_and_long_ones_are_refused() {
        let mut wire = Vec::new();
        write_frame(&mut wire, b"hello").unwrap();
        write_frame(&mut wire, b"").unwrap();
        let mut reader = wire.as_slice();
        assert_eq!(read_frame(&mut reader).unwrap(), b"hello");
        assert_eq!(read_frame(&mut reader).unwrap(), b"");
        assert!(write_frame(&mut wire, &vec![0; MAX_FRAME + 1]).is_err());
        let huge = u32::MAX.to_le_bytes();
        assert_eq!(read_frame(&mut huge.as_slice()).unwrap_err().kind(), io::ErrorKind::InvalidData);
        let cut = [5, 0, 0, 0, 1, 2];
        assert_eq!(read_frame(&mut cut.as_slice()).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn connecting_to_nobody_gives_up_at_the_deadline() {
        let name = fresh_name("test").unwrap();
        let error = connect(&name, Deadline::after(Duration::from_millis(20))).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
    }
}
