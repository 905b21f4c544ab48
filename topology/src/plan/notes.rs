//! The plan's notes: every replication, padding and imbalance, and what it costs.

use std::collections::BTreeMap;

use super::{Predicted, Span};
use crate::cost::CostModel;
use crate::model::{Cache, Cut, Dimension, ModelSpec, TensorSpec, Use};
use crate::shard::{DimensionShares, Experts, Options, Shares};

/// A note, and what the thing that it tells of costs.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Note {
    pub(super) text: String,
    /// Bytes of weights more, over all ranks.
    pub(super) weight_bytes: u64,
    /// Bytes of KV cache more a token of context, over all ranks.
    pub(super) kv_bytes_per_token: u64,
    /// Time more a decoded token.
    pub(super) us_per_token: f64,
}

impl From<String> for Note {
    /// A note on what costs nothing.
    fn from(text: String) -> Note {
        Note { text, ..Note::default() }
    }
}

/// Notes for a plan with these shares; `one_rank_us` is the predicted time of one rank alone.
pub(super) fn notes(
    spec: &ModelSpec,
    shares: &Shares,
    options: &Options,
    costs: &CostModel,
    predicted: &Predicted,
    one_rank_us: f64,
) -> Vec<Note> {
    let alike = options.speeds.is_empty() && options.memory.is_empty();
    let about = About { spec, shares, costs, world: shares.world, alike };
    let mut notes: Vec<Note> = spec.notes.iter().cloned().map(Note::from).collect();
    if shares.world == 1 {
        notes.push("one rank: nothing is sharded and nothing exchanged".to_owned().into());
    } else {
        notes.extend(unlike(options).map(Note::from));
        notes.extend(about.experts(options).map(Note::from));
        for (id, (d, s)) in spec.dims.iter().zip(&shares.dims).enumerate() {
            notes.extend(about.dimension(id, d, s));
        }
        notes.extend(about.latent());
        notes.extend(about.replicated());
        if one_rank_us <= predicted.decode_us_per_token {
            let text = format!(
                "one rank alone is predicted to be as fast: {} a token instead of {}",
                time(one_rank_us),
                time(predicted.decode_us_per_token)
            );
            let us_per_token = predicted.decode_us_per_token - one_rank_us;
            notes.push(Note { us_per_token, ..text.into() });
        }
    }
    notes.extend(about.unused().map(Note::from));
    if spec.tie_word_embeddings {
        notes.push(
            "the output head is the embedding: one tensor, sharded by vocabulary row".to_owned().into(),
        );
    }
    if !spec.has_weights() {
        let stored = spec.quantization.as_ref().map_or_else(
            || format!("every tensor taken to be {}", spec.dtype),
            |q| format!("linear layers taken to be {}, all else {}", q.format.name(), spec.dtype),
        );
        notes.push(format!("planned from config.json alone, {stored}").into());
    }
    notes.push(format!("predicted times are from {}", costs.source).into());
    notes
}

/// Why shares differ, where ranks aren't alike.
fn unlike(options: &Options) -> Option<String> {
    let speeds = (!options.speeds.is_empty()).then(|| format!("speeds ({})", list(options.speeds.iter())));
    let memory = || list(options.memory.iter().map(|&b| size(b)).collect::<Vec<_>>().iter());
    let limits = (!options.memory.is_empty()).then(|| format!("memory ({})", memory()));
    let given: Vec<String> = speeds.into_iter().chain(limits).collect();
    (!given.is_empty()).then(|| format!("shares follow the ranks' {}", given.join(" and ")))
}

struct About<'a> {
    spec: &'a ModelSpec,
    shares: &'a Shares,
    costs: &'a CostModel,
    world: usize,
    /// Whether ranks are.
    alike: bool,
}

