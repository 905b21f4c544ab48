//! What stands for TLS where it isn't compiled in: no value of these types can be made.

use std::convert::Infallible;
use std::io::{self, IoSlice};
use std::net::TcpStream;

use super::stream::Identity;

#[derive(Clone, Debug)]
pub(super) struct Tls(Infallible);

impl Tls {
    pub(super) fn check(&self, _: Identity) -> tensorwire_core::Result<()> {
        match self.0 {}
    }
}

#[derive(Debug)]
pub(crate) struct Session(Infallible);

impl Session {
    pub(super) fn client(tls: &Tls, _: Identity) -> io::Result<Session> {
        match tls.0 {}
    }

    pub(super) fn server(tls: &Tls) -> io::Result<Session> {
        match tls.0 {}
    }

    pub(super) fn handshake(&mut self, _: &TcpStream) -> io::Result<bool> {
        match self.0 {}
    }

    pub(super) fn wants_write(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn binding(&self) -> io::Result<[u8; 32]> {
        match self.0 {}
    }

    pub(super) fn is_from(&self, _: Identity) -> bool {
        match self.0 {}
    }

    pub(super) fn send(&mut self, _: &TcpStream, _: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        match self.0 {}
    }

    pub(super) fn receive(&mut self, _: &TcpStream, _: &mut [u8]) -> io::Result<Option<usize>> {
        match self.0 {}
    }

    pub(super) fn has_more(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn is_midway(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn close(&mut self, _: &TcpStream) {
        match self.0 {}
    }
}

/// What TLS says is wrong, if it is TLS that says so.
pub(super) fn complaint(_: &io::Error) -> Option<String> {
    None
}
