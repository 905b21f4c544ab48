//! What can be set about groups over TCP.

use std::ops::RangeInclusive;
use std::str::FromStr;
use std::time::Duration;

use tensorwire_core::{DEFAULT_TIMEOUT, Error, Result};

use super::interface::Interface;
use crate::launch::{TRANSPORT_VAR, Transport};

/// The variable that says how a connection over QUIC finds out how fast it may send.
const CONGESTION_VAR: &str = "TENSORWIRE_QUIC_CONGESTION";

/// How a connection over QUIC finds out how fast it may send.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Congestion {
    /// CUBIC (RFC 9438): slows down when something is lost.
    #[default]
    Cubic,
    /// NewReno (RFC 9002): the same, more simply.
    NewReno,
    /// BBR: by what arrives, and how long that takes. Experimental in quinn.
    Bbr,
}

impl FromStr for Congestion {
    type Err = Error;

    fn from_str(text: &str) -> Result<Congestion> {
        match text {
            "cubic" => Ok(Congestion::Cubic),
            "newreno" => Ok(Congestion::NewReno),
            "bbr" => Ok(Congestion::Bbr),
            _ => {
                Err(Error::invalid(format!("unknown congestion control '{text}': use cubic, newreno or bbr")))
            }
        }
    }
}

/// What can be set about a group over TCP, TLS or QUIC.
#[derive(Clone, Debug)]
pub struct TcpOptions {
    /// How long joining the group takes at most, and how long a call waits while nothing comes of the peers it waits for.
    /// `TENSORWIRE_TIMEOUT`, in seconds.
    pub timeout: Duration,
    /// After how long a host that answers nothing counts as cut off: at least 2 seconds. `TENSORWIRE_PEER_TIMEOUT`, in
    /// seconds.
    pub peer_timeout: Duration,
    /// Which of this host's addresses peers reach this rank at; without it, the one that leads to the store.
    /// `TENSORWIRE_INTERFACE`: a name such as `eth0`, or addresses such as `10.0.0.0/8` or `fd00::/8`.
    pub interface: Option<Interface>,
    /// The ports of which this rank listens on one; 0 lets the system choose. `TENSORWIRE_PORT`, such as `29600` or
    /// `29600-29699`.
    pub ports: RangeInclusive<u16>,
    /// Bytes that the kernel is asked to hold for a connection until the peer has them. It takes twice as much memory, as
    /// for the next. That must be room for more than one segment, which is 64 KiB on loopback, or a sender waits for an
    /// acknowledgement that the other end puts off for 40 ms. `TENSORWIRE_SEND_BUFFER`: on a long way, what a connection
    /// carries in the time there and back. `None`: 256 KiB in a job of up to [`FEW`](TcpOptions::FEW) ranks, 56 KiB beyond.
    pub send_buffer: Option<usize>,
    /// Bytes that it is asked to hold until this rank reads them. `TENSORWIRE_RECEIVE_BUFFER`. Well above what the peer
    /// holds back for sending: a window that closes stops the peer, and costs more to open again than the bytes take.
    /// `None`: 1 MiB in a job of up to [`FEW`](TcpOptions::FEW) ranks, 320 KiB beyond.
    pub receive_buffer: Option<usize>,
    /// Over QUIC rather than TCP, and with which congestion control: needs the feature `quic`, and a secret with
    /// certificates. `TENSORWIRE_TRANSPORT`, if that is `quic`, and `TENSORWIRE_QUIC_CONGESTION`: `cubic`, `newreno` or
    /// `bbr`.
    pub quic: Option<Congestion>,
    /// Whether each frame carries checksums (CRC-32) of its header and of its payload, so that what is damaged on the way
    /// ends the group with [`Error::Corrupted`] and is never taken for data. TCP's own sum is 16 bits, and what rewrites
    /// segments makes it anew. Rank 0's choice holds for all. `TENSORWIRE_CHECKSUM`, 1 or 0.
    pub checksum: bool,
}

impl Default for TcpOptions {
    fn default() -> TcpOptions {
        TcpOptions {
            timeout: DEFAULT_TIMEOUT,
            peer_timeout: Duration::from_secs(5),
            interface: None,
            ports: 0..=0,
            send_buffer: None,
            receive_buffer: None,
            quic: None,
            checksum: false,
        }
    }
}

impl TcpOptions {
    /// Ranks of a job up to which the kernel may hold more for each connection: a piece of a collective goes out in one
    /// system call then, while the peer sends its own, and nobody waits for room. Beyond, a peer takes at most 1 MiB.
    pub const FEW: usize = 4;

    /// For a job of `world` ranks: with the sizes of the kernel's buffers that aren't given.
    pub(super) fn sized_for(&self, world: usize) -> TcpOptions {
        let (send, receive) = if world <= TcpOptions::FEW { (256, 1024) } else { (56, 320) };
        TcpOptions {
            send_buffer: self.send_buffer.or(Some(send << 10)),
            receive_buffer: self.receive_buffer.or(Some(receive << 10)),
            ..self.clone()
        }
    }

