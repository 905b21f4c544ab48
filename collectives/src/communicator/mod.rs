//! The public face: checks arguments, names mistakes, and keeps a failed group from being used again.

mod background;
#[cfg(feature = "tcp")]
mod choose;
mod collectives;
mod fused;
mod groups;
#[cfg(feature = "tcp")]
mod network;
#[cfg(feature = "mpi")]
mod over_mpi;
mod placement;
mod prepared;
mod symmetric;
mod wire;
mod work;

use std::sync::{Arc, Mutex, MutexGuard, TryLockError};

use tensorwire_core::{DType, Deadline, Error, ReduceOp, Result};
use tensorwire_transports::launch::{Env, Transport};
#[cfg(feature = "mpi")]
use tensorwire_transports::mpi::{self, MpiOptions, World, rsmpi};
use tensorwire_transports::shm::{self, Failure, Options};
use tensorwire_transports::store::{self, Store};
#[cfg(feature = "tcp")]
use tensorwire_transports::tcp;

use crate::engine::{Either, Engine, Reduction};
#[cfg(feature = "tcp")]
use crate::engine::{Lanes, NetEngine};
#[cfg(feature = "tcp")]
use crate::network::NetworkOptions;
use crate::select::{Algorithm, tuned};

#[cfg(feature = "tcp")]
use choose::Present;
#[cfg(feature = "nccl")]
pub(crate) use collectives::Blocks;
pub use prepared::AllReducePlan;
pub use symmetric::Symmetric;
pub use work::Work;

/// One rank's membership in a group of `world` ranks, and the collectives between them.
///
/// Every rank of the group makes the same calls, with the same counts, types and roots, in the same order; a
/// rank that doesn't gets, like all others, [`Error::Mismatch`] with both calls. A call returns when this
/// rank's buffers are done. If a peer dies or leaves, or doesn't come within the timeout, every rank gets an
/// error that names it, and the communicator can't be used further, but for [`shrink`](Communicator::shrink).
///
/// Results are the same bits on every rank and in every run: element `i` is reduced in rank order.
///
/// One call at a time: a second thread that calls meanwhile gets [`Error::ConcurrentUse`]. To have calls run
/// in the background, [`start`](Communicator::start) them: whatever else is asked of the communicator comes behind those.
///
/// ```
/// use tensorwire_collectives::Communicator;
/// use tensorwire_core::ReduceOp;
///
/// // Ranks are usually processes (`Communicator::from_env`); for a test they can be threads.
/// std::thread::scope(|s| {
///     for comm in Communicator::in_process(3)? {
///         s.spawn(move || {
///             let mut x = [comm.rank() as f32, 1.0];
///             comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
///             assert_eq!(x, [3.0, 3.0]);
///         });
///     }
///     Ok::<(), tensorwire_core::Error>(())
/// })?;
/// # Ok::<(), tensorwire_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Communicator {
    rank: usize,
    world: usize,
    inner: Arc<Inner>,
    /// Why that transport carries its data.
    why: Arc<str>,
    /// Calls that were started; `None` in the communicator that runs them.
    started: Option<background::Started>,
}

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    handle: Handle,
    /// Whether several all-reduces may be under way at once: over TCP alone.
    #[cfg(feature = "tcp")]
    pipelines: bool,
    /// Rank 0 of a job without a launcher serves its store for as long as the communicator lives.
    _store: Option<Box<dyn Store + Sync>>,
}

/// The ranks of a job that talk over a network have met.
#[cfg(feature = "tcp")]
struct Met {
    secret: tcp::Secret,
    store: Box<dyn Store + Sync>,
    towards: Option<std::net::SocketAddr>,
    deadline: Deadline,
}

#[cfg(feature = "tcp")]
impl Met {
    fn new(env: &Env, over: Transport) -> Result<Met> {
        let options = tcp::TcpOptions::for_transport(over)?;
        let deadline = Deadline::after(options.timeout);
        #[cfg(feature = "mpi")]
        if let Some((secret, store, at)) = over_mpi::meet(env, over, &options)? {
            return Ok(Met { secret, store, towards: Some(at), deadline });
        }
        let secret = tcp::Secret::for_transport(over)?;
        let (store, towards) = tcp::meet(env, &secret, deadline)?;
        Ok(Met { secret, store, towards, deadline })
    }

