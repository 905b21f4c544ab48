//! `tensorwire topo` as a person and as a script use it.

mod support;

use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Output};

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use serde_json::Value;
use support::*;

/// The command with this cache folder and no other settings.
fn topo(cache: &Path, line: &str) -> Command {
    let mut command = tensorwire(["topo"].into_iter().chain(line.split_whitespace()));
    command.env("XDG_CACHE_HOME", cache).env_remove("TENSORWIRE_TABLE");
    command
}

#[track_caller]
fn json(output: &Output) -> Value {
    assert_eq!(output.status.code(), Some(0), "{}", stderr(output));
    serde_json::from_str(&stdout(output)).unwrap()
}

#[test]
fn shows_the_machine_and_the_constants_where_nothing_was_measured() {
    let cache = tempfile::tempdir().unwrap();
    let output = topo(cache.path(), "").output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "processor ",
        "allowed ",
        "memory ",
        "huge pages ",
        "table ",
        "built-in constants: nothing measured yet",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let found = json(&topo(cache.path(), "--json").output().unwrap());
    let processors = std::thread::available_parallelism().unwrap().get();
    assert_eq!(found["machine"]["processors"]["usable"], processors);
    assert!(found["machine"]["memory"]["total"].as_u64().unwrap() > 1 << 20);
    assert_eq!((&found["table"]["source"], found.get("samples")), (&"built_in".into(), None));
    let path = found["table"]["path"].as_str().unwrap();
    assert!(path.starts_with(&format!("{}/tensorwire/shm-", cache.path().display())), "{path}");
    assert!(!cache.path().join("tensorwire").exists(), "looking leaves nothing behind");
}

/// The 8 GPUs of an example.
const FABRIC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/fabrics/8-gpus-nvlink.toml");

#[test]
fn a_fabric_is_shown_drawn_and_written_as_other_tools_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let (svg, nccl, kept) =
        (folder.path().join("a.svg"), folder.path().join("a.xml"), folder.path().join("a.json"));
    let line = format!("--fabric {FABRIC} --svg {} --export-nccl {}", svg.display(), nccl.display());
    let output = topo(folder.path(), &line).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    for part in [
        "1 host, 8 devices",
        "8 x A100-SXM4-80GB (GPU), 80 GiB",
        "nvlink 240.000 GB/s, 2.5 us, rated; 1 island",
    ] {
        assert!(text.contains(part), "{text}");
    }
    let picture = std::fs::read_to_string(&svg).unwrap();
    assert!(picture.starts_with("<svg ") && picture.ends_with("</svg>\n") && picture.contains(">gpu7<"));
    // What was written is read again, whatever it is called.
    let found = json(&topo(folder.path(), &format!("--import {} --json", nccl.display())).output().unwrap());
    // NCCL's file also has the processors of both NUMA nodes.
    assert_eq!(
        (&found["schema"], found["devices"].as_array().unwrap().len()),
        (&"tensorwire.fabric/v1".into(), 8 + 2)
    );
    let printed = stdout(&topo(folder.path(), &format!("--fabric {FABRIC} --json")).output().unwrap());
    std::fs::write(&kept, &printed).unwrap();
    let again =
        stdout(&topo(folder.path(), &format!("--fabric {} --json", kept.display())).output().unwrap());
    assert_eq!(again, printed);
    // This machine is a fabric too.
    let here = json(&topo(folder.path(), &format!("--json --svg {}", svg.display())).output().unwrap());
    assert_eq!(here["fabric"]["hosts"][0]["name"], "this machine");
    assert!(std::fs::read_to_string(&svg).unwrap().contains("this machine"));
}

#[test]
fn fabrics_that_are_none_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let bad = folder.path().join("bad");
    std::fs::write(&bad, "name = \"x\"\nhost = 1\n").unwrap();
    let (bad, svg) = (bad.display(), folder.path().join("a.svg"));
    for (line, why) in [
        (format!("--fabric {bad}"), "bad: the fabric's TOML"),
        (format!("--fabric {bad} --svg {}", svg.display()), "the fabric's TOML"),
        (format!("--fabric {bad}.missing"), "can't read"),
        (format!("--fabric {FABRIC} --svg /nowhere/a.svg"), "--svg /nowhere/a.svg"),
        (format!("--fabric {FABRIC} --probe"), "--probe"),
    ] {
        let refusal = refused(&topo(folder.path(), &line).output().unwrap(), 2);
        assert!(refusal.contains(why), "{refusal}");
    }
    assert!(!svg.exists(), "a refusal leaves no file behind");
}

#[test]
fn bad_usage_is_refused() {
    let cache = tempfile::tempdir().unwrap();
    for line in ["--prob", "extra", "--probe=1"] {
        let refusal = refused(&topo(cache.path(), line).output().unwrap(), 2);
        assert!(refusal.contains("tensorwire topo --help"), "{refusal}");
    }
}

