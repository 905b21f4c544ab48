//! Ranks that are killed, stopped, or leave in the middle of random calls: every other rank is told at once who,
//! no call that returned has a wrong byte, and the survivors go on.
//!
//! `TENSORWIRE_FAULT_ROUNDS` sets how many jobs are struck (10), `TENSORWIRE_FAULT_SEED` where their random
//! numbers begin (0).

use std::collections::BTreeMap;
use std::io::Write;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tensorwire::transports::shm;
use tensorwire::{Algorithm, Call, Communicator, Error, Op, ReduceOp, Result};

use crate::job::Job;

/// How long the ranks wait for a stopped one.
const TIMEOUT: Duration = Duration::from_millis(1500);

/// A death is known after some milliseconds; this leaves room for a machine that is busy with other things, and is far
/// below the default timeout, within which a death would be known in any case.
const DEATH_KNOWN: Duration = Duration::from_secs(10);

/// Calls that the survivors make.
const CALLS_AFTER: usize = 12;

struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    fn of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }
}

fn variable(name: &str) -> Option<usize> {
    std::env::var(name).ok().map(|text| text.parse().unwrap())
}

/// Nanoseconds on a clock that all processes share.
fn now() -> i64 {
    let t = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    t.tv_sec * 1_000_000_000 + t.tv_nsec
}

// What the ranks do: calls that a seed gives all of them alike.

/// Element `i` of rank `rank` in the call with this salt.
fn element(salt: u32, rank: usize, i: usize) -> u32 {
    let h =
        (i as u32 ^ salt.rotate_left(9)).wrapping_mul(0x9E37_79B9) ^ (rank as u32).wrapping_mul(0x85EB_CA6B);
    (h ^ (h >> 15)).wrapping_mul(0x2C1B_3C6D)
}

fn elements(salt: u32, rank: usize, len: usize) -> Vec<u32> {
    (0..len).map(|i| element(salt, rank, i)).collect()
}

fn sums(salt: u32, world: usize, len: usize) -> Vec<u32> {
    let sum = |i| (0..world).fold(0u32, |s, r| s.wrapping_add(element(salt, r, i)));
    (0..len).map(sum).collect()
}

/// The one thing that must never happen.
#[track_caller]
fn check(got: &[u32], expected: &[u32], what: &str) {
    assert!(got == expected, "wrong bytes from {what} of {} elements", got.len());
}

