//! Starting ranks, and finding out which one this process is.
//!
//! [`Env`] reads rank, world and rendezvous from the variables that `tensorwire launch`, torchrun, Open MPI,
//! PMI launchers, Slurm and Kubernetes
//! set. [`Launcher`] starts the ranks of a job on this host, or over a remote shell on several, and
//! watches over them.

mod agent;
mod env;
mod guard;
mod hostfile;
mod hosts;
mod lines;
mod nodelist;
mod signals;
mod sink;
mod spawn;
mod supervise;
mod transport;
mod wire;

pub use agent::{agent, is_of_a_host};
pub use env::{Env, Master, Rendezvous};
pub use hostfile::{Host, parse_hostfile};
pub use hosts::RemoteShell;
pub use spawn::{BIND_VAR, Failure, LOST_PEER_STATUS, Launcher, Line, Outcome, Stream};
#[cfg(feature = "tcp")]
pub(crate) use transport::TRANSPORT_VAR;
pub use transport::Transport;
pub(crate) use wire::fuzz_frames;
