//! What one arrangement of a model on devices costs and needs.
//!
//! Each [`Part`] of a block takes its slowest rank's time and then its exchanges'. A rank takes
//! `max(bytes / bandwidth, operations / rate)` for it (the roofline of Williams, Waterman and Patterson, 2009): the
//! bytes are those of its weights, of the cache, and of the activations, `5 H` bytes a token for the norm and the
//! residual addition around a part and the part's widest values written and read once; the operations are at the
//! device's peak, so these times are floors. Exchanges are [priced by levels of links](super::exchange).
//!
//! Experts that a pass of `T` tokens touches, of `E` of which each token goes to `k`: `E (1 - (1 - k/E)^T)`, routing
//! being taken as even.
//!
//! `W` waves through `p` pipeline stages take each stage's time once, and the slowest stage's `W - 1` times more.

use super::degrees::{ContextBy, Degrees};
use super::exchange::{all_gather_us, all_reduce_us, all_reduce_wire, all_to_all_us, gather_wire, ring_us};
use super::groups::Group;
use super::machine::{Machine, Worker};
use super::pass::{Pass, Phase};
use super::share::{self, Fraction, Memo, Share};
use super::workload::{Block, Exchange, Part, Split, Workload};

/// What time goes into.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Reading memory: weights, cache, activations.
    Memory,
    /// Operations.
    Compute,
    /// Exchanges of a tensor-parallel group.
    Tp,
    /// Exchanges of a context-parallel group.
    Cp,
    /// The exchange of guidance.
    Cfg,
    /// Exchanges with the experts' ranks.
    Ep,
    /// Passing on to the next stage.
    Pp,
}

impl Cause {
    /// All of them.
    pub const ALL: [Cause; 7] =
        [Cause::Memory, Cause::Compute, Cause::Tp, Cause::Cp, Cause::Cfg, Cause::Ep, Cause::Pp];

    /// As a placement's JSON names it.
    pub fn name(self) -> &'static str {
        match self {
            Cause::Memory => "memory",
            Cause::Compute => "compute",
            Cause::Tp => "tp",
            Cause::Cp => "cp",
            Cause::Cfg => "cfg",
            Cause::Ep => "ep",
            Cause::Pp => "pp",
        }
    }

    /// The axis whose ranks exchange; none for what a device does alone.
    pub fn axis(self) -> Option<&'static str> {
        (!matches!(self, Cause::Memory | Cause::Compute)).then(|| self.name())
    }

    /// For a sentence.
    pub(super) fn in_words(self) -> &'static str {
        match self {
            Cause::Memory => "reading memory",
            Cause::Compute => "computing",
            Cause::Tp | Cause::Cp | Cause::Cfg | Cause::Ep | Cause::Pp => "exchanges",
        }
    }
}

/// Time and bytes sent by a rank, by [`Cause`].
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Tally {
    /// Microseconds.
    pub us: [f64; 7],
    /// Bytes that a rank sends.
    pub wire: [f64; 7],
}

impl Tally {
    /// Microseconds in all.
    pub fn total_us(&self) -> f64 {
        self.us.iter().sum()
    }

    /// Bytes sent in all.
    pub fn total_wire(&self) -> f64 {
        self.wire.iter().sum()
    }

    pub(super) fn add(&mut self, cause: Cause, us: f64, wire: f64) {
        self.us[cause as usize] += us;
        self.wire[cause as usize] += wire;
    }

    pub(super) fn plus(&mut self, other: &Tally, times: f64) {
        for i in 0..self.us.len() {
            self.us[i] += times * other.us[i];
            self.wire[i] += times * other.wire[i];
        }
    }
}

/// Each rank's shares of each part of each block.
pub(super) struct Shares {
    blocks: Vec<Vec<PartShares>>,
    /// The first of all ranks that are alike in device and shares, of each kind: the others cost and need the same.
    pub(super) firsts: Vec<usize>,
    /// Each rank's kind.
    pub(super) which: Vec<usize>,
}

struct PartShares {
    ranks: Vec<Share>,
    /// Whether experts are spread: whole, or over groups of ranks that share each one's columns.
    spread_experts: bool,
    /// Whether these are experts beside which each rank has some of a shared expert's columns.
    with_shared_expert: bool,
}

/// Costs of a model's blocks on a group.
pub(super) struct Pricer<'a> {
    pub workload: &'a Workload,
    pub machine: &'a Machine,
}