    /// Rank 0's bytes, on every rank.
    fn spread(&self, rank: usize, bytes: &[u8]) -> Result<Vec<u8>> {
        // A program may make several groups over one store: its nth meets the others' nth.
        let nth = self.store.add(&format!("transport/made/{rank}"), 1, self.deadline)?;
        let key = format!("transport/{nth}");
        if rank == 0 {
            self.store.set(&key, bytes, self.deadline)?;
        }
        self.store.get(&key, self.deadline)
    }

    /// The group over `over`; ranks of one host share memory where there are options for that.
    fn join(self, env: &Env, over: Transport, sharing: Option<Options>) -> Result<Communicator> {
        let options = tcp::TcpOptions::for_transport(over)?;
        let Met { secret, store, towards, deadline } = self;
        let network = NetworkOptions::from_env()?;
        let group = tcp::join(env.rank, env.world, store.as_ref(), towards, &secret, &options)?;
        let engine = Communicator::joined(store.as_ref(), group, &network, deadline, sharing)?;
        Ok(Communicator::over(engine, Some(store)))
    }
}

/// What any thread may do with the group.
#[derive(Debug)]
enum Handle {
    Shm(shm::Handle),
    #[cfg(feature = "tcp")]
    Tcp(tcp::TcpHandle, Option<shm::Handle>),
    #[cfg(feature = "mpi")]
    Mpi(mpi::MpiHandle),
}

#[derive(Debug)]
struct State {
    engine: Either,
    algorithm: Option<Algorithm>,
    /// The error that ended the group.
    cause: Option<String>,
}

impl Communicator {
    /// The group that this process was started into: by `tensorwire launch`, torchrun, mpirun, srun or as a
    /// Kubernetes indexed Job, from the variables they set. Waits for all ranks.
    ///
    /// `TENSORWIRE_TRANSPORT` says what carries the data: `shm`, or nothing, shared memory between ranks on one host; or,
    /// with the feature `tcp`, `tcp` between ranks on any hosts, who share the secret in `TENSORWIRE_SECRET` or in the
    /// file that `TENSORWIRE_SECRET_FILE` names; with the feature `tls`, `tls`, the same encrypted, where each rank also
    /// shows the certificate in `TENSORWIRE_TLS_CERT` (see `tcp::Tls`); with the feature `quic`, `quic`, with the same
    /// certificates over UDP; with the feature `mpi`, in processes that mpirun has started, `mpi`, whatever MPI drives, and
    /// `tcp` needs no secret then, which MPI carries; or `auto`: shared memory between ranks that have proved to be on one
    /// host, by reading there what another wrote, and between the rest what all have and, of several, what was measured to be
    /// faster ([`transport_reason`](Communicator::transport_reason) says why): TLS or QUIC with certificates, MPI or TCP where
    /// mpirun has started ranks on several hosts, TCP with a secret. With none of these, `auto` is `shm`. How collectives
    /// use a network is in the variables that
    /// `network::NetworkOptions` reads.
    ///
    /// # Errors
    /// [`Error::Config`] if the variables are missing or make no sense; [`Error::Rendezvous`] if the other
    /// ranks don't come.
    pub fn from_env() -> Result<Communicator> {
        let over = Transport::from_env()?;
        #[cfg(feature = "mpi")]
        if over == Transport::Mpi {
            return Communicator::over_mpi();
        }
        let env = Env::read()?;
        match over {
            Transport::Shm => Communicator::over_shm(&env),
            Transport::Auto => Communicator::over_any(&env),
            over => Communicator::over_tcp(&env, over),
        }
    }

    fn over_shm(env: &Env) -> Result<Communicator> {
        let options = Options::from_env()?;
        let deadline = Deadline::after(options.timeout);
        let store = store::meet(env, deadline)?;
        let group = shm::join(env.rank, env.world, store.as_ref(), &tuned(&options, env.rank))?;
        Ok(Communicator::over(Either::Shm(Engine::new(group)), Some(store)))
    }

    #[cfg(not(feature = "tcp"))]
    fn over_tcp(_: &Env, over: Transport) -> Result<Communicator> {
        Err(Error::Config(format!(
            "TENSORWIRE_TRANSPORT is '{over}', but this program was built without the feature {over}"
        )))
    }

    #[cfg(not(feature = "tcp"))]
    fn over_any(env: &Env) -> Result<Communicator> {
        Communicator::over_shm(env)
    }

