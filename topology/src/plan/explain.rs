//! Why a plan costs what it costs, what else there was, and what stops more ranks.
//!
//! Every figure is a prediction by the planner's own [cost model](crate::cost). Alternatives that aren't plans of
//! this planner are computed from those that are:
//!
//! * pipeline stages: a token passes all weights in turn, as on one rank, and `n - 1` messages of its row;
//! * copies: one rank, as often as there are ranks;
//! * padded heads: heads of zeros, in whole groups that read one key/value head, until every rank has as many. With
//!   `n` ranks and `k` groups of `g` query heads these are `ceil(k/n)` groups a rank where `n <= k`, else
//!   `ceil(g/r)` heads of one group, with `r = floor(n/k)` ranks a group.

use serde::{Deserialize, Serialize};

use super::notes::{size, time};
use super::{Plan, Planner};
use crate::model::{Cut, MAX_HEADS};
use crate::shard::{Experts, Shares};
use crate::{Error, Result};

/// Tensor parts that may be looked at to compare numbers of ranks: more would take seconds.
const WORK: usize = 4 << 20;

/// Why a plan is as it is.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Explanation {
    /// What a decoded token waits for, in a sentence.
    pub binding: String,
    /// What stops more ranks; nothing where nothing is shared.
    pub limit: Option<Limit>,
    /// The plan itself and what else there was, each with its predicted cost.
    pub alternatives: Vec<Alternative>,
    /// The plan's notes, each with its cost.
    pub notes: Vec<NoteCost>,
}

/// What stops more ranks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Limit {
    /// The field of config.json that counts what runs out first.
    pub constraint: String,
    /// How many there are of it, in groups of `granule`.
    pub size: usize,
    /// How many of it are never cut: the group or block of quantised weights; else 1.
    pub granule: usize,
    /// The most ranks that can be planned for.
    pub most_ranks: usize,
}

/// Something that could be done instead, or the plan itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Alternative {
    /// Such as `tp 4`.
    pub what: String,
    /// Whether it is the plan that is explained.
    pub chosen: bool,
    /// A decoded token, in microseconds; null where it can't be done.
    pub decode_us_per_token: Option<f64>,
    /// The communication in it.
    pub comm_us_per_token: Option<f64>,
    /// Bytes of weights on the rank that has most.
    pub weight_bytes: Option<u64>,
    /// Bytes of KV cache a token of context on the rank that has most.
    pub kv_bytes_per_token: Option<u64>,
    /// How it compares with the plan, or why it can't be done.
    pub why: String,
}

/// A note, and what the thing that it tells of costs beside its absence. What costs nothing has zeros.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NoteCost {
    /// The note.
    pub note: String,
    /// Bytes of weights more, over all ranks.
    pub weight_bytes: u64,
    /// Bytes of KV cache more a token of context, over all ranks.
    pub kv_bytes_per_token: u64,
    /// Time more a decoded token, in microseconds.
    pub us_per_token: f64,
}

