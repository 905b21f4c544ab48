//! The loop that watches ranks on several hosts, through the agents there.

use std::ffi::OsString;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process_group, pidfd_open};
use tensorwire_core::{Error, Result};

use super::guard::Guard;
use super::hostfile::Host;
use super::lines::{LineBuffer, Tail};
use super::signals::Signals;
use super::sink::Sink;
use super::spawn::{Failure, Line, Outcome, Stream, spawn_watched};
use super::supervise::{DRAIN, OnLine, Output, SIGNAL_GRACE, TERM_GRACE, blame, catch_signals};
use super::wire::{BEAT, Decoder, Job, Order, Report, SILENCE};

/// How much longer than its ranks an agent has to end, and what it says to arrive.
const AGENT_GRACE: Duration = Duration::from_secs(2);
/// How long a rank that says it has lost another one waits for being taken for the cause: the cause itself may be on
/// another host, and its agent's word still under way.
const HOLD: Duration = Duration::from_millis(250);
/// How long a remote shell may take to start an agent.
const GREETING: Duration = Duration::from_secs(120);

/// How a command is run on another host.
#[derive(Clone, Debug)]
pub struct RemoteShell {
    /// The remote shell and its options, to which the host and the agent's command are added: such as `ssh -T`.
    pub shell: Vec<OsString>,
    /// The command on another host that calls [`agent`](super::agent).
    pub agent: Vec<OsString>,
    /// The same on this host, which is run without the remote shell.
    pub local_agent: Vec<OsString>,
}

impl RemoteShell {
    fn command(&self, host: &Host) -> Command {
        if host.is_local() {
            let mut command = Command::new(&self.local_agent[0]);
            command.args(&self.local_agent[1..]);
            return command;
        }
        let mut command = Command::new(&self.shell[0]);
        command.args(&self.shell[1..]).arg(&host.name).args(self.agent.iter().map(quoted));
        command
    }
}

/// A word as the shell at the other end takes it.
fn quoted(word: &OsString) -> OsString {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"/._-+=:,@%".contains(&b);
    if !word.is_empty() && word.as_bytes().iter().all(|b| plain(*b)) {
        return word.clone();
    }
    let mut bytes = vec![b'\''];
    for &b in word.as_bytes() {
        match b {
            b'\'' => bytes.extend(b"'\\''"),
            other => bytes.push(other),
        }
    }
    bytes.push(b'\'');
    OsString::from_vec(bytes)
}

/// Starts the ranks on their hosts and watches them.
pub(super) fn supervise_hosts(
    placed: &[(Host, Range<usize>)],
    shell: &RemoteShell,
    job: &Job,
    forward_signals: bool,
    on_line: Option<OnLine<'_>>,
) -> Result<Outcome> {
    let signals = catch_signals(forward_signals)?;
    let guard = Guard::start(placed.len()).map_err(|e| Error::os("cannot start the guard process", e))?;
    let mut watch = Watch {
        hosts: Vec::with_capacity(placed.len()),
        ranks: (0..job.world).map(|_| Rank::default()).collect(),
        guard,
        signals,
        output: Output::of(on_line),
        chunk: vec![0; 64 * 1024],
        failure: None,
        refused: None,
        forwarded: None,
        output_closed: false,
        end_at: None,
        kill_at: None,
        killed: false,
        next_beat: Instant::now() + BEAT,
    };
    for (host, ranks) in placed {
        let mut command = shell.command(host);
        command.stdin(Stdio::piped());
        let started = spawn_watched(&mut command, &watch.guard, Vec::new(), None).and_then(|child| {
            let mut remote = Remote::new(host, ranks.clone(), child)?;
            let (first, ranks) = (ranks.start as u32, ranks.len() as u32);
            let mut job = Job { first, ranks, ..job.clone() };
            // What is for one rank alone may be a secret of its own.
            job.rank_env.retain(|(rank, ..)| (first..first + ranks).contains(rank));
            remote.say(&Order::Start(Box::new(job)));
            Ok(remote)
        });
        let started = started.map_err(|e| {
            let program = command.get_program().to_string_lossy().into_owned();
            Error::os(format!("cannot start '{program}' for host {}", host.name), e)
        });
        watch.hosts.push(started?);
    }
    watch.run()?;
    watch.into_outcome()
}

