//! What a person sees while the ranks run: a bar on a terminal, the tokens as they come elsewhere.

use std::io::{self, IsTerminal};
use std::ops::ControlFlow;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

use super::event::Event;
use super::input::{Input, Task};
use crate::failure::print;

/// Characters of the latest text that are shown beside the bar.
const TAIL: usize = 48;

/// How progress is shown.
#[derive(Clone, Copy)]
pub(super) enum Style {
    /// Not at all: the output is for a program.
    Quiet,
    /// Tokens are printed as they come.
    Plain,
    /// A bar; the whole text follows when it is complete.
    Bar,
}

impl Style {
    pub(super) fn new(json: bool) -> Style {
        match (json, io::stdout().is_terminal() && io::stderr().is_terminal()) {
            (true, _) => Style::Quiet,
            (false, true) => Style::Bar,
            (false, false) => Style::Plain,
        }
    }
}

/// Shows one run. Dropping it takes the bar away.
pub(super) struct Progress {
    bar: Option<ProgressBar>,
    stream: bool,
    /// Print the text when it is complete.
    print_whole: bool,
    generates: bool,
    /// Tokens have no text; their ids are shown.
    ids: bool,
    text: String,
    inside_line: bool,
}

impl Progress {
    /// For a run called `name`. Only one `with_text` prints what is generated.
    pub(super) fn new(style: Style, name: &str, input: &Input, with_text: bool) -> Progress {
        let steps = match &input.task {
            Task::Embed(_) => None,
            Task::Generate { max_tokens, .. } => Some(*max_tokens as u64),
        };
        Progress {
            bar: matches!(style, Style::Bar).then(|| bar(name, steps)),
            stream: with_text && matches!(style, Style::Plain),
            print_whole: with_text && matches!(style, Style::Bar),
            generates: steps.is_some(),
            ids: input.built_in,
            text: String::new(),
            inside_line: false,
        }
    }

    /// Shows what a rank has told. Breaks when nobody reads our output any more.
    pub(super) fn show(&mut self, event: &Event) -> ControlFlow<()> {
        match event {
            Event::Token { id, text } => {
                let text = if self.ids { format!("{id} ") } else { text.clone() };
                if let Some(bar) = &self.bar {
                    self.text.push_str(&text);
                    bar.set_message(tail(&self.text));
                    bar.inc(1);
                }
                if self.stream {
                    self.inside_line = true;
                    return flow(print(text));
                }
            }
            Event::Done { .. } if self.generates => {
                self.clear();
                if self.stream {
                    self.inside_line = false;
                    return flow(print("\n\n"));
                }
                if self.print_whole {
                    return flow(print(format_args!("{}\n\n", self.text)));
                }
            }
            Event::Loaded { .. } | Event::Text(_) | Event::Done { .. } => {}
        }
        ControlFlow::Continue(())
    }

    fn clear(&mut self) {
        if let Some(bar) = self.bar.take() {
            bar.finish_and_clear();
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.clear();
        if self.inside_line {
            let _ = print("\n");
        }
    }
}

fn flow<E>(printed: Result<(), E>) -> ControlFlow<()> {
    if printed.is_ok() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
}

fn bar(name: &str, steps: Option<u64>) -> ProgressBar {
    let (bar, template) = match steps {
        Some(steps) => (ProgressBar::new(steps), "{spinner} {prefix} {bar:24} {pos}/{len} tokens {msg}"),
        None => (ProgressBar::new_spinner(), "{spinner} {prefix} {elapsed} {msg}"),
    };
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(name.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// The end of a text, on one line.
fn tail(text: &str) -> String {
    let start = text.char_indices().rev().nth(TAIL - 1).map_or(0, |(at, _)| at);
    text[start..].chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tail_is_one_short_line() {
        assert_eq!(tail("a\nb"), "a b");
        let long = "ä".repeat(100);
        assert_eq!(tail(&long).chars().count(), TAIL);
    }
}
