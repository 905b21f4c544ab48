//! What carries the data of a job.

use std::fmt;
use std::str::FromStr;

use tensorwire_core::{Error, Result};

/// The variable that says what carries a job's data.
const TRANSPORT_VAR: &str = "TENSORWIRE_TRANSPORT";

/// What carries the data of a job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transport {
    /// Shared memory, between ranks on one host.
    Shm,
    /// TCP, between ranks on any hosts.
    Tcp,
}

impl Transport {
    /// What `TENSORWIRE_TRANSPORT` says: `shm`, `tcp`, or `auto`, which is shared memory.
    ///
    /// # Errors
    /// [`Error::Config`] if it says something else.
    pub fn from_env() -> Result<Transport> {
        match std::env::var(TRANSPORT_VAR) {
            Ok(text) if !matches!(text.trim(), "" | "auto") => {
                text.trim().parse().map_err(|e| Error::Config(format!("{TRANSPORT_VAR}: {e}, or auto")))
            }
            _ => Ok(Transport::Shm),
        }
    }

    /// The name used on the command line, in the variable and in reports.
    pub const fn name(self) -> &'static str {
        match self {
            Transport::Shm => "shm",
            Transport::Tcp => "tcp",
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
        [Transport::Shm, Transport::Tcp]
            .into_iter()
            .find(|t| t.name() == text)
            .ok_or_else(|| Error::invalid(format!("unknown transport '{text}': use shm or tcp")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_round_trip() {
        for t in [Transport::Shm, Transport::Tcp] {
            assert_eq!(t.to_string().parse::<Transport>().unwrap(), t);
        }
        assert!("quic".parse::<Transport>().unwrap_err().to_string().contains("shm or tcp"));
    }
}
