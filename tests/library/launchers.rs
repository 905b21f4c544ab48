//! Ranks over TCP that other launchers start: mpirun and torchrun where they are installed, and exactly the variables that
//! srun and Kubernetes set; and ranks that come late, twice or for another world.

use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use tensorwire::Deadline;
use tensorwire::transports::store::{Store, StoreServer, UnixStore};
use tensorwire::transports::tcp::Secret;

use crate::common::free_port;
use crate::job::{Job, own_command};

/// Long enough for a busy machine, and far below the default timeout of 30 s.
const SOON: Duration = Duration::from_secs(10);

type Vars<'a> = Vec<(&'a str, &'a str)>;

/// Runs `sum` with these variables in each rank, and checks what each prints.
fn sums(ranks: &[Vars<'_>], secret: &str) {
    let world = ranks.len();
    let over_tcp =
        [("TENSORWIRE_TRANSPORT", "tcp"), ("TENSORWIRE_SECRET", secret), ("TENSORWIRE_TIMEOUT", "20")];
    let ranks: Vec<_> = ranks.iter().map(|vars| [vars.as_slice(), &over_tcp].concat()).collect();
    let mut job = Job::start_with("sum", &ranks);
    for rank in 0..world {
        let (status, text) = job.join(rank);
        let expected = format!("rank {rank} of {world}: {}", 100_000.0 * world as f32);
        assert!(status.success() && text.contains(&expected), "{text}");
    }
}

#[test]
fn the_variables_that_srun_sets() {
    // As `srun -N 2 -n 2` on a cluster whose first node resolves to this host.
    let (secret, job) = (Secret::generate().unwrap().to_hex(), std::process::id().to_string());
    let task = |rank| {
        vec![
            ("SLURM_JOB_ID", &*job),
            ("SLURM_STEP_ID", "0"),
            ("SLURM_PROCID", rank),
            ("SLURM_LOCALID", "0"),
            ("SLURM_NTASKS", "2"),
            ("SLURM_NPROCS", "2"),
            ("SLURM_STEP_NUM_TASKS", "2"),
            ("SLURM_NNODES", "2"),
            ("SLURM_STEP_NUM_NODES", "2"),
            ("SLURM_STEP_NODELIST", "localhost,node[02-04]"),
            ("SLURM_JOB_NODELIST", "localhost,node[02-04]"),
            ("SLURM_TASKS_PER_NODE", "1(x2)"),
        ]
    };
    sums(&[task("0"), task("1")], &secret);
}

#[test]
fn the_variables_of_a_kubernetes_indexed_job() {
    let secret = Secret::generate().unwrap().to_hex();
    let free = free_port().to_string();
    // What the control plane sets, and what examples/kubernetes.yaml does.
    let pod = |index| {
        vec![
            ("JOB_COMPLETION_INDEX", index),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1"),
            ("KUBERNETES_SERVICE_PORT", "443"),
            ("WORLD_SIZE", "3"),
            ("MASTER_ADDR", "localhost"),
            ("MASTER_PORT", &*free),
        ]
    };
    sums(&[pod("0"), pod("1"), pod("2")], &secret);
}

/// A program in a directory where the peers of the benchmarks are installed, or on the path.
fn installed(program: &str, places: &[&str]) -> Option<PathBuf> {
    let home = PathBuf::from(std::env::var_os("HOME")?).join(".cache");
    let on_path =
        std::env::split_paths(&std::env::var_os("PATH")?).map(|dir| dir.join(program)).collect::<Vec<_>>();
    let mut all = places.iter().map(|place| home.join(place).join("bin").join(program)).chain(on_path);
    let found = all.find(|path| path.is_file());
    if found.is_none() {
        eprintln!("skipped: {program} is not installed");
    }
    found
}

/// Runs a launcher of `sum` at two ranks to its end.
fn launched(launcher: &mut Command) {
    let (program, args) = own_command();
    let start = Instant::now();
    let output = launcher
        .arg(program)
        .args(args)
        .env("TENSORWIRE_TEST_BODY", "sum")
        .env("TENSORWIRE_TRANSPORT", "tcp")
        .env("TENSORWIRE_SECRET", Secret::generate().unwrap().to_hex())
        .stdin(Stdio::null())
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{text}{error}");
    assert!(start.elapsed() < Duration::from_secs(60));
    for rank in 0..2 {
        assert!(text.contains(&format!("rank {rank} of 2: 200000")), "{text}{error}");
    }
}

#[test]
fn mpirun_starts_them() {
    let places = ["tensorwire/peers/openmpi", "tensorwire-peers/openmpi"];
    let Some(mpirun) = installed("mpirun", &places) else { return };
    let mut command = Command::new(mpirun);
    command.args(["-n", "2"]).env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    launched(&mut command);
    // And with rank 0's host named, as on several hosts.
    let mut command = Command::new(installed("mpirun", &places).unwrap());
    command.args(["-n", "2", "-x", "MASTER_ADDR=localhost"]);
    command.env("OMPI_ALLOW_RUN_AS_ROOT", "1").env("OMPI_ALLOW_RUN_AS_ROOT_CONFIRM", "1");
    command.env("PRTE_MCA_rmaps_default_mapping_policy", ":oversubscribe");
    launched(&mut command);
}

#[test]
fn torchrun_starts_them() {
    let Some(torchrun) = installed("torchrun", &["tensorwire-peers/torch", "tensorwire/peers/torch"]) else {
        return;
    };
    let python = torchrun.with_file_name("python");
    let mut command = Command::new(if python.is_file() { python } else { "python3".into() });
    command.args(["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]);
    launched(&mut command);
}

/// What a rank of a job that meets at `store` is given.
fn place<'a>(store: &'a str, rank: &'a str, world: &'a str, secret: &'a str) -> Vars<'a> {
    vec![
        ("TENSORWIRE_RANK", rank),
        ("TENSORWIRE_WORLD", world),
        ("TENSORWIRE_STORE", store),
        ("TENSORWIRE_TRANSPORT", "tcp"),
        ("TENSORWIRE_SECRET", secret),
        ("TENSORWIRE_TIMEOUT", "2"),
    ]
}

/// The stores that a job over TCP can meet in: one that the launcher serves over TCP or over a Unix socket, and a directory.
fn each_store(secret: &Secret, world: usize, check: impl Fn(&str)) {
    use tensorwire::transports::store::{LOOPBACK, TcpStoreServer};
    let tcp = TcpStoreServer::start(LOOPBACK, world, secret).unwrap();
    check(&tcp.address());
    let unix = StoreServer::start().unwrap();
    check(&unix.address());
    let dir = tempfile::tempdir().unwrap();
    check(&format!("file:{}", dir.path().join("meet").display()));
}

#[test]
fn a_rank_that_comes_twice_is_refused_and_the_job_goes_on() {
    let secret = Secret::generate().unwrap();
    let hex = secret.to_hex();
    each_store(&secret, 2, |store| {
        let mut job =
            Job::start_with("endless", &[place(store, "0", "2", &hex), place(store, "1", "2", &hex)]);
        (0..2).for_each(|rank| drop(job.wait_for(rank, "at work")));
        let mut twin = Job::start_with("join", &[place(store, "1", "2", &hex)]);
        let (_, text) = twin.join_within(0, SOON);
        assert!(text.contains("twice"), "{store}: {text}");
        // The others are none the wiser: what ends them is the death of a rank.
        job.signal(1, rustix::process::Signal::KILL);
        let (_, text) = job.join_within(0, SOON);
        assert!(text.contains("lost rank 1"), "{store}: {text}");
    });
}

#[test]
fn a_rank_of_another_world_is_refused_and_those_who_wait_for_it_learn_it() {
    let secret = Secret::generate().unwrap();
    let hex = secret.to_hex();
    each_store(&secret, 2, |store| {
        let mut other = place(store, "1", "3", &hex);
        other.push(("TENSORWIRE_TEST_AWAIT", "rank 0 is in"));
        let mut job = Job::start_with("join", &[place(store, "0", "2", &hex), other]);
        if store.starts_with("unix:") {
            // Where the launcher doesn't say what the world is, the first to come does.
            let store = UnixStore::connect(store, Deadline::after(SOON)).unwrap();
            store.get("tcp/1/at/0", Deadline::after(SOON)).unwrap();
        }
        job.reach("rank 0 is in");
        let (_, wrong) = job.join_within(1, SOON);
        assert!(wrong.contains("for a world of 3"), "{store}: {wrong}");
        let (_, zero) = job.join_within(0, SOON);
        assert!(zero.contains("rank(s) [1] did not come within 2s"), "{store}: {zero}");
        assert!(zero.contains("for a world of 3"), "{store}: {zero}");
    });
}

#[test]
fn a_rank_that_comes_late_is_told_so() {
    let secret = Secret::generate().unwrap();
    let hex = secret.to_hex();
    each_store(&secret, 2, |store| {
        let mut job = Job::start_with("join", &[place(store, "0", "2", &hex)]);
        let (_, zero) = job.join_within(0, SOON);
        assert!(zero.contains("rank(s) [1] did not come within 2s"), "{store}: {zero}");
        let mut late = Job::start_with("join", &[place(store, "1", "2", &hex)]);
        let (_, text) = late.join_within(0, SOON);
        assert!(
            text.contains("did not come within 2s") || text.contains("rank 0 has not come"),
            "{store}: {text}"
        );
    });
}
