//! Bytes between ranks: how ranks find each other ([`store`], [`launch`]), how they know that a peer is
//! alive ([`liveness`]), and what they exchange data through: shared memory ([`shm`]) or, with the feature `tcp`,
//! TCP (`tcp`), or, with the feature `mpi`, MPI (`mpi`).

mod color;
#[doc(hidden)]
pub mod fuzz;
pub mod launch;
pub mod liveness;
mod local_socket;
#[cfg(feature = "mpi")]
pub mod mpi;
mod processors;
pub mod shm;
pub mod store;
#[cfg(feature = "tcp")]
pub mod tcp;
