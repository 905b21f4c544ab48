//! Predictions beside measurements.

use clap::ValueEnum;
use serde::Serialize;
use tensorwire::topology::cost::{CostModel, Estimate};
use tensorwire::topology::plan::Collective as Planned;
use tensorwire::topology::table::fit::{median, typical};
use tensorwire::topology::{ModelSpec, Plan};

use super::{Measured, bytes_read};
use crate::bench::Collective;
use crate::measure::calls::{Call, Taken};
use crate::topo::profile::COLLECTIVES;

/// One prediction, and what was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Row {
    /// A collective's name; or `embedding`, `layer 0` and so on, `head` and `step`.
    pub(super) what: String,
    /// What one rank contributes to a collective.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) bytes: Option<usize>,
    /// How often a token makes this call of the plan; 0 where only a sweep does.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) calls: Option<usize>,
    pub(super) predicted_us: f64,
    /// By what factor it may be wrong, where it is from measurements.
    pub(super) band: Option<f64>,
    pub(super) measured_us: f64,
    /// By what factor the passes of a call differ, the shortest and the longest in ten left out: no prediction can be nearer
    /// to each of them.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) spread: Option<f64>,
    /// Measured over predicted.
    pub(super) ratio: f64,
}

/// All of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(super) struct Comparison {
    /// Where the predictions are from.
    pub(super) source: String,
    pub(super) collectives: Vec<Row>,
    /// Of a decoder: the embedding, each layer, the head, and the whole step.
    pub(super) parts: Vec<Row>,
    /// Of a step, in microseconds: what its collectives are predicted to take, and what it spent in them, waiting for the other
    /// ranks included.
    pub(super) comm_us: Option<[f64; 2]>,
}

/// The collectives that a token makes.
pub(super) fn of_a_token(plan: &Plan) -> impl Iterator<Item = &Planned> {
    let own = plan.layers.iter().filter(|layer| layer.stream.is_empty());
    own.flat_map(|layer| &layer.collectives).chain(&plan.vocab.collectives).filter(|c| c.stream.is_empty())
}

/// How a plan's collective is called for one token; nothing where it can't be.
pub(super) fn call(planned: &Planned, world: usize) -> Option<Call> {
    let bytes = planned.bytes_per_token as usize;
    // Each rank's block of the whole that a plan counts.
    let bytes =
        if matches!(planned.op.as_str(), "all_gather" | "all_to_all") { bytes / world } else { bytes };
    Call::new(Collective::from_str(&planned.op, false).ok()?, bytes, world)
}

