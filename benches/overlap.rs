//! What started calls cost and what they hide: two ranks, as threads, over shared memory, over TCP on loopback, and over
//! TCP through a relay that holds everything back for a millisecond, as a link between distant hosts would.
//!
//! ```text
//! cargo bench --features tcp --bench overlap
//! ```
//!
//! The first table compares an all-reduce that blocks with one that is started and waited for at once (`start`,
//! `start_all_reduce`), and some that block one after the other with some that are started before the first is waited
//! for; times are microseconds a call. The second has work for the processor beside the call, for about as long as the call takes:
//! the work alone, the call alone, and both with the call started before the work. What is hidden is the share of the
//! shorter of the two that `both` doesn't take. Each way takes its turn in every round; times are medians of the
//! rounds, of the slower rank's. Without `--bench`, as under `cargo test`, each is tried once and means nothing.

use std::collections::VecDeque;
use std::hint::black_box;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::channel;
use std::sync::{Mutex, PoisonError};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::{Duration, Instant};

use tensorwire::transports::store::{Store, StoreServer, UnixStore};
use tensorwire::transports::tcp::{Secret, TcpOptions};
use tensorwire::{Communicator, Deadline, ReduceOp, Result};

/// How long the relay holds back what it passes on.
const DELAY: Duration = Duration::from_millis(1);

/// How long to measure.
#[derive(Clone, Copy)]
struct Effort {
    batch: Duration,
    rounds: usize,
}

type Way<'a> = &'a mut dyn FnMut(&Communicator) -> Result<()>;

