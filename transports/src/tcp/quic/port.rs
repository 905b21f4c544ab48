//! One UDP port with all the connections over it, and who drives them.
//!
//! Whoever has the lock may drive: takes what has come to the socket, runs the timers that are due, and sends what
//! there is to send. A thread that waits in a call does so itself, as it does with TCP's sockets, so that a message costs
//! no switch of threads. The thread that makes connections does so while nobody else has for [`TICK`]: it sees to
//! acknowledgements, to what was lost on the way and to what a call has left to be sent.
//!
//! Each [`Lane`] has a [`Wake`]: whoever finds something for a lane that isn't its own rings it.

use std::collections::{HashMap, VecDeque};
use std::io::{self, IoSliceMut};
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::ops::RangeInclusive;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::BytesMut;
use quinn_proto::{
    ConnectionHandle, DatagramEvent, Dir, Endpoint, EndpointEvent, Event, Incoming, StreamEvent, StreamId,
    Transmit,
};
use quinn_udp::{EcnCodepoint, RecvMeta, UdpSocketState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::sockopt;
use tensorwire_core::{Error, Result};

use super::config::{Configs, MAX_DATAGRAM, Path, deserted, probe};
use super::connection::{Connection, Key};
use super::lane::{Lane, News};
use crate::tcp::TcpOptions;
use crate::tcp::options::Congestion;
use crate::tcp::secret::Secret;
use crate::tcp::socket::Wake;
use crate::tcp::stream::Identity;

/// How soon the thread that makes connections sees to what callers have left behind.
const TICK: Duration = Duration::from_millis(2);

/// How long a peer's handshake may take, and how long a connection that serves nothing is kept for the next.
const PATIENCE: Duration = Duration::from_secs(3);

/// Handshakes that others may have under way here. Beyond that, the oldest goes.
const MAX_HANDSHAKES: usize = 128;

/// Beyond so many, a stranger must show that datagrams reach it where it says it is, before anything is kept for it.
const CAUTIOUS: usize = 16;

/// How long the end waits until peers have what they were told.
const LINGER: Duration = Duration::from_millis(300);

/// Datagrams, or trains of them that the kernel has put together, that are taken at once, and how often.
const BATCH: usize = 4;
const ROUNDS: usize = 8;

/// Bytes of such a train at most.
const TRAIN: usize = 64 << 10;

/// Bytes that the kernel is asked to hold of what has come, from all peers.
const SOCKET_BUFFER: usize = 2 << 20;

pub(crate) struct Port {
    socket: UdpSocket,
    udp: UdpSocketState,
    address: SocketAddr,
    configs: Configs,
    /// Of the thread that makes connections.
    wake: Arc<Wake>,
    /// How often others than that thread have driven. A hint: Relaxed.
    driven: AtomicU64,
    state: Mutex<State>,
}

impl std::fmt::Debug for Port {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Port").field("address", &self.address).finish_non_exhaustive()
    }
}

pub(super) struct State {
    endpoint: Endpoint,
    pub(super) connections: HashMap<Key, Connection>,
    keys: HashMap<ConnectionHandle, Key>,
    made: Key,
    inbox: Box<[u8]>,
    outbox: Vec<u8>,
    /// What `outbox` holds and the socket has not taken.
    unsent: Option<Transmit>,
    /// Streams that peers have opened, and nobody has taken yet.
    opened: VecDeque<(Key, StreamId)>,
    /// Connections to which something has happened.
    touched: Vec<Key>,
    /// No timer is due before.
    due: Option<Instant>,
    /// When the thread that makes connections looks again.
    alarm: Instant,
}

fn bind(ip: IpAddr, ports: RangeInclusive<u16>) -> io::Result<UdpSocket> {
    let mut taken = io::Error::from(io::ErrorKind::AddrInUse);
    for port in ports {
        match UdpSocket::bind((ip, port)) {
            Err(e) if e.kind() == io::ErrorKind::AddrInUse => taken = e,
            other => return other,
        }
    }
    Err(taken)
}

