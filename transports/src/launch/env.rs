//! Who am I: rank, world and meeting place, as a launcher's environment variables say.
//!
//! Launchers are asked in this order, and the first whose rank *and* world are both set answers:
//!
//! | source | rank, world, local rank | same for all ranks of the job | rank 0's host |
//! | --- | --- | --- | --- |
//! | tensorwire | `TENSORWIRE_RANK`, `_WORLD`, `_LOCAL_RANK` | `TENSORWIRE_STORE` | |
//! | torchrun | `RANK`, `WORLD_SIZE`, `LOCAL_RANK` | `MASTER_ADDR`, `MASTER_PORT`, `TORCHELASTIC_RUN_ID`, `_RESTART_COUNT` | `MASTER_ADDR` |
//! | Open MPI | `OMPI_COMM_WORLD_RANK`, `_SIZE`, `_LOCAL_RANK` | `PMIX_NAMESPACE` or `OMPI_MCA_ess_base_jobid` | `MASTER_ADDR` |
//! | PMI | `PMI_RANK`, `PMI_SIZE`, `MPI_LOCALRANKID` | `PMI_JOBID` and its like, else the Slurm step, else the parent process | `MASTER_ADDR`, else as Slurm |
//! | Slurm | `SLURM_PROCID`, `SLURM_STEP_NUM_TASKS` or `SLURM_NTASKS`, `SLURM_LOCALID` | `SLURM_JOB_ID`, `SLURM_STEP_ID` | `MASTER_ADDR`, else the first of `SLURM_STEP_NODELIST` |
//! | Kubernetes | `JOB_COMPLETION_INDEX`, `WORLD_SIZE` | `MASTER_ADDR`, `MASTER_PORT` | `MASTER_ADDR` |
//!
//! Where the ranks meet is `TENSORWIRE_STORE`, whoever has started them, if it is set; and `TENSORWIRE_JOB`, if it is
//! set, tells this job from others instead of what is in the table.
//!
//! MPI launchers come before Slurm because inside an allocation they start their own daemons as Slurm tasks:
//! what Slurm's variables then describe is the daemon, not the rank.

use tensorwire_core::{Error, Result};

use super::nodelist::first_host;

/// This process's place in a job.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Env {
    /// This process's rank, below `world`.
    pub rank: usize,
    /// The number of ranks; at least 1.
    pub world: usize,
    /// This process's number among those of its host, where the launcher says so: which device is its own.
    pub local_rank: Option<usize>,
    /// How many of them the launcher says it started on this host, where it says so. A hint for messages:
    /// whether two ranks share memory is found out by trying.
    pub local_world: Option<usize>,
    /// Where the ranks meet.
    pub rendezvous: Rendezvous,
    /// What tells this job from others, where it is known.
    pub job: Option<String>,
    /// Where rank 0 can serve a store for ranks on other hosts, where the launcher says so.
    pub master: Option<Master>,
    /// Which launcher's variables these are: `tensorwire`, `torchrun`, `Open MPI`, `PMI`, `Slurm` or `Kubernetes`.
    pub source: &'static str,
}

/// Rank 0's host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Master {
    /// Its name or address.
    pub host: String,
    /// A port there that nobody else uses, if one is given.
    pub port: Option<u16>,
}

/// Where the ranks of a job meet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rendezvous {
    /// The value of `TENSORWIRE_STORE`: `tcp:HOST:PORT`, `file:DIR` or `unix:NAME`.
    Store(String),
    /// No store is given. A text that is the same for all ranks of this job on this host and differs between
    /// jobs that run at the same time, from which the ranks can derive the name of a store of their own.
    Job(String),
}

impl Env {
    /// Reads the environment of this process.
    ///
    /// # Errors
    /// [`Error::Config`] names the variable, its value and what is wrong with it.
    pub fn read() -> Result<Env> {
        let parent = std::os::unix::process::parent_id();
        Env::from_lookup(|name| std::env::var_os(name).map(|v| v.to_string_lossy().into_owned()), parent)
    }

    /// Reads an environment given as a function from a variable's name to its value. `parent` is the process
    /// id of this process's parent: the last resort to tell one PMI job from another.
    ///
    /// # Errors
    /// As [`Env::read`].
    pub fn from_lookup(get: impl Fn(&str) -> Option<String>, parent: u32) -> Result<Env> {
        let vars = Vars { get: &get, parent };
        if vars.any(&["TENSORWIRE_RANK", "TENSORWIRE_WORLD"]) {
            return vars.tensorwire();
        }
        for launcher in LAUNCHERS {
            if let Some(env) = launcher.read(&vars)? {
                return Ok(env);
            }
        }
        Err(vars.nothing_complete())
    }
}

