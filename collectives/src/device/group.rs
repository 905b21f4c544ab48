//! Several calls at once.

use std::fmt;

use tensorwire_core::{Call, Element, Error, ReduceOp, Result};

use super::staged::{Ends, Staged};
use super::{DeviceCommunicator, DeviceSlice, DeviceSliceMut, Stream};
use crate::Communicator;
use crate::nccl::comm::Primitive;

/// A call that is checked and can be launched.
pub(super) struct Planned<'a> {
    pub(super) call: Call,
    pub(super) stream: &'a Stream,
    pub(super) primitives: Vec<Primitive>,
    by_host: ByHost,
}

type HostCall = Box<dyn FnOnce(&Staged, &Stream) -> Result<()>>;

/// How the host makes it.
enum ByHost {
    Collective(HostCall),
    /// A message of bytes with a rank: sent if it has an input.
    Message {
        ends: Ends,
        peer: usize,
    },
}

impl<'a> Planned<'a> {
    /// One that the host makes with all of its input.
    pub(super) fn whole<T: Element>(
        call: Call,
        stream: &'a Stream,
        primitives: Vec<Primitive>,
        ends: Ends,
        make: impl FnOnce(&Communicator, &[T], &mut [T]) -> Result<()> + Send + 'static,
    ) -> Planned<'a> {
        let by_host: HostCall = Box::new(move |host, stream| {
            // SAFETY: as `DeviceCommunicator::launch` says, which alone calls it.
            unsafe { host.whole(stream, ends, make) }
        });
        Planned { call, stream, primitives, by_host: ByHost::Collective(by_host) }
    }

    /// One that the host can make piece by piece.
    pub(super) fn pieces<T: Element>(
        call: Call,
        stream: &'a Stream,
        primitives: Vec<Primitive>,
        ends: Ends,
        make: impl Fn(&Communicator, &mut [T]) -> Result<()> + Clone + Send + 'static,
    ) -> Planned<'a> {
        let by_host: HostCall = Box::new(move |host, stream| {
            // SAFETY: as `DeviceCommunicator::launch` says, which alone calls it.
            unsafe { host.pieces(stream, ends, make) }
        });
        Planned { call, stream, primitives, by_host: ByHost::Collective(by_host) }
    }

    pub(super) fn message(
        call: Call,
        stream: &'a Stream,
        primitives: Vec<Primitive>,
        ends: Ends,
        peer: usize,
    ) -> Planned<'a> {
        Planned { call, stream, primitives, by_host: ByHost::Message { ends, peer } }
    }
}

/// Calls that are launched together, as NCCL's groups are: none waits for another's.
pub struct Group<'g, 'b> {
    comm: &'g DeviceCommunicator,
    calls: Vec<Planned<'b>>,
}

impl fmt::Debug for Group<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.calls.iter().map(|planned| planned.call)).finish()
    }
}

impl DeviceCommunicator {
    /// Launches together what `calls` adds to the group, as one operation of NCCL's: messages to and from several ranks
    /// at once, or many small collectives. Nothing is launched if it fails. Collectives come in the same order on every
    /// rank; messages come behind them.
    ///
    /// ```
    /// # use tensorwire_collectives::Communicator;
    /// # use tensorwire_collectives::device::Device;
    /// # std::thread::scope(|s| {
    /// #     for comm in Communicator::in_process(2)? {
    /// #         s.spawn(move || {
    /// # let stream = Device::host().stream().unwrap();
    /// # let group = comm.on_device(&stream.device()).unwrap();
    /// let other = 1 - group.rank();
    /// let (mine, mut theirs) = (stream.upload(&[group.rank() as u32]).unwrap(), stream.zeros::<u32>(1).unwrap());
    /// group.group(|g| {
    ///     g.send(&mine, other)?;
    ///     g.recv(&mut theirs, other)
    /// }).unwrap();
    /// group.synchronize().unwrap();
    /// assert_eq!(theirs.to_vec().unwrap(), [other as u32]);
    /// #         });
    /// #     }
    /// #     Ok::<(), tensorwire_core::Error>(())
    /// # })?;
    /// # Ok::<(), tensorwire_core::Error>(())
    /// ```
    ///
    /// # Errors
    /// What `calls` returns; [`Error::InvalidArgument`] for buffers of different streams; else see
    /// [`DeviceCommunicator`].
    pub fn group<'b>(&self, calls: impl FnOnce(&mut Group<'_, 'b>) -> Result<()>) -> Result<()> {
        let mut group = Group { comm: self, calls: Vec::new() };
        calls(&mut group)?;
        self.run_all(group.calls)
    }

    pub(super) fn run_all(&self, planned: Vec<Planned<'_>>) -> Result<()> {
        let Some(first) = planned.first() else { return Ok(()) };
        let stream = first.stream;
        if planned.iter().any(|p| !p.stream.is(stream)) {
            let rank = self.rank();
            return Err(Error::invalid(format!(
                "rank {rank}: the buffers of one group are on different streams"
            )));
        }
        let calls: Vec<_> = planned.iter().map(|p| p.call).collect();
        let (mut primitives, mut collectives, mut messages) = (Vec::new(), Vec::new(), Vec::new());
        for p in planned {
            primitives.extend(p.primitives);
            match p.by_host {
                ByHost::Collective(make) => collectives.push(make),
                ByHost::Message { ends, peer } => messages.push((ends, peer)),
            }
        }
        let (rank, world) = (self.rank(), self.world());
        let by_host = move |host: &Staged| {
            collectives.into_iter().try_for_each(|make| make(host, stream))?;
            exchange(host, stream, rank, world, &messages)
        };
        // SAFETY: the primitives and the ends are of slices that were borrowed when they were planned: what frees or uses
        // their memory is put on the same stream behind this, or, for memory that is somebody else's, ordered as
        // `from_raw` demands.
        unsafe { self.launch(&calls, stream, &primitives, by_host) }
    }
}