/// One host's agent.
struct Remote {
    name: String,
    ranks: Range<usize>,
    child: Child,
    group: Pid,
    pidfd: OwnedFd,
    orders: Option<Sink<OwnedFd>>,
    reports: Option<OwnedFd>,
    /// What the remote shell itself has to say.
    words: Option<OwnedFd>,
    lines: LineBuffer,
    tail: Tail,
    decoder: Decoder,
    greeted: bool,
    heard: Instant,
    state: State,
}

enum State {
    Running,
    /// The remote shell has ended; what it has written may still come until then.
    Ended(Instant),
    Reaped,
}

/// What is known of a rank.
#[derive(Default)]
struct Rank {
    status: Option<ExitStatus>,
    tail: Tail,
}

/// What went wrong first.
struct First {
    rank: usize,
    status: ExitStatus,
    /// The host that was lost.
    host: Option<usize>,
}

struct Watch<'a> {
    hosts: Vec<Remote>,
    ranks: Vec<Rank>,
    guard: Guard,
    signals: Option<Signals>,
    output: Output<'a>,
    chunk: Vec<u8>,
    failure: Option<First>,
    /// Why ranks could not be started.
    refused: Option<Error>,
    forwarded: Option<i32>,
    output_closed: bool,
    /// When the job is ended for what seems to have gone wrong.
    end_at: Option<Instant>,
    /// When the remote shells are killed: the job is being ended.
    kill_at: Option<Instant>,
    killed: bool,
    next_beat: Instant,
}

/// What a polled descriptor is.
#[derive(Clone, Copy)]
enum Source {
    Signal,
    Write(Stream),
    Orders(usize),
    Reports(usize),
    Words(usize),
    Exit(usize),
}

