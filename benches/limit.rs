//! This machine's floor: what no all-reduce through memory can beat here.
//!
//! ```text
//! cargo bench --bench limit             # a table
//! cargo bench --bench limit -- --json   # one JSON object a figure, for `tensorwire bench --limit`
//! ```
//!
//! Every figure comes from threads pinned to one processor each, in batches of back-to-back repetitions after
//! a warm-up as long as a tenth of a batch; a batch's figure is its slowest thread's mean, the figure quoted
//! the median over batches. Without `--bench`, as under `cargo test`, each is tried once and means nothing.
//!
//! * `round_trip`: two cache lines, one written by each processor. The first writes a number to its line, the
//!   second answers with it as soon as it sees it: from the first's store until it has seen the answer.
//! * `exchange`: the same two lines, but both processors write first, then wait for the other's number: the
//!   least that any call can take in which each of two ranks learns something from the other.
//! * `copy`: bytes copied a second (each is read once and written once) by `memcpy`, over all threads, each
//!   on two arrays of its own. `hot`: both arrays together are half the second-level cache. `cold`: they are
//!   at least four times the last-level cache.
//! * `two_shot`: the ideal all-reduce of two arrays of f32 by two threads, one for each array. Both meet,
//!   each reduces half with the library's own kernel and writes the result into both arrays, both meet. No
//!   protocol, no checks, no copy into shared memory, huge pages where the system grants them. With `touch`,
//!   each thread first overwrites its own array, as a producer would: without, a thread finds the half that
//!   it always reduces in its own cache.
//!
//! A meeting is one `exchange`. Arrays are used over and over, so they are hot as far as they fit in a cache.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::fs;
use std::hint::{black_box, spin_loop};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tensorwire::collectives::reduce::Kernels;
use tensorwire::{DType, ReduceOp};

const SIZES: [usize; 8] = [4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20, 16 << 20, 64 << 20];

/// Pairs of processors whose distance is measured, at most.
const PAIRS: usize = 6;

/// Bytes of each array that are reduced, then copied from the first-level cache into the other array.
const BLOCK: usize = 8 << 10;

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let Some(unknown) = args.iter().find(|a| !["--json", "--bench", "--test"].contains(&a.as_str())) {
        fail(&format!("unknown argument '{unknown}': --json is all there is"));
    }
    let given = |name: &str| args.iter().any(|a| a == name);
    let effort = match given("--bench") && !given("--test") {
        true => Effort { batch: Duration::from_millis(40), batches: 7 },
        false => Effort { batch: Duration::from_micros(10), batches: 1 },
    };
    let cpus = allowed_cpus();
    let [first, second, ..] = cpus[..] else {
        fail("the floor of two ranks takes two processors, and this process may use one");
    };
    let report = Report { json: given("--json") };

    report.heading("two cache lines", &["processors", "round trip ns", "exchange ns"]);
    for pair in pairs(&cpus) {
        report.distance(pair, effort.seconds(&pair, round_trip), effort.seconds(&pair, exchange));
    }

    report.heading("memory copy, GB/s", &["threads", "hot", "cold"]);
    let (hot, cold) = (cache_bytes(2, 1 << 20) / 4, (2 * cache_bytes(3, 32 << 20)).max(32 << 20));
    for threads in [&cpus[..1], &cpus[..]] {
        let copied = |bytes: usize| (bytes * threads.len()) as f64 / copy_seconds(&effort, threads, bytes);
        report.copy(threads.len(), (hot, copied(hot)), (cold, copied(cold)));
    }

    report.heading("ideal two-shot all-reduce, 2 threads, f32 sum, us", &["bytes", "untouched", "touched"]);
    for bytes in SIZES {
        let mut arrays = [Array::new(bytes), Array::new(bytes)];
        check_two_shot(&mut arrays);
        let seconds = |touch| effort.seconds(&[first, second], |turn: &Turn| two_shot(turn, &arrays, touch));
        report.two_shot(bytes, seconds(false), seconds(true));
    }
}

