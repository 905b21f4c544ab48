//! Where NCCL is looked for, and what is asked of it.

use std::ffi::{CStr, OsStr, c_int};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use tensorwire_core::{Error, Result};

use super::sys::{self, Table};

/// The file's name, which is also what the loader is asked for.
const NAME: &str = "libnccl.so.2";
/// The variable that names the file.
const VARIABLE: &str = "TENSORWIRE_NCCL_LIB";
/// What a library exports that stands in for NCCL in tests: a text that says so.
const TEST_MARK: &str = "tensorwire_test_library";

/// The oldest version of NCCL that will do: the first with `ncclCommSplit`.
pub const MINIMUM: Version = Version { major: 2, minor: 18, patch: 1 };
/// The first that reduces fp8.
const FP8: Version = Version { major: 2, minor: 24, patch: 0 };

/// A version of NCCL.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version {
    /// 2, so far.
    pub major: u32,
    /// Such as 27 in 2.27.3.
    pub minor: u32,
    /// Such as 3 in 2.27.3.
    pub patch: u32,
}

impl Version {
    /// As `ncclGetVersion` gives it: 22703, and 2708 up to 2.8.
    pub const fn from_code(code: u32) -> Version {
        let unit = if code < 10_000 { 1000 } else { 10_000 };
        Version { major: code / unit, minor: code % unit / 100, patch: code % 100 }
    }

    /// Whether it reduces fp8: from 2.24 on, on devices of compute capability 9.0 and later.
    pub fn reduces_fp8(self) -> bool {
        self >= FP8
    }

    /// The number that stands for it in NCCL, from 2.9 on.
    pub const fn code(self) -> u32 {
        self.major * 10_000 + self.minor * 100 + self.patch
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}.{}", self.major, self.minor, self.patch)
    }
}

/// NCCL, loaded. It stays loaded until the process ends, as its threads may.
#[derive(Clone, Debug)]
pub struct Library(Arc<Loaded>);

#[derive(Debug)]
struct Loaded {
    table: Table,
    version: Version,
    path: PathBuf,
    is_test: bool,
}

impl Library {
    /// NCCL where it is found first:
    ///
    /// 1. the file that `TENSORWIRE_NCCL_LIB` names, and then no other;
    /// 2. where the loader looks (`LD_LIBRARY_PATH`, `ld.so.conf`);
    /// 3. the conda environment in use (`CONDA_PREFIX`);
    /// 4. pip's package nvidia-nccl, of the virtual environment in use (`VIRTUAL_ENV`), of the user, and of the system;
    /// 5. /usr/lib and its like, and CUDA's own folder.
    ///
    /// # Errors
    /// [`Error::Unavailable`], with what was looked for and where, and what was wrong with what was there.
    pub fn find() -> Result<Library> {
        if let Some(file) = std::env::var_os(VARIABLE).filter(|file| !file.is_empty()) {
            return Library::load(Path::new(&file)).map_err(|e| match e {
                Error::Unavailable { what, why } => {
                    Error::Unavailable { what, why: format!("{why} ({VARIABLE} names it)") }
                }
                other => other,
            });
        }
        let places = places(|name| std::env::var_os(name).map(PathBuf::from), Path::new("/"));
        let mut wrong = match open(Path::new(NAME)) {
            Ok(library) => return Ok(library),
            Err(LoadError::Absent(_)) => Vec::new(),
            Err(other) => vec![other.to_string()],
        };
        for file in places.iter().map(|place| place.join(NAME)).filter(|file| file.exists()) {
            match open(&file) {
                Ok(library) => return Ok(library),
                Err(other) => wrong.push(other.to_string()),
            }
        }
        let places: Vec<_> = places.iter().map(|p| p.display().to_string()).collect();
        let mut why = format!(
            "{NAME} was looked for where the loader looks, and in {}; set {VARIABLE} to the file",
            places.join(", ")
        );
        if !wrong.is_empty() {
            why = format!("{}; {why}", wrong.join("; "));
        }
        Err(Error::Unavailable { what: "NCCL", why })
    }

    /// NCCL from this file.
    ///
    /// # Errors
    /// [`Error::Unavailable`] if it isn't there, isn't NCCL, or is older than [`MINIMUM`].
    pub fn load(file: &Path) -> Result<Library> {
        open(file).map_err(|e| Error::Unavailable { what: "NCCL", why: e.to_string() })
    }

