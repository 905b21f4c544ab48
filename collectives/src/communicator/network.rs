//! What the ranks of a group over a network tell each other when they meet: where they are, and what rank 0 knows of the
//! links.

use tensorwire_core::{Deadline, Error, Result};
use tensorwire_transports::store::Store;

use crate::engine::Network;
use crate::network::NetworkOptions;

/// Meets the other ranks in `store`, after they have met in it for their connections.
pub(super) fn agree(
    rank: usize,
    world: usize,
    store: &dyn Store,
    options: &NetworkOptions,
    deadline: Deadline,
) -> Result<Network> {
    let failed = |what: String| Error::Rendezvous { rank, world, what };
    // A program may make several groups over one store: its nth meets the others' nth.
    let nth = store.add(&format!("network/made/{rank}"), 1, deadline)?;
    let key = |what: &str| format!("network/{nth}/{what}");
    let host = options.host.clone().unwrap_or_else(|| this_host(rank));
    store.set(&key(&format!("host/{rank}")), host.as_bytes(), deadline)?;
    if rank == 0 {
        let mut hosts = Vec::with_capacity(world);
        for peer in 0..world {
            let host = store.get(&key(&format!("host/{peer}")), deadline);
            hosts.push(host.map_err(|e| failed(format!("rank {peer} did not say where it is: {e}")))?);
        }
        // By number, in the order of each one's first rank.
        let numbers: Vec<usize> =
            hosts.iter().map(|host| hosts.iter().position(|h| h == host).unwrap_or_default()).collect();
        store.set(&key("agreed"), Network::new(&numbers, options).to_text().as_bytes(), deadline)?;
    }
    let text = store.get(&key("agreed"), deadline);
    let text = text.map_err(|e| failed(format!("rank 0 did not say what it knows of the network: {e}")))?;
    Network::from_text(&String::from_utf8_lossy(&text))
        .filter(|network| network.world() == world)
        .ok_or_else(|| failed("the store holds no network: is rank 0 of another version?".into()))
}

/// What is the same for all processes of a host, in containers too, and for no other host's.
fn this_host(rank: usize) -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| format!("rank {rank}"))
}
