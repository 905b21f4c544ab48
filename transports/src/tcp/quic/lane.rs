//! One end of a stream between two ranks, over a connection that it shares with others of them.

use std::fmt;
use std::io::{self, IoSlice};
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use quinn_proto::{Dir, ReadError, StreamId, VarInt, WriteError};

use super::connection::Key;
use super::port::{Port, State};
use crate::tcp::socket::Wake;
use crate::tcp::stream::Identity;

/// Bytes that are handed over at once: those before are on their way meanwhile.
const PIECE: usize = 64 << 10;

/// Whether a lane may go on, and whom to wake if it may.
#[derive(Debug)]
pub(super) struct News {
    /// Set and cleared under the port's lock, both; read without it by the lane's owner, who is woken after they were
    /// set: Relaxed.
    readable: AtomicBool,
    writable: AtomicBool,
    wake: Mutex<Arc<Wake>>,
}

impl News {
    pub(super) fn new(wake: &Arc<Wake>) -> Arc<News> {
        let [readable, writable] = [AtomicBool::new(true), AtomicBool::new(true)];
        Arc::new(News { readable, writable, wake: Mutex::new(wake.clone()) })
    }

    /// There is some; `own` is the wake of who brings it, who looks next.
    pub(super) fn raise(&self, own: &Arc<Wake>) {
        self.readable.store(true, Ordering::Relaxed);
        self.writable.store(true, Ordering::Relaxed);
        let wake = self.wake.lock().unwrap_or_else(PoisonError::into_inner);
        if !Arc::ptr_eq(&wake, own) {
            wake.ring();
        }
    }
}

pub(crate) struct Lane {
    port: Arc<Port>,
    key: Key,
    /// Given when the connection is made.
    id: Option<StreamId>,
    news: Arc<News>,
    /// Of the thread that this lane belongs to.
    own: Arc<Wake>,
}

impl fmt::Debug for Lane {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lane").field("id", &self.id).finish_non_exhaustive()
    }
}

impl Lane {
    pub(super) fn new(port: Arc<Port>, key: Key, id: Option<StreamId>, news: Arc<News>) -> Lane {
        let own = port.wake().clone();
        Lane { port, key, id, news, own }
    }

    /// Whose the lane is from now on.
    pub(in crate::tcp) fn belongs_to(&mut self, wake: &Arc<Wake>) {
        self.own = wake.clone();
        *self.news.wake.lock().unwrap_or_else(PoisonError::into_inner) = wake.clone();
    }

    /// Whether something may be here to be read, of which the kernel doesn't tell any more.
    #[inline]
    pub(in crate::tcp) fn is_readable(&self) -> bool {
        self.news.readable.load(Ordering::Relaxed)
    }

    /// Whether it may take something, since it last took nothing.
    #[inline]
    pub(in crate::tcp) fn is_writable(&self) -> bool {
        self.news.writable.load(Ordering::Relaxed)
    }

    /// Whether the connection has come about, and the stream with it.
    pub(in crate::tcp) fn connected(&mut self) -> io::Result<bool> {
        let mut state = self.port.lock();
        self.news.readable.store(false, Ordering::Relaxed);
        let now = Instant::now();
        let connection = state.connections.get_mut(&self.key).ok_or(io::ErrorKind::NotConnected)?;
        if !connection.connected {
            connection.look(self.port.address(), now);
        }
        if let Some(e) = connection.ended() {
            return Err(e);
        }
        if !connection.connected {
            return Ok(false);
        }
        if self.id.is_none() {
            self.id = connection.quic.streams().open(Dir::Bi);
            let lane = connection.lanes.iter_mut().find(|(_, news)| Arc::ptr_eq(news, &self.news));
            lane.expect("it is kept until it is dropped").0 = self.id;
        }
        self.news.readable.store(self.id.is_some(), Ordering::Relaxed);
        Ok(self.id.is_some())
    }

    pub(in crate::tcp) fn binding(&self) -> io::Result<[u8; 32]> {
        let state = self.port.lock();
        state.connections.get(&self.key).ok_or(io::ErrorKind::NotConnected)?.binding()
    }

    pub(in crate::tcp) fn is_from(&self, who: Identity) -> bool {
        self.port.lock().connections.get(&self.key).is_some_and(|c| c.is_from(who))
    }

