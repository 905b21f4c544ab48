//! Where the algorithms change over: from rank 0's table, whatever the others' environments say.

use std::path::Path;

use crate::common::{assert_same, buffer, reduced, threads};
use crate::job::Job;
use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::Table;
use tensorwire::transports::store::StoreServer;
use tensorwire::{Algorithm, Communicator, Options, ReduceOp, Tuning};

/// In a process: what each of some sizes would take, by group, and collectives that only agree if the ranks do.
pub(crate) fn tuned() {
    println!("chose {}", choices(&Communicator::from_env().unwrap()));
}

/// As [`tuned`], with threads for ranks.
pub(crate) fn tuned_threads() {
    std::thread::scope(|s| {
        for comm in Communicator::in_process(3).unwrap() {
            s.spawn(move || println!("chose {}", choices(&comm)));
        }
    });
}

fn choices(comm: &Communicator) -> String {
    let of = |comm: &Communicator| {
        let chosen = |bytes| {
            let (a, b) = (comm.algorithm(bytes).unwrap(), comm.algorithm_symmetric(bytes).unwrap());
            format!("{a}/{b}")
        };
        exercise(comm);
        format!("{} {}", chosen(1000), chosen(100_000))
    };
    let pair = comm.split(Some(comm.rank() as u32 / 2), 0).unwrap().unwrap();
    let (all, pair) = (of(comm), if pair.world() == 2 { of(&pair) } else { "alone".to_owned() });
    let shrunk = comm.shrink().unwrap();
    format!("{all}, {pair}, {}", of(&shrunk))
}

/// Calls whose number of steps follows from thresholds and chunks.
fn exercise(comm: &Communicator) {
    let (me, world) = (comm.rank(), comm.world());
    for len in [250usize, 25_000, 150_000] {
        let mut x = buffer::<f32>(me, len);
        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_same(&x, &reduced(ReduceOp::Sum, world, len), "all_reduce");
        let mut x = comm.symmetric::<f32>(len).unwrap();
        x.copy_from_slice(&buffer::<f32>(me, len));
        comm.all_reduce_symmetric(&mut x, ReduceOp::Sum).unwrap();
        assert_same(&x, &reduced(ReduceOp::Sum, world, len), "all_reduce_symmetric");
        let mut all = vec![0f32; len * world];
        comm.all_gather(&buffer::<f32>(me, len), &mut all).unwrap();
        assert_same(&all, &(0..world).flat_map(|r| buffer::<f32>(r, len)).collect::<Vec<_>>(), "all_gather");
        let mut x = buffer::<f32>(me, len);
        comm.broadcast(&mut x, world - 1).unwrap();
        assert_same(&x, &buffer::<f32>(world - 1, len), "broadcast");
        let mut mine = vec![0f32; len];
        comm.reduce_scatter(&buffer::<f32>(me, len * world), &mut mine, ReduceOp::Sum).unwrap();
        assert_same(&mine, &reduced(ReduceOp::Sum, world, len * world)[me * len..][..len], "reduce_scatter");
        // Where a rank exchanges in place, the others can't read what it has where it lies.
        for in_place in [None, Some(0)] {
            let mut swapped = buffer::<f32>(me, len * world);
            if in_place == Some(me) {
                comm.all_to_all_in_place(&mut swapped).unwrap();
            } else {
                comm.all_to_all(&buffer::<f32>(me, len * world), &mut swapped).unwrap();
            }
            let block = |r| buffer::<f32>(r, len * world)[me * len..][..len].to_vec();
            assert_same(&swapped, &(0..world).flat_map(block).collect::<Vec<_>>(), "all_to_all");
        }
    }
}

fn save(path: &Path, machine: Fingerprint, tunings: Vec<Tuning>) -> String {
    Table { tunings, ..Table::empty(machine) }.save(path).unwrap();
    path.display().to_string()
}

const SMALL: Tuning =
    Tuning { world: 2, one_shot: 0, symmetric_one_shot: 500, chunk: 4 << 10, single_copy_above: 0 };
const LARGE: Tuning = Tuning {
    world: 2,
    one_shot: 1 << 20,
    symmetric_one_shot: 1 << 20,
    chunk: 512 << 10,
    single_copy_above: usize::MAX,
};

/// What [`choices`] says by [`SMALL`], by [`LARGE`], and by the constants.
const BY_SMALL: &str = "two_shot/symmetric two_shot/symmetric";
const BY_LARGE: &str = "one_shot/one_shot one_shot/one_shot";
const BUILT_IN: &str = "one_shot/one_shot one_shot/symmetric";
const BUILT_IN_AT_3: &str = "one_shot/one_shot two_shot/symmetric";