impl Port {
    /// Listens at one of these ports.
    pub(in crate::tcp) fn open(
        ip: IpAddr,
        secret: &Secret,
        congestion: Congestion,
        options: &TcpOptions,
    ) -> Result<io::Result<Port>> {
        let tls = secret.tls().ok_or_else(|| {
            Error::Config(
                "ranks over QUIC show certificates, and this one has none: see Secret::with_tls".into(),
            )
        })?;
        let configs = Configs::new(tls, congestion, options)?;
        let config = configs.endpoint()?;
        let open = || {
            let socket = bind(ip, options.ports.clone())?;
            sockopt::set_socket_recv_buffer_size(&socket, SOCKET_BUFFER)?;
            sockopt::set_socket_send_buffer_size(&socket, SOCKET_BUFFER)?;
            let (udp, address) = (UdpSocketState::new((&socket).into())?, socket.local_addr()?);
            let own = probe(address, address)?;
            let server = configs.server(Path::of(&own, address));
            let endpoint = Endpoint::new(config, Some(server), !udp.may_fragment(), None);
            let state = State {
                endpoint,
                connections: HashMap::new(),
                keys: HashMap::new(),
                made: 0,
                inbox: vec![0; BATCH * TRAIN].into(),
                outbox: Vec::with_capacity(TRAIN),
                unsent: None,
                opened: VecDeque::new(),
                touched: Vec::new(),
                due: None,
                alarm: Instant::now(),
            };
            let (wake, driven) = (Arc::new(Wake::new()?), AtomicU64::new(0));
            Ok(Port { socket, udp, address, configs, wake, driven, state: Mutex::new(state) })
        };
        Ok(open())
    }

