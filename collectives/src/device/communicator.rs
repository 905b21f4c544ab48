//! Groups of devices: how they are formed, what is under way, and how they end.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::time::{Duration, Instant};

use tensorwire_core::{Call, Deadline, Element, Error, Op, Result};
use tensorwire_transports::shm::{CallRecord, FlightRecord, RankRecord, RankState};

use super::choose::{DeviceOptions, Engine, agree};
use super::staged::Staged;
use super::watch::{self, Beat, Watch};
use super::{Device, DeviceBuffer, Mark, Pause, Stream};
use crate::Communicator;
use crate::nccl::Version;
use crate::nccl::comm::{self, Comm, Fault, ID_BYTES, Primitive};

/// Calls that may be under way; launching more waits for the first of them.
const UNDER_WAY: usize = 1024;

/// How long a call may still be done by itself when a rank has died.
const GRACE: Duration = Duration::from_millis(250);

/// Calls of this rank that are kept for the flight record.
const KEPT: usize = 32;

/// One rank's membership in a group of devices, and the collectives between them.
///
/// It is formed from a [`Communicator`] ([`on_device`](Communicator::on_device)), over whatever that runs: NCCL carries
/// the data where each rank has the library and a GPU of its own, and the host where not
/// ([`engine`](DeviceCommunicator::engine) says which and why).
///
/// **Calls** return once they are on their buffers' stream; the device does them in its order. [`wait`](Self::wait) waits
/// until those of this communicator are done. As over a [`Communicator`], every rank makes the same calls in the same
/// order.
///
/// **Errors.** NCCL tells a rank neither that another has died nor that it makes another call. The ranks' processors do,
/// 20 times a second: a rank that dies, leaves or makes another call is named on every other one. Whatever goes wrong on
/// one rank, or isn't done by the deadline of a `wait`, ends the group: NCCL's communicator is aborted on every rank, so
/// that no kernel and no stream is left hanging, and each call is [`Poisoned`](Error::Poisoned) from then on.
/// [`Communicator::shrink`] of the communicator that it was formed from, and `on_device` again, go on with the survivors.
///
/// **Bits.** NCCL reduces in an order of its own, and rounds f16, bf16 and fp8 between steps: results are close to, but
/// not those of [`Communicator`], and differ by algorithm. All ranks get the same.
///
/// ```
/// use tensorwire_collectives::Communicator;
/// use tensorwire_collectives::device::Device;
/// use tensorwire_core::ReduceOp;
///
/// std::thread::scope(|s| {
///     for comm in Communicator::in_process(2)? {
///         s.spawn(move || {
///             // `Device::cuda(local_rank)?` where there are GPUs.
///             let stream = Device::host().stream().unwrap();
///             let group = comm.on_device(&stream.device()).unwrap();
///             let mut x = stream.upload(&[comm.rank() as f32, 1.0]).unwrap();
///             group.all_reduce(&mut x, ReduceOp::Sum).unwrap();
///             group.synchronize().unwrap();
///             assert_eq!(x.to_vec().unwrap(), [1.0, 2.0]);
///         });
///     }
///     Ok::<(), tensorwire_core::Error>(())
/// })?;
/// # Ok::<(), tensorwire_core::Error>(())
/// ```
#[derive(Debug)]
pub struct DeviceCommunicator {
    pub(super) shared: Arc<Shared>,
    watch: Watch,
    /// For barriers over NCCL, which all-reduce it.
    scratch: Mutex<DeviceBuffer<u8>>,
}

/// What the group's threads share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) rank: usize,
    pub(super) world: usize,
    pub(super) device: Device,
    engine: Engine,
    backend: OnceLock<Backend>,
    options: DeviceOptions,
    /// The same ranks on the host, for agreements and calls by its way.
    pub(super) control: Arc<Communicator>,
    /// The same again, for the thread that watches.
    pub(super) watched: Communicator,
    /// Held while a call is launched: one at a time.
    launching: Mutex<()>,
    state: Mutex<State>,
}

#[derive(Debug)]
enum Backend {
    Nccl(Arc<Comm>),
    Staged(Staged),
}