    /// See [`Stream::send`](crate::tcp::stream::Stream::send).
    pub(in crate::tcp) fn send(&mut self, parts: &[IoSlice<'_>]) -> io::Result<Option<usize>> {
        let mut state = self.port.lock();
        let mut sent = self.write(&mut state, parts)?;
        if sent == 0 {
            self.port.drive(&mut state, &self.own);
            sent = self.write(&mut state, parts)?;
        }
        Ok((sent > 0).then_some(sent))
    }

    fn write(&self, state: &mut State, parts: &[IoSlice<'_>]) -> io::Result<usize> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let id = self.id.ok_or_else(gone)?;
        let mut sent = 0;
        'parts: for piece in parts.iter().flat_map(|part| part.chunks(PIECE)) {
            let mut rest = piece;
            while !rest.is_empty() {
                let connection = state.connections.get_mut(&self.key).ok_or_else(gone)?;
                if let Some(e) = connection.ended() {
                    return Err(e);
                }
                match connection.quic.send_stream(id).write(rest) {
                    Ok(n) => {
                        sent += n;
                        rest = &rest[n..];
                    }
                    Err(WriteError::Blocked) => {
                        self.news.writable.store(false, Ordering::Relaxed);
                        break 'parts;
                    }
                    Err(WriteError::Stopped(_) | WriteError::ClosedStream) => {
                        return Err(io::ErrorKind::BrokenPipe.into());
                    }
                }
            }
            // Of a short message, one datagram.
            if piece.len() == PIECE {
                self.port.serve(state, self.key, &self.own, Instant::now());
            }
        }
        if sent > 0 {
            self.port.serve(state, self.key, &self.own, Instant::now());
        }
        Ok(sent)
    }

    /// How many bytes have come, 0 if no more will; `None` where nothing has come.
    pub(in crate::tcp) fn receive(&mut self, into: &mut [u8]) -> io::Result<Option<usize>> {
        let mut state = self.port.lock();
        if self.is_readable()
            && let Some(n) = self.read(&mut state, into)?
        {
            return Ok(Some(n));
        }
        self.port.drive(&mut state, &self.own);
        if self.is_readable() { self.read(&mut state, into) } else { Ok(None) }
    }

    fn read(&self, state: &mut State, into: &mut [u8]) -> io::Result<Option<usize>> {
        let gone = || io::Error::from(io::ErrorKind::NotConnected);
        let id = self.id.ok_or_else(gone)?;
        let connection = state.connections.get_mut(&self.key).ok_or_else(gone)?;
        let (mut got, mut end) = (0, false);
        let mut stream = connection.quic.recv_stream(id);
        let Ok(mut chunks) = stream.read(true) else { return Ok(Some(0)) };
        while got < into.len() {
            match chunks.next(into.len() - got) {
                Ok(Some(chunk)) => {
                    into[got..got + chunk.bytes.len()].copy_from_slice(&chunk.bytes);
                    got += chunk.bytes.len();
                }
                Ok(None) => {
                    end = true;
                    break;
                }
                Err(ReadError::Blocked) => {
                    self.news.readable.store(false, Ordering::Relaxed);
                    break;
                }
                Err(ReadError::Reset(_)) => return Err(io::ErrorKind::ConnectionReset.into()),
            }
        }
        let more_room = chunks.finalize().should_transmit();
        if got > 0 {
            if more_room {
                self.port.serve(state, self.key, &self.own, Instant::now());
            }
            return Ok(Some(got));
        }
        if end {
            return Ok(Some(0));
        }
        let connection = state.connections.get_mut(&self.key).ok_or_else(gone)?;
        match (&connection.lost, connection.ended()) {
            // It said so.
            (Some(quinn_proto::ConnectionError::ApplicationClosed(_)), _) => Ok(Some(0)),
            (_, Some(e)) => Err(e),
            (_, None) => Ok(None),
        }
    }

    /// Looks whether a peer that is silent is there at all. One whose host is cut off is noticed by the connection.
    pub(in crate::tcp) fn look(&self) {
        let mut state = self.port.lock();
        let now = Instant::now();
        let Some(connection) = state.connections.get_mut(&self.key) else { return };
        connection.look(self.port.address(), now);
        if connection.ended().is_some() {
            connection.tell_all(&self.own);
        }
        self.port.serve(&mut state, self.key, &self.own, now);
    }

    /// How long a thread that waits for this lane may sleep.
    pub(in crate::tcp) fn patience(&self) -> Duration {
        self.port.patience()
    }
}

impl AsFd for Lane {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.port.as_fd()
    }
}

impl Drop for Lane {
    /// Ends the stream behind what was sent, and wants to hear nothing more.
    fn drop(&mut self) {
        let mut state = self.port.lock();
        let Some(connection) = state.connections.get_mut(&self.key) else { return };
        connection.lanes.retain(|(_, news)| !Arc::ptr_eq(news, &self.news));
        let now = Instant::now();
        connection.quiet = now;
        if let Some(id) = self.id {
            let _ = connection.quic.send_stream(id).finish();
            let _ = connection.quic.recv_stream(id).stop(VarInt::from_u32(0));
        }
        self.port.serve(&mut state, self.key, &self.own, now);
    }
}
