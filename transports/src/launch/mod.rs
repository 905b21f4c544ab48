//! Starting ranks, and finding out which one this process is.
//!
//! [`Env`] reads rank, world and rendezvous from the variables that `tensorwire launch`, torchrun, Open MPI,
//! PMI launchers and Slurm set. [`Launcher`] starts the ranks of a job on this host and watches over them.

mod env;
mod guard;
mod lines;
mod signals;
mod sink;
mod spawn;
mod supervise;
mod transport;

pub use env::{Env, Rendezvous};
pub use spawn::{Failure, LOST_PEER_STATUS, Launcher, Line, Outcome, Stream};
pub use transport::Transport;
