//! Feed-forward layers, and experts that a router chooses.

use std::ops::Range;

use super::group::{Each, Fault, Group, part};
use super::quant::mxfp4;
use super::tensor::{Tensor, sigmoid, silu, softmax};

/// Gate and up, multiplied: what goes into `down_proj`, or, multiplied with it, a part of the sum.
pub(crate) fn gated_mlp(g: &Group, mlp: &str, x: &Each, activation: fn(f64) -> f64) -> Each {
    let gate = g.linear(&format!("{mlp}.gate_proj"), x).map(|t| t.map(activation));
    let inner = gate.mul(&g.linear(&format!("{mlp}.up_proj"), x));
    g.product(&format!("{mlp}.down_proj"), &inner)
}

/// The routed experts of a layer, and the shared one where there is one.
pub(crate) fn experts(g: &Group, layer: &str, x: &Each) -> Each {
    let block = match g.config.text("model_type") {
        "mixtral" => "block_sparse_moe",
        _ => "mlp",
    };
    let mlp = format!("{layer}.{block}");
    let place = match g.config.text("model_type") {
        "gpt_oss" => format!("{mlp}.experts"),
        _ => mlp.clone(),
    };
    let routes = routes(g, &mlp, x);
    let owners = g.experts(layer);
    let routed = match &owners {
        Some(owners) => elsewhere(g, &mlp, &place, x, &routes, owners),
        None => g.each(|rank| {
            let (x, routes) = (&x.0[rank], &routes.0[rank]);
            let outputs = (0..routes.cols()).map(|e| weighted(&expert(g, rank, &mlp, e, e, x), routes, e));
            outputs.reduce(|a, b| a.add(&b)).unwrap()
        }),
    };
    // Parts of the sum, and what every rank has whole, which is added once.
    let (mut parts, mut wholes) = (vec![routed], Vec::new());
    if let Some(shared) = shared(g, &mlp, x) {
        let is_part = g.shares_expert(layer) || g.fault == Some(Fault::SharedOnEveryRank);
        if is_part { parts.push(shared) } else { wholes.push(shared) }
    }
    if owners.is_none() && g.has(&format!("{mlp}.experts.down_proj_bias")) {
        let bias = routed_bias(g, &mlp, &routes);
        if g.fault == Some(Fault::BiasOnEveryRank) { parts.push(bias) } else { wholes.push(bias) }
    }
    let sum = g.exchange(&place, parts.into_iter().reduce(|a, b| a.add(&b)).unwrap());
    wholes.iter().fold(sum, |sum, whole| sum.add(whole))
}

/// One expert's output on a rank: expert `e`, which is the `local`-th of a tensor that stacks the rank's.
fn expert(g: &Group, rank: usize, mlp: &str, e: usize, local: usize, x: &Tensor) -> Tensor {
    let of = |part: &str| format!("{mlp}.experts.{part}");
    if g.has(&of("gate_up_proj_blocks")) {
        // gpt-oss: gate and up columns in turn.
        let packed = |part: &str| {
            let stacked = |name: &str| g.tensor(rank, &of(&format!("{part}_{name}"))).index(local);
            mxfp4(&stacked("blocks"), &stacked("scales"))
        };
        let fused =
            x.times(&packed("gate_up_proj")).add(&g.tensor(rank, &of("gate_up_proj_bias")).index(local));
        let inner = Tensor::matrix(fused.rows(), fused.cols() / 2, |r, c| {
            let (gate, up) = (fused.at(r, 2 * c).min(7.0), fused.at(r, 2 * c + 1).clamp(-7.0, 7.0));
            (up + 1.0) * gate * sigmoid(1.702 * gate)
        });
        return inner.times(&packed("down_proj"));
    }
    let mixtral = g.config.text("model_type") == "mixtral";
    let names = if mixtral { ["w1", "w3", "w2"] } else { ["gate_proj", "up_proj", "down_proj"] };
    let [gate, up, down] = names.map(|n| g.weight(rank, &of(&format!("{e}.{n}"))));
    x.times(&gate).map(silu).mul(&x.times(&up)).times(&down)
}