    /// Its version.
    pub fn version(&self) -> Version {
        self.0.version
    }

    /// The file, or its name where the loader found it.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Whether it is no NCCL but stands in for it in tests, over host memory: it exports the mark
    /// `tensorwire_test_library`.
    pub fn is_test(&self) -> bool {
        self.0.is_test
    }

    /// Whether memory can be registered, and had from it already registered: from 2.19 on.
    pub fn registers(&self) -> bool {
        let table = self.table();
        table.mem_alloc.is_some()
            && table.mem_free.is_some()
            && table.register.is_some()
            && table.deregister.is_some()
    }

    pub(crate) fn table(&self) -> &Table {
        &self.0.table
    }

    /// What NCCL says about one of its results, with the last error that it noted.
    pub(crate) fn explain(&self, code: sys::Code) -> String {
        // SAFETY: (1) it takes any number; (2) what it returns is a constant of the library's, which stays loaded.
        let text = unsafe { text((self.table().error_string)(code)) };
        // SAFETY: (1) it takes no communicator too; (2) the text is copied before another call of this thread's can change it.
        let last = unsafe { text_or_none((self.table().last_error)(std::ptr::null_mut())) };
        let hint = match code {
            sys::UNHANDLED_CUDA_ERROR => {
                "; is there a GPU, with a driver as new as this NCCL's CUDA? NCCL_DEBUG=INFO says more"
            }
            sys::REMOTE_ERROR => "; another rank's process, or the network to it, is gone",
            _ => "",
        };
        match last.filter(|last| !last.is_empty()) {
            Some(last) => format!("{text} ({}){hint}", last.trim()),
            None => format!("{text}{hint}"),
        }
    }
}

impl fmt::Display for Library {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let what = if self.is_test() { "a test library in NCCL's place," } else { "NCCL" };
        write!(f, "{what} {} ({})", self.version(), self.path().display())
    }
}

/// # Safety
/// 1. `text` is null or a C string. 2. It stays as it is meanwhile.
unsafe fn text_or_none(text: *const std::ffi::c_char) -> Option<String> {
    // SAFETY: it isn't null; else as the caller vouches.
    (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned())
}

/// # Safety
/// As for [`text_or_none`].
unsafe fn text(text: *const std::ffi::c_char) -> String {
    // SAFETY: as the caller vouches.
    unsafe { text_or_none(text) }.unwrap_or_default()
}

/// Why a file is no NCCL that will do.
enum LoadError {
    /// The loader finds no such file.
    Absent(String),
    Refused(String),
}

impl fmt::Display for LoadError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (LoadError::Absent(why) | LoadError::Refused(why)) = self;
        f.write_str(why)
    }
}

fn open(file: &Path) -> Result<Library, LoadError> {
    let at = file.display();
    // SAFETY: loading runs the library's constructors. NCCL's only prepare its own data; a file that the user names in
    // NCCL's place is code that the user asks to run.
    let library = unsafe { libloading::Library::new(file) }.map_err(|e| {
        // The loader's own words are behind the error's.
        let loader = std::error::Error::source(&e).map_or_else(|| e.to_string(), ToString::to_string);
        let why = format!("{at} can't be loaded: {}", loader.trim());
        let absent = why.contains("No such file") && !file.exists();
        if absent { LoadError::Absent(why) } else { LoadError::Refused(why) }
    })?;
    // SAFETY: (1) a library of that name with those functions is taken for NCCL; (2) it is never unloaded, below.
    let table = unsafe { Table::load(&library) };
    // SAFETY: the mark is a constant, looked at for being there.
    let is_test = unsafe { library.get::<*const std::ffi::c_char>(TEST_MARK) }.is_ok();
    // It and its threads stay until the process ends.
    std::mem::forget(library);
    let table = table.map_err(|missing| {
        LoadError::Refused(format!(
            "{at} is no NCCL of version {MINIMUM} or later: it lacks {}",
            missing.join(", ")
        ))
    })?;
    let mut code: c_int = 0;
    // SAFETY: it writes one int.
    let result = unsafe { (table.get_version)(&mut code) };
    let version = Version::from_code(u32::try_from(code).unwrap_or(0));
    if result != sys::SUCCESS || version < MINIMUM {
        return Err(LoadError::Refused(format!("{at} is NCCL {version}: {MINIMUM} or later is needed")));
    }
    Ok(Library(Arc::new(Loaded { table, version, path: file.to_owned(), is_test })))
}