#[test]
fn a_table_that_can_not_be_used_is_named_and_harms_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("table.json");
    for (text, why) in [
        ("garbage", "it is no table"),
        ("{\"schema\": \"tensorwire.table/v0\", \"version\": \"0\"}", "schema"),
        ("{\"schema\": \"tensorwire.table/v1\", \"version\": \"0.0.0\"}", "version"),
    ] {
        std::fs::write(&file, text).unwrap();
        let output = topo(folder.path(), "").env("TENSORWIRE_TABLE", &file).output().unwrap();
        let shown = stdout(&output);
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        assert!(shown.contains("built-in constants: ") && shown.contains("is ignored: "), "{shown}");
        assert!(shown.contains(why) && shown.contains("--probe makes a new one"), "{shown}");
        let mut bench = tensorwire(["bench", "--json", "--batches", "1", "--bytes", "4M,8M"]);
        let output = bench.env("TENSORWIRE_TABLE", &file).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        let text = stdout(&output);
        let algorithms: Vec<Value> = text
            .lines()
            .map(|row| serde_json::from_str::<Value>(row).unwrap()["algorithm"].clone())
            .collect();
        assert_eq!(algorithms, ["one_shot", "two_shot"]);
    }
    let off = json(&topo(folder.path(), "--json").env("TENSORWIRE_TABLE", "off").output().unwrap());
    assert_eq!((&off["table"]["source"], &off["table"]["path"]), (&"built_in".into(), &Value::Null));
}

#[test]
fn a_place_that_can_not_be_written_is_refused_before_anything_is_measured() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("file");
    std::fs::write(&file, "").unwrap();
    let with = |name: &str, value: &Path| {
        let mut command = topo(folder.path(), "--probe");
        command.env(name, value).output().unwrap()
    };
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return;
    }
    for (output, why) in [
        (with("XDG_CACHE_HOME", &file), "Not a directory"),
        (with("XDG_CACHE_HOME", Path::new("/proc/self")), "can't write /proc/self/tensorwire/"),
        (with("TENSORWIRE_TABLE", Path::new("/dev/full")), "no ordinary file"),
        (with("TENSORWIRE_TABLE", folder.path()), "no ordinary file"),
        (with("TENSORWIRE_TABLE", Path::new("off")), "TENSORWIRE_TABLE is off"),
    ] {
        let refusal = refused(&output, 2);
        assert!(refusal.contains("topo --probe: ") && refusal.contains(why), "{refusal}");
    }
    let mut homeless = topo(folder.path(), "--probe");
    let refusal = refused(&homeless.env_remove("XDG_CACHE_HOME").env("HOME", "").output().unwrap(), 2);
    assert!(refusal.contains("neither HOME nor XDG_CACHE_HOME"), "{refusal}");
}

#[test]
fn one_processor_is_nothing_to_measure() {
    let cache = tempfile::tempdir().unwrap();
    let allowed = sched_getaffinity(None).unwrap();
    let mut one = CpuSet::new();
    one.set((0..CpuSet::MAX_CPU).find(|cpu| allowed.is_set(*cpu)).unwrap());
    let mut probe = topo(cache.path(), "--probe --json");
    // SAFETY: the system call is all that happens between fork and exec.
    unsafe { probe.pre_exec(move || Ok(sched_setaffinity(None, &one)?)) };
    let refusal = refused(&probe.output().unwrap(), 2);
    assert!(refusal.contains("may use 1 processor") && refusal.contains("2 processors or more"), "{refusal}");
}

