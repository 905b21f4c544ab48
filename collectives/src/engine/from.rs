//! All-reduce of what a function writes.

use tensorwire_core::Error;
use tensorwire_transports::shm::Failure;

use super::{Buffers, Engine, Reduction};
use crate::select::Algorithm;

impl Engine {
    /// Reduces what every rank's `write` writes into every rank's `output`. In a one-shot all-reduce it writes
    /// right into the slot that the peers read; else into `output`. If it fails, the group ends.
    pub(crate) fn all_reduce_from(
        &mut self,
        output: &mut [u8],
        r: &Reduction,
        algorithm: Algorithm,
        write: impl FnOnce(&mut [u8]) -> bool,
    ) -> Result<(), Failure> {
        let len = output.len();
        if algorithm != Algorithm::OneShot {
            self.written(write(output))?;
            return self.all_reduce(Buffers::in_place(output), r, algorithm, None);
        }
        self.group.note(algorithm.label());
        let step = self.group.next_step()?;
        let written = write(&mut self.group.slot()[..len]);
        self.written(written)?;
        self.group.publish();
        self.group.prefetch(len);
        self.group.wait_all(step)?;
        let Engine { group, sources } = self;
        let mut data = Buffers { input: Some(&group.own_slot()[..len]), output };
        data.reduce(r, 0..len, group.rank(), sources, |peer, _| group.peer_slot(peer, step));
        Ok(())
    }

    fn written(&self, done: bool) -> Result<(), Failure> {
        match done {
            true => Ok(()),
            false => {
                Err(self.group.fail(Error::invalid("the function that writes its contribution panicked")))
            }
        }
    }
}