fn fail(why: &str) -> ! {
    eprintln!("limit: {why}");
    std::process::exit(2)
}

// ---- what is measured ----

fn round_trip(turn: &Turn) {
    if turn.me == 0 {
        turn.write();
        turn.wait();
    } else {
        turn.wait();
        turn.write();
    }
}

fn exchange(turn: &Turn) {
    turn.meet(turn.number);
}

fn copy_seconds(effort: &Effort, cpus: &[usize], bytes: usize) -> f64 {
    let arrays: Vec<_> = cpus.iter().map(|_| (Array::new(bytes), Array::new(bytes))).collect();
    effort.seconds(cpus, |turn: &Turn| {
        let (from, to) = &arrays[turn.me];
        // SAFETY: (1) both have `bytes` bytes; (2) they are two allocations; (3) only thread `me` uses them.
        unsafe { std::ptr::copy_nonoverlapping(from.at(0), to.at(0), bytes) };
        black_box(to.at(0));
    })
}

fn two_shot(turn: &Turn, arrays: &[Array; 2], touch: bool) {
    let bytes = arrays[0].bytes();
    if touch {
        // SAFETY: (1) the array has `bytes` bytes; (2) the other thread passed the last meeting of the round
        // before, so it is done with both arrays, and it won't use this one before the next.
        unsafe { arrays[turn.me].at(0).write_bytes(0, bytes) };
    }
    turn.meet(2 * turn.number - 1);
    let half = bytes / 2;
    // SAFETY: the halves don't overlap, and between the meetings each thread uses its own half alone.
    unsafe { reduce_both(arrays, turn.me * half, half) };
    turn.meet(2 * turn.number);
}

/// Reduces `len` bytes from `start` on, of both arrays, into both.
///
/// # Safety
/// No other thread uses that part of either array meanwhile.
unsafe fn reduce_both(arrays: &[Array; 2], start: usize, len: usize) {
    let Some(kernel) = Kernels::best().get(DType::F32, ReduceOp::Sum) else {
        unreachable!("every table has a sum of f32")
    };
    for at in (start..start + len).step_by(BLOCK) {
        let bytes = BLOCK.min(start + len - at);
        let (a, b) = (arrays[0].at(at), arrays[1].at(at));
        let sources = [a.cast_const(), b.cast_const()];
        // SAFETY: (1) both arrays have `bytes` bytes from `at`, and the caller gives them to this thread
        // alone; (2) they are aligned to pages and `at` to a block or a half, both multiples of 4; (3) the
        // destination is one of the sources; (4) `best` is what this processor runs.
        unsafe {
            kernel(a, sources.as_ptr(), 2, bytes / 4, 1.0);
            std::ptr::copy_nonoverlapping(a, b, bytes);
        }
    }
}

/// The floor counts only if what it computes is the sum.
fn check_two_shot(arrays: &mut [Array; 2]) {
    for (rank, array) in arrays.iter_mut().enumerate() {
        for (i, x) in array.values().iter_mut().enumerate() {
            *x = (i % 1000 + 1000 * rank) as f32;
        }
    }
    let half = arrays[0].bytes() / 2;
    // SAFETY: this is the only thread.
    unsafe {
        reduce_both(arrays, 0, half);
        reduce_both(arrays, half, half);
    }
    for array in arrays {
        let right = array.values().iter().enumerate().all(|(i, x)| *x == (2 * (i % 1000) + 1000) as f32);
        assert!(right, "the two-shot all-reduce gives no sum");
        array.values().fill(0.0);
    }
}

// ---- how it is measured ----

struct Effort {
    /// How long a batch is meant to take.
    batch: Duration,
    batches: usize,
}

impl Effort {
    /// Seconds that `step` takes when all of `cpus` do it at once: the median over batches.
    fn seconds(&self, cpus: &[usize], step: impl Fn(&Turn) + Sync) -> f64 {
        let (mut count, mut mean) = (1, batch(cpus, 1, &step));
        // The first calls are slower than the rest: count again once they are behind.
        for _ in 0..2 {
            count = ((self.batch.as_secs_f64() / mean) as u64).clamp(2, 10_000_000);
            mean = batch(cpus, count, &step);
        }
        let mut means: Vec<f64> = (0..self.batches).map(|_| batch(cpus, count, &step)).collect();
        means.sort_by(f64::total_cmp);
        means[means.len() / 2]
    }
}