    #[cfg(feature = "tcp")]
    fn over_any(env: &Env) -> Result<Communicator> {
        let present = Present {
            secret: tcp::Secret::is_given(),
            #[cfg(feature = "tls")]
            certificates: std::env::var_os(tcp::TLS_CERT_VAR).is_some_and(|v| !v.is_empty()),
            #[cfg(not(feature = "tls"))]
            certificates: false,
            #[cfg(feature = "mpi")]
            mpi: matches!(env.source, "Open MPI" | "PMI")
                && env.local_world.is_some_and(|here| here < env.world),
            #[cfg(not(feature = "mpi"))]
            mpi: false,
        };
        let (mut over, mut why) = present.choose(|_| None);
        #[cfg(feature = "mpi")]
        if over == Transport::Mpi {
            (over, why) = over_mpi::choose(present)?;
            if over == Transport::Mpi {
                return Ok(Communicator::over_mpi()?.since(why));
            }
        }
        if over == Transport::Shm {
            return Communicator::over_shm(env);
        }
        let met = Met::new(env, over)?;
        if present.is_encrypted() {
            (over, why) = present.agree(env.rank, |said| met.spread(env.rank, said))?;
        }
        Ok(met.join(env, over, Some(Options::from_env()?))?.since(why))
    }

    #[cfg(feature = "tcp")]
    fn over_tcp(env: &Env, over: Transport) -> Result<Communicator> {
        Met::new(env, over)?.join(env, over, None)
    }

    /// The engine of a group over a network, whose ranks agree on how they use it.
    #[cfg(feature = "tcp")]
    fn joined(
        store: &dyn Store,
        group: tcp::TcpGroup,
        network: &NetworkOptions,
        deadline: Deadline,
        sharing: Option<Options>,
    ) -> Result<Either> {
        let network =
            network::agree(group.rank(), group.world(), store, network, group.transport(), deadline)?;
        NetEngine::sharing(Lanes::Tcp(group), network, sharing).share().map_err(|failure| *failure)
    }

    /// The group of `world` processes, on any hosts, that share `secret` and meet in `store`, as `rank`. Waits for all
    /// ranks. It listens at the address that leads to `towards`, where the store is, or on this host alone, unless the
    /// options say which.
    ///
    /// # Errors
    /// As for [`join`](Communicator::join); [`Error::Config`] for an interface that isn't there.
    #[cfg(feature = "tcp")]
    pub fn join_tcp(
        rank: usize,
        world: usize,
        store: &dyn Store,
        towards: Option<std::net::SocketAddr>,
        secret: &tcp::Secret,
        options: &tcp::TcpOptions,
    ) -> Result<Communicator> {
        Communicator::join_tcp_with(rank, world, store, towards, secret, options, &NetworkOptions::default())
    }

    /// As [`join_tcp`](Communicator::join_tcp), with options for how collectives use the network.
    ///
    /// # Errors
    /// As for [`join_tcp`](Communicator::join_tcp).
    #[cfg(feature = "tcp")]
    pub fn join_tcp_with(
        rank: usize,
        world: usize,
        store: &dyn Store,
        towards: Option<std::net::SocketAddr>,
        secret: &tcp::Secret,
        options: &tcp::TcpOptions,
        network: &NetworkOptions,
    ) -> Result<Communicator> {
        let deadline = Deadline::after(options.timeout);
        let group = tcp::join(rank, world, store, towards, secret, options)?;
        Ok(Communicator::over(Communicator::joined(store, group, network, deadline, None)?, None))
    }

    /// As [`join_tcp_with`](Communicator::join_tcp_with), but ranks of one host share memory, with these options: see
    /// [`from_env`](Communicator::from_env) on `auto`.
    ///
    /// # Errors
    /// As for [`join_tcp`](Communicator::join_tcp).
    #[cfg(feature = "tcp")]
    #[expect(clippy::too_many_arguments, reason = "those of join_tcp_with and of join")]
    pub fn join_mixed(
        rank: usize,
        world: usize,
        store: &dyn Store,
        towards: Option<std::net::SocketAddr>,
        secret: &tcp::Secret,
        tcp: &tcp::TcpOptions,
        network: &NetworkOptions,
        shm: &Options,
    ) -> Result<Communicator> {
        let deadline = Deadline::after(tcp.timeout);
        let group = tcp::join(rank, world, store, towards, secret, tcp)?;
        Ok(Communicator::over(
            Communicator::joined(store, group, network, deadline, Some(shm.clone()))?,
            None,
        ))
    }

