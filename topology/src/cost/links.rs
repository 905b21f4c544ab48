//! What exchanges cost over the links of a fabric, as placements are predicted.

use crate::fabric::Fabric;
use crate::place::exchange::{all_gather_us, all_reduce_us, all_to_all_us};
use crate::place::machine::{Machine, Span};

/// The links between the devices of a fabric that ranks run on.
#[derive(Clone, Debug, PartialEq)]
pub struct Links {
    machine: Machine,
    /// The device of each rank, as places in the machine's workers; behind them those that no rank runs on.
    order: Vec<usize>,
    /// Ranks of each host, which share its network.
    active: Vec<u32>,
}

impl Links {
    pub(super) fn new(fabric: &Fabric, ranks: &[usize], bits: u32) -> Links {
        let mut taken = vec![false; fabric.devices().len()];
        ranks.iter().for_each(|device| taken[*device] = true);
        let mut devices = ranks.to_vec();
        devices.extend(fabric.workers().into_iter().filter(|device| !taken[*device]));
        let mut known = devices.clone();
        known.sort_unstable();
        known.dedup();
        let (machine, _) = Machine::of(fabric, &known, bits);
        let mut place = vec![0; fabric.devices().len()];
        machine.workers.iter().enumerate().for_each(|(at, worker)| place[worker.device] = at);
        let order: Vec<usize> = devices.iter().map(|device| place[*device]).collect();
        let mut active = vec![0; machine.interfaces.len()];
        order[..ranks.len()].iter().for_each(|at| active[machine.workers[*at].host] += 1);
        Links { machine, order, active }
    }

    /// What the slowest of the first `world` ranks reads in a microsecond.
    pub(super) fn memory_bytes_per_us(&self, world: usize) -> Option<f64> {
        let workers = self.order.iter().take(world).map(|at| self.machine.workers[*at].bytes_per_us);
        workers.reduce(f64::min)
    }

    /// The latency and the bandwidth of the slowest link, in microseconds and bytes a microsecond.
    pub(super) fn farthest(&self) -> Option<(f64, f64)> {
        let link = self.span(self.order.len())?.slowest()?;
        Some((link.alpha_us, link.bytes_per_us))
    }

    /// What a collective takes over the first `world` ranks, of which each contributes `bytes`; nothing where there are
    /// fewer devices, or no way between them.
    pub(super) fn us(&self, name: &str, bytes: f64, world: usize) -> Option<f64> {
        let span = self.span(world)?;
        let link = span.slowest();
        let one = |bytes: f64| link.map_or(0.0, |link| link.us(bytes));
        Some(match name {
            "all_reduce" => all_reduce_us(&span, bytes),
            "all_gather" => all_gather_us(&span, bytes * world as f64),
            "reduce_scatter" => all_gather_us(&span, bytes),
            "all_to_all" => all_to_all_us(&span, bytes),
            "broadcast" | "send_recv" => one(bytes),
            "barrier" => one(0.0),
            _ => return None,
        })
    }

    /// What an all-to-all of `bytes` on each rank takes among `among` of the first `world` ranks, `world / among` apart as
    /// placements lay them: the slowest of those that lie side by side.
    pub(super) fn all_to_all_us(&self, bytes: f64, world: usize, among: usize) -> Option<f64> {
        let ranks = self.order.get(..world)?;
        let apart = world / among;
        let group =
            |first: usize| -> Vec<usize> { ranks.iter().skip(first).step_by(apart).copied().collect() };
        let spans: Option<Vec<Span>> = (0..apart).map(|first| self.span_of(&group(first), ranks)).collect();
        let slowest = spans?.into_iter().reduce(|a, b| if b.us_of_mib() > a.us_of_mib() { b } else { a })?;
        Some(all_to_all_us(&slowest, bytes))
    }

    fn span(&self, world: usize) -> Option<Span> {
        let ranks = self.order.get(..world)?;
        self.span_of(ranks, ranks)
    }

