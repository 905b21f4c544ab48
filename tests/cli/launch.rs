//! `tensorwire launch` as a person uses it.

mod support;

use std::io::Read;
use std::os::unix::process::CommandExt;
use std::process::Stdio;
use std::time::Instant;

use rustix::process::Signal;
use support::*;

/// `launch --ranks N -- sh -c SCRIPT`
fn script(ranks: usize, script: &str) -> Vec<String> {
    ["launch", "--ranks", &ranks.to_string(), "--", "sh", "-c", script].map(str::to_owned).into()
}

#[test]
fn each_line_has_its_rank_and_each_rank_its_place() {
    let output = run(script(
        3,
        "echo $TENSORWIRE_RANK of $TENSORWIRE_WORLD at $TENSORWIRE_STORE; printf 'to err' >&2",
    ));
    assert_eq!(output.status.code(), Some(0));
    let mut lines: Vec<_> = stdout(&output).lines().map(str::to_owned).collect();
    lines.sort();
    let store = lines[0].rsplit_once(" at ").unwrap().1.to_owned();
    assert!(store.starts_with("unix:"), "{store}");
    let want: Vec<_> = (0..3).map(|r| format!("[rank {r}] {r} of 3 at {store}")).collect();
    assert_eq!(lines, want);
    let mut lines: Vec<_> = stderr(&output).lines().map(str::to_owned).collect();
    lines.sort();
    assert_eq!(lines, ["[rank 0] to err", "[rank 1] to err", "[rank 2] to err"]);
}

#[test]
fn ranks_over_tcp_get_a_store_and_a_secret_that_nobody_else_sees() {
    let show = "echo $TENSORWIRE_TRANSPORT $TENSORWIRE_STORE $TENSORWIRE_SECRET; cat /proc/$PPID/cmdline /proc/$$/cmdline";
    let mut args = script(2, show);
    args.insert(1, "--transport=tcp".to_owned());
    let text = stdout(&run(args));
    let places: Vec<_> = text.lines().filter_map(|l| l.split_once("] tcp tcp:127.0.0.1:")).collect();
    assert_eq!(places.len(), 2, "{text}");
    assert_eq!(places[0].1, places[1].1, "all ranks get the same");
    let secret = places[0].1.split_once(' ').unwrap().1;
    assert!(secret.len() == 64 && secret.bytes().all(|b| b.is_ascii_hexdigit()), "{text}");
    assert_eq!(text.matches(secret).count(), 2, "no process has it among its arguments");
}

#[test]
fn ranks_over_tls_and_quic_get_certificates_of_their_own_that_nobody_else_sees() {
    let show = "for v in CA CERT KEY; do eval echo $v \\$TENSORWIRE_TLS_$v | tr '\\n' ' '; echo; done; \
                cat /proc/$PPID/cmdline /proc/$$/cmdline | tr '\\0' ' '; echo";
    for over in ["tls", "quic"] {
        let mut args = script(2, show);
        args.insert(1, format!("--transport={over}"));
        assert_certified(&stdout(&run(args)));
    }
}

/// Fails unless two ranks have each shown an authority, a certificate and a key, and nobody else has them.
#[track_caller]
fn assert_certified(text: &str) {
    let of = |rank: usize, what: &str| {
        let start = format!("[rank {rank}] {what} -----BEGIN ");
        text.lines()
            .find_map(|l| l.strip_prefix(&start))
            .unwrap_or_else(|| panic!("{what}: {text}"))
            .to_owned()
    };
    assert_eq!(of(0, "CA"), of(1, "CA"));
    assert_ne!(of(0, "CERT"), of(1, "CERT"));
    assert_ne!(of(0, "KEY"), of(1, "KEY"));
    assert_eq!(text.matches("PRIVATE KEY").count(), 2 * 2, "no process has one among its arguments: {text}");
}

#[test]
fn bytes_that_are_not_text_pass_through() {
    let output = run(script(1, r"printf 'a\377\0b\n'"));
    assert_eq!(output.stdout, b"[rank 0] a\xff\0b\n");
}