impl About<'_> {
    /// How a dimension is shared, where that is worth a word.
    fn dimension(&self, id: usize, d: &Dimension, shares: &DimensionShares) -> Option<Note> {
        match d.cut {
            Cut::Heads { kv } => {
                let note = self.uneven(id, d, shares)?;
                let evenest = d.size.div_ceil(self.world).next_multiple_of(d.granule);
                let grouped = self.spec.dims[kv].size < d.size;
                let more = extremes(&shares.ranges).0 > evenest && grouped && self.alike;
                let why = if more { "; evener shares would hold more key/value heads" } else { "" };
                Some(Note { text: note.text + why, ..note })
            }
            Cut::KvHeads { .. } => self.kv_heads(id, d, shares),
            Cut::Vocabulary => self.vocabulary(id, d, shares),
            Cut::SharedColumns if !shares.shared => Some(self.whole_shared_expert(id, d)),
            _ if shares.shared => self.uneven(id, d, shares),
            _ => None,
        }
    }

    /// Bytes of all tensors that a dimension cuts.
    fn bytes_of(&self, id: usize) -> u64 {
        let cut_by =
            |t: &&TensorSpec| t.axes.iter().any(|a| a.has(id)) || t.owner.is_some_and(|o| o.dim == id);
        self.spec.tensors.iter().filter(cut_by).map(TensorSpec::bytes).sum()
    }

    /// A note where the largest share is above the mean, with the time the others wait for it.
    fn uneven(&self, id: usize, d: &Dimension, shares: &DimensionShares) -> Option<Note> {
        let (largest, smallest) = extremes(&shares.ranges);
        if largest == smallest {
            return None;
        }
        let (total, ranks) = (d.size, self.shares.parts(d.cut));
        let mean = total as f64 / ranks as f64;
        // Of experts and of their columns, a rank has only a part of what follows the other.
        let held = match d.cut {
            Cut::Experts => self.shares.parts(Cut::ExpertColumns),
            Cut::ExpertColumns => self.shares.parts(Cut::Experts),
            _ => 1,
        };
        let excess = (self.bytes_of(id) as f64 / (total * held) as f64 * (largest as f64 - mean)) as u64;
        let groups = match d.granule {
            1 => String::new(),
            g => format!(" in {} groups of {g}, which are never cut,", d.units()),
        };
        let over = match d.cut {
            Cut::Experts if ranks < self.world => format!("{ranks} groups of ranks"),
            Cut::ExpertColumns if ranks < self.world => format!("the {ranks} ranks of a group"),
            _ => format!("{ranks} ranks"),
        };
        let text = format!(
            "{total} {}{groups} are shared unevenly over {over}, from {largest} down to {smallest}: the \
             largest share is {:.1}% above the mean, {} more to read, about {} a token",
            things(d),
            (largest as f64 / mean - 1.0) * 100.0,
            size(excess),
            time(self.costs.read_us(excess)),
        );
        Some(Note { us_per_token: self.costs.read_us(excess), ..text.into() })
    }

    fn kv_heads(&self, id: usize, d: &Dimension, shares: &DimensionShares) -> Option<Note> {
        let held: usize = shares.ranges.iter().map(Span::len).sum();
        let copies = held - d.size;
        if copies == 0 {
            return None;
        }
        let spec = self.spec;
        // Every duplicated head is one that two neighbours both need.
        let mut twice: Vec<usize> =
            shares.ranges.windows(2).flat_map(|w| w[1].start..w[0].end).collect::<Vec<_>>();
        twice.dedup();
        let part = |t: &TensorSpec| {
            let of_axis = |(axis, &size): (&crate::model::Axis, &usize)| {
                let own = axis.segments.iter().filter(|s| s.dim == id).map(|s| s.len()).sum::<usize>();
                (own > 0).then(|| (u128::from(t.bytes()) * own as u128 / size.max(1) as u128) as u64)
            };
            t.axes.iter().zip(&t.shape).find_map(of_axis).unwrap_or(0)
        };
        let bytes = spec.tensors.iter().map(part).sum::<u64>() / d.size as u64 * copies as u64;
        let attentions = spec.layers.iter().flat_map(|l| &l.blocks).filter_map(|b| b.attention.as_ref());
        let caches = attentions.filter(|a| a.kv_heads == id && a.cache == Cache::Heads && !a.cross);
        let per_head: usize = caches.map(|a| (a.head_dim + a.v_head_dim) * spec.dtype.size()).sum();
        let kv_bytes_per_token = (copies * per_head) as u64;
        let cache = if per_head > 0 {
            format!(" and {} of KV cache a token of context", size(kv_bytes_per_token))
        } else {
            String::new()
        };
        let text = format!(
            "{} on more than one rank: {} of {} ({}), {}: {} of weights{cache} more over all ranks",
            things(d),
            twice.len(),
            d.size,
            list(twice.iter()),
            count(copies, "copy", "copies"),
            size(bytes),
        );
        // A rank's part of the copies.
        let us_per_token = self.costs.read_us(bytes / self.world as u64);
        Some(Note { weight_bytes: bytes, kv_bytes_per_token, us_per_token, ..text.into() })
    }

    fn vocabulary(&self, id: usize, d: &Dimension, vocab: &DimensionShares) -> Option<Note> {
        let rows = d.size;
        if vocab.padded > rows {
            let share = vocab.padded / self.world;
            let extra = vocab.padded - rows;
            let text = format!(
                "vocabulary padded from {rows} to {} rows, {share} a rank, as a multiple of lcm(64, {}): \
                 {extra} rows of zeros ({:.2}%) that no file holds",
                vocab.padded,
                self.world,
                extra as f64 / rows as f64 * 100.0
            );
            // The logits of these rows are gathered too.
            let gather =
                |rows: usize| self.costs.all_gather_us((rows * self.spec.dtype.size()) as u64, self.world);
            let us_per_token =
                if self.spec.logits.is_some() { gather(vocab.padded) - gather(rows) } else { 0.0 };
            return Some(Note { us_per_token, ..text.into() });
        }
        let uneven = self.uneven(id, d, vocab)?;
        if !self.alike {
            return Some(uneven);
        }
        let why = format!("; not padded, as a multiple of lcm(64, {}) would cost more", self.world);
        Some(Note { text: uneven.text + &why, ..uneven })
    }

    fn whole_shared_expert(&self, id: usize, d: &Dimension) -> Note {
        let bytes = self.bytes_of(id);
        let text = format!(
            "whole on every rank: the shared expert, as its {} columns are {} groups of {} for {} ranks: {} a rank, \
             {} more over all ranks",
            d.size,
            d.units(),
            d.granule,
            self.world,
            size(bytes),
            size(bytes.saturating_mul(self.world as u64 - 1)),
        );
        self.whole(text, bytes)
    }

    /// The note on weights that every rank has whole: what that costs, beside sharing them.
    fn whole(&self, text: String, bytes: u64) -> Note {
        let others = self.world as u64 - 1;
        let us_per_token = self.costs.read_us(bytes / self.world as u64 * others);
        Note { weight_bytes: bytes.saturating_mul(others), us_per_token, ..text.into() }
    }

    /// Why experts are shared whole.
    fn experts(&self, options: &Options) -> Option<String> {
        if self.shares.experts == Experts::Tensor {
            return None;
        }
        let columns = self.spec.dims.iter().find(|d| d.cut == Cut::ExpertColumns)?;
        let experts = self.spec.dims.iter().find(|d| d.cut == Cut::Experts)?;
        let (units, world) = (columns.units(), self.world);
        let groups = self.shares.parts(Cut::Experts);
        if groups < world {
            let why = match options.experts {
                Experts::Auto => format!(
                    ", as neither {} experts nor the {units} groups of {} columns of each are enough for {world} ranks",
                    experts.size, columns.granule
                ),
                _ => " as asked for".to_owned(),
            };
            return Some(format!(
                "{} experts are spread over {groups} groups of {} ranks, whose ranks share the columns of each{why}; a \
                 group's load depends on where tokens are routed",
                experts.size,
                world / groups
            ));
        }
        let why = if options.experts == Experts::Parallel {
            "as asked for".to_owned()
        } else if units < world {
            format!(
                "as the {} columns of each are only {units} groups of {}, fewer than {world} ranks",
                columns.size, columns.granule
            )
        } else {
            let share = columns.size as f64 / world as f64;
            let largest = units.div_ceil(world) * columns.granule;
            format!(
                "as {share} columns of each a rank can't be cut, only groups of {}: the largest share would be \
                 {largest}, {:.0}% above the mean",
                columns.granule,
                (largest as f64 / share - 1.0) * 100.0
            )
        };
        Some(format!(
            "experts are shared whole (expert parallel), {} over {world} ranks, {why}; a rank's load depends on \
             where tokens are routed",
            experts.size
        ))
    }

    /// What multi-head latent attention keeps on every rank.
    fn latent(&self) -> Option<Note> {
        let caches = self.spec.layers.iter().flat_map(|l| &l.blocks).filter_map(|b| b.attention.as_ref());
        let latent: usize = caches
            .filter_map(|a| match a.cache {
                Cache::Latent { elements } => Some(elements),
                _ => None,
            })
            .sum();
        (latent > 0).then(|| {
            let bytes = (latent * self.spec.dtype.size()) as u64;
            let copies = bytes * (self.world as u64 - 1);
            let text = format!(
                "whole on every rank: the latent KV cache, which all heads read, {} a token of context and rank, {} \
                 more over all ranks",
                size(bytes),
                size(copies)
            );
            Note { kv_bytes_per_token: copies, ..text.into() }
        })
    }

    /// One note for each kind of tensor that is whole on every rank.
    fn replicated(&self) -> Vec<Note> {
        let kinds = [
            "norms and biases added after a reduction",
            "position and token type embeddings",
            "matrices that every rank needs the whole result of",
        ];
        let kind_of = |t: &&TensorSpec| match t.used {
            _ if t.is_shared() => None,
            Use::Vector => Some(0),
            Use::Lookup => Some(1),
            _ => Some(2),
        };
        let mut found = [(0usize, 0u64), (0, 0), (0, 0)];
        let mut matrices: BTreeMap<&str, ()> = BTreeMap::new();
        for t in &self.spec.tensors {
            if let Some(kind) = kind_of(&t) {
                found[kind] = (found[kind].0 + 1, found[kind].1 + t.bytes());
                if kind == 2 {
                    matrices.insert(self.local_name(t), ());
                }
            }
        }
        let names = matrices.keys().copied().collect::<Vec<_>>();
        let note = |(kind, (n, bytes)): (&str, (usize, u64))| {
            (n > 0).then(|| {
                let which =
                    if kind == kinds[2] { format!(" ({})", list(names.iter())) } else { String::new() };
                let text = format!(
                    "whole on every rank: {kind}{which}, {} in {}",
                    size(bytes),
                    count(n, "tensor", "tensors")
                );
                self.whole(text, bytes)
            })
        };
        kinds.into_iter().zip(found).filter_map(note).collect()
    }

    /// A tensor's name within its layer.
    fn local_name<'t>(&self, t: &'t TensorSpec) -> &'t str {
        let layer = t.layer.and_then(|n| t.name.strip_prefix(self.spec.layers[n].name.as_str()));
        let name = layer.unwrap_or(&t.name).trim_start_matches('.');
        name.strip_suffix(".weight").unwrap_or(name)
    }

    fn unused(&self) -> Option<String> {
        let unused = &self.spec.unused;
        if unused.is_empty() {
            return None;
        }
        let bytes = unused.iter().map(|t| t.bytes).fold(0, u64::saturating_add);
        let result = if self.spec.logits.is_some() { "logits" } else { "embeddings" };
        Some(format!(
            "on no rank, as {result} are computed without: {} ({}), {} in the file",
            count(unused.len(), "tensor", "tensors"),
            list(unused.iter().map(|t| &t.name)),
            size(bytes),
        ))
    }
}

