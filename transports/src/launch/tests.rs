use std::fs::File;
use std::io::{Read, Seek};
use std::time::{Duration, Instant};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::process::{Pid, Signal, kill_process, test_kill_process};

use super::*;

/// Far above what any of these runs needs, far below what they would take if something didn't work.
const SOON: Duration = Duration::from_secs(10);

fn shell(ranks: usize, script: &str) -> Launcher<'static> {
    Launcher::new("/bin/sh", ranks, "unix:test").arg("-c").arg(script)
}

type Lines = Vec<(usize, Stream, String)>;

fn run(launcher: Launcher<'_>) -> (Outcome, Lines) {
    let mut lines = Lines::new();
    let outcome = launcher
        .on_line(|line| {
            lines.push((line.rank, line.stream, String::from_utf8_lossy(line.bytes).into_owned()));
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    lines.sort_by_key(|(rank, stream, _)| (*rank, *stream as u8));
    (outcome, lines)
}

fn texts(lines: &Lines) -> Vec<&str> {
    lines.iter().map(|(.., text)| text.as_str()).collect()
}

fn gone(pid: &str) -> bool {
    let pid = Pid::from_raw(pid.parse().unwrap()).unwrap();
    let start = Instant::now();
    while test_kill_process(pid).is_ok() {
        // A process that was killed is there until its new parent has reaped it.
        let stat =
            std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
        if stat.contains(") Z ") {
            return true;
        }
        if start.elapsed() > SOON {
            return false;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    true
}

/// The processors that each of so many ranks may use.
fn allowed(ranks: usize, bind: &str) -> Vec<Processors> {
    let script = "sed -n 's/^Cpus_allowed_list:[[:space:]]*//p' /proc/self/status";
    let (outcome, lines) = run(shell(ranks, script).env(BIND_VAR, bind));
    assert_eq!(outcome.exit_code(), 0);
    texts(&lines).into_iter().map(|text| text.parse().unwrap()).collect()
}

#[test]
fn ranks_share_the_processors_out_unless_told_otherwise() {
    let all = Processors::allowed();
    for ranks in [1, 2, 3] {
        let each = shares(&all, ranks).unwrap_or(vec![all.clone(); ranks]);
        assert_eq!(allowed(ranks, "auto"), each);
        assert_eq!(allowed(ranks, ""), each);
        assert_eq!(allowed(ranks, "none"), vec![all.clone(); ranks]);
    }
    let refused = shell(1, "true").env(BIND_VAR, "core").run().unwrap_err();
    assert!(refused.to_string().contains("TENSORWIRE_BIND is 'core': use auto or none"), "{refused}");
}

#[test]
fn each_rank_finds_its_place() {
    let launcher =
        shell(3, "echo $TENSORWIRE_RANK $TENSORWIRE_WORLD $TENSORWIRE_LOCAL_WORLD $TENSORWIRE_STORE $A $B")
            .env("A", "all")
            .rank_env(1, "B", "one");
    let (outcome, lines) = run(launcher);
    assert_eq!(texts(&lines), ["0 3 3 unix:test all", "1 3 3 unix:test all one", "2 3 3 unix:test all"]);
    assert_eq!(outcome.statuses.len(), 3);
    assert!(outcome.statuses.iter().all(ExitStatus::success));
    assert!(outcome.failure.is_none() && outcome.forwarded.is_none() && !outcome.output_closed);
    assert_eq!(outcome.exit_code(), 0);
}

#[test]
fn a_rank_leads_its_group_and_reads_nothing() {
    let (outcome, lines) = run(shell(1, "cat; echo $$; cut -d' ' -f5 /proc/$$/stat"));
    assert_eq!(outcome.exit_code(), 0);
    assert_eq!(lines.len(), 2);
    assert_eq!(lines[0].2, lines[1].2);
}

#[test]
fn odd_output_arrives() {
    let script = r#"printf 'no newline'; printf 'err\n\nx' >&2; printf 'b\377d' >&2"#;
    let (_, lines) = run(shell(1, script));
    let want = [
        (0, Stream::Stdout, "no newline".to_owned()),
        (0, Stream::Stderr, "err".to_owned()),
        (0, Stream::Stderr, String::new()),
        (0, Stream::Stderr, "xb\u{fffd}d".to_owned()),
    ];
    assert_eq!(lines, want);

    let (_, lines) = run(shell(2, "head -c 300000 /dev/zero | tr '\\0' a; echo; echo b"));
    for rank in 0..2 {
        let mine: Vec<_> = lines.iter().filter(|l| l.0 == rank).map(|l| l.2.as_str()).collect();
        let (last, long) = mine.split_last().unwrap();
        assert_eq!(*last, "b");
        assert_eq!(long.concat(), "a".repeat(300_000));
    }
}

#[test]
fn a_failure_ends_the_others_and_is_named() {
    let script = r#"
        if [ $TENSORWIRE_RANK = 1 ]; then
            echo 'some context' >&2; echo 'cannot open the model' >&2; echo >&2
            echo 'note: run with more' >&2; exit 3
        fi
        exec sleep 60"#;
    let start = Instant::now();
    let (outcome, _) = run(shell(3, script));
    assert!(start.elapsed() < SOON);
    let failure = outcome.failure.as_ref().unwrap();
    assert_eq!(failure.to_string(), "rank 1 exited with status 3: cannot open the model");
    assert_eq!(failure.stderr, ["some context", "cannot open the model", "note: run with more"]);
    assert_eq!(outcome.exit_code(), 3);
    assert_eq!(outcome.statuses[1].code(), Some(3));
    for rank in [0, 2] {
        assert_eq!(outcome.statuses[rank].signal(), Some(libc::SIGTERM));
    }
}

#[test]
fn a_rank_that_ignores_sigterm_is_killed() {
    // The failing rank waits until the other's trap is set.
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        if [ $TENSORWIRE_RANK = 0 ]; then while ! [ -e "$DIR/ready" ]; do sleep 0.01; done; kill -9 $$; fi
        trap '' TERM; touch "$DIR/ready"; while :; do sleep 1; done"#;
    let start = Instant::now();
    let (outcome, _) = run(shell(2, script).env("DIR", dir.path()));
    assert!(start.elapsed() < SOON);
    assert_eq!(outcome.statuses[1].signal(), Some(libc::SIGKILL));
    let failure = outcome.failure.as_ref().unwrap();
    assert_eq!(failure.to_string(), "rank 0 was killed by signal 9 (SIGKILL)");
    assert_eq!(outcome.exit_code(), 137);
}

#[test]
fn what_a_rank_leaves_behind_is_ended() {
    // What is left to say is said when the rank has ended, which closes the pipe.
    let dir = tempfile::tempdir().unwrap();
    let script = r#"
        sleep 60 & echo $!
        pipe="$DIR/$TENSORWIRE_RANK"; mkfifo "$pipe"
        (read none < "$pipe"; echo late) &
        exec 3> "$pipe"; exit 0"#;
    let start = Instant::now();
    let (outcome, lines) = run(shell(2, script).env("DIR", dir.path()));
    assert!(start.elapsed() < SOON);
    assert_eq!(outcome.exit_code(), 0);
    assert_eq!(lines.iter().filter(|l| l.2 == "late").count(), 2);
    for pid in lines.iter().filter(|l| l.2 != "late") {
        assert!(gone(&pid.2));
    }
}

#[test]
fn a_daemon_that_keeps_the_pipe_open_does_not_hold_us_up() {
    let start = Instant::now();
    let (outcome, lines) = run(shell(1, "setsid sleep 60 & echo $!; sleep 0.2; exit 4"));
    let pid = Pid::from_raw(lines[0].2.parse().unwrap()).unwrap();
    kill_process(pid, Signal::KILL).unwrap();
    assert!(start.elapsed() < SOON);
    assert_eq!(outcome.exit_code(), 4);
}

#[test]
fn a_daemon_that_never_stops_writing_does_not_hold_us_up() {
    let start = Instant::now();
    let mut pid = None;
    let outcome = shell(1, "setsid yes & echo $!; exec sleep 0.2")
        .on_line(|line| {
            pid = pid.or_else(|| std::str::from_utf8(line.bytes).ok()?.parse().ok());
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    // Its pipe is closed by now, which ends it, or is about to.
    let _ = kill_process(Pid::from_raw(pid.unwrap()).unwrap(), Signal::KILL);
    assert!(start.elapsed() < SOON);
    assert_eq!(outcome.exit_code(), 0);
}

#[test]
fn descriptors_reach_the_rank_they_are_for() {
    let memfd = memfd_create("test", MemfdFlags::CLOEXEC).unwrap();
    let mut file = File::from(memfd);
    let script = r#"
        if [ $TENSORWIRE_RANK = 1 ]; then echo hello > /proc/self/fd/$OUT_FD; else echo "[$OUT_FD]"; fi
        ls -l /proc/self/fd | grep -c memfd:test || true"#;
    let (outcome, lines) = run(shell(2, script).inherit(1, "OUT_FD", file.try_clone().unwrap()));
    assert_eq!(outcome.exit_code(), 0);
    assert_eq!(texts(&lines), ["[]", "0", "1"]);
    let mut text = String::new();
    file.rewind().unwrap();
    file.read_to_string(&mut text).unwrap();
    assert_eq!(text, "hello\n");
}

#[test]
fn a_reader_that_has_enough_ends_the_run() {
    let start = Instant::now();
    let outcome = shell(2, "echo first; exec sleep 60").on_line(|_| ControlFlow::Break(())).run().unwrap();
    assert!(start.elapsed() < SOON);
    assert!(outcome.output_closed && outcome.failure.is_none());
    assert_eq!(outcome.exit_code(), 141);
}

#[test]
fn signals_are_passed_on_to_the_groups() {
    // The ranks tell when they are ready; the handlers are in place before any rank runs.
    let script = r#"trap 'echo got TERM; exit 7' TERM; echo ready; while :; do sleep 0.05; done"#;
    let (mut ready, mut got) = (0, 0);
    let outcome = shell(2, script)
        .forward_signals()
        .on_line(|line| {
            ready += usize::from(line.bytes == b"ready");
            got += usize::from(line.bytes == b"got TERM");
            if line.bytes == b"ready" && ready == 2 {
                kill_process(rustix::process::getpid(), Signal::TERM).unwrap();
            }
            ControlFlow::Continue(())
        })
        .run()
        .unwrap();
    assert_eq!(got, 2);
    assert_eq!(outcome.forwarded, Some(libc::SIGTERM));
    assert_eq!(outcome.exit_code(), 7);
}

#[test]
fn what_cannot_start_is_an_error() {
    let missing = Launcher::new("/nonexistent/program", 2, "unix:test").run().unwrap_err();
    assert!(matches!(&missing, Error::Os { source, .. } if source.kind() == io::ErrorKind::NotFound));
    assert!(missing.to_string().contains("rank 0, '/nonexistent/program'"), "{missing}");
    assert!(matches!(shell(0, "true").run(), Err(Error::InvalidArgument(_))));
    let beyond = shell(2, "true").rank_env(2, "X", "1").run().unwrap_err();
    assert!(beyond.to_string().contains("X is for rank 2"), "{beyond}");
}

#[test]
fn more_ranks_than_processors_run() {
    let (outcome, lines) = run(shell(24, "echo $TENSORWIRE_RANK"));
    assert_eq!(outcome.exit_code(), 0);
    let mut ranks: Vec<usize> = lines.iter().map(|l| l.2.parse().unwrap()).collect();
    ranks.sort_unstable();
    assert_eq!(ranks, (0..24).collect::<Vec<_>>());
}