/// The median seconds of each way.
fn seconds<const N: usize>(comm: &Communicator, effort: Effort, mut ways: [Way<'_>; N]) -> Result<[f64; N]> {
    let mut batch = |way: usize, calls: u32| {
        comm.barrier()?;
        let start = Instant::now();
        for _ in 0..calls {
            ways[way](comm)?;
        }
        let mut seconds = [start.elapsed().as_secs_f64() / f64::from(calls)];
        comm.all_reduce(&mut seconds, ReduceOp::Max)?;
        Result::Ok(seconds[0])
    };
    // As many calls as fit, for each way: at least one.
    let mut calls = [1; N];
    for (way, calls) in calls.iter_mut().enumerate() {
        for _ in 0..3 {
            *calls = (effort.batch.as_secs_f64() / batch(way, *calls)?).clamp(1.0, 1e5) as u32;
        }
    }
    let mut times = [(); N].map(|()| Vec::with_capacity(effort.rounds));
    for _ in 0..effort.rounds {
        for (way, times) in times.iter_mut().enumerate() {
            times.push(batch(way, calls[way])?);
        }
    }
    Ok(times.map(|mut times| {
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }))
}

fn name(bytes: usize) -> String {
    match bytes {
        1024.. if bytes.is_multiple_of(1 << 20) => format!("{} MiB", bytes >> 20),
        1024.. => format!("{} KiB", bytes >> 10),
        _ => format!("{bytes} B"),
    }
}

/// An all-reduce of `bytes`, in the ways in which it can be made. Maxima stay what they are.
fn calls(comm: &Communicator, over: &str, effort: Effort, bytes: usize) -> Result<()> {
    let many = ((64 << 20) / bytes).clamp(1, 16);
    let (mut a, mut b, mut c) = (vec![1f32; bytes / 4], vec![1f32; bytes / 4], vec![1f32; bytes / 4]);
    let mut each: Vec<Vec<f32>> = vec![vec![1f32; bytes / 4]; many];
    let mut all = each.clone();
    let [blocking, start, start_all_reduce, several, started] = seconds(
        comm,
        effort,
        [
            &mut |comm| comm.all_reduce(black_box(&mut a), ReduceOp::Max),
            &mut |comm| {
                let work = comm.start(std::mem::take(&mut b), |comm, x| comm.all_reduce(x, ReduceOp::Max))?;
                b = work.wait()?;
                Ok(())
            },
            &mut |comm| {
                c = comm.start_all_reduce(std::mem::take(&mut c), ReduceOp::Max)?.wait()?;
                Ok(())
            },
            &mut |comm| each.iter_mut().try_for_each(|x| comm.all_reduce(x, ReduceOp::Max)),
            &mut |comm| {
                let start = |x| comm.start_all_reduce(x, ReduceOp::Max);
                let works: Vec<_> = all.drain(..).map(start).collect::<Result<_>>()?;
                all = works.into_iter().map(|work| work.wait()).collect::<Result<_>>()?;
                Ok(())
            },
        ],
    )?;
    if comm.rank() == 0 {
        println!(
            "| {over} | {} | {:.1} | {:.1} | {:.1} | {many} | {:.1} | {:.1} |",
            name(bytes),
            blocking * 1e6,
            start * 1e6,
            start_all_reduce * 1e6,
            several * 1e6 / many as f64,
            started * 1e6 / many as f64
        );
    }
    Ok(())
}

/// Something for the processor to do that needs no memory beyond its nearest cache.
fn compute(turns: u64) {
    let mut x = [1.0f32; 1024];
    for _ in 0..turns {
        for x in &mut x {
            *x = x.mul_add(0.999, 0.001);
        }
        black_box(&mut x);
    }
}

/// An all-reduce of `bytes` beside work that takes about as long.
fn beside_work(comm: &Communicator, over: &str, effort: Effort, bytes: usize) -> Result<()> {
    let (mut a, mut b) = (vec![1f32; bytes / 4], vec![1f32; bytes / 4]);
    let brief = Effort { rounds: effort.rounds.min(3), ..effort };
    let [call, thousand] = seconds(
        comm,
        brief,
        [&mut |comm| comm.all_reduce(&mut a, ReduceOp::Max), &mut |_| {
            compute(1000);
            Ok(())
        }],
    )?;
    // The same on both ranks, for the times are.
    let turns = (call / thousand * 1000.0).max(1.0) as u64;
    let [work, call, both] = seconds(
        comm,
        effort,
        [
            &mut |_| {
                compute(turns);
                Ok(())
            },
            &mut |comm| comm.all_reduce(&mut a, ReduceOp::Max),
            &mut |comm| {
                let started = comm.start_all_reduce(std::mem::take(&mut b), ReduceOp::Max)?;
                compute(turns);
                b = started.wait()?;
                Ok(())
            },
        ],
    )?;
    if comm.rank() == 0 {
        println!(
            "| {over} | {} | {:.1} | {:.1} | {:.1} | {:.0} % |",
            name(bytes),
            work * 1e6,
            call * 1e6,
            both * 1e6,
            100.0 * (work + call - both) / work.min(call)
        );
    }
    Ok(())
}

/// A store that tells a rank that the other one is at the relay.
#[derive(Debug)]
struct Detour {
    store: UnixStore,
    own: Mutex<String>,
}

impl Store for Detour {
    fn set(&self, key: &str, value: &[u8], deadline: Deadline) -> Result<()> {
        if key.contains("/at/") {
            *self.own.lock().unwrap_or_else(PoisonError::into_inner) =
                String::from_utf8_lossy(value).into_owned();
        }
        self.store.set(key, value, deadline)
    }

    fn get(&self, key: &str, deadline: Deadline) -> Result<Vec<u8>> {
        let value = self.store.get(key, deadline)?;
        let text = String::from_utf8_lossy(&value);
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if key.ends_with("/at/1") {
            return Ok(relay_to(&text).into_bytes());
        }
        match text.split_once(' ').filter(|_| key.ends_with("/all")) {
            Some((zero, _)) => Ok(format!("{} {own}", relay_to(zero)).into_bytes()),
            None => Ok(value),
        }
    }

    fn add(&self, key: &str, delta: i64, deadline: Deadline) -> Result<i64> {
        self.store.add(key, delta, deadline)
    }
}

/// Where what is said is passed on to `to`, later. It goes with the process.
fn relay_to(to: &str) -> String {
    let to: SocketAddr = to.parse().expect("an address");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let at = listener.local_addr().expect("its address").to_string();
    spawn(move || {
        for from in listener.incoming().flatten() {
            let Ok(to) = TcpStream::connect(to) else { continue };
            for stream in [&from, &to] {
                let _ = stream.set_nodelay(true);
            }
            if let (Ok(back), Ok(onward)) = (from.try_clone(), to.try_clone()) {
                pass_on(from, onward);
                pass_on(to, back);
            }
        }
    });
    at
}

fn pass_on(mut from: TcpStream, mut to: TcpStream) {
    let (send, receive) = channel::<(Instant, Vec<u8>)>();
    spawn(move || {
        let mut bytes = vec![0; 256 << 10];
        while let Ok(n @ 1..) = from.read(&mut bytes) {
            if send.send((Instant::now() + DELAY, bytes[..n].to_vec())).is_err() {
                break;
            }
        }
    });
    spawn(move || {
        for (at, bytes) in receive {
            sleep(at.saturating_duration_since(Instant::now()));
            if to.write_all(&bytes).is_err() {
                break;
            }
        }
        let _ = to.shutdown(Shutdown::Write);
    });
}

/// Two ranks, as threads, over what is named.
fn over(
    name: &'static str,
    rank: fn(&Communicator, &str, Effort) -> Result<()>,
    effort: Effort,
) -> Result<()> {
    let start = |comm: Communicator| spawn(move || rank(&comm, name, effort));
    let ranks: VecDeque<JoinHandle<Result<()>>> = match name {
        "shm" => Communicator::in_process(2)?.into_iter().map(start).collect(),
        _ => {
            let (server, secret) = (StoreServer::start()?, Secret::generate()?);
            let joined = (0..2).map(|rank| {
                let (secret, address) = (secret.clone(), server.address());
                spawn(move || {
                    let store = UnixStore::connect(&address, Deadline::after(Duration::from_secs(10)))?;
                    let detour = Detour { store, own: Mutex::default() };
                    let store: &dyn Store = if name == "tcp" { &detour.store } else { &detour };
                    Communicator::join_tcp(rank, 2, store, None, &secret, &TcpOptions::default())
                })
            });
            let joined: Vec<_> = joined.collect();
            joined.into_iter().map(|j| j.join().expect("no panic").map(start)).collect::<Result<_>>()?
        }
    };
    ranks.into_iter().try_for_each(|r| r.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
}

fn all_calls(comm: &Communicator, name: &str, effort: Effort) -> Result<()> {
    [8, 64 << 10, 16 << 20].into_iter().try_for_each(|bytes| calls(comm, name, effort, bytes))
}

fn all_beside_work(comm: &Communicator, name: &str, effort: Effort) -> Result<()> {
    [4096, 64 << 10, 16 << 20].into_iter().try_for_each(|bytes| beside_work(comm, name, effort, bytes))
}

fn main() -> Result<()> {
    let effort = match std::env::args().any(|a| a == "--bench") {
        true => Effort { batch: Duration::from_millis(20), rounds: 9 },
        false => Effort { batch: Duration::ZERO, rounds: 1 },
    };
    let links = ["shm", "tcp", "tcp, 1 ms away"];
    println!(
        "| over | bytes | blocking | start, wait | start_all_reduce, wait | of several | blocking | started |"
    );
    println!("| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |");
    links.into_iter().try_for_each(|name| over(name, all_calls, effort))?;
    println!("\n| over | bytes | work | call | both | hidden |");
    println!("| --- | --- | ---: | ---: | ---: | ---: |");
    links.into_iter().try_for_each(|name| over(name, all_beside_work, effort))
}
