//! What messages between two devices cost, and how that is known.

use std::fmt;

use serde::{Deserialize, Serialize};

/// The smallest thing that holds two devices, from the nearest to the farthest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// One device, which runs several ranks.
    Device,
    /// One card of several devices.
    Card,
    /// NVLink, directly or through its switches.
    #[serde(rename = "nvlink")]
    NvLink,
    /// PCIe switches.
    Switch,
    /// One NUMA node: through its PCIe host bridges, or its memory.
    Numa,
    /// One socket of several NUMA nodes.
    Socket,
    /// One host of several sockets.
    Host,
    /// The network within a rack: one leaf switch, or whatever else the nearest hosts have between them.
    Rack,
    /// The network within a pod of racks.
    Pod,
    /// The network between any other hosts.
    Network,
}

impl Class {
    /// All of them, the nearest first.
    pub const ALL: [Class; 10] = [
        Class::Device,
        Class::Card,
        Class::NvLink,
        Class::Switch,
        Class::Numa,
        Class::Socket,
        Class::Host,
        Class::Rack,
        Class::Pod,
        Class::Network,
    ];

    /// The tiers of the network, the nearest first.
    pub const TIERS: [Class; 3] = [Class::Rack, Class::Pod, Class::Network];

    /// Whether it is the network between hosts, at whichever tier.
    pub fn is_network(self) -> bool {
        Class::TIERS.contains(&self)
    }

    /// As JSON and TOML name it.
    pub fn name(self) -> &'static str {
        match self {
            Class::Device => "device",
            Class::Card => "card",
            Class::NvLink => "nvlink",
            Class::Switch => "switch",
            Class::Numa => "numa",
            Class::Socket => "socket",
            Class::Host => "host",
            Class::Rack => "rack",
            Class::Pod => "pod",
            Class::Network => "network",
        }
    }
}

impl fmt::Display for Class {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a message costs, `alpha_us + bytes / (1000 gbps)` microseconds, one way, while nothing else is sent.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Figures", into = "Figures")]
pub struct Link {
    /// The time that a message of no bytes takes, in microseconds.
    pub alpha_us: f64,
    /// Bytes carried each way, in GB/s (1e9 bytes a second).
    pub gbps: f64,
    /// How that is known.
    pub basis: Basis,
}

/// How a link's figures are known, from the surest to the least sure.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Basis {
    /// They were measured on this machine.
    Measured {
        /// How far off a message's time may be, as a part of it: 0.1 is 10 % either way.
        error: f64,
        /// When, in seconds since 1970.
        at: u64,
    },
    /// Somebody says so: who described the machine, or what its parts are rated for.
    Rated,
    /// Nobody said: a figure usual for the class.
    Assumed,
}

/// A link as its file has it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Figures {
    alpha_us: f64,
    gbps: f64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    error: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    measured_at: Option<u64>,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    assumed: bool,
}

impl From<Link> for Figures {
    fn from(Link { alpha_us, gbps, basis }: Link) -> Figures {
        let (error, measured_at) = match basis {
            Basis::Measured { error, at } => (Some(error), Some(at)),
            Basis::Rated | Basis::Assumed => (None, None),
        };
        Figures { alpha_us, gbps, error, measured_at, assumed: basis == Basis::Assumed }
    }
}

impl TryFrom<Figures> for Link {
    type Error = &'static str;

    fn try_from(figures: Figures) -> Result<Link, &'static str> {
        let Figures { alpha_us, gbps, error, measured_at, assumed } = figures;
        let basis = match (error, measured_at, assumed) {
            (Some(error), Some(at), false) => Basis::Measured { error, at },
            (None, None, false) => Basis::Rated,
            (None, None, true) => Basis::Assumed,
            _ => return Err("a measured link has both `error` and `measured_at`, and is not `assumed`"),
        };
        Ok(Link { alpha_us, gbps, basis })
    }
}

impl Link {
    /// A link whose figures somebody gave.
    pub fn rated(alpha_us: f64, gbps: f64) -> Link {
        Link { alpha_us, gbps, basis: Basis::Rated }
    }

    /// What is usual for a class, for when nothing else is known.
    ///
    /// The figures are round ones of the right order: latencies of 1 to 10 us and PCIe 3.0 x16 and UPI at 10 to
    /// 12 GB/s, as NCCL's own tables have it (`src/graph/topo.h`, `src/graph/tuning.cc`); two NVLinks of 25 GB/s;
    /// 10 Gbit/s between hosts; and shared memory as [`CostModel`](crate::cost::CostModel) has it.
    pub fn assumed(class: Class) -> Link {
        let (alpha_us, gbps) = match class {
            Class::Device => (2.0, 8.0),
            Class::Card => (3.0, 12.0),
            Class::NvLink => (2.5, 50.0),
            Class::Switch => (4.0, 12.0),
            Class::Numa => (4.5, 11.0),
            Class::Socket => (5.0, 10.5),
            Class::Host => (6.0, 10.0),
            Class::Rack | Class::Pod | Class::Network => (30.0, 1.25),
        };
        Link { alpha_us, gbps, basis: Basis::Assumed }
    }

    /// What a message of `bytes` takes, in microseconds.
    pub fn us(&self, bytes: u64) -> f64 {
        self.alpha_us + bytes as f64 * 1e-3 / self.gbps
    }

    /// The link whose every message takes as long as the slower of two.
    pub(super) fn slower(self, other: Link) -> Link {
        let rank = |basis: Basis| match basis {
            Basis::Measured { error, .. } => (0, error),
            Basis::Rated => (1, 0.0),
            Basis::Assumed => (2, 0.0),
        };
        let surer = rank(self.basis) <= rank(other.basis);
        Link {
            alpha_us: self.alpha_us.max(other.alpha_us),
            gbps: self.gbps.min(other.gbps),
            basis: if surer { other.basis } else { self.basis },
        }
    }
}

/// The way from one device to another.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hop {
    /// The smallest thing that holds both.
    pub class: Class,
    /// What messages cost.
    pub link: Link,
}

impl Hop {
    /// What a message of `bytes` takes, in microseconds.
    pub fn us(&self, bytes: u64) -> f64 {
        self.link.us(bytes)
    }
}
