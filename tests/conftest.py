"""Eight fake CPU devices, no network, one compile cache for the whole session."""

import os
import socket
import tempfile
from importlib.metadata import version
from importlib.util import find_spec

os.environ["JAX_PLATFORMS"] = "cpu"
# A collective holds a thread of each device until all have come; with fewer threads than those at once, it may never end.
os.environ["PJRT_NPROC"] = "256"
os.environ["OMP_NUM_THREADS"] = "1"  # on matrices this small, the threads of NumPy's BLAS and of torch mostly wait in a loop
# Programs this small are sooner run than optimised; those of tests/promises/test_runs.py are compiled as a user's.
HASTY = ("--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
         " --xla_cpu_parallel_codegen_split_count=1")  # the other worker has the other core
# Its other emitter compiles twice as fast; later ones have no choice, and libtpu ends a process with flags that it does not know.
if version("jaxlib").startswith("0.10.") and not find_spec("libtpu"):
    HASTY += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + (
    f" {HASTY} --xla_force_host_platform_device_count=8"
    " --xla_cpu_collective_call_terminate_timeout_seconds=300")  # 40 s are too few for 8 devices on a busy core
CACHE = os.environ.setdefault("JAXLM_TEST_CACHE", os.path.join(tempfile.gettempdir(), f"jaxlm-tests-{os.getuid()}"))
os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(CACHE, "xla")
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAXLM_CACHE"] = CACHE

import pytest  # noqa: E402


def pytest_runtest_setup(item):
    """`parity("torch", "transformers")`: without these the test is skipped."""
    for mark in item.iter_markers("parity"):
        for package in mark.args:
            pytest.importorskip(package)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Only loopback and local sockets: a test that needs the network is a defect."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise AssertionError(f"a test tried to reach {address}")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


@pytest.fixture
def config(tmp_path):
    """The defaults, with data and its store under tmp_path, and tiny rows."""
    from configs import default
    from jaxlm.config import resolve

    c = default.get_config()
    c.data.store_dir, c.data.root = str(tmp_path / "stores"), str(tmp_path)
    c.seq_len, c.batch_size = 8, 4
    resolve(c)
    return c


@pytest.fixture
def jaxlm(capsys):
    """The command, run in this process where a test is not about processes: no second Python and JAX to start.
    (arguments) -> what it says on both outputs; it must end with 0."""
    from jaxlm.cli import main

    def run(*args):
        capsys.readouterr()
        code = main([str(a) for a in args])
        said = capsys.readouterr()
        assert code == 0, said.err
        return said.out + said.err

    return run
