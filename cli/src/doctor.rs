//! `tensorwire doctor`: what the ranks of a job on this host are doing, without their help.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::OFlags;
use serde_json::{Value, json};
use tensorwire::FlightRecord;
use tensorwire::transports::shm::{CallRecord, MEMORY_NAME, RankRecord, RankState, inspect};

use crate::failure::{Failure, print};

const EXAMPLES: &str = "\
Reads the jobs' shared memory through /proc, so it works for ranks that hang, are stopped or have lost peers,
and disturbs none. A rank keeps its last 32 calls of each group; the table shows the last few, --json all.
Ages and times are in seconds in --json.

Examples:
  tensorwire doctor              all jobs of this user
  tensorwire doctor 4711         the job that process 4711 belongs to, or has started
  tensorwire doctor --json";

/// Show what the ranks of running jobs are doing, and how they differ
#[derive(clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct Args {
    /// A process of the job: a rank, or what started it
    #[arg(value_name = "PID")]
    pid: Option<u32>,

    /// Print one JSON object
    #[arg(long)]
    json: bool,
}

pub(crate) fn main(args: &Args) -> Result<(), Failure> {
    let processes = Process::all();
    if let Some(pid) = args.pid.filter(|pid| !processes.contains_key(pid)) {
        return Err(Failure::usage(format!("doctor: there is no process {pid}")));
    }
    let wanted = |job: &Job| args.pid.is_none_or(|pid| job.is_of(pid, &processes));
    let jobs: Vec<Job> = Job::all(&processes).into_iter().filter(wanted).collect();
    if let (Some(pid), []) = (args.pid, &*jobs) {
        let why = "has no shared memory of tensorwire that this user may see, nor has what it started; ranks of a job over a \
                   network alone keep their records to themselves";
        return Err(Failure::usage(format!("doctor: process {pid} {why}")));
    }
    let looked: Vec<_> = jobs.iter().map(|job| (job, job.look(&processes))).collect();
    if args.json {
        let jobs: Vec<Value> = looked.iter().map(|(job, found)| job.json(found, &processes)).collect();
        return print(format_args!("{:#}\n", json!({ "jobs": jobs })));
    }
    let mut text = String::new();
    for (job, found) in &looked {
        job.describe(found, &processes, &mut text);
    }
    if looked.is_empty() {
        text.push_str("no job of this user that shares memory is running\n");
    }
    print(text)
}

/// A process, as /proc shows it.
struct Process {
    name: String,
    parent: u32,
    /// Its number in its own namespace, which is what it knows.
    inner: u32,
    state: RankState,
}

impl Process {
    fn all() -> BTreeMap<u32, Process> {
        let entries = std::fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|e| e.file_name().to_str()?.parse().ok());
        pids.filter_map(|pid| Some((pid, Process::read(pid)?))).collect()
    }

    fn read(pid: u32) -> Option<Process> {
        // PID (NAME) STATE PARENT ...; the name may hold anything.
        let stat = std::fs::read(format!("/proc/{pid}/stat")).ok()?;
        let stat = String::from_utf8_lossy(&stat);
        let (name, rest) = stat.split_once('(')?.1.rsplit_once(')')?;
        let mut rest = rest.split_whitespace();
        let state = match rest.next()? {
            "T" | "t" => RankState::Stopped,
            "Z" | "X" => RankState::Ended,
            _ => RankState::Member,
        };
        let parent = rest.next()?.parse().ok()?;
        let status = std::fs::read(format!("/proc/{pid}/status")).ok()?;
        let status = String::from_utf8_lossy(&status);
        let inner = status.lines().find_map(|l| l.strip_prefix("NSpid:"));
        let inner = inner.and_then(|l| l.split_whitespace().last()?.parse().ok()).unwrap_or(pid);
        let name = name.chars().map(|c| if c.is_control() { '?' } else { c }).collect();
        Some(Process { name, parent, inner, state })
    }
}

/// Processes that share memory.
struct Job {
    /// A way to the memory.
    memory: PathBuf,
    pids: BTreeSet<u32>,
}

type Found = tensorwire::Result<Vec<FlightRecord>>;

