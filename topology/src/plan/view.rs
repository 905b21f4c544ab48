//! What a plan says, in the order in which a token passes through the model: what pictures and pages draw.

use super::{Attention, Collective, Layer, Mlp, Plan, Span};

/// Layers that are shared alike, or what is outside the layers.
pub(super) struct Group<'a> {
    /// Such as `model.layers.0 to 31`; nothing for what is outside the layers.
    pub(super) title: String,
    /// How many layers.
    pub(super) times: usize,
    /// In order.
    pub(super) stages: Vec<Stage<'a>>,
}

/// A part of the model, and what the ranks exchange after it.
pub(super) struct Stage<'a> {
    /// What its ranks share.
    pub(super) rows: Vec<Row<'a>>,
    /// In order.
    pub(super) exchanges: Vec<&'a Collective>,
}

/// Something that ranks share.
pub(super) struct Row<'a> {
    /// Such as `query heads`.
    pub(super) what: &'static str,
    /// How many there are.
    pub(super) total: usize,
    /// Whether they are few and big, as heads are, or many and small, as columns are.
    pub(super) countable: bool,
    /// What each rank has, in rank order.
    pub(super) held: &'a [Span],
    /// Whether what several ranks have are copies: not so of experts and their columns, of which each has a part.
    copies: bool,
}

impl<'a> Row<'a> {
    fn new(what: &'static str, countable: bool, held: &'a [Span]) -> Row<'a> {
        // Ranges ascend, and the last ones reach the end.
        Row { what, total: held.last().map_or(0, |s| s.end), countable, held, copies: true }
    }

    /// On how many ranks the `index`th is, or copies of it.
    pub(super) fn holders(&self, index: usize) -> usize {
        if self.copies { self.held.iter().filter(|s| s.contains(index)).count() } else { 1 }
    }

    /// How many copies there are of anything.
    pub(super) fn copies(&self) -> usize {
        let held: usize = self.held.iter().map(Span::len).sum();
        if self.copies { held - self.total } else { 0 }
    }

    /// The largest and the smallest share.
    pub(super) fn extremes(&self) -> (usize, usize) {
        let shares = self.held.iter().map(Span::len);
        (shares.clone().max().unwrap_or(0), shares.min().unwrap_or(0))
    }
}

/// The whole model, first to last.
pub(super) fn groups(plan: &Plan) -> Vec<Group<'_>> {
    let (embedding, head) = vocabulary(plan);
    let outside = |what, exchanges| {
        let rows = vec![Row::new(what, false, &plan.vocab.ranges)];
        Group { title: String::new(), times: 1, stages: vec![Stage { rows, exchanges }] }
    };
    let mut groups = Vec::new();
    if !plan.vocab.ranges.is_empty() {
        groups.push(outside("embedding: vocabulary rows", embedding));
    }
    let mut start = 0;
    while start < plan.layers.len() {
        let first = &plan.layers[start];
        let times = plan.layers[start..].iter().take_while(|l| alike(l, first)).count();
        let title = match times {
            1 => first.name.clone(),
            _ => format!("{} to {}", first.name, in_list(&plan.layers[start + times - 1]).1),
        };
        groups.push(Group { title, times, stages: stages(first) });
        start += times;
    }
    if !head.is_empty() {
        groups.push(outside("output head: vocabulary rows", head));
    }
    groups
}

/// What is exchanged after the embedding, and what after the output head: the logits, which are gathered.
fn vocabulary(plan: &Plan) -> (Vec<&Collective>, Vec<&Collective>) {
    let all = &plan.vocab.collectives;
    let ends = match all.as_slice() {
        // Where the sequence is shared, the embedding's rows are gathered too.
        [.., before, last] => last.op == "all_gather" && before.after != last.after,
        [last] => last.op == "all_gather",
        [] => false,
    };
    let (embedding, head) = all.split_at(all.len() - usize::from(ends));
    (embedding.iter().collect(), head.iter().collect())
}

/// Whether two layers of one list are shared alike.
fn alike(a: &Layer, b: &Layer) -> bool {
    in_list(a).0 == in_list(b).0
        && (&a.attention, &a.cross_attention) == (&b.attention, &b.cross_attention)
        && (&a.mlp, &a.collectives) == (&b.mlp, &b.collectives)
}

/// The name of the list that a layer is in, and its number there.
fn in_list(layer: &Layer) -> (&str, &str) {
    layer.name.rsplit_once('.').unwrap_or((&layer.name, &layer.name))
}

/// A layer's parts that share something, each with the exchanges that follow it.
fn stages(layer: &Layer) -> Vec<Stage<'_>> {
    let cross = layer.cross_attention.as_ref();
    let parts = [
        attention(&layer.attention, ["heads", "query heads", "key/value heads"]),
        cross.map_or_else(Vec::new, |a| {
            attention(
                a,
                ["heads on the context", "query heads on the context", "the context's key/value heads"],
            )
        }),
        feed_forward(&layer.mlp),
    ];
    let stage = |rows| Stage { rows, exchanges: Vec::new() };
    let mut stages: Vec<Stage<'_>> = parts.into_iter().filter(|rows| !rows.is_empty()).map(stage).collect();
    // What is exchanged after one module follows the part that the module ends. A block whose parts run in
    // parallel has one exchange for both, after the last.
    let mut by_module: Vec<Vec<&Collective>> = Vec::new();
    for exchange in &layer.collectives {
        let same = |c: &&Collective| module(&c.after) == module(&exchange.after);
        match by_module.last_mut() {
            Some(last) if last.last().is_some_and(same) => last.push(exchange),
            _ => by_module.push(vec![exchange]),
        }
    }
    let spare = stages.len().saturating_sub(by_module.len());
    for (i, exchanges) in by_module.into_iter().enumerate() {
        let last = stages.len().saturating_sub(1);
        if let Some(stage) = stages.get_mut((i + spare).min(last)) {
            stage.exchanges.extend(exchanges);
        }
    }
    stages
}

/// The module that an exchange follows, without what is exchanged of it.
fn module(after: &str) -> &str {
    after.split(':').next().unwrap_or(after)
}

fn attention<'a>(a: &'a Attention, [both, q, kv]: [&'static str; 3]) -> Vec<Row<'a>> {
    match (a.q_heads.is_empty(), a.q_heads == a.kv_heads) {
        (true, _) => Vec::new(),
        (_, true) => vec![Row::new(both, true, &a.q_heads)],
        _ => vec![Row::new(q, true, &a.q_heads), Row::new(kv, true, &a.kv_heads)],
    }
}

fn feed_forward(mlp: &Mlp) -> Vec<Row<'_>> {
    let of_experts = !mlp.shared_ffn.is_empty() || !mlp.experts.is_empty();
    let columns = if of_experts { "columns of each expert" } else { "ffn columns" };
    let all = [
        Row { copies: false, ..Row::new("experts", true, &mlp.experts) },
        Row { copies: mlp.experts.is_empty(), ..Row::new(columns, false, &mlp.ffn) },
        Row::new("shared expert's columns", false, &mlp.shared_ffn),
    ];
    all.into_iter().filter(|row| !row.held.is_empty()).collect()
}

/// A range as people write it: the first and the last.
pub(super) fn ranges(span: Span) -> String {
    match span.len() {
        0 => "none".to_owned(),
        1 => span.start.to_string(),
        _ => format!("{} to {}", span.start, span.end - 1),
    }
}
