//! What the tests of the command line share.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Far above what anything here needs, far below what it would take if something hung.
pub(crate) const SOON: Duration = Duration::from_secs(20);

/// Ends the test program when something hangs after all: what it has started then sees its output closed.
fn limit_time() {
    static STARTED: std::sync::Once = std::sync::Once::new();
    STARTED.call_once(|| {
        std::thread::spawn(|| {
            std::thread::sleep(Duration::from_secs(300));
            eprintln!("a test of the command line hangs");
            std::process::abort();
        });
    });
}

/// The binary, with standard streams that can be read.
pub(crate) fn tensorwire<I>(args: I) -> Command
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    limit_time();
    let mut command = Command::new(env!("CARGO_BIN_EXE_tensorwire"));
    command.args(args).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    // Under nohup, or in a shell's background, signals come ignored, and the launcher leaves those so.
    let heed = || {
        for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
            // SAFETY: 1. `signal` may be called between fork and exec; 2. the default action is no handler.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
        Ok(())
    };
    // SAFETY: `heed` makes no call but `signal`, and allocates nothing.
    unsafe { command.pre_exec(heed) };
    command
}

/// Runs it to its end.
pub(crate) fn run<I>(args: I) -> Output
where
    I: IntoIterator,
    I::Item: AsRef<OsStr>,
{
    tensorwire(args).output().unwrap()
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Asserts that a run failed as the contract says, with nothing on standard output, and returns its line.
#[track_caller]
pub(crate) fn refused(output: &Output, status: i32) -> String {
    let line = stderr(output);
    assert_eq!(output.status.code(), Some(status), "{line}");
    assert!(line.starts_with("tensorwire: ") && line.ends_with('\n'), "{line:?}");
    assert_eq!(line.lines().count(), 1, "{line}");
    assert!(!line.contains("panicked"), "{line}");
    assert_eq!(stdout(output), "");
    line
}

/// Reads lines of a child's standard output until one satisfies `found`; returns that line.
pub(crate) fn read_until(out: &mut impl BufRead, found: impl Fn(&str) -> bool) -> String {
    loop {
        let mut line = String::new();
        assert_ne!(out.read_line(&mut line).unwrap(), 0, "the output ended too early");
        if found(&line) {
            return line.trim_end().to_owned();
        }
    }
}

pub(crate) fn reader(child: &mut Child) -> BufReader<std::process::ChildStdout> {
    BufReader::new(child.stdout.take().unwrap())
}

/// Waits until `done`, or fails.
#[track_caller]
pub(crate) fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < SOON, "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// Whether the process exists and isn't merely waiting to be reaped.
pub(crate) fn is_running(pid: u32) -> bool {
    std::fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X'])))
}

/// The processes that have `name` set to `value` in their environment: what a command started, and what that
/// started in turn.
pub(crate) fn marked(name: &str, value: &str) -> Vec<u32> {
    let mark = format!("{name}={value}");
    let entries = std::fs::read_dir("/proc").unwrap().flatten();
    let pids = entries.filter_map(|e| e.file_name().to_str()?.parse::<u32>().ok());
    let has_mark = |pid: &u32| {
        std::fs::read(Path::new("/proc").join(pid.to_string()).join("environ"))
            .is_ok_and(|environ| environ.split(|b| *b == 0).any(|var| var == mark.as_bytes()))
    };
    pids.filter(|&pid| is_running(pid)).filter(has_mark).collect()
}

pub(crate) fn send(pid: u32, signal: rustix::process::Signal) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    rustix::process::kill_process(pid, signal).unwrap();
}
