//! Feed-forward layers, and experts that a router chooses.

use super::group::{Each, Group};
use super::tensor::{Tensor, sigmoid, silu, softmax};

/// Gate and up, multiplied: what goes into `down_proj`, or, multiplied with it, a part of the sum.
pub(crate) fn gated_mlp(g: &Group, mlp: &str, x: &Each, activation: fn(f64) -> f64) -> Each {
    let gate = g.linear(&format!("{mlp}.gate_proj"), x).map(|t| t.map(activation));
    let inner = gate.mul(&g.linear(&format!("{mlp}.up_proj"), x));
    g.product(&format!("{mlp}.down_proj"), &inner)
}

/// The routed experts of a layer, and the shared one where there is one: one sum.
pub(crate) fn experts(g: &Group, layer: &str, x: &Each) -> Each {
    let mixtral = g.config.text("model_type") == "mixtral";
    let mlp = format!("{layer}.{}", if mixtral { "block_sparse_moe" } else { "mlp" });
    let names = if mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
    let routes = routes(g, &mlp, x);
    let mut sum = g.each(|rank| {
        let x = &x.0[rank];
        let zero = Tensor::matrix(x.rows(), x.cols(), |_, _| 0.0);
        (0..routes.0[rank].cols()).fold(zero, |sum, e| {
            let [gate, up, down] = names.map(|n| format!("{mlp}.experts.{e}.{n}"));
            // Another rank's expert, where each rank has some of them.
            if !g.holds(rank, &gate) {
                return sum;
            }
            let inner = x.times(&g.weight(rank, &gate)).map(silu).mul(&x.times(&g.weight(rank, &up)));
            sum.add(&weighted(&inner.times(&g.weight(rank, &down)), &routes.0[rank], e))
        })
    });
    for shared in ["shared_expert", "shared_experts"].map(|s| format!("{mlp}.{s}")) {
        if g.has_module(&format!("{shared}.gate_proj")) {
            let mut part = gated_mlp(g, &shared, x, silu);
            if g.has_module(&format!("{shared}_gate")) {
                let gate = g.linear(&format!("{shared}_gate"), x).map(|t| t.map(sigmoid));
                part = part.with(&gate, |p, w| weighted(p, w, 0));
            }
            sum = sum.add(&part);
        }
    }
    g.exchange(&format!("{mlp}.experts"), sum)
}

/// Each row times the weight of column `e` in the same row.
fn weighted(x: &Tensor, weights: &Tensor, e: usize) -> Tensor {
    Tensor::matrix(x.rows(), x.cols(), |r, c| x.at(r, c) * weights.at(r, e))
}

/// Each token's weight of each expert, 0 for those that it isn't routed to. Every rank computes all.
fn routes(g: &Group, mlp: &str, x: &Each) -> Each {
    let c = g.config;
    let chosen = c.find("num_experts_per_tok").unwrap_or(1);
    let router = if g.has_module(&format!("{mlp}.router")) { "router" } else { "gate" };
    let logits = g.linear(&format!("{mlp}.{router}"), x);
    let correction = format!("{mlp}.gate.e_score_correction_bias");
    g.each(|rank| {
        logits.0[rank].each_row(|row| {
            let scores = match c.text("model_type") {
                "deepseek_v3" => row.iter().map(|&x| sigmoid(x)).collect(),
                // Softmax over the chosen ones alone.
                "gpt_oss" => {
                    let kept = largest(row, chosen);
                    let part = softmax(&kept.iter().map(|&e| row[e]).collect::<Vec<_>>());
                    let weight = |e: usize| kept.iter().position(|&k| k == e).map_or(0.0, |i| part[i]);
                    return (0..row.len()).map(weight).collect();
                }
                _ => softmax(row),
            };
            let mut preferred = scores.clone();
            if g.has(&correction) {
                preferred.iter_mut().zip(&g.tensor(rank, &correction).data).for_each(|(p, b)| *p += b);
            }
            if let Some(groups) = c.find("n_group").filter(|n| *n > 1) {
                let best = if c.text("model_type") == "deepseek_v3" { 2 } else { 1 };
                only_groups(&mut preferred, groups, best, c.get("topk_group"));
            }
            let kept = largest(&preferred, chosen);
            let sum: f64 = kept.iter().map(|&e| scores[e]).sum();
            let always = c.text("model_type") == "mixtral";
            let over = if always || c.is("norm_topk_prob") { sum } else { 1.0 };
            let factor = c.0["routed_scaling_factor"].as_f64().unwrap_or(1.0);
            let weight = |e| if kept.contains(&e) { scores[e] / over * factor } else { 0.0 };
            (0..row.len()).map(weight).collect()
        })
    })
}

/// The indices of the largest values.
fn largest(values: &[f64], count: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
    order.truncate(count);
    order
}

/// Excludes all but the groups of experts whose `best` scores together are largest.
fn only_groups(scores: &mut [f64], groups: usize, best: usize, kept: usize) {
    let width = scores.len() / groups;
    let of_group = |group: &[f64]| largest(group, best).iter().map(|&i| group[i]).sum();
    let sums: Vec<f64> = scores.chunks(width).map(of_group).collect();
    let kept = largest(&sums, kept);
    for (group, scores) in scores.chunks_mut(width).enumerate() {
        if !kept.contains(&group) {
            scores.fill(f64::NEG_INFINITY);
        }
    }
}
