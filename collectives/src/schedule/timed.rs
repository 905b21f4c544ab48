//! Runs the schedules of all ranks against a clock: when each message leaves and arrives on links that cost what they are
//! said to, so that a thousand ranks can be looked at without having them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use tensorwire_core::{DType, Error, ReduceOp, Result};

use super::cost::{Costs, REDUCE_US};
use super::hierarchy::Hosts;
use super::steps::{Step, Steps};
use super::{PIECE, all_reduce};
use crate::network::Links;
use crate::select::Algorithm;

/// Pieces that a part of a buffer is cut into at most, so that large buffers don't take more time to look at, and messages
/// between one rank and all others that this may lead to.
const MOST_PIECES: usize = 16;
const MOST_MESSAGES: usize = 2048;

/// The most ranks that are simulated: the memory for direct exchanges grows with their square.
const MOST_RANKS: usize = 4096;

/// What an all-reduce is expected to take.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Prediction {
    /// How it moves its data.
    pub algorithm: Algorithm,
    /// When the last rank is done, in microseconds after all began.
    pub simulated_us: f64,
    /// The formula by which the algorithm is chosen, in microseconds.
    pub formula_us: f64,
    /// Messages that the rank with most of them sends.
    pub messages: usize,
    /// Bytes that the rank with most of them sends.
    pub bytes_sent: u64,
    /// Bytes that the host with most of them sends to others.
    pub host_bytes_sent: u64,
}

/// A network of ranks that needn't exist, on which all-reduces are simulated.
///
/// ```
/// use tensorwire_collectives::network::{Links, Simulation};
/// use tensorwire_collectives::Algorithm;
///
/// // 4 hosts of 8 ranks, 10 Gbit/s between them.
/// let hosts: Vec<usize> = (0..32).map(|rank| rank / 8).collect();
/// let links = Links { intra: "2,10".parse()?, inter: "20,1.25".parse()? };
/// let simulation = Simulation::new(&hosts, links)?;
/// let direct = simulation.all_reduce(Algorithm::TwoShot, 64 << 20);
/// let hierarchical = simulation.all_reduce(Algorithm::Hierarchical, 64 << 20);
/// assert!(hierarchical.simulated_us < direct.simulated_us / 4.0);
/// assert_eq!(simulation.chosen(64 << 20, true), Algorithm::Hierarchical);
/// # Ok::<(), tensorwire_core::Error>(())
/// ```
#[derive(Debug)]
pub struct Simulation {
    hosts: Hosts,
    links: Links,
    costs: Costs,
}

impl Simulation {
    /// The algorithms that it knows.
    pub const ALGORITHMS: [Algorithm; 7] = super::cost::CANDIDATES;

    /// A network where rank `r` is on the host that `hosts[r]` names.
    ///
    /// # Errors
    /// [`Error::InvalidArgument`] for fewer than 2 ranks or more than 4096.
    pub fn new<T: PartialEq>(hosts: &[T], links: Links) -> Result<Simulation> {
        if !(2..=MOST_RANKS).contains(&hosts.len()) {
            return Err(Error::InvalidArgument(format!(
                "{} ranks can't be simulated: from 2 to {MOST_RANKS} can",
                hosts.len()
            )));
        }
        let hosts = Hosts::new(hosts);
        let costs = Costs::new(&hosts, &links);
        Ok(Simulation { hosts, links, costs })
    }

    /// Which algorithm these ranks would take for an all-reduce of `bytes` of f32 sums, in rank order or, if allowed, in
    /// any.
    pub fn chosen(&self, bytes: usize, any_order: bool) -> Algorithm {
        self.costs.choose(bytes, |a| any_order || a.keeps_order(DType::F32, ReduceOp::Sum))
    }

