//! Ranks over TLS: who is let in, and who isn't. That collectives work over it, the other files show.

use std::net::TcpStream;
use std::time::{Duration, Instant};

use tensorwire::topology::discover::Fingerprint;
use tensorwire::topology::table::{Measured, Network, Table};
use tensorwire::transports::store::{LOOPBACK, Store, StoreServer, TcpStore, TcpStoreServer, UnixStore};
use tensorwire::transports::tcp::{Authority, Certificate, Secret, TcpOptions, Tls};
use tensorwire::{Communicator, Deadline, Error, Result};

use crate::job::Job;
use crate::mixed::{self, start_each};
use crate::processes::{assert_killed_is_named, assert_others_are_named};
use crate::tcp::{hello, random_bytes, say, start, unharmed_with};

/// Long enough for a busy machine.
const SOON: Duration = Duration::from_secs(20);

pub(crate) fn tls(authority: &Authority, Certificate { cert, key }: &Certificate) -> Tls {
    Tls::from_pem(&authority.ca(), cert, key).unwrap()
}

/// `secret`, with a certificate for `rank`.
pub(crate) fn secured(authority: &Authority, rank: usize, secret: Secret) -> Secret {
    secret.with_tls(tls(authority, &authority.rank(rank).unwrap()))
}

/// What rank 0 and rank 1 of a job come to know of each other with these secrets and certificates.
fn barrier_of(secrets: [Secret; 2]) -> [Result<()>; 2] {
    barrier_with(secrets, &TcpOptions::default())
}

/// As [`barrier_of`], with these options.
pub(crate) fn barrier_with(secrets: [Secret; 2], options: &TcpOptions) -> [Result<()>; 2] {
    let server = StoreServer::start().unwrap();
    let options = TcpOptions { timeout: Duration::from_secs(5), ..options.clone() };
    std::thread::scope(|s| {
        let (server, options) = (&server, &options);
        let mut rank = 0..2;
        let ranks = secrets.map(|secret| {
            let rank = rank.next().unwrap();
            s.spawn(move || {
                let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
                let comm = Communicator::join_tcp(rank, 2, &store, None, &secret, options).unwrap();
                let result = comm.barrier();
                // Kept until both have tried: whoever is gone can't be named for what it shows.
                (comm, result)
            })
        });
        ranks.map(|r| r.join().unwrap()).map(|(_comm, result)| result)
    })
}

/// Fails unless both have named the other, for a reason that has one of `words` in it.
#[track_caller]
pub(crate) fn assert_both_named(results: [Result<()>; 2], words: &[&str]) {
    for (rank, result) in results.into_iter().enumerate() {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::PeerLost { peer, .. } if peer == 1 - rank), "{error}");
        assert!(words.iter().any(|word| error.to_string().contains(word)), "{error}");
    }
}

#[test]
fn a_rank_with_another_authority_is_refused_and_named() {
    let (secret, ours, theirs) =
        (Secret::generate().unwrap(), Authority::generate().unwrap(), Authority::generate().unwrap());
    let zero = secured(&ours, 0, secret.clone());
    assert_both_named(barrier_of([zero.clone(), secured(&theirs, 1, secret.clone())]), &["authority"]);
    // One that trusts both: only its own certificate is foreign, and rank 0 is the one that refuses.
    let Certificate { cert, key } = theirs.rank(1).unwrap();
    let both = Tls::from_pem(&(ours.ca() + &theirs.ca()), &cert, &key).unwrap();
    assert_both_named(barrier_of([zero.clone(), secret.clone().with_tls(both)]), &["authority"]);
    // As it should be.
    for result in barrier_of([zero, secured(&ours, 1, secret)]) {
        result.unwrap();
    }
}

#[test]
fn a_certificate_without_the_secret_is_not_enough() {
    let authority = Authority::generate().unwrap();
    let secrets = [0, 1].map(|rank| secured(&authority, rank, Secret::generate().unwrap()));
    assert_both_named(barrier_of(secrets), &["secret"]);
}

