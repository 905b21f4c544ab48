use std::io::IoSlice;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::*;
use crate::tcp::TcpOptions;
use crate::tcp::endpoint::Endpoint;
use crate::tcp::hello::Channel;
use crate::tcp::listener::Listener;
use crate::tcp::options::Congestion;
use crate::tcp::secret::Secret;
use crate::tcp::shared::{Arrived, Shared};
use crate::tcp::stream::{Identity, Stream};
use crate::tcp::tls::Authority;
use crate::tcp::tls::tests::secured;

/// Long enough for a busy machine.
const SOON: Duration = Duration::from_secs(20);

/// One rank's end of a group.
struct End {
    endpoint: Endpoint,
    shared: Arc<Shared>,
}

fn end(rank: usize, world: usize, secret: &Secret, options: &TcpOptions) -> End {
    let port = Port::open([127, 0, 0, 1].into(), secret, Congestion::Cubic, options).unwrap().unwrap();
    let listener = Listener::Quic(Arc::new(port));
    let endpoint = Endpoint::serve(listener, String::new(), secret.clone(), options, None).unwrap();
    let shared = Arc::new(Shared::new(rank, world, [7; 16], false).unwrap());
    endpoint.enter(&shared);
    End { endpoint, shared }
}

/// The ends of a group of two, which know where each other are.
fn ends(options: &TcpOptions) -> [End; 2] {
    let authority = Authority::generate().unwrap();
    let ends = [0, 1].map(|rank| end(rank, 2, &secured(&authority, rank), options));
    let addresses: Vec<_> = ends.iter().map(|end| end.endpoint.address()).collect();
    for end in &ends {
        end.shared.addresses.set(addresses.clone()).unwrap();
    }
    ends
}

/// What comes of a dial, at one end.
fn arrived(end: &End) -> Arrived {
    let until = Instant::now() + SOON;
    loop {
        if let Some((_, arrived)) = end.shared.take_arrivals().pop() {
            return arrived;
        }
        assert!(Instant::now() < until, "nothing comes of a dial");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn connected(end: &End) -> Stream {
    match arrived(end) {
        Arrived::Connection(stream) => stream,
        Arrived::Failed(why) => panic!("{why}"),
    }
}

/// Two ends of a stream that the second end has opened.
fn connect(ends: &[End; 2], channel: Channel) -> [Stream; 2] {
    let [zero, one] = ends;
    assert!(one.shared.should_dial(one.shared.place(channel, 0)));
    one.endpoint.dial(&one.shared, channel, 0).unwrap();
    [zero, one].map(connected)
}

fn bytes(len: usize) -> Vec<u8> {
    (0..len as u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect()
}

/// Sends all of `data` from one end to the other.
fn carry(from: &mut Stream, to: &mut Stream, data: &[u8]) {
    let (mut sent, mut got) = (0, Vec::new());
    let until = Instant::now() + SOON;
    while got.len() < data.len() {
        assert!(Instant::now() < until, "{sent} sent, {} came", got.len());
        if sent < data.len() {
            sent += from.send(&[IoSlice::new(&data[sent..])]).unwrap().unwrap_or(0);
        }
        let mut room = vec![0; 100_000];
        if let Some(n) = to.receive(&mut room).unwrap() {
            assert!(n > 0);
            got.extend_from_slice(&room[..n]);
        }
    }
    assert!(got == data);
}

#[test]
fn streams_share_a_connection_and_carry_bytes_both_ways() {
    let ends = ends(&TcpOptions::default());
    let [mut a, mut b] = connect(&ends, Channel::Collective);
    let [mut c, mut d] = connect(&ends, Channel::Message);
    assert!(a.is_from(Identity::Rank(1)) && b.is_from(Identity::Rank(0)));
    assert!(!a.is_from(Identity::Rank(0)) && !b.is_from(Identity::Rank(1)));
    assert_eq!(a.binding().unwrap(), b.binding().unwrap());
    assert_eq!(a.binding().unwrap(), c.binding().unwrap(), "one connection");
    let data = bytes(3_000_000);
    carry(&mut b, &mut a, &data);
    carry(&mut c, &mut d, &data[..100]);
    carry(&mut a, &mut b, &data);
    carry(&mut d, &mut c, b"x");
}

#[test]
fn an_end_is_told_behind_what_was_sent() {
    let ends = ends(&TcpOptions::default());
    let [mut a, mut b] = connect(&ends, Channel::Collective);
    let data = bytes(300_000);
    let mut sent = 0;
    while sent < data.len() {
        sent += b.send(&[IoSlice::new(&data[sent..])]).unwrap().unwrap_or(0);
    }
    drop(b);
    let mut got = Vec::new();
    let until = Instant::now() + SOON;
    loop {
        assert!(Instant::now() < until);
        let mut room = [0; 10_000];
        match a.receive(&mut room).unwrap() {
            Some(0) => break,
            Some(n) => got.extend_from_slice(&room[..n]),
            None => {}
        }
    }
    assert!(got == data);
}

#[test]
fn a_port_that_nobody_listens_at_is_found_deserted() {
    let [zero, one] = ends(&TcpOptions::default());
    drop(zero);
    assert!(one.shared.should_dial(one.shared.place(Channel::Collective, 0)));
    one.endpoint.dial(&one.shared, Channel::Collective, 0).unwrap();
    let arrived = arrived(&one);
    assert!(matches!(&arrived, Arrived::Failed(why) if why.contains("its process ended")), "{arrived:?}");
}

#[test]
fn a_handshake_that_is_pushed_out_by_others_is_made_again() {
    let authority = Authority::generate().unwrap();
    let options = TcpOptions::default();
    let one = end(1, 2, &secured(&authority, 1), &options);
    // Rank 0's port, which moves on only when it is turned.
    let port = Port::open([127, 0, 0, 1].into(), &secured(&authority, 0), Congestion::Cubic, &options);
    let port = port.unwrap().unwrap();
    one.shared.addresses.set(vec![port.address(), one.endpoint.address()]).unwrap();
    assert!(one.shared.should_dial(0));
    one.endpoint.dial(&one.shared, Channel::Collective, 0).unwrap();
    let until = Instant::now() + SOON;
    let mut evicted = Vec::new();
    while evicted.len() < 3 {
        assert!(Instant::now() < until, "after {} it isn't tried again", evicted.len());
        port.turn();
        let mut state = port.lock();
        if let Some(key) = state.connections.keys().copied().next() {
            assert!(!evicted.contains(&key));
            port.evict(&mut state, key, Instant::now());
            evicted.push(key);
        }
        drop(state);
        assert!(one.shared.is_dialing(0), "it was given up");
        std::thread::sleep(Duration::from_millis(1));
    }
}