    /// The group of `world` processes on this host that meet in `store`, as `rank`. Waits for all ranks.
    ///
    /// # Errors
    /// [`Error::Config`] for a rank outside the world; [`Error::Rendezvous`] if the other ranks don't come.
    pub fn join(rank: usize, world: usize, store: &dyn Store, options: &Options) -> Result<Communicator> {
        let group = shm::join(rank, world, store, &tuned(options, rank))?;
        Ok(Communicator::over(Either::Shm(Engine::new(group)), None))
    }

    /// A group whose ranks are threads of this process; rank `i` is element `i`.
    ///
    /// # Errors
    /// [`Error::Config`] for a world of 0 or beyond what one host holds.
    pub fn in_process(world: usize) -> Result<Vec<Communicator>> {
        Communicator::in_process_with(world, &Options::default())
    }

    /// As [`in_process`](Communicator::in_process), with options.
    ///
    /// # Errors
    /// As for [`in_process`](Communicator::in_process), and for options that can't be had.
    pub fn in_process_with(world: usize, options: &Options) -> Result<Vec<Communicator>> {
        Ok(shm::in_process(world, &tuned(options, 0))?
            .into_iter()
            .map(|group| Communicator::over(Either::Shm(Engine::new(group)), None))
            .collect())
    }

    fn over(engine: Either, store: Option<Box<dyn Store + Sync>>) -> Communicator {
        let (rank, world, handle) = match &engine {
            Either::Shm(e) => (e.group.rank(), e.group.world(), Handle::Shm(e.group.handle())),
            #[cfg(feature = "tcp")]
            Either::Tcp(e) => match &e.group {
                Lanes::Tcp(g) => (g.rank(), g.world(), Handle::Tcp(g.handle(), e.local_handle())),
                #[cfg(feature = "mpi")]
                Lanes::Mpi(g) => (g.rank(), g.world(), Handle::Mpi(g.handle())),
            },
        };
        let is_shm = matches!(engine, Either::Shm(_));
        #[cfg(feature = "tcp")]
        let pipelines = world > 1 && matches!(&engine, Either::Tcp(e) if !e.is_mixed() && !e.is_over_mpi());
        let state = Mutex::new(State { engine, algorithm: None, cause: None });
        let inner = Arc::new(Inner {
            state,
            handle,
            #[cfg(feature = "tcp")]
            pipelines,
            _store: store,
        });
        let why = if is_shm { "its ranks share memory" } else { "it was asked for" };
        Communicator { rank, world, inner, why: why.into(), started: Some(background::Started::default()) }
    }

    /// The same, between hosts for this reason.
    #[cfg_attr(not(feature = "tcp"), expect(unused_variables, reason = "there is nothing between hosts"))]
    fn since(self, why: impl Into<Arc<str>>) -> Communicator {
        match &self.inner.handle {
            Handle::Shm(_) => self,
            #[cfg(feature = "tcp")]
            _ => Communicator { why: why.into(), ..self },
        }
    }

    /// What carries this group's data, for a log: `shm`, or `tcp` and the address at which this rank listens, with the
    /// reason for that one, or both, with the ranks that share memory.
    ///
    /// # Errors
    /// [`Error::ConcurrentUse`].
    pub fn transport(&self) -> Result<String> {
        let state = self.state()?;
        Ok(match &state.engine {
            Either::Shm(_) => "shm".to_owned(),
            #[cfg(feature = "tcp")]
            Either::Tcp(engine) => engine.describe(),
        })
    }

    /// Why that carries it, for a log: that it was asked for, that all ranks share memory, or what led to it where
    /// `TENSORWIRE_TRANSPORT` is `auto`.
    pub fn transport_reason(&self) -> &str {
        &self.why
    }

    /// This rank, from 0.
    #[inline]
    pub fn rank(&self) -> usize {
        self.rank
    }

    /// The number of ranks.
    #[inline]
    pub fn world(&self) -> usize {
        self.world
    }

    /// Makes every all-reduce use one algorithm, for measuring, or the automatic choice again. Every rank must
    /// set the same. It changes speed, and results only where the algorithm doesn't
    /// [keep the order](Algorithm::keeps_order) of the ranks. A reduce to one rank that the algorithm isn't for is
    /// chosen automatically.
    ///
    /// # Errors
    /// [`Error::ConcurrentUse`].
    pub fn set_algorithm(&self, algorithm: Option<Algorithm>) -> Result<()> {
        let mut state = self.state()?;
        state.algorithm = algorithm;
        #[cfg(feature = "tcp")]
        if let Either::Tcp(engine) = &mut state.engine {
            engine.force(algorithm);
        }
        Ok(())
    }