/// How one foreign launcher tells a process its place.
struct Launcher {
    source: &'static str,
    rank: &'static str,
    /// In order of preference.
    world: &'static [&'static str],
    local_rank: &'static str,
    local_world: &'static str,
    /// Whether the variables describe this process as a rank at all.
    applies: fn(&Vars<'_>) -> bool,
    job: fn(&Vars<'_>) -> Result<String>,
    /// Where rank 0 is, if `MASTER_ADDR` doesn't say.
    first_host: fn(&Vars<'_>) -> Option<String>,
    /// Whether `MASTER_PORT` is for us: torch's own store has the one that torchrun sets.
    port_is_free: bool,
}

const LAUNCHERS: [Launcher; 5] = [
    Launcher {
        source: "torchrun",
        rank: "RANK",
        world: &["WORLD_SIZE"],
        local_rank: "LOCAL_RANK",
        local_world: "LOCAL_WORLD_SIZE",
        applies: |_| true,
        job: |vars| {
            if !vars.any(&["MASTER_ADDR", "MASTER_PORT"]) {
                return Err(Error::Config(
                    "RANK and WORLD_SIZE are set but MASTER_ADDR and MASTER_PORT are not: torchrun sets all four"
                        .into(),
                ));
            }
            let (addr, port) = vars.pair("MASTER_ADDR", "MASTER_PORT")?;
            if port.parse::<u16>().is_err() {
                return Err(Error::Config(format!("MASTER_PORT is '{port}', which is not a port number")));
            }
            let run = vars.get("TORCHELASTIC_RUN_ID").unwrap_or_default();
            let restart = vars.get("TORCHELASTIC_RESTART_COUNT").unwrap_or_default();
            Ok(format!("torchrun {addr} {port} {run} {restart}"))
        },
        first_host: |_| None,
        port_is_free: false,
    },
    Launcher {
        source: "Open MPI",
        rank: "OMPI_COMM_WORLD_RANK",
        world: &["OMPI_COMM_WORLD_SIZE"],
        local_rank: "OMPI_COMM_WORLD_LOCAL_RANK",
        local_world: "OMPI_COMM_WORLD_LOCAL_SIZE",
        applies: |_| true,
        job: |vars| {
            let names = ["PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid"];
            vars.first(&names).map(|(_, job)| format!("ompi {job}")).ok_or_else(|| {
                Error::Config(format!(
                    "OMPI_COMM_WORLD_RANK is set but nothing that tells this job from others (one of {}): start \
                     the ranks with mpirun, or set TENSORWIRE_STORE, TENSORWIRE_RANK and TENSORWIRE_WORLD",
                    names.join(", ")
                ))
            })
        },
        first_host: |_| None,
        port_is_free: true,
    },
    Launcher {
        source: "PMI",
        rank: "PMI_RANK",
        world: &["PMI_SIZE"],
        local_rank: "MPI_LOCALRANKID",
        local_world: "MPI_LOCALNRANKS",
        applies: |_| true,
        job: |vars| {
            let names = ["PMI_JOBID", "PMIX_NAMESPACE", "PALS_APID", "FLUX_JOB_ID"];
            Ok(match (vars.first(&names), vars.slurm_step()) {
                (Some((name, job)), _) => format!("pmi {name} {job}"),
                (None, Some(step)) => format!("pmi {step}"),
                // Hydra sets nothing of the kind, but one proxy process starts all ranks of a host.
                (None, None) => format!("pmi parent {}", vars.parent),
            })
        },
        first_host: |vars| vars.first_of_slurms_hosts(),
        port_is_free: true,
    },
    Launcher {
        source: "Slurm",
        rank: "SLURM_PROCID",
        world: &["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"],
        local_rank: "SLURM_LOCALID",
        local_world: "",
        applies: |vars| vars.slurm_step().is_some(),
        job: |vars| Ok(vars.slurm_step().unwrap_or_default()),
        first_host: |vars| vars.first_of_slurms_hosts(),
        port_is_free: true,
    },
    Launcher {
        source: "Kubernetes",
        rank: "JOB_COMPLETION_INDEX",
        world: &["WORLD_SIZE"],
        local_rank: "",
        local_world: "",
        applies: |_| true,
        job: |vars| {
            match vars.first(&["MASTER_ADDR"]) {
            Some((_, host)) => {
                Ok(format!("kubernetes {} {}", host.trim(), vars.get("MASTER_PORT").unwrap_or_default()))
            }
            None => Err(Error::Config(
                "JOB_COMPLETION_INDEX and WORLD_SIZE are set but MASTER_ADDR is not: name the pod of index 0, \
                 JOB-0.SERVICE, in the Job's manifest"
                    .into(),
            )),
        }
        },
        first_host: |_| None,
        port_is_free: true,
    },
];

impl Launcher {
    /// `None` where this launcher did not start this process.
    fn read(&self, vars: &Vars<'_>) -> Result<Option<Env>> {
        let (Some(rank), Some((world_name, world))) = (vars.get(self.rank), vars.first(self.world)) else {
            return Ok(None);
        };
        if !(self.applies)(vars) {
            return Ok(None);
        }
        let (rank, world) = place(self.rank, &rank, world_name, &world)?;
        let (local_rank, local_world) = (vars.hint(self.local_rank), vars.hint(self.local_world));
        let (store, named) = (vars.first(&["TENSORWIRE_STORE"]), vars.first(&["TENSORWIRE_JOB"]));
        let job = match named {
            Some((_, job)) => Ok(job.trim().to_owned()),
            None => (self.job)(vars),
        };
        let (rendezvous, job) = match store {
            Some((_, store)) => (Rendezvous::Store(store.trim().into()), job.ok()),
            None => {
                let job = job?;
                (Rendezvous::Job(job.clone()), Some(job))
            }
        };
        let master = self.master(vars)?;
        Ok(Some(Env { rank, world, local_rank, local_world, rendezvous, job, master, source: self.source }))
    }

    fn master(&self, vars: &Vars<'_>) -> Result<Option<Master>> {
        let named = vars.first(&["MASTER_ADDR"]).map(|(_, host)| host.trim().to_owned());
        let Some(host) = named.or_else(|| (self.first_host)(vars)) else { return Ok(None) };
        let port = match vars.first(&["MASTER_PORT"]).filter(|_| self.port_is_free) {
            None => None,
            Some((name, text)) => {
                Some(text.trim().parse::<u16>().ok().filter(|p| *p != 0).ok_or_else(|| {
                    Error::Config(format!("{name} is '{text}', which is not a port number"))
                })?)
            }
        };
        Ok(Some(Master { host, port }))
    }
}

/// The variables, and the questions asked of them.
struct Vars<'a> {
    get: &'a dyn Fn(&str) -> Option<String>,
    parent: u32,
}

impl Vars<'_> {
    fn get(&self, name: &str) -> Option<String> {
        (self.get)(name)
    }

    fn any(&self, names: &[&str]) -> bool {
        names.iter().any(|name| self.get(name).is_some())
    }

    /// The first of these variables that has a value which isn't empty.
    fn first<'n>(&self, names: &[&'n str]) -> Option<(&'n str, String)> {
        names.iter().find_map(|name| self.get(name).filter(|v| !v.trim().is_empty()).map(|v| (*name, v)))
    }

    /// A number that helps, and whose absence does no harm.
    fn hint(&self, name: &str) -> Option<usize> {
        self.get(name).and_then(|v| v.trim().parse().ok())
    }

    /// The host of a Slurm step's first task, where it has several hosts.
    fn first_of_slurms_hosts(&self) -> Option<String> {
        let (_, nodes) = self.first(&["SLURM_STEP_NUM_NODES", "SLURM_NNODES"])?;
        let several = nodes.trim().parse::<u32>().is_ok_and(|n| n > 1);
        let (_, list) = self.first(&["SLURM_STEP_NODELIST", "SLURM_NODELIST", "SLURM_JOB_NODELIST"])?;
        first_host(&list).filter(|_| several)
    }

    /// Two variables of which at least one is set.
    fn pair(&self, a: &str, b: &str) -> Result<(String, String)> {
        match (self.get(a), self.get(b)) {
            (Some(a), Some(b)) => Ok((a, b)),
            (Some(_), None) => Err(missing(a, b)),
            (None, _) => Err(missing(b, a)),
        }
    }

    /// Our own variables: all three or an error, because somebody meant them for us.
    fn tensorwire(&self) -> Result<Env> {
        let (rank, world) = self.pair("TENSORWIRE_RANK", "TENSORWIRE_WORLD")?;
        let (rank, world) = place("TENSORWIRE_RANK", &rank, "TENSORWIRE_WORLD", &world)?;
        let Some((_, store)) = self.first(&["TENSORWIRE_STORE"]) else {
            return Err(Error::Config(
                "TENSORWIRE_RANK and TENSORWIRE_WORLD are set but TENSORWIRE_STORE, where the ranks meet, is \
                 not: `tensorwire launch` sets it; by hand, give all ranks the same tcp:HOST:PORT, with HOST \
                 rank 0's, or file:DIR"
                    .into(),
            ));
        };
        let (local_rank, local_world) =
            (self.hint("TENSORWIRE_LOCAL_RANK"), self.hint("TENSORWIRE_LOCAL_WORLD"));
        let rendezvous = Rendezvous::Store(store.trim().into());
        let job = self.first(&["TENSORWIRE_JOB"]).map(|(_, job)| job.trim().to_owned());
        Ok(Env { rank, world, local_rank, local_world, rendezvous, job, master: None, source: "tensorwire" })
    }

    /// The Slurm step that this process is a task of. The shell of a batch script and of `salloc` is given
    /// `SLURM_PROCID=0` and `SLURM_NTASKS` too, but no step, or one of the reserved numbers at the top.
    fn slurm_step(&self) -> Option<String> {
        const FIRST_RESERVED_STEP: u32 = 0xffff_fff0;
        let (job, step) = (self.get("SLURM_JOB_ID")?, self.get("SLURM_STEP_ID")?);
        let normal = step.trim().parse::<u32>().is_ok_and(|s| s < FIRST_RESERVED_STEP);
        normal.then(|| format!("slurm {} {}", job.trim(), step.trim()))
    }

    /// Nobody told us both rank and world: say which half is there, or how to start.
    fn nothing_complete(&self) -> Error {
        for launcher in &LAUNCHERS {
            // Slurm's world without a rank is an allocation's shell; without a step, a batch script's. A WORLD_SIZE without
            // a rank is torchrun's.
            if matches!(launcher.source, "Slurm" | "Kubernetes") {
                continue;
            }
            match (self.get(launcher.rank), self.first(launcher.world)) {
                (Some(_), None) => return missing(launcher.rank, launcher.world[0]),
                (None, Some((world, _))) => return missing(world, launcher.rank),
                _ => {}
            }
        }
        if self.any(&["JOB_COMPLETION_INDEX"]) {
            return Error::Config(
                "JOB_COMPLETION_INDEX is set but WORLD_SIZE is not: set it to the Job's completions in its manifest".into(),
            );
        }
        if self.any(&["SLURM_NTASKS", "SLURM_PROCID"]) {
            return Error::Config(
                "this process runs inside a Slurm job but is not a task of it: start the ranks with srun"
                    .into(),
            );
        }
        Error::Config(
            "no launcher has told this process its rank: start it with `tensorwire launch --ranks N -- CMD`, \
             torchrun, mpirun, srun or as a Kubernetes indexed Job, or set TENSORWIRE_RANK, TENSORWIRE_WORLD and TENSORWIRE_STORE"
                .into(),
        )
    }
}

