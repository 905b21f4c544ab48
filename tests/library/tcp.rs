//! Ranks over TCP: processes that die, stop, leave or differ; and strangers, who must not matter.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tensorwire::transports::store::{LOOPBACK, Store, StoreServer, TcpStore, TcpStoreServer, UnixStore};
use tensorwire::transports::tcp::{Secret, TcpOptions};
use tensorwire::{Communicator, Deadline, Error, ReduceOp};

use crate::job::Job;
use crate::processes::{assert_killed_is_named, assert_others_are_named};

/// Long enough for a busy machine, and far below the default timeout of 30 s.
const SOON: Duration = Duration::from_secs(10);

/// Starts `body` in `world` processes over TCP.
pub(crate) fn start(body: &str, world: usize, env: &[(&str, &str)]) -> Job {
    let secret = Secret::generate().unwrap().to_hex();
    let mut all = vec![("TENSORWIRE_TRANSPORT", "tcp"), ("TENSORWIRE_SECRET", &*secret)];
    all.extend_from_slice(env);
    Job::start(body, world, &all)
}

#[test]
fn processes_find_each_other_and_agree() {
    for (world, interface) in [(1, ""), (2, ""), (4, "127.0.0.0/8"), (3, "lo")] {
        let mut job = start("sum", world, &[("TENSORWIRE_INTERFACE", interface)]);
        for rank in 0..world {
            let (status, text) = job.join(rank);
            let expected = format!("rank {rank} of {world}: {}", 100_000.0 * world as f32);
            assert!(status.success() && text.contains(&expected), "{text}");
        }
    }
}

#[test]
fn ipv6_works_where_the_host_has_it() {
    if TcpListener::bind("[::1]:0").is_err() {
        return;
    }
    let mut job = start("sum", 2, &[("TENSORWIRE_INTERFACE", "::1")]);
    for rank in 0..2 {
        let (status, text) = job.join(rank);
        assert!(status.success() && text.contains("200000"), "{text}");
    }
}

#[test]
fn torchruns_variables_and_the_secret_are_enough() {
    let (secret, run) = (Secret::generate().unwrap().to_hex(), std::process::id().to_string());
    let rank = |rank| {
        vec![
            ("RANK", rank),
            ("WORLD_SIZE", "2"),
            ("MASTER_ADDR", "127.0.0.1"),
            ("MASTER_PORT", "29500"),
            ("TORCHELASTIC_RUN_ID", &*run),
            ("TENSORWIRE_TRANSPORT", "tcp"),
            ("TENSORWIRE_SECRET", &*secret),
        ]
    };
    let mut job = Job::start_with("sum", &[rank("0"), rank("1")]);
    for rank in 0..2 {
        let (status, text) = job.join(rank);
        assert!(status.success() && text.contains("200000"), "{text}");
    }
    let mut job = Job::start_with(
        "join",
        &[rank("0").into_iter().filter(|(n, _)| *n != "TENSORWIRE_SECRET").collect()],
    );
    let text = job.join(0).1;
    assert!(text.contains("TENSORWIRE_SECRET_FILE"), "{text}");
}

#[test]
fn a_killed_rank_is_named_on_every_other() {
    assert_killed_is_named(&[2, 3, 4], |body, world| (start(body, world, &[]), ()));
}

#[test]
fn a_rank_that_leaves_differs_or_aborts_is_named() {
    assert_others_are_named(|body, world| (start(body, world, &[]), ()));
}

#[test]
fn a_stopped_rank_is_named_when_the_timeout_is_over() {
    let mut job = start("endless", 3, &[("TENSORWIRE_TIMEOUT", "2")]);
    (0..3).for_each(|rank| drop(job.wait_for(rank, "at work")));
    job.signal(1, Signal::STOP);
    for rank in [0, 2] {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success(), "{text}");
        assert!(text.contains("timed out after 2s waiting for rank(s) [1]"), "{text}");
    }
    // The stopped rank learns of it as soon as it runs again.
    job.signal(1, Signal::CONT);
    let (_, text) = job.join_within(1, SOON);
    assert!(text.contains("timed out after 2s") || text.contains("lost rank"), "{text}");
}

