//! The library that stands in for NCCL in tests, compiled.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Mutex, PoisonError};

const SOURCE: &str = include_str!("../nccl/fake_nccl.c");

/// The test library, compiled with these flags; the same file for the same flags.
pub(crate) fn test_library(flags: &[&str]) -> PathBuf {
    static COMPILING: Mutex<()> = Mutex::new(());
    let _alone = COMPILING.lock().unwrap_or_else(PoisonError::into_inner);
    // Another source, or other flags, make another file, so that one that is there will do.
    let mut name = 0xcbf2_9ce4_8422_2325u64;
    for byte in SOURCE.bytes().chain(flags.concat().bytes()) {
        name = (name ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3);
    }
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let file = folder.join(format!("fake-nccl-{name:016x}.so"));
    if file.exists() {
        return file;
    }
    let mut cc = Command::new("cc")
        .args(["-x", "c", "-std=gnu11", "-O2", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror"])
        .args(["-shared", "-fPIC", "-pthread"])
        .args(flags)
        .args(["-", "-lm", "-o"])
        // Renamed when it is whole, as others may compile it too.
        .arg(folder.join(format!("fake-nccl-{name:016x}-{}", std::process::id())))
        .stdin(Stdio::piped())
        .spawn()
        .expect("a C compiler, which linking takes anyway");
    cc.stdin.take().unwrap().write_all(SOURCE.as_bytes()).unwrap();
    assert!(cc.wait().unwrap().success(), "the test library doesn't compile");
    std::fs::rename(folder.join(format!("fake-nccl-{name:016x}-{}", std::process::id())), &file).unwrap();
    file
}