fn missing(present: &str, absent: &str) -> Error {
    Error::Config(format!("{present} is set but {absent} is not: both are needed"))
}

fn place(rank_name: &str, rank: &str, world_name: &str, world: &str) -> Result<(usize, usize)> {
    let (rank, world) = (number(rank_name, rank)?, number(world_name, world)?);
    if world == 0 {
        return Err(Error::Config(format!("{world_name} is 0: there must be at least one rank")));
    }
    if rank >= world {
        return Err(Error::Config(format!(
            "{rank_name} is {rank} but {world_name} is {world}: ranks count from 0 to {}",
            world - 1
        )));
    }
    Ok((rank, world))
}

fn number(name: &str, value: &str) -> Result<usize> {
    // Ranks travel as 32-bit numbers; a larger one is a mistake, whatever it says.
    let parsed = value.trim().parse::<u32>();
    parsed
        .map(|n| n as usize)
        .map_err(|_| Error::Config(format!("{name} is '{value}', which is not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PARENT: u32 = 4242;

    fn read(vars: &[(&str, &str)]) -> Result<Env> {
        let get = |name: &str| vars.iter().find(|(n, _)| *n == name).map(|(_, v)| v.to_string());
        Env::from_lookup(get, PARENT)
    }

    fn error(vars: &[(&str, &str)]) -> String {
        match read(vars) {
            Err(Error::Config(what)) => what,
            other => panic!("expected a configuration error, got {other:?}"),
        }
    }

    fn job(vars: &[(&str, &str)]) -> String {
        match read(vars).unwrap().rendezvous {
            Rendezvous::Job(job) => job,
            other => panic!("expected a job key, got {other:?}"),
        }
    }

    const OURS: [(&str, &str); 3] =
        [("TENSORWIRE_RANK", "1"), ("TENSORWIRE_WORLD", "3"), ("TENSORWIRE_STORE", "unix:job-7")];
    const TORCH: [(&str, &str); 7] = [
        ("RANK", "5"),
        ("WORLD_SIZE", "8"),
        ("LOCAL_WORLD_SIZE", "4"),
        ("MASTER_ADDR", "node1"),
        ("MASTER_PORT", "29500"),
        ("TORCHELASTIC_RUN_ID", "none"),
        ("TORCHELASTIC_RESTART_COUNT", "0"),
    ];
    const OMPI: [(&str, &str); 4] = [
        ("OMPI_COMM_WORLD_RANK", "2"),
        ("OMPI_COMM_WORLD_SIZE", "4"),
        ("OMPI_COMM_WORLD_LOCAL_SIZE", "4"),
        ("PMIX_NAMESPACE", "prterun-host-33@1"),
    ];
    const SLURM: [(&str, &str); 4] =
        [("SLURM_PROCID", "3"), ("SLURM_NTASKS", "6"), ("SLURM_JOB_ID", "991"), ("SLURM_STEP_ID", "0")];
    const PMI: [(&str, &str); 2] = [("PMI_RANK", "0"), ("PMI_SIZE", "2")];

    const KUBERNETES: [(&str, &str); 4] = [
        ("JOB_COMPLETION_INDEX", "1"),
        ("WORLD_SIZE", "2"),
        ("MASTER_ADDR", "job-0.job"),
        ("MASTER_PORT", "29600"),
    ];

    fn master(vars: &[(&str, &str)]) -> Option<(String, Option<u16>)> {
        read(vars).unwrap().master.map(|m| (m.host, m.port))
    }

    /// `vars` with one variable changed, or dropped where `value` is empty.
    fn with<'a>(vars: &[(&'a str, &'a str)], name: &'a str, value: &'a str) -> Vec<(&'a str, &'a str)> {
        let mut out: Vec<_> = vars.iter().copied().filter(|(n, _)| *n != name).collect();
        if !value.is_empty() {
            out.push((name, value));
        }
        out
    }

    #[test]
    fn our_own_variables() {
        let vars = with(&with(&OURS, "TENSORWIRE_LOCAL_WORLD", "3"), "TENSORWIRE_LOCAL_RANK", "1");
        let env = read(&with(&vars, "TENSORWIRE_JOB", "j7")).unwrap();
        let want = Env {
            rank: 1,
            world: 3,
            local_rank: Some(1),
            local_world: Some(3),
            rendezvous: Rendezvous::Store("unix:job-7".into()),
            job: Some("j7".into()),
            master: None,
            source: "tensorwire",
        };
        assert_eq!(env, want);
    }

    #[test]
    fn ours_win_over_all_others_and_each_launcher_over_the_next() {
        let order: [(&[(&str, &str)], &str); 6] = [
            (&OURS, "tensorwire"),
            (&TORCH, "torchrun"),
            (&OMPI, "Open MPI"),
            (&PMI, "PMI"),
            (&SLURM, "Slurm"),
            (&KUBERNETES, "Kubernetes"),
        ];
        for (first, (_, source)) in order.iter().enumerate() {
            let all: Vec<_> = order[first..].iter().flat_map(|(vars, _)| vars.iter().copied()).collect();
            assert_eq!(read(&all).unwrap().source, *source);
        }
    }

    #[test]
    fn torchrun() {
        let env = read(&TORCH).unwrap();
        assert_eq!((env.rank, env.world, env.local_world, env.source), (5, 8, Some(4), "torchrun"));
        for (name, other) in [
            ("MASTER_ADDR", "node2"),
            ("MASTER_PORT", "29501"),
            ("TORCHELASTIC_RUN_ID", "a"),
            ("TORCHELASTIC_RESTART_COUNT", "1"),
        ] {
            assert_ne!(job(&TORCH), job(&with(&TORCH, name, other)), "{name}");
        }
        assert_eq!(job(&TORCH), job(&with(&TORCH, "RANK", "0")));
        assert_eq!(
            error(&with(&TORCH, "MASTER_PORT", "")),
            "MASTER_ADDR is set but MASTER_PORT is not: both are needed"
        );
        assert!(error(&with(&TORCH, "MASTER_PORT", "99999")).contains("'99999'"));
        assert!(error(&[("RANK", "0"), ("WORLD_SIZE", "2")]).contains("torchrun sets all four"));
    }

    #[test]
    fn open_mpi() {
        let env = read(&OMPI).unwrap();
        assert_eq!((env.rank, env.world, env.local_world, env.source), (2, 4, Some(4), "Open MPI"));
        assert_eq!(job(&OMPI), job(&with(&OMPI, "OMPI_COMM_WORLD_RANK", "1")));
        assert_ne!(job(&OMPI), job(&with(&OMPI, "PMIX_NAMESPACE", "prterun-host-34@1")));
        let old = with(&with(&OMPI, "PMIX_NAMESPACE", ""), "OMPI_MCA_ess_base_jobid", "350");
        assert_eq!(job(&old), "ompi 350");
        assert!(error(&with(&OMPI, "PMIX_NAMESPACE", "")).contains("PMIX_NAMESPACE"));
    }

    #[test]
    fn slurm() {
        let env = read(&SLURM).unwrap();
        assert_eq!((env.rank, env.world, env.source), (3, 6, "Slurm"));
        assert_ne!(job(&SLURM), job(&with(&SLURM, "SLURM_STEP_ID", "1")));
        assert_ne!(job(&SLURM), job(&with(&SLURM, "SLURM_JOB_ID", "992")));
        // A step smaller than its allocation.
        assert_eq!(read(&with(&SLURM, "SLURM_STEP_NUM_TASKS", "4")).unwrap().world, 4);
    }

    #[test]
    fn kubernetes() {
        let env = read(&KUBERNETES).unwrap();
        assert_eq!((env.rank, env.world, env.source), (1, 2, "Kubernetes"));
        assert_eq!(master(&KUBERNETES), Some(("job-0.job".into(), Some(29600))));
        assert!(error(&with(&KUBERNETES, "MASTER_ADDR", "")).contains("JOB-0.SERVICE"));
        assert!(error(&with(&KUBERNETES, "WORLD_SIZE", "")).contains("the Job's completions"));
        assert!(error(&with(&KUBERNETES, "MASTER_PORT", "x")).contains("MASTER_PORT"));
    }

    #[test]
    fn where_rank_0_is() {
        // Torch's own store listens at its port.
        assert_eq!(master(&TORCH), Some(("node1".into(), None)));
        assert_eq!((master(&OMPI), master(&PMI), master(&SLURM)), (None, None, None));
        let named = with(&with(&OMPI, "MASTER_ADDR", "n1"), "MASTER_PORT", "5");
        assert_eq!(master(&named), Some(("n1".into(), Some(5))));
        let nodes = with(&with(&SLURM, "SLURM_STEP_NODELIST", "gpu[07-09]"), "SLURM_STEP_NUM_NODES", "3");
        assert_eq!(master(&nodes), Some(("gpu07".into(), None)));
        assert_eq!(master(&with(&nodes, "SLURM_STEP_NUM_NODES", "1")), None, "one host needs none");
        let pmi: Vec<_> = PMI.into_iter().chain(nodes).collect();
        assert_eq!(master(&pmi), Some(("gpu07".into(), None)));
        assert_eq!(read(&with(&SLURM, "SLURM_LOCALID", "1")).unwrap().local_rank, Some(1));
    }

    #[test]
    fn a_store_and_a_job_that_are_named_hold_for_any_launcher() {
        let vars = with(&SLURM, "TENSORWIRE_STORE", "file:/nfs/x");
        let env = read(&vars).unwrap();
        assert_eq!(env.rendezvous, Rendezvous::Store("file:/nfs/x".into()));
        assert_eq!(env.job.as_deref(), Some("slurm 991 0"));
        assert_eq!(read(&with(&vars, "TENSORWIRE_JOB", "a")).unwrap().job.as_deref(), Some("a"));
        assert_eq!(job(&with(&SLURM, "TENSORWIRE_JOB", "a")), "a");
    }

    proptest::proptest! {
        #[test]
        fn any_variables_are_a_place_or_an_error(values in proptest::collection::vec("(?s).{0,12}", 24), which: u32) {
            let all = OURS.iter().chain(&TORCH).chain(&OMPI).chain(&PMI).chain(&SLURM).chain(&KUBERNETES);
            let some = all.zip(&values).enumerate().filter(|(i, _)| which >> i & 1 == 1);
            let vars: Vec<_> = some.map(|(_, ((name, _), value))| (*name, value.as_str())).collect();
            if let Ok(env) = read(&vars) {
                proptest::prop_assert!(env.rank < env.world);
            }
        }
    }

    #[test]
    fn a_shell_inside_a_slurm_allocation_is_not_a_task() {
        let batch = with(&SLURM, "SLURM_STEP_ID", "");
        let batch_step = with(&SLURM, "SLURM_STEP_ID", "4294967291");
        let salloc = with(&with(&SLURM, "SLURM_STEP_ID", ""), "SLURM_PROCID", "");
        for shell in [batch, batch_step, salloc] {
            assert!(error(&shell).contains("srun"), "{shell:?}");
        }
    }

    #[test]
    fn pmi_falls_back_to_the_slurm_step_and_then_to_the_parent() {
        assert_eq!(job(&PMI), "pmi parent 4242");
        assert_eq!(job(&with(&PMI, "PMI_JOBID", "7.0")), "pmi PMI_JOBID 7.0");
        let mut in_slurm = PMI.to_vec();
        in_slurm.extend(SLURM);
        assert_eq!(job(&in_slurm), "pmi slurm 991 0");
        assert_eq!(read(&in_slurm).unwrap().rank, 0);
    }

    #[test]
    fn a_wrong_number_is_named_with_its_value() {
        for (vars, rank, world) in [
            (&OURS[..], "TENSORWIRE_RANK", "TENSORWIRE_WORLD"),
            (&TORCH[..], "RANK", "WORLD_SIZE"),
            (&OMPI[..], "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            (&SLURM[..], "SLURM_PROCID", "SLURM_NTASKS"),
            (&PMI[..], "PMI_RANK", "PMI_SIZE"),
        ] {
            for bad in ["one", "-1", "1.5", "99999999999999999999", " "] {
                assert_eq!(
                    error(&with(vars, rank, bad)),
                    format!("{rank} is '{bad}', which is not a number")
                );
            }
            assert_eq!(error(&with(vars, world, "x")), format!("{world} is 'x', which is not a number"));
            assert_eq!(
                error(&with(vars, world, "0")),
                format!("{world} is 0: there must be at least one rank")
            );
            assert_eq!(
                error(&with(&with(vars, rank, "2"), world, "2")),
                format!("{rank} is 2 but {world} is 2: ranks count from 0 to 1")
            );
        }
    }

    #[test]
    fn half_a_pair_names_the_other_half() {
        for (vars, rank, world) in [
            (&OURS[..], "TENSORWIRE_RANK", "TENSORWIRE_WORLD"),
            (&TORCH[..], "RANK", "WORLD_SIZE"),
            (&OMPI[..], "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"),
            (&PMI[..], "PMI_RANK", "PMI_SIZE"),
        ] {
            assert_eq!(
                error(&with(vars, world, "")),
                format!("{rank} is set but {world} is not: both are needed")
            );
            assert_eq!(
                error(&with(vars, rank, "")),
                format!("{world} is set but {rank} is not: both are needed")
            );
        }
    }

    #[test]
    fn a_stray_half_of_one_launcher_does_not_hide_another() {
        let mut vars = OMPI.to_vec();
        vars.push(("WORLD_SIZE", "64"));
        assert_eq!(read(&vars).unwrap().source, "Open MPI");
    }

    #[test]
    fn our_store_is_needed_and_nothing_at_all_says_how_to_start() {
        assert!(error(&with(&OURS, "TENSORWIRE_STORE", "")).contains("TENSORWIRE_STORE"));
        assert!(error(&with(&OURS, "TENSORWIRE_STORE", " ")).contains("TENSORWIRE_STORE"));
        let nothing = error(&[("PATH", "/bin")]);
        for way in ["tensorwire launch --ranks N -- CMD", "torchrun", "mpirun", "srun"] {
            assert!(nothing.contains(way), "{nothing}");
        }
    }
}