impl Planner<'_> {
    /// Why `plan`, which this planner made, is as it is: what binds it, what each note costs, and the alternatives.
    ///
    /// ```
    /// use tensorwire_topology::{ModelSpec, Planner};
    ///
    /// let spec = ModelSpec::from_config(
    ///     r#"{"model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9,
    ///         "num_key_value_heads": 3, "intermediate_size": 1536, "vocab_size": 49152,
    ///         "torch_dtype": "bfloat16"}"#,
    /// )?;
    /// let planner = Planner::new(&spec);
    /// let why = planner.explain(&planner.plan(2)?)?;
    /// assert_eq!(why.limit.unwrap().most_ranks, 9);
    /// // Three query heads of zeros more: two groups a rank.
    /// assert!(why.alternatives.iter().any(|a| a.what == "pad to 12 query heads"));
    /// # Ok::<(), tensorwire_topology::Error>(())
    /// ```
    ///
    /// Errors: those of [`plan`](Planner::plan).
    pub fn explain(&self, plan: &Plan) -> Result<Explanation> {
        let shares = Shares::of(self.spec, plan.world, &self.options)?;
        let limit = self.limit(plan.world);
        let most = limit.as_ref().map_or(plan.world, |l| l.most_ranks);
        let mut alternatives = Vec::new();
        for tp in self.worlds(plan.world, most) {
            let what = format!("tp {tp}");
            alternatives.push(if tp == plan.world {
                Alternative { chosen: true, ..Alternative::of(what, Ok(plan), plan) }
            } else {
                Alternative::of(what, self.outline(tp).as_ref(), plan)
            });
        }
        if plan.world > 1 {
            alternatives.extend(self.other_experts(plan));
            if !self.options.sequence_parallel {
                let other = self.clone().sequence_parallel(true).outline(plan.world);
                let other = Alternative::of("sequence parallel".to_owned(), other.as_ref(), plan);
                alternatives
                    .push(Alternative { why: format!("{}; activations are shared too", other.why), ..other });
            }
            alternatives.extend(self.padded_heads(plan, &shares));
            alternatives.extend(self.stages_and_copies(plan));
        }
        let note = |n: super::notes::Note| NoteCost {
            note: n.text,
            weight_bytes: n.weight_bytes,
            kv_bytes_per_token: n.kv_bytes_per_token,
            us_per_token: super::rounded(n.us_per_token),
        };
        Ok(Explanation {
            binding: binding(plan, limit.as_ref()),
            alternatives,
            notes: self.notes(&shares, &plan.predicted).into_iter().map(note).collect(),
            limit,
        })
    }

    /// What could be done in the place of a plan for `world` ranks that is [refused](Error::TooManyRanks), with what
    /// that is predicted to take, in a line. Nothing if it isn't refused for that.
    pub fn instead_of(&self, world: usize) -> Option<String> {
        let Err(Error::TooManyRanks { nearest, .. }) = Shares::of(self.spec, world, &self.options) else {
            return None;
        };
        let decode = |planner: &Self, n: usize| Some(planner.outline(n).ok()?.predicted.decode_us_per_token);
        let mut ways = Vec::new();
        let fits: Vec<(usize, f64)> =
            self.worlds(nearest, nearest).into_iter().filter_map(|n| Some((n, decode(self, n)?))).collect();
        if let Some((_, us)) = fits.iter().find(|(n, _)| *n == nearest) {
            ways.push(format!("tp {nearest} {}", time(*us)));
        }
        if let Some((n, us)) = fits.iter().min_by(|a, b| a.1.total_cmp(&b.1)).filter(|(n, _)| *n != nearest) {
            ways.push(format!("tp {n}, the fastest, {}", time(*us)));
        }
        let inside = |n: &usize| world.is_multiple_of(*n) && world / n <= self.spec.num_layers;
        if let Some((n, us)) = fits.iter().rev().find(|(n, _)| inside(n)) {
            let stages = world / n;
            ways.push(format!("tp {n} in {stages} pipeline stages {}", time(us + self.hops_us(stages))));
        }
        let parallel = self.clone().experts(Experts::Parallel);
        if let Some(us) = decode(&parallel, world) {
            ways.push(format!("expert parallel {}", time(us)));
        }
        if let Some(heads) =
            self.spec.dims.iter().find(|d| matches!(d.cut, Cut::Heads { .. }) && d.size < world)
        {
            let more = (world as f64 / heads.size as f64 - 1.0) * 100.0;
            ways.push(format!(
                "{} padded to {world} would allow it, for {more:.0}% more attention weights",
                heads.field
            ));
        }
        Some(format!("Predicted for a decoded token: {}", ways.join("; ")))
    }

    /// The first number of ranks above `world` that can't be planned for, less one, and why. What can't be for some
    /// number can't for more.
    fn limit(&self, world: usize) -> Option<Limit> {
        let refused = |n: usize| match Shares::of(self.spec, n, &self.options) {
            Err(Error::TooManyRanks { constraint, size, granule, .. }) => {
                let constraint = constraint.to_owned();
                Some(Limit { constraint, size, granule, most_ranks: n - 1 })
            }
            _ => None,
        };
        // Between what is legal and what isn't.
        let (mut legal, mut not) = (world, refused(MAX_HEADS + 1)?);
        while legal < not.most_ranks {
            let middle = legal + (not.most_ranks + 1 - legal) / 2;
            match refused(middle) {
                Some(limit) => not = limit,
                None => legal = middle,
            }
        }
        Some(not)
    }

    /// The numbers of ranks to compare `world` with: all up to twice as many, or powers of two where that is much
    /// to look at.
    fn worlds(&self, world: usize, most: usize) -> Vec<usize> {
        let last = (2 * world.max(4)).min(most);
        if self.spec.tensors.len().saturating_mul(last * last / 2) <= WORK {
            return (1..=last).collect();
        }
        (1..=world).filter(|n| n.is_power_of_two() || *n == world).collect()
    }

    /// Experts shared in other ways.
    fn other_experts(&self, plan: &Plan) -> Vec<Alternative> {
        if !self.spec.dims.iter().any(|d| d.cut == Cut::Experts) {
            return vec![Alternative::impossible("expert parallel", "the model has no experts".to_owned())];
        }
        let world = plan.world;
        let here = Shares::of(self.spec, world, &self.options).map_or(1, |s| s.parts(Cut::Experts));
        let other = |groups: usize| {
            let what = match (groups, world / groups) {
                (1, _) => "experts' columns shared".to_owned(),
                (_, 1) => "expert parallel".to_owned(),
                (groups, each) => format!("experts over {groups} groups of {each} ranks"),
            };
            let planner = self.clone().experts(Experts::in_groups(groups, world));
            let outline = planner.outline(world);
            // A mixture that can't be isn't worth a line, where both that it is made of have one.
            let mixed = groups > 1 && groups < world;
            (outline.is_ok() || !mixed).then(|| Alternative::of(what, outline.as_ref(), plan))
        };
        (1..=world).filter(|n| world.is_multiple_of(*n) && *n != here).filter_map(other).collect()
    }

    /// Heads of zeros until every rank has as many.
    fn padded_heads(&self, plan: &Plan, shares: &Shares) -> Option<Alternative> {
        let n = plan.world;
        let (q, d) = self.spec.dims.iter().enumerate().find(|(_, d)| matches!(d.cut, Cut::Heads { .. }))?;
        let Cut::Heads { kv } = d.cut else { return None };
        let (heads, groups) = (d.size, self.spec.dims[kv].size);
        let group = heads / groups;
        // Heads and key/value heads of a rank, and heads in all.
        let (of_q, of_kv, all) = if n <= groups {
            let each = groups.div_ceil(n);
            (each * group, each, each * n * group)
        } else {
            let each = group.div_ceil(n / groups);
            (each, 1, each * n)
        };
        if all == heads {
            return None;
        }
        let of_a_head = |dim: usize, size: usize| self.bytes_along(dim) as f64 / size as f64;
        let (a_q, a_kv) = (of_a_head(q, heads), of_a_head(kv, groups));
        let read = |q: usize, kv: usize| q as f64 * a_q + kv as f64 * a_kv;
        let now =
            (0..n).map(|r| read(shares.share(q, r).len(), shares.share(kv, r).len())).fold(0.0, f64::max);
        let more = read(of_q, of_kv) - now;
        let us = plan.predicted.decode_us_per_token + more.signum() * self.costs.read_us(more.abs() as u64);
        let largest = plan.ranks.iter().map(|r| r.weight_bytes).max().unwrap_or(0);
        let all_more = n as f64 * read(of_q, of_kv) - read(heads, groups);
        Some(Alternative {
            what: format!("pad to {all} query heads"),
            chosen: false,
            decode_us_per_token: Some(super::rounded(us)),
            comm_us_per_token: Some(plan.predicted.comm_us_per_token),
            weight_bytes: Some((largest as f64 + more).max(0.0) as u64),
            kv_bytes_per_token: None,
            why: format!("{}; {} of weights more in all", compared(us, plan), size(all_more.max(0.0) as u64)),
        })
    }

    /// Pipeline stages, and copies of the model.
    fn stages_and_copies(&self, plan: &Plan) -> Vec<Alternative> {
        let (n, one) = (plan.world, self.one_rank_us());
        let Ok(whole) = self.outline(1) else { return Vec::new() };
        let (weights, cache) = (whole.ranks[0].weight_bytes, whole.ranks[0].kv_bytes_per_token);
        let of = |what, us: f64, comm: f64, ways: usize, more: &str| Alternative {
            what,
            chosen: false,
            decode_us_per_token: Some(super::rounded(us)),
            comm_us_per_token: Some(super::rounded(comm)),
            weight_bytes: Some(weights / ways as u64),
            kv_bytes_per_token: Some(cache / ways as u64),
            why: format!("{}; {more}", compared(us, plan)),
        };
        let stages = if n <= self.spec.num_layers {
            let hops = self.hops_us(n);
            of(format!("{n} pipeline stages"), one + hops, hops, n, "but as many tokens at once")
        } else {
            let why = format!("the model has {} layers", self.spec.num_layers);
            Alternative::impossible(&format!("{n} pipeline stages"), why)
        };
        vec![stages, of(format!("{n} copies"), one, 0.0, 1, "but as many tokens at once")]
    }

    /// A token's row on its way through pipeline stages.
    fn hops_us(&self, stages: usize) -> f64 {
        let row = (self.spec.hidden_size * self.spec.dtype.size()) as u64;
        // Half of what two ranks gather comes from the other: a message of a row.
        self.costs.all_gather_us(2 * row, 2) * (stages - 1) as f64
    }

    /// Bytes of weights that lay out a dimension.
    fn bytes_along(&self, dim: usize) -> u64 {
        let part = |t: &crate::model::TensorSpec| {
            let of_axis = |(axis, size): (&crate::model::Axis, &usize)| {
                let own: usize = axis.segments.iter().filter(|s| s.dim == dim).map(|s| s.len()).sum();
                (own > 0).then(|| (u128::from(t.bytes()) * own as u128 / (*size).max(1) as u128) as u64)
            };
            t.axes.iter().zip(&t.shape).find_map(of_axis).unwrap_or(0)
        };
        self.spec.tensors.iter().map(part).sum()
    }
}