    /// Simulates an all-reduce of `bytes` of f32 elements, by one of [`ALGORITHMS`](Simulation::ALGORITHMS). Buffers that
    /// an engine would cut into many pieces are cut into fewer.
    pub fn all_reduce(&self, algorithm: Algorithm, bytes: usize) -> Prediction {
        let size = DType::F32.size();
        let world = self.hosts.world();
        let most = (MOST_MESSAGES / world).clamp(1, MOST_PIECES);
        let parts = match algorithm {
            Algorithm::Chain => 4 * world,
            Algorithm::Hierarchical => most * self.hosts.slices(),
            Algorithm::OneShot => most,
            _ => most * world,
        };
        let piece = PIECE.max((bytes / parts).next_multiple_of(64));
        let mut steps = Steps::default();
        let mut ranks = Vec::with_capacity(world);
        for rank in 0..world {
            all_reduce(&mut steps, rank, &self.hosts, algorithm, bytes / size, size, piece);
            ranks.push(Events::new(steps.list()));
        }
        let most = |of: fn(&Events) -> u64| ranks.iter().map(of).max().unwrap_or(0);
        let (messages, bytes_sent) = (most(|r| r.sends as u64) as usize, most(|r| r.bytes));
        let mut run = Run::new(self, ranks);
        let simulated_us = run.finish();
        let formula_us = self.costs.us(algorithm, bytes);
        let host_bytes_sent = run.host_bytes.iter().copied().max().unwrap_or(0);
        Prediction { algorithm, simulated_us, formula_us, messages, bytes_sent, host_bytes_sent }
    }
}

/// What a step does to the clock; smaller than the step.
#[derive(Clone, Copy)]
enum Event {
    Send { to: u32, bytes: u64 },
    Receive { from: u32 },
    Wait { received: u32, sent: u32 },
    Work { us: f64 },
}

/// A rank's steps.
struct Events {
    list: Vec<Event>,
    sends: u32,
    bytes: u64,
}

impl Events {
    fn new(steps: &[Step]) -> Events {
        let (mut sends, mut receives, mut all) = (0, 0, 0);
        let event = |step: &Step| match step {
            Step::Send { to, span } => {
                sends += 1;
                all += span.len() as u64;
                Event::Send { to: *to as u32, bytes: span.len() as u64 }
            }
            Step::Receive { from, .. } => {
                receives += 1;
                Event::Receive { from: *from as u32 }
            }
            Step::Wait { received, sent } => Event::Wait { received: *received as u32, sent: *sent as u32 },
            Step::Reduce { into, count, .. } => Event::Work { us: (into.len() * count) as f64 * REDUCE_US },
            Step::Copy { .. } => Event::Work { us: 0.0 },
        };
        let mut list: Vec<Event> = steps.iter().map(event).collect();
        list.push(Event::Wait { received: receives, sent: sends });
        Events { list, sends, bytes: all }
    }
}

/// Where a rank is in its steps.
struct State {
    events: Events,
    at: usize,
    /// Receives that it has begun, and those that are complete.
    begun: Vec<u32>,
    received: usize,
    /// For each send, when it and those before it have left.
    left: Vec<f64>,
    /// The rank whose message it waits for.
    waits_for: Option<u32>,
}

/// Until when a link is busy, each way.
#[derive(Clone, Copy, Default)]
struct Port {
    out: f64,
    into: f64,
}

/// A moment and the rank that acts then; `f64` in an order.
#[derive(PartialEq)]
struct Moment(f64, usize);

impl Eq for Moment {}

impl PartialOrd for Moment {
    fn partial_cmp(&self, other: &Moment) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Moment {
    fn cmp(&self, other: &Moment) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0).then(self.1.cmp(&other.1))
    }
}

struct Run<'a> {
    simulation: &'a Simulation,
    ranks: Vec<State>,
    /// When the messages from a rank to another arrive: at `to * world + from`.
    arrivals: Vec<VecDeque<f64>>,
    ports: Vec<Port>,
    /// A host's port to other hosts.
    wires: Vec<Port>,
    host_bytes: Vec<u64>,
    /// Ranks that can act, the earliest first, so that links are taken in the order of time.
    ready: BinaryHeap<Reverse<Moment>>,
}