#[derive(Debug, Default)]
struct State {
    /// Collectives launched.
    seq: u64,
    under_way: VecDeque<Launched>,
    kept: VecDeque<Kept>,
    /// The error that ended the group, and whether a caller has had it.
    failed: Option<Error>,
    told: bool,
    /// What the thread that watches has seen, and when.
    lost: Option<(Instant, Error)>,
    /// A rank that has left in order.
    left: Option<usize>,
    /// Each rank's last beat.
    beats: Vec<Beat>,
}

#[derive(Debug)]
struct Launched {
    seq: u64,
    call: Call,
    done: Mark,
}

/// A call for the flight record.
#[derive(Clone, Debug)]
struct Kept {
    seq: u64,
    call: Call,
    began: Instant,
    took: Option<Duration>,
}

/// A call as it is told to the other ranks, by which mistakes are found.
fn is_message(call: &Call) -> bool {
    matches!(call.op, Op::Send | Op::Recv)
}

impl Communicator {
    /// A group of the same ranks' devices. Every rank calls it, with its own device.
    ///
    /// # Errors
    /// [`Error::Unavailable`], on every rank, if NCCL was asked for and can't be used; [`Error::Rendezvous`] if it
    /// doesn't come up in time; else see [`Communicator`].
    pub fn on_device(&self, device: &Device) -> Result<DeviceCommunicator> {
        self.on_device_with(device, &DeviceOptions::default())
    }

    /// As [`on_device`](Communicator::on_device), with options.
    ///
    /// # Errors
    /// As for [`on_device`](Communicator::on_device).
    pub fn on_device_with(&self, device: &Device, options: &DeviceOptions) -> Result<DeviceCommunicator> {
        let control = self.same()?;
        let (engine, library) = agree(&control, device, options)?;
        let library = library.filter(|_| matches!(engine, Engine::Nccl { .. }));
        DeviceCommunicator::form(control, device, engine, options, |shared, look_on| {
            let Some(library) = library else { return Ok(None) };
            let (control, rank) = (&shared.control, shared.rank);
            // The id travels with whether there is one.
            let mut id = [0u8; 1 + ID_BYTES];
            let mut made = Ok(());
            if rank == 0 {
                match comm::unique_id(&library, device) {
                    Ok(new) => id[1..].copy_from_slice(&new),
                    Err(fault) => (id[0], made) = (1, Err(fault)),
                }
            }
            control.broadcast(&mut id, 0)?;
            made?;
            if id[0] != 0 {
                return Err(Fault::Nccl("rank 0 could not make an id for the group".to_owned()));
            }
            let id = *id[1..].first_chunk().expect("an id behind the first byte");
            Comm::join(&library, device, id, rank, shared.world, look_on).map(Some)
        })
    }

    /// A communicator of the same ranks.
    fn same(&self) -> Result<Communicator> {
        let same = self.split(Some(0), 0)?;
        same.ok_or_else(|| Error::invalid("a split without a group"))
    }
}