#[test]
fn what_a_probe_finds_is_kept_and_followed() {
    let cache = tempfile::tempdir().unwrap();
    if std::thread::available_parallelism().unwrap().get() < 2 {
        return;
    }
    let found = json(&topo(cache.path(), "--probe --bytes 1K,16K --passes 1 --json").output().unwrap());
    assert_eq!(found["table"]["source"], "measured");
    assert!(found["table"]["age_s"].as_u64().unwrap() < 600);
    let samples = found["samples"].as_array().unwrap();
    assert!(samples.iter().all(|s| s["median_us"].as_f64().unwrap() > 0.0));
    let names: Vec<_> = std::fs::read_dir(cache.path().join("tensorwire")).unwrap().collect();
    assert_eq!(names.len(), 1, "{names:?}");
    let path = Path::new(found["table"]["path"].as_str().unwrap());
    let file: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(file["worlds"], found["table"]["worlds"]);
    // Each collective, at whatever distances the processors had.
    let timings: Vec<&Value> =
        file["profiles"].as_array().unwrap().iter().flat_map(|p| p["timings"].as_array().unwrap()).collect();
    for name in
        ["all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "send_recv", "barrier"]
    {
        assert!(timings.iter().any(|t| t["collective"] == name && t["ranks"] == 2), "{name}: {timings:?}");
    }
    for timing in &timings {
        let knots = timing["p50"]["knots"].as_array().unwrap();
        let most = if timing["collective"] == "barrier" { 0 } else { 16 << 10 };
        assert_eq!(knots[knots.len() - 1][0], most, "{timing}");
    }
    assert_eq!(file["profiles"], found["profiles"]);
    let again = topo(cache.path(), "").output().unwrap();
    assert!(stdout(&again).contains("median microseconds a call"), "{}", stdout(&again));
    assert!(stdout(&again).contains(&format!("{}, measured ", path.display())), "{}", stdout(&again));

    // The ranks of a job follow it: here, one that says other than the constants.
    let world = &file["worlds"][0];
    assert_eq!(world["ranks"], 2);
    let one_shot = world["one_shot"].as_u64().unwrap();
    let text = std::fs::read_to_string(path).unwrap();
    let changed = text.replacen(&format!("\"one_shot\": {one_shot}"), "\"one_shot\": 2048", 1);
    let changed = changed.replacen(
        &format!("\"symmetric_one_shot\": {}", world["symmetric_one_shot"]),
        "\"symmetric_one_shot\": 4096",
        1,
    );
    std::fs::write(path, changed).unwrap();
    for (buffer, expected) in
        [("user", ["one_shot", "two_shot", "two_shot"]), ("symmetric", ["one_shot", "one_shot", "symmetric"])]
    {
        let mut bench =
            tensorwire(["bench", "--json", "--batches", "1", "--bytes", "2K,4K,8K", "--buffer", buffer]);
        let output =
            bench.env("XDG_CACHE_HOME", cache.path()).env_remove("TENSORWIRE_TABLE").output().unwrap();
        let text = stdout(&output);
        let chosen: Vec<Value> = text
            .lines()
            .map(|row| serde_json::from_str::<Value>(row).unwrap()["algorithm"].clone())
            .collect();
        assert_eq!(chosen, expected, "{buffer}: {}", stderr(&output));
    }
}

#[test]
fn links_are_measured_beside_what_is_known_and_followed() {
    let cache = tempfile::tempdir().unwrap();
    let file = cache.path().join("table.json");
    let probe = |line: &str| {
        let mut command = topo(cache.path(), line);
        command.env("TENSORWIRE_TABLE", &file).env_remove("TENSORWIRE_INTRA");
        command
    };
    let link = |found: &Value, transport: &str, class: &str| {
        let links = found["links"].as_array().unwrap();
        links.iter().find(|l| l["transport"] == transport && l["link"] == class).unwrap().clone()
    };
    let line = "--probe --transport tcp --bytes 1K --passes 1 --json";
    let found = json(&probe(line).output().unwrap());
    let profiles = found["profiles"].as_array().unwrap();
    let mut timings = profiles.iter().flat_map(|p| p["timings"].as_array().unwrap());
    assert!(timings.all(|t| t["transport"] == "tcp"), "{profiles:?}");
    let near = link(&found, "tcp", "intra");
    assert_eq!(near["source"], "table");
    assert!(near["alpha_us"].as_f64().unwrap() > 0.0 && near["gbps"].as_f64().unwrap() > 0.0, "{near}");
    assert_eq!(
        (&link(&found, "tcp", "inter")["source"], &found["table"]["source"]),
        (&"built_in".into(), &"built_in".into())
    );
    let samples = found["samples"].as_array().unwrap();
    assert!(samples.iter().all(|s| s["link"] == "intra" && s["median_us"].as_f64().unwrap() > 0.0));

    // Between the ranks of a job, on what count as two hosts; what was known of the other transport stays.
    let script = format!(
        "TENSORWIRE_HOST=$TENSORWIRE_RANK exec {} topo --probe --transport tcp",
        env!("CARGO_BIN_EXE_tensorwire")
    );
    let mut job = tensorwire(["launch", "--ranks", "2", "--transport", "tls", "--", "sh", "-c", &script]);
    let output = job.env("TENSORWIRE_TABLE", &file).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("measured over tls between hosts") && !text.contains("[rank 1]"), "{text}");
    let shown = json(&probe("--json").output().unwrap());
    assert_eq!(link(&shown, "tcp", "intra"), near);
    assert_eq!(link(&shown, "tls", "inter")["source"], "table");
    let given = json(&probe("--json").env("TENSORWIRE_INTRA", "5,6,7").output().unwrap());
    let given = link(&given, "tcp", "intra");
    assert_eq!((&given["source"], &given["gbps"]), (&"given".into(), &6.0.into()));

    for (line, why) in [
        ("--probe --transport tcp --ranks 1", "takes 2 ranks"),
        ("--probe --ranks 2", "--transport"),
        ("--transport tcp", "--probe"),
        ("--bytes 1K", "--probe"),
        ("--probe --bytes 0", "give bytes"),
        ("--probe --passes 0", "0 is not in"),
    ] {
        let refusal = refused(&probe(line).output().unwrap(), 2);
        assert!(refusal.contains(why), "{refusal}");
    }
    let mut job =
        tensorwire(["launch", "--ranks", "2", "--transport", "shm", "--", env!("CARGO_BIN_EXE_tensorwire")]);
    let output = job.args(["topo", "--probe", "--transport", "tcp"]).output().unwrap();
    assert!(stderr(&output).contains("launch it with --transport tcp"), "{}", stderr(&output));
}
