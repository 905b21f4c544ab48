//! Our own standard output and error, written without ever blocking the poll loop.
//!
//! A reader that stands still (a pager) must not keep the launcher from seeing a signal or a dead rank. The
//! descriptor can't be made non-blocking, because that would change it for everybody who shares it. But when
//! `poll` says that a pipe is writable, it has room for `PIPE_BUF` bytes: so no more than that is written a turn.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use super::Stream;

const PIPE_BUF: usize = 4096;
/// With more than this waiting, the ranks' output is left in their pipes.
const FULL: usize = 256 * 1024;

/// Bytes on their way to a descriptor.
pub(super) struct Sink<F> {
    fd: F,
    pending: Vec<u8>,
    sent: usize,
    broken: bool,
}

impl<F: AsFd> Sink<F> {
    pub(super) fn new(fd: F) -> Sink<F> {
        Sink { fd, pending: Vec::new(), sent: 0, broken: false }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Takes `parts`, one after the other, to be written.
    pub(super) fn push(&mut self, parts: &[&[u8]]) {
        if self.broken {
            return;
        }
        for part in parts {
            self.pending.extend_from_slice(part);
        }
    }

    /// Writes a piece. Only to be called when the descriptor is writable.
    pub(super) fn write(&mut self) {
        let rest = &self.pending[self.sent..];
        let piece = &rest[..rest.len().min(PIPE_BUF)];
        match rustix::io::write(&self.fd, piece) {
            Ok(n) => self.sent += n,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(_) => {
                self.broken = true;
                self.sent = self.pending.len();
            }
        }
        if self.sent == self.pending.len() {
            self.pending.clear();
            self.sent = 0;
        } else if self.sent > FULL {
            self.pending.drain(..self.sent);
            self.sent = 0;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.pending.is_empty()
    }

    pub(super) fn is_full(&self) -> bool {
        self.pending.len() - self.sent > FULL
    }

    /// Whether nobody will ever read what is written: a closed pipe, a full disk.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }
}

/// The two that a launcher prints to.
pub(super) struct Sinks {
    pub(super) out: Sink<io::Stdout>,
    pub(super) err: Sink<io::Stderr>,
}

impl Sinks {
    /// Takes a line to be printed behind `prefix`.
    pub(super) fn print(&mut self, stream: Stream, prefix: &str, line: &[u8]) {
        let parts = [prefix.as_bytes(), line, b"\n"];
        match stream {
            Stream::Stdout => self.out.push(&parts),
            Stream::Stderr => self.err.push(&parts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reader_that_stands_still_does_not_block_and_gets_everything_in_the_end() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        let mut sink = Sink::new(writer);
        let line = [b'x'; 1000];
        while !sink.is_full() {
            sink.push(&[&line, b"\n"]);
        }
        let writable = |sink: &Sink<std::os::fd::OwnedFd>| {
            let mut fds = [rustix::event::PollFd::from_borrowed_fd(sink.fd(), rustix::event::PollFlags::OUT)];
            rustix::event::poll(&mut fds, Some(&Default::default())).unwrap() == 1
        };
        let mut turns = 0;
        while writable(&sink) {
            sink.write();
            turns += 1;
        }
        assert!(turns > 1 && !sink.is_empty());
        let read = std::thread::spawn(move || {
            let mut all = Vec::new();
            io::Read::read_to_end(&mut std::fs::File::from(reader), &mut all).unwrap();
            all
        });
        while !sink.is_empty() {
            if writable(&sink) {
                sink.write();
            }
        }
        drop(sink);
        let all = read.join().unwrap();
        assert!(all.len() > FULL && all.len() % 1001 == 0);
        assert!(all.chunks(1001).all(|c| c[..1000] == line && c[1000] == b'\n'));
    }

    #[test]
    fn a_reader_that_is_gone_breaks_it() {
        let (reader, writer) = rustix::pipe::pipe().unwrap();
        drop(reader);
        let mut sink = Sink::new(writer);
        sink.push(&[b"lost"]);
        sink.write();
        assert!(sink.is_broken() && sink.is_empty());
        sink.push(&[b"more"]);
        assert!(sink.is_empty());
    }
}