/// Makes the messages by way of the host, at each moment those that go a certain number of ranks on: all ranks go through
/// the same numbers, and send and receive at once, so that none waits for one that waits for it.
fn exchange(
    host: &Staged,
    stream: &Stream,
    rank: usize,
    world: usize,
    messages: &[(Ends, usize)],
) -> Result<()> {
    for distance in 1..world {
        let (to, from) = ((rank + distance) % world, (rank + world - distance) % world);
        let mut sent = messages.iter().filter(|(ends, peer)| *peer == to && !ends.from.is_null());
        let mut received = messages.iter().filter(|(ends, peer)| *peer == from && ends.from.is_null());
        loop {
            let (out, into) = (sent.next(), received.next());
            let (sends, receives) = (out.is_some(), into.is_some());
            if !sends && !receives {
                break;
            }
            let nothing = Ends { from: std::ptr::null(), inputs: 0, to: std::ptr::null_mut(), outputs: 0 };
            let (out, into) = (out.map_or(nothing, |m| m.0), into.map_or(nothing, |m| m.0));
            let ends = Ends { from: out.from, inputs: out.inputs, to: into.to, outputs: into.outputs };
            let make = move |comm: &Communicator, input: &[u8], output: &mut [u8]| match (sends, receives) {
                (true, true) => comm.send_recv(input, to, output, from),
                (true, false) => comm.send(input, to),
                _ => comm.recv(output, from),
            };
            // SAFETY: as in `run_all`.
            unsafe { host.whole(stream, ends, make)? };
        }
    }
    Ok(())
}

impl<'b> Group<'_, 'b> {
    /// See [`DeviceCommunicator::send`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `to` is no other rank.
    pub fn send<T: Element>(&mut self, buf: impl Into<DeviceSlice<'b, T>>, to: usize) -> Result<()> {
        self.add(self.comm.plan_send(buf.into(), to))
    }

    /// See [`DeviceCommunicator::recv`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `from` is no other rank.
    pub fn recv<T: Element>(&mut self, buf: impl Into<DeviceSliceMut<'b, T>>, from: usize) -> Result<()> {
        self.add(self.comm.plan_recv(buf.into(), from))
    }

    /// See [`DeviceCommunicator::all_reduce`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the operation isn't defined.
    pub fn all_reduce<T: Element>(
        &mut self,
        buf: impl Into<DeviceSliceMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<()> {
        self.add(self.comm.plan_all_reduce(buf.into(), op))
    }

    /// See [`DeviceCommunicator::broadcast`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if `root` is no rank.
    pub fn broadcast<T: Element>(
        &mut self,
        buf: impl Into<DeviceSliceMut<'b, T>>,
        root: usize,
    ) -> Result<()> {
        self.add(self.comm.plan_broadcast(buf.into(), root))
    }

    /// See [`DeviceCommunicator::all_gather`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit.
    pub fn all_gather<T: Element>(
        &mut self,
        input: impl Into<DeviceSlice<'b, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
    ) -> Result<()> {
        self.add(self.comm.plan_all_gather(input.into(), output.into()))
    }

    /// See [`DeviceCommunicator::reduce_scatter`].
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] if the lengths don't fit or the operation isn't defined.
    pub fn reduce_scatter<T: Element>(
        &mut self,
        input: impl Into<DeviceSlice<'b, T>>,
        output: impl Into<DeviceSliceMut<'b, T>>,
        op: ReduceOp,
    ) -> Result<()> {
        self.add(self.comm.plan_reduce_scatter(input.into(), output.into(), op))
    }

    fn add(&mut self, planned: Result<Planned<'b>>) -> Result<()> {
        self.calls.push(planned?);
        Ok(())
    }
}
