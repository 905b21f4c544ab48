//! Links: measured, kept in a table, followed by every rank.

use std::sync::Mutex;

use tensorwire::collectives::network::{LinkClass, Links, LinksInForce, NetworkOptions};
use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::{Measured, Network, Table};
use tensorwire::transports::store::TcpStoreServer;
use tensorwire::transports::tcp::Secret;
use tensorwire::{Communicator, Error, Options};

use crate::common::threads;
use crate::job::Job;
use crate::network::ranks;

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