/// The folders in which NCCL may be, beside those of the loader, in order; those of a pattern that are there.
fn places(variable: impl Fn(&str) -> Option<PathBuf>, root: &Path) -> Vec<PathBuf> {
    let mut places = Vec::new();
    if let Some(prefix) = variable("CONDA_PREFIX") {
        places.push(prefix.join("lib"));
    }
    let wheel = Path::new("nvidia/nccl/lib");
    // lib/python3.12/site-packages, and Debian's dist-packages.
    let pythons = |prefix: &Path, kind: &str| -> Vec<PathBuf> {
        let versions = std::fs::read_dir(prefix.join("lib")).into_iter().flatten().flatten();
        let named = |name: &OsStr| name.as_bytes().starts_with(b"python3");
        let mut found: Vec<_> = versions.filter(|v| named(&v.file_name())).map(|v| v.path()).collect();
        found.sort();
        found.iter().rev().map(|python| python.join(kind).join(wheel)).collect()
    };
    for prefix in [variable("VIRTUAL_ENV"), variable("CONDA_PREFIX")].into_iter().flatten() {
        places.extend(pythons(&prefix, "site-packages"));
    }
    if let Some(home) = variable("HOME") {
        places.extend(pythons(&home.join(".local"), "site-packages"));
    }
    for prefix in [root.join("usr/local"), root.join("usr")] {
        places.extend(pythons(&prefix, "site-packages"));
        places.extend(pythons(&prefix, "dist-packages"));
    }
    let system = [
        "usr/lib/x86_64-linux-gnu",
        "usr/lib/aarch64-linux-gnu",
        "usr/lib64",
        "usr/lib",
        "usr/local/lib",
        "usr/local/cuda/lib64",
    ];
    places.extend(system.map(|place| root.join(place)));
    places
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_as_nccl_writes_them() {
        assert_eq!(Version::from_code(22703).to_string(), "2.27.3");
        assert_eq!(Version::from_code(2708).to_string(), "2.7.8");
        assert_eq!(Version::from_code(21801), MINIMUM);
        assert_eq!(MINIMUM.code(), 21801);
        assert!(Version::from_code(2708) < MINIMUM && Version::from_code(23203) > FP8);
    }

    #[test]
    fn places_are_in_the_documented_order() {
        let root = std::env::temp_dir().join(format!("tensorwire-places-{}", std::process::id()));
        for folder in
            ["venv/lib/python3.12", "home/.local/lib/python3.9", "usr/lib/python3", "venv/lib/other"]
        {
            std::fs::create_dir_all(root.join(folder)).unwrap();
        }
        let variable = |name: &str| match name {
            "CONDA_PREFIX" => Some(root.join("conda")),
            "VIRTUAL_ENV" => Some(root.join("venv")),
            "HOME" => Some(root.join("home")),
            _ => None,
        };
        let found: Vec<_> = places(variable, &root)
            .into_iter()
            .map(|p| p.strip_prefix(&root).unwrap().display().to_string())
            .collect();
        std::fs::remove_dir_all(&root).unwrap();
        let expected = [
            "conda/lib",
            "venv/lib/python3.12/site-packages/nvidia/nccl/lib",
            "home/.local/lib/python3.9/site-packages/nvidia/nccl/lib",
            "usr/lib/python3/site-packages/nvidia/nccl/lib",
            "usr/lib/python3/dist-packages/nvidia/nccl/lib",
            "usr/lib/x86_64-linux-gnu",
        ];
        assert_eq!(found[..6], expected);
    }

    #[test]
    fn what_is_not_there_or_no_nccl_is_refused_with_its_name() {
        let error = Library::load(Path::new("/nowhere/libnccl.so.2")).unwrap_err();
        assert!(matches!(error, Error::Unavailable { .. }), "{error}");
        assert!(error.to_string().contains("NCCL can't be used: /nowhere/libnccl.so.2"), "{error}");
        let error = Library::load(Path::new("libc.so.6")).unwrap_err().to_string();
        assert!(error.contains("it lacks ncclGetVersion, ncclGetUniqueId"), "{error}");
    }
}
