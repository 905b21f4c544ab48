//! Links: measured, kept in a table, followed by every rank.

use std::path::PathBuf;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use tensorwire::collectives::network::{LinkClass, Links, LinksInForce, NetworkOptions};
use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::{Measured, Network, Table};
use tensorwire::transports::store::{StoreServer, TcpStoreServer, UnixStore};
use tensorwire::transports::tcp::{Secret, TcpOptions};
use tensorwire::{Algorithm, Communicator, Deadline, Error, Options, ReduceOp};

use crate::common::{assert_same, buffer, reduced, threads};

use crate::job::Job;
use crate::namespaces::Hosts;
use crate::network::ranks;

/// In a process: all-reduces until rank 0 is told to stop, and each call after which the choice was another.
pub(crate) fn adapts() {
    let comm = Communicator::from_env().unwrap();
    let stop = PathBuf::from(std::env::var_os("TENSORWIRE_TEST_STOP").unwrap());
    let (start, right) = (Instant::now(), reduced::<f32>(ReduceOp::Sum, comm.world(), LEN));
    let choice = || comm.algorithm(LEN * 4).unwrap();
    let mut chosen = choice();
    println!("\nat work with {chosen}");
    for call in 1.. {
        let mut x = buffer::<f32>(comm.rank(), LEN);
        comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
        assert_same(&x, &right, format_args!("call {call}"));
        if choice() != chosen {
            println!("after call {call}: {} instead of {chosen}", choice());
            chosen = choice();
        }
        // The test gives up where nothing changes: it would wait for ever.
        let mut over = [u8::from(stop.exists() || start.elapsed() > PATIENCE)];
        if call % 16 == 0 {
            comm.broadcast(&mut over, 0).unwrap();
            if over[0] == 1 {
                break;
            }
        }
    }
    println!("links {:?}", comm.network().unwrap());
}

/// Elements whose all-reduce takes one step where the latency counts, and two where the bandwidth does.
const LEN: usize = 1024;

/// Far longer than links take to be followed, also on a loaded machine.
const PATIENCE: Duration = Duration::from_secs(90);

#[test]
fn links_that_degrade_and_recover_change_the_choice_of_all_ranks_at_the_same_call() {
    let Some(hosts) = Hosts::new(4).filter(|hosts| hosts.limit(Some(1000)) && hosts.limit(None)) else {
        eprintln!("skipped: making network namespaces takes root and iproute2");
        return;
    };
    let place = tempfile::tempdir().unwrap();
    let stop = place.path().join("stop");
    let (secret, store) = (Secret::generate().unwrap().to_hex(), format!("tcp:{}:29601", Hosts::address(0)));
    let env = |rank: &'static str| {
        vec![
            ("TENSORWIRE_RANK", rank),
            ("TENSORWIRE_WORLD", "4"),
            // The namespaces are one kernel's.
            ("TENSORWIRE_HOST", rank),
            ("TENSORWIRE_STORE", &*store),
            ("TENSORWIRE_TRANSPORT", "tcp"),
            ("TENSORWIRE_SECRET", &*secret),
            ("TENSORWIRE_TABLE", "off"),
            ("TENSORWIRE_ADAPT", "20"),
            ("TENSORWIRE_TEST_STOP", stop.to_str().unwrap()),
        ]
    };
    let places: Vec<_> = hosts.hosts.iter().cloned().zip(["0", "1", "2", "3"].map(env)).collect();
    let mut job = Job::start_within("adapts", &places);
    let mut written: Vec<String> = (0..4).map(|rank| job.wait_for(rank, "at work with one_shot\n")).collect();
    for (mbit, expected) in
        [(Some(10), "two_shot instead of one_shot\n"), (None, "one_shot instead of two_shot\n")]
    {
        assert!(hosts.limit(mbit));
        for (rank, written) in written.iter_mut().enumerate() {
            written.push_str(&job.wait_for(rank, expected));
        }
    }
    std::fs::write(&stop, "").unwrap();
    let changes = |text: &str| {
        let lines = text.lines().filter(|line| line.starts_with("after call ") || line.starts_with("links "));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    let all: Vec<Vec<String>> = (0..4)
        .map(|rank| {
            let (status, text) = job.join(rank);
            assert!(status.success(), "{text}");
            changes(&format!("{}{text}", written[rank]))
        })
        .collect();
    println!("{:#?}", all[0]);
    assert!(all.iter().all(|lines| *lines == all[0]), "{all:#?}");
    assert!(all[0].last().unwrap().contains("inter: Adapted"), "{:?}", all[0]);
}