#[test]
fn all_ranks_choose_by_rank_0s_table_whatever_their_own_says() {
    let folder = tempfile::tempdir().unwrap();
    let here = Fingerprint::read("/".as_ref());
    let elsewhere = Fingerprint { processor: "another".into(), ..here.clone() };
    let at = |name: &str| folder.path().join(name);
    std::fs::write(at("garbage"), "{\"schema\": 7").unwrap();
    let tables = [
        (save(&at("small"), here.clone(), vec![SMALL]), BY_SMALL, BY_SMALL),
        (save(&at("large"), here, vec![LARGE]), BY_LARGE, BY_LARGE),
        (save(&at("elsewhere"), elsewhere, vec![SMALL]), BUILT_IN_AT_3, BUILT_IN),
        (at("garbage").display().to_string(), BUILT_IN_AT_3, BUILT_IN),
        (at("missing").display().to_string(), BUILT_IN_AT_3, BUILT_IN),
        ("off".to_owned(), BUILT_IN_AT_3, BUILT_IN),
    ];
    for first in 0..tables.len() {
        let store = StoreServer::start().unwrap();
        let address = store.address();
        let ranks = ["0", "1", "2"];
        let envs = ranks.map(|rank| {
            let table = &tables[(first + rank.parse::<usize>().unwrap()) % tables.len()].0;
            vec![
                ("TENSORWIRE_RANK", rank),
                ("TENSORWIRE_WORLD", "3"),
                ("TENSORWIRE_STORE", &*address),
                ("TENSORWIRE_TABLE", &**table),
            ]
        });
        let mut job = Job::start_with("tuned", &envs);
        let (table, all, pair) = &tables[first];
        for rank in 0..3 {
            let (status, text) = job.join(rank);
            assert!(status.success(), "{table}: {text}");
            let pair = if rank == 2 { "alone" } else { pair };
            let expected = format!("chose {all}, {pair}, {all}");
            assert!(text.contains(&expected), "rank {rank} with {table} on rank 0: {text}, not {expected}");
        }
        let mut job = Job::start_with("tuned threads", &[vec![("TENSORWIRE_TABLE", &**table)]]);
        let (status, text) = job.join(0);
        assert!(status.success(), "{text}");
        assert_eq!(text.matches(&format!("chose {all}, ")).count(), 3, "{text}");
    }
}

#[test]
fn any_tuning_gives_the_same_results() {
    for chunk in [4 << 10, 12 << 10, 1 << 30] {
        for one_shot in [0, 5000, usize::MAX] {
            let tuning = vec![Tuning {
                world: 3,
                one_shot,
                symmetric_one_shot: one_shot,
                chunk,
                single_copy_above: one_shot,
            }];
            threads(3, &Options { tuning, ..Options::default() }, |comm| exercise(&comm));
        }
    }
}

#[test]
fn a_tuning_that_can_not_be_used_is_refused() {
    let refused = |tuning: Vec<Tuning>| {
        let options = Options { tuning, ..Options::default() };
        Communicator::in_process_with(2, &options).unwrap_err().to_string()
    };
    assert!(refused(vec![Tuning { chunk: 0, ..SMALL }]).contains("chunk: 0"));
    assert!(refused(vec![SMALL; 1000]).contains("1000 tunings: at most 256"));
}

#[test]
fn each_algorithm_can_be_forced_on_a_symmetric_buffer_and_symmetric_on_no_other() {
    for world in [2, 3] {
        threads(world, &Options::default(), |comm| {
            for len in [1usize, 12, 13, 5000, 300_000] {
                for algorithm in Algorithm::ALL {
                    comm.set_algorithm(Some(algorithm)).unwrap();
                    let mut x = comm.symmetric::<f32>(len).unwrap();
                    x.copy_from_slice(&buffer::<f32>(comm.rank(), len));
                    let done = comm.all_reduce_symmetric(&mut x, ReduceOp::Sum);
                    let chosen = comm.algorithm_symmetric(len * 4);
                    assert_eq!(done.is_ok(), chosen.is_ok(), "{algorithm} of {len}");
                    if done.is_ok() {
                        assert_eq!(chosen.unwrap(), algorithm);
                        assert_same(&x, &reduced(ReduceOp::Sum, world, len), algorithm);
                        let record = comm.flight_record();
                        let last = record.ranks[comm.rank()].calls.last().unwrap();
                        assert_eq!(last.algorithm.as_str(), algorithm.name());
                    }
                }
                comm.set_algorithm(Some(Algorithm::Symmetric)).unwrap();
                let error = comm.all_reduce(&mut vec![0f32; len], ReduceOp::Sum).unwrap_err().to_string();
                assert!(error.contains("symmetric is an algorithm for symmetric buffers"), "{error}");
            }
        });
    }
}