impl DeviceCommunicator {
    /// The group of `control`'s ranks; `connect` makes NCCL's communicator, if that carries the data.
    fn form(
        control: Communicator,
        device: &Device,
        engine: Engine,
        options: &DeviceOptions,
        connect: impl FnOnce(&Shared, comm::LookOn<'_>) -> Result<Option<Comm>, Fault>,
    ) -> Result<DeviceCommunicator> {
        let watched = control.same()?;
        let (rank, world) = (control.rank(), control.world());
        let shared = Arc::new(Shared {
            rank,
            world,
            device: device.clone(),
            engine,
            backend: OnceLock::new(),
            options: options.clone(),
            control: Arc::new(control),
            watched,
            launching: Mutex::default(),
            state: Mutex::default(),
        });
        let watch = Watch::start(&shared)?;
        let deadline = Deadline::after(options.timeout);
        let late = || {
            let what = format!(
                "NCCL's communicator wasn't formed within {:?}: are all ranks' processes alive, and can they \
                 reach each other over NCCL_SOCKET_IFNAME? NCCL_DEBUG=INFO says how far it came",
                deadline.budget()
            );
            Error::Rendezvous { rank, world, what }
        };
        let call = Call::bare(Op::Split);
        let look_on = || match (shared.lost(call, 0), deadline.passed()) {
            (Some(error), _) => Err(error),
            (None, true) => Err(late()),
            (None, false) => Ok(()),
        };
        let formed = connect(&shared, &look_on).and_then(|nccl| {
            let backend = match nccl {
                Some(nccl) => Backend::Nccl(Arc::new(nccl)),
                None => Backend::Staged(Staged::new(device, shared.control.clone())?),
            };
            let scratch = device.stream()?.zeros(1)?;
            Ok((backend, scratch))
        });
        match formed {
            Ok((backend, scratch)) => {
                let _ = shared.backend.set(backend);
                Ok(DeviceCommunicator { shared, watch, scratch: Mutex::new(scratch) })
            }
            Err(fault) => {
                let error = shared.fail(shared.error(fault, call, 0));
                watch.end();
                Err(error)
            }
        }
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.shared.rank
    }

    /// The number of ranks.
    pub fn world(&self) -> usize {
        self.shared.world
    }

    /// This rank's device.
    pub fn device(&self) -> &Device {
        &self.shared.device
    }

    /// What carries the data, and why; the same on every rank.
    pub fn engine(&self) -> &Engine {
        &self.shared.engine
    }

    /// Forms groups of the ranks that give the same `color`, ordered by `key`, then by rank; a rank that gives no color
    /// gets no group. Every rank calls it; it waits for what is under way, for it runs on the host.
    ///
    /// # Errors
    /// As for [`Communicator::on_device`] and [`wait`](Self::wait).
    pub fn split(&self, color: Option<u32>, key: i32) -> Result<Option<DeviceCommunicator>> {
        self.synchronize()?;
        let shared = &self.shared;
        let _alone = shared.alone()?;
        let part = shared.control.split(color, key)?;
        let deadline = Deadline::after(shared.options.timeout);
        let call = Call::bare(Op::Split);
        let look_on = || match (shared.lost(call, 0), deadline.passed()) {
            (Some(error), _) => Err(error),
            (None, true) => {
                let what = format!("NCCL's communicator wasn't split within {:?}", deadline.budget());
                Err(Error::Rendezvous { rank: shared.rank, world: shared.world, what })
            }
            (None, false) => Ok(()),
        };
        let nccl = match shared.backend() {
            Backend::Staged(_) => None,
            Backend::Nccl(comm) => {
                let color = color.map(|color| (color & 0x7fff_ffff) as i32);
                // NCCL orders ranks with one key by their rank, as is done here.
                comm.split(color, key, &look_on).map_err(|fault| shared.fail(shared.error(fault, call, 0)))?
            }
        };
        let Some(part) = part else { return Ok(None) };
        let engine = shared.engine.clone();
        DeviceCommunicator::form(part, &shared.device, engine, &shared.options, |_, _| Ok(nccl)).map(Some)
    }

    /// Memory for `len` elements, zeroed, which NCCL uses without copies where it can (`ncclMemAlloc`, `ncclCommRegister`:
    /// NCCL 2.19 and later); ordinary memory of the device where it can't.
    ///
    /// # Errors
    /// [`Error::Device`] if it can't be had; [`Error::Engine`] if NCCL refuses.
    pub fn alloc<T: Element>(&self, stream: &Stream, len: usize) -> Result<DeviceBuffer<T>> {
        match self.shared.registering(stream)? {
            Some(comm) => DeviceBuffer::registered(stream, len, comm).map_err(|fault| self.refused(fault)),
            None => stream.zeros(len),
        }
    }

    /// Has NCCL use a buffer's memory without copies where it can (`ncclCommRegister`), until the buffer is dropped. Whether it
    /// was registered: not where NCCL is older than 2.19, doesn't carry the data, or was told to before.
    ///
    /// # Errors
    /// As for [`alloc`](Self::alloc).
    pub fn register<T: Element>(&self, buffer: &mut DeviceBuffer<T>) -> Result<bool> {
        let stream = buffer.stream().clone();
        match self.shared.registering(&stream)? {
            Some(comm) => buffer.register(comm).map_err(|fault| self.refused(fault)),
            None => Ok(false),
        }
    }

    /// What NCCL refused, which ends nothing.
    fn refused(&self, fault: Fault) -> Error {
        self.shared.error(fault, Call::bare(Op::Symmetric), self.shared.state().seq)
    }

    /// Waits until the device has done all calls of this communicator, or the deadline. Meanwhile it looks for errors of
    /// NCCL's and of other ranks.
    ///
    /// A call that was captured in a graph counts only when the graph is launched: see [`follow`](Self::follow).
    ///
    /// # Errors
    /// [`Error::Timeout`] at the deadline, [`Error::PeerLost`], [`Error::Mismatch`], [`Error::Aborted`] for what becomes
    /// of others, [`Error::Engine`] for NCCL's own errors, [`Error::Device`] for the device's, each with the first call
    /// that isn't done: the group has ended then, here and on the other ranks.
    pub fn wait(&self, deadline: Deadline) -> Result<()> {
        self.shared.wait(deadline, 0)
    }

    /// As [`wait`](Self::wait), up to the group's timeout from now.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub fn synchronize(&self) -> Result<()> {
        self.wait(Deadline::after(self.shared.options.timeout))
    }

