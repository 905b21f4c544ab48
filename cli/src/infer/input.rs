//! What is to be run: the model and the task, checked against each other.

use tensorwire_runtime::{Error, Kind, Model, builtin};

use super::Args;
use crate::failure::Failure;

const DEFAULT_MAX_TOKENS: usize = 64;

pub(super) struct Input {
    pub(super) model: Model,
    pub(super) built_in: bool,
    pub(super) task: Task,
}

pub(super) enum Task {
    /// Embed these texts.
    Embed(Vec<String>),
    /// Continue a prompt.
    Generate {
        /// As it was given; the built-in model's prompt is ids alone.
        text: Option<String>,
        ids: Vec<u32>,
        max_tokens: usize,
    },
}

impl Input {
    /// Opens the model and checks the request against it. Reads no weights.
    pub(super) fn of(args: &Args) -> Result<Input, Failure> {
        let (model, built_in) = match &args.model {
            Some(dir) if dir.is_file() => {
                return Err(Failure::usage(format!(
                    "--model {}: is a file: infer needs the model's directory, with its weights",
                    dir.display()
                )));
            }
            Some(dir) if !dir.is_dir() => {
                return Err(Failure::usage(format!("--model {}: no such directory", dir.display())));
            }
            Some(dir) => (Model::open(dir).map_err(Failure::usage)?, false),
            None => (Model::built_in().map_err(Failure::usage)?, true),
        };
        let task = match model.kind() {
            Kind::Encoder => embed(args, &model)?,
            Kind::Decoder => generate(args, &model)?,
        };
        Ok(Input { model, built_in, task })
    }

    /// The line above the plan.
    pub(super) fn heading(&self) -> &'static str {
        if self.built_in { "built-in model, weights from a seed\n" } else { "" }
    }
}

fn embed(args: &Args, model: &Model) -> Result<Task, Failure> {
    let kind = model.spec().architecture.model_type();
    if args.prompt.is_some() || args.max_tokens.is_some() {
        return Err(Failure::usage(format!(
            "--prompt and --max-tokens are for decoders, and this {kind} model is an encoder: give it --text"
        )));
    }
    if args.texts.is_empty() {
        return Err(Failure::usage(format!(
            "this {kind} model is an encoder: give it texts to embed, --text 'one' --text 'another'"
        )));
    }
    for (index, text) in args.texts.iter().enumerate() {
        let (tokens, limit) = (model.tokenize(text).map_err(Failure::usage)?.len(), model.max_tokens());
        if tokens > limit {
            return Err(Failure::usage(Error::TextTooLong { index, tokens, limit }));
        }
    }
    Ok(Task::Embed(args.texts.clone()))
}

fn generate(args: &Args, model: &Model) -> Result<Task, Failure> {
    if !args.texts.is_empty() {
        return Err(Failure::usage(match args.model {
            Some(_) => format!(
                "--text is for encoders, and this {} model is a decoder: give it --prompt",
                model.spec().architecture.model_type()
            ),
            None => "--text needs an encoder: name one with --model DIR".into(),
        }));
    }
    let ids = match (&args.prompt, &args.model) {
        (Some(_), None) => {
            return Err(Failure::usage("the built-in model has no tokenizer: --prompt needs --model DIR"));
        }
        (None, Some(_)) => {
            return Err(Failure::usage(format!(
                "this {} model is a decoder: give it something to continue, --prompt 'Once upon a time'",
                model.spec().architecture.model_type()
            )));
        }
        (None, None) => builtin::PROMPT.to_vec(),
        (Some(text), Some(_)) => model.tokenize(text).map_err(Failure::usage)?,
    };
    if ids.is_empty() {
        return Err(Failure::usage(Error::EmptyPrompt));
    }
    let (prompt, limit) = (ids.len(), model.max_tokens());
    let max_tokens = match args.max_tokens {
        Some(n) => n as usize,
        // Asked for nothing in particular: what fits.
        None => DEFAULT_MAX_TOKENS.min(limit.saturating_sub(prompt)).max(1),
    };
    if prompt.saturating_add(max_tokens) > limit {
        return Err(Failure::usage(Error::ContextTooLong { prompt, max_tokens, limit }));
    }
    Ok(Task::Generate { text: args.prompt.clone(), ids, max_tokens })
}