/// One random call, checked.
fn one_call(comm: &Communicator, random: &mut Random, salt: u32) -> Result<()> {
    let (me, world) = (comm.rank(), comm.world());
    let len = random.of(&[1, 12, 13, 1000, 20_000, 300_000]);
    let (root, kind, extra) = (random.below(world), random.below(21), random.below(1 << 20));
    let mine = elements(salt, me, len);
    let of = |r: usize| elements(salt, r, len);
    let all = || (0..world).flat_map(of).collect::<Vec<_>>();
    // Where counts differ, rank r has r elements more.
    let counts: Vec<usize> = (0..world).map(|r| len + r).collect();
    let before = |r: usize| counts[..r].iter().sum::<usize>();
    let total = before(world);
    let mut out = vec![0u32; len];
    match kind {
        0 | 1 => {
            let forced = Algorithm::ALL[extra % Algorithm::ALL.len()];
            comm.set_algorithm(Some(forced))?;
            if comm.algorithm(len * 4).is_err() {
                comm.set_algorithm(None)?;
            }
            let mut x = mine;
            let result = comm.all_reduce(&mut x, ReduceOp::Sum);
            comm.set_algorithm(None)?;
            result?;
            check(&x, &sums(salt, world, len), forced.name());
        }
        2 => {
            comm.all_reduce_into(&mine, &mut out, ReduceOp::Sum)?;
            check(&out, &sums(salt, world, len), "all_reduce_into");
        }
        3 => {
            let mut x = mine;
            comm.all_reduce_plan::<u32>(len, ReduceOp::Sum)?.run(&mut x)?;
            check(&x, &sums(salt, world, len), "all_reduce_plan");
        }
        4 => {
            let mut x = mine;
            comm.reduce(&mut x, ReduceOp::Sum, root)?;
            let expected = if me == root { sums(salt, world, len) } else { of(me) };
            check(&x, &expected, "reduce");
        }
        5 => {
            let mut gathered = vec![0; world * len];
            comm.all_gather(&mine, &mut gathered)?;
            check(&gathered, &all(), "all_gather");
        }
        6 => {
            let mut gathered = vec![0; total];
            comm.all_gather_v(&elements(salt, me, counts[me]), &mut gathered, &counts)?;
            let expected: Vec<u32> = (0..world).flat_map(|r| elements(salt, r, counts[r])).collect();
            check(&gathered, &expected, "all_gather_v");
        }
        7 => {
            comm.reduce_scatter(&elements(salt, me, world * len), &mut out, ReduceOp::Sum)?;
            check(&out, &sums(salt, world, world * len)[me * len..][..len], "reduce_scatter");
        }
        8 => {
            let mut part = vec![0; counts[me]];
            comm.reduce_scatter_v(&elements(salt, me, total), &mut part, &counts, ReduceOp::Sum)?;
            check(&part, &sums(salt, world, total)[before(me)..][..counts[me]], "reduce_scatter_v");
        }
        9 => {
            let mut gathered = vec![0; if me == root { world * len } else { 0 }];
            comm.gather(&mine, &mut gathered, root)?;
            if me == root {
                check(&gathered, &all(), "gather");
            }
        }
        10 => {
            let input = if me == root { elements(salt, root, world * len) } else { Vec::new() };
            comm.scatter(&input, &mut out, root)?;
            check(&out, &elements(salt, root, world * len)[me * len..][..len], "scatter");
        }
        11 => {
            let mut output = vec![0; world * len];
            comm.all_to_all(&elements(salt, me, world * len), &mut output)?;
            let block = |r| elements(salt, r, world * len)[me * len..][..len].to_vec();
            check(&output, &(0..world).flat_map(block).collect::<Vec<_>>(), "all_to_all");
        }
        12 => {
            let mut x = if me == root { of(root) } else { out };
            comm.broadcast(&mut x, root)?;
            check(&x, &of(root), "broadcast");
        }
        13 if world > 1 => {
            let (to, from) = ((me + 1) % world, (me + world - 1) % world);
            comm.send_recv(&mine, to, &mut out, from)?;
            check(&out, &of(from), "send_recv");
        }
        14 => {
            // Along the line, each on behalf of the first.
            let mut x = if me == 0 { of(0) } else { out };
            if me > 0 {
                comm.recv(&mut x, me - 1)?;
            }
            if me + 1 < world {
                comm.send(&x, me + 1)?;
            }
            check(&x, &of(0), "send and recv");
        }
        15 => {
            // Two groups at once, each with calls of its own; then all again, also if a group has failed.
            let group = comm.split(Some((me % 2) as u32), 0)?.expect("a group for each rank");
            let done = (|| {
                for n in 0..=extra % 3 {
                    let mut x = elements(salt + n as u32, group.rank(), len);
                    group.all_reduce(&mut x, ReduceOp::Sum)?;
                    check(&x, &sums(salt + n as u32, group.world(), len), "a group's all_reduce");
                }
                Ok(())
            })();
            comm.barrier()?;
            done?;
        }
        16 => {
            let mut x = comm.symmetric::<u32>(len)?;
            x.copy_from_slice(&mine);
            comm.all_reduce_symmetric(&mut x, ReduceOp::Sum)?;
            check(&x, &sums(salt, world, len), "all_reduce_symmetric");
        }
        17 => {
            let mut x = vec![0; total];
            x[before(me)..][..counts[me]].copy_from_slice(&elements(salt, me, counts[me]));
            comm.all_gather_v_in_place(&mut x, &counts)?;
            let expected: Vec<u32> = (0..world).flat_map(|r| elements(salt, r, counts[r])).collect();
            check(&x, &expected, "all_gather_v_in_place");
            let mut x = elements(salt, me, total);
            comm.reduce_scatter_v_in_place(&mut x, &counts, ReduceOp::Sum)?;
            let part = &x[before(me)..][..counts[me]];
            check(part, &sums(salt, world, total)[before(me)..][..counts[me]], "reduce_scatter_v_in_place");
        }
        18 => {
            let mut x = if me == root { elements(salt, root, total) } else { vec![0; counts[me]] };
            comm.scatter_v_in_place(&mut x, &counts, root)?;
            let part = if me == root { &x[before(me)..][..counts[me]] } else { &x };
            check(part, &elements(salt, root, total)[before(me)..][..counts[me]], "scatter_v_in_place");
            comm.gather_v_in_place(&mut x, &counts, root)?;
            if me == root {
                check(&x, &elements(salt, root, total), "gather_v_in_place");
            }
        }
        19 => {
            // Rank a sends b as many as b sends a.
            let count = |a: usize, b: usize| len / world + a + b;
            let message = |a: usize, b: usize| elements(salt + b as u32, a, count(a, b));
            let counts: Vec<usize> = (0..world).map(|r| count(me, r)).collect();
            let mut x: Vec<u32> = (0..world).flat_map(|r| message(me, r)).collect();
            comm.all_to_all_v_in_place(&mut x, &counts)?;
            let expected: Vec<u32> = (0..world).flat_map(|r| message(r, me)).collect();
            check(&x, &expected, "all_to_all_v_in_place");
        }
        _ => {
            let work = comm.start(mine, |comm, x| comm.all_reduce(x, ReduceOp::Sum))?;
            let behind = comm.barrier();
            check(&work.wait()?, &sums(salt, world, len), "a started all_reduce");
            behind?;
        }
    }
    Ok(())
}

