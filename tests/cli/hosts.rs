//! `tensorwire launch --hostfile`: ranks on other hosts. The remote shell is a script that stands for ssh: it runs the
//! command here. What crosses a network is in `network.rs`.

mod support;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::time::Instant;

use rustix::process::Signal;
use support::*;

/// A directory with a host file and a script in the place of ssh.
struct Hosts {
    dir: tempfile::TempDir,
}

impl Hosts {
    /// Two hosts of two slots each, whose commands the script runs here.
    fn two() -> Hosts {
        // Not names of this host, so that they are reached over the remote shell; with an address, so that they are found.
        Hosts::new(
            "127.0.0.2 slots=2\n127.0.0.3 slots=2 # the other\n",
            "echo \"Welcome to $1\"\nTEST_HOST=$1\nexport TEST_HOST\nshift\nexec sh -c \"$*\"",
        )
    }

    fn new(hosts: &str, shell: &str) -> Hosts {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("hosts"), hosts).unwrap();
        let script = dir.path().join("remote-shell");
        std::fs::write(&script, format!("#!/bin/sh\n{shell}\n")).unwrap();
        std::fs::set_permissions(&script, std::fs::Permissions::from_mode(0o755)).unwrap();
        Hosts { dir }
    }

    fn path(&self, name: &str) -> String {
        self.dir.path().join(name).to_str().unwrap().to_owned()
    }

    /// `launch --hostfile ... -- COMMAND`
    fn launch(&self, ranks: usize, command: &[&str]) -> Command {
        let (hosts, shell) = (self.path("hosts"), self.path("remote-shell"));
        let head = ["launch", "--hostfile", &hosts, "--ssh", &shell, "--ranks", &ranks.to_string(), "--"]
            .map(str::to_owned);
        tensorwire(head.into_iter().chain(command.iter().map(|c| (*c).to_owned())))
    }

    fn script(&self, ranks: usize, script: &str) -> Output {
        self.launch(ranks, &["sh", "-c", script]).output().unwrap()
    }
}

fn sorted(text: &str) -> Vec<String> {
    let mut lines: Vec<_> = text.lines().map(str::to_owned).collect();
    lines.sort();
    lines
}

#[test]
fn each_rank_has_its_place_its_environment_and_its_directory() {
    let hosts = Hosts::two();
    let show = "echo $TENSORWIRE_RANK/$TENSORWIRE_WORLD $TENSORWIRE_LOCAL_RANK/$TENSORWIRE_LOCAL_WORLD on $TEST_HOST \
                $TENSORWIRE_TRANSPORT \"$ODD\" in $PWD; printf 'to err' >&2";
    let mut command = hosts.launch(3, &["sh", "-c", show]);
    let output = command.env("ODD", "a 'b\"\n$c").current_dir(hosts.dir.path()).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let place = hosts.dir.path().display();
    let line = |rank, local, host| {
        [
            format!("[rank {rank}] {rank}/3 {local} on {host} tcp a 'b\""),
            format!("[rank {rank}] $c in {place}"),
        ]
    };
    let mut want =
        [line(0, "0/2", "127.0.0.2"), line(1, "1/2", "127.0.0.2"), line(2, "0/1", "127.0.0.3")].concat();
    want.sort();
    assert_eq!(sorted(&stdout(&output)), want, "what a login script prints is not among it");
    assert_eq!(sorted(&stderr(&output)), ["[rank 0] to err", "[rank 1] to err", "[rank 2] to err"]);
}

#[test]
fn the_secret_is_in_no_process_title_and_no_log() {
    let hosts = Hosts::two();
    let secret = "0123456789abcdef".repeat(4);
    let mut command = hosts.launch(2, &["sh", "-c", "echo here; exec sleep 60"]);
    let mut child = command.env("TENSORWIRE_SECRET", &secret).spawn().unwrap();
    let mut out = reader(&mut child);
    read_until(&mut out, |line| line.contains("here"));
    for entry in std::fs::read_dir("/proc").unwrap().flatten() {
        for file in ["cmdline", "comm"] {
            let text = std::fs::read(entry.path().join(file)).unwrap_or_default();
            let text = String::from_utf8_lossy(&text).into_owned();
            assert!(!text.contains(&secret), "{} {text}", entry.path().display());
        }
    }
    send(child.id(), Signal::TERM);
    let output = child.wait_with_output().unwrap();
    assert!(!stderr(&output).contains(&secret));
}