/// What a dimension counts, for a person.
fn things(d: &Dimension) -> String {
    let what = match d.cut {
        Cut::Heads { .. } => "query heads",
        Cut::KvHeads { .. } => "key/value heads",
        Cut::Columns => "feed-forward columns",
        Cut::SharedColumns => "columns of the shared expert",
        Cut::ExpertColumns => "columns of each expert",
        Cut::Experts => "experts",
        Cut::Vocabulary => "vocabulary rows",
    };
    match d.name.split_once('.') {
        Some((stack, _)) => format!("{stack} {what}"),
        None => what.to_owned(),
    }
}

/// The largest and the smallest share.
fn extremes(spans: &[Span]) -> (usize, usize) {
    let shares = spans.iter().map(Span::len);
    (shares.clone().max().unwrap_or(0), shares.min().unwrap_or(0))
}

/// `0, 2, 3`; the first few where they are many.
fn list(items: impl ExactSizeIterator<Item: ToString>) -> String {
    const SHOWN: usize = 16;
    let more = if items.len() > SHOWN { ", ..." } else { "" };
    items.take(SHOWN).map(|item| item.to_string()).collect::<Vec<_>>().join(", ") + more
}

fn count(n: usize, one: &str, many: &str) -> String {
    format!("{n} {}", if n == 1 { one } else { many })
}

/// A time for a person.
pub(crate) fn time(us: f64) -> String {
    if us < 10_000.0 { format!("{us:.1} us") } else { format!("{:.1} ms", us / 1e3) }
}

/// Bytes for a person, in powers of 1000.
pub(crate) fn size(bytes: u64) -> String {
    match bytes {
        0..10_000 => format!("{bytes} B"),
        10_000..1_000_000 => format!("{:.1} kB", bytes as f64 / 1e3),
        1_000_000..10_000_000_000 => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{:.1} GB", bytes as f64 / 1e9),
    }
}