    /// The defaults, with what the environment sets.
    ///
    /// # Errors
    /// [`Error::Config`] names the variable and what is wrong with it.
    pub fn from_env() -> Result<TcpOptions> {
        TcpOptions::from_lookup(|name| std::env::var(name).ok().filter(|v| !v.is_empty()))
    }

    /// The same for a job over `transport`, whatever `TENSORWIRE_TRANSPORT` says.
    ///
    /// # Errors
    /// See [`from_env`](TcpOptions::from_env).
    pub fn for_transport(transport: Transport) -> Result<TcpOptions> {
        TcpOptions::from_lookup(|name| match name {
            TRANSPORT_VAR => Some(transport.name().to_owned()),
            _ => std::env::var(name).ok().filter(|v| !v.is_empty()),
        })
    }

    fn from_lookup(lookup: impl Fn(&str) -> Option<String>) -> Result<TcpOptions> {
        let mut options = TcpOptions::default();
        let seconds = |name: &str, default: Duration| match lookup(name) {
            None => Ok(default),
            Some(text) => match text.parse::<f64>() {
                Ok(s) if s > 0.0 && s < 1e9 => Ok(Duration::from_secs_f64(s)),
                _ => {
                    Err(Error::Config(format!("{name} is '{text}': give seconds above 0, such as 30 or 0.5")))
                }
            },
        };
        options.timeout = seconds("TENSORWIRE_TIMEOUT", options.timeout)?;
        options.peer_timeout =
            seconds("TENSORWIRE_PEER_TIMEOUT", options.peer_timeout)?.max(Duration::from_secs(2));
        let bytes = |name: &str| match lookup(name) {
            None => Ok(None),
            Some(text) => match text.parse::<u32>() {
                Ok(n) if (4096..=1 << 30).contains(&n) => Ok(Some(n as usize)),
                _ => Err(Error::Config(format!("{name} is '{text}': give bytes, from 4096 to 1073741824"))),
            },
        };
        options.send_buffer = bytes("TENSORWIRE_SEND_BUFFER")?;
        options.receive_buffer = bytes("TENSORWIRE_RECEIVE_BUFFER")?;
        if lookup(TRANSPORT_VAR).is_some_and(|text| text.trim() == Transport::Quic.name()) {
            let congestion = lookup(CONGESTION_VAR).map(|text| text.parse());
            let congestion =
                congestion.transpose().map_err(|e| Error::Config(format!("{CONGESTION_VAR}: {e}")))?;
            options.quic = Some(congestion.unwrap_or_default());
        }
        options.checksum = match lookup("TENSORWIRE_CHECKSUM").as_deref() {
            None | Some("0") => false,
            Some("1") => true,
            Some(other) => {
                return Err(Error::Config(format!("TENSORWIRE_CHECKSUM is '{other}': give 1 or 0")));
            }
        };
        options.interface = lookup("TENSORWIRE_INTERFACE").map(|text| text.parse()).transpose()?;
        if let Some(text) = lookup("TENSORWIRE_PORT") {
            options.ports = ports(&text).ok_or_else(|| {
                Error::Config(format!(
                    "TENSORWIRE_PORT is '{text}': give a port or a range, such as 29600-29699"
                ))
            })?;
        }
        Ok(options)
    }
}

fn ports(text: &str) -> Option<RangeInclusive<u16>> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let range = first.trim().parse().ok()?..=last.trim().parse().ok()?;
    (!range.is_empty() && (*range.start() != 0 || *range.end() == 0)).then_some(range)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_come_from_the_environment_or_say_why_not() {
        let set = |name: &'static str, value: &'static str| {
            TcpOptions::from_lookup(move |n| (n == name).then(|| value.to_owned()))
        };
        assert_eq!(set("TENSORWIRE_PORT", "29600").unwrap().ports, 29600..=29600);
        assert_eq!(set("TENSORWIRE_PORT", "29600-29699").unwrap().ports, 29600..=29699);
        assert_eq!(set("TENSORWIRE_PEER_TIMEOUT", "2.5").unwrap().peer_timeout, Duration::from_millis(2500));
        assert!(set("TENSORWIRE_INTERFACE", "lo").unwrap().interface.is_some());
        assert!(set("TENSORWIRE_CHECKSUM", "1").unwrap().checksum);
        for (name, value) in [
            ("TENSORWIRE_SEND_BUFFER", "1"),
            ("TENSORWIRE_RECEIVE_BUFFER", "1M"),
            ("TENSORWIRE_CHECKSUM", "yes"),
            ("TENSORWIRE_PORT", "70000"),
            ("TENSORWIRE_PORT", "9-3"),
            ("TENSORWIRE_PORT", "0-3"),
            ("TENSORWIRE_PORT", "x"),
            ("TENSORWIRE_TIMEOUT", "0"),
            ("TENSORWIRE_PEER_TIMEOUT", "soon"),
            ("TENSORWIRE_INTERFACE", "10.0.0.0/33"),
        ] {
            assert!(set(name, value).unwrap_err().to_string().contains(name), "{name}");
        }
    }
}
