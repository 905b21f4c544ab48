//! How a group comes about: ranks that meet in a store, and groups of groups.

use std::net::SocketAddr;
use std::sync::Arc;

use tensorwire_core::{Call, Deadline, Error, Op, Result};

use super::TcpOptions;
use super::endpoint::Endpoint;
use super::group::TcpGroup;
use super::interface;
use super::secret::{Secret, random};
use super::shared::Shared;
use super::stream::Identity;
use crate::color;
use crate::processors::{Processors, may_spin};
use crate::shm::Failure;
use crate::store::Store;

/// What rank 0 tells the others where some did not come.
const FAILED: &str = "!";

/// Joins the group of `world` processes, on any hosts, that meet in `store`, as `rank`. `towards` is where the store
/// is, if it is on a network: this rank listens at the address that leads there.
///
/// # Errors
/// [`Error::Config`] for a rank outside the world or an interface that isn't there; [`Error::Rendezvous`] if the
/// other ranks don't come or don't fit.
pub fn join(
    rank: usize,
    world: usize,
    store: &dyn Store,
    towards: Option<SocketAddr>,
    secret: &Secret,
    options: &TcpOptions,
) -> Result<TcpGroup> {
    if rank >= world {
        return Err(Error::Config(format!(
            "rank {rank} is outside the world of {world}: ranks are 0 to world - 1"
        )));
    }
    secret.check(Identity::Rank(rank))?;
    let options = &options.sized_for(world);
    let deadline = Deadline::after(options.timeout);
    let chosen = interface::choose(options.interface.as_ref(), towards)?;
    let endpoint = Arc::new(Endpoint::start(chosen, secret.clone(), options)?);
    let failed = |what: String| Error::Rendezvous { rank, world, what };

    // A program may make several groups over one store: its nth meets the others' nth.
    let nth = store.add(&format!("tcp/made/{rank}"), 1, deadline)?;
    let key = |what: &str| format!("tcp/{nth}/{what}");
    // Rank 0's choice of checksums holds for all.
    let (id, checksum): ([u8; 16], bool) = match rank {
        0 => {
            let id: [u8; 16] = random()?;
            let mut head = (world as u64).to_le_bytes().to_vec();
            head.push(options.checksum.into());
            head.extend_from_slice(&id);
            head.push(u8::from(options.quic.is_some()));
            store.set(&key("head"), &head, deadline)?;
            (id, options.checksum)
        }
        _ => {
            let head =
                store.get(&key("head"), deadline).map_err(|e| failed(format!("rank 0 did not come: {e}")))?;
            let fits: Option<(&[u8; 8], &[u8])> = head.split_first_chunk();
            let (theirs, id) = fits.ok_or_else(|| failed("the store holds no group".into()))?;
            let theirs = u64::from_le_bytes(*theirs);
            if theirs != world as u64 {
                return Err(failed(format!(
                    "rank {rank} was started for a world of {world}, rank 0 for {theirs}"
                )));
            }
            let fits = match id {
                [checksum @ (0 | 1), id @ .., quic] => {
                    id.try_into().ok().map(|id| (id, *checksum == 1, *quic))
                }
                _ => None,
            };
            let (id, checksum, quic) = fits.ok_or_else(|| failed("the store holds no group".into()))?;
            if quic != u8::from(options.quic.is_some()) {
                return Err(failed(format!(
                    "either rank {rank} or rank 0 is to talk over quic, and the other isn't: give all ranks of a job the \
                     same TENSORWIRE_TRANSPORT"
                )));
            }
            (id, checksum)
        }
    };
    let shared = Arc::new(Shared::new(rank, world, id, checksum)?);
    endpoint.enter(&shared);
    let place = format!("{}/{}", endpoint.address(), Processors::allowed());
    store.set(&key(&format!("at/{rank}")), place.as_bytes(), deadline)?;
    let all = match rank {
        0 => gather(world, store, &key, deadline)?,
        _ => {
            // Rank 0 waits until its own deadline, which may be later than this rank's.
            let all = store.get(&key("all"), deadline);
            let all = all.map_err(|e| failed(format!("rank 0 has not seen all ranks in time: {e}")))?;
            String::from_utf8_lossy(&all).into_owned()
        }
    };
    if let Some(why) = all.strip_prefix(FAILED) {
        return Err(failed(why.to_owned()));
    }
    let (addresses, processors): (Vec<SocketAddr>, Vec<Processors>) =
        all.split(' ').filter_map(parse_place).unzip();
    if addresses.len() != world || addresses[rank] != endpoint.address() {
        return Err(failed(format!("the store has another process as rank {rank}: was it started twice?")));
    }
    let here = addresses.iter().zip(&processors).filter(|(at, _)| at.ip() == endpoint.address().ip());
    let here: Vec<Processors> = here.map(|(_, processors)| processors.clone()).collect();
    let spins = may_spin(&processors[rank], &here);
    let _ = shared.addresses.set(addresses);
    Ok(TcpGroup::new(shared, endpoint, spins, options.clone()))
}

