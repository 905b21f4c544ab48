//! What carries a group's data: decided alike on every rank, from what each has.

use std::fmt;
use std::time::Duration;

use tensorwire_core::{DEFAULT_TIMEOUT, Error, Result};

use super::{Device, Identity};
use crate::Communicator;
use crate::nccl::{Library, Version};

/// How a group of devices is formed.
#[derive(Clone, Debug)]
pub struct DeviceOptions {
    /// What carries the data.
    pub engine: EngineChoice,
    /// The NCCL to use; found as [`Library::find`] says if `None`.
    pub library: Option<Library>,
    /// How long forming the group, launching a call and [`synchronize`](super::DeviceCommunicator::synchronize) may take.
    pub timeout: Duration,
}

impl Default for DeviceOptions {
    fn default() -> DeviceOptions {
        DeviceOptions { engine: EngineChoice::Auto, library: None, timeout: DEFAULT_TIMEOUT }
    }
}

/// What is to carry a group's data.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EngineChoice {
    /// NCCL where each rank has it and a GPU of its own; else the host.
    #[default]
    Auto,
    /// NCCL, or an error that says why not.
    Nccl,
    /// The host, which gives the bits of [`Communicator`]: sums in rank order.
    Staged,
}

/// What carries a group's data, the same on every rank. Printed, it is a line for a log, with the reason.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Engine {
    /// NCCL, between the devices' memories.
    Nccl {
        /// Of the oldest that a rank has.
        version: Version,
        /// Whether it is no NCCL, but a library that stands in for it in tests.
        is_test: bool,
    },
    /// The ranks' [`Communicator`], by way of the host's memory.
    Staged {
        /// Why not NCCL.
        why: String,
    },
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Engine::Nccl { version, is_test: false } => write!(f, "NCCL {version}"),
            Engine::Nccl { is_test: true, .. } => {
                f.write_str("a test library in NCCL's place, over host memory")
            }
            Engine::Staged { why } => write!(f, "by way of the host, since {why}"),
        }
    }
}

/// What a rank says of itself before a group is formed.
struct Proposal {
    identity: Identity,
    choice: EngineChoice,
    /// Of its NCCL; 0 if that can't be used.
    version: u32,
    is_test: bool,
    why_not: String,
}

impl Proposal {
    const BYTES: usize = 512;

    fn to_bytes(&self) -> [u8; Proposal::BYTES] {
        let mut bytes = [0; Proposal::BYTES];
        bytes[0] = self.identity.is_cuda.into();
        bytes[1] = self.choice as u8;
        bytes[2] = self.is_test.into();
        bytes[4..8].copy_from_slice(&self.version.to_le_bytes());
        bytes[8..24].copy_from_slice(&self.identity.uuid);
        let text = self.why_not.as_bytes();
        let len = text.len().min(Proposal::BYTES - 24);
        bytes[24..24 + len].copy_from_slice(&text[..len]);
        bytes
    }

    fn from_bytes(bytes: &[u8]) -> Proposal {
        let text = &bytes[24..];
        let end = text.iter().position(|b| *b == 0).unwrap_or(text.len());
        let word: [u8; 4] = bytes[4..8].try_into().expect("four bytes");
        Proposal {
            identity: Identity {
                is_cuda: bytes[0] != 0,
                uuid: bytes[8..24].try_into().expect("sixteen bytes"),
            },
            choice: match bytes[1] {
                0 => EngineChoice::Auto,
                1 => EngineChoice::Nccl,
                _ => EngineChoice::Staged,
            },
            version: u32::from_le_bytes(word),
            is_test: bytes[2] != 0,
            why_not: String::from_utf8_lossy(&text[..end]).into_owned(),
        }
    }
}

