use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::tcp::TcpOptions;
use crate::tcp::endpoint::Endpoint;
use crate::tcp::hello::{Channel, Hello, Status};
use crate::tcp::negotiate::{Dial, Refusal};
use crate::tcp::secret::Secret;
use crate::tcp::shared::{Arrived, Shared};
use crate::tcp::socket;
use crate::tcp::stream::Stream;

pub(in crate::tcp) fn secured(authority: &Authority, rank: usize) -> Secret {
    let Certificate { cert, key } = authority.rank(rank).unwrap();
    Secret::fixed().with_tls(Tls::from_pem(&authority.ca(), &cert, &key).unwrap())
}

fn sockets() -> (TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let dialled = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    (dialled, listener.accept().unwrap().0)
}

/// Two ends of a connection between rank 0 and rank 1, over `sockets`.
fn connect(sockets: (TcpStream, TcpStream)) -> (Stream, Stream) {
    let authority = Authority::generate().unwrap();
    let mut zero = Stream::dialled(sockets.0, &secured(&authority, 0), Identity::Rank(1)).unwrap();
    let mut one = Stream::accepted(sockets.1, &secured(&authority, 1)).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        let done = [zero.handshake().unwrap(), one.handshake().unwrap()];
        if done == [true; 2] {
            return (zero, one);
        }
        assert!(Instant::now() < end, "{done:?}");
    }
}

#[test]
fn both_ends_know_each_other_and_a_number_of_their_own() {
    let (zero, one) = connect(sockets());
    assert!(zero.is_from(Identity::Rank(1)) && one.is_from(Identity::Rank(0)));
    assert!(!zero.is_from(Identity::Rank(0)) && !zero.is_from(Identity::Rank(11)));
    assert!(one.is_from(Identity::Store), "rank 0 may serve it");
    assert!(!zero.is_from(Identity::Store));
    let number = zero.binding().unwrap();
    assert_eq!((number.len(), &number), (32, &one.binding().unwrap()));
    assert_ne!(number, connect(sockets()).0.binding().unwrap());
}