    /// Has [`wait`](Self::wait) also wait for what the stream was given so far, such as a graph with calls of this communicator
    /// in it. Errors name the last call that was launched or captured.
    ///
    /// # Errors
    /// [`Error::Device`] if the driver refuses.
    pub fn follow(&self, stream: &Stream) -> Result<()> {
        let done = stream.mark()?;
        let mut state = self.shared.state();
        let (seq, call) = state.kept.back().map_or((state.seq, Call::bare(Op::Barrier)), |k| (k.seq, k.call));
        state.under_way.push_back(Launched { seq, call, done });
        Ok(())
    }

    /// Ends the group from any thread: what is under way is aborted, and every rank's calls fail with [`Error::Aborted`] and
    /// `why`.
    pub fn abort(&self, why: &str) {
        let (call, seq) = self.shared.current();
        let (rank, why) = (self.shared.rank, why.to_owned());
        self.shared.end(Error::Aborted { rank, by: rank, call, seq, why }, false);
    }

    /// What this rank has launched and done last, and what the others have by their last beat, at most a twentieth of a second
    /// old. Printed, it says how they differ.
    pub fn flight_record(&self) -> FlightRecord {
        let state = self.shared.state();
        let own = |k: &Kept| CallRecord {
            seq: k.seq,
            call: k.call,
            algorithm: String::new(),
            began: k.began.elapsed(),
            took: k.took,
        };
        let ranks = (0..self.world()).map(|rank| {
            let (pid, calls) = match state.beats.get(rank) {
                _ if rank == self.rank() => (std::process::id(), state.kept.iter().map(own).collect()),
                Some(beat) => (beat.pid, beat.calls()),
                None => (0, Vec::new()),
            };
            let there = match &state.lost {
                Some((_, Error::PeerLost { peer, .. })) if *peer == rank => RankState::Ended,
                _ if state.left == Some(rank) => RankState::Left,
                _ => RankState::Member,
            };
            RankRecord { rank, pid, state: there, waits_for: None, calls }
        });
        FlightRecord { ranks: ranks.collect(), failure: state.failed.as_ref().map(Error::to_string) }
    }

    /// Leaves the group in order, with all other ranks: waits until everything is done everywhere.
    ///
    /// # Errors
    /// As for [`wait`](Self::wait).
    pub fn close(self, deadline: Deadline) -> Result<()> {
        self.wait(deadline)?;
        let (call, seq) = self.shared.current();
        let closed = match self.shared.backend() {
            Backend::Nccl(comm) => comm.finish(deadline),
            Backend::Staged(_) => Ok(()),
        };
        closed.map_err(|fault| self.shared.fail(self.shared.error(fault, call, seq)))
    }