#[test]
fn the_status_is_that_of_the_rank_that_failed_first() {
    let start = Instant::now();
    let fails = "if [ $TENSORWIRE_RANK = 1 ]; then echo no luck >&2; exit 7; fi; exec sleep 60";
    let output = run(script(3, fails));
    assert!(start.elapsed() < SOON);
    assert_eq!(output.status.code(), Some(7));
    let err = stderr(&output);
    let lines: Vec<_> = err.lines().collect();
    assert_eq!(
        lines,
        ["[rank 1] no luck", "tensorwire: rank 1 exited with status 7: no luck (the other ranks were ended)"]
    );

    let killed = run(script(1, "kill -SEGV $$"));
    assert_eq!(killed.status.code(), Some(139));
    assert!(refused(&killed, 139).contains("rank 0 was killed by signal 11 (SIGSEGV)"));
}

#[test]
fn a_rank_killed_from_outside_ends_the_others() {
    let mark = format!("outside-{}", std::process::id());
    let mut child = tensorwire(script(3, "echo $$; exec sleep 60")).env("TEST_MARK", &mark).spawn().unwrap();
    let mut out = reader(&mut child);
    let victim = read_until(&mut out, |line| line.starts_with("[rank 2]"));
    let start = Instant::now();
    send(victim["[rank 2] ".len()..].parse().unwrap(), Signal::KILL);
    let output = child.wait_with_output().unwrap();
    assert!(start.elapsed() < SOON);
    let line = refused(&output, 137);
    assert!(line.contains("rank 2 was killed by signal 9 (SIGKILL)"), "{line}");
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn signals_reach_the_ranks_and_their_children() {
    for (signal, number) in [(Signal::INT, 2), (Signal::TERM, 15), (Signal::HUP, 1)] {
        let mark = format!("signal-{number}-{}", std::process::id());
        // A background child of a non-interactive shell ignores SIGINT, so the loop itself has to be told.
        let traps =
            "trap 'echo caught; exit 9' INT TERM HUP; sleep 60 & echo ready; while :; do sleep 0.05; done";
        let mut child = tensorwire(script(2, traps)).env("TEST_MARK", &mark).spawn().unwrap();
        let mut out = reader(&mut child);
        for _ in 0..2 {
            read_until(&mut out, |line| line.contains("ready"));
        }
        send(child.id(), signal);
        let mut rest = String::new();
        out.read_to_string(&mut rest).unwrap();
        let output = child.wait_with_output().unwrap();
        assert_eq!(rest.matches("caught").count(), 2, "{rest}");
        // Above our line, a shell may tell about its killed child.
        let err = stderr(&output);
        assert!(err.lines().last().unwrap().starts_with("tensorwire: interrupted by SIG"), "{err}");
        assert_eq!(output.status.code(), Some(9));
        eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
    }
}

#[test]
fn a_second_interrupt_kills_ranks_that_ignore_the_first() {
    let mark = format!("second-{}", std::process::id());
    let deaf = "trap 'echo heard' INT TERM; echo ready; while :; do sleep 0.05; done";
    let mut child = tensorwire(script(2, deaf)).env("TEST_MARK", &mark).spawn().unwrap();
    let mut out = reader(&mut child);
    for word in ["ready", "heard"] {
        for _ in 0..2 {
            read_until(&mut out, |line| line.contains(word));
        }
        send(child.id(), Signal::INT);
    }
    let start = Instant::now();
    let output = child.wait_with_output().unwrap();
    assert!(start.elapsed() < SOON);
    refused(&output, 137);
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn nothing_survives_a_launcher_that_is_killed() {
    let mark = format!("killed-{}", std::process::id());
    // The rank has a child of its own, in the background.
    let mut child = tensorwire(script(2, "sleep 60 & echo ready; sleep 61; true"))
        .env("TEST_MARK", &mark)
        .spawn()
        .unwrap();
    let mut out = reader(&mut child);
    for _ in 0..2 {
        read_until(&mut out, |line| line.contains("ready"));
    }
    eventually("the ranks' children haven't started", || marked("TEST_MARK", &mark).len() >= 1 + 1 + 2 * 3);
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn a_reader_that_leaves_ends_the_run_quietly() {
    let mark = format!("reader-{}", std::process::id());
    let endless = "while :; do echo line; sleep 0.01; done";
    let mut child = tensorwire(script(2, endless)).env("TEST_MARK", &mark).spawn().unwrap();
    let mut out = reader(&mut child);
    read_until(&mut out, |line| line.contains("line"));
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141));
    assert_eq!(stderr(&output), "");
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn a_reader_that_stands_still_does_not_keep_a_failure_from_ending_the_run() {
    let mark = format!("still-{}", std::process::id());
    let floods = r#"if [ $TENSORWIRE_RANK = 0 ]; then exec yes; fi; echo $$ >&2; exec sleep 60"#;
    let mut child = tensorwire(script(2, floods)).env("TEST_MARK", &mark).spawn().unwrap();
    // Standard output is not read until the run is over.
    let mut err = std::io::BufReader::new(child.stderr.take().unwrap());
    let line = read_until(&mut err, |line| line.starts_with("[rank 1]"));
    send(line["[rank 1] ".len()..].parse().unwrap(), Signal::KILL);
    let mut rest = String::new();
    err.read_to_string(&mut rest).unwrap();
    assert!(rest.contains("rank 1 was killed by signal 9"), "{rest}");
    assert_eq!(child.wait().unwrap().code(), Some(137));
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn a_slow_reader_gets_everything() {
    let mut child = tensorwire(script(2, "seq 100000")).spawn().unwrap();
    let mut all = String::new();
    let mut out = child.stdout.take().unwrap();
    // Longer than what is left behind may keep a pipe open, while the output is far more than pipes hold.
    std::thread::sleep(std::time::Duration::from_millis(700));
    out.read_to_string(&mut all).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    for rank in 0..2 {
        let prefix = format!("[rank {rank}] ");
        let numbers = all.lines().filter_map(|l| l.strip_prefix(&prefix)).map(|n| n.parse::<u32>().unwrap());
        assert!(numbers.eq(1..=100_000));
    }
}

#[test]
fn an_ignored_hangup_stays_ignored() {
    let mut command = tensorwire(script(1, "kill -HUP $PPID; kill -HUP $$; echo alive"));
    // SAFETY: signal is async-signal-safe.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGHUP, libc::SIG_IGN);
            Ok(())
        });
    }
    let output = command.output().unwrap();
    assert_eq!((output.status.code(), stdout(&output).as_str()), (Some(0), "[rank 0] alive\n"));
}

