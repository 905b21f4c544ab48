//! The loop that watches running ranks: their ends, their output and our signals, in one `poll`.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid,
};
use tensorwire_core::{Error, Result};

use super::agent::{Control, Heard};
use super::guard::Guard;
use super::lines::{LineBuffer, Tail};
use super::signals::Signals;
use super::sink::{Sink, Sinks};
use super::spawn::{Failure, LOST_PEER_STATUS, Launcher, Line, Outcome, Stream};
use super::wire::{Report, line_head};

/// From `SIGTERM` to `SIGKILL` when a rank has failed.
pub(super) const TERM_GRACE: Duration = Duration::from_millis(300);
/// The same when somebody has sent us a signal: ranks may want to save their work.
pub(super) const SIGNAL_GRACE: Duration = Duration::from_secs(5);
/// How long what a rank has left running may keep its output open.
pub(super) const DRAIN: Duration = Duration::from_millis(300);
/// The same once the job is being ended.
const DRAIN_ENDING: Duration = Duration::from_millis(100);

pub(super) type OnLine<'a> = Box<dyn FnMut(Line<'_>) -> ControlFlow<()> + 'a>;

/// Starts all ranks and watches them; `control` is who asks for them from another host.
pub(super) fn supervise(
    launcher: &Launcher<'_>,
    ranks: usize,
    forward_signals: bool,
    on_line: Option<OnLine<'_>>,
    control: Option<Control>,
) -> Result<Outcome> {
    let signals = catch_signals(forward_signals)?;
    let guard = Guard::start(ranks).map_err(|e| Error::os("cannot start the ranks' guard process", e))?;
    let mut watch = Watch {
        ranks: Vec::with_capacity(ranks),
        guard,
        signals,
        output: match (&control, on_line) {
            (Some(_), _) => Output::Frames(Sink::new(io::stdout())),
            (None, on_line) => Output::of(on_line),
        },
        first: launcher.first,
        control,
        chunk: vec![0; 64 * 1024],
        failure: None,
        forwarded: None,
        output_closed: false,
        kill_at: None,
        killed: false,
    };
    let binding = launcher.binding()?;
    for rank in 0..ranks {
        let on = binding.as_ref().map(|shares| &shares[rank]);
        let child = launcher.spawn(rank, &watch.guard, on)?;
        let rank = launcher.first + rank;
        watch.ranks.push(Rank::new(child).map_err(|e| Error::os(format!("cannot watch rank {rank}"), e))?);
    }
    watch.run()?;
    Ok(watch.into_outcome())
}

pub(super) fn catch_signals(wanted: bool) -> Result<Option<Signals>> {
    wanted.then(|| Signals::catch().map_err(|e| Error::os("cannot catch signals", e))).transpose()
}

/// One rank's process and what is known of it.
struct Rank {
    child: Child,
    group: Pid,
    pidfd: OwnedFd,
    /// Standard output and error, until they end.
    pipes: [Option<OwnedFd>; 2],
    lines: [LineBuffer; 2],
    tail: Tail,
    state: State,
}

enum State {
    Running,
    /// Ended, but not reaped: its id, and so its group's, can't be given to anybody else. Its output may go on
    /// until the given time.
    Ended {
        status: ExitStatus,
        drain_until: Instant,
    },
    Reaped(ExitStatus),
}

/// How the ranks' output leaves.
pub(super) enum Output<'a> {
    Print(Sinks),
    Lines(OnLine<'a>),
    /// To the launcher that this process is an agent of.
    Frames(Sink<io::Stdout>),
}