/// What carries the group's data, decided alike on every rank from what all say of themselves; and this rank's NCCL.
pub(super) fn agree(
    control: &Communicator,
    device: &Device,
    options: &DeviceOptions,
) -> Result<(Engine, Option<Library>)> {
    let identity = device.identity()?;
    let found = match (&options.library, options.engine) {
        (_, EngineChoice::Staged) => Err("the host was asked for".to_owned()),
        (Some(library), _) => Ok(library.clone()),
        (None, _) => Library::find().map_err(|e| e.to_string()),
    };
    // NCCL can't reach host memory, nor what stands in for it a GPU's.
    let usable = found.and_then(|library| match (identity.is_cuda, library.is_test()) {
        (true, false) | (false, true) => Ok(library),
        (true, true) => Err(format!("{} is a test library, which reaches no GPU", library.path().display())),
        (false, false) => Err("its device is host memory, which NCCL can't use".to_owned()),
    });
    let mine = Proposal {
        identity,
        choice: options.engine,
        version: usable.as_ref().map_or(0, |library| library.version().code()),
        is_test: usable.as_ref().is_ok_and(Library::is_test),
        why_not: usable.as_ref().err().cloned().unwrap_or_default(),
    };
    let mut all = vec![0; Proposal::BYTES * control.world()];
    control.all_gather(&mine.to_bytes(), &mut all)?;
    let all: Vec<_> = all.chunks(Proposal::BYTES).map(Proposal::from_bytes).collect();
    let engine = decide(&all);
    if let (Engine::Staged { why }, true) = (&engine, all.iter().any(|p| p.choice == EngineChoice::Nccl)) {
        return Err(Error::Unavailable { what: "NCCL", why: why.clone() });
    }
    Ok((engine, usable.ok()))
}

fn decide(all: &[Proposal]) -> Engine {
    if let Some(rank) = all.iter().position(|p| p.choice == EngineChoice::Staged) {
        return Engine::Staged { why: format!("rank {rank} asked for it") };
    }
    if let Some(rank) = all.iter().position(|p| p.version == 0) {
        return Engine::Staged { why: format!("on rank {rank} {}", all[rank].why_not) };
    }
    if let Some(rank) = all.iter().position(|p| p.is_test != all[0].is_test) {
        return Engine::Staged {
            why: format!("of ranks 0 and {rank} one has NCCL and the other a test library"),
        };
    }
    for (rank, p) in all.iter().enumerate().filter(|(_, p)| p.identity.is_cuda) {
        if let Some(other) = all[..rank].iter().position(|q| q.identity == p.identity) {
            let why = format!("ranks {other} and {rank} have one GPU, where NCCL asks for one each");
            return Engine::Staged { why };
        }
    }
    let oldest = all.iter().map(|p| p.version).min().unwrap_or(0);
    Engine::Nccl { version: Version::from_code(oldest), is_test: all[0].is_test }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(device: u8, version: u32) -> Proposal {
        Proposal {
            identity: Identity { is_cuda: true, uuid: [device; 16] },
            choice: EngineChoice::Auto,
            version,
            is_test: false,
            why_not: "NCCL can't be used: it isn't there".to_owned(),
        }
    }

    #[test]
    fn ranks_decide_by_what_all_of_them_have() {
        let engine = decide(&[proposal(1, 22703), proposal(2, 22005)]);
        assert_eq!(engine.to_string(), "NCCL 2.20.5");
        let why = |all: &[Proposal]| decide(all).to_string();
        let same = why(&[proposal(1, 22703), proposal(2, 22703), proposal(1, 22703)]);
        assert!(same.contains("ranks 0 and 2 have one GPU"), "{same}");
        let lacks = why(&[proposal(1, 22703), proposal(2, 0)]);
        assert!(lacks.contains("on rank 1 NCCL can't be used: it isn't there"), "{lacks}");
        let asked = Proposal { choice: EngineChoice::Staged, ..proposal(2, 22703) };
        assert!(why(&[proposal(1, 22703), asked]).contains("rank 1 asked for it"));
        let test = Proposal { is_test: true, ..proposal(2, 22703) };
        assert!(why(&[proposal(1, 22703), test]).contains("a test library"));
    }

    #[test]
    fn proposals_travel() {
        let sent = Proposal { is_test: true, choice: EngineChoice::Nccl, ..proposal(7, 22703) };
        let got = Proposal::from_bytes(&sent.to_bytes());
        assert_eq!(
            (got.identity, got.choice, got.version, got.is_test),
            (sent.identity, sent.choice, 22703, true)
        );
        assert_eq!(got.why_not, sent.why_not);
        let long = Proposal { why_not: "é".repeat(1000), ..proposal(0, 0) };
        assert!(Proposal::from_bytes(&long.to_bytes()).why_not.starts_with("éé"));
    }
}
