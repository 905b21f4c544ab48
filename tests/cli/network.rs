//! Models over two and three hosts, which are network namespaces on a switch.

#[path = "../support/minilm.rs"]
mod minilm;
#[path = "support/models.rs"]
mod models;
#[path = "../support/namespaces.rs"]
mod namespaces;
mod support;

use std::io::Read;
use std::os::unix::fs::PermissionsExt;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use namespaces::Hosts;
use serde_json::Value;
use support::*;

const PROGRAM: &str = env!("CARGO_BIN_EXE_tensorwire");

/// Hosts of which the first can start ranks on the others.
struct Cluster {
    hosts: Hosts,
    dir: tempfile::TempDir,
}

impl Cluster {
    /// With so many slots on each; `None` where this machine or user can't have any.
    fn new(slots: &[usize]) -> Option<Cluster> {
        let (hosts, dir) = (Hosts::new(slots.len())?, tempfile::tempdir().unwrap());
        let (mut file, mut shell) = (String::new(), "#!/bin/sh\nhost=$1\nshift\ncase $host in\n".to_owned());
        for (i, slots) in slots.iter().enumerate() {
            let (address, name) = (Hosts::address(i), hosts.name(i));
            let address = if i == 0 { "localhost" } else { &address };
            file += &format!("{address} slots={slots}\n");
            shell += &format!("{address}) exec ip netns exec {name} \"$@\";;\n");
        }
        std::fs::write(dir.path().join("hosts"), file).unwrap();
        let script = dir.path().join("remote-shell");
        std::fs::write(&script, shell + "esac\n").unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        Some(Cluster { hosts, dir })
    }

    /// `tensorwire launch ... -- tensorwire COMMAND`, on the first host.
    fn launch(&self, transport: &str, ranks: usize, command: &[&str]) -> Output {
        let path = |name: &str| self.dir.path().join(name);
        let mut launch = self.hosts.within(0, PROGRAM);
        launch.args(["launch", "--transport", transport, "--ranks", &ranks.to_string(), "--hostfile"]);
        launch.arg(path("hosts")).arg("--ssh").arg(path("remote-shell")).args(["--", PROGRAM]).args(command);
        launch.output().unwrap()
    }

    /// What rank 0 of a job reports.
    fn report(&self, transport: &str, ranks: usize, command: &[&str]) -> Value {
        let output = self.launch(transport, ranks, command);
        assert_eq!(output.status.code(), Some(0), "{transport}, {ranks} ranks: {}", stderr(&output));
        let text = stdout(&output);
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str(text.strip_prefix("[rank 0] ").unwrap()).unwrap()
    }
}

/// What the same command gives on one host over shared memory.
fn on_one_host(ranks: usize, command: &[&str]) -> Value {
    let output = run(command.iter().copied().chain(["--no-verify", "--ranks", &ranks.to_string()]));
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_str(&stdout(&output)).unwrap()
}

/// Sums keep the order of the ranks on any transport: what is reported is the same to the last bit.
#[test]
fn two_and_three_hosts_give_what_one_gives() {
    let dir = models::decoder();
    let model = dir.path().to_str().unwrap();
    let decoder = ["infer", "--json", "--model", model, "--prompt", "The sea is wide", "--max-tokens", "20"];
    for slots in [&[1, 1][..], &[2, 1], &[1, 1, 1], &[2, 1, 2]] {
        let Some(cluster) = Cluster::new(slots) else { return };
        let ranks = slots.iter().sum();
        let alone = on_one_host(ranks, &decoder);
        for transport in ["tcp", "tls", "auto"] {
            let report = cluster.report(transport, ranks, &decoder);
            assert_eq!(report["ranks"], ranks);
            assert_eq!(report["verified"]["equal_tokens"], true, "{slots:?} over {transport}: {report}");
            assert_eq!(report["tokens"], alone["tokens"], "{slots:?} over {transport}");
        }
    }
}

#[test]
fn the_built_in_model_runs_on_two_and_three_hosts() {
    let built_in = ["infer", "--max-tokens", "6", "--json"];
    for (slots, transport) in [(&[1, 1][..], "tcp"), (&[1, 1, 1], "auto")] {
        let Some(cluster) = Cluster::new(slots) else { return };
        let report = cluster.report(transport, slots.len(), &built_in);
        assert_eq!(report["verified"]["equal_tokens"], true, "{report}");
        assert_eq!(report["tokens"].as_array().unwrap().len(), 6);
    }
}

#[test]
fn a_sentence_encoder_runs_on_two_and_three_hosts() {
    let model = minilm::model_dir();
    let texts = ["A man is eating food.", "Two men pushed carts through the woods."];
    let encoder =
        ["infer", "--json", "--model", model.to_str().unwrap(), "--text", texts[0], "--text", texts[1]];
    for (slots, transport) in [(&[1, 1][..], "tcp"), (&[1, 1], "tls"), (&[2, 1, 1], "auto")] {
        let Some(cluster) = Cluster::new(slots) else { return };
        let ranks = slots.iter().sum();
        let report = cluster.report(transport, ranks, &encoder);
        assert!(report["verified"]["max_abs_diff"].as_f64().unwrap() < 1e-5, "{report}");
        assert_eq!(report["embeddings"], on_one_host(ranks, &encoder)["embeddings"], "{slots:?}");
    }
}