impl<'a> Output<'a> {
    /// To `on_line`, or printed.
    pub(super) fn of(on_line: Option<OnLine<'a>>) -> Output<'a> {
        match on_line {
            Some(on_line) => Output::Lines(on_line),
            None => Output::Print(Sinks { out: Sink::new(io::stdout()), err: Sink::new(io::stderr()) }),
        }
    }

    /// Whether ranks should wait with further output to this stream.
    pub(super) fn is_full(&self, stream: Stream) -> bool {
        match (self, stream) {
            (Output::Lines(_), _) => false,
            (Output::Print(sinks), Stream::Stdout) => sinks.out.is_full(),
            (Output::Print(sinks), Stream::Stderr) => sinks.err.is_full(),
            (Output::Frames(sink), _) => sink.is_full(),
        }
    }

    pub(super) fn is_flushed(&self) -> bool {
        match self {
            Output::Print(sinks) => sinks.out.is_empty() && sinks.err.is_empty(),
            Output::Lines(_) => true,
            Output::Frames(sink) => sink.is_empty(),
        }
    }

    pub(super) fn line(&mut self, line: Line<'_>) -> ControlFlow<()> {
        match self {
            Output::Lines(on_line) => return on_line(line),
            Output::Print(sinks) => sinks.print(line.stream, &format!("[rank {}] ", line.rank), line.bytes),
            Output::Frames(sink) => {
                sink.push(&[&line_head(line.rank, line.stream, line.bytes.len()), line.bytes]);
            }
        }
        ControlFlow::Continue(())
    }

    /// Tells the launcher, where there is one.
    fn report(&mut self, report: &Report) {
        if let Output::Frames(sink) = self {
            sink.push(&[&report.bytes()]);
        }
    }

    /// What waits to be written, and where to.
    pub(super) fn waiting(&self) -> impl Iterator<Item = (Stream, BorrowedFd<'_>)> {
        let (out, err) = match self {
            Output::Print(sinks) => (Some(&sinks.out), Some(&sinks.err)),
            Output::Frames(sink) => (Some(sink), None),
            Output::Lines(_) => (None, None),
        };
        let out = out.filter(|sink| !sink.is_empty()).map(|sink| (Stream::Stdout, sink.fd()));
        let err = err.filter(|sink| !sink.is_empty()).map(|sink| (Stream::Stderr, sink.fd()));
        out.into_iter().chain(err)
    }

    /// Writes on: whether standard output is still read by anybody.
    pub(super) fn write(&mut self, stream: Stream) -> bool {
        match (self, stream) {
            (Output::Print(sinks), Stream::Stderr) => sinks.err.write(),
            (Output::Print(Sinks { out, .. }) | Output::Frames(out), Stream::Stdout) => {
                out.write();
                return !out.is_broken();
            }
            _ => {}
        }
        true
    }
}

struct Watch<'a> {
    ranks: Vec<Rank>,
    /// The number that the first of them has in the job.
    first: usize,
    control: Option<Control>,
    guard: Guard,
    signals: Option<Signals>,
    output: Output<'a>,
    chunk: Vec<u8>,
    failure: Option<(usize, ExitStatus)>,
    forwarded: Option<i32>,
    output_closed: bool,
    /// When what still runs is killed: the job is being ended.
    kill_at: Option<Instant>,
    killed: bool,
}

/// What a polled descriptor is.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Control,
    Write(Stream),
    Exit(usize),
    Pipe(usize, Stream),
}