impl Pricer<'_> {
    /// How fast each device of a group is with this model: the whole of a pass in its time, relative to the fastest.
    pub(super) fn speeds(&self, workers: &[usize], pass: &Pass) -> Vec<f64> {
        let first = &self.machine.workers[workers[0]];
        if workers.iter().all(|w| self.machine.workers[*w].is_like(first)) {
            return vec![1.0; workers.len()];
        }
        let all = Share { cut: Fraction::ALL, kv: Fraction::ALL };
        let us = |on: &Worker| -> f64 {
            let part = |p: &Part| self.compute_us(p, all, false, pass, &Degrees::ONE, on).iter().sum();
            let blocks: Vec<Vec<f64>> =
                self.workload.blocks.iter().map(|b| b.parts.iter().map(part).collect()).collect();
            self.workload.order.iter().flat_map(|b| &blocks[*b]).sum()
        };
        let (firsts, which) = kinds(workers.len(), |a, b| {
            self.machine.workers[workers[a]].is_like(&self.machine.workers[workers[b]])
        });
        let of_kind: Vec<f64> = firsts.iter().map(|w| us(&self.machine.workers[workers[*w]])).collect();
        let times: Vec<f64> = which.iter().map(|kind| of_kind[*kind]).collect();
        let fastest = times.iter().copied().fold(f64::INFINITY, f64::min);
        times.iter().map(|t| fastest / t).collect()
    }

    /// Shares of devices with these speeds; what runs out if some rank would get nothing.
    pub(super) fn shares(
        &self,
        d: &Degrees,
        workers: &[usize],
        speeds: &[f64],
        memo: &mut Memo,
    ) -> Result<Shares, &'static str> {
        let alike = speeds.iter().all(|s| *s == speeds[0]);
        let mut of = |part: &Part, with_shared_expert: bool| -> Result<PartShares, &'static str> {
            let ranks = match part.split {
                Split::Experts { count, units, .. } if d.ep > 1 => {
                    // Where several groups share them, experts are spread evenly: the largest share counts for all.
                    let alone = vec![1.0; d.ep * d.etp];
                    let among = if d.sharing_experts() > 1 { &alone } else { speeds };
                    share::experts(count, units, among, d.etp).map(|mut s| {
                        s.truncate(d.tp);
                        s
                    })
                }
                split if alike => share::even(split, speeds.len(), memo),
                split => share::weighted(split, speeds),
            };
            let what = part.split.limit().map_or("ranks", |(what, _)| what);
            let spread_experts = d.ep > 1 && matches!(part.split, Split::Experts { .. });
            Ok(PartShares { ranks: ranks.ok_or(what)?, spread_experts, with_shared_expert })
        };
        let mut blocks: Vec<Vec<PartShares>> = Vec::new();
        for block in &self.workload.blocks {
            let cut = |p: &Part| matches!(p.split, Split::Shared { units } if units >= d.tp);
            let shared = block.parts.iter().any(cut);
            blocks.push(block.parts.iter().map(|p| of(p, shared)).collect::<Result<_, _>>()?);
        }
        let (firsts, which) = kinds(workers.len(), |a, b| {
            self.machine.workers[workers[a]].is_like(&self.machine.workers[workers[b]])
                && blocks.iter().flatten().all(|part| part.ranks[a] == part.ranks[b])
        });
        Ok(Shares { blocks, firsts, which })
    }

    /// What one wave through each kind of block costs a group.
    pub(super) fn blocks(&self, shares: &Shares, group: &Group, d: &Degrees, pass: &Pass) -> Vec<Tally> {
        let blocks = self.workload.blocks.iter().zip(&shares.blocks);
        blocks.map(|(block, of)| self.block(block, of, &shares.firsts, group, d, pass)).collect()
    }

    fn block(
        &self,
        block: &Block,
        shares: &[PartShares],
        ranks: &[usize],
        group: &Group,
        d: &Degrees,
        pass: &Pass,
    ) -> Tally {
        let mut tally = Tally::default();
        for (part, shares) in block.parts.iter().zip(shares) {
            let on = |r: &usize| {
                let worker = &self.machine.workers[group.workers[*r]];
                self.compute_us(part, shares.ranks[*r], shares.spread_experts, pass, d, worker)
            };
            let slowest = ranks.iter().map(on).reduce(|a, b| if b[0] + b[1] > a[0] + a[1] { b } else { a });
            let [memory, compute] = slowest.unwrap_or_default();
            tally.add(Cause::Memory, memory, 0.0);
            tally.add(Cause::Compute, compute, 0.0);
            self.exchange_tokens(part, shares, group, d, pass, &mut tally);
            self.exchange_context(part, shares, group, d, pass, memory + compute, &mut tally);
        }
        tally
    }

    /// What a rank takes for a part: for reading, or for computing, whichever takes longer.
    fn compute_us(
        &self,
        part: &Part,
        share: Share,
        spread_experts: bool,
        pass: &Pass,
        d: &Degrees,
        on: &Worker,
    ) -> [f64; 2] {
        let tokens = pass.local_tokens(d.cp);
        // Experts see the tokens of all that share them.
        let seen = if spread_experts { tokens * d.sharing_experts() as f64 } else { tokens };
        let touched = match part.split {
            Split::Experts { count, per_token, .. } => {
                1.0 - (1.0 - per_token as f64 / count as f64).max(0.0).powf(seen)
            }
            _ => 1.0,
        };
        let (cut, kv) = (share.cut.value(), share.kv.value());
        let mut bytes =
            part.cut.reads as f64 * cut * touched + part.kv.reads as f64 * kv + part.whole.reads as f64;
        let work = |work: &super::workload::Work, tokens: f64| {
            work.flops_per_token * tokens + work.flops_per_sequence * pass.sequences
        };
        let mut flops = work(&part.cut, seen) * cut + work(&part.kv, tokens) * kv + work(&part.whole, tokens);
        if let Some(a) = &part.attention {
            bytes += pass.cache_reads(a, d.cp) * if a.kv_whole { 1.0 } else { kv };
            flops += pass.attention_flops(a, d.cp) * cut;
        }
        if part.after == Exchange::Sum {
            let streams = 5.0 * self.workload.stream_bytes as f64 * tokens;
            bytes += if d.sp { streams / d.tp as f64 } else { streams };
        }
        bytes += 2.0 * part.wide_bytes as f64 * cut * seen;
        let (reading, computing) = (bytes / on.bytes_per_us, flops / on.flops_per_us);
        if reading > computing { [reading, 0.0] } else { [0.0, computing] }
    }

    /// What follows a part within a tensor-parallel group and with the experts' ranks.
    fn exchange_tokens(
        &self,
        part: &Part,
        shares: &PartShares,
        group: &Group,
        d: &Degrees,
        pass: &Pass,
        tally: &mut Tally,
    ) {
        let stream = pass.local_tokens(d.cp) * self.workload.stream_bytes as f64;
        let experts = match part.split {
            Split::Experts { per_token, .. } if shares.spread_experts => Some(per_token),
            _ => None,
        };
        if let Some(per_token) = experts {
            // There and back: each rank sends its part of the group's tokens to the ranks of their experts, and those that
            // share an expert's columns all of the same tokens.
            let sent = stream / d.expert_groups() as f64 * per_token as f64;
            tally.add(Cause::Ep, 2.0 * all_to_all_us(&group.ep, sent), 2.0 * gather_wire(d.ep, sent));
        }
        if d.tp == 1 || part.split == Split::Whole {
            return;
        }
        match part.after {
            Exchange::None => {}
            // A rank has the results of its own tokens, and there are no partial sums.
            Exchange::Sum if experts.is_some() && d.etp == 1 && !shares.with_shared_expert => {
                tally.add(Cause::Tp, all_gather_us(&group.tp, stream), gather_wire(d.tp, stream));
            }
            // The bytes are the same, but a reduce-scatter and an all-gather are two steps at least.
            Exchange::Sum if d.sp => {
                tally.add(Cause::Tp, 2.0 * all_gather_us(&group.tp, stream), all_reduce_wire(d.tp, stream));
            }
            Exchange::Sum => {
                tally.add(Cause::Tp, all_reduce_us(&group.tp, stream), all_reduce_wire(d.tp, stream));
            }
            Exchange::Halo { exchanges, bytes, sums, sum_bytes, gather_bytes } => {
                // A rank between two neighbours gets rows of both, at the same time.
                let sides = (d.tp - 1).min(2) as f64;
                let (bytes, sum, gather) = (bytes as f64 * sides, sum_bytes as f64, gather_bytes as f64);
                let halo = group
                    .tp
                    .slowest()
                    .map_or(0.0, |link| exchanges as f64 * link.alpha_us + bytes / link.bytes_per_us);
                let mut us = halo + sums as f64 * all_reduce_us(&group.tp, sum);
                if gather > 0.0 {
                    us += all_gather_us(&group.tp, gather);
                }
                let sent = bytes + sums as f64 * all_reduce_wire(d.tp, sum) + gather_wire(d.tp, gather);
                tally.add(Cause::Tp, pass.sequences * us, pass.sequences * sent);
            }
            Exchange::Gather { row_bytes } => {
                let rows = pass.sequences * row_bytes as f64;
                tally.add(Cause::Tp, all_gather_us(&group.tp, rows), gather_wire(d.tp, rows));
            }
        }
    }

    /// What attention over a divided context exchanges. A ring passes keys and values on while it attends to those it
    /// has, for which `busy` microseconds are there.
    #[allow(clippy::too_many_arguments)]
    fn exchange_context(
        &self,
        part: &Part,
        shares: &PartShares,
        group: &Group,
        d: &Degrees,
        pass: &Pass,
        busy: f64,
        tally: &mut Tally,
    ) {
        let Some(attention) = &part.attention else { return };
        let (queries, keys) = pass.context_bytes(attention, d.cp, d.cp_by);
        if queries + keys == 0.0 {
            return;
        }
        let largest =
            |of: fn(&Share) -> Fraction| shares.ranks.iter().map(|s| of(s).value()).fold(0.0, f64::max);
        let (queries, keys) = (queries * largest(|s| s.cut), keys * largest(|s| s.kv));
        let span = &group.cp;
        match (pass.phase, d.cp_by) {
            (Phase::Decode, _) => {
                tally.add(Cause::Cp, all_reduce_us(span, queries), all_reduce_wire(d.cp, queries))
            }
            (_, ContextBy::Ulysses) => {
                // Queries there and results back, keys, values.
                let us = 2.0 * all_to_all_us(span, queries / 2.0) + 2.0 * all_to_all_us(span, keys / 2.0);
                tally.add(Cause::Cp, us, gather_wire(d.cp, queries + keys));
            }
            (_, ContextBy::Ring) => {
                tally.add(Cause::Cp, (ring_us(span, keys) - busy).max(0.0), (d.cp - 1) as f64 * keys);
            }
        }
    }
}