/// The slowest thread's mean seconds over `count` steps, one thread on each of `cpus`.
fn batch(cpus: &[usize], count: u64, step: &(impl Fn(&Turn) + Sync)) -> f64 {
    let lines = [Line::default(), Line::default()];
    let waiting = AtomicUsize::new(cpus.len());
    thread::scope(|scope| {
        let started: Vec<_> = (0..cpus.len())
            .map(|me| {
                let (lines, waiting) = (&lines, &waiting);
                scope.spawn(move || {
                    pin(cpus[me]);
                    waiting.fetch_sub(1, Ordering::Relaxed);
                    while waiting.load(Ordering::Relaxed) > 0 {
                        spin_loop();
                    }
                    let warm_up = count / 10;
                    let mut start = Instant::now();
                    for number in 1..=warm_up + count {
                        if number == warm_up + 1 {
                            start = Instant::now();
                        }
                        step(&Turn { me, number, lines });
                    }
                    start.elapsed().as_secs_f64() / count as f64
                })
            })
            .collect();
        started.into_iter().filter_map(|t| t.join().ok()).fold(0.0, f64::max)
    })
}

/// A cache line with one writer; two lines' worth, as processors fetch pairs.
#[derive(Default)]
#[repr(align(128))]
struct Line(AtomicU64);

/// One thread's part in one repetition.
struct Turn<'a> {
    me: usize,
    /// Of the repetition, from 1.
    number: u64,
    /// Line `i` is written by thread `i` and read by the other of the two.
    lines: &'a [Line; 2],
}

impl Turn<'_> {
    fn write(&self) {
        self.lines[self.me].0.store(self.number, Ordering::Release);
    }

    fn wait(&self) {
        // Pairs with the store in `write` or `meet`: what the other did before it is seen after.
        while self.lines[1 - self.me].0.load(Ordering::Acquire) < self.number {
            spin_loop();
        }
    }

    /// Returns once both threads are at their meeting `number`, which grows from call to call.
    fn meet(&self, number: u64) {
        let meeting = Turn { number, ..*self };
        meeting.write();
        meeting.wait();
    }
}

/// Zeroed memory on huge pages where the system grants them, shared between threads by hand.
struct Array {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: it is memory without a thread of its own; whoever uses `at` vouches for the access.
unsafe impl Sync for Array {}

impl Array {
    fn new(bytes: usize) -> Array {
        const HUGE: usize = 2 << 20;
        let align = if bytes >= HUGE { HUGE } else { 4096 };
        let Ok(layout) = Layout::from_size_align(bytes, align) else {
            fail(&format!("{bytes} bytes are more than memory holds"))
        };
        // SAFETY: the layout is not of size 0.
        let start = unsafe { alloc_zeroed(layout) };
        let Some(start) = NonNull::new(start) else { handle_alloc_error(layout) };
        // SAFETY: the range is this allocation's alone. Advice that isn't taken changes nothing.
        let _ =
            unsafe { rustix::mm::madvise(start.as_ptr().cast(), bytes, rustix::mm::Advice::LinuxHugepage) };
        // SAFETY: `bytes` were allocated. Written, so that pages are there before the clock runs.
        unsafe { start.as_ptr().write_bytes(0, bytes) };
        Array { start, layout }
    }

    fn bytes(&self) -> usize {
        self.layout.size()
    }

    fn at(&self, offset: usize) -> *mut u8 {
        assert!(offset < self.bytes());
        // SAFETY: within the allocation, by the line above.
        unsafe { self.start.as_ptr().add(offset) }
    }

