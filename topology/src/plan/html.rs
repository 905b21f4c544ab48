//! The plan as a page: the picture, tables and notes in one file that needs nothing else.

use std::fmt::Write;

use super::notes::{size, time};
use super::view::{groups, ranges};
use super::{Explanation, Plan, SCHEMA};
use crate::svg::escaped;

const STYLE: &str = "\
:root { color-scheme: light dark }
body { font: 15px/1.5 system-ui, 'DejaVu Sans', sans-serif; max-width: 1280px; margin: 2em auto; padding: 0 1em }
h2 { margin: 2em 0 .5em; font-size: 1.15em }
.wide { overflow-x: auto }
svg { max-width: 100%; height: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { padding: .25em .9em .25em 0; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884 }
th { font-weight: 600 }
th:first-child, td:first-child, .text { text-align: left }
li { margin: .3em 0; max-width: 60em }
footer { margin: 3em 0 1em; color: #777 }
";

impl Plan {
    /// The plan as an HTML page for people: the [picture](Plan::svg), what each rank holds, what is exchanged,
    /// and the notes. It loads nothing and runs no script.
    pub fn html(&self) -> String {
        self.html_with(&self.svg(), None)
    }

    /// The [page](Plan::html) with another picture, such as [one on a fabric](Plan::svg_on), and perhaps with an
    /// explanation, which has the notes with their costs.
    pub fn html_with(&self, picture: &str, explain: Option<&Explanation>) -> String {
        let mut page = Page { text: String::new() };
        let ranks = if self.world == 1 { "one rank".to_owned() } else { format!("{} ranks", self.world) };
        let title = format!("{} over {ranks}", self.model.model_type);
        page.add("<!DOCTYPE html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n");
        page.add("<meta name=\"viewport\" content=\"width=device-width\">\n");
        page.add(&format!("<title>{}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n", escaped(&title)));
        page.add("<div class=\"wide\">\n");
        page.add(picture);
        page.add("</div>\n");
        self.holdings(&mut page);
        self.exchanged(&mut page);
        match explain {
            Some(explain) => explained(&mut page, explain),
            None => notes(&mut page, self.notes.iter().map(|note| (note, String::new()))),
        }
        page.add(&format!("<footer>{SCHEMA}, tensorwire {}</footer>\n", env!("CARGO_PKG_VERSION")));
        page.add("</body>\n</html>\n");
        page.text
    }

    /// A line a rank.
    fn holdings(&self, page: &mut Page) {
        page.heading("What each rank holds");
        let groups = groups(self);
        let rows: Vec<_> = groups
            .iter()
            .flat_map(|g| g.stages.iter().flat_map(move |s| s.rows.iter().map(move |r| (g, r))))
            .collect();
        let mut head =
            vec!["rank".to_owned(), "weights".to_owned(), "KV cache a token".to_owned(), "peak".to_owned()];
        head.extend(rows.iter().map(|(group, row)| match group.title.as_str() {
            "" => row.what.to_owned(),
            title => format!("{}, {title}", row.what),
        }));
        let lines = self.ranks.iter().map(|r| {
            let mut line = vec![
                r.rank.to_string(),
                size(r.weight_bytes),
                size(r.kv_bytes_per_token),
                size(r.peak_bytes),
            ];
            line.extend(rows.iter().map(|(_, row)| ranges(row.held[r.rank])));
            line
        });
        page.table(&head, lines, &[0]);
    }

    /// A line a collective.
    fn exchanged(&self, page: &mut Page) {
        page.heading("What the ranks exchange for a token");
        let head = ["after", "collective", "layers", "bytes each", "bytes a token", "time a token"];
        let mut lines = Vec::new();
        for group in groups(self) {
            for exchange in group.stages.iter().flat_map(|s| &s.exchanges) {
                lines.push(vec![
                    exchange.after.clone(),
                    exchange.op.clone(),
                    group.times.to_string(),
                    size(exchange.bytes_per_token),
                    size(exchange.bytes_per_token * group.times as u64),
                    time(exchange.predicted_us * group.times as f64),
                ]);
            }
        }
        if lines.is_empty() {
            page.add("<p>Nothing.</p>\n");
        } else {
            page.table(&head.map(str::to_owned), lines.into_iter(), &[0, 1]);
        }
    }
}

/// What binds, what else there was, and the notes with their costs.
fn explained(page: &mut Page, explain: &Explanation) {
    page.heading("Why");
    page.add(&format!("<p>It waits for {}.</p>\n", escaped(&explain.binding)));
    if let Some(limit) = explain.limit_text() {
        page.add(&format!("<p>Limit: {}.</p>\n", escaped(&limit)));
    }
    let head =
        ["", "a token", "exchanges", "weights a rank", "KV cache a token and rank", ""].map(str::to_owned);
    page.table(&head, explain.alternatives.iter().map(|a| a.cells().to_vec()), &[0, 5]);
    notes(page, explain.notes.iter().map(|n| (&n.note, n.costs())));
}

/// A list of notes, each with what it costs.
fn notes<'a>(page: &mut Page, notes: impl Iterator<Item = (&'a String, String)>) {
    page.heading("Notes");
    page.add("<ul>\n");
    for (note, costs) in notes {
        let costs = if costs.is_empty() { costs } else { format!("<br>costs {}", escaped(&costs)) };
        page.add(&format!("<li>{}{costs}</li>\n", escaped(note)));
    }
    page.add("</ul>\n");
}

struct Page {
    text: String,
}

impl Page {
    fn add(&mut self, html: &str) {
        self.text.push_str(html);
    }

    fn heading(&mut self, text: &str) {
        self.add(&format!("<h2>{}</h2>\n", escaped(text)));
    }

    /// A table. Columns in `texts` are text, the others numbers.
    fn table(&mut self, head: &[String], lines: impl Iterator<Item = Vec<String>>, texts: &[usize]) {
        let class = |column: usize| if texts.contains(&column) { " class=\"text\"" } else { "" };
        let line = |tag: &str, cells: &[String]| {
            let cell = |(i, text): (usize, &String)| format!("<{tag}{}>{}</{tag}>", class(i), escaped(text));
            format!("<tr>{}</tr>\n", cells.iter().enumerate().map(cell).collect::<String>())
        };
        // Writing to a string can't fail.
        let _ =
            write!(self.text, "<div class=\"wide\"><table>\n<thead>{}</thead>\n<tbody>\n", line("th", head));
        for cells in lines {
            self.text.push_str(&line("td", &cells));
        }
        self.text.push_str("</tbody></table></div>\n");
    }
}