#[test]
fn a_rank_that_fails_ends_those_on_other_hosts_and_gives_its_status() {
    let hosts = Hosts::two();
    let mark = format!("hosts-{}", std::process::id());
    let start = Instant::now();
    let fails =
        "if [ $TENSORWIRE_RANK = 3 ]; then echo no luck >&2; exit 7; fi; trap '' TERM; sleep 60 & sleep 61";
    let output = hosts.launch(4, &["sh", "-c", fails]).env("TEST_MARK", &mark).output().unwrap();
    assert!(start.elapsed() < SOON);
    assert_eq!(output.status.code(), Some(7));
    let err = stderr(&output);
    assert!(
        err.ends_with("tensorwire: rank 3 exited with status 7: no luck (the other ranks were ended)\n"),
        "{err}"
    );
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());

    // The cause is named, not the one that noticed it on another host.
    let cause =
        "case $TENSORWIRE_RANK in 0) kill -KILL $$;; 2) echo lost >&2; exit 75;; *) exec sleep 60;; esac";
    let output = hosts.script(4, cause);
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    assert!(stderr(&output).contains("rank 0 was killed by signal 9 (SIGKILL)"), "{}", stderr(&output));
}

fn start(hosts: &Hosts, mark: &str, script: &str) -> (Child, std::io::BufReader<std::process::ChildStdout>) {
    let mut child = hosts.launch(4, &["sh", "-c", script]).env("TEST_MARK", mark).spawn().unwrap();
    let mut out = reader(&mut child);
    for _ in 0..4 {
        read_until(&mut out, |line| line.contains("ready"));
    }
    (child, out)
}

/// The agents among a test's processes.
fn agents(mark: &str) -> Vec<u32> {
    let says =
        |pid: &u32, file: &str| std::fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    // Not their guards, which have another name.
    let is_agent =
        |pid: &u32| says(pid, "cmdline").ends_with("__agent\0") && says(pid, "comm") == "tensorwire\n";
    marked("TEST_MARK", mark).into_iter().filter(is_agent).collect()
}

#[test]
fn signals_end_all_ranks_everywhere() {
    let hosts = Hosts::two();
    for (signal, name) in [(Signal::INT, "SIGINT"), (Signal::TERM, "SIGTERM")] {
        let mark = format!("signal-{name}-{}", std::process::id());
        let (child, _out) = start(&hosts, &mark, "echo ready; exec sleep 60");
        send(child.id(), signal);
        let begun = Instant::now();
        let output = child.wait_with_output().unwrap();
        assert!(begun.elapsed() < SOON);
        assert_eq!(output.status.code(), Some(128 + signal.as_raw()), "{}", stderr(&output));
        assert!(stderr(&output).contains(&format!("interrupted by {name}")), "{}", stderr(&output));
        eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
    }
    // Ranks that don't heed it are killed by a second one.
    let mark = format!("twice-{}", std::process::id());
    let deaf = "trap 'echo heard' INT; echo ready; while :; do sleep 0.05; done";
    let (child, mut out) = start(&hosts, &mark, deaf);
    send(child.id(), Signal::INT);
    for _ in 0..4 {
        read_until(&mut out, |line| line.contains("heard"));
    }
    send(child.id(), Signal::INT);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn nothing_survives_a_launcher_an_agent_or_a_remote_shell_that_is_killed() {
    let hosts = Hosts::two();
    let stays = "sleep 60 & echo ready; sleep 61; true";
    let mark = format!("launcher-{}", std::process::id());
    let (mut child, _out) = start(&hosts, &mark, stays);
    child.kill().unwrap();
    child.wait().unwrap();
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());

    let mark = format!("agent-{}", std::process::id());
    let (child, _out) = start(&hosts, &mark, stays);
    let killed = agents(&mark)[0];
    send(killed, Signal::KILL);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(137), "{}", stderr(&output));
    assert!(stderr(&output).contains("was lost with host 127.0.0."), "{}", stderr(&output));
    eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
}

#[test]
fn agents_whose_connection_ends_end_their_ranks() {
    // This shell's `cat`s stay between the launcher and the agent. Killing them closes the agent's input, its output
    // or both; with its input alone, what it says still reaches the launcher.
    let hosts =
        Hosts::new("127.0.0.2 slots=2\n127.0.0.3 slots=2\n", "shift\ncat -- | setsid \"$@\" | cat -u");
    let (input, output): (&[u8], &[u8]) = (b"cat\0--\0", b"cat\0-u\0");
    for (case, cut) in [&[input][..], &[output], &[input, output]].into_iter().enumerate() {
        let mark = format!("cut-{case}-{}", std::process::id());
        let (child, _out) = start(&hosts, &mark, "sleep 60 & echo ready; sleep 61; true");
        assert_eq!(agents(&mark).len(), 2);
        let is_cut = |pid: &u32| {
            std::fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| cut.contains(&&line[..]))
        };
        let cats: Vec<u32> = marked("TEST_MARK", &mark).into_iter().filter(is_cut).collect();
        assert_eq!(cats.len(), 2 * cut.len());
        cats.into_iter().for_each(|pid| send(pid, Signal::KILL));
        let output = child.wait_with_output().unwrap();
        assert_ne!(output.status.code(), Some(0), "case {case}");
        assert!(stderr(&output).contains("was lost with host"), "case {case}: {}", stderr(&output));
        eventually("a process is left", || marked("TEST_MARK", &mark).is_empty());
    }
}