    fn values(&mut self) -> &mut [f32] {
        // SAFETY: (1) the memory is initialised, aligned and `bytes` long; (2) by `&mut self` nobody else
        // uses it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().cast(), self.bytes() / 4) }
    }
}

impl Drop for Array {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.start.as_ptr(), self.layout) }
    }
}

// ---- the machine ----

/// The processors that this process may use.
fn allowed_cpus() -> Vec<usize> {
    match sched_getaffinity(None) {
        Ok(set) => (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect(),
        Err(e) => fail(&format!("cannot tell which processors may be used: {e}")),
    }
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    if let Err(e) = sched_setaffinity(None, &set) {
        fail(&format!("cannot run on processor {cpu}: {e}"));
    }
}

/// All pairs of few processors; of many, the first with some that are ever farther from it.
fn pairs(cpus: &[usize]) -> Vec<[usize; 2]> {
    let n = cpus.len();
    if n * (n - 1) / 2 <= PAIRS {
        return (0..n).flat_map(|i| (i + 1..n).map(move |j| [cpus[i], cpus[j]])).collect();
    }
    let mut partners: Vec<usize> = (0..PAIRS).map(|i| 1 + i * (n - 2) / (PAIRS - 1)).collect();
    partners.dedup();
    partners.into_iter().map(|j| [cpus[0], cpus[j]]).collect()
}

/// Size of the data cache of a level as the first processor sees it, or `otherwise` where nobody tells.
fn cache_bytes(level: u32, otherwise: usize) -> usize {
    let read = |index: u32, what: &str| {
        let path = format!("/sys/devices/system/cpu/cpu0/cache/index{index}/{what}");
        fs::read_to_string(path).map(|s| s.trim().to_owned()).unwrap_or_default()
    };
    let index = (0..8).find(|i| read(*i, "level") == level.to_string() && read(*i, "type") != "Instruction");
    let size = index.and_then(|i| read(i, "size").strip_suffix('K')?.parse::<usize>().ok());
    size.map_or(otherwise, |kib| kib << 10)
}

// ---- the report ----

struct Report {
    json: bool,
}

impl Report {
    fn heading(&self, title: &str, columns: &[&str]) {
        if !self.json {
            println!("{title}");
            self.row(columns.iter().map(|c| c.to_string()));
        }
    }

    fn row(&self, cells: impl IntoIterator<Item = String>) {
        println!("{}", cells.into_iter().map(|c| format!("{c:>16}")).collect::<String>());
    }

    fn distance(&self, [a, b]: [usize; 2], round_trip: f64, exchange: f64) {
        let (round_trip, exchange) = (round_trip * 1e9, exchange * 1e9);
        if self.json {
            for (figure, ns) in [("round_trip", round_trip), ("exchange", exchange)] {
                println!(r#"{{"figure":"{figure}","processors":[{a},{b}],"ns":{ns:.1}}}"#);
            }
        } else {
            self.row([format!("{a} and {b}"), format!("{round_trip:.0}"), format!("{exchange:.0}")]);
        }
    }

    fn copy(&self, threads: usize, hot: (usize, f64), cold: (usize, f64)) {
        if self.json {
            for (state, (bytes, speed)) in [("hot", hot), ("cold", cold)] {
                let what =
                    format!(r#""figure":"copy","threads":{threads},"state":"{state}","bytes":{bytes}"#);
                println!(r#"{{{what},"gbps":{:.2}}}"#, speed / 1e9);
            }
        } else {
            let speeds = [hot.1, cold.1].map(|s| format!("{:.1}", s / 1e9));
            self.row([threads.to_string()].into_iter().chain(speeds));
        }
    }

    fn two_shot(&self, bytes: usize, untouched: f64, touched: f64) {
        if self.json {
            for (touch, seconds) in [(false, untouched), (true, touched)] {
                println!(
                    r#"{{"figure":"two_shot","touch":{touch},"bytes":{bytes},"us":{:.3}}}"#,
                    seconds * 1e6
                );
            }
        } else {
            let times = [untouched, touched].map(|s| format!("{:.2}", s * 1e6));
            self.row([bytes.to_string()].into_iter().chain(times));
        }
    }
}
