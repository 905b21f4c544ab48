//! A group of rank processes that runs the model once, and what came out of it.

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::ops::ControlFlow;
use std::path::PathBuf;

use rustix::fs::{MemfdFlags, memfd_create};
use tensorwire::transports::launch::{Env, Launcher, Outcome, Rendezvous, Stream};

use super::Args;
use super::event::{Event, NUMBERS_FD};
use super::progress::Progress;
use crate::failure::Failure;
use crate::job::Job;
use crate::launch::describe;

pub(super) struct Group<'a> {
    pub(super) args: &'a Args,
    pub(super) ranks: usize,
    /// Threads that each rank computes with.
    pub(super) threads: usize,
    /// The place in a job that others have started of the one rank that is run here; none where all are.
    pub(super) place: Option<&'a Env>,
}

/// What a group has produced.
#[derive(Default)]
pub(super) struct Run {
    /// Bytes of weights that each rank held, in rank order.
    pub(super) weight_bytes: Vec<u64>,
    /// Generated ids.
    pub(super) tokens: Vec<u32>,
    /// Their text, where the model has a tokenizer.
    pub(super) text: Option<String>,
    pub(super) prefill_s: f64,
    pub(super) decode_tokens_per_s: Option<f64>,
    pub(super) comm_share: f64,
    /// Logits, one row a token, or embeddings, one row a text: little-endian f32.
    pub(super) numbers: Option<File>,
    pub(super) width: usize,
    pub(super) rows: usize,
}

impl Group<'_> {
    /// Runs the model, and shows what comes as it comes.
    pub(super) fn run(&self, mut progress: Progress) -> Result<Run, Failure> {
        let program = std::env::current_exe()
            .map_err(|e| Failure::run(format!("cannot find this program to start it as ranks: {e}")))?;
        let numbers = memfd_create("tensorwire-infer", MemfdFlags::CLOEXEC)
            .map_err(|e| Failure::run(format!("cannot create a memory file: {e}")))?;
        let numbers = File::from(numbers);
        let for_rank_0 =
            numbers.try_clone().map_err(|e| Failure::run(format!("cannot copy a descriptor: {e}")))?;
        let (launcher, _job) = match self.place {
            Some(place) => (of_rank(program, place), None),
            None => {
                let job = Job::new(self.ranks, self.args.transport)?;
                (job.launcher(program), Some(job))
            }
        };

        let mut run = Run::default();
        let (mut done, mut unread) = (false, None);
        let outcome = launcher
            .args(self.rank_args())
            .env("RAYON_NUM_THREADS", self.threads.to_string())
            .inherit(0, NUMBERS_FD, for_rank_0)
            .forward_signals()
            .on_line(|line| {
                if line.stream == Stream::Stderr {
                    return ControlFlow::Continue(());
                }
                let Ok(event) = serde_json::from_slice::<Event>(line.bytes) else {
                    unread = Some(line.rank);
                    return ControlFlow::Continue(());
                };
                match &event {
                    Event::Loaded { weight_bytes } => {
                        run.weight_bytes.clone_from(weight_bytes);
                    }
                    Event::Token { id, .. } => run.tokens.push(*id),
                    Event::Text(piece) => run.text.get_or_insert_default().push_str(piece),
                    Event::Done { width, rows, prefill_s, decode_tokens_per_s, comm_share } => {
                        (run.width, run.rows, run.prefill_s) = (*width, *rows, *prefill_s);
                        (run.decode_tokens_per_s, run.comm_share) = (*decode_tokens_per_s, *comm_share);
                        done = true;
                    }
                }
                progress.show(&event)
            })
            .run()
            .map_err(Failure::run)?;
        drop(progress);
        if self.place.is_some() && outcome.failure.is_some() {
            // Whoever started the job learns from the status what kind of failure it was.
            let why = describe(&outcome, 1).unwrap_or_default().replace(": tensorwire: ", ": ");
            return Err(Failure::with_status(outcome.exit_code(), why));
        }
        failed(&outcome, self.ranks)?;
        if let Some(rank) = unread {
            return Err(Failure::run(format!("rank {rank} printed something that is not a report")));
        }
        let reports = self.place.is_none_or(|place| place.rank == 0);
        if reports && (!done || run.weight_bytes.len() != self.ranks) {
            return Err(Failure::run("the ranks ended without reporting a result"));
        }
        run.numbers = Some(numbers);
        Ok(run)
    }

    /// The ranks' command line: our own request, which each of them reads as we did.
    fn rank_args(&self) -> Vec<OsString> {
        let mut args: Vec<OsString> = vec![super::RANK_COMMAND.into()];
        let mut option = |name: &str, value: &OsStr| {
            let mut arg = OsString::from(name);
            arg.push("=");
            arg.push(value);
            args.push(arg);
        };
        if let Some(model) = &self.args.model {
            option("--model", model.as_os_str());
        }
        for text in &self.args.texts {
            option("--text", text.as_ref());
        }
        if let Some(prompt) = &self.args.prompt {
            option("--prompt", prompt.as_ref());
        }
        if let Some(n) = self.args.max_tokens {
            option("--max-tokens", n.to_string().as_ref());
        }
        option("--wire", self.args.wire.to_string().as_ref());
        args
    }
}

/// A launcher of the one rank that this process stands for.
fn of_rank<'a>(program: PathBuf, place: &Env) -> Launcher<'a> {
    let (Rendezvous::Store(store) | Rendezvous::Job(store)) = &place.rendezvous;
    let mut launcher = Launcher::new(program, 1, store)
        .rank_env(0, "TENSORWIRE_RANK", place.rank.to_string())
        .rank_env(0, "TENSORWIRE_WORLD", place.world.to_string());
    if let (Some(rank), Some(world)) = (place.local_rank, place.local_world) {
        launcher = launcher.rank_env(0, "TENSORWIRE_LOCAL_RANK", rank.to_string()).rank_env(
            0,
            "TENSORWIRE_LOCAL_WORLD",
            world.to_string(),
        );
    }
    launcher
}

/// How the run failed, if it did.
fn failed(outcome: &Outcome, ranks: usize) -> Result<(), Failure> {
    if outcome.output_closed {
        return Err(Failure::output_closed());
    }
    let Some(why) = describe(outcome, ranks) else { return Ok(()) };
    // The ranks begin their own line like we do.
    let why = why.replace(": tensorwire: ", ": ");
    let status = match (outcome.forwarded, outcome.failure.as_ref().and_then(|f| f.status.code())) {
        (Some(_), _) => outcome.exit_code(),
        (None, Some(2)) => 2,
        (None, _) => 1,
    };
    Err(Failure::with_status(status, why))
}
