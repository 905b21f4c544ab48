//! The end of MPI, where this library has begun it: when the process ends.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::raw::{self, Transfer};
use super::world::World;

/// The first world, of all processes that were started together.
static HOME: Mutex<Option<Arc<World>>> = Mutex::new(None);

/// What was sent last by groups that are gone, until it is on its way.
static PARTING: Mutex<Vec<Transfer>> = Mutex::new(Vec::new());

/// How often a process that waits for others at its end looks whether they are alive.
const LOOK: Duration = Duration::from_millis(20);

/// Notes the world of all processes.
pub(super) fn is_home(world: &Arc<World>) {
    HOME.lock().unwrap_or_else(PoisonError::into_inner).get_or_insert_with(|| world.clone());
}

/// Keeps messages, of which nobody waits for the end, until they are complete.
pub(super) fn leave_behind(messages: impl IntoIterator<Item = Transfer>) {
    let mut parting = PARTING.lock().unwrap_or_else(PoisonError::into_inner);
    parting.retain_mut(|message| matches!(message.complete(), Ok(None)));
    parting.extend(messages);
}

/// Ends MPI as the process ends, with all others. Where one of them is gone, MPI would wait for it for ever: then it is left
/// as it is, and mpirun ends what is left of the job.
pub(super) extern "C" fn at_exit() {
    if !raw::is_to_be_ended() || raw::enter().is_err() {
        return;
    }
    leave_behind([]);
    // Whoever holds it has ended in the middle, with the process.
    let Ok(home) = HOME.try_lock() else { return };
    let Ok(mut all_are_here) = raw::barrier_of_all() else { return };
    let (mut pause, mut looked) = (super::Pause::new(true), Instant::now());
    loop {
        match all_are_here() {
            Ok(true) => break,
            Ok(false) => {}
            Err(_) => return,
        }
        if looked.elapsed() >= LOOK {
            looked = Instant::now();
            if home.as_ref().is_some_and(|world| (0..world.size()).any(|rank| world.has_ended(rank))) {
                return;
            }
        }
        pause.wait();
    }
    raw::finalize();
}