/// Measures as often as it may, over TCP or where ranks of one host share memory.
fn measuring(hosts: &str, share: bool, body: impl Fn(Communicator) + Sync) {
    let (secret, server) = (Secret::generate().unwrap(), StoreServer::start().unwrap());
    let (tcp, shm) = (TcpOptions::default(), Options::default());
    std::thread::scope(|s| {
        let (secret, server, tcp, shm, body) = (&secret, &server, &tcp, &shm, &body);
        let rank = |rank: usize| {
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(tcp.timeout)).unwrap();
                let host = Some(hosts[rank..=rank].to_owned());
                let network =
                    NetworkOptions { host, adapt_percent: 50.0, any_order: true, ..Default::default() };
                let world = hosts.len();
                body(
                    match share {
                        true => {
                            Communicator::join_mixed(rank, world, &store, None, secret, tcp, &network, shm)
                        }
                        false => {
                            Communicator::join_tcp_with(rank, world, &store, None, secret, tcp, &network)
                        }
                    }
                    .unwrap(),
                );
            })
        };
        for rank in (0..hosts.len()).map(rank).collect::<Vec<_>>() {
            rank.join().unwrap();
        }
    });
}

/// Calls of all sizes, of which a prepared one meets others that aren't; what every rank follows in the end.
fn exercise(comm: &Communicator) {
    let (me, world) = (comm.rank(), comm.world());
    for round in 0..6 {
        for len in [1usize, 100, 5000, 40_000] {
            // Integers have one sum whatever the order.
            let right = reduced::<i32>(ReduceOp::Sum, world, len);
            let plan = comm.all_reduce_plan::<i32>(len, ReduceOp::Sum).unwrap();
            for call in 0..4 {
                let mut x = buffer::<i32>(me, len);
                match (call + me) % 2 {
                    0 => comm.all_reduce(&mut x, ReduceOp::Sum).unwrap(),
                    _ => plan.run(&mut x).unwrap(),
                }
                assert_same(&x, &right, format_args!("call {call} of {len} in round {round}"));
            }
            // Several under way at once on some ranks, one after the other on others.
            let each = || buffer::<i32>(me, len);
            if me % 2 == 0 {
                let started = (0..6).map(|_| comm.start_all_reduce(each(), ReduceOp::Sum).unwrap());
                for work in started.collect::<Vec<_>>() {
                    assert_same(&work.wait().unwrap(), &right, format_args!("{len}, started"));
                }
            } else {
                for _ in 0..6 {
                    let mut x = each();
                    comm.all_reduce(&mut x, ReduceOp::Sum).unwrap();
                    assert_same(&x, &right, format_args!("{len}, met by started ones"));
                }
            }
            let mut all = vec![0i32; len * world];
            comm.all_gather(&buffer::<i32>(me, len), &mut all).unwrap();
            assert_same(&all[me * len..][..len], &buffer::<i32>(me, len), "all_gather");
        }
    }
    let network = comm.network().unwrap().unwrap();
    assert!(network.measured > 0, "{network:?}");
    let links = network.links.links;
    let own = [links.intra, links.inter].map(|l| [l.alpha_us, l.gbps, l.overhead_us]).concat();
    let mut all = vec![0f64; own.len() * world];
    comm.all_gather(&own, &mut all).unwrap();
    assert!(all.chunks(own.len()).all(|theirs| theirs == own), "{all:?}");
}

#[test]
fn measuring_disturbs_no_call_and_no_group() {
    for (hosts, share) in [("aaa", false), ("abc", false), ("aabb", false), ("aabb", true), ("aab", true)] {
        measuring(hosts, share, |comm| {
            exercise(&comm);
            let part = comm.split(Some(comm.rank() as u32 % 2), 0).unwrap().unwrap();
            if part.world() > 1 && part.network().unwrap().is_some() {
                exercise(&part);
            }
            drop(part);
            exercise(&comm.shrink().unwrap());
        });
    }
}

#[test]
fn links_that_are_given_or_not_to_be_measured_stay() {
    let link = Some("20,1,2".parse().unwrap());
    let given = NetworkOptions { intra: link, inter: link, adapt_percent: 50.0, ..Default::default() };
    let never = NetworkOptions { adapt_percent: 0.0, ..Default::default() };
    for options in [given, never] {
        ranks(
            2,
            |_| options.clone(),
            |comm| {
                (0..300).for_each(|_| comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap());
                assert_eq!(comm.network().unwrap().unwrap().measured, 0);
            },
        );
    }
    // An algorithm that was set isn't chosen by links.
    measuring("ab", false, |comm| {
        comm.set_algorithm(Some(Algorithm::TwoShot)).unwrap();
        (0..300).for_each(|_| comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap());
        assert_eq!(comm.network().unwrap().unwrap().measured, 0);
        comm.set_algorithm(None).unwrap();
        (0..300).for_each(|_| comm.all_reduce(&mut [1f32], ReduceOp::Sum).unwrap());
        assert!(comm.network().unwrap().unwrap().measured > 0);
    });
}

