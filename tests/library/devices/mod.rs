//! Collectives between devices: over NCCL's interface, which `tests/nccl/fake_nccl.c` has over host memory, and by way of the
//! host. What needs a GPU is in `gpu`.
//!
//! The test library is no NCCL: what is tested with it is how NCCL is found, called, composed and given up, not NCCL.

mod conformance;
#[path = "../../support/fake_nccl.rs"]
mod fake_nccl;
mod faults;
mod gpu;
mod loading;

use std::time::Duration;

use tensorwire::collectives::device::{
    Device, DeviceCommunicator, DeviceOptions, Engine, EngineChoice, Stream,
};
use tensorwire::collectives::nccl::Library;
use tensorwire::{Communicator, Options};

use crate::common::{Over, threads};

use fake_nccl::test_library;
pub(crate) use faults::device;

/// What carries the data of a test's devices.
#[derive(Clone, Copy, Debug, PartialEq)]
enum By {
    /// The test library, by NCCL's interface.
    Nccl,
    /// The host.
    Host,
}

impl By {
    fn options(self, timeout: Duration) -> DeviceOptions {
        match self {
            By::Nccl => {
                let library = Some(Library::load(&test_library(&[])).unwrap());
                DeviceOptions { engine: EngineChoice::Nccl, library, timeout }
            }
            By::Host => DeviceOptions { engine: EngineChoice::Staged, library: None, timeout },
        }
    }

    /// Runs `body` once a rank, each in a thread with a device of its own.
    fn threads(self, world: usize, body: impl Fn(&Stream, DeviceCommunicator) + Sync) {
        let options = self.options(Duration::from_secs(60));
        threads(world, &Options::default(), |comm| self.on_device(&comm, &options, &body));
    }

    /// As [`threads`](By::threads), where the communicators are over this.
    fn threads_over(self, over: Over, world: usize, body: impl Fn(&Stream, DeviceCommunicator) + Sync) {
        let options = self.options(Duration::from_secs(60));
        over.threads(world, &Options::default(), |comm| self.on_device(&comm, &options, &body));
    }

    fn on_device(
        self,
        comm: &Communicator,
        options: &DeviceOptions,
        body: impl Fn(&Stream, DeviceCommunicator),
    ) {
        let stream = Device::host().stream().unwrap();
        let group = comm.on_device_with(&stream.device(), options).unwrap();
        assert_eq!(matches!(group.engine(), Engine::Nccl { is_test: true, .. }), self == By::Nccl);
        body(&stream, group);
    }
}
