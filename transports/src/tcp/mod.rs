//! Groups of ranks on any hosts, over TCP.
//!
//! A rank listens at one port, and is connected to a peer when one of the two first sends to the other. Both sides
//! of a connection prove that they know the job's [`Secret`] without sending it (see `hello`); who doesn't, or says
//! something else, or nothing, is dropped and disturbs nobody. What is sent over a connection is neither encrypted
//! nor authenticated.
//!
//! Data moves on the thread that makes the call, straight between its buffers and non-blocking sockets. Each piece
//! has a 64-byte header with the sender's call, so that ranks whose calls differ learn both. A peer that is gone is
//! noticed by the end of its connection, one whose host was cut off by its silence, one that doesn't come by the
//! timeout; whoever notices tells all others.
//!
//! A peer takes at most 1 MiB: 768 KiB that the kernel may hold for its connection ([`TcpOptions::socket_buffer`],
//! twice in each direction), and what is to be reduced.

mod endpoint;
mod form;
mod frame;
mod group;
mod hello;
mod interface;
mod link;
mod memory;
mod mesh;
mod negotiate;
mod options;
mod secret;
mod shared;
mod socket;

pub use form::join;
pub use group::{TcpGroup, TcpHandle};
pub use interface::Interface;
pub use memory::{Memory, Place, Span};
pub use options::TcpOptions;
pub use secret::{SECRET_FILE_VAR, SECRET_VAR, Secret};
