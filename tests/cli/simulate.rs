//! `tensorwire simulate` as a person and as a script use it.

mod support;

use serde_json::Value;
use support::*;

#[track_caller]
fn rows(line: &str) -> Vec<Value> {
    let output = run(["simulate", "--json"].into_iter().chain(line.split_whitespace()));
    assert_eq!(output.status.code(), Some(0), "{line}: {}", stderr(&output));
    stdout(&output).lines().map(|row| serde_json::from_str(row).unwrap()).collect()
}

fn of<'a>(rows: &'a [Value], algorithm: &str) -> &'a Value {
    rows.iter().find(|r| r["algorithm"] == algorithm).unwrap()
}

#[test]
fn every_algorithm_is_predicted_and_the_choices_are_marked() {
    // 1 MB takes 1000 us between the hosts.
    let rows = rows("--ranks 8 --hosts 2 --bytes 1000000 --intra 2,10,0 --inter 20,1,0");
    assert_eq!(rows.len(), 7);
    for row in &rows {
        let names: Vec<_> = row.as_object().unwrap().keys().map(String::as_str).collect();
        assert_eq!(
            names,
            [
                "collective",
                "ranks",
                "hosts",
                "bytes",
                "algorithm",
                "keeps_order",
                "simulated_us",
                "formula_us",
                "messages",
                "bytes_sent",
                "host_bytes_sent",
                "auto",
                "any_order"
            ]
        );
    }
    for (mark, ordered) in [("auto", true), ("any_order", false)] {
        let marked: Vec<&Value> = rows.iter().filter(|r| r[mark] == true).collect();
        assert_eq!(marked.len(), 1);
        let fastest = rows
            .iter()
            .filter(|r| !ordered || r["keeps_order"] == true)
            .min_by(|a, b| a["formula_us"].as_f64().unwrap().total_cmp(&b["formula_us"].as_f64().unwrap()));
        assert_eq!(fastest.unwrap()["algorithm"], marked[0]["algorithm"]);
    }
    // Each half of the ranks' sums crosses once, and so does each half of the results.
    let hierarchical = of(&rows, "hierarchical");
    assert_eq!(
        (&hierarchical["host_bytes_sent"], &hierarchical["any_order"]),
        (&1_000_000.into(), &true.into())
    );
    assert!((1000.0..1600.0).contains(&hierarchical["simulated_us"].as_f64().unwrap()), "{hierarchical}");
    assert_eq!(of(&rows, "two_shot")["host_bytes_sent"], 2 * 4 * 4 * 125_000);
}

#[test]
fn a_thousand_ranks_need_not_be_there() {
    let rows = rows("--ranks 1024 --hosts 128 --bytes 1M --algorithm halving_doubling");
    assert_eq!(rows.len(), 1);
    assert_eq!(rows[0]["messages"], 20);
    let output = run("simulate --ranks 1024 --hosts 128 --bytes 1M".split(' '));
    let text = stdout(&output);
    assert!(text.starts_with("all_reduce f32 sum, 1024 ranks on 128 hosts;"), "{text}");
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 2 + 7, "{text}");
    assert!(text.contains("chain") && text.contains("any order"), "{text}");
}

#[test]
fn what_cannot_be_simulated_is_refused() {
    for (line, why) in [
        ("", "--ranks"),
        ("--ranks 1", "2 to 4096"),
        ("--ranks 4 --hosts 5", "from 1 to 4"),
        ("--ranks 4 --hosts 0", "from 1 to 4"),
        ("--ranks 4 --bytes 6", "whole number of f32"),
        ("--ranks 4 --inter fast", "such as 20,1.25"),
        ("--ranks 4 --algorithm inline", "hierarchical"),
    ] {
        let output = run(["simulate"].into_iter().chain(line.split_whitespace()));
        let refusal = refused(&output, 2);
        assert!(refusal.contains(why), "{line}: {refusal}");
    }
}
