//! `tensorwire bench` as a person and as a script use it.

#[path = "../support/fake_nccl.rs"]
mod fake_nccl;
mod support;

use std::io::{BufRead, BufReader};

use serde_json::Value;
use support::*;

const COLLECTIVES: [&str; 10] = [
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "broadcast",
    "reduce",
    "gather",
    "scatter",
    "all_to_all",
    "send_recv",
    "barrier",
];

/// The rows of `bench --json` with one batch a size.
#[track_caller]
fn rows(line: &str) -> Vec<Value> {
    let output = run(["bench", "--json", "--batches", "1"].into_iter().chain(line.split_whitespace()));
    assert_eq!(output.status.code(), Some(0), "{line}: {}", stderr(&output));
    stdout(&output).lines().map(|row| serde_json::from_str(row).unwrap()).collect()
}

fn bench(line: &str) -> std::process::Output {
    run(["bench"].into_iter().chain(line.split_whitespace()))
}

#[test]
fn every_collective_is_checked_and_measured() {
    for collective in COLLECTIVES {
        let rows = rows(&format!("--collective {collective} --bytes 4K"));
        assert_eq!(rows.len(), 1, "{collective}");
        let row = &rows[0];
        assert_eq!(row["collective"], collective);
        assert_eq!(row["correct"], true, "{row}");
        assert_eq!(row["bytes"], if collective == "barrier" { 0 } else { 4096 });
        let reduces = ["all_reduce", "reduce_scatter", "reduce"].contains(&collective);
        assert_eq!(row["op"], if reduces { "sum" } else { "none" });
        for time in ["median_us", "min_us", "p50_us", "p99_us"] {
            assert!(row[time].as_f64().unwrap() > 0.0, "{row}");
        }
        assert!(row["min_us"].as_f64() <= row["median_us"].as_f64());
        assert!(row["p50_us"].as_f64() <= row["p99_us"].as_f64());
    }
}

#[test]
fn a_row_has_the_fields_of_the_contract() {
    let rows = rows("--bytes 8,64K --dtype bf16 --op average --touch");
    assert_eq!(rows.iter().map(|r| r["bytes"].as_u64().unwrap()).collect::<Vec<_>>(), [8, 65536]);
    let names: Vec<_> = rows[1].as_object().unwrap().keys().map(String::as_str).collect();
    let expected = [
        "collective",
        "transport",
        "ranks",
        "dtype",
        "op",
        "bytes",
        "algorithm",
        "buffer",
        "touch",
        "median_us",
        "min_us",
        "p50_us",
        "p99_us",
        "algbw_gbps",
        "busbw_gbps",
        "correct",
    ];
    assert_eq!(names, expected);
    let row = &rows[1];
    assert_eq!((&row["transport"], &row["buffer"]), (&"shm".into(), &"user".into()));
    assert_eq!((&row["dtype"], &row["op"], &row["touch"]), (&"bf16".into(), &"average".into(), &true.into()));
    // Bytes over time; at 2 ranks an all_reduce's bus carries the same.
    let gbps = 65536.0 / row["median_us"].as_f64().unwrap() / 1e3;
    assert!((row["algbw_gbps"].as_f64().unwrap() / gbps - 1.0).abs() < 0.01, "{row}");
    assert_eq!(row["algbw_gbps"], row["busbw_gbps"]);
}

#[test]
fn every_collective_runs_over_networks() {
    let collectives = ["all_reduce", "all_to_all", "broadcast", "send_recv", "barrier"];
    for (over, collective) in
        ["tcp", "tls", "quic"].into_iter().flat_map(|over| collectives.map(|c| (over, c)))
    {
        let line =
            format!("--json --batches 1 --transport {over} --ranks 2 --bytes 8,1M --collective {collective}");
        let output = bench(&line);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        for row in stdout(&output).lines().map(|l| serde_json::from_str::<Value>(l).unwrap()) {
            assert_eq!((&row["transport"], &row["correct"]), (&over.into(), &true.into()));
        }
    }
    let refusal = refused(&bench("--transport pigeons"), 2);
    assert!(refusal.contains("use shm, tcp, tls, quic, mpi or auto"), "{refusal}");
}

#[test]
fn sizes_are_cut_to_whole_blocks_and_too_small_ones_named() {
    let output = bench("--json --batches 1 --collective reduce_scatter --ranks 3 --bytes 8,40");
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let row: Value = serde_json::from_str(&stdout(&output)).unwrap();
    assert_eq!(row["bytes"], 36);
    let note = stderr(&output);
    assert_eq!(note.lines().count(), 1, "{note}");
    assert!(
        note.starts_with("tensorwire: note: 8 bytes are left out: reduce_scatter takes at least 12"),
        "{note}"
    );
}