    /// What a group exchanges over, while all `ranks` do.
    fn span_of(&self, group: &[usize], ranks: &[usize]) -> Option<Span> {
        // Of more ranks than the placement has, each is active.
        let mut active = vec![0; self.active.len()];
        ranks.iter().for_each(|at| active[self.machine.workers[*at].host] += 1);
        active.iter_mut().zip(&self.active).for_each(|(here, placed)| *here = (*here).max(*placed));
        self.machine.span(group, &active)
    }
}

#[cfg(test)]
mod tests {
    use super::super::CostModel;
    use super::*;
    use crate::shard::Experts;
    use crate::{ModelSpec, Planner};

    /// Two hosts of two devices: 1 us and 10 GB/s on a host; 10 us and 2 GB/s between them, through one interface each.
    fn fabric() -> Fabric {
        Fabric::from_toml(
            r#"
            name = "two by two"
            [[model]]
            name = "gpu"
            kind = "gpu"
            memory = "24 GiB"
            memory_gbps = 1000
            [[host]]
            name = "h"
            count = 2
            device = [{ model = "gpu", count = 2 }]
            nic = [{ name = "eth0", mbit_per_s = 16000 }]
            [links]
            host = { alpha_us = 1, gbps = 10 }
            network = { alpha_us = 10, gbps = 2 }
            "#,
        )
        .unwrap()
    }

    #[test]
    fn exchanges_are_priced_by_the_links_between_the_ranks() {
        let us = |ranks: &[usize], name: &str, world| {
            CostModel::on_fabric(&fabric(), ranks, world, 16).collective(name, 10_000, world).unwrap().us
        };
        // 1 us and 10,000 bytes at 10,000 a microsecond.
        assert_eq!(us(&[0, 1], "all_reduce", 2), 2.0);
        assert_eq!((us(&[0, 1], "all_gather", 2), us(&[0, 1], "reduce_scatter", 2)), (2.0, 1.5));
        assert_eq!((us(&[0, 1], "send_recv", 2), us(&[0, 1], "barrier", 2)), (2.0, 1.0));
        // From one host to the other, alone and while another group does the same.
        assert_eq!((us(&[0, 2], "all_reduce", 2), us(&[0, 2, 1, 3], "all_reduce", 2)), (15.0, 20.0));
        assert_eq!(us(&[0], "all_reduce", 1), 0.0);
        // More ranks than the placement has run on the devices that are left; more than there are, over the slowest links.
        assert!(us(&[0, 1], "all_reduce", 4) > 10.0);
        assert_eq!(us(&[0, 1], "barrier", 5), 10.0);
    }

    #[test]
    fn experts_over_groups_exchange_between_the_groups() {
        let spec = ModelSpec::from_config(
            r#"{"model_type": "mixtral", "hidden_size": 512, "num_hidden_layers": 1, "num_attention_heads": 8,
                "num_key_value_heads": 4, "intermediate_size": 1024, "num_local_experts": 8,
                "num_experts_per_tok": 2, "vocab_size": 32000, "torch_dtype": "bfloat16"}"#,
        )
        .unwrap();
        let costs = CostModel::on_fabric(&fabric(), &[0, 1, 2, 3], 4, 16);
        let planner = Planner::new(&spec).experts(Experts::in_groups(2, 4)).with_costs(costs);
        let plan = planner.plan(4).unwrap();
        let all_to_all = plan.layers[0].collectives.iter().find(|c| c.op == "all_to_all").unwrap();
        // A group a host: ranks 0 and 2, and 1 and 3, over one interface. Of two experts' 2048 bytes, a rank has a quarter
        // of the tokens and sends half of that: 512 bytes at 1000 a microsecond.
        assert_eq!((all_to_all.among, all_to_all.bytes_per_token), (2, 4096));
        assert!((all_to_all.predicted_us - 10.512).abs() < 1e-6, "{}", all_to_all.predicted_us);
    }

    #[test]
    fn memory_is_as_fast_as_the_slowest_rank_of_the_group() {
        let costs = CostModel::on_fabric(&fabric(), &[0, 1], 2, 16);
        assert_eq!((costs.read_us(2_000_000), costs.step(3, 1_000_000, 2).us), (2.0, 1.0));
        assert!(costs.source.contains("two by two"), "{}", costs.source);
    }
}