/// What a rank needs for each kind of block.
#[derive(Clone, Debug, Default)]
pub(super) struct Needs {
    /// Bytes of weights.
    pub weights: u64,
    /// Bytes of cache, for all of the pass's sequences and their whole context.
    pub cache: u64,
    /// Bytes of the widest values.
    pub wide: u64,
    /// The largest part of a tensor.
    pub largest: u64,
    /// Bytes of logits, and of what experts receive.
    pub buffer: u64,
}

impl Pricer<'_> {
    /// What each kind of rank of a group needs for each kind of block, `[rank][block]`, while `pass` runs, with caches
    /// for `cached` tokens.
    pub(super) fn needs(&self, shares: &Shares, d: &Degrees, pass: &Pass, cached: u64) -> Vec<Vec<Needs>> {
        let tokens = pass.local_tokens(d.cp);
        let rank = |block: &Block, shares: &[PartShares], r: usize| {
            let mut needs = Needs::default();
            for (part, shares) in block.parts.iter().zip(shares) {
                let share = shares.ranks[r];
                needs.weights +=
                    share.cut.bytes(part.cut.bytes) + share.kv.bytes(part.kv.bytes) + part.whole.bytes;
                if let (Some(a), super::workload::Kind::Decoder) = (&part.attention, self.workload.kind) {
                    let kv = if a.kv_whole { a.kv_bytes } else { share.kv.bytes(a.kv_bytes) };
                    needs.cache += (u128::from(kv) * u128::from(cached) / d.cp as u128) as u64;
                }
                let seen = if shares.spread_experts { tokens * d.sharing_experts() as f64 } else { tokens };
                let item = if matches!(part.split, Split::Height { .. }) {
                    share.cut.bytes(part.item_bytes)
                } else {
                    part.item_bytes
                };
                let items = item as f64 * pass.sequences;
                needs.wide = needs.wide.max((share.cut.bytes(part.wide_bytes) as f64 * seen + items) as u64);
                let whole = part.largest[1];
                // A tensor may be one expert's, of which a rank has the whole or its columns.
                let cut = match shares.spread_experts {
                    true => part.largest[0].div_ceil(d.etp as u64),
                    false => share.cut.bytes(part.largest[0]),
                };
                needs.largest = needs.largest.max(whole).max(cut);
                let buffer = match (part.after, part.split) {
                    (Exchange::Gather { row_bytes }, _) => (pass.sequences * row_bytes as f64) as u64,
                    (_, Split::Experts { per_token, .. }) if shares.spread_experts => {
                        let sent = tokens / d.expert_groups() as f64 * per_token as f64;
                        (2.0 * sent * self.workload.stream_bytes as f64) as u64
                    }
                    _ => 0,
                };
                needs.buffer = needs.buffer.max(buffer);
            }
            needs
        };
        let blocks = || self.workload.blocks.iter().zip(&shares.blocks);
        let of = |r: &usize| blocks().map(|(block, shares)| rank(block, shares, *r)).collect();
        shares.firsts.iter().map(of).collect()
    }
}

/// The first of each kind of `0..n`, and each one's kind.
fn kinds(n: usize, alike: impl Fn(usize, usize) -> bool) -> (Vec<usize>, Vec<usize>) {
    let mut firsts: Vec<usize> = Vec::new();
    let mut which = Vec::with_capacity(n);
    for one in 0..n {
        let known = firsts.iter().position(|first| alike(*first, one));
        which.push(known.unwrap_or(firsts.len()));
        if known.is_none() {
            firsts.push(one);
        }
    }
    (firsts, which)
}
