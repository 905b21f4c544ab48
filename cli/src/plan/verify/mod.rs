//! `tensorwire plan verify`: what a plan predicts, beside what this machine takes for it.

mod compare;
mod report;

use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use clap::value_parser;
use tensorwire::topology::cost::CostModel;
use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::{Profile, Table};
use tensorwire::topology::{ModelSpec, Plan, Planner};
use tensorwire::transports::launch::Transport;
use tensorwire_runtime::{Kind, Model};

use crate::failure::{Failure, print, ranks};
use crate::measure::calls::{Call, Taken};
use crate::measure::layers::{Steps, Subject};
use crate::measure::{Here, Meter, Stint};
use crate::topo::profile::{COLLECTIVES, Effort, calls, measure, runs, sizes, steps};
use compare::{Comparison, compare};

const METHOD: &str = "\
Each collective of the plan is called over ranks that are processes, and the model runs over as many, in turn; a figure is
the median of its passes, of medians over calls and tokens. Predictions are from the curves that `tensorwire topo --probe`
fitted at the distance which the processors have now, with the band that nine measurements in ten stayed within; where it
fitted none, from constants. The host of a virtual machine may move its processors: what was measured while it did is left
out, and a distance that no probe has seen is told.

Examples:
  tensorwire topo --probe --decode && tensorwire plan verify
  tensorwire plan verify --sweep                  every collective, at sizes between those that were fitted
  tensorwire plan verify --model DIR --tp 4 --refit
  tensorwire plan verify --json | jq '.verified.collectives[].ratio'";

/// Compare a plan's predictions with this machine
#[derive(clap::Args)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// A model's directory, with its weights [default: the built-in model]
    #[arg(long, value_name = "DIR")]
    model: Option<PathBuf>,

    /// Tensor-parallel ranks
    #[arg(long, value_name = "N", default_value = "2", value_parser = ranks)]
    tp: usize,

    /// What carries the bytes: shm, or tcp, tls or quic over this host's loopback
    #[arg(long, value_parser = str::parse::<Transport>, default_value = "shm")]
    transport: Transport,

    /// Also every collective from 1 KiB to 64 MiB, at sizes that no probe measures: each between two that it does
    #[arg(long)]
    sweep: bool,

    /// Measure the collectives and a decoder's layers, fit them again and keep that, for all programs of this user
    #[arg(long)]
    refit: bool,

    /// How often everything is measured
    #[arg(long, value_name = "N", default_value = "5", value_parser = value_parser!(u8).range(1..=100))]
    passes: u8,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

/// What was measured while the processors had one distance.
#[derive(Default)]
struct Measured {
    distance_ns: Option<u32>,
    /// Whether they had none, as they were moved all the time.
    moved: bool,
    /// Calls, each as often as it was measured.
    calls: Vec<Taken>,
    /// None of an encoder, which has no steps.
    steps: Vec<Steps>,
    stints: usize,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let subject = Subject::model(args.model.clone(), 48);
    if args.refit && args.tp == 1 {
        return Err(Failure::usage(
            "plan verify --refit: one rank has no collectives to fit: give --tp 2 or more",
        ));
    }
    let model = subject.open()?;
    let plan =
        |costs: CostModel| Planner::new(model.spec()).with_costs(costs).plan(args.tp).map_err(Failure::usage);
    let unmeasured = plan(CostModel::default())?;
    let machine = Fingerprint::read(Path::new("/"));
    let path = match args.refit {
        true => Some(place(&machine)?),
        false => None,
    };

    let mut wanted = vec![plan_calls(&unmeasured)?];
    if args.sweep {
        wanted.extend(runs(&calls(&COLLECTIVES, &held_out(), args.tp)).map(<[Call]>::to_vec));
    }
    wanted.retain(|calls| args.tp > 1 && !calls.is_empty());
    let table = Table::in_force();
    let is_known = |ns| table.as_ref().is_ok_and(|table| table.profile(ns).is_some_and(|p| p.is_at(ns)));
    let meter = &mut Here(args.transport);
    let decoder = (model.kind() == Kind::Decoder).then_some(&subject);
    let (measured, left_out) = run(args, meter, decoder, &wanted, is_known)?;
    let profile = table.as_ref().ok().and_then(|table| table.profile(measured.distance_ns));
    let mut notes = report::notes(profile, &table, measured.distance_ns, left_out);
    if measured.moved {
        notes.push(
            "the processors were moved during all measurements: they are of no one distance".to_owned(),
        );
    }
    let mut shown = vec![comparison(args, &model, &plan, &measured, profile)?];
    let refitted = path.map(|path| refit(args, meter, &machine, &path, &mut notes)).transpose()?;
    if let Some(table) = &refitted {
        let profile = table.profile(measured.distance_ns);
        shown.push(comparison(args, &model, &plan, &measured, profile)?);
    }
    let about = report::About {
        model: model.spec(),
        built_in: args.model.is_none(),
        args,
        measured: &measured,
        notes,
    };
    print(if args.json { about.json(&shown) } else { about.text(&shown) })
}