impl Watch<'_> {
    fn run(&mut self) -> Result<()> {
        while !self.is_done() {
            let mut ended = Vec::new();
            for source in self.wait()? {
                match source {
                    Source::Signal => self.forward(),
                    Source::Control => self.heed(),
                    Source::Write(stream) => {
                        if !self.output.write(stream) {
                            self.close_output();
                        }
                    }
                    Source::Pipe(rank, stream) => {
                        self.read(rank, stream);
                    }
                    Source::Exit(rank) => ended.push(rank),
                }
            }
            self.note_ends(&ended)?;
            self.keep_time()?;
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let reaped = self.ranks.iter().all(|r| matches!(r.state, State::Reaped(_)));
        // A reader that stands still holds up a good run's output, not the end of a bad one.
        let past_grace = self.kill_at.is_some_and(|at| Instant::now() >= at);
        reaped && (self.output.is_flushed() || past_grace)
    }

    /// Sleeps until something happens or the next deadline comes, and says what happened.
    fn wait(&mut self) -> Result<Vec<Source>> {
        let timeout = self.next_deadline().map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            // Rounded up, or the loop would spin through the last fraction.
            let left = left + Duration::from_micros(100);
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() }
        });
        let polled = self.polled();
        let mut fds: Vec<_> =
            polled.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(e) => return Err(Error::os("cannot wait for the ranks", e)),
        }
        let ready = polled.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, ..), _)| *source).collect())
    }

    fn polled(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut polled = Vec::with_capacity(3 + 3 * self.ranks.len());
        if let Some(signals) = &self.signals {
            polled.push((Source::Signal, signals.reader(), PollFlags::IN));
        }
        if let Some(control) = self.control.as_ref().filter(|c| !c.is_lost()) {
            polled.push((Source::Control, control.fd(), PollFlags::IN));
        }
        polled.extend(self.output.waiting().map(|(stream, fd)| (Source::Write(stream), fd, PollFlags::OUT)));
        for (i, rank) in self.ranks.iter().enumerate() {
            if matches!(rank.state, State::Running) {
                polled.push((Source::Exit(i), rank.pidfd.as_fd(), PollFlags::IN));
            }
            for (stream, pipe) in rank.open_pipes().filter(|(stream, _)| !self.output.is_full(*stream)) {
                polled.push((Source::Pipe(i, stream), pipe.as_fd(), PollFlags::IN));
            }
        }
        polled
    }

    fn next_deadline(&self) -> Option<Instant> {
        let drains = self.ranks.iter().filter_map(|r| match r.state {
            State::Ended { drain_until, .. } => Some(drain_until),
            _ => None,
        });
        let control = self.control.as_ref().and_then(Control::due);
        drains.chain(self.kill_at.filter(|_| !self.killed)).chain(control).min()
    }

    /// Passes on what somebody sent us.
    fn forward(&mut self) {
        while let Some(number) = self.signals.as_mut().and_then(Signals::next) {
            self.pass_on(number);
        }
    }

    fn pass_on(&mut self, number: i32) {
        let again = self.forwarded.is_some() && number == libc::SIGINT;
        self.forwarded.get_or_insert(number);
        match Signal::from_named_raw(number) {
            Some(signal) if !again => self.signal_all(signal),
            _ => self.kill_at = Some(Instant::now()),
        }
        if !self.any_running() {
            self.kill_at = Some(Instant::now());
        }
    }

    /// Does what the launcher asks for.
    fn heed(&mut self) {
        for heard in self.control.as_mut().map(Control::hear).unwrap_or_default() {
            match heard {
                Heard::Signal(number) => self.pass_on(number.into()),
                Heard::End => self.end(),
                Heard::Lost => {
                    // Nobody is there to be told, and nothing to wait for.
                    self.signal_all(Signal::TERM);
                    self.kill_at = Some(Instant::now() + TERM_GRACE);
                    self.output_closed = true;
                    self.shorten_drains();
                }
            }
        }
    }

    fn any_running(&self) -> bool {
        self.ranks.iter().any(|r| matches!(r.state, State::Running))
    }

    /// Sends a signal to the group of every rank whose id is still its own.
    fn signal_all(&self, signal: Signal) {
        for rank in &self.ranks {
            if !matches!(rank.state, State::Reaped(_)) {
                let _ = kill_process_group(rank.group, signal);
            }
        }
    }

    /// Ends the job: a request now, force after a while.
    fn end(&mut self) {
        if self.kill_at.is_some() {
            return;
        }
        if self.forwarded.is_some() {
            // The ranks have been asked to end already.
            self.kill_at = Some(Instant::now() + SIGNAL_GRACE);
        } else {
            self.kill_at = Some(Instant::now() + TERM_GRACE);
            self.signal_all(Signal::TERM);
        }
        self.shorten_drains();
    }

    fn shorten_drains(&mut self) {
        let latest = Instant::now() + DRAIN_ENDING;
        for rank in &mut self.ranks {
            if let State::Ended { drain_until, .. } = &mut rank.state {
                *drain_until = latest.min(*drain_until);
            }
        }
    }

    /// Reads once; tells whether there was something.
    fn read(&mut self, rank: usize, stream: Stream) -> bool {
        let Some(of) = self.ranks.get_mut(rank) else { return false };
        let pipe = &mut of.pipes[stream as usize];
        let Some(fd) = pipe else { return false };
        let count = match rustix::io::read(&*fd, &mut self.chunk[..]) {
            Ok(count) => count,
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return false,
            Err(_) => 0,
        };
        let (tail, output, number) = (&mut of.tail, &mut self.output, self.first + rank);
        let mut stop = false;
        let mut hand_on = |bytes: &[u8]| {
            if stream == Stream::Stderr {
                tail.push(bytes);
            }
            stop |= output.line(Line { rank: number, stream, bytes }).is_break();
        };
        let lines = &mut of.lines[stream as usize];
        if count == 0 {
            *pipe = None;
            lines.finish(&mut hand_on);
        } else {
            lines.feed(&self.chunk[..count], &mut hand_on);
        }
        if stop {
            self.close_output();
        }
        count > 0
    }

    /// Nobody reads us any more: there is nothing left to run for.
    fn close_output(&mut self) {
        // A rank that has failed before that is still what went wrong.
        if !self.output_closed && self.failure.is_none() {
            self.output_closed = true;
            self.end();
        }
    }

    /// Takes note of the ranks that have ended since the last time.
    fn note_ends(&mut self, ended: &[usize]) -> Result<()> {
        let (mut failed, mut all) = (Vec::new(), Vec::new());
        for &i in ended {
            let Some(rank) = self.ranks.get_mut(i) else { continue };
            let Some(status) =
                rank.peek().map_err(|e| Error::os(format!("cannot learn how rank {i} ended"), e))?
            else {
                continue;
            };
            let drain = if self.kill_at.is_some() { DRAIN_ENDING } else { DRAIN };
            rank.state = State::Ended { status, drain_until: Instant::now() + drain };
            all.push((i, status));
            if !status.success() {
                failed.push((blame(status), i, status));
            }
        }
        // The first to fail, unless it was we who made it fail.
        let first = failed.into_iter().min_by_key(|&(blame, rank, _)| (blame, rank));
        if let Some((_, rank, status)) = first.filter(|_| self.failure.is_none() && !self.output_closed) {
            self.failure = Some((rank, status));
            self.end();
        } else if !ended.is_empty() && self.forwarded.is_some() {
            self.end();
        }
        // A launcher that doesn't ask for its ranks' end but is lost, whom some of what we write may still reach, has
        // lost them: how they end now is our doing.
        all.retain(|_| !self.output_closed);
        for (i, status) in all {
            let (rank, first) = ((self.first + i) as u32, self.failure.is_some_and(|(rank, _)| rank == i));
            self.output.report(&Report::Ended { rank, status: status.into_raw(), first });
        }
        Ok(())
    }

    /// Kills and reaps what is due.
    fn keep_time(&mut self) -> Result<()> {
        let now = Instant::now();
        if let Some(control) = &mut self.control {
            if control.beat(now) {
                self.output.report(&Report::Beat);
            }
            if control.is_overdue(now) {
                self.heed();
            }
        }
        if !self.killed && self.kill_at.is_some_and(|at| now >= at) {
            self.killed = true;
            self.signal_all(Signal::KILL);
            self.shorten_drains();
        }
        let ending = self.kill_at.is_some();
        for i in 0..self.ranks.len() {
            let rank = &mut self.ranks[i];
            let held_up = rank.open_pipes().any(|(stream, _)| self.output.is_full(stream));
            let open = rank.open_pipes().next().is_some();
            let State::Ended { status, drain_until } = &mut rank.state else { continue };
            if held_up && !ending {
                // Its output is still in the pipe because we don't read it, not because somebody keeps it open.
                *drain_until = now + DRAIN;
            }
            if open && now < *drain_until {
                continue;
            }
            let status = *status;
            // What the rank has left behind. Its id is still taken, so this can't meet a stranger.
            let _ = kill_process_group(rank.group, Signal::KILL);
            self.drain(i);
            let rank = &mut self.ranks[i];
            rank.child.wait().map_err(|e| Error::os(format!("cannot reap rank {i}"), e))?;
            rank.state = State::Reaped(status);
            self.guard.release(rank.group.as_raw_nonzero().get());
        }
        Ok(())
    }

    /// Reads what is left of a rank that has ended, but not for ever: someone may go on writing.
    fn drain(&mut self, rank: usize) {
        const CHUNKS: usize = 16;
        for stream in [Stream::Stdout, Stream::Stderr] {
            for _ in 0..CHUNKS {
                if !self.read(rank, stream) {
                    break;
                }
            }
            let Some(of) = self.ranks.get_mut(rank) else { return };
            if of.pipes[stream as usize].take().is_some() {
                let (tail, output, number) = (&mut of.tail, &mut self.output, self.first + rank);
                of.lines[stream as usize].finish(|bytes| {
                    if stream == Stream::Stderr {
                        tail.push(bytes);
                    }
                    let _ = output.line(Line { rank: number, stream, bytes });
                });
            }
        }
    }

    fn into_outcome(mut self) -> Outcome {
        let failure = self.failure.take().map(|(rank, status)| {
            let tail = self.ranks.get_mut(rank).map(|r| std::mem::take(&mut r.tail)).unwrap_or_default();
            Failure { rank: self.first + rank, status, host: None, stderr: tail.into_lines() }
        });
        let statuses = self.ranks.iter().filter_map(|r| match r.state {
            State::Reaped(status) => Some(status),
            _ => None,
        });
        Outcome {
            statuses: statuses.collect(),
            failure,
            forwarded: self.forwarded,
            output_closed: self.output_closed,
        }
    }
}

