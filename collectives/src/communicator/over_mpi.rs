//! Groups over MPI, and other groups of ranks that MPI has started.

use std::net::SocketAddr;
use std::sync::Arc;

use super::*;
use crate::engine::Network;

impl Communicator {
    /// The group of all processes that `mpirun`, or another launcher of MPI's, has started together, over MPI. Initialises
    /// MPI, unless the program has, and then ends it with the process. Waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Config`] if MPI can't be used by this thread, or has ended; [`Error::Rendezvous`] if the other ranks don't
    /// come.
    pub fn join_mpi(options: &MpiOptions, network: &NetworkOptions) -> Result<Communicator> {
        Communicator::in_world(&World::of_all(options)?, network)
    }

    /// The group of the processes of a communicator of MPI's, all of which call it, over MPI. It is duplicated: what the
    /// program sends on its own stays apart from what this group does. MPI stays the program's, who ends it when this group
    /// is gone; after that, every call of it fails.
    ///
    /// A duplicate stays as long as MPI does: make one group, and [split](Communicator::split) it. Where MPI was initialised
    /// for less than `MPI_THREAD_MULTIPLE`, this thread alone may use the group, and calls can't be
    /// [started](Communicator::start).
    ///
    /// ```no_run
    /// use tensorwire_collectives::Communicator;
    /// use tensorwire_core::ReduceOp;
    /// use tensorwire_transports::mpi::rsmpi;
    ///
    /// let threads = rsmpi::Threading::Multiple;
    /// let (universe, _) = rsmpi::initialize_with_threading(threads).expect("nobody has initialised it yet");
    /// let comm = Communicator::from_mpi(&universe.world())?;
    /// let mut x = [comm.rank() as f32];
    /// comm.all_reduce(&mut x, ReduceOp::Sum)?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`join_mpi`](Communicator::join_mpi), and if MPI isn't initialised.
    pub fn from_mpi(comm: &impl rsmpi::traits::Communicator) -> Result<Communicator> {
        // SAFETY: it is one of MPI's, and no inter-communicator, which isn't of this trait.
        unsafe { Communicator::from_raw_mpi(rsmpi::raw::AsRaw::as_raw(comm)) }
    }

    /// As [`from_mpi`](Communicator::from_mpi), of a handle as C has it.
    ///
    /// # Safety
    /// `comm` is a communicator of this process's MPI, and not an inter-communicator.
    ///
    /// # Errors
    /// As for [`from_mpi`](Communicator::from_mpi).
    pub unsafe fn from_raw_mpi(comm: rsmpi::ffi::MPI_Comm) -> Result<Communicator> {
        // SAFETY: the caller vouches for it.
        let world = unsafe { World::of(comm, &MpiOptions::from_env()?) }?;
        Communicator::in_world(&world, &NetworkOptions::from_env()?)
    }

    /// As the environment says.
    pub(super) fn over_mpi() -> Result<Communicator> {
        let env = Env::read().ok();
        let (options, network) = (MpiOptions::from_env()?, NetworkOptions::from_env()?);
        if let Some(Env { world, source, .. }) = env.as_ref().filter(|env| !is_started_by_mpi(env))
            && *world > 1
        {
            return Err(Error::Config(format!(
                "TENSORWIRE_TRANSPORT is 'mpi', but {source} has started the ranks: for mpi, start them with mpirun"
            )));
        }
        let world = World::of_all(&options)?;
        if let Some(expected) = env.map(|env| env.world).filter(|expected| *expected != world.size()) {
            return Err(Error::Config(format!(
                "MPI has {} processes where the launcher started {expected}: is the mpirun another MPI's than the one \
                 that this program was built with?",
                world.size()
            )));
        }
        Communicator::in_world(&world, &network)
    }

    fn in_world(world: &Arc<World>, options: &NetworkOptions) -> Result<Communicator> {
        options.check()?;
        let group = mpi::MpiGroup::of_all(world)?;
        let told = match world.rank() {
            0 => network::known_to_rank_0(world.hosts(), options, "mpi").to_text(),
            _ => String::new(),
        };
        let text = world.broadcast(told.as_bytes())?;
        let network = Network::from_text(&String::from_utf8_lossy(&text));
        let network = network.filter(|network| network.world() == world.size()).ok_or_else(|| {
            let (rank, world) = (world.rank(), world.size());
            let what = "rank 0 told of no network: is it of another version?".into();
            Error::Rendezvous { rank, world, what }
        })?;
        let engine = NetEngine::sharing(Lanes::Mpi(group), network, None);
        Ok(Communicator::over(Either::Tcp(Box::new(engine)), None))
    }
}

/// Whether an MPI's launcher has started this process.
pub(super) fn is_started_by_mpi(env: &Env) -> bool {
    matches!(env.source, "Open MPI" | "PMI" | "Slurm")
}

/// What carries the data of ranks that MPI has started on several hosts, as rank 0 chooses.
pub(super) fn choose(present: Present) -> Result<(Transport, String)> {
    let world = World::of_all(&MpiOptions::from_env()?)?;
    present.agree(world.rank(), |said| world.broadcast(said))
}

/// A job's secret, its store, and where that is.
pub(super) type Met = (tcp::Secret, Box<dyn Store + Sync>, SocketAddr);

/// How ranks over TCP find each other where MPI has started them and nobody has given them a secret; `None` where they are
/// to meet in another way.
pub(super) fn meet(env: &Env, over: Transport, options: &tcp::TcpOptions) -> Result<Option<Met>> {
    let given = tcp::Secret::is_given()
        || matches!(env.rendezvous, tensorwire_transports::launch::Rendezvous::Store(_));
    if given || over != Transport::Tcp || !matches!(env.source, "Open MPI" | "PMI") {
        return Ok(None);
    }
    let world = World::of_all(&MpiOptions::from_env()?)?;
    mpi::meet(&world, options).map(Some)
}