    /// Launches calls together, over NCCL or by way of the host.
    ///
    /// # Safety
    /// What the primitives and `staged` read and write is on the stream's device and valid until it has done the calls.
    pub(super) unsafe fn launch(
        &self,
        calls: &[Call],
        stream: &Stream,
        primitives: &[Primitive],
        staged: impl FnOnce(&Staged) -> Result<()>,
    ) -> Result<()> {
        let shared = &self.shared;
        let Some(last) = calls.last().copied() else { return Ok(()) };
        if !stream.device().is(&shared.device) {
            let (rank, there, here) = (shared.rank, stream.device(), &shared.device);
            let what = format!("rank {rank}: {last}: a buffer on {there}, in a group that is on {here}");
            return Err(Error::invalid(what));
        }
        let _alone = shared.alone()?;
        let captured = stream.is_capturing()?;
        let numbers = calls.iter().map(|call| shared.begin(*call)).collect::<Result<Vec<_>>>()?;
        let (seq, deadline) = (numbers[numbers.len() - 1], Deadline::after(shared.options.timeout));
        let launched = match shared.backend() {
            // Messages without bytes make no operation.
            Backend::Nccl(_) if primitives.is_empty() => Ok(()),
            Backend::Nccl(comm) => {
                let look_on = || match shared.lost(last, seq) {
                    Some(error) => Err(error),
                    None if deadline.passed() => Err(shared.late(last, seq, deadline)),
                    None => Ok(()),
                };
                // SAFETY: as the caller vouches.
                unsafe { comm.launch(primitives, stream.raw(), &look_on) }
            }
            Backend::Staged(host) => staged(host).map_err(Fault::Stopped),
        };
        if let Err(fault) = launched {
            // The thread that watches may have ended the group meanwhile, and knows why.
            shared.usable()?;
            return Err(shared.fail(shared.error(fault, last, seq)));
        }
        if captured {
            return Ok(());
        }
        for (seq, call) in numbers.into_iter().zip(calls) {
            let done = stream.mark()?;
            shared.state().under_way.push_back(Launched { seq, call: *call, done });
        }
        shared.prune()?;
        if shared.state().under_way.len() > UNDER_WAY { shared.wait(deadline, UNDER_WAY) } else { Ok(()) }
    }

    pub(super) fn scratch(&self) -> MutexGuard<'_, DeviceBuffer<u8>> {
        self.scratch.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether NCCL carries the data, of what version.
    pub(super) fn nccl(&self) -> Option<Version> {
        match self.shared.engine {
            Engine::Nccl { version, .. } => Some(version),
            Engine::Staged { .. } => None,
        }
    }
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn backend(&self) -> &Backend {
        self.backend.get().expect("set before anybody has the communicator")
    }