// The ranks.

/// A rank of a job of which one is struck. It writes when that happened, or when it was told, and what.
pub(crate) fn struck() {
    let comm = Communicator::from_env().unwrap();
    let (me, world) = (comm.rank(), comm.world());
    let mut random = Random(variable("FAULT_SEED").unwrap() as u64);
    let (victim, call) = (random.below(world), random.below(40));
    // From a moment to some milliseconds, all magnitudes alike.
    let delay = Duration::from_nanos(10u64.pow(2 + random.below(5) as u32) * (1 + random.below(9) as u64));
    let how = std::env::var("FAULT").unwrap();
    let threads = threads_of_this_process();
    println!("ready");
    let mut n = 0;
    let error = loop {
        if n == call && me == victim {
            match &*how {
                "leave" => {
                    println!("\nstruck {}", now());
                    drop(comm);
                    return;
                }
                how => strike(delay, if how == "kill" { Signal::KILL } else { Signal::STOP }),
            }
        }
        n += 1;
        if let Err(e) = one_call(&comm, &mut random, n as u32) {
            break e;
        }
        assert!(n < 100_000, "nobody was struck");
    };
    let told = now();
    if me == victim {
        // It was stopped, the others went on without it, and now it runs again.
        assert!(matches!(&error, Error::Timeout { .. } | Error::PeerLost { .. }), "{error}");
        let error = comm.shrink().unwrap_err();
        assert!(matches!(&error, Error::Rendezvous { .. }), "{error}");
        println!("\nwoken");
        return;
    }
    match (&error, &*how) {
        (Error::PeerLost { peer, how: was, .. }, "kill") => {
            assert!(*peer == victim && was.contains("its process ended"), "{error}");
        }
        (Error::PeerLost { peer, how: was, .. }, "leave") => {
            // A process that ends at once may do so before the thread of its started calls has let go.
            let gone = was.contains("it left the group") || was.contains("its process ended");
            assert!(*peer == victim && gone, "{error}");
        }
        (Error::Timeout { waiting_for, after, .. }, "stop") => {
            assert!(*waiting_for == [victim] && *after == TIMEOUT, "{error}");
        }
        _ => panic!("{how} of rank {victim}: {error}"),
    }
    assert!(matches!(comm.barrier(), Err(Error::Poisoned { .. })));

    let next = comm.shrink().unwrap();
    assert_eq!((next.rank(), next.world()), (me - usize::from(me > victim), world - 1));
    // The ranks were told in different calls: from here on they draw alike again.
    let mut random = Random(n_after(victim));
    for n in 0..CALLS_AFTER {
        one_call(&next, &mut random, n as u32).unwrap();
    }
    drop((comm, next));
    let end = Instant::now() + DEATH_KNOWN;
    while threads_of_this_process() > threads {
        assert!(Instant::now() < end, "a thread is left");
        std::thread::sleep(Duration::from_millis(1));
    }
    let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
    assert!(!maps.contains("memfd:tensorwire"), "{maps}");
    println!("\ntold {told} {}", error.to_string().replace('\n', " "));
}

