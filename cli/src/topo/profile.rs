//! What a probe measures of the collectives: curves of time by size, one profile for each distance of the processors.

use clap::ValueEnum;
use tensorwire::topology::Planner;
use tensorwire::topology::cost::CostModel;
use tensorwire::topology::table::{Curve, Profile, Reading, Step, Timing};
use tensorwire::transports::launch::Transport;

use super::report;
use crate::bench::Collective;
use crate::failure::Failure;
use crate::measure::Meter;
use crate::measure::calls::{Call, Taken};
use crate::measure::layers::Subject;
use crate::plan::verify::bytes_read;

/// The collectives that a model's ranks make.
pub(crate) const COLLECTIVES: [Collective; 7] = [
    Collective::AllReduce,
    Collective::AllGather,
    Collective::ReduceScatter,
    Collective::Broadcast,
    Collective::AllToAll,
    Collective::SendRecv,
    Collective::Barrier,
];

/// The most that is measured by default, and of everything.
const LARGE: usize = 64 << 20;
const LARGEST: usize = 256 << 20;

/// Below this, sizes are measured four times an octave.
const DENSE: usize = 256 << 10;

/// Sizes are whole cache lines.
const LINE: usize = 64;

/// Bytes above which calls are measured in a stint of their own: they take as long as all below.
const LONG: usize = 1 << 20;

/// Sizes beside a neighbour, who takes turns with a rank where the ranks take all processors.
const CONTENDED: [usize; 8] = [8, 1 << 10, 4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// What is measured, and how thoroughly.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Effort {
    /// Numbers of ranks.
    pub(crate) worlds: Vec<usize>,
    /// Bytes that a rank contributes.
    pub(crate) sizes: Vec<usize>,
    /// How often all of it is measured.
    pub(crate) passes: usize,
    /// Whether also beside a neighbour that keeps memory busy.
    pub(crate) contended: bool,
}

/// The sizes that a probe measures by default, from 1 KiB to 64 MiB, and three smaller; `full` up to 256 MiB. Small messages,
/// whose time is of lines and pages, are measured four times an octave, larger ones, whose time is of bandwidths, twice.
pub(crate) fn sizes(full: bool) -> Vec<usize> {
    let most = if full { LARGEST } else { LARGE };
    let powers = (10..).map(|shift| 1usize << shift).take_while(|bytes| *bytes <= most);
    let octave = |bytes: usize| {
        let step = if bytes < DENSE { 1 } else { 2 };
        let quarter = move |n: i32| ((bytes as f64 * 2f64.powf(f64::from(n) / 4.0)) as usize) / LINE * LINE;
        (0..4).step_by(step).map(quarter).filter(move |bytes| *bytes <= most)
    };
    [8, 64, 512].into_iter().chain(powers.flat_map(octave)).collect()
}

/// The calls of every collective at these sizes.
pub(crate) fn calls(collectives: &[Collective], sizes: &[usize], ranks: usize) -> Vec<Call> {
    let of = |collective: Collective| {
        // A barrier has one size.
        let sizes = if collective == Collective::Barrier { &[0][..] } else { sizes };
        let mut calls: Vec<Call> =
            sizes.iter().filter_map(|bytes| Call::new(collective, *bytes, ranks)).collect();
        calls.dedup();
        calls
    };
    collectives.iter().flat_map(|collective| of(*collective)).collect()
}

/// The same calls in runs, each short enough for the processors to stay mostly where they are.
pub(crate) fn runs(calls: &[Call]) -> impl Iterator<Item = &[Call]> {
    calls.chunk_by(|a, b| a.collective == b.collective && (a.bytes > LONG) == (b.bytes > LONG))
}

/// What was measured at one distance.
#[derive(Default)]
struct Group {
    distance_ns: Option<u32>,
    /// Beside a neighbour or not, over how many ranks, and what.
    taken: Vec<(bool, usize, Taken)>,
    reads: Vec<Reading>,
}

/// Measures collectives in passes, and fits a profile to those of each distance. Passes during which the processors were
/// moved count only where there are no others, as of an unknown distance.
pub(crate) fn measure(
    meter: &mut impl Meter,
    effort: &Effort,
    now: u64,
    show: &mut impl FnMut(String) -> Result<(), Failure>,
) -> Result<Vec<Profile>, Failure> {
    let mut groups: Vec<Group> = Vec::new();
    let mut moved = Vec::new();
    for _ in 0..effort.passes {
        for ranks in effort.worlds.iter().copied() {
            for contended in [false, true] {
                if contended && !effort.contended {
                    continue;
                }
                let sizes = if contended { &CONTENDED[..] } else { &effort.sizes };
                for calls in runs(&calls(&COLLECTIVES, sizes, ranks)) {
                    let stint = meter.calls(ranks, contended, calls)?;
                    let found = stint.found.into_iter().map(|taken| (contended, ranks, taken));
                    match stint.moved {
                        false => group(&mut groups, stint.distance_ns).taken.extend(found),
                        true => moved.extend(found),
                    }
                }
            }
        }
        if meter.transport() == Transport::Shm {
            let stint = meter.reads()?;
            if !stint.moved {
                group(&mut groups, stint.distance_ns).reads = stint.found;
            }
        }
    }
    groups.retain(|group| !group.taken.is_empty());
    if !moved.is_empty() {
        show(report::moved(groups.is_empty()))?;
    }
    if groups.is_empty() {
        groups.push(Group { taken: moved, ..Group::default() });
    }
    let profiles: Option<Vec<Profile>> =
        groups.into_iter().map(|group| fit(group, meter.transport(), now)).collect();
    profiles.ok_or_else(|| Failure::run("topo --probe: the clock says that calls took no time"))
}