#[test]
fn one_rank_and_symmetric_buffers_are_measured() {
    assert_eq!(rows("--ranks 1 --bytes 4K")[0]["busbw_gbps"], 0.0);
    let rows = rows("--buffer symmetric --bytes 4K,256K");
    assert!(rows.iter().all(|r| r["buffer"] == "symmetric" && r["correct"] == true));
}

#[test]
fn any_algorithm_can_be_forced_and_is_named() {
    for (buffer, bytes, algorithms) in [
        ("user", "32", &["inline", "one_shot", "two_shot"][..]),
        ("symmetric", "32", &["inline", "one_shot", "two_shot", "symmetric"]),
        ("user", "1M", &["one_shot", "two_shot"]),
        ("symmetric", "1M", &["one_shot", "two_shot", "symmetric"]),
    ] {
        for algorithm in algorithms {
            let rows = rows(&format!("--buffer {buffer} --bytes {bytes} --algorithm {algorithm}"));
            assert_eq!((&rows[0]["algorithm"], &rows[0]["correct"]), (&(*algorithm).into(), &true.into()));
        }
    }
    let names = |line: &str| rows(line).iter().map(|r| r["algorithm"].clone()).collect::<Vec<_>>();
    assert_eq!(names("--bytes 8,16M"), ["inline", "two_shot"]);
    assert_eq!(names("--bytes 8,16M --buffer symmetric"), ["inline", "symmetric"]);
}

#[test]
fn a_networks_algorithms_and_forms_are_checked_and_named() {
    for algorithm in ["chain", "ring", "recursive_doubling", "halving_doubling", "hierarchical"] {
        let rows =
            rows(&format!("--transport tcp --ranks 3 --bytes 8,64K --dtype bf16 --algorithm {algorithm}"));
        assert!(rows.iter().all(|r| r["algorithm"] == algorithm && r["correct"] == true), "{rows:?}");
        let refusal = refused(&bench(&format!("--algorithm {algorithm}")), 2);
        assert!(refusal.contains("--transport tcp"), "{refusal}");
    }
    for wire in ["bf16", "q8"] {
        let rows = rows(&format!("--transport tcp --ranks 2 --bytes 8,256K --wire {wire} --op average"));
        assert!(rows.iter().all(|r| r["wire"] == wire && r["correct"] == true), "{rows:?}");
        let refusal = refused(&bench(&format!("--wire {wire}")), 2);
        assert!(refusal.contains("over tcp"), "{refusal}");
    }
    assert_eq!(rows("--wire f32 --bytes 8")[0].get("wire"), None);
    let refusal = refused(&bench("--wire f16"), 2);
    assert!(refusal.contains("use one of f32, bf16, q8"), "{refusal}");
}

#[test]
fn the_table_has_a_heading_and_a_line_a_size() {
    let output = bench("--batches 1 --bytes 8,4K --collective broadcast --dtype i8");
    let text = stdout(&output);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert_eq!(lines[0], "broadcast i8 over shm, 2 ranks");
    for name in ["bytes", "median us", "p50 us", "p99 us", "busbw GB/s"] {
        assert!(lines[1].contains(name), "{text}");
    }
    assert!(lines[3].trim_start().starts_with("4096 "), "{text}");
}

#[test]
fn the_plot_shows_what_was_measured() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.svg");
    let limit = directory.path().join("limit.json");
    std::fs::write(&limit, r#"{"figure":"two_shot","touch":false,"bytes":4096,"us":0.1}"#).unwrap();
    let line = format!("--bytes 8,4K --plot {} --limit {}", path.display(), limit.display());
    let rows = rows(&line);
    assert_eq!((rows[0].get("floor_us"), &rows[1]["floor_us"]), (None, &0.1.into()));
    let svg = std::fs::read_to_string(&path).unwrap();
    assert!(svg.starts_with("<svg ") && svg.ends_with("</svg>\n"));
    assert!(svg.contains(">all_reduce f32 sum over shm, 2 ranks</text>") && svg.contains("Linux"));
    // The median, the 99th percentile and the bandwidth of two sizes, and the floor of one.
    assert_eq!(svg.matches("<circle").count(), 7);
}

#[test]
fn what_cannot_be_measured_is_refused_before_anything_is() {
    let directory = tempfile::tempdir().unwrap();
    let nowhere = directory.path().join("none").join("a.svg");
    for (line, why) in [
        ("--bytes 6", "no whole number of f32"),
        ("--bytes 0", "--bytes"),
        ("--collective reduce_all", "all_reduce"),
        ("--collective all_to_all --bytes 4", "at least 8 bytes"),
        ("--collective all_gather --algorithm two_shot", "two_shot"),
        ("--algorithm symmetric", "--buffer symmetric"),
        ("--op bit_and", "not defined for f32"),
        ("--algorithm inline --bytes 64K", "inline carries at most"),
        ("--bytes 64G --ranks 4000", "available"),
        ("--limit /dev/null", "--limit /dev/null"),
        ("--plot .", "--plot ."),
        (&format!("--plot {}", nowhere.display()), "--plot"),
    ] {
        let refusal = refused(&bench(line), 2);
        assert!(refusal.contains(why), "{line}: {refusal}");
    }
}