/// The file that a refit writes, once it is known that it can.
fn place(machine: &Fingerprint) -> Result<PathBuf, Failure> {
    let refused = |e: &dyn std::fmt::Display| Failure::usage(format!("plan verify --refit: {e}"));
    let path = Table::path(machine).map_err(|e| refused(&e))?;
    Table::check_place(&path).map_err(|e| refused(&e))?;
    Ok(path)
}

/// The calls that a token makes, one for each collective of the plan.
#[cfg(test)]
pub(crate) fn calls_of_a_token(plan: &Plan) -> impl Iterator<Item = Call> {
    compare::of_a_token(plan).filter_map(|planned| compare::call(planned, plan.world))
}

/// Each of the plan's calls, for one token, once.
fn plan_calls(plan: &Plan) -> Result<Vec<Call>, Failure> {
    let mut found: Vec<Call> = Vec::new();
    for collective in compare::of_a_token(plan) {
        let call = compare::call(collective, plan.world).ok_or_else(|| {
            Failure::run(format!("the plan has a collective that isn't known: {}", collective.op))
        })?;
        if !found.contains(&call) {
            found.push(call);
        }
    }
    Ok(found)
}

/// Sizes from 1 KiB to 64 MiB that no probe measures: the geometric middle of each two that it does.
fn held_out() -> Vec<usize> {
    const WHOLE: usize = 64;
    let probed: Vec<usize> = sizes(false).into_iter().filter(|bytes| *bytes >= 1 << 10).collect();
    let between = |pair: &[usize]| ((pair[0] as f64 * pair[1] as f64).sqrt() as usize) / WHOLE * WHOLE;
    probed.windows(2).map(between).collect()
}

/// Measures in passes, in stints short enough for the processors to stay mostly where they are. Returns what was measured
/// at one distance, if possible one that predictions are known for, and how many stints were of others or of none.
fn run(
    args: &Args,
    meter: &mut impl Meter,
    decoder: Option<&Subject>,
    wanted: &[Vec<Call>],
    is_known: impl Fn(Option<u32>) -> bool,
) -> Result<(Measured, usize), Failure> {
    if decoder.is_none() && wanted.is_empty() {
        return Err(Failure::usage(
            "plan verify: an encoder on one rank has no collectives and no steps to compare",
        ));
    }
    let mut groups: Vec<Measured> = Vec::new();
    for _ in 0..args.passes {
        for calls in wanted {
            let Stint { distance_ns, moved, found } = meter.calls(args.tp, false, calls)?;
            of_distance(&mut groups, distance_ns, moved).calls.extend(found);
        }
        if let Some(subject) = decoder {
            let Stint { distance_ns, moved, found } = meter.steps(args.tp, subject)?;
            of_distance(&mut groups, distance_ns, moved).steps.push(found);
        }
    }
    let stints: usize = groups.iter().map(|m| m.stints).sum();
    let best = |m: &Measured| (!m.moved, is_known(m.distance_ns), m.stints);
    let most = groups.into_iter().max_by_key(best).unwrap_or_default();
    let left_out = stints - most.stints;
    Ok((most, left_out))
}

/// What was measured at a distance, with one stint more.
fn of_distance(groups: &mut Vec<Measured>, distance_ns: Option<u32>, moved: bool) -> &mut Measured {
    let at = |m: &Measured| Profile { distance_ns: m.distance_ns, ..Profile::default() };
    let same = |m: &Measured| m.moved == moved && at(m).is_at(distance_ns);
    let at = groups.iter().position(same).unwrap_or_else(|| {
        groups.push(Measured { distance_ns, moved, ..Measured::default() });
        groups.len() - 1
    });
    groups[at].stints += 1;
    &mut groups[at]
}

fn comparison(
    args: &Args,
    model: &Model,
    plan: &impl Fn(CostModel) -> Result<Plan, Failure>,
    measured: &Measured,
    profile: Option<&Profile>,
) -> Result<Comparison, Failure> {
    let transport = args.transport.name();
    let costs = profile.map_or_else(CostModel::default, |profile| CostModel::measured(profile, transport));
    Ok(compare(model.spec(), &plan(costs.clone())?, &costs, measured))
}

/// Measures what predictions are made from, and keeps it; returns the table.
fn refit(
    args: &Args,
    meter: &mut impl Meter,
    machine: &Fingerprint,
    path: &Path,
    notes: &mut Vec<String>,
) -> Result<Table, Failure> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let mut table = Table::load(path, machine).unwrap_or_else(|_| Table::empty(machine.clone()));
    let mut show = |text: String| {
        notes.push(text.trim().to_owned());
        Ok(())
    };
    let passes = args.passes.into();
    let effort = Effort { worlds: vec![args.tp], sizes: sizes(false), passes, contended: false };
    let mut profiles = measure(meter, &effort, now, &mut show)?;
    steps(meter, &mut profiles, &[args.tp], 1, now)?;
    for profile in profiles {
        table.set_profile(profile);
    }
    table.save(path).map_err(|e| Failure::run(format!("plan verify --refit: {e}")))?;
    notes.push(format!("the table was fitted again: {}", path.display()));
    Ok(table)
}

