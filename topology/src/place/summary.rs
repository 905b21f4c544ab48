//! A placement in a few lines, for a person.

use std::fmt::Write;

use super::report::{Alternative, Placement};
use crate::plan::notes::{size, time};

/// How many rejected arrangements are shown.
const SHOWN: usize = 12;

impl Placement {
    /// What was chosen, what it costs, where it goes, and what else there was.
    pub fn summary(&self) -> String {
        let mut out = String::new();
        // Writing to a string can't fail, so these results say nothing.
        let Alternative { name, devices, predicted, tightest, .. } = &self.chosen;
        let _ = writeln!(out, "{} on {}: {name}, {devices} of its devices", self.model, self.fabric);
        let _ = writeln!(
            out,
            "predicted: {} a step, {:.1} tokens of prompts a second, {} on the fullest device",
            time(predicted.step_us),
            predicted.prefill_tokens_per_s,
            size(predicted.peak_bytes)
        );
        for portion in &predicted.step {
            let over = portion.links.as_ref().map_or(String::new(), |l| format!(" over {l} links"));
            let sent = if portion.wire_bytes > 0 {
                format!(", {} a rank", size(portion.wire_bytes))
            } else {
                String::new()
            };
            let _ = writeln!(out, "  {:<8} {}{over}{sent}", portion.of, time(portion.us));
        }
        let of = &tightest.of;
        let _ = writeln!(
            out,
            "tightest: {} with weights {}, KV cache {}, activations {}, buffers {}",
            tightest.device,
            size(of.weights),
            size(of.kv_cache),
            size(of.activations),
            size(of.buffers)
        );
        let _ = writeln!(out, "{} arrangements tried; rejected, the best first:", self.explored);
        for rejected in self.rejected.iter().take(SHOWN) {
            let _ = writeln!(out, "  {rejected}");
        }
        if self.rejected.len() > SHOWN {
            let _ = writeln!(out, "  and {} more in the JSON", self.rejected.len() - SHOWN);
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        out
    }
}
