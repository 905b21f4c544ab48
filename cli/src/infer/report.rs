//! The result, for a person and for a program.

use std::fmt::Write;

use comfy_table::presets::UTF8_BORDERS_ONLY;
use comfy_table::{CellAlignment, Table};
use serde_json::{Map, Value, json};

use super::group::{Group, Run};
use super::input::{Input, Task};
use super::verify::Verified;
use crate::failure::Failure;

/// Characters of a text that label its row.
const LABEL: usize = 40;

pub(super) struct Report<'a> {
    pub(super) input: &'a Input,
    pub(super) group: &'a Group<'a>,
    pub(super) run: &'a Run,
    /// The unsharded run, and how it compares, unless it was left out.
    pub(super) reference: Option<(&'a Run, &'a Verified)>,
    /// Threads of the unsharded run.
    pub(super) processors: usize,
}

impl Report<'_> {
    /// What follows the plan and the generated text.
    pub(super) fn text(&self) -> Result<String, Failure> {
        let Report { group, run, .. } = self;
        let mut out = String::new();
        if let Task::Embed(texts) = &self.input.task {
            let _ = writeln!(out, "{}\n", similarities(texts, &self.embeddings()?));
        }
        if let Some((reference, verified)) = self.reference {
            let _ = writeln!(out, "{}", self.comparison(reference, verified));
        }
        let sharded = format!("{} x {}", count(group.ranks, "rank"), count(group.threads, "thread"));
        let unsharded = format!("unsharded on {}", count(self.processors, "thread"));
        let mut speed = |what: &str, ours: Option<f64>, theirs: Option<f64>, unit: &str| {
            let Some(ours) = ours else { return };
            let _ = write!(out, "{what:<15} {ours:.3} {unit} on {sharded}");
            let _ = match theirs {
                Some(theirs) => writeln!(out, ", {theirs:.3} {unit} {unsharded}"),
                None => writeln!(out),
            };
        };
        let theirs = self.reference.map(|(reference, _)| reference);
        let first = if run.tokens.is_empty() { "embedding" } else { "prefill" };
        speed(first, Some(run.prefill_s), theirs.map(|r| r.prefill_s), "s");
        speed("decode", run.decode_tokens_per_s, theirs.and_then(|r| r.decode_tokens_per_s), "tokens/s");
        let _ = writeln!(out, "{:<15} {:.1} % of the time", "communication", run.comm_share * 100.0);
        let weights: Vec<_> = run.weight_bytes.iter().map(|b| format!("{:.1}", *b as f64 / 1e6)).collect();
        let _ = writeln!(out, "{:<15} {} MB by rank, held as f32", "weights", weights.join(", "));
        Ok(out)
    }

    fn comparison(&self, reference: &Run, verified: &Verified) -> String {
        let diff = verified.max_abs_diff;
        if let Some(wire) = verified.wire {
            let (same, of) = (verified.equal, self.run.tokens.len());
            let tokens = match same {
                _ if of == 0 => "embeddings".to_owned(),
                _ if verified.equal_tokens() => format!("all {of} tokens equal, logits"),
                _ => format!("the first {same} of {of} tokens equal, logits until then"),
            };
            return format!("sent as {wire}, against the unsharded run: {tokens} differ by up to {diff:.1e}");
        }
        if self.run.tokens.is_empty() {
            return format!(
                "same as the unsharded run: largest difference of an embedding's element {diff:.1e}"
            );
        }
        let (ours, theirs) = (self.run.tokens.len(), reference.tokens.len());
        if !verified.equal_tokens() {
            return format!(
                "DIFFERENT from the unsharded run: {ours} and {theirs} tokens, largest logit difference {diff:.1e}"
            );
        }
        let of = if verified.rows < ours {
            format!(" (of the first {} tokens)", verified.rows)
        } else {
            String::new()
        };
        format!(
            "identical to the unsharded run: all {ours} tokens equal, largest logit difference {diff:.1e}{of}"
        )
    }

    /// One object; its fields are a contract.
    pub(super) fn json(&self) -> Result<String, Failure> {
        let run = self.run;
        let mut object = Map::new();
        let mut set = |name: &str, value: Value| object.insert(name.into(), value);
        set("model_type", json!(self.input.model.spec().architecture.model_type()));
        set("ranks", json!(self.group.ranks));
        set("wire", json!(self.group.args.wire.to_string()));
        set("threads_per_rank", json!(self.group.threads));
        match &self.input.task {
            Task::Embed(texts) => {
                set("texts", json!(texts));
                set("embeddings", json!(self.embeddings()?));
            }
            Task::Generate { text, ids, .. } => {
                set("prompt", json!(text));
                set("prompt_tokens", json!(ids));
                set("tokens", json!(run.tokens));
                set("text", json!(run.text));
            }
        }
        let reference = self.reference.map(|(reference, _)| reference);
        let verified = self.reference.map(|(_, verified)| {
            json!({
                "against": "unsharded",
                "max_abs_diff": verified.max_abs_diff,
                "equal_tokens": verified.equal_tokens(),
                "tokens_equal_until": verified.equal,
                "rows_compared": verified.rows,
            })
        });
        set("verified", json!(verified));
        set(
            "timing",
            json!({
                "prefill_s": run.prefill_s,
                "decode_tokens_per_s": run.decode_tokens_per_s,
                "unsharded_prefill_s": reference.map(|r| r.prefill_s),
                "unsharded_decode_tokens_per_s": reference.and_then(|r| r.decode_tokens_per_s),
                "comm_share": run.comm_share,
            }),
        );
        set("weight_bytes_per_rank", json!(run.weight_bytes));
        Ok(format!("{}\n", Value::Object(object)))
    }

    fn embeddings(&self) -> Result<Vec<Vec<f32>>, Failure> {
        (0..self.run.rows).map(|row| self.run.row(row)).collect()
    }
}

/// `1 rank`, `2 ranks`.
pub(super) fn count(n: usize, what: &str) -> String {
    format!("{n} {what}{}", if n == 1 { "" } else { "s" })
}

/// The cosine similarity of each pair.
fn similarities(texts: &[String], embeddings: &[Vec<f32>]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_BORDERS_ONLY);
    table.set_header(std::iter::once(String::new()).chain((1..=texts.len()).map(|n| n.to_string())));
    for (n, (text, a)) in texts.iter().zip(embeddings).enumerate() {
        let mut label: String =
            text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(LABEL).collect();
        if text.chars().nth(LABEL).is_some() {
            label.push('…');
        }
        let cosines = embeddings.iter().map(|b| format!("{:.3}", cosine(a, b)));
        table.add_row(std::iter::once(format!("{} {label}", n + 1)).chain(cosines));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table
}

/// Of two vectors of unit length.
fn cosine(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(x, y)| x * y).sum()
}