#[test]
fn ranks_that_do_not_fit_together_are_told_so() {
    let secret = Secret::generate().unwrap();
    let options = TcpOptions { timeout: Duration::from_secs(1), ..TcpOptions::default() };
    let join = |address: &str, rank, world| {
        let store = TcpStore::meet(address, rank, world, &secret, Deadline::after(options.timeout))?;
        Communicator::join_tcp(rank, world, &store, Some(store.peer()), &secret, &options).map(drop)
    };
    // One doesn't come; when it does, the others have given up.
    let server = TcpStoreServer::start(LOOPBACK, 3, &secret).unwrap();
    let address = server.address();
    std::thread::scope(|s| {
        let address = &address;
        let ranks = [0, 1].map(|rank| s.spawn(move || join(address, rank, 3).unwrap_err().to_string()));
        for text in ranks.map(|r| r.join().unwrap()) {
            assert!(
                text.contains("rank(s) [2] did not come within 1s") || text.contains("rank 0 has not seen"),
                "{text}"
            );
        }
        let late = join(address, 2, 3).unwrap_err().to_string();
        assert!(late.contains("rank(s) [2] did not come within 1s"), "{late}");
    });
    // Another world size, over a store that checks it, and over one that doesn't.
    let server = TcpStoreServer::start(LOOPBACK, 3, &secret).unwrap();
    let text = join(&server.address(), 1, 2).unwrap_err().to_string();
    assert!(text.contains("started for a world of 2"), "{text}");
    let server = StoreServer::start().unwrap();
    std::thread::scope(|s| {
        let join = |rank, world| {
            let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
            Communicator::join_tcp(rank, world, &store, None, &secret, &options).unwrap_err().to_string()
        };
        let one = s.spawn(move || join(1, 2));
        let zero = join(0, 3);
        let one = one.join().unwrap();
        assert!(one.contains("rank 1 was started for a world of 2, rank 0 for 3"), "{one}");
        assert!(zero.contains("did not come within 1s"), "{zero}");
    });
}

/// A rank that reduces and checks until a file is there, and says where it listens.
pub(crate) fn busy() {
    let comm = Communicator::from_env().unwrap();
    let stop = std::path::PathBuf::from(std::env::var_os("TENSORWIRE_TEST_STOP").unwrap());
    let place = comm.transport().unwrap();
    println!("\nport {} end", place.split(' ').nth(1).unwrap());
    for n in 0.. {
        // All ranks stop at the same call.
        let mut x = vec![n as u32 + comm.rank() as u32; 1 + n % 5000];
        x[0] = u32::from(comm.rank() == 0 && stop.exists());
        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert!(x[1..].iter().all(|x| *x == 3 * n as u32 + 3));
        // A group of their own has connections of its own, made while strangers knock.
        if n % 64 == 0 {
            comm.split(Some(0), 0).unwrap().unwrap().barrier().unwrap();
        }
        if x[0] == 1 {
            break;
        }
    }
    println!("unharmed");
}

/// What strangers see of a job.
pub(crate) struct Target {
    pub(crate) ports: Vec<SocketAddr>,
    pids: Vec<u32>,
}

impl Target {
    /// How many entries the ranks' directories `what` in /proc have, at most.
    pub(crate) fn most(&self, what: &str) -> usize {
        let count = |pid: &u32| std::fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
        self.pids.iter().map(count).max().unwrap()
    }

    /// Kilobytes of memory that the ranks have, at most.
    pub(crate) fn memory(&self) -> usize {
        let of = |pid: &u32| {
            let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
            let line = text.lines().find(|l| l.starts_with("VmRSS:")).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap()
        };
        self.pids.iter().map(of).max().unwrap()
    }
}

/// Runs a job of three ranks that reduce and check until `attack` is done.
fn unharmed_by(attack: impl FnOnce(&Target)) {
    unharmed_with(&[], attack);
}