impl Job {
    /// Every job of which this user may see a process.
    fn all(processes: &BTreeMap<u32, Process>) -> Vec<Job> {
        let link = PathBuf::from(format!("/memfd:{MEMORY_NAME} (deleted)"));
        let mut jobs = BTreeMap::<(u64, u64), Job>::new();
        for pid in processes.keys() {
            let files = std::fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten().flatten();
            for file in files.map(|f| f.path()).filter(|f| std::fs::read_link(f).is_ok_and(|to| to == link)) {
                let Ok(metadata) = std::fs::metadata(&file) else { continue };
                let job = jobs.entry((metadata.dev(), metadata.ino()));
                job.or_insert(Job { memory: file, pids: BTreeSet::new() }).pids.insert(*pid);
            }
        }
        jobs.into_values().collect()
    }

    /// Whether a process belongs to it, or has started one that does.
    fn is_of(&self, pid: u32, processes: &BTreeMap<u32, Process>) -> bool {
        let descends = |mut from: u32| {
            // The list was read while it changed: it may hold a circle.
            for _ in 0..processes.len() {
                if from == pid {
                    return true;
                }
                match processes.get(&from) {
                    Some(process) => from = process.parent,
                    None => return false,
                }
            }
            false
        };
        self.pids.iter().any(|pid| descends(*pid))
    }

    fn look(&self, processes: &BTreeMap<u32, Process>) -> Found {
        let refused = |e| tensorwire::Error::os(format!("opening {}", self.memory.display()), e);
        let memory = open(&self.memory).map_err(refused)?;
        let of = |inner| self.pids.iter().find(|pid| processes[pid].inner == inner);
        let mut found =
            inspect(&memory, |inner| of(inner).map_or(RankState::Ended, |pid| processes[pid].state))?;
        // From here on it is this namespace's numbers that matter.
        for rank in found.iter_mut().flat_map(|group| &mut group.ranks) {
            rank.pid = of(rank.pid).copied().unwrap_or(rank.pid);
        }
        Ok(found)
    }

    fn describe(&self, found: &Found, processes: &BTreeMap<u32, Process>, to: &mut String) {
        let names: BTreeSet<&str> = self.pids.iter().map(|pid| &*processes[pid].name).collect();
        let names = names.into_iter().collect::<Vec<_>>().join(", ");
        let pids = self.pids.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
        // Writing to a string can't fail.
        let _ = writeln!(to, "job: {names}, processes {pids}");
        match found {
            Err(e) => drop(writeln!(to, "can't be read: {e}")),
            Ok(groups) if groups.is_empty() => to.push_str("no group\n"),
            Ok(groups) => {
                for (i, group) in groups.iter().enumerate() {
                    let (n, of, ranks) = (i + 1, groups.len(), group.ranks.len());
                    let _ = write!(to, "\ngroup {n} of {of}, {ranks} ranks\n{group}");
                }
            }
        }
        to.push('\n');
    }

    fn json(&self, found: &Found, processes: &BTreeMap<u32, Process>) -> Value {
        let process = |pid: &u32| json!({ "pid": pid, "name": processes[pid].name });
        let ours: Vec<Value> = self.pids.iter().map(process).collect();
        match found {
            Err(e) => json!({ "processes": ours, "error": e.to_string() }),
            Ok(groups) => {
                json!({ "processes": ours, "groups": groups.iter().map(group_json).collect::<Vec<_>>() })
            }
        }
    }
}

/// Opens what may have become something else since it was found: it neither waits nor takes a terminal.
fn open(path: &Path) -> std::io::Result<File> {
    let flags = OFlags::NONBLOCK | OFlags::NOCTTY;
    OpenOptions::new().read(true).custom_flags(flags.bits() as i32).open(path)
}

fn group_json(group: &FlightRecord) -> Value {
    json!({
        "difference": group.difference(),
        "failure": group.failure,
        "ranks": group.ranks.iter().map(rank_json).collect::<Vec<_>>(),
    })
}

fn rank_json(r: &RankRecord) -> Value {
    let call = |c: &CallRecord| {
        json!({
            "call": c.seq,
            "what": c.call.to_string(),
            "algorithm": Some(&c.algorithm).filter(|a| !a.is_empty()),
            "began": c.began.as_secs_f64(),
            "took": c.took.map(|t| t.as_secs_f64()),
        })
    };
    json!({
        "rank": r.rank,
        "pid": r.pid,
        "state": r.state.to_string(),
        "waits_for": r.waits_for,
        "calls": r.calls.iter().map(call).collect::<Vec<_>>(),
    })
}