impl Alternative {
    fn of(what: String, other: Result<&Plan, &Error>, plan: &Plan) -> Alternative {
        let other = match other {
            Ok(other) => other,
            Err(Error::TooManyRanks { constraint, size, granule, .. }) => {
                return Alternative::impossible(&what, few(constraint, *size, *granule));
            }
            Err(e) => return Alternative::impossible(&what, e.to_string()),
        };
        let us = other.predicted.decode_us_per_token;
        Alternative {
            what,
            chosen: false,
            decode_us_per_token: Some(us),
            comm_us_per_token: Some(other.predicted.comm_us_per_token),
            weight_bytes: other.ranks.iter().map(|r| r.weight_bytes).max(),
            kv_bytes_per_token: other.ranks.iter().map(|r| r.kv_bytes_per_token).max(),
            why: if std::ptr::eq(other, plan) { "this plan".to_owned() } else { compared(us, plan) },
        }
    }

    /// As a line of a table.
    pub(super) fn cells(&self) -> [String; 6] {
        let us = |us: Option<f64>| us.map_or("-".to_owned(), time);
        let bytes = |bytes: Option<u64>| bytes.map_or("-".to_owned(), size);
        [
            self.what.clone(),
            us(self.decode_us_per_token),
            us(self.comm_us_per_token),
            bytes(self.weight_bytes),
            bytes(self.kv_bytes_per_token),
            self.why.clone(),
        ]
    }

