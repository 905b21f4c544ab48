//! How fast memory is read, and somebody who keeps it busy.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Barrier};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tensorwire::topology::table::Reading;
use tensorwire::topology::table::fit::median;

use super::distance::{allowed, pin};

/// Sizes from those that the second-level cache holds to one that no cache does.
const SIZES: [usize; 6] = [256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20, 256 << 20];

/// Bytes that a processor reads of each size, at least, and how often.
const READ: usize = 256 << 20;
const ROUNDS: usize = 3;

/// The most processors that read at once: each takes 256 MiB.
const MOST: usize = 64;

/// Bytes that a neighbour goes through.
const BUSY: usize = 64 << 20;

/// How fast one processor reads each size, and all of them at once the largest.
pub(crate) fn readings() -> Vec<Reading> {
    let processors = allowed();
    let mut found: Vec<Reading> =
        SIZES.iter().map(|bytes| read(&processors[..1.min(processors.len())], *bytes)).collect();
    if processors.len() > 1 {
        found.push(read(&processors[..processors.len().min(MOST)], SIZES[SIZES.len() - 1]));
    }
    found
}

/// How fast each of these processors reads bytes of its own while the others do.
fn read(processors: &[usize], bytes: usize) -> Reading {
    let meeting = Barrier::new(processors.len());
    let one = |cpu: usize| {
        pin(cpu);
        let words = vec![1u64; bytes / size_of::<u64>()];
        let times = READ.div_ceil(bytes);
        let round = |_| {
            meeting.wait();
            let start = Instant::now();
            for _ in 0..times {
                black_box(sum(&words));
            }
            start.elapsed().as_secs_f64()
        };
        // The first is to warm up.
        let mut seconds: Vec<f64> = (0..=ROUNDS).map(round).skip(1).collect();
        median(&mut seconds).map(|s| (times * bytes) as f64 / s / 1e9)
    };
    let speeds: Vec<f64> = thread::scope(|scope| {
        let started: Vec<_> = processors.iter().map(|cpu| scope.spawn(move || one(*cpu))).collect();
        started.into_iter().filter_map(|thread| thread.join().ok().flatten()).collect()
    });
    let mean = speeds.iter().sum::<f64>() / speeds.len().max(1) as f64;
    let gbps = (mean * 100.0).round() / 100.0;
    Reading { processors: processors.len().max(1), bytes: bytes as u64, gbps: gbps.max(0.01) }
}

fn sum(words: &[u64]) -> u64 {
    let mut sums = [0u64; 8];
    for eight in black_box(words).chunks_exact(8) {
        sums.iter_mut().zip(eight).for_each(|(sum, word)| *sum = sum.wrapping_add(*word));
    }
    sums.iter().fold(0, |all, sum| all.wrapping_add(*sum))
}

/// A thread that copies memory until it is dropped.
pub(crate) struct Neighbour {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Neighbour {
    pub(crate) fn start() -> Neighbour {
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut words = vec![1u64; BUSY / size_of::<u64>()];
            let half = words.len() / 2;
            // Nothing is handed over with it: when it is seen hardly matters.
            while !stopped.load(Ordering::Relaxed) {
                words.copy_within(..half, half);
                black_box(&mut words);
            }
        });
        Neighbour { stop, thread: Some(thread) }
    }
}

impl Drop for Neighbour {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does nothing that could panic.
            let _ = thread.join();
        }
    }
}