#[test]
fn ranks_with_and_without_tls_refuse_each_other_and_say_why() {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let secrets = [secured(&authority, 0, secret.clone()), secret.clone()];
    assert_both_named(barrier_of(secrets), &["TENSORWIRE_TRANSPORT"]);
    assert_both_named(
        barrier_of([secret.clone(), secured(&authority, 1, secret)]),
        &["TENSORWIRE_TRANSPORT"],
    );
}

#[test]
fn a_rank_whose_certificate_is_not_its_own_does_not_begin() {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let server = StoreServer::start().unwrap();
    let store = UnixStore::connect(&server.address(), Deadline::after(SOON)).unwrap();
    let two = secured(&authority, 2, secret);
    let error = Communicator::join_tcp(1, 3, &store, None, &two, &TcpOptions::default()).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, Error::Config(_)), "{text}");
    assert!(
        text.contains("TENSORWIRE_TLS_CERT") && text.contains("DNS:rank-1.tensorwire.internal"),
        "{text}"
    );
}

#[test]
fn the_store_lets_ranks_in_by_their_certificates() {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let launcher = secret.clone().with_tls(authority.store().unwrap());
    let server = TcpStoreServer::start(LOOPBACK, 3, &launcher).unwrap();
    let meet = |rank, secret: &Secret| {
        TcpStore::meet(&server.address(), rank, 3, secret, Deadline::after(Duration::from_secs(1)))
    };
    let refused = |rank, secret: &Secret| meet(rank, secret).unwrap_err().to_string();
    let text = refused(1, &secured(&authority, 2, secret.clone()));
    assert!(text.contains("this process's certificate is another rank's"), "{text}");
    let text = refused(1, &secured(&Authority::generate().unwrap(), 1, secret.clone()));
    assert!(text.contains("authority"), "{text}");
    let text = refused(1, &secret);
    assert!(text.contains("it speaks TLS"), "{text}");
    let one = meet(1, &secured(&authority, 1, secret.clone())).unwrap();
    let any = secret.clone().with_tls(tls(&authority, &authority.any_rank().unwrap()));
    let two = meet(2, &any).unwrap();
    // More than a connection holds at once.
    let value = random_bytes(&mut 7, 60_000);
    for key in 0..20 {
        one.set(&key.to_string(), &value, Deadline::after(SOON)).unwrap();
    }
    for key in 0..20 {
        assert_eq!(two.get(&key.to_string(), Deadline::after(SOON)).unwrap(), value);
    }
    // Whoever waits for rank 1's word learns that somebody came in its place.
    let text = two.get("never", Deadline::after(Duration::from_millis(50))).unwrap_err().to_string();
    assert!(text.contains("came as rank 1 has another rank's certificate"), "{text}");
    // A store that any rank could pretend to serve would be none.
    let error = TcpStoreServer::start(LOOPBACK, 3, &secured(&authority, 1, secret)).unwrap_err();
    assert!(error.to_string().contains("DNS:store.tensorwire.internal"), "{error}");
}

/// A job over TLS.
pub(crate) fn job(body: &str, world: usize) -> (Job, TcpStoreServer) {
    secured_job("tls", body, world)
}

/// A job over `transport` in which each rank has a certificate of its own, with a store that is served over TLS.
pub(crate) fn secured_job(transport: &str, body: &str, world: usize) -> (Job, TcpStoreServer) {
    let (secret, authority) = (Secret::generate().unwrap(), Authority::generate().unwrap());
    let launcher = secret.clone().with_tls(authority.store().unwrap());
    let server = TcpStoreServer::start(LOOPBACK, world, &launcher).unwrap();
    let (ca, hex, store) = (authority.ca(), secret.to_hex(), server.address());
    let certificates: Vec<_> = (0..world).map(|rank| authority.rank(rank).unwrap()).collect();
    let numbers: Vec<_> = (0..world).map(|rank| rank.to_string()).collect();
    let all = world.to_string();
    let envs: Vec<_> = (0..world)
        .map(|rank| {
            vec![
                ("TENSORWIRE_TRANSPORT", transport),
                ("TENSORWIRE_SECRET", &*hex),
                ("TENSORWIRE_STORE", &store),
                ("TENSORWIRE_RANK", &numbers[rank]),
                ("TENSORWIRE_WORLD", &all),
                ("TENSORWIRE_TLS_CA", &ca),
                ("TENSORWIRE_TLS_CERT", &certificates[rank].cert),
                ("TENSORWIRE_TLS_KEY", &certificates[rank].key),
            ]
        })
        .collect();
    (Job::start_with(body, &envs), server)
}