#[test]
fn bad_usage_is_one_line() {
    for (args, says) in [
        (&["launch", "--ranks", "0", "--", "true"][..], "at least one rank"),
        (&["launch", "--ranks", "x", "--", "true"], "not a number of ranks"),
        (&["launch", "--ranks", "99999999", "--", "true"], "at most"),
        (&["launch", "--ranks", "-1", "--", "true"], "--ranks"),
        (&["launch", "--ranks", "2"], "COMMAND"),
        (&["launch", "--", "true"], "--ranks <N>"),
        (&["launch", "--ranks", "2", "--", "/nonexistent/program"], "/nonexistent/program"),
        (&["launch", "--ranks", "2", "--", "/"], "'/': Permission denied"),
        (&["launch", "--rank", "2", "--", "true"], "--rank"),
        (&["lunch"], "lunch"),
        (&[], "infer, plan, topo, bench, simulate, launch"),
    ] {
        let line = refused(&run(args), 2);
        assert!(line.contains(says), "{args:?}: {line}");
    }
}

#[test]
fn version_and_help_are_on_standard_output() {
    let version = run(["--version"]);
    assert_eq!(stdout(&version), format!("tensorwire {}\n", env!("CARGO_PKG_VERSION")));
    for args in [
        &["--help"][..],
        &["launch", "--help"],
        &["infer", "--help"],
        &["plan", "--help"],
        &["bench", "--help"],
    ] {
        let help = run(args);
        assert_eq!(help.status.code(), Some(0));
        let text = stdout(&help);
        assert!(text.contains("Examples:") && text.contains("Usage:"), "{text}");
        assert!(!text.contains("__"), "hidden commands show: {text}");
    }
    // Nobody reads it.
    let status = tensorwire(["--help"]).stdout(Stdio::from(closed_pipe())).status().unwrap();
    assert_eq!(status.code(), Some(0));
}

fn closed_pipe() -> std::io::PipeWriter {
    std::io::pipe().unwrap().1
}