    /// The right to launch, unless another thread does.
    fn alone(&self) -> Result<MutexGuard<'_, ()>> {
        match self.launching.try_lock() {
            Ok(alone) => Ok(alone),
            Err(TryLockError::WouldBlock) => Err(Error::ConcurrentUse { rank: self.rank }),
            Err(TryLockError::Poisoned(p)) => Ok(p.into_inner()),
        }
    }

    /// Counts a call, unless the group has ended; its number.
    fn begin(&self, call: Call) -> Result<u64> {
        self.usable()?;
        let seq = {
            let mut state = self.state();
            state.seq += u64::from(!is_message(&call));
            let seq = state.seq;
            if state.kept.len() == KEPT {
                state.kept.pop_front();
            }
            state.kept.push_back(Kept { seq, call, began: Instant::now(), took: None });
            seq
        };
        match self.lost(call, seq) {
            Some(error) => Err(self.fail(error)),
            None => Ok(seq),
        }
    }

    /// Fails if the group has ended: with why the first time, unless a caller has had it.
    fn usable(&self) -> Result<()> {
        let mut state = self.state();
        let told = std::mem::replace(&mut state.told, true);
        match &state.failed {
            Some(cause) if told => Err(Error::Poisoned { rank: self.rank, cause: cause.to_string() }),
            Some(cause) => Err(watch::copied(cause)),
            None => {
                state.told = false;
                Ok(())
            }
        }
    }

    fn has_failed(&self) -> bool {
        self.state().failed.is_some()
    }

    /// NCCL's communicator, where it registers memory of the stream's device.
    fn registering(&self, stream: &Stream) -> Result<Option<&Arc<Comm>>> {
        self.usable()?;
        if !stream.device().is(&self.device) {
            return Err(Error::invalid("memory of another device than the group's"));
        }
        Ok(match self.backend() {
            Backend::Nccl(comm) if comm.registers() => Some(comm),
            _ => None,
        })
    }

    /// The first call that isn't done, else the last one, and its number.
    fn current(&self) -> (Call, u64) {
        let state = self.state();
        let first = state.under_way.front().map(|l| (l.call, l.seq));
        let last = state.kept.back().map(|k| (k.call, k.seq));
        first.or(last).unwrap_or((Call::bare(Op::Barrier), 0))
    }

    /// Forgets the calls that the device has done.
    fn prune(&self) -> Result<()> {
        let mut state = self.state();
        while let Some(first) = state.under_way.front() {
            if !first.done.is_reached()? {
                break;
            }
            let Some(Launched { seq, call, .. }) = state.under_way.pop_front() else { break };
            if let Some(kept) =
                state.kept.iter_mut().find(|k| (k.seq, k.call) == (seq, call) && k.took.is_none())
            {
                kept.took = Some(kept.began.elapsed());
            }
        }
        Ok(())
    }

    /// Waits until at most so many calls are under way.
    fn wait(&self, deadline: Deadline, most: usize) -> Result<()> {
        let mut pause = Pause::default();
        loop {
            self.usable()?;
            if let Err(error) = self.prune() {
                return Err(self.fail(error));
            }
            let (call, seq) = self.current();
            let fault = match self.backend() {
                Backend::Nccl(comm) => comm.async_error().map(Fault::Nccl),
                Backend::Staged(host) => {
                    host.failure().map(|e| Fault::Stopped(watch::renamed(e, self.rank, call, seq)))
                }
            };
            if let Some(fault) = fault {
                return Err(self.fail_by(fault, call, seq));
            }
            if self.state().under_way.len() <= most {
                // A group that another thread has ended meanwhile has nothing under way.
                return self.usable();
            }
            if let Some(error) = self.lost(call, seq) {
                return Err(self.fail(error));
            }
            if deadline.passed() {
                return Err(self.fail(self.late(call, seq, deadline)));
            }
            pause.rest();
        }
    }

    /// Ends the group because of what NCCL says. Where that comes of a rank's death the ranks' processors know more, soon.
    fn fail_by(&self, fault: Fault, call: Call, seq: u64) -> Error {
        let soon = Deadline::after(GRACE);
        while self.world > 1 && !soon.passed() {
            if let Err(error) = self.usable() {
                return error;
            }
            if matches!(self.state().lost, Some((_, Error::PeerLost { .. } | Error::Aborted { .. })))
                && let Some(error) = self.lost_now(call, seq)
            {
                return self.fail(error);
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.fail(self.error(fault, call, seq))
    }

    /// What has become of the group on other ranks, if it can't go on, as an error of this call.
    fn lost(&self, call: Call, seq: u64) -> Option<Error> {
        let state = self.state();
        if let Some(peer) = state.left
            && state.beats.get(peer).is_some_and(|beat| beat.launched < seq)
        {
            let how = "it has left the group, and did not launch this call".to_owned();
            return Some(Error::PeerLost { rank: self.rank, peer, call, seq, how });
        }
        let (when, error) = state.lost.as_ref()?;
        let certain = matches!(error, Error::Mismatch { .. } | Error::Aborted { .. });
        (certain || when.elapsed() >= GRACE)
            .then(|| watch::renamed(watch::copied(error), self.rank, call, seq))
    }

    /// The same, certain or not.
    fn lost_now(&self, call: Call, seq: u64) -> Option<Error> {
        let state = self.state();
        state.lost.as_ref().map(|(_, error)| watch::renamed(watch::copied(error), self.rank, call, seq))
    }

    /// A timeout that names the ranks that didn't come, by their last beats.
    fn late(&self, call: Call, seq: u64, deadline: Deadline) -> Error {
        let state = self.state();
        let others = || (0..self.world).filter(|r| *r != self.rank);
        let beat = |rank: usize| state.beats.get(rank);
        let mut waiting_for: Vec<_> =
            others().filter(|r| beat(*r).is_some_and(|b| b.launched < seq)).collect();
        if waiting_for.is_empty() && !is_message(&call) {
            waiting_for = others().filter(|r| beat(*r).is_some_and(|b| b.done < seq)).collect();
        }
        if waiting_for.is_empty() {
            waiting_for = others().collect();
        }
        let progress = (0..self.world).filter_map(|rank| {
            beat(rank)
                .map(|b| format!("rank {rank} has launched call {} and done call {}", b.launched, b.done))
        });
        let instead = progress.collect::<Vec<_>>().join(", ").into();
        Error::Timeout { rank: self.rank, call, seq, waiting_for, after: deadline.budget(), instead }
    }

    fn error(&self, fault: Fault, call: Call, seq: u64) -> Error {
        match fault {
            Fault::Stopped(error) => error,
            Fault::Nccl(what) => {
                Error::Engine { rank: self.rank, engine: self.engine.to_string(), call, seq, what }
            }
        }
    }

    /// Ends the group, here and on the other ranks, unless it has ended; gives the error back, to a caller.
    pub(super) fn fail(&self, error: Error) -> Error {
        self.end(watch::copied(&error), true);
        error
    }

    fn end(&self, error: Error, told: bool) {
        {
            let mut state = self.state();
            state.told |= told;
            if state.failed.is_some() {
                return;
            }
            state.failed = Some(watch::copied(&error));
        }
        let why = match error {
            Error::Aborted { why, .. } => why,
            other => other.to_string(),
        };
        self.watched.abort(&why);
        match self.backend.get() {
            Some(Backend::Nccl(comm)) => comm.abort(),
            Some(Backend::Staged(host)) => host.abort(&why),
            None => {}
        }
    }

    // For the thread that watches.

    /// What this rank tells the others.
    pub(super) fn beat(&self, leaves: bool) -> Beat {
        let _ = self.prune();
        let state = self.state();
        let done = state.under_way.front().map_or(state.seq, |first| first.seq.saturating_sub(1));
        let collectives = |call: &Call| !is_message(call);
        let first = state.under_way.iter().map(|l| (l.seq, l.call));
        let last = state.kept.iter().rev().map(|k| (k.seq, k.call));
        Beat::new(
            std::process::id(),
            state.seq,
            done,
            leaves,
            first.filter(|(_, c)| collectives(c)),
            last.filter(|(_, c)| collectives(c)),
        )
    }

    pub(super) fn heard(&self, beats: Vec<Beat>) {
        let mismatch = watch::mismatch(self.rank, &beats);
        let mut state = self.state();
        state.left =
            beats.iter().position(|beat| beat.leaves).filter(|rank| *rank != self.rank).or(state.left);
        state.beats = beats;
        if let (Some(mismatch), None) = (mismatch, &state.lost) {
            state.lost = Some((Instant::now(), mismatch));
        }
    }

    pub(super) fn has_left(&self) -> bool {
        self.state().left.is_some()
    }

    /// Notes that the others can't be watched any more.
    pub(super) fn lose(&self, error: Error) {
        self.state().lost.get_or_insert((Instant::now(), error));
    }

    /// What nobody waits for is ended too, so that no stream hangs: when the group can't go on and something is under way.
    pub(super) fn end_if_lost(&self) -> bool {
        let (call, seq) = self.current();
        let Some(error) = self.lost(call, seq) else { return false };
        let _ = self.prune();
        if !self.state().under_way.is_empty() {
            self.end(error, false);
        }
        true
    }
}

impl Drop for DeviceCommunicator {
    fn drop(&mut self) {
        self.watch.end();
        let shared = self.shared.clone();
        // NCCL's part, and pinned memory, go when what is under way is done, or aborted at the deadline.
        let release = move || {
            let deadline = Deadline::after(shared.options.timeout);
            let mut pause = Pause::default();
            while !shared.has_failed()
                && shared.prune().is_ok()
                && !shared.state().under_way.is_empty()
                && !deadline.passed()
            {
                pause.rest();
            }
            if let Backend::Nccl(comm) = shared.backend() {
                let _ = comm.finish(deadline);
            }
        };
        let _ = std::thread::Builder::new().name("tw-release".to_owned()).spawn(release);
    }
}