/// Measures a decoder's layers over so many ranks, and fits what they take into the profile of the distance at which that
/// was; where there is none of that distance, the measurement is of no use.
pub(crate) fn steps(
    meter: &mut impl Meter,
    profiles: &mut [Profile],
    worlds: &[usize],
    passes: usize,
    now: u64,
) -> Result<(), Failure> {
    for ranks in worlds.iter().copied() {
        let mut measured: Vec<(usize, (f64, f64, f64))> = Vec::new();
        for _ in 0..passes {
            for subject in Subject::shapes() {
                let model = subject.open()?;
                let run = meter.steps(ranks, &subject)?;
                let of = |p: &Profile| !run.moved && p.is_at(run.distance_ns);
                let Some(at) = profiles.iter().position(of) else { continue };
                let costs = CostModel::measured(&profiles[at], meter.transport().name());
                let plan = Planner::new(model.spec()).with_costs(costs).plan(ranks).map_err(Failure::run)?;
                let (layers, head) = bytes_read(model.spec(), &plan);
                let beside = run.found.step_us - plan.predicted.comm_us_per_token;
                let bytes = layers.iter().sum::<u64>() + head;
                measured.push((at, ((layers.len() + 1) as f64, bytes as f64, beside)));
            }
        }
        for (i, profile) in profiles.iter_mut().enumerate() {
            let of: Vec<_> = measured.iter().filter(|(at, _)| *at == i).map(|(_, m)| *m).collect();
            if let Some(step) = Step::fit(ranks, &of, now) {
                profile.steps.push(step);
            }
        }
    }
    Ok(())
}

/// The group of a distance.
fn group(groups: &mut Vec<Group>, distance_ns: Option<u32>) -> &mut Group {
    let known = groups.iter().position(|g| {
        let at = Profile { distance_ns: g.distance_ns, ..Profile::default() };
        at.is_at(distance_ns)
    });
    let at = known.unwrap_or_else(|| {
        groups.push(Group { distance_ns, ..Group::default() });
        groups.len() - 1
    });
    &mut groups[at]
}

