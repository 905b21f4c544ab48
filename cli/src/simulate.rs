//! `tensorwire simulate`: what all-reduces would take on a network that needn't be there.

use serde_json::json;
use tensorwire::collectives::network::{Link, Links, Prediction, Simulation};
use tensorwire::{Algorithm, DType, ReduceOp};

use crate::bench::size;
use crate::failure::{Failure, print, ranks};

const METHOD: &str = "\
Runs the schedules of an all-reduce of f32 sums, those that the ranks of a job run over a network, against a clock. A
message keeps a processor of its sender and of its receiver busy for the overhead, and arrives after the latency and
its bytes' time on the link, where others take their turn: a rank's own link on its host, the host's link to other
hosts. Ranks are on the hosts one after the other, as evenly as they go. Waiting for late ranks isn't in it.

`order` says whether the result has the bits of the reduction in rank order. `auto` marks the algorithm that ranks with
such links choose, and `any order` the one if TENSORWIRE_ANY_ORDER is 1: both by a formula, `formula us`, which a rank
can afford. Ranks have their links from rank 0: `tensorwire topo` shows them, and `tensorwire bench --explain` what follows.

Examples:
  tensorwire simulate --ranks 1024 --hosts 128 --bytes 4K,1M,64M
  tensorwire simulate --ranks 16 --hosts 2 --intra 2,10 --inter 20,1.25 --bytes 1M --json";

/// Predict what all-reduces take over many hosts, by algorithm
#[derive(clap::Args)]
#[command(after_help = METHOD)]
pub(crate) struct Args {
    /// How many ranks
    #[arg(long, short = 'n', value_name = "N", value_parser = ranks)]
    ranks: usize,

    /// On how many hosts
    #[arg(long, value_name = "N", default_value = "1")]
    hosts: usize,

    /// Sizes, separated by commas; K, M and G stand for powers of 1024
    #[arg(long, value_delimiter = ',', value_parser = size, default_value = "8,4K,64K,1M,16M,256M")]
    bytes: Vec<usize>,

    /// Links between ranks of a host: latency, bandwidth and, if known, overhead a message
    #[arg(long, value_name = "US,GB/s[,US]", value_parser = str::parse::<Link>, default_value_t = Links::default().intra)]
    intra: Link,

    /// A host's link to other hosts
    #[arg(long, value_name = "US,GB/s[,US]", value_parser = str::parse::<Link>, default_value_t = Links::default().inter)]
    inter: Link,

    /// One algorithm alone
    #[arg(long, value_parser = algorithm)]
    algorithm: Option<Algorithm>,

    /// Print one JSON object a size and algorithm
    #[arg(long)]
    json: bool,
}

fn algorithm(text: &str) -> Result<Algorithm, String> {
    let known = Simulation::ALGORITHMS;
    let names = known.map(Algorithm::name).join(", ");
    known.into_iter().find(|a| a.name() == text).ok_or_else(|| format!("use one of {names}"))
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let (ranks, hosts) = (args.ranks, args.hosts);
    if hosts == 0 || hosts > ranks {
        return Err(Failure::usage(format!(
            "{ranks} ranks can't be on {hosts} hosts: give from 1 to {ranks}"
        )));
    }
    if let Some(bytes) = args.bytes.iter().find(|b| !b.is_multiple_of(4)) {
        return Err(Failure::usage(format!("{bytes} bytes are no whole number of f32 elements")));
    }
    let names: Vec<usize> = (0..ranks).map(|rank| rank * hosts / ranks).collect();
    let links = Links { intra: args.intra, inter: args.inter };
    let simulation = Simulation::new(&names, links).map_err(Failure::usage)?;
    if !args.json {
        let heading =
            ["bytes", "algorithm", "order", "time us", "formula us", "messages", "MB a rank", "MB a host"];
        let heading: String = heading.iter().enumerate().map(|(i, name)| cell(i, name)).collect();
        print(format_args!(
            "all_reduce f32 sum, {ranks} ranks on {hosts} host{}; latency us, GB/s, overhead us: {} on a host, {} \
             between hosts\n{heading}  chosen\n",
            if hosts == 1 { "" } else { "s" },
            args.intra,
            args.inter
        ))?;
    }
    for bytes in &args.bytes {
        let chosen = [simulation.chosen(*bytes, false), simulation.chosen(*bytes, true)];
        for algorithm in Simulation::ALGORITHMS {
            if args.algorithm.is_none_or(|only| only == algorithm) {
                row(args, *bytes, &simulation.all_reduce(algorithm, *bytes), chosen)?;
            }
        }
    }
    Ok(())
}

fn cell(column: usize, text: &str) -> String {
    let width = if column == 1 { 20 } else { 12 };
    format!("{text:>width$}")
}

fn row(args: &Args, bytes: usize, p: &Prediction, chosen: [Algorithm; 2]) -> Result<(), Failure> {
    let keeps_order = p.algorithm.keeps_order(DType::F32, ReduceOp::Sum);
    let [auto, any_order] = chosen.map(|a| a == p.algorithm);
    let rounded = |us: f64| (us * 1e3).round() / 1e3;
    if args.json {
        let row = json!({
            "collective": "all_reduce",
            "ranks": args.ranks,
            "hosts": args.hosts,
            "bytes": bytes,
            "algorithm": p.algorithm.name(),
            "keeps_order": keeps_order,
            "simulated_us": rounded(p.simulated_us),
            "formula_us": rounded(p.formula_us),
            "messages": p.messages,
            "bytes_sent": p.bytes_sent,
            "host_bytes_sent": p.host_bytes_sent,
            "auto": auto,
            "any_order": any_order,
        });
        return print(format_args!("{row}\n"));
    }
    let mb = |bytes: u64| format!("{:.2}", bytes as f64 / 1e6);
    let cells = [
        bytes.to_string(),
        p.algorithm.to_string(),
        if keeps_order { "rank" } else { "any" }.to_owned(),
        format!("{:.1}", p.simulated_us),
        format!("{:.1}", p.formula_us),
        p.messages.to_string(),
        mb(p.bytes_sent),
        mb(p.host_bytes_sent),
    ];
    let cells: String = cells.iter().enumerate().map(|(i, text)| cell(i, text)).collect();
    let mark = match (auto, any_order) {
        (true, true) => "  auto, any order",
        (true, false) => "  auto",
        (false, true) => "  any order",
        (false, false) => "",
    };
    print(format_args!("{cells}{mark}\n"))
}
