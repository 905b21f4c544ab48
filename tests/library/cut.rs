//! Hosts that are cut off without a word: ranks in network namespaces of their own, on a switch that lets one of them
//! go. Nothing tells either side; the links stay up.

use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tensorwire::transports::tcp::Secret;
use tensorwire::{Communicator, Error, ReduceOp};

use crate::job::Job;

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

/// Network namespaces with an address each, on a switch; gone when dropped.
pub(crate) struct Hosts {
    switch: String,
    pub(crate) hosts: Vec<String>,
}

fn ip(args: &str) -> bool {
    run("ip", args)
}

fn run(program: &str, args: &str) -> bool {
    let run =
        Command::new(program).args(args.split(' ')).stdout(Stdio::null()).stderr(Stdio::null()).status();
    run.is_ok_and(|status| status.success())
}

impl Hosts {
    /// `None` where this system lets the test make none.
    pub(crate) fn new(count: usize) -> Option<Hosts> {
        // Relaxed: a number of its own for each test of this process.
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let nth = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = |what: &str| format!("tensorwire-{}-{nth}-{what}", std::process::id());
        let hosts = (0..count).map(|i| name(&i.to_string())).collect();
        let net = Hosts { switch: name("switch"), hosts };
        let switch = &net.switch;
        let mut made =
            ip(&format!("netns add {switch}")) && ip(&format!("-n {switch} link add switch up type bridge"));
        for (i, host) in net.hosts.iter().enumerate() {
            made = made
                && ip(&format!("netns add {host}"))
                && ip(&format!("-n {switch} link add port{i} type veth peer name eth0 netns {host}"))
                && ip(&format!("-n {switch} link set port{i} master switch up"))
                && ip(&format!("-n {host} address add {}/24 dev eth0", Hosts::address(i)))
                && ip(&format!("-n {host} link set eth0 up"))
                && ip(&format!("-n {host} link set lo up"));
        }
        made.then_some(net)
    }

    pub(crate) fn address(i: usize) -> String {
        format!("10.77.0.{}", i + 1)
    }

    /// Lets every host send no more than `mbit` a second, or as much as it can. `false` where this system can't.
    pub(crate) fn limit(&self, mbit: Option<u32>) -> bool {
        let limit = |host: &String| match mbit {
            Some(mbit) => {
                let rate = format!("tbf rate {mbit}mbit burst 16kb latency 500ms");
                run("tc", &format!("-n {host} qdisc replace dev eth0 root {rate}"))
            }
            None => run("tc", &format!("-n {host} qdisc del dev eth0 root")),
        };
        self.hosts.iter().all(limit)
    }

    fn cut(&self, i: usize) {
        assert!(ip(&format!("-n {} link set port{i} nomaster", self.switch)));
    }
}

impl Drop for Hosts {
    fn drop(&mut self) {
        for name in self.hosts.iter().chain([&self.switch]) {
            ip(&format!("netns del {name}"));
        }
    }
}

/// The variables that are a transport's own.
fn all_transports() -> Vec<Vec<(&'static str, String)>> {
    let mut all = vec![vec![("TENSORWIRE_TRANSPORT", "tcp".to_owned())]];
    #[cfg(feature = "quic")]
    {
        let authority = tensorwire::transports::tcp::Authority::generate().unwrap();
        let any = authority.any_rank().unwrap();
        all.push(vec![
            ("TENSORWIRE_TRANSPORT", "quic".to_owned()),
            ("TENSORWIRE_TLS_CA", authority.ca()),
            ("TENSORWIRE_TLS_CERT", any.cert),
            ("TENSORWIRE_TLS_KEY", any.key),
        ]);
    }
    all
}

#[test]
fn a_host_that_is_cut_off_is_named_within_seconds() {
    let Some(hosts) = Hosts::new(3) else {
        eprintln!("skipped: making network namespaces takes root and iproute2");
        return;
    };
    let (secret, store) = (Secret::generate().unwrap().to_hex(), format!("tcp:{}:29600", Hosts::address(0)));
    let modes = ["busy", "waiting", "unconnected"];
    for (own, mode) in all_transports().iter().flat_map(|own| modes.map(|mode| (own, mode))) {
        let place = tempfile::tempdir().unwrap();
        let is_cut = place.path().join("cut");
        let env = |rank: &'static str| {
            let mut env = vec![
                ("TENSORWIRE_RANK", rank),
                ("TENSORWIRE_WORLD", "3"),
                ("TENSORWIRE_STORE", &*store),
                ("TENSORWIRE_SECRET", &*secret),
                ("TENSORWIRE_PEER_TIMEOUT", "2"),
                ("TENSORWIRE_TEST_MODE", mode),
                ("TENSORWIRE_TEST_CUT", is_cut.to_str().unwrap()),
            ];
            env.extend(own.iter().map(|(name, value)| (*name, &**value)));
            env
        };
        let places: Vec<_> = hosts.hosts.iter().cloned().zip(["0", "1", "2"].map(env)).collect();
        let mut job = Job::start_within("cut", &places);
        (0..3).for_each(|rank| drop(job.wait_for(rank, "at work")));
        // In the middle of a call, or waiting in one.
        std::thread::sleep(Duration::from_millis(300));
        hosts.cut(2);
        std::fs::write(&is_cut, "").unwrap();
        let start = Instant::now();
        for rank in 0..2 {
            // Two seconds, the intervals at which it is looked at, and a busy machine; the timeout is 30.
            let (status, text) = job.join_within(rank, Duration::from_secs(10));
            assert!(status.success() && text.contains(&format!("rank {rank}: lost rank 2 in ")), "{text}");
            assert!(text.contains("host"), "{mode}: {text}");
            println!("{mode}: rank {rank} after {:?}: {text}", start.elapsed());
        }
        if mode == "busy" {
            // The other side of the cut takes the others for lost.
            let (status, text) = job.join_within(2, Duration::from_secs(10));
            assert!(status.success() && text.contains("rank 2: lost rank "), "{text}");
        }
        assert!(ip(&format!("-n {} link set port2 master switch", hosts.switch)));
    }
}