/// The bytes of weights, as the runtime holds them, that a rank reads for a token: of each layer, and of the output head; the
/// largest rank's.
pub(crate) fn bytes_read(spec: &ModelSpec, plan: &Plan) -> (Vec<u64>, u64) {
    // It holds all of them as f32.
    let held = |bytes: u64| bytes / spec.dtype.size() as u64 * size_of::<f32>() as u64;
    let layer = |layer: &tensorwire::topology::plan::Layer| {
        layer.ranks.iter().map(|r| held(r.read_bytes)).max().unwrap_or(0)
    };
    let rows = plan.vocab.ranges.iter().map(|rows| rows.len()).max().unwrap_or(0);
    let head = (rows * spec.hidden_size * size_of::<f32>()) as u64;
    (plan.layers.iter().map(layer).collect(), head)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::given::Given;

    #[test]
    fn what_is_held_out_is_not_probed() {
        let (held, probed) = (held_out(), sizes(true));
        assert!(held.len() > 20 && held.iter().all(|bytes| !probed.contains(bytes)));
        assert!(held[0] > 1 << 10 && held[held.len() - 1] < 64 << 20);
    }

    fn args(passes: u8) -> Args {
        let (model, tp, transport) = (None, 2, Transport::Shm);
        Args { model, tp, transport, sweep: true, refit: true, passes, json: false }
    }

    /// A machine that has become three times as slow since it was probed: predictions are off by that; fitted again, they
    /// hold, also for the sizes that weren't measured for it, and what was known of another distance is left alone.
    #[test]
    fn what_is_fitted_again_predicts_what_is_measured_now() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("table.json");
        let machine = Fingerprint { processor: "x".into(), processors: 2, caches: vec![] };
        let subject = Subject::model(None, 1);
        let model = subject.open().unwrap();
        let plan =
            |costs: CostModel| Planner::new(model.spec()).with_costs(costs).plan(2).map_err(Failure::usage);
        let unmeasured = plan(CostModel::default()).unwrap();
        let mut wanted = vec![plan_calls(&unmeasured).unwrap()];
        wanted.push(calls(&COLLECTIVES, &held_out(), 2));

        let mut notes = Vec::new();
        let mut before = Given { distances: vec![Some(50)], slower: 1.0, stints: 0 };
        refit(&args(1), &mut before, &machine, &path, &mut notes).unwrap();
        let mut far = Given { distances: vec![Some(480)], slower: 1.0, stints: 0 };
        let table = refit(&args(1), &mut far, &machine, &path, &mut notes).unwrap();
        assert_eq!(table.profiles.iter().map(|p| p.distance_ns).collect::<Vec<_>>(), [Some(50), Some(480)]);

        let mut now = Given { distances: vec![Some(52), Some(52), Some(52), None], slower: 3.0, stints: 0 };
        let is_known = |ns| table.profile(ns).is_some_and(|p| p.is_at(ns));
        let (measured, left_out) = run(&args(3), &mut now, Some(&subject), &wanted, is_known).unwrap();
        assert_eq!((measured.distance_ns, left_out, measured.stints), (Some(52), 2, 7));
        let ratios = |table: &Table, measured: &Measured| {
            let found =
                comparison(&args(3), &model, &plan, measured, table.profile(measured.distance_ns)).unwrap();
            assert!(found.collectives.len() > 280 && found.parts.len() == 15, "{}", found.collectives.len());
            let all: Vec<f64> =
                found.collectives.iter().chain(&found.parts[14..]).map(|row| row.ratio).collect();
            all
        };
        let near = |ratios: &[f64], at: f64| ratios.iter().all(|ratio| (ratio / at - 1.0).abs() < 0.06);
        let off = ratios(&table, &measured);
        assert!(near(&off, 3.0), "{off:?}");

        let again = refit(&args(3), &mut now, &machine, &path, &mut notes).unwrap();
        let held = ratios(&again, &measured);
        assert!(near(&held, 1.0), "{held:?}");
        assert_eq!(again.profile(Some(480)), table.profile(Some(480)));
        assert_eq!(Table::load(&path, &machine).unwrap(), again, "it is what the file has");
        assert!(notes.iter().any(|note| note.contains("fitted again")), "{notes:?}");
    }

    #[test]
    fn a_plan_calls_each_size_once() {
        let model = Subject::model(None, 1).open().unwrap();
        let plan = Planner::new(model.spec()).plan(2).unwrap();
        let calls: Vec<String> = plan_calls(&plan).unwrap().iter().map(Call::to_string).collect();
        assert_eq!(calls, ["all_reduce:3072", "all_gather:64000"]);
        let (layers, head) = bytes_read(model.spec(), &plan);
        assert_eq!((layers.len(), head), (12, 16_000 * 768 * 4));
        // Without the embedding: 249.4 MB a rank, less 16,000 rows; less the last norm.
        assert_eq!(layers.iter().sum::<u64>() + head, plan.ranks[0].weight_bytes - head - 3072);
        let alone = Planner::new(model.spec()).plan(1).unwrap();
        assert_eq!(plan_calls(&alone).unwrap(), []);
    }
}