#[test]
fn benchmarks_run_on_hosts_and_share_memory_there() {
    let Some(cluster) = Cluster::new(&[1, 2]) else { return };
    for transport in ["tcp", "auto"] {
        let output = cluster.launch(transport, 3, &["bench", "--bytes", "8,64K", "--batches", "2", "--json"]);
        let text = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert_eq!(text.matches("\"correct\":true").count(), 2, "{text}");
        let carried = format!("\"transport\":\"{transport}\",\"ranks\":3");
        assert_eq!(text.matches(&carried).count(), 2, "{text}");
    }
}

#[test]
fn in_fewer_bits_it_is_told_what_that_changes() {
    let Some(cluster) = Cluster::new(&[1, 1]) else { return };
    let dir = models::decoder();
    let model = dir.path().to_str().unwrap();
    let prompt = ["infer", "--model", model, "--prompt", "The sea is wide", "--max-tokens", "9"];
    let decoder = |more: &[&'static str]| [&prompt[..], more].concat();
    let exact = cluster.report("tcp", 2, &decoder(&["--json"]));
    assert_eq!(exact["wire"], "f32");
    let exact = exact["verified"]["max_abs_diff"].as_f64().unwrap();
    for wire in ["bf16", "q8"] {
        let report = cluster.report("tcp", 2, &decoder(&["--json", "--wire", wire]));
        assert_eq!(report["wire"], wire);
        let verified = &report["verified"];
        let diff = verified["max_abs_diff"].as_f64().unwrap();
        assert!(diff > 10.0 * exact, "{wire} rounds: {diff}, and f32 by {exact}");
        assert!(verified["tokens_equal_until"].as_u64().unwrap() <= 9, "{verified}");
    }
    let text = stdout(&cluster.launch("tcp", 2, &decoder(&["--wire", "q8"])));
    assert!(text.contains("sent as q8, against the unsharded run: "), "{text}");
    assert!(!text.contains("identical"), "{text}");
}

/// `infer` as a rank that something else has started, on a host of its own; killed when dropped.
struct Rank(Child);

impl Rank {
    fn start(hosts: &Hosts, rank: usize, secret: &str) -> Rank {
        let mut command: Command = hosts.within(rank, PROGRAM);
        command.args(["infer", "--max-tokens", "2000", "--no-verify"]);
        command.env("TENSORWIRE_RANK", rank.to_string()).env("TENSORWIRE_WORLD", "3");
        command.env("TENSORWIRE_STORE", format!("tcp:{}:29600", Hosts::address(0)));
        command.env("TENSORWIRE_TRANSPORT", "tcp").env("TENSORWIRE_SECRET", secret);
        command.env("TENSORWIRE_PEER_TIMEOUT", "2");
        Rank(command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap())
    }

    /// What it says when it has ended, which it does within `limit`.
    fn end(&mut self, limit: Duration) -> (Option<i32>, String) {
        let start = Instant::now();
        let status = loop {
            match self.0.try_wait().unwrap() {
                Some(status) => break status,
                None => assert!(start.elapsed() < limit, "still running after {limit:?}"),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let mut text = String::new();
        self.0.stderr.take().unwrap().read_to_string(&mut text).unwrap();
        (status.code(), text)
    }
}

impl Drop for Rank {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_host_cut_off_in_the_middle_is_named_on_every_other() {
    let Some(hosts) = Hosts::new(3) else { return };
    let secret = "5".repeat(64);
    let mut ranks: Vec<Rank> = (0..3).map(|rank| Rank::start(&hosts, rank, &secret)).collect();
    let mut out = reader(&mut ranks[0].0);
    // After the plan come tokens, on one line.
    read_until(&mut out, |line| line.trim().is_empty());
    out.read_exact(&mut [0; 16]).unwrap();
    // Rank 0 goes on to print: somebody has to take it.
    let rest = std::thread::spawn(move || std::io::copy(&mut out, &mut std::io::sink()));
    hosts.unplug(2, false);
    for (rank, other) in [(0, "lost rank 2 in "), (1, "lost rank 2 in "), (2, "lost rank ")] {
        // Two seconds, and a busy machine; the deadline of a call is 30.
        let (status, text) = ranks[rank].end(Duration::from_secs(10));
        assert_eq!(status, Some(75), "rank {rank}: {text}");
        assert!(
            text.starts_with("tensorwire: ") && text.contains(&format!("rank {rank}: {other}")),
            "{text}"
        );
    }
    rest.join().unwrap().unwrap();
}
