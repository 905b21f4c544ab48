//! What stands for QUIC where it isn't compiled in: no value of these types can be made.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::PollFlags;
use tensorwire_core::{Error, Result};

use super::TcpOptions;
use super::options::Congestion;
use super::secret::Secret;
use super::socket::Wake;
use super::stream::Identity;

#[derive(Debug)]
pub(crate) struct Port(Infallible);

impl Port {
    pub(super) fn open(_: IpAddr, _: &Secret, _: Congestion, _: &TcpOptions) -> Result<io::Result<Port>> {
        Err(Error::Config("QUIC is asked for, but this program was built without the feature quic".into()))
    }

    pub(super) fn address(&self) -> SocketAddr {
        match self.0 {}
    }

    pub(super) fn wake(&self) -> &Arc<Wake> {
        match self.0 {}
    }

    pub(super) fn watch(&self, _: &mut u64) -> (PollFlags, Option<Instant>) {
        match self.0 {}
    }

    pub(super) fn turn(&self) {
        match self.0 {}
    }

    pub(super) fn accept(self: &Arc<Port>) -> Option<Lane> {
        match self.0 {}
    }

    pub(super) fn dial(self: &Arc<Port>, _: SocketAddr, _: Identity) -> io::Result<Lane> {
        match self.0 {}
    }

    pub(super) fn close(&self) {
        match self.0 {}
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub(crate) struct Lane(Infallible);

impl Lane {
    pub(super) fn belongs_to(&mut self, _: &Arc<Wake>) {
        match self.0 {}
    }

    pub(super) fn is_readable(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn is_writable(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn connected(&mut self) -> io::Result<bool> {
        match self.0 {}
    }

    pub(super) fn binding(&self) -> io::Result<[u8; 32]> {
        match self.0 {}
    }

    pub(super) fn is_from(&self, _: Identity) -> bool {
        match self.0 {}
    }

    pub(super) fn send(&mut self, _: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        match self.0 {}
    }

    pub(super) fn receive(&mut self, _: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0 {}
    }

    pub(super) fn look(&self) {
        match self.0 {}
    }

    pub(super) fn patience(&self) -> Duration {
        match self.0 {}
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self.0 {}
    }
}
