//! Where the collectives change their algorithm on this machine, and what messages to other ranks cost from it: what
//! `tensorwire topo --probe` measured, kept in a file.
//!
//! The file is JSON, [`SCHEMA`]:
//!
//! ```json
//! {"schema": "tensorwire.table/v1", "version": "0.1.0",
//!  "machine": {"processor": "AMD EPYC", "processors": 2, "caches": ["L1 Data 32K for 1"]},
//!  "measured_at": 1795000000,
//!  "worlds": [{"ranks": 2, "one_shot": 131072, "symmetric_one_shot": 65536, "chunk": 262144, "single_copy_above": 32768}],
//!  "networks": [{"transport": "tcp",
//!    "intra": {"alpha_us": 9.5, "gbps": 2.6, "overhead_us": 1.9, "measured_at": 1795000000},
//!    "inter": {"alpha_us": 31.0, "gbps": 1.2, "overhead_us": 2.1, "measured_at": 1795000000}}],
//!  "profiles": [{"distance_ns": 102,
//!    "timings": [{"collective": "all_reduce", "transport": "shm", "ranks": 2, "contended": false,
//!      "p50": {"knots": [[1024, 0.25], [4194304, 190.0]], "band": 1.12},
//!      "p99": {"knots": [[1024, 0.5], [4194304, 400.0]], "band": 1.9}, "measured_at": 1795000000}],
//!    "steps": [{"ranks": 2, "layer_us": 40.0, "gbps": 27.0, "band": 1.05, "measured_at": 1795000000}],
//!    "reads": [{"processors": 1, "bytes": 268435456, "gbps": 30.0}]}]}
//! ```
//!
//! Shared memory and each transport are measured apart, and each measurement leaves the others as they are; of a network,
//! also the links on a host and those between hosts; and each [`Profile`], one for each distance of the processors.
//! `networks` and `profiles` may be missing.
//!
//! It is `$TENSORWIRE_TABLE`, or a file named after the machine's [`Fingerprint`] in `$XDG_CACHE_HOME/tensorwire` or
//! `~/.cache/tensorwire`: machines that share a home have a file each. `TENSORWIRE_TABLE=off` is for the
//! built-in constants. A file that is damaged, of another version or of another machine isn't used, and
//! [`Absent`] says why.

pub mod claims;
mod curve;
mod file;
pub mod fit;
mod profile;

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use tensorwire_core::{Link, Tuning};

use crate::discover::Fingerprint;

pub use curve::{Curve, Piece};
pub use profile::{Profile, Reading, Step, Timing, one_distance};

/// The schema that a table's file names.
pub const SCHEMA: &str = "tensorwire.table/v1";

/// The most worlds that a table may hold.
const MOST: usize = 256;

/// The most transports that a table may hold.
const MOST_NETWORKS: usize = 16;

/// The most profiles that a table may hold: a new one takes the place of the oldest.
const MOST_PROFILES: usize = 4;

/// What was measured on a machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Table {
    /// The machine.
    pub machine: Fingerprint,
    /// When shared memory was measured, in seconds since 1970.
    pub measured_at: u64,
    /// What is fastest over shared memory, by number of ranks.
    pub tunings: Vec<Tuning>,
    /// What messages cost over each transport that was measured.
    pub networks: Vec<Network>,
    /// What collectives and layers take, a profile for each distance of the processors.
    pub profiles: Vec<Profile>,
}

/// What messages over a transport were found to cost, from this machine.
#[derive(Clone, Debug, PartialEq)]
pub struct Network {
    /// Such as `tcp`.
    pub transport: String,
    /// Between ranks of one host.
    pub intra: Option<Measured>,
    /// Between ranks of different hosts.
    pub inter: Option<Measured>,
}

/// A link that was measured.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Measured {
    /// What a message costs.
    pub link: Link,
    /// When, in seconds since 1970.
    pub measured_at: u64,
}

/// Why there is no table, so that the built-in constants hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Absent {
    /// `TENSORWIRE_TABLE` is `off`.
    #[error("TENSORWIRE_TABLE is off")]
    Off,
    /// There is no place for it.
    #[error(
        "no place for a table: neither HOME nor XDG_CACHE_HOME is an absolute path, and TENSORWIRE_TABLE names no file"
    )]
    NoHome,
    /// Nothing was measured yet.
    #[error("nothing measured yet: tensorwire topo --probe does")]
    Missing,
    /// There is a file that can't be used.
    #[error("{} is ignored: {why}", path.display())]
    Refused {
        /// The file.
        path: PathBuf,
        /// Why not, and what to do.
        why: String,
    },
}

/// Where the table of a machine is.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Place {
    Off,
    Nowhere,
    File(PathBuf),
    /// A file in this folder, named after the machine.
    Folder(PathBuf),
}