fn n_after(victim: usize) -> u64 {
    1000 + victim as u64
}

fn threads_of_this_process() -> usize {
    std::fs::read_dir("/proc/self/task").unwrap().count()
}

/// Sends this process a signal after `delay`, wherever it is then.
fn strike(delay: Duration, signal: Signal) {
    let start = Instant::now();
    std::thread::spawn(move || {
        while start.elapsed() < delay {
            std::hint::spin_loop();
        }
        let mut out = std::io::stdout().lock();
        writeln!(out, "\nstruck {}", now()).unwrap();
        out.flush().unwrap();
        rustix::process::kill_process(rustix::process::getpid(), signal).unwrap();
    });
}

/// The number behind a word at the start of a line.
fn moment(text: &str, word: &str) -> Option<i64> {
    let line = text.lines().find_map(|l| l.strip_prefix(word))?;
    line.split_whitespace().next()?.parse().ok()
}

#[test]
fn whoever_is_struck_in_any_call_is_named_and_the_others_go_on() {
    let rounds = variable("TENSORWIRE_FAULT_ROUNDS").unwrap_or(10);
    let first = variable("TENSORWIRE_FAULT_SEED").unwrap_or(0);
    let timeout = TIMEOUT.as_secs_f64().to_string();
    let (mut delays, mut calls) = (BTreeMap::<_, Vec<f64>>::new(), BTreeMap::<String, usize>::new());
    for seed in first..first + rounds {
        // Every way and every world, in turn.
        let (how, world) = (["kill", "stop", "kill", "leave"][seed % 4], 2 + seed / 4 % 3);
        let text = seed.to_string();
        let env = [("FAULT", how), ("FAULT_SEED", &text), ("TENSORWIRE_TIMEOUT", &timeout)];
        let env = if how == "stop" { &env[..] } else { &env[..2] };
        let mut job = Job::start("struck", world, env);
        let victim = Random(seed as u64).below(world);
        let told: Vec<String> = (0..world)
            .filter(|rank| *rank != victim)
            .map(|rank| {
                let (status, text) = job.join_within(rank, Duration::from_secs(20));
                assert!(status.success(), "round {seed}, {how} of {victim} of {world}, rank {rank}: {text}");
                text
            })
            .collect();
        if how == "stop" {
            job.signal(victim, Signal::CONT);
        }
        let (status, text) = job.join_within(victim, Duration::from_secs(20));
        match how {
            "kill" => assert!(!status.success(), "{text}"),
            "stop" => assert!(status.success() && text.contains("woken"), "round {seed}: {text}"),
            _ => assert!(status.success(), "round {seed}: {text}"),
        }
        let struck = moment(&text, "struck").expect("when the victim was struck");
        for text in told {
            let after = moment(&text, "told").expect("when the rank was told") - struck;
            assert!(after > 0, "round {seed}: told before anything had happened: {text}");
            let limit = if how == "stop" { TIMEOUT + DEATH_KNOWN } else { DEATH_KNOWN };
            assert!(after < limit.as_nanos() as i64, "round {seed}: known after {after} ns: {text}");
            delays.entry(how).or_default().push(after as f64 / 1e6);
            let call = text.lines().find(|l| l.starts_with("told")).unwrap();
            let name = call.split(['(', ' ']).find(|w| tensorwire::Op::ALL.iter().any(|o| o.name() == *w));
            *calls.entry(name.unwrap_or("?").to_owned()).or_default() += 1;
        }
    }
    for (how, mut ms) in delays {
        ms.sort_by(f64::total_cmp);
        let at = |q: f64| ms[((ms.len() - 1) as f64 * q) as usize];
        println!(
            "{how}: known to {} ranks after {:.2} ms (median), {:.1} (90 %), {:.1} (99 %), {:.1} (most)",
            ms.len(),
            at(0.5),
            at(0.9),
            at(0.99),
            at(1.0)
        );
    }
    println!("in: {calls:?}");
    let left = std::fs::read_dir("/dev/shm").into_iter().flatten().flatten();
    let left: Vec<_> =
        left.map(|e| e.file_name()).filter(|n| n.to_string_lossy().contains("tensorwire")).collect();
    assert!(left.is_empty(), "{left:?}");
}

