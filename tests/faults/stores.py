"""Faults of stores, disks, paths and clocks: each must give the right result or an error in words.

A case is one job (`jobs.py`) under one fault. Its command ends within the time limit, either with
what it makes when nothing is wrong, or with exit code 1 or 2 and an error that names the place; no
temporary file and no process is left. After an error the fault is lifted, and the same command must
then give the right result.
"""

import ctypes
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
from jobs import JOBS, ODD, Case, Job, Store, prepare

LIMIT_SECONDS = 60.0
FOR_EVER = 1_000_000
OF_ANSWERS = ("cut", "slow", "500", "503", "short", "stale", "stall", "403", "404")
FAULTS = (
    *OF_ANSWERS, "throttle",
    "disk full", "temporary disk full", "read-only", "not writable", "not readable",
    "odd path", "clock",
)  # fmt: skip
NEED_ROOT = ("disk full", "temporary disk full", "read-only")
"""They mount a small file system."""


@dataclass
class Row:
    """What one fault did to one job."""

    cases: int = 0
    hit: int = 0
    """In how many the fault was met: a small disk may be large enough."""
    right: int = 0
    refused: int = 0
    seconds_longest: float = 0.0
    faults: list[str] = field(default_factory=list)


class Broken:
    """A fault for one case: what it does before, in the command's process, and after."""

    def __init__(
        self, name: str, job: Job, case: Case, dice: random.Random, suite: "Suite"
    ) -> None:
        self.name, self.job, self.case, self.dice, self.suite = name, job, case, dice, suite
        self.mounted: Path | None = None
        self.closed: Path | None = None

    def begin(self) -> None:
        """Before the command."""
        if self.name in (*OF_ANSWERS, "throttle"):
            self.suite.rules([self._rule()])
        elif self.name in ("disk full", "temporary disk full"):
            self.mounted = self.case.folder / ("out" if self.name == "disk full" else "scratch")
            most = self.suite.needs[self.job.name, self.case.remote]
            size = 4096 * self.dice.randrange(1, 2 + most // 4096)
            _mount(self.mounted, f"size={size + _bytes_in(self.mounted)}")
        elif self.name == "read-only":
            self.mounted = self.case.out
            _mount(self.mounted, "size=64m")
            _remount(self.mounted, "ro")
        elif self.name in ("not writable", "not readable"):
            files = self.job.inputs(self.case)
            self.closed = self.case.out if self.name == "not writable" else self.dice.choice(files)
            self.closed.chmod(0o555 if self.name == "not writable" else 0)

    def setup(self) -> None:
        """In the command's process."""
        if self.name in ("not writable", "not readable") and os.getuid() == 0:
            _drop_privileges()
        if self.name == "clock":
            _jump(random.Random(self.dice.random()), self.case.folder / "jumped")

    def is_met(self, code: int | None) -> bool:
        """Whether the fault was there for the command to meet."""
        if self.name in (*OF_ANSWERS, "throttle"):
            return any(fault for _, _, fault in self.suite.rules([]))
        if self.name in ("disk full", "temporary disk full"):
            return code != 0
        return self.name != "clock" or (self.case.folder / "jumped").exists()

    def lift(self) -> None:
        """Let all be well again."""
        self.suite.rules([])
        if self.mounted and self.name == "read-only":
            _remount(self.mounted, "rw")
        elif self.mounted:
            _remount(self.mounted, "size=64m")
        if self.closed and self.closed.exists():
            self.closed.chmod(0o755 if self.closed.is_dir() else 0o644)

    def end(self) -> None:
        """After the case."""
        if self.mounted:
            subprocess.run(["umount", str(self.mounted)], check=True)

    def _rule(self) -> dict[str, Any]:
        """One of the requests that the job makes; once, twice or for ever."""
        if self.name == "throttle":
            times = self.dice.choice((3, 6, 12))
            return {"fault": "503", "method": "", "path": "/", "times": times}
        seen = self.suite.seen[self.job.name]
        if self.name in ("slow", "short", "stale"):
            seen = [(method, path) for method, path in seen if method in ("GET", "HEAD")]
        method, path = self.dice.choice(seen)
        path = path.replace("PREFIX", self.case.prefix)
        times = self.dice.choice((1, 1, 2, FOR_EVER))
        return {"fault": self.name, "method": method, "path": path, "times": times}


class Suite:
    """Runs cases in a folder and counts."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home / ODD / "home", seed
        self.home.mkdir(parents=True)
        self.home.chmod(0o755)
        self.rows: dict[str, Row] = {}
        self.seen: dict[str, list[tuple[str, str]]] = {}
        self.needs: dict[tuple[str, bool], int] = {}
        self._undisturbed: dict[tuple[str, bool], Any] = {}
        self._number = 0

    @contextmanager
    def ready(self) -> Iterator[None]:
        """With the store at work, and what the jobs read."""
        words = [sys.executable, str(Path(__file__).with_name("store_server.py"))]
        piped: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        piped |= {"stderr": subprocess.DEVNULL}
        with subprocess.Popen(words, **piped) as server:
            assert server.stdout
            try:
                store_port, self._proxy_port = json.loads(server.stdout.readline())
                self.store = Store(store_port)
                prepare(self.home, self.store, forks.start)
                forks.warm_up(("s3fs", "aiobotocore.session", "mosaicbert.report.png"))
                yield
            finally:
                server.terminate()

    def rules(self, rules: Sequence[dict[str, Any]]) -> list[list[str]]:
        """Tell the proxy what goes wrong from now on; the requests it had before."""
        body = json.dumps(rules).encode()
        found: list[list[str]] = json.loads(Store(self._proxy_port).ask("PUT", "/_rules", body))
        return found

    def case(self, name: str, job: Job, number: int) -> None:
        """One case; what is wrong with it is noted."""
        row = self.rows.setdefault(f"{name}, {job.name}", Row())
        dice = random.Random(f"{self.seed} {name} {job.name} {number}")
        remote = job.uses_store and (
            name in (*OF_ANSWERS, "throttle", "temporary disk full")
            or (name in ("disk full", "odd path", "clock") and dice.random() < 0.5)
        )
        expected = self.undisturbed(job, remote)
        case = self._new_case(job, remote, odd=name == "odd path")
        broken = Broken(name, job, case, dice, self)
        row.cases += 1
        try:
            broken.begin()
            began = time.monotonic()
            running = self._start(job, case, broken.setup)
            code = running.wait(LIMIT_SECONDS)
            row.seconds_longest = max(row.seconds_longest, round(time.monotonic() - began, 1))
            row.hit += broken.is_met(code)
            self._judge(name, job, case, running, expected)
            broken.lift()
            row.right += code == 0
            row.refused += code != 0
            if code != 0:
                again = self._start(job, case)
                if again.wait(LIMIT_SECONDS) != 0:
                    raise AssertionError(f"still fails once all is well: {again.said()[-1000:]}")
                self._judge(name, job, case, again, expected)
        except Exception as error:
            row.faults.append(f"case {number}: {type(error).__name__}: {error}")
            print(f"{name}, {job.name}, {row.faults[-1]}", flush=True)
        finally:
            broken.lift()
            broken.end()
        shutil.rmtree(case.folder)

    def undisturbed(self, job: Job, remote: bool) -> Any:
        """What the job makes when all is well, and what it asks the store for."""
        if (job.name, remote) not in self._undisturbed:
            case = self._new_case(job, remote)
            self.rules([])
            running = self._start(job, case)
            assert running.wait(LIMIT_SECONDS) == 0, running.said()
            found = [(method, path) for method, path, _ in self.rules([])]
            if remote:
                self.seen[job.name] = [(m, p.replace(case.prefix, "PREFIX")) for m, p in found]
            self.needs[job.name, remote] = _bytes_in(case.out)
            self._undisturbed[job.name, remote] = job.result(case)
            shutil.rmtree(case.folder)
        return self._undisturbed[job.name, remote]

    def _new_case(self, job: Job, remote: bool, odd: bool = False) -> Case:
        self._number += 1
        plain = f"case-{self._number:05d}"
        folder = self.home.parents[1] / (f"{plain} {ODD}" if odd else plain)
        case = Case(self.home, folder, self.store, f"{plain} {ODD}" if odd else plain, remote, odd)
        for path in (case.out, folder / "scratch"):
            path.mkdir(parents=True)
        job.prepare(case)
        return case

    def _start(
        self, job: Job, case: Case, setup: Callable[[], None] = lambda: None
    ) -> forks.Running:
        def both() -> None:
            _be_brief()
            setup()

        environ = {
            "TMPDIR": str(case.folder / "scratch"),
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._proxy_port}",
            **{"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test"},
            **{"AWS_DEFAULT_REGION": "us-east-1", "AWS_MAX_ATTEMPTS": "1"},
        }
        log = case.folder / "log.txt"
        log.unlink(missing_ok=True)
        return forks.start(job.words(case), case.out, setup=both, environ=environ, log=log)

    def _judge(
        self, fault: str, job: Job, case: Case, running: forks.Running, expected: Any
    ) -> None:
        """Raises AssertionError unless it ended as it should."""
        said = running.said()
        if running.code is None:
            running.kill()
            raise AssertionError(f"hangs: {said[-1000:]}")
        assert running.group_is_gone(), "processes are left"
        for word in ("Traceback", "Exception in", "never retrieved", "never awaited"):
            assert word not in said, f"no error in words: {said[-2500:]}"
        if running.code == 0:
            found = job.result(case)
            right = found == expected or job.also_right(fault, found, expected)
            assert right, f"other than undisturbed: {found!r:.300}, {expected!r:.300}"
        else:
            told = [line for line in said.splitlines() if line.startswith("mosaicbert: ")]
            assert running.code in (1, 2), f"ends with {running.code}: {said[-1000:]}"
            assert told, f"no error in words: {said[-1000:]}"
            places = (*job.places, str(case.home))
            assert any(place in told[-1] for place in places), f"names no place: {told[-1]}"
        left = [*case.folder.rglob(".*"), *case.folder.rglob("*.tmp"), *case.folder.rglob("*.part")]
        left += [path for path in (case.folder / "scratch").iterdir() if "torch" not in path.name]
        assert not left, f"left behind: {[str(path.relative_to(case.folder)) for path in left]}"


# --- faults ---------------------------------------------------------------------------------------


def _be_brief() -> None:
    """Waits between tries are short, and the client's own tries few: ours are tested."""
    import s3fs

    from mosaicbert import retrying
    from mosaicbert.data import download
    from mosaicbert.predict import files

    download.BACKOFF_SECONDS = 0.01
    retrying.WAITS = (0.01, 0.02, 0.05)
    files.ROWS_AT_ONCE = 400
    client = s3fs.S3FileSystem
    client.retries, client.connect_timeout, client.read_timeout = 1, 2, 2


def _jump(dice: random.Random, mark: Path) -> None:
    """The wall clock jumps now and then, to and fro, by up to ten years."""
    seconds, nanoseconds, offset = time.time, time.time_ns, [0]

    def shift() -> int:
        if dice.random() < 0.2:
            offset[0] = dice.choice((0, 1, -1, 3600, -3600, 86_400, 315_360_000, -315_360_000))
            mark.touch()
        return offset[0]

    time.time = lambda: seconds() + shift()
    time.time_ns = lambda: nanoseconds() + shift() * 10**9


def _drop_privileges() -> None:
    """Root without capabilities: file modes hold for it too."""
    header, none = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    if ctypes.CDLL(None, use_errno=True).capset(header, none) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _mount(folder: Path, options: str) -> None:
    """A file system in memory over a folder, with what the folder holds."""
    aside = folder.with_name(f"{folder.name}-aside")
    shutil.copytree(folder, aside)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=True)
    shutil.copytree(aside, folder, dirs_exist_ok=True)
    shutil.rmtree(aside)