    fn impossible(what: &str, why: String) -> Alternative {
        Alternative {
            what: what.to_owned(),
            chosen: false,
            decode_us_per_token: None,
            comm_us_per_token: None,
            weight_bytes: None,
            kv_bytes_per_token: None,
            why,
        }
    }
}

impl NoteCost {
    /// What it costs, in words; nothing if it costs nothing.
    pub(super) fn costs(&self) -> String {
        let costs = [
            (self.weight_bytes > 0).then(|| format!("{} of weights", size(self.weight_bytes))),
            (self.kv_bytes_per_token > 0)
                .then(|| format!("{} of KV cache a token", size(self.kv_bytes_per_token))),
            (self.us_per_token > 0.0).then(|| format!("{} a token", time(self.us_per_token))),
        ];
        costs.into_iter().flatten().collect::<Vec<_>>().join(", ")
    }
}

/// How many there are of what runs out.
fn few(constraint: &str, size: usize, granule: usize) -> String {
    let groups = if granule > 1 { format!(" groups of {granule}") } else { String::new() };
    format!("{constraint} = {size}{groups}")
}

/// How a time compares with the plan's.
fn compared(us: f64, plan: &Plan) -> String {
    match us / plan.predicted.decode_us_per_token {
        ratio if ratio > 1.005 => format!("slower, {ratio:.2} x the time"),
        ratio if ratio < 0.995 => format!("faster, {ratio:.2} x the time"),
        _ => "as fast".to_owned(),
    }
}

/// What a decoded token waits for.
fn binding(plan: &Plan, limit: Option<&Limit>) -> String {
    let (all, comm) = (plan.predicted.decode_us_per_token, plan.predicted.comm_us_per_token);
    let part = |us: f64| us / all.max(f64::MIN_POSITIVE) * 100.0;
    let reading = all - comm;
    let more = match limit {
        Some(l) if l.most_ranks <= plan.world => {
            format!("no more ranks are possible, as {}", few(&l.constraint, l.size, l.granule))
        }
        _ => "more ranks read less each".to_owned(),
    };
    let slowest = plan.ranks.iter().max_by_key(|r| (r.weight_bytes, std::cmp::Reverse(r.rank)));
    let slowest = slowest.map_or(String::new(), |r| format!(" (rank {}, {})", r.rank, size(r.weight_bytes)));
    if comm > reading {
        format!(
            "exchanges, {:.0}% of a token's time, {}: more ranks don't shorten them",
            part(comm),
            time(comm)
        )
    } else {
        format!(
            "reading weights, {:.0}% of a token's time, {}, on the rank that has most{slowest}: {more}",
            part(reading),
            time(reading)
        )
    }
}