impl Watch<'_> {
    fn run(&mut self) -> Result<()> {
        while !self.is_done() {
            for source in self.wait()? {
                match source {
                    Source::Signal => self.forward(),
                    Source::Write(stream) => {
                        if !self.output.write(stream) {
                            self.close_output();
                        }
                    }
                    Source::Orders(host) => {
                        if let Some(orders) = &mut self.hosts[host].orders {
                            orders.write();
                        }
                    }
                    Source::Reports(host) => {
                        self.read_reports(host);
                    }
                    Source::Words(host) => {
                        self.read_words(host);
                    }
                    Source::Exit(host) => self.hosts[host].state = State::Ended(Instant::now() + DRAIN),
                }
            }
            self.keep_time()?;
        }
        Ok(())
    }

    fn is_done(&self) -> bool {
        let reaped = self.hosts.iter().all(|h| matches!(h.state, State::Reaped));
        let past_grace = self.kill_at.is_some_and(|at| Instant::now() >= at);
        reaped && (self.output.is_flushed() || past_grace)
    }

    fn wait(&mut self) -> Result<Vec<Source>> {
        let left =
            self.next_deadline().saturating_duration_since(Instant::now()) + Duration::from_micros(100);
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        let polled = self.polled();
        let mut fds: Vec<_> =
            polled.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        match poll(&mut fds, Some(&timeout)) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ok(Vec::new()),
            Err(e) => return Err(Error::os("cannot wait for the hosts", e)),
        }
        let ready = polled.iter().zip(&fds).filter(|(_, fd)| !fd.revents().is_empty());
        Ok(ready.map(|((source, ..), _)| *source).collect())
    }

    fn polled(&self) -> Vec<(Source, BorrowedFd<'_>, PollFlags)> {
        let mut polled = Vec::with_capacity(3 + 4 * self.hosts.len());
        if let Some(signals) = &self.signals {
            polled.push((Source::Signal, signals.reader(), PollFlags::IN));
        }
        polled.extend(self.output.waiting().map(|(stream, fd)| (Source::Write(stream), fd, PollFlags::OUT)));
        let full = self.is_full();
        for (i, host) in self.hosts.iter().enumerate() {
            if matches!(host.state, State::Running) {
                polled.push((Source::Exit(i), host.pidfd.as_fd(), PollFlags::IN));
            }
            if let Some(orders) = host.orders.as_ref().filter(|orders| !orders.is_empty()) {
                polled.push((Source::Orders(i), orders.fd(), PollFlags::OUT));
            }
            if let Some(reports) = host.reports.as_ref().filter(|_| !full) {
                polled.push((Source::Reports(i), reports.as_fd(), PollFlags::IN));
            }
            if let Some(words) = host.words.as_ref().filter(|_| !full) {
                polled.push((Source::Words(i), words.as_fd(), PollFlags::IN));
            }
        }
        polled
    }

    /// Whether what the hosts send has to wait.
    fn is_full(&self) -> bool {
        self.output.is_full(Stream::Stdout) || self.output.is_full(Stream::Stderr)
    }

    fn next_deadline(&self) -> Instant {
        let drains = self.hosts.iter().filter_map(|h| match h.state {
            State::Ended(until) => Some(until),
            _ => None,
        });
        drains
            .chain(self.kill_at.filter(|_| !self.killed))
            .chain(self.end_at)
            .fold(self.next_beat, Instant::min)
    }

    fn say(&mut self, order: &Order) {
        self.hosts.iter_mut().for_each(|host| host.say(order));
    }

    /// Passes on what somebody sent us.
    fn forward(&mut self) {
        while let Some(number) = self.signals.as_mut().and_then(Signals::next) {
            // The agents kill at a second SIGINT.
            if self.forwarded.is_some() && number == libc::SIGINT {
                self.kill_at = Some(Instant::now() + AGENT_GRACE);
            }
            self.forwarded.get_or_insert(number);
            self.say(&Order::Signal(number as u8));
            // What has not come to start a rank has nothing to save.
            if self.hosts.iter().all(|h| !h.greeted) {
                self.kill_at = Some(Instant::now());
            }
        }
    }

    /// Ends the job: a request now, force after a while.
    fn end(&mut self) {
        self.end_at = None;
        if self.kill_at.is_none() {
            let grace = if self.forwarded.is_some() { SIGNAL_GRACE } else { TERM_GRACE };
            self.kill_at = Some(Instant::now() + grace + AGENT_GRACE);
            self.say(&Order::End);
            // One that has no agent yet can't be asked.
            for host in self.hosts.iter().filter(|h| !h.greeted && !matches!(h.state, State::Reaped)) {
                let _ = kill_process_group(host.group, Signal::KILL);
            }
        }
    }

    /// Nobody reads us any more: there is nothing left to run for.
    fn close_output(&mut self) {
        if !self.output_closed && self.failure.is_none() {
            self.output_closed = true;
            self.end();
        }
    }

    /// Reads once what a remote shell says on standard error; tells whether there was something.
    fn read_words(&mut self, host: usize) -> bool {
        let Remote { name, words, lines, tail, .. } = &mut self.hosts[host];
        let Some(count) = read(words, &mut self.chunk) else { return false };
        let output = &mut self.output;
        let mut print = |line: &[u8]| {
            tail.push(line);
            if let Output::Print(sinks) = output {
                sinks.print(Stream::Stderr, &format!("[host {name}] "), line);
            }
        };
        match count {
            0 => lines.finish(&mut print),
            count => lines.feed(&self.chunk[..count], &mut print),
        }
        count > 0
    }

    /// Reads once what an agent reports; tells whether there was something.
    fn read_reports(&mut self, host: usize) -> bool {
        let remote = &mut self.hosts[host];
        let Some(count) = read(&mut remote.reports, &mut self.chunk) else { return false };
        remote.heard = Instant::now();
        remote.decoder.feed(&self.chunk[..count]);
        if !remote.greeted {
            match remote.decoder.find_banner() {
                Ok(true) => remote.greeted = true,
                Ok(false) => return count > 0,
                Err(_) => self.garbage(host),
            }
        }
        loop {
            match self.hosts[host].decoder.report() {
                Ok(Some(report)) => self.take(host, report),
                Ok(None) => break,
                Err(_) => {
                    self.garbage(host);
                    break;
                }
            }
        }
        count > 0
    }

    /// What a host sends is no report: nothing more is read of it, and it is lost.
    fn garbage(&mut self, host: usize) {
        let remote = &mut self.hosts[host];
        remote.reports = None;
        remote.tail.push(b"it sends what is no agent's: is the same version of tensorwire installed there?");
        let _ = kill_process_group(remote.group, Signal::KILL);
    }

    fn take(&mut self, host: usize, report: Report) {
        let ours = |rank: u32, of: &Remote| of.ranks.contains(&(rank as usize));
        match report {
            Report::Line { rank, stream, bytes } if ours(rank, &self.hosts[host]) => {
                let rank = rank as usize;
                if stream == Stream::Stderr {
                    self.ranks[rank].tail.push(&bytes);
                }
                if self.output.line(Line { rank, stream, bytes: &bytes }) == ControlFlow::Break(()) {
                    self.close_output();
                }
            }
            Report::Ended { rank, status, first } if ours(rank, &self.hosts[host]) => {
                let (rank, status) = (rank as usize, Report::status(status));
                self.ranks[rank].status = Some(status);
                if first && !status.success() {
                    self.failed(First { rank, status, host: None });
                } else if self.forwarded.is_some() {
                    self.end();
                }
            }
            Report::Failed { what, errno } => {
                let what = format!("host {}: {what}", self.hosts[host].name);
                self.refuse(match errno {
                    0 => Error::Config(what),
                    errno => Error::os(what, io::Error::from_raw_os_error(errno)),
                });
            }
            Report::Beat => {}
            Report::Line { .. } | Report::Ended { .. } => self.garbage(host),
        }
    }

    fn refuse(&mut self, why: Error) {
        if self.kill_at.is_none() {
            self.refused = Some(why);
            self.end();
        }
    }

    fn failed(&mut self, failure: First) {
        if self.output_closed || self.kill_at.is_some() && self.forwarded.is_none() {
            return;
        }
        let grade = blame(failure.status);
        if self.failure.as_ref().is_none_or(|known| self.end_at.is_some() && grade < blame(known.status)) {
            self.failure = Some(failure);
            match grade {
                2 => self.end_at = Some(Instant::now() + HOLD),
                _ => self.end(),
            }
        }
    }

    /// Does what is due.
    fn keep_time(&mut self) -> Result<()> {
        let now = Instant::now();
        if self.end_at.is_some_and(|at| now >= at) {
            self.end();
        }
        if now >= self.next_beat {
            self.next_beat = now + BEAT;
            self.say(&Order::Beat);
            for host in self.hosts.iter().filter(|h| matches!(h.state, State::Running)) {
                let patience = if host.greeted { SILENCE } else { GREETING };
                // While we don't read, it can't be heard.
                if now >= host.heard + patience && !self.is_full() {
                    let _ = kill_process_group(host.group, Signal::KILL);
                }
            }
        }
        if !self.killed && self.kill_at.is_some_and(|at| now >= at) {
            self.killed = true;
            for host in self.hosts.iter().filter(|h| !matches!(h.state, State::Reaped)) {
                let _ = kill_process_group(host.group, Signal::KILL);
            }
        }
        for i in 0..self.hosts.len() {
            let full = self.is_full() && self.kill_at.is_none();
            let host = &mut self.hosts[i];
            let State::Ended(until) = &mut host.state else { continue };
            if full {
                *until = now + DRAIN;
            }
            if (host.reports.is_some() || host.words.is_some()) && now < *until {
                continue;
            }
            self.reap(i)?;
        }
        Ok(())
    }

    /// The remote shell of a host has ended, and all that it has written has been read.
    fn reap(&mut self, host: usize) -> Result<()> {
        let remote = &mut self.hosts[host];
        // What it has left behind. Its id is still taken, so this can't meet a stranger.
        let _ = kill_process_group(remote.group, Signal::KILL);
        let status = remote.child.wait();
        let status =
            status.map_err(|e| Error::os(format!("cannot reap the remote shell of {}", remote.name), e))?;
        remote.state = State::Reaped;
        (remote.orders, remote.reports, remote.words) = (None, None, None);
        self.guard.release(remote.group.as_raw_nonzero().get());
        let Some(rank) = remote.ranks.clone().find(|r| self.ranks[*r].status.is_none()) else {
            return Ok(());
        };
        let (name, greeted) = (remote.name.clone(), remote.greeted);
        let said = std::mem::take(&mut remote.tail).into_lines();
        for r in remote.ranks.clone() {
            let unknown = ExitStatus::from_raw(libc::SIGKILL);
            self.ranks[r].status.get_or_insert(unknown);
        }
        if greeted {
            said.iter().for_each(|line| self.ranks[rank].tail.push(line.as_bytes()));
            // Ending with success is not what an agent does before its ranks have.
            let status = if status.success() { ExitStatus::from_raw(1 << 8) } else { status };
            self.failed(First { rank, status, host: Some(host) });
        } else {
            let said = said.last().map(|line| format!(": {line}")).unwrap_or_default();
            let what = format!("cannot be started on host {name}: its remote shell ended ({status}){said}");
            self.refuse(Error::Rendezvous { rank, world: self.ranks.len(), what });
        }
        Ok(())
    }

    fn into_outcome(mut self) -> Result<Outcome> {
        if let Some(why) = self.refused.take().filter(|_| !self.output_closed && self.forwarded.is_none()) {
            return Err(why);
        }
        let failure = self.failure.take().map(|First { rank, status, host }| Failure {
            rank,
            status,
            host: host.map(|host| self.hosts[host].name.clone()),
            stderr: std::mem::take(&mut self.ranks[rank].tail).into_lines(),
        });
        Ok(Outcome {
            statuses: self.ranks.iter().filter_map(|rank| rank.status).collect(),
            failure,
            forwarded: self.forwarded,
            output_closed: self.output_closed,
        })
    }
}