impl<'a> Run<'a> {
    fn new(simulation: &'a Simulation, ranks: Vec<Events>) -> Run<'a> {
        let (world, hosts) = (ranks.len(), simulation.hosts.count());
        let state = |events| State {
            events,
            at: 0,
            begun: Vec::new(),
            received: 0,
            left: Vec::new(),
            waits_for: None,
        };
        Run {
            simulation,
            ranks: ranks.into_iter().map(state).collect(),
            arrivals: vec![VecDeque::new(); world * world],
            ports: vec![Port::default(); world],
            wires: vec![Port::default(); hosts],
            host_bytes: vec![0; hosts],
            ready: (0..world).map(|rank| Reverse(Moment(0.0, rank))).collect(),
        }
    }

    fn finish(&mut self) -> f64 {
        let mut end = 0f64;
        while let Some(Reverse(Moment(now, rank))) = self.ready.pop() {
            end = end.max(now);
            self.act(rank, now);
        }
        debug_assert!(self.ranks.iter().all(|r| r.at == r.events.list.len()), "a schedule waits for nobody");
        end
    }

    /// Takes steps until one takes time or can't be taken yet.
    fn act(&mut self, rank: usize, now: f64) {
        while let Some(event) = self.ranks[rank].events.list.get(self.ranks[rank].at).copied() {
            let state = &mut self.ranks[rank];
            let after = match event {
                Event::Receive { from } => {
                    state.begun.push(from);
                    now
                }
                Event::Work { us } => now + us,
                Event::Send { to, bytes } => self.send(rank, to as usize, bytes, now),
                Event::Wait { received, sent } => {
                    match self.wait(rank, received as usize, sent as usize, now) {
                        Some(done) => done,
                        None => return,
                    }
                }
            };
            self.ranks[rank].at += usize::from(!matches!(event, Event::Wait { .. }) || after == now);
            if after > now {
                self.ready.push(Reverse(Moment(after, rank)));
                return;
            }
        }
    }

    /// Sends a message: when the sender is done with it.
    fn send(&mut self, from: usize, to: usize, bytes: u64, now: f64) -> f64 {
        let Simulation { hosts, links, .. } = self.simulation;
        let (a, b) = (hosts.of(from), hosts.of(to));
        let (link, ports, ends) = match a == b {
            true => (&links.intra, &mut self.ports, (from, to)),
            false => {
                self.host_bytes[a] += bytes;
                (&links.inter, &mut self.wires, (a, b))
            }
        };
        let wire = bytes as f64 * link.us_a_byte();
        let free = now + link.overhead_us;
        let out = ports[ends.0].out.max(free) + wire;
        ports[ends.0].out = out;
        // Its first byte comes after the latency, and it is in when the link has carried all of it.
        let arrival = (out + link.alpha_us).max(ports[ends.1].into + wire);
        ports[ends.1].into = arrival;
        let sender = &mut self.ranks[from];
        sender.left.push(sender.left.last().map_or(out, |last| last.max(out)));
        let world = self.ranks.len();
        self.arrivals[to * world + from].push_back(arrival);
        let receiver = &mut self.ranks[to];
        if receiver.waits_for == Some(from as u32) {
            receiver.waits_for = None;
            self.ready.push(Reverse(Moment(arrival.max(now), to)));
        }
        free
    }

    /// When the next of the messages that are waited for has been received, or `now` if there is none left and all is
    /// sent; `None` if nobody has sent it yet.
    fn wait(&mut self, rank: usize, received: usize, sent: usize, now: f64) -> Option<f64> {
        let world = self.ranks.len();
        let state = &mut self.ranks[rank];
        if state.received < received {
            let from = state.begun[state.received];
            let Some(arrival) = self.arrivals[rank * world + from as usize].pop_front() else {
                state.waits_for = Some(from);
                return None;
            };
            state.received += 1;
            let Simulation { hosts, links, .. } = self.simulation;
            let near = hosts.of(rank) == hosts.of(from as usize);
            let overhead = if near { links.intra.overhead_us } else { links.inter.overhead_us };
            // Never `now`, which would mean that nothing is left.
            return Some((arrival.max(now) + overhead).max(now.next_up()));
        }
        Some(match sent.checked_sub(1) {
            Some(last) => state.left[last].max(now),
            None => now,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::network::Link;

    const LINKS: Links = Links {
        intra: Link { alpha_us: 2.0, gbps: 10.0, overhead_us: 0.0 },
        inter: Link { alpha_us: 20.0, gbps: 1.0, overhead_us: 0.0 },
    };

    fn blocked(hosts: usize, each: usize) -> Vec<usize> {
        (0..hosts * each).map(|r| r / each).collect()
    }

    #[track_caller]
    fn close(got: f64, expected: f64) {
        assert!((got / expected - 1.0).abs() < 0.02, "{got} us, not {expected}");
    }

    #[test]
    fn times_are_those_of_the_alpha_beta_model() {
        // What a reduction takes is in them too.
        let reduce = |bytes: f64| bytes * REDUCE_US;
        let two = Simulation::new(&[0, 1], LINKS).unwrap();
        // 1 MB over 1 GB/s is 1000 us.
        let mb = 1e6;
        let us = |algorithm| two.all_reduce(algorithm, 1_000_000).simulated_us;
        close(us(Algorithm::RecursiveDoubling), 20.0 + 1000.0 + reduce(2.0 * mb));
        close(us(Algorithm::HalvingDoubling), 2.0 * (20.0 + 500.0) + reduce(mb));
        // Four hosts of one rank: 2 x 3 steps of a quarter each, and in three of them its reduction, of two contributions.
        let four = Simulation::new(&[0, 1, 2, 3], LINKS).unwrap();
        let ring = four.all_reduce(Algorithm::Ring, 400_000).simulated_us;
        close(ring, 6.0 * (20.0 + 100.0) + reduce(3.0 * 200_000.0));
        // A host's ranks share its wire, and nothing else is slow: 2 slices of a half, 2 steps, half of it to the other host.
        let hosts = Simulation::new(&blocked(2, 2), LINKS).unwrap();
        let prediction = hosts.all_reduce(Algorithm::Hierarchical, 100_000_000);
        assert_eq!(prediction.host_bytes_sent, 100_000_000);
        assert!((100_000.0..115_000.0).contains(&prediction.simulated_us), "{prediction:?}");
        // Directly, each host sends four ranks' quarters twice.
        let direct = hosts.all_reduce(Algorithm::TwoShot, 100_000_000);
        assert_eq!(direct.host_bytes_sent, 2 * 4 * 25_000_000);
        assert!(direct.simulated_us > 1.7 * prediction.simulated_us, "{direct:?}");
    }

    #[test]
    fn counters_are_those_of_the_schedules() {
        let one = Simulation::new(&[0; 8], LINKS).unwrap();
        let s = 8 * 1024;
        for (algorithm, messages, bytes) in [
            (Algorithm::OneShot, 7, 7 * s),
            (Algorithm::TwoShot, 14, 14 * s / 8),
            (Algorithm::Ring, 14, 14 * s / 8),
            (Algorithm::RecursiveDoubling, 3, 3 * s),
            (Algorithm::HalvingDoubling, 6, 14 * s / 8),
        ] {
            let p = one.all_reduce(algorithm, s as usize);
            assert_eq!((p.messages, p.bytes_sent, p.host_bytes_sent), (messages, bytes, 0), "{algorithm}");
        }
    }

    #[test]
    fn the_formulas_are_near_what_is_simulated() {
        let slow = Links { inter: Link { alpha_us: 50.0, gbps: 0.1, overhead_us: 5.0 }, ..Links::default() };
        for links in [Links::default(), slow, LINKS] {
            for names in [
                vec![0; 2],
                vec![0; 5],
                vec![0; 16],
                blocked(2, 1),
                blocked(2, 4),
                blocked(8, 8),
                blocked(5, 3),
                (0..16).map(|r| r % 4).collect(),
                vec![0, 0, 0, 1, 1, 2],
            ] {
                let simulation = Simulation::new(&names, links).unwrap();
                for algorithm in Simulation::ALGORITHMS {
                    for bytes in [8, 4 << 10, 256 << 10, 4 << 20, 256 << 20] {
                        let p = simulation.all_reduce(algorithm, bytes);
                        let ratio = p.formula_us / p.simulated_us;
                        assert!(
                            (0.5..2.0).contains(&ratio),
                            "{algorithm} of {bytes} over {names:?} with {links:?}: {ratio} {p:?}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn a_thousand_ranks_can_be_simulated() {
        let simulation = Simulation::new(&blocked(128, 8), Links::default()).unwrap();
        let us = |algorithm| simulation.all_reduce(algorithm, 64 << 20).simulated_us;
        let direct = us(Algorithm::TwoShot);
        assert!(us(Algorithm::Hierarchical) < direct / 4.0 && us(Algorithm::HalvingDoubling) < direct / 4.0);
        assert!(us(Algorithm::Chain) < direct && us(Algorithm::RecursiveDoubling) > direct);
        assert_eq!(simulation.chosen(64 << 20, false), Algorithm::Chain);
        assert_eq!(simulation.chosen(8, true), Algorithm::RecursiveDoubling);
        assert!(Simulation::new(&[0], LINKS).is_err());
        assert!(Simulation::new(&[0; 4097], LINKS).is_err());
    }
}
