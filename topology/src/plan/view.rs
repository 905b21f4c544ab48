//! What a plan says, in the order in which a token passes through the model: what pictures and pages draw.

use super::{Collective, Layer, Plan, Span};

/// A part of the model, and what the ranks exchange after it.
pub(super) struct Stage<'a> {
    /// Such as `attention`.
    pub(super) title: &'static str,
    /// What its ranks share.
    pub(super) rows: Vec<Row<'a>>,
    /// In order.
    pub(super) exchanges: Vec<&'a Collective>,
}

/// Consecutive stages that happen as often as each other.
pub(super) struct Group<'a> {
    /// Such as `layers 0 to 31`; nothing for what is outside the layers.
    pub(super) title: String,
    /// How many layers.
    pub(super) times: usize,
    /// In order.
    pub(super) stages: Vec<Stage<'a>>,
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
}

impl Row<'_> {
    /// On how many ranks the `index`th is.
    pub(super) fn holders(&self, index: usize) -> usize {
        self.held.iter().filter(|s| s.start <= index && index < s.end).count()
    }

    /// The largest and the smallest share.
    pub(super) fn extremes(&self) -> (usize, usize) {
        let shares = self.held.iter().map(Span::len);
        (shares.clone().max().unwrap_or(0), shares.min().unwrap_or(0))
    }
}

/// The whole model, first to last.
pub(super) fn groups(plan: &Plan) -> Vec<Group<'_>> {
    let (m, vocab) = (&plan.model, &plan.vocab);
    let rows =
        || vec![Row { what: "vocabulary rows", total: m.vocab_size, countable: false, held: &vocab.ranges }];
    let outside = |title, exchanges: &'static str| Group {
        title: String::new(),
        times: 1,
        stages: vec![Stage {
            title,
            rows: rows(),
            exchanges: vocab.collectives.iter().filter(|c| c.op == exchanges).collect(),
        }],
    };
    let mut groups = vec![outside("embedding", "all_reduce")];
    let mut start = 0;
    while start < plan.layers.len() {
        let first = &plan.layers[start];
        let like_first = |l: &&Layer| {
            (&l.attention, &l.mlp, &l.collectives) == (&first.attention, &first.mlp, &first.collectives)
        };
        let times = plan.layers[start..].iter().take_while(like_first).count();
        let title = match times {
            1 => format!("layer {start}"),
            _ => format!("layers {start} to {}", start + times - 1),
        };
        groups.push(Group { title, times, stages: layer(plan, first) });
        start += times;
    }
    if vocab.collectives.iter().any(|c| c.op == "all_gather") || plan.world == 1 {
        groups.push(outside("output head", "all_gather"));
    }
    groups
}

fn layer<'a>(plan: &'a Plan, layer: &'a Layer) -> Vec<Stage<'a>> {
    let m = &plan.model;
    let (q, kv) = (&layer.attention.q_heads, &layer.attention.kv_heads);
    let attention = vec![
        Row { what: "query heads", total: m.num_attention_heads, countable: true, held: q },
        Row { what: "key/value heads", total: m.num_key_value_heads, countable: true, held: kv },
    ];
    let ffn = Row { what: "ffn columns", total: m.intermediate_size, countable: false, held: &layer.mlp.ffn };
    // A block whose two halves run in parallel has one exchange for both.
    let halves = layer.collectives.len().saturating_sub(1);
    let (first, second) = layer.collectives.split_at(halves);
    vec![
        Stage { title: "attention", rows: attention, exchanges: first.iter().collect() },
        Stage { title: "feed-forward", rows: vec![ffn], exchanges: second.iter().collect() },
    ]
}

/// A range as people write it: the first and the last.
pub(super) fn ranges(span: Span) -> String {
    match span.len() {
        0 => "none".to_owned(),
        1 => span.start.to_string(),
        _ => format!("{} to {}", span.start, span.end - 1),
    }
}
