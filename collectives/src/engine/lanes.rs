//! What carries the frames of a network's engine: a group over TCP, or over MPI.

use tensorwire_core::{Call, DType, Error};
#[cfg(feature = "mpi")]
use tensorwire_transports::mpi::MpiGroup;
use tensorwire_transports::shm::{self, Failure, Incoming, Outgoing};
use tensorwire_transports::tcp::{Memory, Span, TcpGroup};

#[derive(Debug)]
pub(crate) enum Lanes {
    Tcp(TcpGroup),
    #[cfg(feature = "mpi")]
    Mpi(MpiGroup),
}

/// Evaluates an expression for whichever group there is.
macro_rules! each {
    ($lanes:expr, $group:ident => $body:expr) => {
        match $lanes {
            Lanes::Tcp($group) => $body,
            #[cfg(feature = "mpi")]
            Lanes::Mpi($group) => $body,
        }
    };
}

/// The same, of what is TCP's affair alone.
macro_rules! over_tcp {
    ($lanes:expr, $group:ident => $body:expr, else $otherwise:expr) => {
        match $lanes {
            Lanes::Tcp($group) => $body,
            #[cfg(feature = "mpi")]
            Lanes::Mpi(_) => $otherwise,
        }
    };
}

/// Each as [`TcpGroup`] says.
impl Lanes {
    #[inline]
    pub(crate) fn rank(&self) -> usize {
        each!(self, group => group.rank())
    }

    #[inline]
    pub(crate) fn world(&self) -> usize {
        each!(self, group => group.world())
    }

    pub(crate) fn seq(&self) -> u64 {
        each!(self, group => group.seq())
    }

    pub(crate) fn transport(&self) -> &'static str {
        over_tcp!(self, group => group.transport(), else "mpi")
    }

    #[inline]
    pub(crate) fn is_over_mpi(&self) -> bool {
        over_tcp!(self, _group => false, else true)
    }

    pub(crate) fn describe(&self) -> String {
        each!(self, group => group.describe())
    }

    #[inline]
    pub(crate) fn begin(&mut self, call: Call) -> Result<(), Failure> {
        each!(self, group => group.begin(call))
    }

    #[inline]
    pub(crate) fn end(&mut self) {
        each!(self, group => group.end());
    }

    #[inline]
    pub(crate) fn send(&mut self, to: usize, span: Span, memory: &mut Memory<'_>) -> Result<(), Failure> {
        each!(self, group => group.send(to, span, memory))
    }

    #[inline]
    pub(crate) fn receive(&mut self, from: usize, span: Span) {
        each!(self, group => group.receive(from, span));
    }

    #[inline]
    pub(crate) fn asked(&self) -> (usize, usize) {
        each!(self, group => group.asked())
    }

    #[inline]
    pub(crate) fn wait(
        &mut self,
        received: usize,
        sent: usize,
        memory: &mut Memory<'_>,
    ) -> Result<(), Failure> {
        each!(self, group => group.wait(received, sent, memory))
    }

    #[inline]
    pub(crate) fn finish(&mut self, memory: &mut Memory<'_>) -> Result<(), Failure> {
        each!(self, group => group.finish(memory))
    }

    pub(crate) fn send_recv(
        &mut self,
        dtype: DType,
        out: Option<Outgoing<'_>>,
        into: Option<Incoming<'_>>,
    ) -> Result<(), Failure> {
        each!(self, group => group.send_recv(dtype, out, into))
    }

    pub(crate) fn fail(&mut self, error: Error, memory: &Memory<'_>) -> Failure {
        match self {
            Lanes::Tcp(group) => group.fail(error, memory),
            #[cfg(feature = "mpi")]
            Lanes::Mpi(group) => group.fail(error),
        }
    }

    pub(crate) fn split(
        &mut self,
        color: Option<u32>,
        key: i32,
    ) -> Result<Option<(Lanes, Vec<usize>)>, Failure> {
        Ok(match self {
            Lanes::Tcp(group) => group.split(color, key)?.map(|(group, ranks)| (Lanes::Tcp(group), ranks)),
            #[cfg(feature = "mpi")]
            Lanes::Mpi(group) => group.split(color, key)?.map(|(group, ranks)| (Lanes::Mpi(group), ranks)),
        })
    }

    pub(crate) fn shrink(&mut self) -> Result<(Lanes, Vec<usize>), Error> {
        match self {
            Lanes::Tcp(group) => group.shrink().map(|(group, ranks)| (Lanes::Tcp(group), ranks)),
            #[cfg(feature = "mpi")]
            Lanes::Mpi(group) => Err(group.shrink()),
        }
    }
}

/// Over MPI, calls are made one at a time, and no memory is shared beside.
impl Lanes {
    pub(super) fn begin_behind(&mut self, call: Call) -> Result<(usize, usize), Failure> {
        match self {
            Lanes::Tcp(group) => group.begin_behind(call),
            #[cfg(feature = "mpi")]
            Lanes::Mpi(group) => group.begin(call).map(|()| (0, 0)),
        }
    }

    pub(super) fn end_first(&mut self) {
        over_tcp!(self, group => group.end_first(), else self.end());
    }

    pub(super) fn wait_unless_interrupted(
        &mut self,
        received: usize,
        sent: usize,
        memory: &mut Memory<'_>,
    ) -> Result<bool, Failure> {
        match self {
            Lanes::Tcp(group) => group.wait_unless_interrupted(received, sent, memory),
            #[cfg(feature = "mpi")]
            Lanes::Mpi(group) => group.wait(received, sent, memory).map(|()| true),
        }
    }

    pub(super) fn end_with(&mut self, error: &Error, memory: &Memory<'_>) {
        over_tcp!(self, group => group.end_with(error, memory), else ());
    }

    pub(super) fn tie(&self, memory: Option<shm::Handle>, elsewhere: Vec<usize>) {
        over_tcp!(self, group => group.tie(memory, elsewhere), else ());
    }

    pub(super) fn waits_elsewhere(&self, waits: Option<std::time::Duration>) {
        over_tcp!(self, group => group.waits_elsewhere(waits), else ());
    }
}