def _remount(folder: Path, option: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{option}", str(folder)], check=True)


def _bytes_in(folder: Path) -> int:
    """In pages, as a file system in memory counts."""
    return sum(4096 + -(-path.stat().st_size // 4096) * 4096 for path in folder.rglob("*"))


def run(
    home: Path,
    seed: int,
    cases: int,
    only: Sequence[str] | None,
    seconds: float,
    after_round: Callable[[dict[str, Row]], None] = lambda rows: None,
) -> dict[str, Row]:
    """Every fault with every job, round after round, until so many faults were met."""
    suite = Suite(home, seed)
    pairs = [(fault, job) for fault in FAULTS for job in JOBS.values()]
    pairs = [pair for pair in pairs if _makes_sense(*pair)]
    pairs = [(f, job) for f, job in pairs if not only or f in only or job.name in only]
    random.Random(seed).shuffle(pairs)
    began, number = time.monotonic(), 0

    def is_over() -> bool:
        met = sum(row.hit for row in suite.rows.values())
        return met >= cases or time.monotonic() - began >= seconds

    with suite.ready():
        while not is_over():
            for fault, job in pairs:
                suite.case(fault, job, number)
                if is_over():
                    break
            number += 1
            met = sum(row.hit for row in suite.rows.values())
            print(f"{time.monotonic() - began:6.0f} s  {met} faults met", flush=True)
            after_round(suite.rows)
    return suite.rows


def _makes_sense(fault: str, job: Job) -> bool:
    if fault in NEED_ROOT and os.getuid() != 0:
        return False
    if fault == "temporary disk full":
        return job.name in ("checkpoint", "resume", "predict", "export")
    return job.uses_store or fault not in (*OF_ANSWERS, "throttle")