/// Compares a plan's predictions by `costs` with what was measured of it.
pub(super) fn compare(spec: &ModelSpec, plan: &Plan, costs: &CostModel, measured: &Measured) -> Comparison {
    let world = plan.world;
    let calls: Vec<Call> = of_a_token(plan).filter_map(|planned| call(planned, world)).collect();
    let estimate = |call: &Call| costs.collective(&call.collective.to_string(), call.bytes as u64, world);
    let same = |a: &Taken, b: &Taken| (&a.collective, a.bytes) == (&b.collective, b.bytes);
    let mut each: Vec<&Taken> = Vec::new();
    for taken in &measured.calls {
        if !each.iter().any(|known| same(known, taken)) {
            each.push(taken);
        }
    }
    // In the order in which they are asked for, whichever was measured first.
    let place = |t: &Taken| COLLECTIVES.iter().position(|c| c.to_string() == t.collective);
    let of_plan =
        |t: &Taken| calls.iter().any(|c| c.bytes == t.bytes && c.collective.to_string() == t.collective);
    each.sort_by_key(|t| (!of_plan(t), place(t), t.bytes));
    let row = |taken: &Taken| {
        let mut us: Vec<f64> = measured.calls.iter().filter(|t| same(t, taken)).map(|t| t.p50_us).collect();
        let collective = Collective::from_str(&taken.collective, false).ok()?;
        let made = Call { collective, bytes: taken.bytes };
        let times = calls.iter().filter(|call| **call == made).count();
        let row = Row::new(&taken.collective, estimate(&made)?, typical(&mut us)?);
        Some(Row { bytes: Some(taken.bytes), calls: Some(times), spread: spread(&us), ..row })
    };
    let collectives = each.into_iter().filter_map(row).collect();

    let exchange = |planned: &[Planned]| -> Option<Estimate> {
        let own = planned.iter().filter(|c| c.stream.is_empty()).map(|c| estimate(&call(c, world)?));
        sum(own.collect::<Option<Vec<_>>>()?)
    };
    let (layers, head) = bytes_read(spec, plan);
    let after = &plan.vocab.collectives;
    let embedding = exchange(&after[..after.len().min(1)]);
    let block = |bytes: u64, planned: &[Planned]| sum([costs.step(1, bytes, world), exchange(planned)?]);
    let mut predicted = vec![embedding];
    predicted.extend(layers.iter().zip(&plan.layers).map(|(bytes, layer)| block(*bytes, &layer.collectives)));
    predicted.push(block(head, after.get(1..).unwrap_or_default()));
    let predicted: Option<Vec<Estimate>> = predicted.into_iter().collect();
    let steps = &measured.steps;
    let known = predicted.filter(|p| !steps.is_empty() && steps.iter().all(|s| s.parts.len() == p.len()));
    let mut parts = Vec::new();
    let mut comm_us = None;
    if let Some(predicted) = known {
        let middle = |of: &dyn Fn(&crate::measure::layers::Steps) -> f64| {
            median(&mut steps.iter().map(of).collect::<Vec<_>>()).unwrap_or_default()
        };
        let last = predicted.len() - 1;
        let name = |i: usize| match i {
            0 => "embedding".to_owned(),
            i if i == last => "head".to_owned(),
            i => format!("layer {}", i - 1),
        };
        let part =
            |(i, estimate): (usize, &Estimate)| Row::new(&name(i), *estimate, middle(&|s| s.parts[i].us));
        parts = predicted.iter().enumerate().map(part).collect();
        let whole = sum(predicted.iter().copied()).unwrap_or(Estimate { us: 0.0, band: None });
        parts.push(Row::new("step", whole, middle(&|s| s.step_us)));
        let in_calls = sum(calls.iter().filter_map(estimate)).map_or(0.0, |e| e.us);
        comm_us = Some([in_calls, middle(&|s| s.parts.iter().map(|p| p.comm_us).sum())].map(rounded));
    }
    Comparison { source: costs.source.clone(), collectives, parts, comm_us }
}

impl Row {
    fn new(what: &str, predicted: Estimate, measured_us: f64) -> Row {
        // What takes nothing on one rank is as predicted where nothing is.
        let ratio = if predicted.us > 0.0 { measured_us / predicted.us } else { 1.0 };
        Row {
            what: what.to_owned(),
            bytes: None,
            calls: None,
            predicted_us: rounded(predicted.us),
            band: predicted.band,
            measured_us: rounded(measured_us),
            spread: None,
            ratio: rounded(ratio),
        }
    }
}

/// By what factor times in ascending order differ, without those of either end that are one in ten; nothing of one.
fn spread(us: &[f64]) -> Option<f64> {
    let ends = us.len() / 10;
    (us.len() > 1).then(|| rounded(us[us.len() - 1 - ends] / us[ends]))
}

/// The sum of estimates: from measurements where all that count are, and as wrong as the most wrong of them may be.
fn sum(of: impl IntoIterator<Item = Estimate>) -> Option<Estimate> {
    let nothing = Estimate { us: 0.0, band: Some(1.0) };
    Some(of.into_iter().filter(|e| e.us > 0.0).fold(nothing, |all, e| Estimate {
        us: all.us + e.us,
        band: all.band.zip(e.band).map(|(a, b)| a.max(b)),
    }))
}