    /// The algorithm that an all-reduce of `bytes` of f32 sums takes. What it is chosen by is the same on every rank: what
    /// [`Options`] give rank 0, or the table that `tensorwire topo --probe` made on rank 0's machine, or constants; over a
    /// network, the times that follow from rank 0's links and from where the ranks are.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the one set by [`set_algorithm`](Communicator::set_algorithm) can't carry
    /// that many, or is one for another transport; [`Error::ConcurrentUse`].
    pub fn algorithm(&self, bytes: usize) -> Result<Algorithm> {
        self.algorithm_for(bytes, DType::F32, ReduceOp::Sum)
    }

    /// The algorithm that an all-reduce of `bytes` of a type takes, as [`algorithm`](Communicator::algorithm): over a
    /// network it depends on whether the order of the ranks makes a difference.
    ///
    /// # Errors
    /// As for [`algorithm`](Communicator::algorithm), and if the operation isn't defined for the type.
    pub fn algorithm_for(&self, bytes: usize, dtype: DType, op: ReduceOp) -> Result<Algorithm> {
        let state = self.state()?;
        state.choose(bytes, &Reduction::new(dtype, op)?)
    }

    /// Why an all-reduce of `bytes` of a type takes its algorithm, in a line for a log: over a network, what each is expected
    /// to take, by which links, and where those are from.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_core::{DType, ReduceOp};
    /// let comm = Communicator::in_process(2)?.remove(0);
    /// let why = comm.explain(64 << 20, DType::F32, ReduceOp::Sum)?;
    /// assert!(why.starts_with("two_shot: "), "{why}");
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// As for [`algorithm_for`](Communicator::algorithm_for).
    pub fn explain(&self, bytes: usize, dtype: DType, op: ReduceOp) -> Result<String> {
        let rank = self.rank;
        let state = self.inner.state.try_lock().map_err(|_| Error::ConcurrentUse { rank })?;
        let reduction = Reduction::new(dtype, op)?;
        let algorithm = state.choose(bytes, &reduction)?;
        let why = match &state.engine {
            _ if state.algorithm.is_some() => "it was set".to_owned(),
            Either::Shm(_) => "by its size, and where rank 0's table or constants change over".to_owned(),
            #[cfg(feature = "tcp")]
            Either::Tcp(engine) => engine.explain(bytes, &reduction, algorithm),
        };
        Ok(format!("{algorithm}: {why}"))
    }

    /// The algorithm that an all-reduce of `bytes` in a [`Symmetric`] buffer takes.
    ///
    /// # Errors
    /// As for [`algorithm`](Communicator::algorithm).
    pub fn algorithm_symmetric(&self, bytes: usize) -> Result<Algorithm> {
        let state = self.state()?;
        state.choose_symmetric(bytes)
    }

    /// Runs `body` alone, unless the group has failed; if it fails, no further call will run.
    #[inline]
    fn run<R>(&self, body: impl FnOnce(&mut State) -> Result<R, Failure>) -> Result<R> {
        let mut state = self.state()?;
        if let Some(cause) = &state.cause {
            return Err(Error::Poisoned { rank: self.rank, cause: cause.clone() });
        }
        body(&mut state).map_err(|failure| {
            if failure.ends_group() {
                state.cause = Some(failure.to_string());
            }
            *failure
        })
    }

    /// The group's state, behind the calls that were started.
    #[inline]
    fn state(&self) -> Result<MutexGuard<'_, State>> {
        if let Some(started) = &self.started {
            started.finish();
        }
        match self.inner.state.try_lock() {
            Ok(state) => Ok(state),
            Err(TryLockError::WouldBlock) => Err(Error::ConcurrentUse { rank: self.rank }),
            Err(TryLockError::Poisoned(p)) => Ok(p.into_inner()),
        }
    }

    /// Has the thread look around that waits with several calls under way.
    fn interrupt(&self) {
        #[cfg(feature = "tcp")]
        if let Handle::Tcp(handle, _) = &self.inner.handle {
            handle.interrupt();
        }
    }

    /// Sets whether calls over a network spin for a while when they wait, also the one that is running. In shared memory
    /// they always do: there waits are short, and a peer that has to be woken takes longer than most of them.
    #[cfg_attr(not(feature = "tcp"), expect(unused_variables, reason = "there is no network"))]
    fn spin(&self, spin: bool) {
        #[cfg(feature = "tcp")]
        if let Handle::Tcp(handle, _) = &self.inner.handle {
            handle.spin(spin);
        }
        #[cfg(feature = "mpi")]
        if let Handle::Mpi(handle) = &self.inner.handle {
            handle.spin(spin);
        }
    }
}

