//! What the safe API costs a call, over the steps that it is made of.
//!
//! ```text
//! cargo bench --bench overhead
//! ```
//!
//! Two ranks, threads pinned to a processor each, all-reduce 8 bytes (two f32), in three ways, in turn:
//!
//! * `raw`: the protocol's own steps and a plain addition, as the least that anybody could write with them;
//! * `plan`: `AllReducePlan::run`, checked once;
//! * `all_reduce`: `Communicator::all_reduce`, checked at every call.
//!
//! A batch's figure is its slower thread's mean; the figure quoted the median over batches, and the difference to
//! `raw` the median of the differences within a turn. Where a group's memory happens to lie makes some 30 ns of
//! difference, so that turns are spread over many pairs of groups, each made anew; the quartiles of the differences say
//! how much it is. While a rank waits for its peer it has time for more: so the
//! second table shows a group of one rank, where nothing is hidden. There `raw` and `barrier` begin a call, publish
//! a step and end, and `all_reduce`, which needs no step, is what it checks before it takes the lock. Without
//! `--bench`, as under `cargo test`, each is tried once and means nothing.

use std::hint::{black_box, spin_loop};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use tensorwire::transports::shm::{self, Group};
use tensorwire::{Call, Communicator, DType, Op, Options, ReduceOp};

const CALL: Call = Call {
    op: Op::AllReduce,
    dtype: Some(DType::F32),
    reduce: Some(ReduceOp::Sum),
    count: 2,
    root: None,
    layout: 0,
    wire: None,
};

fn main() {
    let measure = std::env::args().any(|a| a == "--bench");
    let (calls, turns, groups) = if measure { (50_000, 5, 31) } else { (10, 1, 1) };
    let cpus = allowed_cpus();
    let [first, second, ..] = cpus[..] else {
        eprintln!("overhead: two ranks take two processors, and this process may use one");
        std::process::exit(2);
    };
    let times = (0..groups).flat_map(|_| measure_ranks([first, second], calls, turns)).collect();
    report("2 ranks, a processor each: ns a call", ["raw", "plan", "all_reduce"], times);
    let times = (0..groups).map(|_| measure_alone(calls)).collect();
    report("1 rank: ns a call", ["raw", "barrier", "all_reduce"], times);
}

/// Nanoseconds a call of each way, turn by turn.
fn measure_ranks(cpus: [usize; 2], calls: usize, turns: usize) -> Vec<[f64; 3]> {
    let groups = shm::in_process(2, &Options::default()).unwrap();
    let comms = Communicator::in_process(2).unwrap();
    let start = Start::of(2);
    let mut of_ranks = thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .zip(comms)
            .zip(cpus)
            .map(|((mut group, comm), cpu)| {
                let start = &start;
                scope.spawn(move || {
                    pin(cpu);
                    let plan = comm.all_reduce_plan::<f32>(2, ReduceOp::Sum).unwrap();
                    let turn = |_| {
                        [
                            batch(start, calls, |x| raw(&mut group, x)),
                            batch(start, calls, |x| plan.run(x).unwrap()),
                            batch(start, calls, |x| comm.all_reduce(x, ReduceOp::Sum).unwrap()),
                        ]
                    };
                    (0..turns).map(turn).collect::<Vec<_>>()
                })
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect::<Vec<_>>().into_iter()
    });
    let (zero, one) = (of_ranks.next().unwrap(), of_ranks.next().unwrap());
    let slower = |(a, b): ([f64; 3], [f64; 3])| std::array::from_fn(|way| a[way].max(b[way]));
    zero.into_iter().zip(one).map(slower).collect()
}

fn raw(group: &mut Group, x: &mut [f32; 2]) {
    group.begin(CALL).unwrap();
    let step = group.next_step().unwrap();
    group.publish_inline(bytemuck::bytes_of(x));
    group.wait_all(step).unwrap();
    let theirs = group.peer_inline(1 - group.rank(), step).first_chunk::<8>().unwrap();
    let theirs: [f32; 2] = bytemuck::pod_read_unaligned(theirs);
    *x = [x[0] + theirs[0], x[1] + theirs[1]];
    group.end();
}

fn measure_alone(calls: usize) -> [f64; 3] {
    let mut group = shm::in_process(1, &Options::default()).unwrap().remove(0);
    let comm = Communicator::in_process(1).unwrap().remove(0);
    let barrier = Call { op: Op::Barrier, dtype: None, reduce: None, count: 0, ..CALL };
    let start = Start::of(1);
    [
        batch(&start, calls, |_| {
            group.begin(barrier).unwrap();
            let step = group.next_step().unwrap();
            group.publish();
            group.wait_all(step).unwrap();
            group.end();
        }),
        batch(&start, calls, |_| comm.barrier().unwrap()),
        batch(&start, calls, |x| comm.all_reduce(x, ReduceOp::Sum).unwrap()),
    ]
}

/// Where the threads of a batch meet before it, without sleeping.
struct Start {
    threads: usize,
    come: AtomicUsize,
}

impl Start {
    fn of(threads: usize) -> Start {
        Start { threads, come: AtomicUsize::new(0) }
    }

    fn meet(&self) {
        let round = self.come.fetch_add(1, Ordering::Relaxed) / self.threads + 1;
        while self.come.load(Ordering::Relaxed) < round * self.threads {
            spin_loop();
        }
    }
}

/// Mean nanoseconds of a call, after a tenth as many to warm up.
fn batch(start: &Start, calls: usize, mut call: impl FnMut(&mut [f32; 2])) -> f64 {
    start.meet();
    // The sum of zeros stays one.
    let mut x = black_box([0f32; 2]);
    (0..calls / 10).for_each(|_| call(&mut x));
    let began = Instant::now();
    (0..calls).for_each(|_| call(&mut x));
    let spent = began.elapsed();
    assert_eq!(black_box(x), [0.0; 2]);
    spent.as_secs_f64() * 1e9 / calls as f64
}

fn report(title: &str, ways: [&str; 3], turns: Vec<[f64; 3]>) {
    println!("{title:<40}{:>10}{:>10}{:>16}", "median", "over raw", "quartiles");
    for (way, name) in ways.iter().enumerate() {
        let [_, time, _] = quartiles(turns.iter().map(|t| t[way]).collect());
        let [low, over, high] = quartiles(turns.iter().map(|t| t[way] - t[0]).collect());
        println!("{name:<40}{time:>10.1}{over:>10.1}{:>16}", format!("{low:.1}, {high:.1}"));
    }
}

fn quartiles(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [1, 2, 3].map(|quarter| values[(values.len() - 1) * quarter / 4])
}

/// The processors that this process may use.
fn allowed_cpus() -> Vec<usize> {
    let set = sched_getaffinity(None).expect("to tell which processors may be used");
    (0..CpuSet::MAX_CPU).filter(|cpu| set.is_set(*cpu)).collect()
}

fn pin(cpu: usize) {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set).expect("to run on a processor that may be used");
}
