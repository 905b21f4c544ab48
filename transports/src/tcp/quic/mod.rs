//! Connections over QUIC (RFC 9000): streams between ranks, encrypted and with a certificate on either side, as over TLS.
//!
//! A rank has one UDP port ([`Port`]) and one connection to a peer that it talks to, over which each group and purpose
//! has a stream of its own ([`Lane`]): what is lost of one keeps no other waiting. Lanes take the place of TCP's sockets;
//! the handshake in `hello` runs over them, bound to the connection, as it does over TLS.
//!
//! The protocol itself is quinn-proto's, which does no I/O: the thread that waits in a call moves the datagrams, and the
//! one that makes connections sees to what is left (`port`).
//!
//! A peer takes at most 896 KiB: 512 KiB that it has sent and this rank hasn't read, and 384 KiB that it hasn't
//! acknowledged. All peers share a socket, for which the kernel is asked to hold 2 MiB, and 256 KiB into which it is read.
//!
//! Strangers cost at most 128 handshakes of some 20 KiB for 3 seconds. Beyond 16, whoever comes must first show that it
//! gets what is sent to it, which costs nothing here.
//!
//! The side that dialled a connection may come from another address in the middle of it, as behind a router that gives it
//! another port: the other side follows once the new address has answered.

mod config;
mod connection;
mod lane;
mod port;

pub(crate) use lane::Lane;
pub(crate) use port::Port;

#[cfg(test)]
mod tests;
