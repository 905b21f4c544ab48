//! What the ranks of a group over a network tell each other when they meet: where they are, and what rank 0 knows of the
//! links; and what a caller can ask about that.

use tensorwire_core::{Deadline, Error, Result};
use tensorwire_transports::store::Store;

use super::Communicator;
use crate::engine::{Either, Network, Rules};
use crate::network::{Exchange, LinkClass, LinksInForce, NetworkInUse, NetworkOptions};

impl Communicator {
    /// The network that this group is on; `None` where all ranks share memory.
    ///
    /// # Errors
    /// [`Error::ConcurrentUse`].
    pub fn network(&self) -> Result<Option<NetworkInUse>> {
        let rank = self.rank;
        let state = self.inner.state.try_lock().map_err(|_| Error::ConcurrentUse { rank })?;
        Ok(match &state.engine {
            Either::Shm(_) => None,
            Either::Tcp(engine) => Some(engine.network()),
        })
    }

    /// Measures links: every rank sends `messages` of `bytes` each to the next rank of its host, or between hosts, as many
    /// ranks of each host as the smallest has, to the rank in its place on the next one; all at once, `times` times.
    ///
    /// Every rank calls it, and gets the same: how long it took once. `None` if this network has no such link, or all
    /// ranks share memory.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for more than 65,535 messages or 2^31 - 1 times; else see [`Communicator`].
    pub fn measure_link(
        &self,
        class: LinkClass,
        bytes: usize,
        messages: usize,
        times: usize,
    ) -> Result<Option<Exchange>> {
        if messages > usize::from(u16::MAX) || times > i32::MAX as usize {
            let rank = self.rank;
            return Err(Error::invalid(format!(
                "rank {rank}: measure_link: {messages} messages {times} times"
            )));
        }
        self.run(|state| match &mut state.engine {
            Either::Tcp(engine) => engine.measure_link(class, bytes, messages, times),
            _ => Ok(None),
        })
    }
}

/// Meets the other ranks in `store`, after they have met in it for their connections over `transport`.
pub(super) fn agree(
    rank: usize,
    world: usize,
    store: &dyn Store,
    options: &NetworkOptions,
    transport: &str,
    deadline: Deadline,
) -> Result<Network> {
    options.check()?;
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
        let hosts: Vec<_> = hosts.iter().map(|host| String::from_utf8_lossy(host)).collect();
        let network = known_to_rank_0(&hosts, options, transport);
        store.set(&key("agreed"), network.to_text().as_bytes(), deadline)?;
    }
    let text = store.get(&key("agreed"), deadline);
    let text = text.map_err(|e| failed(format!("rank 0 did not say what it knows of the network: {e}")))?;
    Network::from_text(&String::from_utf8_lossy(&text))
        .filter(|network| network.world() == world)
        .ok_or_else(|| failed("the store holds no network: is rank 0 of another version?".into()))
}

/// What rank 0 knows of the network of ranks on these hosts.
pub(super) fn known_to_rank_0(
    hosts: &[impl AsRef<str>],
    options: &NetworkOptions,
    transport: &str,
) -> Network {
    // By number, in the order of each one's first rank.
    let first = |host: &str| hosts.iter().position(|h| h.as_ref() == host).unwrap_or_default();
    let numbers: Vec<usize> = hosts.iter().map(|host| first(host.as_ref())).collect();
    let NetworkOptions { any_order, adapt_percent, .. } = *options;
    let rules = Rules { any_order, adapt_percent };
    Network::new(&numbers, LinksInForce::new(options, transport), rules)
}

/// What is the same for all processes of a host, in containers too, and for no other host's.
fn this_host(rank: usize) -> String {
    std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_else(|_| format!("rank {rank}"))
}