/// In a process: the links that this rank follows.
pub(crate) fn linked() {
    let comm = Communicator::from_env().unwrap();
    let LinksInForce { links, intra, inter } = comm.network().unwrap().unwrap().links;
    println!("links {} {intra} {} {inter}", links.intra, links.inter);
    comm.barrier().unwrap();
}

#[test]
fn rank_0s_table_and_environment_hold_for_all() {
    let folder = tempfile::tempdir().unwrap();
    let measured = |link: &str| Some(Measured { link: link.parse().unwrap(), measured_at: 0 });
    let save = |name: &str, networks: Vec<Network>| {
        let path = folder.path().join(name);
        let machine = Fingerprint::read("/".as_ref());
        Table { networks, ..Table::empty(machine) }.save(&path).unwrap();
        path.display().to_string()
    };
    let network = |transport: &str, intra: &str, inter: Option<&str>| Network {
        transport: transport.into(),
        intra: measured(intra),
        inter: inter.and_then(measured),
    };
    let both = save("both", vec![network("tls", "1,1,1", None), network("tcp", "7,8,0.5", Some("70,0.8,1"))]);
    let near = save("near", vec![network("tcp", "9,4,2", None)]);
    let other = save("other", vec![network("tls", "1,1,1", None)]);
    let Links { intra, inter } = Links::default();
    for (table, given, expected) in [
        (&both, "", "7,8,0.5 table 70,0.8,1 table".to_owned()),
        (&both, "33,2,1", "7,8,0.5 table 33,2,1 given".to_owned()),
        (&near, "", format!("9,4,2 table {inter} built_in")),
        (&other, "", format!("{intra} built_in {inter} built_in")),
        (&"off".to_owned(), "33,2,1", format!("{intra} built_in 33,2,1 given")),
    ] {
        let secret = Secret::generate().unwrap();
        let store = TcpStoreServer::start("127.0.0.1:0".parse().unwrap(), 2, &secret).unwrap();
        let (secret, address) = (secret.to_hex(), store.address());
        let env = |rank: &'static str| {
            // What the other rank has doesn't count.
            let (table, given) = if rank == "0" { (table, given) } else { (&near, "1,1,1") };
            vec![
                ("TENSORWIRE_RANK", rank),
                ("TENSORWIRE_WORLD", "2"),
                ("TENSORWIRE_STORE", &*address),
                ("TENSORWIRE_TRANSPORT", "tcp"),
                ("TENSORWIRE_SECRET", &*secret),
                ("TENSORWIRE_TABLE", &**table),
                ("TENSORWIRE_INTER", given),
            ]
        };
        let mut job = Job::start_with("linked", &["0", "1"].map(env));
        for rank in 0..2 {
            let (status, text) = job.join(rank);
            assert!(status.success() && text.contains(&format!("links {expected}\n")), "{expected}: {text}");
        }
    }
}

#[test]
fn links_are_measured_alike_on_every_rank() {
    let hosts = "aabb";
    let found = Mutex::new(Vec::new());
    let host = |rank: usize| NetworkOptions { host: Some(hosts[rank..=rank].into()), ..Default::default() };
    ranks(4, host, |comm| {
        let all = LinkClass::ALL.map(|class| {
            [(8, 1), (8, 20), (100_000, 2), (0, 1)]
                .map(|(bytes, messages)| comm.measure_link(class, bytes, messages, 3).unwrap().unwrap())
        });
        // Two ranks of each host share its link to the other.
        assert_eq!(all.map(|exchanges| exchanges[2].bytes), [200_000, 400_000]);
        assert!(all.iter().flatten().all(|exchange| exchange.us > 0.0));
        found.lock().unwrap().push(all);
        // Who asks for something else is told.
        let error = comm.measure_link(LinkClass::Intra, 8 + comm.rank() / 3, 1, 1).unwrap_err();
        assert!(matches!(error, Error::Mismatch { .. }), "{error}");
        assert!(error.to_string().contains("measure_link(9 x u8, messages 1"), "{error}");
    });
    let found = found.into_inner().unwrap();
    assert!(found.iter().all(|all| *all == found[0]), "{found:?}");
    // Links that aren't there.
    let alone = |_| NetworkOptions { host: None, ..Default::default() };
    ranks(2, alone, |comm| {
        assert_eq!(comm.measure_link(LinkClass::Inter, 8, 1, 1).unwrap(), None);
        assert!(comm.measure_link(LinkClass::Intra, 8, 1 << 16, 1).is_err());
    });
    threads(2, &Options::default(), |comm| {
        assert_eq!(comm.measure_link(LinkClass::Intra, 8, 1, 1).unwrap(), None);
        assert_eq!(comm.network().unwrap(), None);
    });
}