/// The biases of the experts' last layer, weighted: added once, as any row-parallel layer's.
fn routed_bias(g: &Group, mlp: &str, routes: &Each) -> Each {
    let name = format!("{mlp}.experts.down_proj_bias");
    g.each(|rank| routes.0[rank].times(&g.tensor(rank, &name).transpose()))
}

/// Experts that other ranks have: each rank sends its own tokens' rows to the owners of their experts, and
/// gets the outputs back. Then it has the sums of its own tokens.
///
/// Where several neighbours have the same experts, of which each has some columns, they have the same tokens, send to the
/// rank in their place among each expert's owners, and get their parts of the outputs back.
fn elsewhere(g: &Group, mlp: &str, place: &str, x: &Each, routes: &Each, owners: &[Range<usize>]) -> Each {
    let ranks = 0..owners.len();
    let tokens = x.0[0].rows();
    let each = owners.iter().take_while(|range| **range == owners[0]).count();
    let own = |rank: usize| part(rank / each, owners.len() / each, tokens);
    // The (token, expert) pairs of a rank's tokens that another rank computes, in an order that both know.
    let pairs = |from: usize, to: usize| -> Vec<(usize, usize)> {
        let meet = from % each == to % each;
        let routed = |t: usize| owners[to].clone().filter(move |&e| meet && routes.0[from].at(t, e) != 0.0);
        own(from).into_iter().flat_map(|t| routed(t).map(move |e| (t, e))).collect()
    };
    let rows = |from: usize, to: usize| {
        x.0[from].select(0, &pairs(from, to).iter().map(|(t, _)| *t).collect::<Vec<_>>())
    };
    let sent = ranks.clone().map(|from| ranks.clone().map(|to| rows(from, to)).collect()).collect();
    let received = g.deliver(&format!("{place}: dispatch"), sent);
    let computed = |owner: usize, from: usize| {
        let rows = &received[owner][from];
        let outputs = pairs(from, owner).into_iter().enumerate().map(|(i, (_, e))| {
            let local = e - owners[owner].start;
            let out = expert(g, owner, mlp, e, local, &rows.select(0, &[i]));
            let bias = format!("{mlp}.experts.down_proj_bias");
            // Of an expert's owners the first adds it.
            let adds = owner.is_multiple_of(each) || g.fault == Some(Fault::BiasOnEveryRank);
            if adds && g.has(&bias) { out.add(&g.tensor(owner, &bias).index(local)) } else { out }
        });
        let outputs: Vec<Tensor> = outputs.collect();
        if outputs.is_empty() { rows.clone() } else { Tensor::below(&outputs) }
    };
    let returned =
        ranks.clone().map(|owner| ranks.clone().map(|from| computed(owner, from)).collect()).collect();
    let outputs = g.deliver(&format!("{place}: combine"), returned);
    let gathers = g.next_is(place, "all_gather");
    g.each(|rank| {
        let mut sum = x.0[rank].map(|_| 0.0);
        for owner in ranks.clone() {
            for (i, (t, e)) in pairs(rank, owner).into_iter().enumerate() {
                let weight = routes.0[rank].at(t, e);
                let width = sum.cols();
                let row = outputs[rank][owner].row(i);
                sum.data[t * width..][..width].iter_mut().zip(row).for_each(|(s, o)| *s += weight * o);
            }
        }
        // A rank hands round the rows of its own tokens, or adds zeros for the others.
        if gathers { sum.select(0, &own(rank)) } else { sum }
    })
}

/// The shared expert's output, or each rank's part of it.
fn shared(g: &Group, mlp: &str, x: &Each) -> Option<Each> {
    let names = ["shared_expert", "shared_experts"].map(|s| format!("{mlp}.{s}"));
    let shared = names.iter().find(|s| g.has_module(&format!("{s}.gate_proj")))?;
    let part = gated_mlp(g, shared, x, silu);
    if !g.has_module(&format!("{shared}_gate")) {
        return Some(part);
    }
    let gate = g.linear(&format!("{shared}_gate"), x).map(|t| t.map(sigmoid));
    Some(part.with(&gate, |p, w| weighted(p, w, 0)))
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
