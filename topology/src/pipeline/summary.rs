//! A pipeline's plan in a few lines, for a person.

use std::fmt::Write;

use super::plan::PipelinePlan;
use crate::plan::notes::{size, time};

impl PipelinePlan {
    /// When each stage runs, where each model goes, and how full the devices are.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        // Writing to a string can't fail, so these results say nothing.
        let _ = writeln!(out, "{} on {}: {} a request", self.pipeline, self.fabric, time(self.request_us));
        for stage in &self.stages {
            let model = stage.model.as_deref().unwrap_or("no device");
            let _ = writeln!(
                out,
                "  {:<32} {:<20} at {:>12}, takes {}",
                stage.name,
                model,
                time(stage.start_us),
                time(stage.us)
            );
        }
        let _ = writeln!(out, "models:");
        for model in &self.models {
            let names: Vec<&str> = model.ranks.iter().map(|r| r.name.as_str()).collect();
            let on = match names.as_slice() {
                [] => String::new(),
                [one] => (*one).to_owned(),
                [first, .., last] => format!("{} devices from {first} to {last}", names.len()),
            };
            let weights = model.ranks.iter().map(|r| r.memory.weights).max().unwrap_or(0);
            let _ = writeln!(
                out,
                "  {:<20} {:<24} on {on}, {} of weights a rank, {} sent a rank and step",
                model.name,
                model.chosen.name,
                size(weights),
                size(model.chosen.predicted.wire_bytes_per_rank_step)
            );
        }
        let _ = writeln!(out, "devices:");
        for device in &self.devices {
            let has = device.has_bytes.map_or("an unknown amount".to_owned(), size);
            let _ = writeln!(
                out,
                "  {}: {} of {has} at the highest point, {} of it weights",
                device.name,
                size(device.peak_bytes),
                size(device.weight_bytes)
            );
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}
