//! What a launcher starts on each host: it starts the host's ranks and watches over them, and ends them when its launcher
//! asks for it, hangs up or falls silent.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tensorwire_core::{Error, Result};

use super::Launcher;
use super::supervise::supervise;
use super::wire::{BANNER, BEAT, Decoder, Job, Order, Report, SILENCE};

/// Whether a variable belongs to a host or a login, and so doesn't travel to others.
pub fn is_of_a_host(name: &OsStr) -> bool {
    const NAMES: [&str; 14] = [
        "HOME",
        "USER",
        "LOGNAME",
        "SHELL",
        "HOSTNAME",
        "PWD",
        "OLDPWD",
        "SHLVL",
        "_",
        "TMPDIR",
        "MAIL",
        "DISPLAY",
        "XAUTHORITY",
        "KRB5CCNAME",
    ];
    const FAMILIES: [&str; 3] = ["SSH_", "XDG_", "DBUS_"];
    let Some(name) = name.to_str() else { return false };
    NAMES.contains(&name) || FAMILIES.iter().any(|family| name.starts_with(family))
}

/// Runs the ranks that a launcher on another host asks for over this process's standard streams: what a hidden command
/// of a program does whose [`Launcher::on_hosts`] names it. Stays until they have ended.
///
/// # Errors
/// [`Error::Os`] if the launcher can't be heard. That ranks fail or can't be started is the launcher's to say.
pub fn agent() -> Result<()> {
    let unheard = |e| Error::os("talking to the launcher", e);
    let greet = || {
        let mut out = io::stdout().lock();
        out.write_all(BANNER)?;
        out.flush()
    };
    greet().map_err(unheard)?;
    // This process's alone: nobody is disturbed.
    rustix::io::ioctl_fionbio(io::stdin(), true).map_err(|e| unheard(e.into()))?;
    let mut control = Control::new();
    let Some(job) = control.wait_for_job().map_err(unheard)? else { return Ok(()) };
    if let Err(error) = run(&job, control) {
        let (what, errno) = match &error {
            Error::Os { what, source } => (what.clone(), source.raw_os_error().unwrap_or(0)),
            other => (other.to_string(), 0),
        };
        let mut out = io::stdout().lock();
        out.write_all(&Report::Failed { what, errno }.bytes()).and_then(|()| out.flush()).map_err(unheard)?;
    }
    Ok(())
}

fn run(job: &Job, control: Control) -> Result<()> {
    std::env::set_current_dir(&job.directory).map_err(|e| {
        Error::os(format!("cannot go to the working directory '{}'", job.directory.to_string_lossy()), e)
    })?;
    let launcher = Launcher::of_job(job);
    supervise(&launcher, job.ranks as usize, true, None, Some(control)).map(drop)
}

/// What a launcher asks for.
pub(super) enum Heard {
    Signal(u8),
    End,
    /// It has hung up, fallen silent, or says what makes no sense.
    Lost,
}

/// The launcher's side of an agent's standard input.
pub(super) struct Control {
    decoder: Decoder,
    heard: Instant,
    next_beat: Instant,
    lost: bool,
}

impl Control {
    fn new() -> Control {
        let now = Instant::now();
        Control { decoder: Decoder::default(), heard: now, next_beat: now + BEAT, lost: false }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'static> {
        rustix::stdio::stdin()
    }

    /// Whether there is nothing more to come.
    pub(super) fn is_lost(&self) -> bool {
        self.lost
    }

    /// When something must be done even if nothing comes.
    pub(super) fn due(&self) -> Option<Instant> {
        (!self.lost).then(|| self.next_beat.min(self.heard + SILENCE))
    }

    /// Whether it is time to say that this side is there.
    pub(super) fn beat(&mut self, now: Instant) -> bool {
        let due = !self.lost && now >= self.next_beat;
        if due {
            self.next_beat = now + BEAT;
        }
        due
    }

    pub(super) fn is_overdue(&self, now: Instant) -> bool {
        !self.lost && now >= self.heard + SILENCE
    }

    /// What has come since the last time.
    pub(super) fn hear(&mut self) -> Vec<Heard> {
        let mut heard = Vec::new();
        while let Some(order) = self.next_order() {
            match order {
                Some(Order::Signal(number)) => heard.push(Heard::Signal(number)),
                Some(Order::End) => heard.push(Heard::End),
                Some(Order::Beat) => {}
                // A second job is none.
                Some(Order::Start(_)) | None => {
                    self.lost = true;
                    heard.push(Heard::Lost);
                    break;
                }
            }
        }
        heard
    }

    /// The next order; `Some(None)` if there will be none any more, `None` if there is none yet.
    fn next_order(&mut self) -> Option<Option<Order>> {
        let mut chunk = [0; 16 << 10];
        loop {
            match self.decoder.order() {
                Ok(Some(order)) => return Some(Some(order)),
                Err(_) => return Some(None),
                Ok(None) => {}
            }
            match rustix::io::read(self.fd(), &mut chunk) {
                Ok(0) => return Some(None),
                Ok(n) => {
                    self.heard = Instant::now();
                    self.decoder.feed(&chunk[..n]);
                }
                Err(rustix::io::Errno::INTR) => {}
                Err(rustix::io::Errno::AGAIN) => return self.is_overdue(Instant::now()).then_some(None),
                Err(_) => return Some(None),
            }
        }
    }

    /// The first thing a launcher says; `None` if it hangs up instead.
    fn wait_for_job(&mut self) -> io::Result<Option<Job>> {
        loop {
            match self.next_order() {
                Some(Some(Order::Start(job))) => return Ok(Some(*job)),
                Some(Some(Order::Beat)) => {}
                Some(_) => return Ok(None),
                None => {
                    let left = Timespec { tv_sec: SILENCE.as_secs() as i64, tv_nsec: 0 };
                    match poll(&mut [PollFd::new(&self.fd().as_fd(), PollFlags::IN)], Some(&left)) {
                        Ok(_) | Err(rustix::io::Errno::INTR) => {}
                        Err(e) => return Err(e.into()),
                    }
                }
            }
        }
    }
}