impl Drop for Watch<'_> {
    /// Leaves nothing behind when a rank could not be started or watched.
    fn drop(&mut self) {
        self.signal_all(Signal::KILL);
        for rank in &mut self.ranks {
            if !matches!(rank.state, State::Reaped(_)) {
                let _ = rank.child.wait();
            }
        }
    }
}

impl Rank {
    fn new(mut child: Child) -> io::Result<Rank> {
        let watched = (|| {
            let group = Pid::from_child(&child);
            let pidfd = pidfd_open(group, PidfdFlags::empty())?;
            let pipes = [child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from)];
            for pipe in pipes.iter().flatten() {
                rustix::io::ioctl_fionbio(pipe, true)?;
            }
            Ok((group, pidfd, pipes))
        })();
        match watched {
            Ok((group, pidfd, pipes)) => Ok(Rank {
                child,
                group,
                pidfd,
                pipes,
                lines: Default::default(),
                tail: Tail::default(),
                state: State::Running,
            }),
            Err(e) => {
                let _ = child.kill();
                let _ = child.wait();
                Err(e)
            }
        }
    }

    fn open_pipes(&self) -> impl Iterator<Item = (Stream, &OwnedFd)> {
        let streams = [Stream::Stdout, Stream::Stderr].into_iter().zip(&self.pipes);
        streams.filter_map(|(stream, pipe)| pipe.as_ref().map(|pipe| (stream, pipe)))
    }

    /// How the process ended, leaving it to be reaped later.
    fn peek(&self) -> io::Result<Option<ExitStatus>> {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT | WaitIdOptions::NOHANG;
        let status = waitid(WaitId::PidFd(self.pidfd.as_fd()), options)?;
        // The layout of wait(2): the code in the second byte, or the signal in the low bits of the first.
        Ok(status.and_then(|s| {
            let raw = s.exit_status().map(|code| (code & 0xff) << 8).or(s.terminating_signal());
            raw.map(ExitStatus::from_raw)
        }))
    }
}

/// How likely a rank that was seen to end together with others is the cause: the lowest first. Ranks that
/// notice the loss of another end by themselves; one that was killed by a signal did not.
pub(super) fn blame(status: ExitStatus) -> u8 {
    match (status.signal(), status.code()) {
        (Some(_), _) => 0,
        (None, Some(LOST_PEER_STATUS)) => 2,
        (None, _) => 1,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_blame_goes_to_who_was_killed_then_to_who_failed_and_last_to_who_lost_a_peer() {
        let (killed, failed) = (ExitStatus::from_raw(9), ExitStatus::from_raw(1 << 8));
        let lost_peer = ExitStatus::from_raw(LOST_PEER_STATUS << 8);
        assert!(blame(killed) < blame(failed) && blame(failed) < blame(lost_peer));
    }
}
