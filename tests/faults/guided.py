"""Bad input guided by coverage: the readers of `inputs.py` under atheris, which must be installed.

`python -m tests.faults guided --cases 100000 [--only yaml ...]`. Each reader works in a process of
its own, whose modules are instrumented as they are imported. An error that is not of
`MosaicBertError`'s family, too much memory or a hang ends it: a fault, with the input in the row.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
READERS = ("yaml", "time", "index", "shard", "csv", "jsonl", "parquet", "resume")
"""Those whose work is done in Python, where it can be seen; of parquet it is the edge alone."""
INSTRUMENTED = ("mosaicbert", "yaml", "omegaconf")
LONGEST = 4096


@dataclass
class Row:
    """What one reader did."""

    inputs: int = 0
    coverage: int = 0
    """Edges of the instrumented modules that were reached."""
    seconds: float = 0.0
    faults: list[str] = field(default_factory=list)


def run(
    seed: int,
    cases: int,
    only: Sequence[str] | None,
    seconds: float,
    after_each: Callable[[dict[str, Row]], None] = lambda rows: None,
) -> dict[str, Row]:
    """Feed the readers one after another; each has its share of the time."""
    rows: dict[str, Row] = {}
    names = [name for name in READERS if not only or name in only]
    began = time.monotonic()
    for place, name in enumerate(names):
        left = max(1.0, (seconds - (time.monotonic() - began)) / (len(names) - place))
        rows[name] = _feed(name, seed, cases, int(min(left, 1e6)))
        print(f"{name}: {vars(rows[name])}", flush=True)
        after_each(rows)
    return rows


def _feed(name: str, seed: int, cases: int, seconds: int) -> Row:
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="guided-") as home:
        (Path(home) / "seeds").mkdir()
        limits = [f"-runs={cases}", f"-max_total_time={seconds}", f"-max_len={LONGEST}"]
        limits += [f"-seed={seed + 1}", "-timeout=20", "-rss_limit_mb=4096", "-len_control=0"]
        words = [sys.executable, str(HERE / "guided.py"), name, *limits, "-artifact_prefix=./"]
        done = subprocess.run(
            [*words, "seeds"],
            cwd=home,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
        )
        said = done.stdout + done.stderr
        counts = [int(number) for number in re.findall(r"^#(\d+)\s", said, re.MULTILINE)]
        edges = [int(number) for number in re.findall(r"\bcov: (\d+)", said)]
        row = Row(max(counts, default=0), max(edges, default=0), round(time.monotonic() - began, 1))
        if done.returncode != 0:
            bad = [p.read_bytes()[:200] for p in Path(home).glob("*-*") if p.is_file()]
            row.faults.append(f"ends with {done.returncode}: {bad!r}: {said[-3000:]}")
        return row


def main() -> None:
    """One reader, in this process; the words are libFuzzer's."""
    import atheris

    sys.path[:0] = [str(HERE), str(HERE.parents[1] / "src")]
    os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with atheris.instrument_imports(include=list(INSTRUMENTED)):
        import inputs

        from mosaicbert.errors import MosaicBertError

        with tempfile.TemporaryDirectory(prefix="reader-") as folder:
            good, read = inputs.READERS[sys.argv[1]](Path(folder))
            for number, data in enumerate(good):
                Path(f"seeds/{number}").write_bytes(data)
                read(data)

            def once(data: bytes) -> None:
                with suppress(MosaicBertError):
                    read(data)

            atheris.Setup([sys.argv[0], *sys.argv[2:]], once)
            atheris.Fuzz()


if __name__ == "__main__":
    main()