impl State {
    #[inline]
    #[cfg_attr(
        not(feature = "tcp"),
        expect(unused_variables, reason = "only a network's choice depends on it")
    )]
    fn choose(&self, bytes: usize, r: &Reduction) -> Result<Algorithm> {
        match self.algorithm {
            None => Ok(match &self.engine {
                Either::Shm(engine) => engine.selection.all_reduce(bytes),
                #[cfg(feature = "tcp")]
                Either::Tcp(engine) => engine.choose(bytes, r),
            }),
            Some(Algorithm::Symmetric) => {
                Err(Error::invalid("symmetric is an algorithm for symmetric buffers, not for other memory"))
            }
            #[cfg(feature = "mpi")]
            Some(Algorithm::Mpi) => {
                let forced = self.forced(Algorithm::Mpi, bytes)?;
                Ok(match &self.engine {
                    Either::Tcp(engine) if !engine.offloads(r) => engine.choose(bytes, r),
                    _ => forced,
                })
            }
            Some(forced) => self.forced(forced, bytes),
        }
    }

    /// The algorithm of a call for which `prepared` was chosen before.
    #[inline]
    #[cfg_attr(
        not(feature = "tcp"),
        expect(unused_variables, reason = "only a network's choice depends on it")
    )]
    fn prepared(&self, prepared: Algorithm, bytes: usize, r: &Reduction) -> Result<Algorithm> {
        match &self.engine {
            Either::Shm(_) => Ok(prepared),
            // Others may make the same call without having prepared it.
            #[cfg(feature = "tcp")]
            Either::Tcp(_) => self.choose(bytes, r),
        }
    }

    /// The algorithm of a reduction to one rank.
    fn choose_rooted(&self, bytes: usize, r: &Reduction) -> Result<Algorithm> {
        match &self.engine {
            Either::Shm(_) => self.choose(bytes, r),
            #[cfg(feature = "tcp")]
            Either::Tcp(engine) => Ok(match self.algorithm {
                Some(forced) if forced.is_shm() => forced,
                _ => engine.choose_rooted(bytes),
            }),
        }
    }

    #[inline]
    fn choose_symmetric(&self, bytes: usize) -> Result<Algorithm> {
        match (self.algorithm, &self.engine) {
            (Some(forced), _) => self.forced(forced, bytes),
            (None, Either::Shm(engine)) => Ok(engine.selection.symmetric(bytes)),
            #[cfg(feature = "tcp")]
            (None, Either::Tcp(_)) => Err(Error::invalid("a group over TCP has no symmetric buffers")),
        }
    }

    fn forced(&self, forced: Algorithm, bytes: usize) -> Result<Algorithm> {
        let over = match &self.engine {
            Either::Shm(_) => Carrier::Memory,
            #[cfg(feature = "tcp")]
            Either::Tcp(engine) if engine.is_over_mpi() => Carrier::Mpi,
            #[cfg(feature = "tcp")]
            Either::Tcp(_) => Carrier::Network,
        };
        check(forced, over, bytes)
    }
}

/// What carries a group's data, as far as algorithms differ.
#[derive(Clone, Copy, Debug, PartialEq)]
#[cfg_attr(not(feature = "tcp"), expect(dead_code, reason = "there is no network"))]
enum Carrier {
    Memory,
    Network,
    Mpi,
}

/// Refuses an algorithm that was set and can't carry so many bytes, or is another transport's.
fn check(forced: Algorithm, over: Carrier, bytes: usize) -> Result<Algorithm> {
    if forced == Algorithm::Mpi && over != Carrier::Mpi {
        return Err(Error::invalid("mpi is an algorithm for groups over MPI (TENSORWIRE_TRANSPORT=mpi)"));
    }
    if over == Carrier::Memory && !forced.is_shm() {
        return Err(Error::invalid(format!("{forced} is an algorithm for networks, not for shared memory")));
    }
    if over != Carrier::Memory && forced == Algorithm::Symmetric {
        return Err(Error::invalid("symmetric is an algorithm for symmetric buffers, not for other memory"));
    }
    let limit = forced.limit();
    if bytes > limit {
        return Err(Error::invalid(format!("{forced} carries at most {limit} bytes, not {bytes}")));
    }
    Ok(forced)
}