impl Place {
    fn from_lookup(get: impl Fn(&str) -> Option<OsString>) -> Place {
        match get("TENSORWIRE_TABLE").filter(|value| !value.is_empty()) {
            Some(value) if value == "off" => return Place::Off,
            Some(value) => return Place::File(value.into()),
            None => {}
        }
        // As the XDG base directory specification has it: what isn't absolute is ignored.
        let absolute = |name| get(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let cache = absolute("XDG_CACHE_HOME").or_else(|| Some(absolute("HOME")?.join(".cache")));
        cache.map_or(Place::Nowhere, |cache| Place::Folder(cache.join("tensorwire")))
    }

    fn from_env() -> Place {
        Place::from_lookup(|name| std::env::var_os(name))
    }

    fn path(self, machine: &Fingerprint) -> Result<PathBuf, Absent> {
        match self {
            Place::Off => Err(Absent::Off),
            Place::Nowhere => Err(Absent::NoHome),
            Place::File(path) => Ok(path),
            Place::Folder(folder) => Ok(folder.join(file::name(machine))),
        }
    }
}

impl Table {
    /// A table of this machine in which nothing is measured yet.
    pub fn empty(machine: Fingerprint) -> Table {
        Table { machine, measured_at: 0, tunings: Vec::new(), networks: Vec::new(), profiles: Vec::new() }
    }

    /// What was measured over a transport, such as `tcp`.
    pub fn network(&self, transport: &str) -> Option<&Network> {
        self.networks.iter().find(|network| network.transport == transport)
    }

    /// Takes over what was measured over a transport, and leaves a link that wasn't as it is.
    pub fn set_network(&mut self, measured: Network) {
        match self.networks.iter_mut().find(|network| network.transport == measured.transport) {
            Some(known) => {
                known.intra = measured.intra.or(known.intra);
                known.inter = measured.inter.or(known.inter);
            }
            None => self.networks.push(measured),
        }
    }

    /// What was measured nearest to this distance of the processors, in nanoseconds; where it isn't known, last.
    pub fn profile(&self, distance_ns: Option<u32>) -> Option<&Profile> {
        profile::nearest(&self.profiles, distance_ns)
    }

    /// Takes over what was measured at one distance, and leaves the others as they are.
    pub fn set_profile(&mut self, measured: Profile) {
        profile::merge(&mut self.profiles, measured, MOST_PROFILES);
    }

    /// The file of this machine's table, whether it exists or not.
    ///
    /// # Errors
    /// [`Absent::Off`] and [`Absent::NoHome`].
    pub fn path(machine: &Fingerprint) -> Result<PathBuf, Absent> {
        Place::from_env().path(machine)
    }

    /// The table of this machine.
    ///
    /// # Errors
    /// Why there is none.
    pub fn in_force() -> Result<Table, Absent> {
        let place = Place::from_env();
        // Most machines have none: then nothing more is read.
        match &place {
            Place::Folder(path) | Place::File(path) if !path.exists() => return Err(Absent::Missing),
            _ => {}
        }
        let machine = Fingerprint::read(Path::new("/"));
        Table::load(&place.path(&machine)?, &machine)
    }

    /// What was measured on this machine; nothing if there is no table.
    pub fn tunings_in_force() -> Vec<Tuning> {
        Table::in_force().map(|table| table.tunings).unwrap_or_default()
    }

    /// What was measured from this machine over a transport, such as `tcp`; nothing if there is no table.
    pub fn links_in_force(transport: &str) -> Option<Network> {
        Table::in_force().ok()?.network(transport).cloned()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_place_is_as_the_environment_says() {
        let place = |set: &[(&str, &str)]| {
            Place::from_lookup(|name| set.iter().find(|(n, _)| *n == name).map(|(_, value)| value.into()))
        };
        let folder = |path: &str| Place::Folder(path.into());
        assert_eq!(place(&[]), Place::Nowhere);
        assert_eq!(place(&[("HOME", "/h")]), folder("/h/.cache/tensorwire"));
        assert_eq!(place(&[("HOME", "/h"), ("XDG_CACHE_HOME", "/c")]), folder("/c/tensorwire"));
        assert_eq!(place(&[("HOME", "/h"), ("XDG_CACHE_HOME", "c")]), folder("/h/.cache/tensorwire"));
        assert_eq!(place(&[("HOME", "h")]), Place::Nowhere);
        let file = Place::File("x.json".into());
        assert_eq!(place(&[("HOME", "/h"), ("TENSORWIRE_TABLE", "x.json")]), file);
        assert_eq!(place(&[("HOME", "/h"), ("TENSORWIRE_TABLE", "off")]), Place::Off);
        assert_eq!(place(&[("HOME", "/h"), ("TENSORWIRE_TABLE", "")]), folder("/h/.cache/tensorwire"));
    }
}
