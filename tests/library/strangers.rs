//! Whoever comes to a store's port without the job's secret: they cost bounded memory and time, and the job nothing.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tensorwire::Deadline;
use tensorwire::transports::store::{LOOPBACK, Store, TcpStore, TcpStoreServer};
use tensorwire::transports::tcp::Secret;

use crate::job::Job;

/// Long enough for a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// How many come.
const STRANGERS: u64 = 10_000;

/// Bytes of a hello and of what answers it.
const HELLO: usize = 88;
const CHALLENGE: usize = 48;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        (0..len).map(|_| self.next() as u8).collect()
    }
}

fn address(server: &TcpStoreServer) -> SocketAddr {
    server.address().strip_prefix("tcp:").unwrap().parse().unwrap()
}

fn connect(to: SocketAddr) -> TcpStream {
    let stream = TcpStream::connect(to).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream
}

/// What a rank says and hears when it enters the store at `to`, recorded by a relay in between.
fn recorded(to: SocketAddr, secret: &Secret) -> (Vec<u8>, Vec<u8>) {
    let relay = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("tcp:{}", relay.local_addr().unwrap());
    std::thread::scope(|s| {
        let talk = s.spawn(move || {
            let (inner, outer) = (relay.accept().unwrap().0, connect(to));
            let copy = |mut from: TcpStream, mut to: TcpStream| {
                let (mut all, mut chunk) = (Vec::new(), [0; 4096]);
                while let Ok(n @ 1..) = from.read(&mut chunk) {
                    all.extend_from_slice(&chunk[..n]);
                    if to.write_all(&chunk[..n]).is_err() {
                        break;
                    }
                }
                let _ = to.shutdown(Shutdown::Write);
                all
            };
            let (a, b) = (inner.try_clone().unwrap(), outer.try_clone().unwrap());
            let back = std::thread::spawn(move || copy(b, a));
            (copy(inner, outer), back.join().unwrap())
        });
        let store = TcpStore::meet(&place, 1, 2, secret, Deadline::after(SOON)).unwrap();
        store.set("said", b"once", Deadline::after(SOON)).unwrap();
        drop(store);
        talk.join().unwrap()
    })
}

fn status(field: &str) -> u64 {
    let text = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = text.lines().find(|line| line.starts_with(field)).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

/// In a process of its own, whose memory and threads nothing else changes.
#[test]
fn ten_thousand_strangers_do_not_disturb_a_running_job() {
    let (status, text) = Job::start("strangers", 1, &[]).join(0);
    assert!(status.success(), "{text}");
}

pub(crate) fn strangers() {
    let secret = Secret::generate().unwrap();
    let server = TcpStoreServer::start(LOOPBACK, 2, &secret).unwrap();
    let to = address(&server);
    let (said, _) = recorded(to, &secret);
    let zero = TcpStore::meet(&server.address(), 0, 2, &secret, Deadline::after(SOON)).unwrap();
    let (memory, threads) = (status("VmRSS:"), status("Threads:"));

    let over = AtomicBool::new(false);
    let (calls, slowest) = std::thread::scope(|s| {
        let job = s.spawn(|| {
            let (mut calls, mut slowest) = (0u32, Duration::ZERO);
            while !over.load(Ordering::Relaxed) {
                let start = Instant::now();
                let sum = zero.add("calls", 1, Deadline::after(SOON)).unwrap();
                slowest = slowest.max(start.elapsed());
                calls += 1;
                assert_eq!(sum, i64::from(calls));
                // Newcomers get in meanwhile.
                if calls % 200 == 1 {
                    let one =
                        TcpStore::meet(&server.address(), 1, 2, &secret, Deadline::after(SOON)).unwrap();
                    assert_eq!(one.get("said", Deadline::after(SOON)).unwrap(), b"once");
                }
                std::thread::sleep(Duration::from_micros(200));
            }
            (calls, slowest)
        });
        let mut random = Random(0x9e37_79b9_7f4a_7c15);
        let mut silent = Vec::new();
        for n in 0..STRANGERS {
            let Ok(mut stream) = TcpStream::connect(to) else { panic!("stranger {n} finds nobody") };
            let (at, bit) = (random.next() as usize % said.len(), 1 << (random.next() % 8));
            let mut mutated = said.clone();
            mutated[at] ^= bit;
            let len = random.next() as usize % 300;
            let bytes = match n % 6 {
                0 => random.bytes(len),
                1 => mutated,
                // Cut off, and held open for a while.
                2 => said[..at.min(HELLO - 1)].to_vec(),
                3 => [&said[..HELLO], &random.bytes(32)[..]].concat(),
                4 => b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
                _ => [&said[..8], &random.bytes(len)[..]].concat(),
            };
            let _ = stream.write_all(&bytes);
            if n % 6 == 2 {
                silent.push(stream);
                if silent.len() > 300 {
                    silent.remove(0);
                }
            }
        }
        over.store(true, Ordering::Relaxed);
        job.join().unwrap()
    });
    assert!(calls > 100, "the job came to {calls} calls only");
    assert!(slowest < Duration::from_secs(2), "a call took {slowest:?}");
    let grown = status("VmRSS:").saturating_sub(memory);
    assert!(grown < 32 << 10, "{grown} KiB more memory");
    assert!(status("Threads:") <= threads + 8, "{} threads", status("Threads:"));
    assert_eq!(zero.get("said", Deadline::after(SOON)).unwrap(), b"once");
}

#[test]
fn what_was_overheard_lets_nobody_in() {
    let secret = Secret::generate().unwrap();
    let server = TcpStoreServer::start(LOOPBACK, 2, &secret).unwrap();
    let (said, heard) = recorded(address(&server), &secret);
    let hex = secret.to_hex();
    let raw: Vec<u8> = (0..32).map(|i| u8::from_str_radix(&hex[2 * i..2 * i + 2], 16).unwrap()).collect();
    for wire in [&said, &heard] {
        assert!(!wire.windows(32).any(|w| w == raw) && !wire.windows(64).any(|w| w == hex.as_bytes()));
    }
    let mut replay = connect(address(&server));
    replay.write_all(&said).unwrap();
    let mut answer = Vec::new();
    // It hangs up after a challenge of its own: no answer, no store.
    let _ = replay.read_to_end(&mut answer);
    assert_eq!(answer.len(), CHALLENGE, "a fresh challenge and nothing else");
    assert_ne!(answer[16..], heard[16..CHALLENGE]);
}

#[test]
fn another_version_is_told_ours() {
    let secret = Secret::generate().unwrap();
    let server = TcpStoreServer::start(LOOPBACK, 2, &secret).unwrap();
    let (mut said, _) = recorded(address(&server), &secret);
    said[8] ^= 0x40;
    let mut other = connect(address(&server));
    other.write_all(&said[..HELLO]).unwrap();
    let mut answer = Vec::new();
    let _ = other.read_to_end(&mut answer);
    assert_eq!((answer.len(), &answer[..8]), (CHALLENGE, &b"tensorwr"[..]));
    assert_ne!(answer[8], said[8]);

    // And a rank that meets a store of another version says so.
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let place = format!("tcp:{}", listener.local_addr().unwrap());
    std::thread::scope(|s| {
        s.spawn(|| {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; HELLO]).unwrap();
            answer[8] ^= 0x80;
            stream.write_all(&answer).unwrap();
        });
        let error = TcpStore::meet(&place, 1, 2, &secret, Deadline::after(SOON)).unwrap_err().to_string();
        assert!(error.contains("version"), "{error}");
    });
}