/// Lines of a terminal.
const COLUMNS: usize = 100;
/// Alternatives of one kind that a person reads.
const SHOWN: usize = 12;

impl Explanation {
    /// For a person, in lines of at most 100 columns.
    pub fn text(&self) -> String {
        let mut text = wrapped(&format!("waits for {}", self.binding), "  ");
        if let Some(limit) = self.limit_text() {
            text.push_str(&wrapped(&format!("limit: {limit}"), "  "));
        }
        text.push_str("alternatives, with what a decoded token is predicted to take:\n");
        text.push_str(&row(["", "a token", "exchanges", "weights", "KV a token", ""].map(str::to_owned)));
        for alternative in self.shown() {
            text.push_str(&row(alternative.cells()));
        }
        text.push_str("notes, with what they cost over all ranks:\n");
        for note in &self.notes {
            text.push_str(&wrapped(&format!("  {}", note.note), "    "));
            let costs = note.costs();
            if !costs.is_empty() {
                text.push_str(&wrapped(&format!("    costs {costs}"), "      "));
            }
        }
        text
    }

    /// What stops more ranks.
    pub(super) fn limit_text(&self) -> Option<String> {
        let l = self.limit.as_ref()?;
        let few = few(&l.constraint, l.size, l.granule);
        Some(format!("at most {} ranks, as {few}, and each rank needs at least one", l.most_ranks))
    }

    /// The alternatives for a person: of many numbers of ranks, powers of two, those beside the plan's, the fastest
    /// and the last.
    fn shown(&self) -> Vec<&Alternative> {
        let tp = |a: &Alternative| a.what.strip_prefix("tp ").and_then(|n| n.parse::<usize>().ok());
        let all = self.alternatives.iter();
        let count = all.clone().filter(|a| tp(a).is_some()).count();
        let chosen = all.clone().find(|a| a.chosen).and_then(tp).unwrap_or(0);
        let fastest = all
            .clone()
            .filter(|a| tp(a).is_some())
            .filter_map(|a| a.decode_us_per_token)
            .fold(f64::MAX, f64::min);
        let worth = |a: &&Alternative| match tp(a) {
            Some(n) if count > SHOWN => {
                n.is_power_of_two() || n.abs_diff(chosen) < 2 || a.decode_us_per_token == Some(fastest)
            }
            _ => true,
        };
        all.filter(worth).collect()
    }
}

impl Plan {
    /// The plan's [JSON](Plan::to_json) with an explanation in the field `explain`.
    pub fn to_json_with(&self, explain: &Explanation) -> String {
        #[derive(Serialize)]
        struct Explained<'a> {
            #[serde(flatten)]
            plan: &'a Plan,
            explain: &'a Explanation,
        }
        super::json::lines(&Explained { plan: self, explain })
    }

    /// The plan's [summary](Plan::summary) with an explanation in the place of the notes, in lines of at most 100
    /// columns.
    pub fn summary_with(&self, explain: &Explanation) -> String {
        let shares: String = self.shares_text().lines().map(|line| wrapped(line, "    ")).collect();
        shares + &explain.text()
    }
}

/// A line of the table of alternatives.
fn row([what, us, comm, weights, cache, why]: [String; 6]) -> String {
    let start = format!("  {what:<24} {us:>10} {comm:>10} {weights:>10} {cache:>10}  ");
    let indent = " ".repeat(start.len());
    wrapped(&(start + &why), &indent)
}

/// A text in lines of at most 100 columns, those after the first indented.
pub(super) fn wrapped(text: &str, indent: &str) -> String {
    let (mut lines, mut line) = (String::new(), String::new());
    // Spaces stay where they are, at the start and in tables.
    for word in text.split_inclusive(' ') {
        if line.len() + word.trim_end().len() > COLUMNS && line.len() > indent.len() {
            lines = lines + line.trim_end() + "\n";
            line = indent.to_owned();
        }
        line.push_str(word);
    }
    lines + line.trim_end() + "\n"
}
