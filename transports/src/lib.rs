//! Bytes between ranks: how ranks find each other ([`store`], [`launch`]), how they know that a peer is
//! alive ([`liveness`]), and the shared memory they exchange data through ([`shm`]).

pub mod launch;
pub mod liveness;
mod local_socket;
pub mod shm;
pub mod store;
