//! Finding NCCL, and what is said where it isn't there or won't do.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tensorwire::collectives::device::{Device, DeviceOptions, EngineChoice};
use tensorwire::collectives::nccl::Library;
use tensorwire::{Communicator, Error, ReduceOp};

use super::test_library;

#[test]
fn the_test_library_says_that_it_is_one() {
    let library = Library::load(&test_library(&[])).unwrap();
    assert!(library.is_test() && library.registers());
    assert!(library.to_string().starts_with("a test library in NCCL's place, 2.27.3"), "{library}");
}

#[test]
fn versions_that_will_not_do_are_refused() {
    let old = Library::load(&test_library(&["-DFAKE_VERSION=21705"])).unwrap_err().to_string();
    assert!(old.contains("is NCCL 2.17.5: 2.18.1 or later is needed"), "{old}");
    let older = Library::load(&test_library(&["-DFAKE_VERSION=2708"])).unwrap_err().to_string();
    assert!(older.contains("is NCCL 2.7.8: 2.18.1"), "{older}");
    let lacks = Library::load(&test_library(&["-DFAKE_NO_SPLIT"])).unwrap_err().to_string();
    assert!(lacks.contains("it lacks ncclCommSplit"), "{lacks}");
}

/// What later versions have is asked for only where it is used.
#[test]
fn functions_and_types_of_later_versions_are_missed_when_they_are_used() {
    let file = test_library(&["-DFAKE_VERSION=21801", "-DFAKE_NO_REGISTER"]);
    let library = Library::load(&file).unwrap();
    assert!(!library.registers());
    let options = DeviceOptions {
        engine: EngineChoice::Nccl,
        library: Some(library),
        timeout: Duration::from_secs(30),
    };
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let stream = Device::host().stream().unwrap();
    let group = comm.on_device_with(&stream.device(), &options).unwrap();
    let mut x = group.alloc::<float8::F8E4M3>(&stream, 5).unwrap();
    assert!(!group.register(&mut x).unwrap());
    let error = group.all_reduce(&mut x, ReduceOp::Sum).unwrap_err().to_string();
    assert!(error.contains("NCCL 2.18.1 doesn't reduce f8e4m3: 2.24 and later do"), "{error}");
    group.broadcast(&mut x, 0).unwrap();
    group.synchronize().unwrap();
}

#[test]
fn without_nccl_groups_go_by_way_of_the_host_and_say_why() {
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let device = Device::host();
    let group = comm.on_device(&device).unwrap();
    let engine = group.engine().to_string();
    assert!(engine.starts_with("by way of the host, since on rank 0 "), "{engine}");
    let asked = DeviceOptions { engine: EngineChoice::Nccl, ..Default::default() };
    let error = comm.on_device_with(&device, &asked).unwrap_err();
    assert!(matches!(error, Error::Unavailable { what: "NCCL", .. }), "{error}");
}

/// The variable is the process's: looked at in one of its own.
#[test]
fn the_variable_names_the_file_and_no_other_is_taken() {
    let run = |file: &Path| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "devices::loading::find", "--nocapture", "--include-ignored"])
            .env("TENSORWIRE_NCCL_LIB", file)
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap()
    };
    let file = test_library(&[]);
    let found = run(&file);
    assert!(found.contains(&format!("found {}", file.display())), "{found}");
    let missing = run(Path::new("/nowhere/libnccl.so.2"));
    assert!(missing.contains("NCCL can't be used: /nowhere/libnccl.so.2 can't be loaded"), "{missing}");
    assert!(missing.contains("No such file or directory (TENSORWIRE_NCCL_LIB names it)"), "{missing}");
    let nothing = run(Path::new(""));
    assert!(
        nothing.contains("found ") || nothing.contains("was looked for where the loader looks, and in "),
        "{nothing}"
    );
}

#[test]
#[ignore = "of use to the test above"]
fn find() {
    match Library::find() {
        Ok(library) => println!("found {}", library.path().display()),
        Err(e) => println!("{e}"),
    }
}

/// With the real library, such as that of pip's nvidia-nccl-cu12: `TENSORWIRE_TEST_NCCL=.../libnccl.so.2`.
#[test]
fn the_real_library_has_the_functions_and_says_that_there_is_no_gpu() {
    let Some(file) = std::env::var_os("TENSORWIRE_TEST_NCCL") else {
        println!("skipped: TENSORWIRE_TEST_NCCL names no libnccl.so.2");
        return;
    };
    let library = Library::load(Path::new(&file)).unwrap();
    assert!(!library.is_test() && library.registers(), "{library}");
    println!("{library}");
    let comm = Communicator::in_process(1).unwrap().pop().unwrap();
    let options = DeviceOptions {
        engine: EngineChoice::Nccl,
        library: Some(library),
        timeout: Duration::from_secs(30),
    };
    let error = comm.on_device_with(&Device::host(), &options).unwrap_err().to_string();
    assert!(error.contains("its device is host memory, which NCCL can't use"), "{error}");
}
