//! What carries the data of a job.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{Error, Result};

/// The variable that says what carries a job's data.
pub(crate) const TRANSPORT_VAR: &str = "TENSORWIRE_TRANSPORT";

/// What carries the data of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory, between ranks on one host.
    Shm,
    /// TCP, between ranks on any hosts.
    Tcp,
    /// The same, encrypted, with a certificate a rank.
    Tls,
    /// QUIC, between ranks on any hosts: encrypted too, over UDP.
    Quic,
    /// MPI, between ranks that it has started, over whatever it drives.
    Mpi,
    /// Shared memory between the ranks that share a host, TCP between hosts. In a job without a secret, which can't use
    /// TCP, shared memory.
    Auto,
}

impl Transport {
    const ALL: [Transport; 6] =
        [Transport::Shm, Transport::Tcp, Transport::Tls, Transport::Quic, Transport::Mpi, Transport::Auto];

    /// Whether each rank shows a certificate.
    pub const fn has_certificates(self) -> bool {
        matches!(self, Transport::Tls | Transport::Quic)
    }

    /// What `TENSORWIRE_TRANSPORT` says: `shm`, `tcp`, `tls`, `quic`, `mpi` or `auto`; shared memory if it isn't set.
    ///
    /// # Errors
    /// [`Error::Config`] if it says something else.
    pub fn from_env() -> Result<Transport> {
        match std::env::var(TRANSPORT_VAR) {
            Ok(text) if !text.trim().is_empty() => {
                text.trim().parse().map_err(|e| Error::Config(format!("{TRANSPORT_VAR}: {e}")))
            }
            _ => Ok(Transport::Shm),
        }
    }

    /// The name used on the command line, in the variable and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Shm => "shm",
            Transport::Tcp => "tcp",
            Transport::Tls => "tls",
            Transport::Quic => "quic",
            Transport::Mpi => "mpi",
            Transport::Auto => "auto",
        }
    }
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Transport {
    type Err = Error;

    fn from_str(text: &str) -> Result<Transport> {
        Transport::ALL.into_iter().find(|t| t.name() == text).ok_or_else(|| {
            Error::invalid(format!("unknown transport '{text}': use shm, tcp, tls, quic, mpi or auto"))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for t in Transport::ALL {
            assert_eq!(t.to_string().parse::<Transport>().unwrap(), t);
        }
        let error = "udp".parse::<Transport>().unwrap_err().to_string();
        assert!(error.contains("shm, tcp, tls, quic, mpi or auto"), "{error}");
    }
}
