//! The plan in a few lines, for a person.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::notes::{size, time};
use super::{Collective, Plan, Span};

impl Plan {
    /// The plan in a few lines: shares, weights, exchanges, prediction and notes.
    pub fn summary(&self) -> String {
        let notes = self.notes.iter().map(|note| format!("note: {note}\n"));
        self.shares_text() + &notes.collect::<String>()
    }

    /// The summary without the notes.
    pub(super) fn shares_text(&self) -> String {
        let m = &self.model;
        let mut out = String::new();
        // Writing to a string can't fail, so these results say nothing.
        let _ = writeln!(
            out,
            "{}: {} layers, hidden {}, {} query and {} key/value heads of {}, ffn {}, vocabulary {}, {}, \
             {:.1} M parameters",
            m.model_type,
            m.num_layers,
            m.hidden_size,
            m.num_attention_heads,
            m.num_key_value_heads,
            m.head_dim,
            m.intermediate_size,
            m.vocab_size,
            m.dtype,
            m.parameters as f64 / 1e6
        );
        let _ = writeln!(
            out,
            "over {} rank{}, each rank's share in rank order:",
            self.world,
            if self.world == 1 { "" } else { "s" }
        );
        for d in self.dimensions.iter().filter(|d| d.shared) {
            let what = match d.name.as_str() {
                "heads" => "query heads",
                "kv_heads" => "key/value heads",
                "ffn" => "ffn columns",
                "vocab" => "vocabulary rows",
                other => other,
            };
            let _ = writeln!(out, "  {what:<16} {}", lengths(&d.ranges));
        }
        let _ = writeln!(out, "  weights          {}", runs(self.ranks.iter().map(|r| size(r.weight_bytes))));
        if self.ranks.iter().any(|r| r.kv_bytes_per_token > 0) {
            let _ = writeln!(
                out,
                "  KV cache a token {}",
                runs(self.ranks.iter().map(|r| size(r.kv_bytes_per_token)))
            );
        }
        let _ = writeln!(out, "exchanged a token: {}", self.exchanges());
        let _ = writeln!(
            out,
            "predicted: {} a token, {} of it communication",
            time(self.predicted.decode_us_per_token),
            time(self.predicted.comm_us_per_token)
        );
        out
    }

    /// How many collectives of each kind and payload a token takes.
    fn exchanges(&self) -> String {
        let mut kinds: BTreeMap<(&str, u64), usize> = BTreeMap::new();
        let all = self.layers.iter().flat_map(|l| &l.collectives).chain(&self.vocab.collectives);
        for Collective { op, bytes_per_token, .. } in all {
            *kinds.entry((op, *bytes_per_token)).or_default() += 1;
        }
        let kind = |((op, bytes), count): (&(&str, u64), &usize)| format!("{count} {op} of {}", size(*bytes));
        if kinds.is_empty() {
            "nothing".to_owned()
        } else {
            kinds.iter().map(kind).collect::<Vec<_>>().join(", ")
        }
    }
}

fn lengths(spans: &[Span]) -> String {
    runs(spans.iter().map(|s| s.len().to_string()))
}

/// `58 x3, 57`: equal neighbours once.
fn runs(items: impl Iterator<Item = String>) -> String {
    let mut runs: Vec<(String, usize)> = Vec::new();
    for item in items {
        match runs.last_mut() {
            Some((last, count)) if *last == item => *count += 1,
            _ => runs.push((item, 1)),
        }
    }
    let run =
        |(item, count): &(String, usize)| if *count == 1 { item.clone() } else { format!("{item} x{count}") };
    runs.iter().map(run).collect::<Vec<_>>().join(", ")
}