// Ranks that wait.

/// Rank 0 comes a second after all others wait for it; they say what share of a processor they used meanwhile.
pub(crate) fn late() {
    let comm = Communicator::from_env().unwrap();
    comm.barrier().unwrap();
    if comm.rank() == 0 {
        while comm.flight_record().ranks[1..].iter().any(|rank| rank.waits_for.is_none()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        std::thread::sleep(Duration::from_secs(1));
    }
    let (start, before) = (Instant::now(), processor_time());
    if comm.rank().is_multiple_of(2) {
        comm.all_reduce(&mut [1f32; 1000], ReduceOp::Sum).unwrap();
    } else {
        comm.start(vec![1f32; 1000], |comm, x| comm.all_reduce(x, ReduceOp::Sum)).unwrap().wait().unwrap();
    }
    let share = (processor_time() - before).as_secs_f64() / start.elapsed().as_secs_f64();
    println!("\nwaited {} using {}", start.elapsed().as_millis(), (share * 1e6) as u64);
    comm.barrier().unwrap();
}

/// What all threads of this process have used.
pub(crate) fn processor_time() -> Duration {
    let mut usage = std::mem::MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: (1) `usage` has room for what is written; (2) a rusage is valid from zeros.
    let usage = unsafe {
        assert_eq!(libc::getrusage(libc::RUSAGE_SELF, usage.as_mut_ptr()), 0);
        usage.assume_init()
    };
    let time = |t: libc::timeval| Duration::new(t.tv_sec as u64, t.tv_usec as u32 * 1000);
    time(usage.ru_utime) + time(usage.ru_stime)
}

#[test]
fn ranks_that_wait_for_a_slow_one_use_almost_no_processor() {
    for world in [2, 4] {
        let mut job = Job::start("late", world, &[]);
        let texts: Vec<String> = (0..world).map(|rank| job.join(rank).1).collect();
        for text in &texts[1..] {
            let (waited, millionths) = (moment(text, "waited").unwrap(), used(text));
            assert!(waited >= 500, "{text}");
            println!(
                "world of {world}: waited {waited} ms with {:.2} % of a processor",
                millionths as f64 / 1e4
            );
            assert!(millionths < 50_000, "{text}");
        }
    }
}

fn used(text: &str) -> i64 {
    let line = text.lines().find(|l| l.starts_with("waited")).unwrap();
    line.rsplit_once(' ').unwrap().1.parse().unwrap()
}

/// The timeout is for a peer that doesn't come, not for a call that goes on.
#[test]
fn a_call_may_take_longer_than_the_timeout_while_its_ranks_come() {
    const STEPS: u32 = 4;
    let options = shm::Options { timeout: Duration::from_millis(1500), ..Default::default() };
    std::thread::scope(|s| {
        for mut group in shm::in_process(2, &options).unwrap() {
            s.spawn(move || {
                let barrier = Call::bare(Op::Barrier);
                group.begin(barrier).unwrap();
                for _ in 0..STEPS {
                    let step = group.next_step().unwrap();
                    if group.rank() == 1 {
                        std::thread::sleep(options.timeout / 3);
                    }
                    group.publish();
                    group.wait_all(step).unwrap();
                }
                group.end();
            });
        }
    });
}