impl Drop for Watch<'_> {
    /// Leaves nothing behind when a host could not be started or watched.
    fn drop(&mut self) {
        for host in self.hosts.iter_mut().filter(|h| !matches!(h.state, State::Reaped)) {
            let _ = kill_process_group(host.group, Signal::KILL);
            let _ = host.child.wait();
        }
    }
}

impl Remote {
    fn new(host: &Host, ranks: Range<usize>, mut child: Child) -> io::Result<Remote> {
        let watched = (|| {
            let group = Pid::from_child(&child);
            let pidfd = pidfd_open(group, PidfdFlags::empty())?;
            let orders = child.stdin.take().map(OwnedFd::from);
            let (reports, words) =
                (child.stdout.take().map(OwnedFd::from), child.stderr.take().map(OwnedFd::from));
            for pipe in [&orders, &reports, &words].into_iter().flatten() {
                rustix::io::ioctl_fionbio(pipe, true)?;
            }
            Ok((group, pidfd, orders.map(Sink::new), reports, words))
        })();
        let (group, pidfd, orders, reports, words) = watched.inspect_err(|_: &io::Error| {
            let _ = child.kill();
            let _ = child.wait();
        })?;
        Ok(Remote {
            name: host.name.clone(),
            ranks,
            child,
            group,
            pidfd,
            orders,
            reports,
            words,
            lines: LineBuffer::default(),
            tail: Tail::default(),
            decoder: Decoder::default(),
            greeted: false,
            heard: Instant::now(),
            state: State::Running,
        })
    }

    fn say(&mut self, order: &Order) {
        if let Some(orders) = &mut self.orders {
            orders.push(&[&order.bytes()]);
        }
    }
}

/// Reads once, and closes what has ended: how many bytes, 0 at the end, `None` if there is nothing now.
fn read(pipe: &mut Option<OwnedFd>, chunk: &mut [u8]) -> Option<usize> {
    let count = match rustix::io::read(pipe.as_ref()?, chunk) {
        Ok(count) => count,
        Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => return None,
        Err(_) => 0,
    };
    if count == 0 {
        *pipe = None;
    }
    Some(count)
}