fn rounded(x: f64) -> f64 {
    (x * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::measure::layers::{Part, Steps, Subject};
    use tensorwire::topology::Planner;
    use tensorwire::topology::table::{Curve, Profile, Step, Timing};

    fn profile() -> Profile {
        let timing = |collective: &str, us: f64| Timing {
            collective: collective.into(),
            transport: "shm".into(),
            ranks: 2,
            contended: false,
            p50: Curve::fit(&[(1, us)]).unwrap(),
            p99: Curve::fit(&[(1, us)]).unwrap(),
            measured_at: 0,
        };
        let step = Step { ranks: 2, layer_us: 100.0, gbps: 20.0, band: 1.25, measured_at: 0 };
        let timings = vec![timing("all_reduce", 2.0), timing("all_gather", 10.0)];
        Profile { timings, steps: vec![step], ..Profile::default() }
    }

    fn measured(passes: &[f64]) -> Measured {
        let taken = |us: f64| {
            [("all_reduce", 3072, us), ("all_gather", 64_000, 5.0 * us), ("all_reduce", 1448, us)].map(
                |(collective, bytes, us)| Taken {
                    collective: collective.into(),
                    bytes,
                    p50_us: us,
                    p99_us: us,
                },
            )
        };
        let step =
            |us: f64| Steps { step_us: 1000.0 * us, parts: vec![Part { us: 70.0 * us, comm_us: us }; 14] };
        Measured {
            distance_ns: Some(100),
            calls: passes.iter().flat_map(|us| taken(*us)).collect(),
            stints: passes.len(),
            moved: false,
            steps: passes.iter().map(|us| step(*us)).collect(),
        }
    }

    #[test]
    fn each_row_has_its_ratio_and_band() {
        let model = Subject::model(None, 1).open().unwrap();
        let costs = CostModel::measured(&profile(), "shm");
        let plan = Planner::new(model.spec()).with_costs(costs.clone()).plan(2).unwrap();
        let found = compare(model.spec(), &plan, &costs, &measured(&[9.0, 4.0, 2.0]));
        let rows: Vec<_> =
            found.collectives.iter().map(|r| (&*r.what, r.bytes, r.calls, r.ratio, r.band)).collect();
        assert_eq!(
            rows,
            [
                ("all_reduce", Some(3072), Some(25), 2.0, Some(1.0)),
                ("all_gather", Some(64_000), Some(1), 2.0, Some(1.0)),
                ("all_reduce", Some(1448), Some(0), 2.0, Some(1.0)),
            ]
        );
        assert_eq!((found.collectives[0].spread, found.parts[1].spread), (Some(4.5), None));
        assert_eq!(found.parts.len(), 15);
        let row = |what: &str| found.parts.iter().find(|r| r.what == what).unwrap();
        assert_eq!((row("embedding").predicted_us, row("embedding").measured_us), (2.0, 280.0));
        // 100 us, its weights at 20 GB/s, and two all-reduces.
        let (layers, head) = bytes_read(model.spec(), &plan);
        let layer = 100.0 + layers[0] as f64 / 20e3 + 4.0;
        assert_eq!((row("layer 11").predicted_us, row("layer 11").band), (rounded(layer), Some(1.25)));
        assert_eq!(row("head").predicted_us, rounded(110.0 + head as f64 / 20e3));
        let whole: f64 = found.parts[..14].iter().map(|r| r.predicted_us).sum();
        assert!((row("step").predicted_us - whole).abs() < 0.1 && row("step").measured_us == 4000.0);
        assert!((row("step").predicted_us / plan.predicted.decode_us_per_token - 1.0).abs() < 1e-3);
        assert_eq!(found.comm_us, Some([60.0, 56.0]));
    }

    #[test]
    fn passes_differ_by_their_spread() {
        assert_eq!((spread(&[2.0]), spread(&[2.0, 3.0])), (None, Some(1.5)));
        let ten: Vec<f64> = [1.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 3.0, 90.0].to_vec();
        assert_eq!(spread(&ten), Some(1.5));
    }

    #[test]
    fn constants_have_no_band_and_one_rank_exchanges_nothing() {
        let model = Subject::model(None, 1).open().unwrap();
        let costs = CostModel::default();
        let plan = Planner::new(model.spec()).plan(2).unwrap();
        let found = compare(model.spec(), &plan, &costs, &measured(&[1.0]));
        assert!(found.collectives.iter().chain(&found.parts).all(|r| r.band.is_none()));
        let alone = Planner::new(model.spec()).plan(1).unwrap();
        let mut one = measured(&[1.0]);
        one.calls = vec![];
        let found = compare(model.spec(), &alone, &costs, &one);
        assert_eq!((found.collectives.len(), found.parts[0].ratio, found.comm_us.unwrap()[0]), (0, 1.0, 0.0));
    }
}
