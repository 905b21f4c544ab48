//! What `plan verify` prints.

use std::fmt::Write;

use serde_json::{Value, json};
use tensorwire::topology::ModelSpec;
use tensorwire::topology::table::{Absent, Profile, Table};

use super::compare::{Comparison, Row};
use super::{Args, Measured};
use crate::topo::report::{age, seconds_since};

/// What is promised of held-out sizes.
const NEAR: f64 = 1.25;

/// What is compared.
pub(super) struct About<'a> {
    pub(super) model: &'a ModelSpec,
    pub(super) built_in: bool,
    pub(super) args: &'a Args,
    pub(super) measured: &'a Measured,
    pub(super) notes: Vec<String>,
}

/// What a person should know of where the predictions are from.
pub(super) fn notes(
    profile: Option<&Profile>,
    table: &Result<Table, Absent>,
    distance_ns: Option<u32>,
    left_out: usize,
) -> Vec<String> {
    let mut notes = Vec::new();
    let ns = |ns: Option<u32>| ns.map_or("an unknown distance".to_owned(), |ns| format!("{ns} ns"));
    match (profile, table) {
        (Some(profile), _) => {
            let ago = age(seconds_since(profile.measured_at()));
            notes.push(format!("the curves were measured {ago} ago, at {}", ns(profile.distance_ns)));
            if !profile.is_at(distance_ns) {
                notes.push(format!(
                    "the machine has changed since: {} -> {} between processors; --refit, or tensorwire topo --probe, measures \
                     it as it is now",
                    ns(profile.distance_ns),
                    ns(distance_ns)
                ));
            }
        }
        (None, Ok(_)) => {
            notes.push("the table has no curves: tensorwire topo --probe measures them".to_owned())
        }
        (None, Err(why)) => notes.push(format!("all predictions are from constants: {why}")),
    }
    if left_out > 0 {
        notes.push(format!(
            "{left_out} of the measurements were left out: the processors had another distance then, or were moved"
        ));
    }
    notes
}

impl About<'_> {
    /// Tables; where there are two comparisons, the second is by what was fitted again.
    pub(super) fn text(&self, shown: &[Comparison]) -> String {
        let mut text = String::new();
        let name = if self.built_in { "built-in model" } else { self.model.architecture.model_type() };
        let at =
            self.measured.distance_ns.map_or(String::new(), |ns| format!(", {ns} ns between processors"));
        let passes = self.args.passes;
        // Writing to a string can't fail.
        let _ = writeln!(
            text,
            "{name} over {} ranks by {}; medians of up to {passes} passes{at}",
            self.args.tp,
            self.args.transport.name()
        );
        for (i, comparison) in shown.iter().enumerate() {
            let _ = writeln!(
                text,
                "\n{}predicted from {}",
                if i > 0 { "fitted again: " } else { "" },
                comparison.source
            );
            rows(&mut text, "us a call", &comparison.collectives);
            rows(&mut text, "us a token", &folded(&comparison.parts));
            if let Some([predicted, spent]) = comparison.comm_us.filter(|_| self.args.tp > 1) {
                let _ = writeln!(
                    text,
                    "of the step in collectives: {predicted:.1} us predicted, {spent:.1} us spent, waiting for the others included"
                );
            }
            let _ = writeln!(text, "{}", verdict(comparison));
        }
        for note in &self.notes {
            let _ = writeln!(text, "note: {note}");
        }
        text
    }

    pub(super) fn json(&self, shown: &[Comparison]) -> String {
        let one = |c: &Comparison| json!(c);
        let object: Value = json!({
            "schema": "tensorwire.verify/v1",
            "model": self.model.architecture.model_type(),
            "built_in": self.built_in,
            "ranks": self.args.tp,
            "transport": self.args.transport.name(),
            "distance_ns": self.measured.distance_ns,
            "passes": self.args.passes,
            "stints": self.measured.stints,
            "verified": shown.first().map(one),
            "refitted": shown.get(1).map(one),
            "notes": self.notes,
        });
        format!("{object:#}\n")
    }
}

