//! What carries the bytes of a benchmark.

use std::fmt;
use std::str::FromStr;

use tensorwire::Error;
use tensorwire::transports::launch::Transport;

/// The ranks' processors, over a transport, or their GPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Over {
    Host(Transport),
    /// NCCL, in a group whose ranks meet over shared memory.
    Nccl,
}

impl Over {
    /// What the ranks' processors talk over.
    pub(super) fn host(self) -> Transport {
        match self {
            Over::Host(transport) => transport,
            Over::Nccl => Transport::Shm,
        }
    }

    /// The same in a job that a launcher has started over `transport`.
    pub(super) fn launched(self, transport: Transport) -> Over {
        match self {
            Over::Host(_) => Over::Host(transport),
            Over::Nccl => Over::Nccl,
        }
    }
}

impl fmt::Display for Over {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Over::Host(transport) => transport.fmt(f),
            Over::Nccl => f.write_str("nccl"),
        }
    }
}

impl FromStr for Over {
    type Err = Error;

    fn from_str(text: &str) -> Result<Over, Error> {
        match text {
            "nccl" => Ok(Over::Nccl),
            _ => {
                text.parse().map(Over::Host).map_err(|e| Error::invalid(format!("{e}, or nccl between GPUs")))
            }
        }
    }
}