#[test]
fn a_killed_rank_is_named_on_every_other() {
    assert_killed_is_named(&[3], job);
}

#[test]
fn faults_look_as_they_do_without_tls() {
    assert_others_are_named(job);
}

#[test]
fn files_of_certificates_serve_and_bad_ones_are_named() {
    let (authority, place) = (Authority::generate().unwrap(), tempfile::tempdir().unwrap());
    let any = authority.any_rank().unwrap();
    let [ca, cert, key] =
        ["ca", "cert", "key"].map(|name| place.path().join(name).to_str().unwrap().to_owned());
    std::fs::write(&ca, authority.ca()).unwrap();
    std::fs::write(&cert, &any.cert).unwrap();
    std::fs::write(&key, &any.key).unwrap();
    let mode = |mode| {
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&key, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let env = |ca, cert, key| {
        [
            ("TENSORWIRE_TRANSPORT", "tls"),
            ("TENSORWIRE_TLS_CA", ca),
            ("TENSORWIRE_TLS_CERT", cert),
            ("TENSORWIRE_TLS_KEY", key),
        ]
    };
    mode(0o600);
    let mut job = start("sum", 2, &env(&*ca, &cert, &key));
    for rank in 0..2 {
        let (status, text) = job.join_within(rank, SOON);
        assert!(status.success() && text.contains("200000"), "{text}");
    }
    let refused = |env: &[(&str, &str)], words: &str| {
        let text = start("join", 1, env).join_within(0, SOON).1;
        assert!(text.contains(words) && !text.contains("PRIVATE KEY"), "{text}, not {words}");
    };
    refused(&env("", &cert, &key), "TENSORWIRE_TLS_CA is not set");
    refused(&env(&key, &cert, &key), "TENSORWIRE_TLS_CA: there is no certificate");
    refused(&env(&ca, &cert, &cert), "mode");
    let other = authority.rank(0).unwrap();
    refused(&env(&ca, &cert, &other.key), "TENSORWIRE_TLS_CERT: with the key in TENSORWIRE_TLS_KEY");
    refused(&env(&ca, &cert, &other.cert), "TENSORWIRE_TLS_KEY: there is no private key");
    refused(&env(&ca, "/nowhere", &key), "/nowhere");
    mode(0o640);
    refused(&env(&ca, &cert, &key), "chmod 600");
}

#[test]
fn strangers_cost_bounded_memory_and_harm_nobody() {
    let authority = Authority::generate().unwrap();
    let (ca, any) = (authority.ca(), authority.any_rank().unwrap());
    let env = [
        ("TENSORWIRE_TRANSPORT", "tls"),
        ("TENSORWIRE_TLS_CA", &*ca),
        ("TENSORWIRE_TLS_CERT", &any.cert),
        ("TENSORWIRE_TLS_KEY", &any.key),
    ];
    unharmed_with(&env, |target| {
        let ports = &target.ports;
        let (threads, memory) = (target.most("task"), target.memory());
        let mut seed = 7;
        for round in 0..300 {
            // Nothing of TLS; what looks like a record of it; what a rank without TLS says. An alert is all they hear.
            let mut bytes = match round % 3 {
                0 => random_bytes(&mut seed, 200),
                1 => [&[22, 3, 1, 0, 100, 1, 0, 0, 96, 3, 3][..], &random_bytes(&mut seed, 94)].concat(),
                _ => hello(),
            };
            bytes.truncate(1 + round % 200);
            assert!(say(ports[round % 3], &bytes).len() <= 7);
        }
        // Those who begin a record of the longest kind and never end it.
        use std::io::Write;
        let mut slow: Vec<TcpStream> = (0..600).map(|i| TcpStream::connect(ports[i % 3]).unwrap()).collect();
        let long = [&[22, 3, 1, 0x40, 0, 1, 0, 0xff, 0xff][..], &[0; 10_000]].concat();
        slow.iter_mut().for_each(|s| drop(s.write_all(&long)));
        std::thread::sleep(Duration::from_millis(100));
        assert_eq!(target.most("task"), threads, "a stranger is no reason for a thread");
        assert!(target.most("fd") < 128 + 50, "{}", target.most("fd"));
        assert!(target.memory() < memory + 8192, "{} kB, then {}", memory, target.memory());
        let end = Instant::now() + SOON;
        while target.most("fd") > 50 {
            assert!(Instant::now() < end, "{} descriptors are left", target.most("fd"));
            std::thread::sleep(Duration::from_millis(10));
        }
    });
}

/// In a process: what carries the data between hosts, and why.
pub(crate) fn reason() {
    let comm = Communicator::from_env().unwrap();
    println!("over {}, since {}", comm.transport().unwrap(), comm.transport_reason());
    let alone = comm.split(Some(comm.rank() as u32), 0).unwrap().unwrap();
    assert_eq!(alone.transport_reason(), comm.transport_reason());
}

/// Ranks with certificates, on two hosts, that leave open what carries their data.
#[test]
fn what_carries_encrypted_data_follows_from_the_links_that_rank_0_knows() {
    let (authority, folder) = (Authority::generate().unwrap(), tempfile::tempdir().unwrap());
    let (ca, any) = (authority.ca(), authority.any_rank().unwrap());
    let table = |name: &str, links: &[(&str, &str)]| {
        let network = |(transport, link): &(&str, &str)| Network {
            transport: (*transport).into(),
            intra: None,
            inter: Some(Measured { link: link.parse().unwrap(), measured_at: 0 }),
        };
        let networks = links.iter().map(network).collect();
        let path = folder.path().join(name);
        Table { networks, ..Table::empty(Fingerprint::read("/".as_ref())) }.save(&path).unwrap();
        path.display().to_string()
    };
    let quic = table("quic", &[("tls", "90,1"), ("quic", "40,1"), ("tcp", "1,1")]);
    let tls = table("tls", &[("tls", "40,1"), ("quic", "90,1")]);
    let half = table("half", &[("quic", "40,1")]);
    let unknown = "since the ranks have a secret and certificates";
    let cases: &[(&str, &str, &str)] = match cfg!(feature = "quic") {
        true => &[
            (&quic, "quic", "56.4 us over quic, as measured"),
            (&tls, "tls", "56.4 us over tls, 106.4 us over quic, as measured"),
            (&half, "tls", "tls was not measured"),
            ("off", "tls", unknown),
        ],
        false => &[(&quic, "tls", unknown)],
    };
    for (table, over, why) in cases {
        // What the other rank knows doesn't count.
        let each = [*table, &*half].map(|table| {
            [
                ("TENSORWIRE_TRANSPORT", "auto"),
                ("TENSORWIRE_TLS_CA", &*ca),
                ("TENSORWIRE_TLS_CERT", &any.cert),
                ("TENSORWIRE_TLS_KEY", &any.key),
                ("TENSORWIRE_TABLE", table),
            ]
        });
        let (mut job, _store) = start_each("reason", "ab", |rank| &each[rank]);
        for rank in 0..2 {
            let (status, text) = job.join(rank);
            let said = text.contains(&format!("over {over} ")) && text.contains(why);
            assert!(status.success() && said, "{over}, {why}: {text}");
        }
    }
    let (mut job, _store) = mixed::start("reason", "ab", &[]);
    let (status, text) = job.join(0);
    assert!(
        status.success() && text.contains("over tcp ") && text.contains("since the ranks have a secret"),
        "{text}"
    );
    assert!(job.join(1).0.success());
}

#[test]
fn nothing_that_is_printed_tells_a_key() {
    let authority = Authority::generate().unwrap();
    let certificate = authority.rank(0).unwrap();
    let secret = secured(&authority, 0, Secret::generate().unwrap());
    let text = format!("{authority:?} {certificate:?} {secret:?} {:?}", tls(&authority, &certificate));
    assert_eq!(text, "Authority(..) Certificate(..) Secret(..) Tls(..)");
}