/// Ranks read these variables; no rank is started to find out.
#[test]
fn variables_that_make_no_sense_are_refused_before_a_rank_is_started() {
    for (command, transport, name, value) in [
        ("bench", "shm", "TENSORWIRE_TIMEOUT", "soon"),
        ("bench", "shm", "TENSORWIRE_SHM_BYTES", "4M"),
        ("bench", "tcp", "TENSORWIRE_TIMEOUT", "0"),
        ("bench", "tcp", "TENSORWIRE_PORT", "70000"),
        ("bench", "tcp", "TENSORWIRE_CHECKSUM", "yes"),
        ("bench", "quic", "TENSORWIRE_QUIC_CONGESTION", "slow"),
        ("infer", "tcp", "TENSORWIRE_ADAPT", "99"),
        ("infer", "auto", "TENSORWIRE_SHM_BYTES", "4M"),
    ] {
        let output =
            tensorwire([command, "--json", "--transport", transport]).env(name, value).output().unwrap();
        let refusal = refused(&output, 2);
        assert!(refusal.contains(name) && !refusal.contains("rank "), "{command} {transport}: {refusal}");
    }
    // It is nobody's on shared memory.
    let mut bench = tensorwire(["bench", "--bytes", "8", "--batches", "1"]);
    assert!(bench.env("TENSORWIRE_PORT", "70000").output().unwrap().status.success());
}

#[test]
fn a_refused_run_leaves_no_plot() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("a.svg");
    refused(&bench(&format!("--algorithm inline --bytes 64K --plot {}", path.display())), 2);
    assert!(!path.exists());
}

#[test]
fn a_reader_that_leaves_ends_the_run_quietly() {
    let mut child =
        tensorwire(["bench", "--json", "--bytes", "8,64,512,4K", "--batches", "3"]).spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    out.read_line(&mut String::new()).unwrap();
    drop(out);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(141), "{}", stderr(&output));
    assert_eq!(stderr(&output), "");
}

#[test]
fn nccl_is_refused_in_a_line_where_there_is_none() {
    let refused = |library: &std::path::Path| {
        let mut command = tensorwire(["bench", "--transport", "nccl"]);
        let output = command.env("TENSORWIRE_NCCL_LIB", library).output().unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert_eq!(stdout(&output), "");
        let said = stderr(&output);
        assert_eq!(said.lines().count(), 1, "{said}");
        said
    };
    let said = refused("/nowhere/libnccl.so.2".as_ref());
    assert!(said.contains("NCCL can't be used: /nowhere/libnccl.so.2 can't be loaded"), "{said}");
    assert!(said.contains("(TENSORWIRE_NCCL_LIB names it)"), "{said}");
    let said = refused(&fake_nccl::test_library(&[]));
    assert!(said.contains("is a test library, which runs on no GPU"), "{said}");
    for line in ["--touch", "--wire q8", "--algorithm ring", "--buffer symmetric", "--explain"] {
        let output = bench(&format!("--transport nccl {line}"));
        assert_eq!(output.status.code(), Some(2), "{line}");
        assert!(stderr(&output).contains("is not for --transport nccl"), "{}", stderr(&output));
    }
}

#[cfg(not(feature = "mpi"))]
#[test]
fn mpi_is_refused_where_it_was_not_built_in() {
    for line in ["--transport mpi", "--transport mpi --algorithm mpi --json"] {
        assert!(refused(&bench(line), 2).contains("--features mpi"), "{line}");
    }
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_is_measured_by_ranks_of_mpirun() {
    for collective in COLLECTIVES {
        let rows = rows(&format!("--transport mpi --collective {collective} --bytes 4K,256K"));
        assert!(rows.iter().all(|row| row["transport"] == "mpi" && row["correct"] == true), "{rows:?}");
    }
    for collective in ["all_reduce", "reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"] {
        let rows = rows(&format!("--transport mpi --algorithm mpi --collective {collective} --bytes 4K"));
        assert!(rows.iter().all(|row| row["algorithm"] == "mpi" && row["correct"] == true), "{rows:?}");
    }
    // What MPI has no type for goes by our schedules, and says so.
    let rows = rows("--transport mpi --algorithm mpi --dtype bf16 --ranks 3 --bytes 6K");
    assert!(rows[0]["algorithm"] != "mpi" && rows[0]["correct"] == true, "{rows:?}");
}

#[cfg(feature = "mpi")]
#[test]
fn mpi_without_mpirun_says_what_to_install() {
    let output = tensorwire(["bench", "--transport", "mpi"]).env("PATH", "").output().unwrap();
    let line = refused(&output, 2);
    assert!(line.contains("mpirun isn't on the PATH"), "{line}");
}