/// As [`unharmed_by`], with these variables too.
pub(crate) fn unharmed_with(env: &[(&str, &str)], attack: impl FnOnce(&Target)) {
    let place = tempfile::tempdir().unwrap();
    let stop = place.path().join("stop");
    let mut job = start("busy", 3, &[&[("TENSORWIRE_TEST_STOP", stop.to_str().unwrap())], env].concat());
    let port = |rank| {
        let text = job.wait_for(rank, " end");
        text.lines().find_map(|l| l.strip_prefix("port ")?.strip_suffix(" end")).unwrap().parse().unwrap()
    };
    let ports = (0..3).map(port).collect();
    attack(&Target { ports, pids: (0..3).map(|rank| job.pid(rank)).collect() });
    std::fs::write(stop, "").unwrap();
    for rank in 0..3 {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success() && text.contains("unharmed"), "{text}");
    }
}

pub(crate) fn random_bytes(seed: &mut u64, len: usize) -> Vec<u8> {
    let mut next = || {
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (*seed >> 33) as u8
    };
    (0..len).map(|_| next()).collect()
}

/// A hello as a rank of the job's own protocol would say it, but for what it can't know.
pub(crate) fn hello() -> Vec<u8> {
    let mut bytes = b"tensorwr\x01\x00\x01\x00".to_vec();
    for number in [3u32, 1, 0] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(&[7; 64]);
    bytes
}

/// Says `bytes`, and hears the other side out.
pub(crate) fn say(port: SocketAddr, bytes: &[u8]) -> Vec<u8> {
    let Ok(mut stream) = TcpStream::connect(port) else { return Vec::new() };
    stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    let _ = stream.write_all(bytes);
    let _ = stream.shutdown(Shutdown::Write);
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer);
    answer
}

#[test]
fn garbage_and_broken_handshakes_do_not_disturb_a_job() {
    unharmed_by(|target| {
        let ports = &target.ports;
        let mut seed = 1;
        for round in 0..400usize {
            let port = ports[round % 3];
            let len = round % 300;
            let mut bytes = match round % 4 {
                0 => random_bytes(&mut seed, len),
                1 => hello()[..len.min(88)].to_vec(),
                2 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
                _ => {
                    let mut bytes = hello();
                    bytes[len % 88] ^= 1 + (round % 255) as u8;
                    bytes
                }
            };
            bytes.extend(random_bytes(&mut seed, 32));
            let answer = say(port, &bytes);
            assert!(answer.len() <= 48, "a stranger is told nothing but a nonce: {} bytes", answer.len());
        }
        // A right hello with a proof that can't be right, and frames behind it.
        for round in 0..100 {
            let mut bytes = hello();
            bytes.extend(random_bytes(&mut seed, 32));
            bytes.extend_from_slice(b"TWF1\x03\0\0\0");
            bytes.extend(random_bytes(&mut seed, 1000));
            assert!(say(ports[round % 3], &bytes).len() <= 48);
        }
    });
}

