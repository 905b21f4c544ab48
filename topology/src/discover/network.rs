//! Network interfaces.

use serde::Serialize;

use super::{Root, Slot};

/// A network interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Interface {
    /// Its name.
    pub name: String,
    /// `up`, `down` or what else the system says.
    pub state: String,
    /// Its speed in megabits a second, where the driver tells.
    pub mbit_per_s: Option<u64>,
    /// The largest packet, in bytes.
    pub mtu: Option<u64>,
    /// Where its device is, if it has one on PCI.
    pub at: Option<Slot>,
}

impl Interface {
    pub(super) fn all(root: Root<'_>) -> Vec<Interface> {
        const FOLDER: &str = "/sys/class/net";
        let interface = |name: String| {
            let path = |what| format!("{FOLDER}/{name}/{what}");
            Some(Interface {
                state: root.read(path("operstate"))?,
                // -1 where there is no carrier, in older drivers as a number of 32 bits.
                mbit_per_s: root.number(path("speed")).filter(|speed| (1..=i32::MAX as u64).contains(speed)),
                mtu: root.number(path("mtu")),
                at: Slot::of(root, path("device").as_ref()),
                name,
            })
        };
        root.names(FOLDER).into_iter().filter(|name| name != "lo").filter_map(interface).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::discover::processors::tests::tree;

    #[test]
    fn interfaces_have_a_speed_where_the_driver_tells() {
        let dir = tree(&[
            ("sys/class/net/eth1/operstate", "up\n"),
            ("sys/class/net/eth1/speed", "100000\n"),
            ("sys/class/net/eth1/mtu", "9000\n"),
            ("sys/class/net/eth0/operstate", "down\n"),
            ("sys/class/net/eth0/speed", "-1\n"),
            ("sys/class/net/lo/operstate", "unknown\n"),
            ("sys/class/net/bonding_masters", "\n"),
        ]);
        let found = Interface::all(Root(dir.path()));
        let found: Vec<_> = found.iter().map(|i| (&*i.name, &*i.state, i.mbit_per_s, i.mtu)).collect();
        assert_eq!(found, [("eth0", "down", None, None), ("eth1", "up", Some(100_000), Some(9000))]);
    }
}
