//! What the ranks exchange, and with what payload.

use super::{Collective, Planner, rounded, stream_name};
use crate::model::{Block, ExpertsSpec, Stream};
use crate::shard::{Experts, Shares};

impl Planner<'_> {
    /// A layer's exchanges, in order.
    pub(super) fn layer_collectives(&self, n: usize, shares: &Shares) -> Vec<Collective> {
        if shares.world == 1 {
            return Vec::new();
        }
        let layer = &self.spec.layers[n];
        let mut all = Vec::new();
        for block in &layer.blocks {
            if block.attention.as_ref().is_some_and(|a| a.norm_across_heads) {
                // Each rank has the sum of squares of its heads, of queries and of keys.
                all.push(self.collective("all_reduce", "sum of squares", 2 * 4, layer.stream, shares.world));
            }
            match block.experts {
                Some(experts) if shares.experts != Experts::Tensor => {
                    self.expert_exchange(block, experts, layer.stream, shares, &mut all);
                }
                _ => {
                    for sum in &block.sums {
                        self.sum(&sum.after, sum.stream, shares.world, &mut all);
                    }
                }
            }
        }
        all
    }

    /// Expert parallel: the ranks divide the tokens, send each to the ranks of its experts, and get the results
    /// back. Then a rank has the results of its own tokens. Where a shared expert's columns are shared too, its
    /// partial sums are of all tokens, and one all-reduce both sums these and hands round those (a rank adds zeros
    /// for others' tokens); else the tokens are gathered, unless the sequence is shared anyway.
    ///
    /// Where groups of ranks have the experts, the groups divide the tokens, each rank exchanges with those in its place
    /// in other groups, and gets parts of the sum back, which one all-reduce sums and hands round.
    fn expert_exchange(
        &self,
        block: &Block,
        experts: ExpertsSpec,
        stream: Stream,
        shares: &Shares,
        all: &mut Vec<Collective>,
    ) {
        let world = shares.world;
        let groups = shares.experts.groups(world);
        let there = self.row() * (experts.per_token * world / groups) as u64;
        let after = block.sums.first().map_or("", |s| s.after.as_str());
        for what in ["dispatch", "combine"] {
            let name = format!("{after}: {what}");
            all.push(self.collective_among("all_to_all", &name, there, stream, world, groups));
        }
        if groups < world || experts.shared.is_some_and(|dim| shares.dims[dim].shared) {
            self.sum(after, stream, world, all);
        } else {
            // With a shared sequence, this is the all-gather before the next block.
            all.push(self.collective("all_gather", after, self.row(), stream, world));
        }
    }

    /// What sums a row-parallel product over the ranks.
    fn sum(&self, after: &str, stream: Stream, world: usize, all: &mut Vec<Collective>) {
        if self.options.sequence_parallel {
            all.push(self.collective("reduce_scatter", after, self.row(), stream, world));
            all.push(self.collective("all_gather", after, self.row(), stream, world));
        } else {
            all.push(self.collective("all_reduce", after, self.row(), stream, world));
        }
    }

    /// After the embedding a sum, as each token's row is on one rank and zero on the others; after the head an
    /// all-gather of the logits.
    pub(super) fn vocab_collectives(&self, shares: &Shares) -> Vec<Collective> {
        let Some(rows) = self.spec.vocab.map(|dim| &shares.dims[dim]).filter(|_| shares.world > 1) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for embedding in &self.spec.embeddings {
            self.sum(&embedding.after, embedding.stream, shares.world, &mut all);
        }
        if let Some(head) = &self.spec.logits {
            let bytes = (rows.padded * self.spec.dtype.size()) as u64;
            all.push(self.collective("all_gather", head, bytes, Stream::Tokens, shares.world));
        }
        all
    }

    /// Bytes of one token's activations.
    fn row(&self) -> u64 {
        (self.spec.hidden_size * self.spec.dtype.size()) as u64
    }

    fn collective(
        &self,
        op: &str,
        after: &str,
        bytes_per_token: u64,
        stream: Stream,
        world: usize,
    ) -> Collective {
        self.collective_among(op, after, bytes_per_token, stream, world, world)
    }

    /// The same among some of the ranks at a time.
    fn collective_among(
        &self,
        op: &str,
        after: &str,
        bytes_per_token: u64,
        stream: Stream,
        world: usize,
        among: usize,
    ) -> Collective {
        let us = match op {
            "all_reduce" => self.costs.all_reduce_us(bytes_per_token, among),
            "reduce_scatter" => self.costs.exchange_us(op, bytes_per_token, among),
            "all_to_all" => self.costs.grouped_all_to_all_us(bytes_per_token / world as u64, world, among),
            _ => self.costs.all_gather_us(bytes_per_token, among),
        };
        Collective {
            op: op.to_owned(),
            after: after.to_owned(),
            bytes_per_token,
            predicted_us: rounded(us),
            among: if among < world { among } else { 0 },
            stream: stream_name(stream),
        }
    }
}
