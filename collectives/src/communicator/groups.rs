//! Groups of some of the ranks, and the end of a group.

use tensorwire_core::{Error, Result};
use tensorwire_transports::shm::FlightRecord;

use super::{Communicator, Handle};
#[cfg(feature = "tcp")]
use crate::engine::NetEngine;
use crate::engine::{Either, Engine};

impl Communicator {
    /// Forms groups of the ranks that give the same `color`, ordered by `key`, then by rank; a rank that gives
    /// no color gets no group. Every rank calls it. The groups are independent of each other and of this one.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::ReduceOp;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(4)? {
    /// #         s.spawn(move || {
    /// // Ranks 0 and 2, and ranks 1 and 3.
    /// let half = comm.split(Some(comm.rank() as u32 % 2), 0).unwrap().unwrap();
    /// let mut x = [comm.rank() as f32];
    /// half.all_reduce(&mut x, ReduceOp::Sum).unwrap();
    /// assert_eq!(x, [if comm.rank() % 2 == 0 { 2.0 } else { 4.0 }]);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Os`] or [`Error::Rendezvous`], on every rank, if the memory can't be had: this group goes on;
    /// else see [`Communicator`].
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<Communicator>> {
        self.run(|state| {
            let engine = match &mut state.engine {
                Either::Shm(engine) => engine.group.split(color, key)?.map(|g| Either::Shm(Engine::new(g))),
                #[cfg(feature = "tcp")]
                Either::Tcp(engine) => engine.split(color, key)?.map(NetEngine::share).transpose()?,
            };
            Ok(engine.map(|engine| Communicator::over(engine, None).since(self.why.clone())))
        })
    }

    /// Forms a group of `ranks`, which are renumbered in the order given. Every rank of this group calls it with
    /// the same list; those not in it get `None`.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if a rank is named twice or doesn't exist; else as for
    /// [`split`](Communicator::split).
    pub fn subgroup(&self, ranks: &[usize]) -> Result<Option<Communicator>> {
        for (i, r) in ranks.iter().enumerate() {
            if *r >= self.world || ranks[..i].contains(r) {
                let (rank, world) = (self.rank, self.world);
                let what =
                    format!("rank {rank}: subgroup: rank {r} is named twice or outside the world of {world}");
                return Err(Error::invalid(what));
            }
        }
        let place = ranks.iter().position(|r| *r == self.rank);
        self.split(place.map(|_| 0), place.unwrap_or(0) as i32)
    }

    /// Ends the group from any thread of this rank, also while another is inside a call: every rank's current
    /// or next call fails with [`Error::Aborted`] and `why`.
    pub fn abort(&self, why: &str) {
        match &self.inner.handle {
            Handle::Shm(handle) => handle.abort(why),
            #[cfg(feature = "tcp")]
            Handle::Tcp(handle, local) => {
                handle.abort(why);
                if let Some(local) = local {
                    local.abort(why);
                }
            }
            #[cfg(feature = "mpi")]
            Handle::Mpi(handle) => handle.abort(why),
        }
    }

    /// What every rank of the group is doing, and its last calls: from any thread, also while another is inside a
    /// call, and after the group has failed. Printed, it says how the ranks differ. Calls of a group of one rank
    /// aren't recorded. Over TCP and MPI a rank knows of itself alone: the record has one entry.
    pub fn flight_record(&self) -> FlightRecord {
        match &self.inner.handle {
            Handle::Shm(handle) => handle.flight_record(),
            #[cfg(feature = "tcp")]
            Handle::Tcp(handle, _) => handle.flight_record(),
            #[cfg(feature = "mpi")]
            Handle::Mpi(handle) => handle.flight_record(),
        }
    }

    /// After a failure, a communicator of the ranks that are still there, in their old order. Every survivor
    /// calls it; ranks that have ended or left, and those that a timeout named, are left out. It waits up to the
    /// timeout for survivors that haven't called it yet, and longer for those that wait in a call of another group: up to
    /// the timeout from when that call gives up. If the group hasn't failed, this ends it.
    ///
    /// Over TCP, a rank that a timeout named takes part if it answers within `TENSORWIRE_PEER_TIMEOUT`: it may only have
    /// waited for another. Where a network falls apart, the ranks on either side go on as a group of their own.
    ///
    /// Over MPI no group goes on without one of its ranks, and this says so: MPI's standard promises nothing after a failure.
    ///
    /// # Errors
    /// [`Error::Rendezvous`] if the others went on without this rank, or the group is over MPI; [`Error::Os`] if the memory can't be had;
    /// [`Error::ConcurrentUse`] while another thread is inside a call: [`abort`](Communicator::abort) ends that;
    /// [`Error::InvalidArgument`] if the group was shrunk before.
    pub fn shrink(&self) -> Result<Communicator> {
        let mut state = self.state()?;
        let engine = match &mut state.engine {
            Either::Shm(engine) => Either::Shm(Engine::new(engine.group.shrink()?)),
            #[cfg(feature = "tcp")]
            Either::Tcp(engine) => engine.shrink()?.share().map_err(|failure| *failure)?,
        };
        state.cause.get_or_insert_with(|| "the group was shrunk".to_owned());
        Ok(Communicator::over(engine, None).since(self.why.clone()))
    }
}