#[test]
fn slow_openers_and_thousands_of_connections_cost_bounded_memory() {
    unharmed_by(|target| {
        let ports = &target.ports;
        let (threads, memory) = (target.most("task"), target.memory());
        // They say something now and then, and never enough.
        let mut slow: Vec<TcpStream> = (0..600).map(|i| TcpStream::connect(ports[i % 3]).unwrap()).collect();
        for byte in &hello()[..10] {
            slow.iter_mut().for_each(|s| drop(s.write_all(&[*byte])));
        }
        for i in 0..3000 {
            drop(TcpStream::connect(ports[i % 3]));
        }
        assert_eq!(target.most("task"), threads, "a stranger is no reason for a thread");
        assert!(target.most("fd") < 128 + 50, "{}", target.most("fd"));
        assert!(target.memory() < memory + 2048, "{} kB, then {}", memory, target.memory());
        // Whoever says too little is dropped while it still holds its end.
        let end = Instant::now() + SOON;
        while target.most("fd") > 50 {
            assert!(Instant::now() < end, "{} descriptors are left", target.most("fd"));
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

/// A store that tells rank 1 that rank 0 is elsewhere, where what they say is passed on and recorded.
#[derive(Debug)]
struct Detour {
    store: UnixStore,
    listener: TcpListener,
    recording: Arc<Mutex<Vec<u8>>>,
    zero: Mutex<Option<SocketAddr>>,
}

impl Store for &Detour {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> tensorwire::Result<()> {
        self.store.set(key, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> tensorwire::Result<Vec<u8>> {
        let value = self.store.get(key, deadline)?;
        if !key.ends_with("/all") {
            return Ok(value);
        }
        let text = String::from_utf8(value).unwrap();
        let (zero, others) = text.split_once(' ').unwrap();
        let (zero, processors) = zero.split_once('/').unwrap();
        let zero: SocketAddr = zero.parse().unwrap();
        *self.zero.lock().unwrap() = Some(zero);
        let (listener, recording) = (self.listener.try_clone().unwrap(), self.recording.clone());
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let onward = TcpStream::connect(zero).unwrap();
                let (back, to) = (onward.try_clone().unwrap(), stream.try_clone().unwrap());
                pass_on(back, to, Arc::default());
                pass_on(stream, onward, recording.clone());
            }
        });
        let here = self.listener.local_addr().unwrap();
        Ok(format!("{here}/{processors} {others}").into_bytes())
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> tensorwire::Result<i64> {
        self.store.add(key, delta, deadline)
    }
}

/// Passes on what is said until one side ends.
fn pass_on(mut from: TcpStream, mut to: TcpStream, recording: Arc<Mutex<Vec<u8>>>) {
    std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            recording.lock().unwrap().extend_from_slice(&bytes[..n]);
            if to.write_all(&bytes[..n]).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

#[test]
fn a_recorded_handshake_and_what_followed_it_are_refused() {
    let (secret, server) = (Secret::generate().unwrap(), StoreServer::start().unwrap());
    let options = TcpOptions::default();
    let connect = || UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let detour = Detour { store: connect(), listener, recording: Arc::default(), zero: Mutex::new(None) };
    let (played, after) = std::sync::mpsc::channel();
    std::thread::scope(|s| {
        let (detour, secret, options, connect) = (&detour, &secret, &options, &connect);
        s.spawn(move || {
            let comm = Communicator::join_tcp(0, 2, &connect(), None, secret, options).unwrap();
            // Hello, proof, and the message with its header: before this rank wants it, and would call back.
            let end = Instant::now() + SOON;
            while detour.recording.lock().unwrap().len() < 88 + 32 + 64 + 4 {
                assert!(Instant::now() < end, "nothing was recorded");
                std::thread::sleep(Duration::from_millis(1));
            }
            let recorded = detour.recording.lock().unwrap().clone();
            let mut x = [0u32];
            comm.recv(&mut x, 1).unwrap();
            assert_eq!(x, [7]);
            let port = detour.zero.lock().unwrap().unwrap();
            for _ in 0..20 {
                assert!(say(port, &recorded).len() <= 48, "a challenge at most, and no answer");
            }
            played.send(()).unwrap();
            comm.barrier().unwrap();
            // Nothing of the recording has become a message.
            comm.recv(&mut x, 1).unwrap();
            assert_eq!(x, [8]);
        });
        s.spawn(move || {
            let comm = Communicator::join_tcp(1, 2, &detour, None, secret, options).unwrap();
            comm.send(&[7u32], 0).unwrap();
            after.recv().unwrap();
            comm.barrier().unwrap();
            comm.send(&[8u32], 0).unwrap();
        });
    });
}

#[test]
fn a_rank_with_another_secret_is_refused_and_named() {
    let (server, options) = (
        StoreServer::start().unwrap(),
        TcpOptions { timeout: Duration::from_secs(2), ..TcpOptions::default() },
    );
    std::thread::scope(|s| {
        let rank = |rank| {
            let (server, options) = (&server, &options);
            s.spawn(move || {
                let secret = Secret::generate().unwrap();
                let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
                let comm = Communicator::join_tcp(rank, 2, &store, None, &secret, options).unwrap();
                let error = comm.barrier().unwrap_err();
                // Kept until both have tried: whoever is gone can't be named for its secret.
                (comm, error)
            })
        };
        for (_, error) in [rank(0), rank(1)].map(|r| r.join().unwrap()) {
            assert!(
                matches!(error, Error::PeerLost { .. }) && error.to_string().contains("secret"),
                "{error}"
            );
        }
    });
}

#[test]
fn a_rank_that_connects_after_the_end_is_told_of_it() {
    let step = std::sync::Barrier::new(2);
    crate::common::tcp_threads(2, &TcpOptions::default(), |_, comm| {
        if comm.rank() == 0 {
            // Nobody is connected yet, and this rank makes no call in which it could tell anybody.
            comm.abort("pressed stop");
            step.wait();
        } else {
            step.wait();
            let error = comm.barrier().unwrap_err();
            assert!(matches!(&error, Error::Aborted { by: 0, .. }), "{error}");
        }
        step.wait();
    });
}

#[test]
fn ranks_that_die_one_after_the_other_leave_one_that_goes_on() {
    for seed in 0..8 {
        let text = seed.to_string();
        let mut job = start("dwindle", 5, &[("FAULT_SEED", &text)]);
        let (status, text) = job.join_within(seed % 5, SOON);
        assert!(status.success() && text.contains("alone"), "seed {seed}: {text}");
    }
}

/// A rank that reduces until there is an error, and goes on with who is left: until it may end.
pub(crate) fn goes_on() {
    let comm = Communicator::from_env().unwrap();
    println!("\nat work");
    // So little that a stopped rank's connections hold what is sent to it, and the reason behind it.
    while comm.all_reduce(&mut [1f32; 1000], ReduceOp::Sum).is_ok() {}
    match comm.shrink() {
        Ok(next) => {
            let mut x = [1u32];
            next.all_reduce(&mut x, ReduceOp::Sum).unwrap();
            assert_eq!(x, [next.world() as u32]);
            println!("rank {} goes on as one of {}; end", comm.rank(), next.world());
            // Without the old group, what asks for it is still told.
            drop(comm);
            let stop = std::path::PathBuf::from(std::env::var_os("TENSORWIRE_TEST_STOP").unwrap());
            while !stop.exists() {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Err(error) => println!("{error}"),
    }
}

#[test]
fn a_stopped_rank_is_left_behind_and_does_not_go_on_alone() {
    for others_have_ended in [false, true] {
        let place = tempfile::tempdir().unwrap();
        let stop = place.path().join("stop");
        let env = [
            ("TENSORWIRE_TIMEOUT", "3"),
            ("TENSORWIRE_PEER_TIMEOUT", "2"),
            ("TENSORWIRE_TEST_STOP", stop.to_str().unwrap()),
        ];
        let mut job = start("goes on", 3, &env);
        (0..3).for_each(|rank| drop(job.wait_for(rank, "at work")));
        std::thread::sleep(Duration::from_millis(100));
        job.signal(1, Signal::STOP);
        for rank in [0, 2] {
            let text = job.wait_for(rank, "; end");
            assert!(text.contains(&format!("rank {rank} goes on as one of 2")), "{text}");
        }
        if others_have_ended {
            std::fs::write(&stop, "").unwrap();
            for rank in [0, 2] {
                assert!(job.join_within(rank, SOON).0.success());
            }
        }
        job.signal(1, Signal::CONT);
        let (_, text) = job.join_within(1, SOON);
        assert!(text.contains("went on without this one"), "{text}");
        std::fs::write(&stop, "").unwrap();
    }
}

#[test]
fn who_waits_in_another_group_is_not_blamed() {
    let secret = Secret::generate().unwrap().to_hex();
    for late in ["2", "5"] {
        let mut job = Job::start_each("indirect", 3, |rank| {
            vec![
                ("TENSORWIRE_TRANSPORT", "tcp"),
                ("TENSORWIRE_SECRET", &*secret),
                ("TENSORWIRE_TIMEOUT", if rank == 0 { late } else { "2" }),
                ("TENSORWIRE_PEER_TIMEOUT", "2"),
            ]
        });
        for rank in [0, 1] {
            let (status, text) = job.join_within(rank, 2 * SOON);
            assert!(status.success() && text.contains("told"), "{text}");
        }
    }
}