/// Where a rank listens, and the processors that it may use there.
fn parse_place(text: &str) -> Option<(SocketAddr, Processors)> {
    let (address, processors) = text.split_once('/')?;
    Some((address.parse().ok()?, processors.parse().ok()?))
}

/// Rank 0: waits for every rank's place, and tells all of them.
fn gather(
    world: usize,
    store: &dyn Store,
    key: &dyn Fn(&str) -> String,
    deadline: Deadline,
) -> Result<String> {
    let mut all = Vec::with_capacity(world);
    let mut missing = Vec::new();
    let mut refused = String::new();
    for rank in 0..world {
        match store.get(&key(&format!("at/{rank}")), deadline) {
            Ok(address) => all.push(String::from_utf8_lossy(&address).into_owned()),
            Err(e) => {
                missing.push(rank);
                // A store that has not let somebody in says so behind that.
                refused = e.to_string().split_once("; ").map_or(refused, |(_, who)| format!("; {who}"));
            }
        }
    }
    let told = if missing.is_empty() {
        all.join(" ")
    } else {
        format!("{FAILED}rank(s) {missing:?} did not come within {:?}{refused}", deadline.budget())
    };
    // The deadline has passed where ranks are missing; those that are late learn it nevertheless.
    store.set(&key("all"), told.as_bytes(), Deadline::after(deadline.budget()))?;
    Ok(told)
}

impl TcpGroup {
    /// Forms groups of the ranks that give the same `color`, ordered by `key`, then rank; a rank without a color gets
    /// none. Returns also the ranks' numbers in this group. Every rank of this group calls it. Connections of the new groups are made at their first use.
    ///
    /// # Errors
    /// See [`wait`](TcpGroup::wait).
    pub fn split(&mut self, color: Option<u32>, key: i32) -> Result<Option<(TcpGroup, Vec<usize>)>, Failure> {
        self.begin(Call::bare(Op::Split))?;
        let ranks = color::members(color, &self.exchange(color::choice(color, key))?);
        let made = color.map(|_| {
            // The same for all of them, and for no other group: no other split of this group has this number, and no
            // other group of this split this first rank.
            let (seq, first) = (self.seq.to_le_bytes(), (ranks[0] as u64).to_le_bytes());
            self.part(&ranks, "group", &[&seq, &first])
        });
        let failed = made.as_ref().is_some_and(Result::is_err);
        // Nobody dials into a group before all of its ranks have entered it.
        let failed = self.exchange([u8::from(failed)])?.iter().position(|[f]| *f == 1);
        self.end();
        let made = made.transpose()?;
        match failed {
            None => Ok(made.map(|group| (group, ranks))),
            Some(by) => {
                let (rank, world) = (self.rank(), self.world());
                let what = format!("rank {by} could not get what a group needs from its system");
                Err(Box::new(Error::Rendezvous { rank, world, what }))
            }
        }
    }

    /// This rank's part in a new group of `ranks`, who all name it alike.
    pub(super) fn part(&self, ranks: &[usize], kind: &str, name: &[&[u8]]) -> Result<TcpGroup> {
        let name: Vec<&[u8]> = [&self.shared.id[..]].into_iter().chain(name.iter().copied()).collect();
        let digest = self.endpoint.secret().prove(kind, &name);
        let id = *digest.first_chunk().expect("a digest is longer than an id");
        let rank = ranks.iter().position(|r| *r == self.rank()).expect("this rank is one of them");
        let shared = Arc::new(Shared::new(rank, ranks.len(), id, self.shared.checksum)?);
        let all = self.shared.addresses.get().expect("a group knows its addresses");
        let _ = shared.addresses.set(ranks.iter().map(|r| all[*r]).collect());
        let _ = shared.job_ranks.set(ranks.iter().map(|r| self.shared.job_rank(*r)).collect());
        self.endpoint.enter(&shared);
        // The processors are shared with the ranks of the other groups.
        Ok(TcpGroup::new(shared, self.endpoint.clone(), self.spins(), self.options.clone()))
    }
}
