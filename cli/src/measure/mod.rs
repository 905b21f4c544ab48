//! Measurements of this machine that a prediction is fitted to or compared with.

pub(crate) mod calls;
mod distance;
pub(crate) mod layers;
mod memory;

use tensorwire::topology::table::{Reading, one_distance};
use tensorwire::transports::launch::Transport;

use crate::failure::Failure;
use calls::{Call, Taken, take};
use distance::distance;
use layers::{Steps, Subject};
use memory::{Neighbour, readings};

/// What was measured, and how far apart the processors were.
pub(crate) struct Stint<T> {
    /// In nanoseconds; nothing where there is one processor, or where they were moved.
    pub(crate) distance_ns: Option<u32>,
    /// Whether the distance changed meanwhile: then this is neither of one distance nor of the other.
    pub(crate) moved: bool,
    pub(crate) found: T,
}

/// Measures between two looks at the distance of the processors.
fn stint<T>(measure: impl FnOnce() -> Result<T, Failure>) -> Result<Stint<T>, Failure> {
    let before = distance();
    let found = measure()?;
    let agreed = one_distance(&[before, distance()]);
    Ok(Stint { distance_ns: agreed.flatten(), moved: agreed.is_none(), found })
}

/// What measures: this machine, or a test with samples of its own.
pub(crate) trait Meter {
    /// What carries the bytes.
    fn transport(&self) -> Transport;

    /// Each call once over so many ranks, beside a neighbour that keeps memory busy or not.
    fn calls(&mut self, ranks: usize, contended: bool, calls: &[Call]) -> Result<Stint<Vec<Taken>>, Failure>;

    /// A model's steps.
    fn steps(&mut self, ranks: usize, subject: &Subject) -> Result<Stint<Steps>, Failure>;

    /// How fast memory is read.
    fn reads(&mut self) -> Result<Stint<Vec<Reading>>, Failure>;
}

/// This machine.
pub(crate) struct Here(pub(crate) Transport);

impl Meter for Here {
    fn transport(&self) -> Transport {
        self.0
    }

    fn calls(&mut self, ranks: usize, contended: bool, calls: &[Call]) -> Result<Stint<Vec<Taken>>, Failure> {
        stint(|| {
            let _neighbour = contended.then(Neighbour::start);
            take(self.0, ranks, calls)
        })
    }

    fn steps(&mut self, ranks: usize, subject: &Subject) -> Result<Stint<Steps>, Failure> {
        stint(|| subject.run(self.0, ranks))
    }

    fn reads(&mut self) -> Result<Stint<Vec<Reading>>, Failure> {
        stint(|| Ok(readings()))
    }
}

#[cfg(test)]
pub(crate) mod given {
    use super::layers::Part;
    use super::*;
    use crate::plan::verify::{bytes_read, calls_of_a_token};
    use tensorwire::topology::Planner;

    /// A machine whose times a test says.
    pub(crate) struct Given {
        /// Nanoseconds between its processors during one stint after the other, over and over; nothing while they are moved.
        pub(crate) distances: Vec<Option<u32>>,
        /// How often as long everything takes.
        pub(crate) slower: f64,
        pub(crate) stints: usize,
    }

    impl Given {
        /// A call: 2 us and 10 GB/s, by 50 ns between processors, and four times as much beside a neighbour.
        pub(crate) fn us(&self, distance_ns: Option<u32>, contended: bool, bytes: usize) -> f64 {
            let far = distance_ns.map_or(99.0, |ns| f64::from(ns) / 50.0);
            let busy = if contended { 4.0 } else { 1.0 };
            self.slower * far * busy * (2.0 + bytes as f64 / 10e3)
        }

        fn stint<T>(&mut self, of: impl FnOnce(&Given, Option<u32>) -> T) -> Result<Stint<T>, Failure> {
            let distance_ns = self.distances[self.stints % self.distances.len()];
            self.stints += 1;
            let found = of(self, distance_ns);
            Ok(Stint { distance_ns, moved: distance_ns.is_none(), found })
        }
    }

    impl Meter for Given {
        fn transport(&self) -> Transport {
            Transport::Shm
        }

        fn calls(&mut self, _: usize, contended: bool, calls: &[Call]) -> Result<Stint<Vec<Taken>>, Failure> {
            let taken = |given: &Given, ns, call: &Call| {
                let us = given.us(ns, contended, call.bytes);
                let collective = call.collective.to_string();
                Taken { collective, bytes: call.bytes, p50_us: us, p99_us: 3.0 * us }
            };
            self.stint(|given, ns| calls.iter().map(|call| taken(given, ns, call)).collect())
        }

        /// 30 us a block and 10 GB/s of weights, beside the calls.
        fn steps(&mut self, ranks: usize, subject: &Subject) -> Result<Stint<Steps>, Failure> {
            let model = subject.open()?;
            let plan = Planner::new(model.spec()).plan(ranks).map_err(Failure::run)?;
            let (layers, head) = bytes_read(model.spec(), &plan);
            self.stint(|given, ns| {
                let calls: f64 = calls_of_a_token(&plan).map(|call| given.us(ns, false, call.bytes)).sum();
                let block = |bytes: &u64| given.slower * (30.0 + *bytes as f64 / 10e3);
                let blocks: Vec<f64> = layers.iter().chain([&head]).map(block).collect();
                let part = |us: f64| Part { us, comm_us: 0.0 };
                let parts = [part(0.0)].into_iter().chain(blocks.iter().map(|us| part(*us))).collect();
                Steps { step_us: blocks.iter().sum::<f64>() + calls, parts }
            })
        }

        fn reads(&mut self) -> Result<Stint<Vec<Reading>>, Failure> {
            self.stint(|given, _| vec![Reading { processors: 2, bytes: 1 << 28, gbps: 20.0 / given.slower }])
        }
    }
}