#[test]
fn bytes_arrive_in_order_through_sockets_that_are_full() {
    let (a, b) = sockets();
    for socket in [&a, &b] {
        rustix::net::sockopt::set_socket_send_buffer_size(socket, 4096).unwrap();
        rustix::net::sockopt::set_socket_recv_buffer_size(socket, 4096).unwrap();
    }
    let (mut from, mut to) = connect((a, b));
    let data: Vec<u8> = (0..300_000u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let (mut sent, mut got, mut seed, mut full) = (0, Vec::new(), 1u32, 0);
    let mut part = (0, 0);
    let mut next = |most: u32| {
        seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        ((seed >> 8) % most) as usize + 1
    };
    let end = Instant::now() + Duration::from_secs(60);
    while got.len() < data.len() {
        assert!(Instant::now() < end, "{sent} sent, {} came", got.len());
        // What didn't go out is given again, as it was.
        if part == (0, 0) && sent < data.len() {
            part = (next(100), next(60_000));
        }
        let head = &data[sent..data.len().min(sent + part.0)];
        let tail = &data[sent + head.len()..data.len().min(sent + head.len() + part.1)];
        if sent < data.len() {
            let parts = [std::io::IoSlice::new(head), std::io::IoSlice::new(tail)];
            match from.send(&parts).unwrap() {
                Some(n) => {
                    assert!(!from.is_midway());
                    (sent, part) = (sent + n, (0, 0));
                }
                None => full += 1,
            }
        }
        let mut room = vec![0; next(100_000)];
        if let Some(n) = to.receive(&mut room).unwrap() {
            got.extend_from_slice(&room[..n]);
        }
    }
    assert!(full > 10, "the socket was full {full} times");
    assert!(got == data && !to.has_more());
}

fn receive(stream: &mut Stream) -> std::io::Result<usize> {
    loop {
        if let Some(n) = stream.receive(&mut [0; 100])? {
            return Ok(n);
        }
    }
}

#[test]
fn an_end_is_told_from_a_cut() {
    let (mut zero, one) = connect(sockets());
    drop(one);
    assert_eq!(receive(&mut zero).unwrap(), 0, "it said that it ends");
    let (a, b) = sockets();
    let other = b.try_clone().unwrap();
    let (mut zero, mut one) = connect((a, b));
    one.say(b"last").unwrap();
    other.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(receive(&mut zero).unwrap(), 4);
    assert_eq!(receive(&mut zero).unwrap_err().kind(), std::io::ErrorKind::UnexpectedEof);
}

#[test]
fn a_byte_that_is_changed_on_the_way_ends_the_connection() {
    let (a, b) = sockets();
    let raw = a.try_clone().unwrap();
    let (_zero, mut one) = connect((a, b));
    // As a record of data would look.
    let forged = [&[23, 3, 3, 0, 40][..], &[7; 40]].concat();
    std::io::Write::write_all(&mut &raw, &forged).unwrap();
    let error = receive(&mut one).unwrap_err();
    assert!(complaint(&error).unwrap().contains("TLS fails"), "{error}");
}

/// A group of three at an endpoint of rank 0's.
fn group(authority: &Authority) -> (Endpoint, Arc<Shared>) {
    let options = TcpOptions::default();
    let listener = socket::listen([127, 0, 0, 1].into(), 0..=0, &options).unwrap();
    let endpoint = Endpoint::serve(listener, String::new(), secured(authority, 0), &options, None).unwrap();
    let group = Arc::new(Shared::new(0, 3, [7; 16], false).unwrap());
    endpoint.enter(&group);
    (endpoint, group)
}

/// What becomes of a dial to `endpoint` as rank `from` of its group, with `secret`, by one who looks for `peer` there.
fn dial(endpoint: &Endpoint, from: usize, secret: &Secret, peer: Identity) -> Result<(), String> {
    let hello = Hello::new(Channel::Collective, 3, from, 0, [7; 16]).unwrap();
    let mut dial = Dial::begin(endpoint.address(), peer, &hello, secret, &TcpOptions::default()).unwrap();
    let end = Instant::now() + Duration::from_secs(10);
    loop {
        match dial.advance(secret) {
            Ok(true) => return Ok(()),
            Ok(false) => assert!(Instant::now() < end),
            Err(Refusal::Status(Status::WrongName)) => return Err("wrong name".into()),
            Err(refusal) => return Err(refusal.describe()),
        }
    }
}

#[test]
fn who_claims_to_be_another_rank_is_refused_at_either_end() {
    let authority = Authority::generate().unwrap();
    let (endpoint, group) = group(&authority);
    let (one, two) = (secured(&authority, 1), secured(&authority, 2));
    assert_eq!(dial(&endpoint, 1, &two, Identity::Rank(0)).unwrap_err(), "wrong name");
    assert_eq!(
        dial(&endpoint, 1, &one, Identity::Rank(2)).unwrap_err(),
        "its certificate names somebody else"
    );
    // Neither has taken the place of the one that is who it says.
    assert_eq!(dial(&endpoint, 1, &one, Identity::Rank(0)), Ok(()));
    let arrived = group.take_arrivals();
    assert!(matches!(&arrived[..], [(1, Arrived::Connection(_))]), "{arrived:?}");
}

#[test]
fn ranks_of_a_part_of_the_job_are_known_by_their_numbers_in_the_job() {
    let authority = Authority::generate().unwrap();
    let (endpoint, group) = group(&authority);
    group.job_ranks.set(vec![0, 4, 9]).unwrap();
    assert_eq!(dial(&endpoint, 1, &secured(&authority, 1), Identity::Rank(0)).unwrap_err(), "wrong name");
    assert_eq!(dial(&endpoint, 1, &secured(&authority, 4), Identity::Rank(0)), Ok(()));
}
