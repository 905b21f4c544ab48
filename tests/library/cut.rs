//! Hosts that are cut off without a word: ranks in network namespaces of their own, on a switch that lets one of them
//! go. Nothing tells either side.

use std::time::{Duration, Instant};

use tensorwire::transports::tcp::Secret;
use tensorwire::{Communicator, Error, ReduceOp};

use crate::job::Job;
use crate::namespaces::Hosts;

/// A rank that has met the others, until the last rank is cut off: in the middle of a call, in a call that waits for
/// it, or before a connection to it is made.
pub(crate) fn cut() {
    let comm = Communicator::from_env().unwrap();
    let victim = comm.world() - 1;
    let is_cut = std::path::PathBuf::from(std::env::var_os("TENSORWIRE_TEST_CUT").unwrap());
    comm.barrier().unwrap();
    println!("\nat work");
    let error = match &*std::env::var("TENSORWIRE_TEST_MODE").unwrap() {
        "busy" => loop {
            if let Err(error) = comm.all_reduce(&mut vec![1f32; 1 << 18], ReduceOp::Sum) {
                break error;
            }
        },
        _ if comm.rank() == victim => loop {
            std::thread::sleep(Duration::from_secs(60));
        },
        "waiting" => comm.barrier().unwrap_err(),
        _ => {
            while !is_cut.exists() {
                std::thread::sleep(Duration::from_millis(10));
            }
            comm.recv(&mut [0f32], victim).unwrap_err()
        }
    };
    assert!(matches!(error, Error::PeerLost { .. }), "{error}");
    println!("{error}");
}

/// The variables that are a transport's own.
#[cfg_attr(not(feature = "quic"), expect(unused_variables, reason = "no other has any"))]
fn variables_of(transport: &str) -> Vec<(&'static str, String)> {
    #[cfg(feature = "quic")]
    if transport == "quic" {
        let authority = tensorwire::transports::tcp::Authority::generate().unwrap();
        let any = authority.any_rank().unwrap();
        return vec![
            ("TENSORWIRE_TLS_CA", authority.ca()),
            ("TENSORWIRE_TLS_CERT", any.cert),
            ("TENSORWIRE_TLS_KEY", any.key),
        ];
    }
    Vec::new()
}

/// Starts a rank on each of these hosts, cuts the last one off with `cut`, and expects every rank elsewhere to name one
/// that was there, within seconds.
fn named_when_cut(net: &Hosts, hosts: &[usize], transport: &str, mode: &str, cut: impl Fn(&Hosts, usize)) {
    let (secret, store) = (Secret::generate().unwrap().to_hex(), format!("tcp:{}:29600", Hosts::address(0)));
    let place = tempfile::tempdir().unwrap();
    let is_cut = place.path().join("cut");
    let (world, numbers) = (hosts.len().to_string(), (0..hosts.len()).map(|rank| rank.to_string()));
    let (numbers, names): (Vec<_>, Vec<_>) = numbers.zip(hosts.iter().map(|host| host.to_string())).unzip();
    let own = variables_of(transport);
    let env = |rank: usize| {
        let mut env = vec![
            ("TENSORWIRE_RANK", &*numbers[rank]),
            ("TENSORWIRE_WORLD", &*world),
            ("TENSORWIRE_STORE", &*store),
            ("TENSORWIRE_TRANSPORT", transport),
            ("TENSORWIRE_HOST", &*names[rank]),
            ("TENSORWIRE_SECRET", &*secret),
            ("TENSORWIRE_PEER_TIMEOUT", "2"),
            ("TENSORWIRE_TEST_MODE", mode),
            ("TENSORWIRE_TEST_CUT", is_cut.to_str().unwrap()),
        ];
        env.extend(own.iter().map(|(name, value)| (*name, &**value)));
        env
    };
    let places: Vec<_> = (0..hosts.len()).map(|rank| (net.name(hosts[rank]).to_owned(), env(rank))).collect();
    let mut job = Job::start_within("cut", &places);
    (0..hosts.len()).for_each(|rank| drop(job.wait_for(rank, "at work")));
    // In the middle of a call, or waiting in one.
    std::thread::sleep(Duration::from_millis(300));
    let victim = hosts[hosts.len() - 1];
    cut(net, victim);
    std::fs::write(&is_cut, "").unwrap();
    let start = Instant::now();
    let what = format!("{hosts:?} over {transport}, {mode}");
    for rank in (0..hosts.len()).filter(|rank| hosts[*rank] != victim) {
        // Two seconds, the intervals at which it is looked at, and a busy machine; the timeout is 30.
        let (status, text) = job.join_within(rank, Duration::from_secs(10));
        let lost = (0..hosts.len()).filter(|lost| hosts[*lost] == victim);
        let named =
            lost.map(|lost| format!("rank {rank}: lost rank {lost} in ")).any(|line| text.contains(&line));
        assert!(status.success() && named && text.contains("host"), "{what}: {text}");
        println!("{what}: rank {rank} after {:?}: {text}", start.elapsed());
    }
    if mode == "busy" {
        // The other side of the cut takes the others for lost.
        for rank in (0..hosts.len()).filter(|rank| hosts[*rank] == victim) {
            let (status, text) = job.join_within(rank, Duration::from_secs(10));
            assert!(status.success() && text.contains(&format!("rank {rank}: lost rank ")), "{what}: {text}");
        }
    }
}

#[test]
fn a_host_that_is_cut_off_is_named_within_seconds() {
    let Some(net) = Hosts::new(3) else { return };
    let transports = if cfg!(feature = "quic") { &["tcp", "quic"][..] } else { &["tcp"] };
    for (transport, mode) in transports
        .iter()
        .flat_map(|transport| ["busy", "waiting", "unconnected"].map(|mode| (transport, mode)))
    {
        named_when_cut(&net, &[0, 1, 2], transport, mode, Hosts::forget);
        net.know(2);
    }
    // A cable that is pulled, and a host that takes its own link down.
    named_when_cut(&net, &[0, 1, 2], "tcp", "busy", |net, host| net.unplug(host, false));
    net.plug(2);
    named_when_cut(&net, &[0, 1, 2], "tcp", "busy", |net, host| net.unplug(host, true));
}

/// Those who wait in shared memory for one that waits for the other host are told as well.
#[test]
fn a_host_that_is_cut_off_from_hosts_that_share_memory_is_named_within_seconds() {
    let Some(net) = Hosts::new(3) else { return };
    for (hosts, mode) in
        [(&[0, 0, 1, 2, 2][..], "busy"), (&[0, 1, 0, 1], "waiting"), (&[0, 0, 1], "unconnected")]
    {
        named_when_cut(&net, hosts, "auto", mode, Hosts::forget);
        net.know(hosts[hosts.len() - 1]);
    }
}