    pub(in crate::tcp) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(in crate::tcp) fn wake(&self) -> &Arc<Wake> {
        &self.wake
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the thread that makes connections is to wait for the socket too, for what, and until when at most; `seen`
    /// is how often others had driven when it asked last.
    pub(in crate::tcp) fn watch(&self, seen: &mut u64) -> (PollFlags, Option<Instant>) {
        let driven = self.driven.load(Ordering::Relaxed);
        let left_alone = std::mem::replace(seen, driven) == driven;
        let mut state = self.lock();
        let now = Instant::now();
        let at = if left_alone { state.due } else { Some(now + TICK) };
        state.alarm = at.unwrap_or(now + Duration::from_secs(3600));
        let flags = match (left_alone, &state.unsent) {
            (false, _) => PollFlags::empty(),
            (true, None) => PollFlags::IN,
            (true, Some(_)) => PollFlags::IN | PollFlags::OUT,
        };
        (flags, at)
    }

    /// Drives the connections, for the thread that makes them.
    pub(in crate::tcp) fn turn(&self) {
        self.drive(&mut self.lock(), &self.wake);
    }

    /// How long a thread that waits for the socket may sleep before some timer is due.
    pub(super) fn patience(&self) -> Duration {
        let due = self.lock().due;
        due.map_or(PATIENCE, |due| due.saturating_duration_since(Instant::now()))
    }

    /// A stream that a peer has opened.
    pub(in crate::tcp) fn accept(self: &Arc<Port>) -> Option<Lane> {
        let mut state = self.lock();
        while let Some((key, id)) = state.opened.pop_front() {
            if let Some(connection) = state.connections.get_mut(&key) {
                let news = News::new(&self.wake);
                connection.lanes.push((Some(id), news.clone()));
                return Some(Lane::new(self.clone(), key, Some(id), news));
            }
        }
        None
    }

    /// A stream to `peer`, over the connection that there is, or one that is begun.
    pub(in crate::tcp) fn dial(self: &Arc<Port>, to: SocketAddr, peer: Identity) -> io::Result<Lane> {
        let mut state = self.lock();
        let there = state.connections.iter().find(|(_, c)| c.leads_to(to, peer)).map(|(key, _)| *key);
        let key = match there {
            Some(key) => key,
            None => {
                let probe = probe(self.address, to)?;
                let config = self.configs.client(Path::of(&probe, to));
                if deserted(&probe) {
                    return Err(io::ErrorKind::ConnectionRefused.into());
                }
                let now = Instant::now();
                let name = crate::tcp::tls::name(peer);
                let (handle, quic) =
                    state.endpoint.connect(now, config, to, &name).map_err(io::Error::other)?;
                let mut connection = Connection::new(handle, quic, now);
                connection.dialled = Some(peer);
                state.insert(connection)
            }
        };
        let news = News::new(&self.wake);
        state.connections.get_mut(&key).expect("found or made above").lanes.push((None, news.clone()));
        self.serve(&mut state, key, &self.wake, Instant::now());
        drop(state);
        Ok(Lane::new(self.clone(), key, None, news))
    }

    /// Takes what has come, runs what is due and sends what there is; `own` is the wake of whoever drives, who looks at
    /// its lanes next.
    pub(super) fn drive(&self, state: &mut State, own: &Arc<Wake>) {
        if !Arc::ptr_eq(own, &self.wake) {
            self.driven.fetch_add(1, Ordering::Relaxed);
        }
        let mut now = Instant::now();
        for _ in 0..ROUNDS {
            let mut inbox = std::mem::take(&mut state.inbox);
            let mut metas = [RecvMeta::default(); BATCH];
            let came = {
                let mut rooms = inbox.chunks_mut(TRAIN);
                let mut rooms: [IoSliceMut<'_>; BATCH] =
                    std::array::from_fn(|_| IoSliceMut::new(rooms.next().expect("as many as asked for")));
                self.udp.recv((&self.socket).into(), &mut rooms, &mut metas)
            };
            for (meta, room) in metas.iter().zip(inbox.chunks(TRAIN)).take(*came.as_ref().unwrap_or(&0)) {
                room[..meta.len]
                    .chunks(meta.stride.max(1))
                    .for_each(|bytes| self.take(state, meta, bytes, now));
            }
            state.inbox = inbox;
            match came {
                Ok(BATCH) => now = Instant::now(),
                Ok(_) => break,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                // What the kernel reports of datagrams sent before.
                Err(_) => {}
            }
        }
        if state.due.is_some_and(|due| due <= now) {
            self.run_timers(state, now);
        }
        if state.unsent.is_some() && self.flush(state) {
            state.touched = state.connections.keys().copied().collect();
        }
        while let Some(key) = state.touched.pop() {
            self.serve(state, key, own, now);
        }
    }

    /// Takes a datagram.
    fn take(&self, state: &mut State, meta: &RecvMeta, bytes: &[u8], now: Instant) {
        let ecn = meta.ecn.and_then(|ecn| quinn_proto::EcnCodepoint::from_bits(ecn as u8));
        let mut reply = Vec::new();
        let event =
            state.endpoint.handle(now, meta.addr, meta.dst_ip, ecn, BytesMut::from(bytes), &mut reply);
        match event {
            None => {}
            Some(DatagramEvent::ConnectionEvent(handle, event)) => {
                let Some(key) = state.keys.get(&handle).copied() else { return };
                let Some(connection) = state.connections.get_mut(&key) else { return };
                connection.quic.handle_event(event);
                connection.hear(now);
                if state.touched.last() != Some(&key) {
                    state.touched.push(key);
                }
            }
            Some(DatagramEvent::Response(transmit)) => drop(self.send(&transmit, &reply)),
            Some(DatagramEvent::NewConnection(incoming)) => self.admit(state, incoming, now),
        }
    }

    /// Takes a stranger's first datagram.
    fn admit(&self, state: &mut State, incoming: Incoming, now: Instant) {
        let mut reply = Vec::new();
        let pending = |c: &&Connection| c.dialled.is_none() && !c.connected;
        let under_way = state.connections.values().filter(pending).count();
        if under_way >= CAUTIOUS && incoming.may_retry() {
            if let Ok(transmit) = state.endpoint.retry(incoming, &mut reply) {
                let _ = self.send(&transmit, &reply);
            }
            return;
        }
        if under_way >= MAX_HANDSHAKES {
            let oldest = state.connections.iter().filter(|(_, c)| pending(c)).min_by_key(|(_, c)| c.quiet);
            if let Some(key) = oldest.map(|(key, _)| *key) {
                self.evict(state, key, now);
            }
        }
        let from = incoming.remote_address();
        let Ok(probe) = probe(self.address, from) else {
            state.endpoint.ignore(incoming);
            return;
        };
        let config = self.configs.server(Path::of(&probe, from));
        match state.endpoint.accept(incoming, now, &mut reply, Some(config)) {
            Ok((handle, quic)) => {
                let key = state.insert(Connection::new(handle, quic, now));
                state.touched.push(key);
            }
            Err(e) => {
                if let Some(transmit) = e.response {
                    let _ = self.send(&transmit, &reply);
                }
            }
        }
    }

    /// Ends a handshake to make room for another. Whose it was is told, and tries again if it is a rank: it would take
    /// silence for a host that is gone.
    pub(super) fn evict(&self, state: &mut State, key: Key, now: Instant) {
        if let Some(connection) = state.connections.get_mut(&key) {
            connection.close(now);
            self.transmit(state, key, now);
        }
        state.forget(key);
    }

    fn run_timers(&self, state: &mut State, now: Instant) {
        let (mut due, mut over): (Option<Instant>, Vec<Key>) = (None, Vec::new());
        for (key, connection) in &mut state.connections {
            if connection.quic.poll_timeout().is_some_and(|at| at <= now) {
                connection.quic.handle_timeout(now);
                state.touched.push(*key);
            }
            let serves_nothing = connection.lanes.is_empty();
            if serves_nothing && !connection.connected && connection.quiet + PATIENCE <= now {
                over.push(*key);
                continue;
            }
            if serves_nothing && connection.quiet + PATIENCE <= now && !connection.is_owing() {
                connection.close(now);
                state.touched.push(*key);
            }
            let patience =
                (serves_nothing && connection.quiet + PATIENCE > now).then_some(connection.quiet + PATIENCE);
            due = [due, connection.quic.poll_timeout(), patience].into_iter().flatten().min();
        }
        over.into_iter().for_each(|key| state.forget(key));
        state.due = due;
    }

    /// Hears what has happened to a connection, and sends what it has to send.
    pub(super) fn serve(&self, state: &mut State, key: Key, own: &Arc<Wake>, now: Instant) {
        let State { endpoint, connections, keys, opened, .. } = &mut *state;
        let Some(connection) = connections.get_mut(&key) else { return };
        loop {
            while let Some(event) = connection.quic.poll_endpoint_events() {
                if event.is_drained() {
                    connection.drained = true;
                    keys.remove(&connection.handle);
                }
                if let Some(answer) = endpoint.handle_event(connection.handle, event) {
                    connection.quic.handle_event(answer);
                }
            }
            let Some(event) = connection.quic.poll() else { break };
            match event {
                Event::Connected => {
                    (connection.connected, connection.quiet) = (true, now);
                    connection.tell_all(own);
                }
                Event::ConnectionLost { reason } => {
                    connection.lost.get_or_insert(reason);
                    connection.tell_all(own);
                }
                Event::Stream(StreamEvent::Opened { dir: Dir::Bi }) => {
                    while let Some(id) = connection.quic.streams().accept(Dir::Bi) {
                        opened.push_back((key, id));
                    }
                    if !Arc::ptr_eq(own, &self.wake) {
                        self.wake.ring();
                    }
                }
                Event::Stream(StreamEvent::Available { .. }) => connection.tell_all(own),
                Event::Stream(
                    StreamEvent::Readable { id }
                    | StreamEvent::Writable { id }
                    | StreamEvent::Stopped { id, .. }
                    | StreamEvent::Finished { id },
                ) => connection.tell(id, own),
                _ => {}
            }
        }
        self.transmit(state, key, now);
        if state.connections.get(&key).is_some_and(|c| c.drained && c.lanes.is_empty()) {
            state.forget(key);
        }
        if let Some(at) = state.connections.get_mut(&key).and_then(|c| c.next()) {
            state.due = Some(state.due.map_or(at, |due| due.min(at)));
            // It sleeps long, for it knows of no timer before.
            if at < state.alarm && state.alarm > now + TICK && !Arc::ptr_eq(own, &self.wake) {
                state.alarm = now;
                self.wake.ring();
            }
        }
    }

    /// Sends what a connection has to send, as far as the socket takes it.
    fn transmit(&self, state: &mut State, key: Key, now: Instant) {
        if !self.flush(state) {
            return;
        }
        loop {
            let State { connections, outbox, unsent, .. } = &mut *state;
            let Some(connection) = connections.get_mut(&key) else { return };
            outbox.clear();
            let train = (MAX_DATAGRAM / usize::from(connection.quic.current_mtu())).max(1);
            let most = self.udp.max_gso_segments().min(train);
            *unsent = connection.quic.poll_transmit(now, most, outbox);
            if unsent.is_none() || !self.flush(state) {
                return;
            }
        }
    }

    /// Sends what the socket has not taken before: whether it has now.
    fn flush(&self, state: &mut State) -> bool {
        let Some(transmit) = state.unsent.take() else { return true };
        match self.send(&transmit, &state.outbox) {
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                state.unsent = Some(transmit);
                false
            }
            // A datagram that can't go is one that is lost.
            _ => true,
        }
    }

    fn send(&self, transmit: &Transmit, bytes: &[u8]) -> io::Result<()> {
        let transmit = quinn_udp::Transmit {
            destination: transmit.destination,
            ecn: transmit.ecn.and_then(|ecn| EcnCodepoint::from_bits(ecn as u8)),
            contents: &bytes[..transmit.size],
            segment_size: transmit.segment_size,
            src_ip: transmit.src_ip,
        };
        self.udp.try_send((&self.socket).into(), &transmit)
    }

    /// Ends all connections, once the peers have what they were told: the thread that makes connections goes.
    pub(in crate::tcp) fn close(&self) {
        let end = Instant::now() + LINGER;
        loop {
            let mut state = self.lock();
            self.drive(&mut state, &self.wake);
            let now = Instant::now();
            if now >= end || !state.connections.values_mut().any(Connection::is_owing) {
                break;
            }
            let wait = state.due.unwrap_or(end).min(end).saturating_duration_since(now);
            drop(state);
            let wait = wait + Duration::from_millis(1);
            let timeout = Timespec { tv_sec: wait.as_secs() as i64, tv_nsec: wait.subsec_nanos().into() };
            let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::IN)], Some(&timeout));
        }
        let mut state = self.lock();
        let (now, keys) = (Instant::now(), state.connections.keys().copied().collect::<Vec<_>>());
        for key in keys {
            if let Some(connection) = state.connections.get_mut(&key) {
                connection.close(now);
                self.serve(&mut state, key, &self.wake, now);
            }
        }
    }
}

impl State {
    fn insert(&mut self, connection: Connection) -> Key {
        self.made += 1;
        self.keys.insert(connection.handle, self.made);
        self.connections.insert(self.made, connection);
        self.made
    }

    /// Drops a connection without a word.
    fn forget(&mut self, key: Key) {
        let Some(connection) = self.connections.remove(&key) else { return };
        if !connection.drained {
            self.keys.remove(&connection.handle);
            self.endpoint.handle_event(connection.handle, EndpointEvent::drained());
        }
    }
}

impl AsFd for Port {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}