/// The profile of a group; nothing where a time makes no sense.
fn fit(group: Group, transport: Transport, now: u64) -> Option<Profile> {
    let mut profile = Profile { distance_ns: group.distance_ns, reads: group.reads, ..Profile::default() };
    let mut keys: Vec<(bool, usize, &str)> =
        group.taken.iter().map(|(contended, ranks, t)| (*contended, *ranks, t.collective.as_str())).collect();
    keys.sort_unstable();
    keys.dedup();
    // In the order of the list, not of the alphabet.
    let place = |name: &str| {
        COLLECTIVES.iter().position(|c| c.to_possible_value().is_some_and(|v| v.get_name() == name))
    };
    keys.sort_by_key(|(contended, ranks, name)| (*contended, *ranks, place(name)));
    for (contended, ranks, name) in keys {
        let of = group
            .taken
            .iter()
            .filter(|(c, r, t)| (*c, *r, t.collective.as_str()) == (contended, ranks, name));
        let curve = |us: fn(&Taken) -> f64| {
            let samples: Vec<(u64, f64)> = of.clone().map(|(_, _, t)| (t.bytes as u64, us(t))).collect();
            Curve::fit(&samples)
        };
        profile.timings.push(Timing {
            collective: name.to_owned(),
            transport: transport.name().to_owned(),
            ranks,
            contended,
            p50: curve(|t| t.p50_us)?,
            p99: curve(|t| t.p99_us)?,
            measured_at: now,
        });
    }
    Some(profile)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::given::Given;
    use tensorwire::topology::discover::Fingerprint;
    use tensorwire::topology::table::Table;

    #[test]
    fn sizes_are_powers_of_two_and_what_is_between() {
        let all = sizes(false);
        assert!(
            all.is_sorted_by(|a, b| a < b)
                && [1024, 1216, 1408, 1664, 2048].iter().all(|size| all.contains(size))
        );
        assert!(!all.contains(&1_246_912) && all.contains(&1_482_880), "2^20.25 and 2^20.5");
        assert_eq!((all[0], all.last()), (8, Some(&(64 << 20))));
        assert_eq!(sizes(true).last(), Some(&(256 << 20)));
    }

    #[test]
    fn a_barrier_is_called_once_and_blocks_are_whole() {
        let calls = calls(&COLLECTIVES, &[8, 64], 3);
        let of = |c: Collective| {
            calls.iter().filter(|call| call.collective == c).map(|c| c.bytes).collect::<Vec<_>>()
        };
        assert_eq!(of(Collective::Barrier), [0]);
        assert_eq!(of(Collective::AllReduce), [8, 64]);
        assert_eq!(of(Collective::AllToAll), [60], "8 bytes aren't three elements");
    }

    #[test]
    fn contended_calls_have_curves_of_their_own_and_those_while_processors_were_moved_count_nowhere() {
        // Every third stint is while they were moved.
        let mut given = Given { distances: vec![Some(50), Some(52), None], slower: 1.0, stints: 0 };
        let sizes = vec![1 << 10, 64 << 10, 4 << 20];
        let effort = Effort { worlds: vec![2, 4], sizes, passes: 6, contended: true };
        let mut said = Vec::new();
        let mut show = |text| {
            said.push(text);
            Ok(())
        };
        let found = measure(&mut given, &effort, 7, &mut show).unwrap();
        assert_eq!((found.len(), said.len()), (1, 1), "{said:?}");
        assert!(said[0].contains("some passes"), "{said:?}");
        let profile = &found[0];
        assert_eq!(profile.timings.len(), 2 * 2 * COLLECTIVES.len());
        for (ranks, contended, times) in [(2, false, 1.0), (2, true, 4.0), (4, false, 1.0), (4, true, 4.0)] {
            let timing = profile.timing("all_gather", "shm", ranks, contended).unwrap();
            for bytes in [1 << 10, 256 << 10, 4 << 20] {
                let ratio = timing.p50.us(bytes as u64) / (times * given.us(Some(50), false, bytes));
                assert!((0.95..1.1).contains(&ratio), "{ranks} {contended} {bytes}: {ratio}");
                let slow = timing.p99.us(bytes as u64) / timing.p50.us(bytes as u64);
                assert!((2.9..3.1).contains(&slow), "{slow}");
            }
        }
        // A plan is predicted as if it had the machine to itself.
        let us = CostModel::measured(profile, "shm").collective("all_gather", 64 << 10, 2).unwrap().us;
        assert!((0.95..1.1).contains(&(us / given.us(Some(50), false, 64 << 10))), "{us}");
        // The file takes all of it.
        let mut table = Table::empty(Fingerprint { processor: "x".into(), processors: 2, caches: vec![] });
        table.set_profile(profile.clone());
        let dir = tempfile::tempdir().unwrap();
        table.save(&dir.path().join("table")).unwrap();
        assert_eq!(Table::load(&dir.path().join("table"), &table.machine).as_ref(), Ok(&table));
        let text = report::profiles(&Ok(table));
        assert!(text.contains("memory busy"), "{text}");
    }

    #[test]
    fn where_processors_are_always_moved_all_counts_as_of_no_distance() {
        let mut given = Given { distances: vec![None], slower: 1.0, stints: 0 };
        let effort = Effort { worlds: vec![2], sizes: vec![1 << 10], passes: 1, contended: false };
        let mut said = String::new();
        let mut show = |text: String| {
            said += &text;
            Ok(())
        };
        let found = measure(&mut given, &effort, 7, &mut show).unwrap();
        assert_eq!((found.len(), found[0].distance_ns, found[0].timings.len()), (1, None, COLLECTIVES.len()));
        assert!(said.contains("all passes"), "{said}");
    }

    #[test]
    fn each_distance_is_fitted_apart() {
        let mut groups = Vec::new();
        for (ns, us) in [(100, 1.0), (480, 5.0), (105, 1.2)] {
            let taken = |bytes: usize| Taken {
                collective: "all_reduce".into(),
                bytes,
                p50_us: us * bytes as f64,
                p99_us: 2.0 * us * bytes as f64,
            };
            group(&mut groups, Some(ns)).taken.extend([8, 64].map(|bytes| (false, 2, taken(bytes))));
        }
        let found: Vec<Profile> = groups.into_iter().map(|g| fit(g, Transport::Shm, 7).unwrap()).collect();
        assert_eq!(found.iter().map(|p| p.distance_ns).collect::<Vec<_>>(), [Some(100), Some(480)]);
        let far = found[1].timing("all_reduce", "shm", 2, false).unwrap();
        assert_eq!((far.p50.us(8), far.p99.us(8), far.measured_at), (40.0, 80.0, 7));
    }
}