fn rows(text: &mut String, unit: &str, rows: &[Row]) {
    if rows.is_empty() {
        return;
    }
    let _ = writeln!(text, "{unit:<28}{:>12}{:>12}{:>8}{:>8}", "predicted", "measured", "ratio", "band");
    for row in rows {
        let name = match (row.bytes, row.calls) {
            (Some(bytes), Some(calls)) if calls > 0 => format!("{} {bytes} B, {calls} x", row.what),
            (Some(bytes), _) => format!("{} {bytes} B", row.what),
            _ => row.what.clone(),
        };
        let band = row.band.map_or("none".to_owned(), |band| format!("{:.0} %", (band - 1.0) * 100.0));
        let _ = writeln!(
            text,
            "  {name:<26}{:>12.2}{:>12.2}{:>8.2}{band:>8}",
            row.predicted_us, row.measured_us, row.ratio
        );
    }
}

/// Layers that follow each other and are predicted alike as one row, of their mean.
fn folded(parts: &[Row]) -> Vec<Row> {
    let is_layer = |row: &Row| row.what.starts_with("layer ");
    let alike = |a: &Row, b: &Row| is_layer(a) && is_layer(b) && a.predicted_us == b.predicted_us;
    let fold = |rows: &[Row]| {
        let (first, last, n) = (&rows[0], &rows[rows.len() - 1], rows.len() as f64);
        if rows.len() == 1 {
            return first.clone();
        }
        let mean = |of: fn(&Row) -> f64| rows.iter().map(of).sum::<f64>() / n;
        let what = format!("{} to {}, each", first.what, last.what.trim_start_matches("layer "));
        Row { what, measured_us: mean(|r| r.measured_us), ratio: mean(|r| r.ratio), ..first.clone() }
    };
    parts.chunk_by(alike).map(fold).collect()
}

/// In one line: what is near, and what is farthest.
fn verdict(comparison: &Comparison) -> String {
    let off = |row: &Row| row.ratio.max(1.0 / row.ratio);
    let near = comparison.collectives.iter().filter(|row| off(row) <= NEAR).count();
    let worst = comparison.collectives.iter().max_by(|a, b| off(a).total_cmp(&off(b)));
    let mut text = match worst {
        Some(w) => format!(
            "{near} of {} calls within 25 %; farthest: {} of {} B, {:.2} x what was predicted",
            comparison.collectives.len(),
            w.what,
            w.bytes.unwrap_or(0),
            w.ratio
        ),
        None => String::new(),
    };
    if let Some(step) = comparison.parts.last() {
        let comma = if text.is_empty() { "" } else { "; " };
        text += &format!("{comma}a step took {:.2} x what was predicted", step.ratio);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(what: &str, predicted_us: f64, measured_us: f64) -> Row {
        let ratio = measured_us / predicted_us;
        Row {
            what: what.into(),
            bytes: None,
            calls: None,
            predicted_us,
            band: None,
            measured_us,
            spread: None,
            ratio,
        }
    }

    #[test]
    fn layers_that_are_alike_are_one_row() {
        let parts = [
            row("embedding", 1.0, 1.0),
            row("layer 0", 2.0, 2.0),
            row("layer 1", 2.0, 4.0),
            row("layer 2", 3.0, 3.0),
        ];
        let folded = folded(&parts);
        let names: Vec<&str> = folded.iter().map(|r| r.what.as_str()).collect();
        assert_eq!(names, ["embedding", "layer 0 to 1, each", "layer 2"]);
        assert_eq!((folded[1].measured_us, folded[1].ratio), (3.0, 1.5));
    }

    #[test]
    fn the_farthest_is_named_and_too_fast_is_far_too() {
        let call = |bytes, measured| Row { bytes: Some(bytes), ..row("all_reduce", 10.0, measured) };
        let comparison = Comparison {
            source: String::new(),
            collectives: vec![call(8, 12.0), call(16, 2.0), call(32, 13.0)],
            parts: vec![row("step", 10.0, 11.0)],
            comm_us: None,
        };
        assert_eq!(
            verdict(&comparison),
            "1 of 3 calls within 25 %; farthest: all_reduce of 16 B, 0.20 x what was predicted; a step took 1.10 x what was \
             predicted"
        );
    }

    #[test]
    fn a_machine_that_has_changed_is_told() {
        let profile = Profile { distance_ns: Some(50), ..Profile::default() };
        let told = |ns| notes(Some(&profile), &Err(Absent::Missing), Some(ns), 0).join("; ");
        assert!(told(480).contains("has changed since: 50 ns -> 480 ns"), "{}", told(480));
        assert!(!told(55).contains("changed"), "{}", told(55));
        let none = notes(None, &Err(Absent::Off), None, 2).join("; ");
        assert!(
            none.contains("constants: TENSORWIRE_TABLE is off")
                && none.contains("2 of the measurements were left out"),
            "{none}"
        );
    }
}