#[test]
fn what_cannot_be_started_is_one_line() {
    let hosts = Hosts::two();
    let missing = hosts.launch(3, &["./no-such-program"]).output().unwrap();
    // Both hosts try; either may be the first to say so.
    let line = refused(&missing, 2);
    assert!(
        ["0", "2"].iter().any(
            |rank| line.contains(&format!("cannot start rank {rank}, './no-such-program': No such file"))
        ),
        "{line}"
    );

    let refuses = Hosts::new("127.0.0.2\n", "echo 'Permission denied (publickey).' >&2\nexit 255");
    let output = refuses.launch(1, &["true"]).output().unwrap();
    let err = stderr(&output);
    assert_eq!(output.status.code(), Some(1));
    assert!(err.contains("[host 127.0.0.2] Permission denied"), "{err}");
    assert!(err.contains("rank 0 of 1: cannot be started on host 127.0.0.2"), "{err}");
    assert!(err.ends_with("(exit status: 255): Permission denied (publickey).\n"), "{err}");

    let chatty = Hosts::new("127.0.0.2\n", "exec yes");
    let output = chatty.launch(1, &["true"]).output().unwrap();
    assert!(refused(&output, 1).contains("is the same version of tensorwire installed there?"));

    for (text, says) in [
        ("a slots=0\n", "line 1 of the host file"),
        ("\n-oProxyCommand=x\n", "line 2 of the host file"),
        ("# none\n", "names no host"),
        ("127.0.0.2\n", "slots for 1"),
    ] {
        let hosts = Hosts::new(text, "false");
        let line = refused(&hosts.launch(2, &["true"]).output().unwrap(), 2);
        assert!(line.contains(says), "{line}");
    }
    for (args, says) in [
        (
            &["launch", "--hostfile", "/no/such/file", "-n", "1", "--", "true"][..],
            "/no/such/file: No such file",
        ),
        (&["launch", "--ssh", "rsh", "-n", "1", "--", "true"], "--hostfile"),
        (
            &["launch", "--hostfile", "/dev/null", "--transport", "shm", "-n", "1", "--", "true"],
            "names no host",
        ),
    ] {
        let line = refused(&run(args), 2);
        assert!(line.contains(says), "{line}");
    }
}

#[test]
fn ranks_may_meet_in_a_directory_or_where_rank_0_serves() {
    let hosts = Hosts::two();
    let bench = env!("CARGO_BIN_EXE_tensorwire");
    let directory = format!("file:{}", hosts.path("meet"));
    // Below the ports that systems give to connections.
    let begin = 29_100 + (std::process::id() % 3000) as u16;
    let is_free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    let free = (begin..32_767).find(is_free).unwrap();
    for store in [directory, format!("tcp:127.0.0.1:{free}")] {
        let (file, shell) = (hosts.path("hosts"), hosts.path("remote-shell"));
        let args =
            ["launch", "--hostfile", &file, "--ssh", &shell, "--store", &store, "-n", "3", "--", bench];
        let output = run(args.into_iter().chain(["bench", "--bytes", "4K", "--batches", "2", "--json"]));
        assert_eq!(output.status.code(), Some(0), "{store}: {}", stderr(&output));
        let text = stdout(&output);
        assert!(text.starts_with("[rank 0] {") && text.contains("\"correct\":true"), "{text}");
        assert!(text.contains("\"transport\":\"tcp\",\"ranks\":3"), "{text}");
    }
    assert_eq!(std::fs::read_dir(hosts.path("meet")).unwrap().count(), 0, "all is cleaned up");
}

/// A program that is called from a directory which the other hosts don't have.
#[test]
fn a_directory_that_is_not_there_is_named() {
    // The remote shell stands for a host without it: it is removed before the agent starts.
    let gone: PathBuf = tempfile::tempdir().unwrap().keep();
    let hosts = Hosts::new("127.0.0.2\n", &format!("shift\nrmdir {}\nexec \"$@\"", gone.display()));
    let mut command = hosts.launch(1, &["true"]);
    let line = refused(&command.current_dir(&gone).output().unwrap(), 2);
    assert!(line.contains("cannot go to the working directory"), "{line}");
    assert!(!Path::new(&gone).exists());
}
