"""Kill -9 at random moments: each kind of work is killed and repeated until it ends.

Then what it made must be, to the byte, what an undisturbed run made; and after each kill what lies
there must be whole or not there.
"""

import os
import random
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks
import works
from works import Work

LIMIT_SECONDS = 180.0
"""Of one command; a command that takes longer hangs."""


@dataclass
class Tally:
    """What happened to one kind of work."""

    seconds_undisturbed: float = 0.0
    cases: int = 0
    kills: int = 0
    kills_at_a_file: int = 0
    kills_of_one_rank: int = 0
    ended_before_the_kill: int = 0
    faults: list[str] = field(default_factory=list)


class Crashes:
    """Runs cases in a folder and counts."""

    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.seed = home, seed
        self.tallies: dict[str, Tally] = {}
        self._undisturbed: dict[str, Any] = {}
        self._prepared = False

    def work(self, name: str) -> Work:
        """A kind of work by its name; what it reads is made when first asked for."""
        if not self._prepared:
            works.prepare(self.home)
            self._prepared = True
        return works.KINDS[name](self.home)

    def undisturbed(self, work: Work) -> Any:
        """What the work makes when nobody kills it, and how long that takes."""
        if work.name not in self._undisturbed:
            tally = self.tallies.setdefault(work.name, Tally())
            folder = self._new_folder(f"{work.name}-undisturbed")
            seconds = []
            for _ in range(2):  # the second time is the shorter one: files are in memory
                shutil.rmtree(folder)
                folder.mkdir()
                running = work.start(folder)
                began = time.monotonic()
                if running.wait(LIMIT_SECONDS) != 0:
                    raise RuntimeError(f"{work.name} fails undisturbed: {running.said()}")
                seconds.append(time.monotonic() - began)
            tally.seconds_undisturbed = round(min(seconds), 2)
            self._undisturbed[work.name] = work.result(folder)
            shutil.rmtree(folder)
        return self._undisturbed[work.name]

    def case(self, name: str, number: int) -> int:
        """One case: some kills, then to the end. Gives the number of kills; faults are noted."""
        work = self.work(name)
        expected = self.undisturbed(work)
        tally = self.tallies[name]
        tally.cases += 1
        moments = random.Random(f"{self.seed} {name} {number}")
        folder = self._new_folder(f"{name}-{number}")
        kills_before = tally.kills
        try:
            seen: Any = None
            for _ in range(moments.choice((1, 2, 3, 4))):
                running = work.start(folder, moments)
                self._kill(work, running, folder, moments, tally)
                seen = work.after_kill(folder, seen)
            running = work.start(folder, moments)
            code = running.wait(LIMIT_SECONDS)
            if code != 0:
                running.kill()
                how = "hangs" if code is None else f"ends with {code}"
                raise AssertionError(f"the same command {how}: {running.said()[-2000:]}")
            found = work.result(folder)
            difference = differences(expected, found)
            if difference:
                raise AssertionError(f"other than undisturbed: {difference}")
            if left := work.litter(folder):
                raise AssertionError(f"left behind: {left}")
        except Exception as error:
            tally.faults.append(f"case {number}: {type(error).__name__}: {error}")
            print(f"{name}, {tally.faults[-1]}", flush=True)
        else:
            shutil.rmtree(folder)
        return tally.kills - kills_before

    def _kill(
        self,
        work: Work,
        running: forks.Running,
        folder: Path,
        moments: random.Random,
        tally: Tally,
    ) -> None:
        """At a random time, or a random moment after a file of some kind has appeared."""
        seconds = tally.seconds_undisturbed
        at_a_file = bool(work.files) and moments.random() < 0.5
        if at_a_file:
            pattern = moments.choice(work.files)
            skip = moments.randrange(1, 6)
            delay = moments.uniform(0, min(0.02, seconds / 4))
            running.wait(3 * seconds + 5, _nth_appearance(folder, pattern, skip))
            running.wait(delay)
        else:
            running.wait(moments.uniform(0, 1.05 * seconds))
        other = folder / "rank1.pid"
        alone = work.ranks > 1 and moments.random() < 0.4 and other.exists()
        if alone and running.poll() is None and _kill_one(running, int(other.read_text())):
            tally.kills_of_one_rank += 1
            tally.kills += 1
        elif running.kill():
            tally.kills += 1
            tally.kills_at_a_file += at_a_file
        else:
            tally.ended_before_the_kill += 1
        if not running.group_is_gone():
            raise AssertionError(f"processes outlive the kill: {forks.members(running.pid)}")

    def _new_folder(self, name: str) -> Path:
        folder = self.home / "cases" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder


def _kill_one(running: forks.Running, pid: int) -> bool:
    """Kill rank 1 alone: rank 0 must find out and end with an error within a minute.

    False if rank 1 had ended before.
    """
    if pid not in forks.members(running.pid):
        return False
    os.kill(pid, signal.SIGKILL)
    if running.wait(60) is None:
        running.kill()
        raise AssertionError("rank 0 waits for ever for a rank that was killed")
    if running.code == 0 and "pre-trained" not in running.said():
        raise AssertionError("rank 0 ends with 0 though rank 1 was killed")
    return True


def _nth_appearance(folder: Path, pattern: str, number: int) -> Callable[[], bool]:
    """True once so many different names have matched."""
    seen: set[Path] = set()

    def look() -> bool:
        seen.update(folder.glob(pattern))
        return len(seen) >= number

    return look


def differences(expected: Any, found: Any) -> str:
    """The first few keys that differ."""
    if expected == found:
        return ""
    if not isinstance(expected, dict) or not isinstance(found, dict):
        return f"{expected!r:.300} and {found!r:.300}"
    keys = [key for key in {**expected, **found} if expected.get(key) != found.get(key)]
    return "; ".join(f"{k}: {expected.get(k)!r:.200} and {found.get(k)!r:.200}" for k in keys[:4])


def run_cases(
    home: Path,
    seed: int,
    kills: int,
    kinds: Sequence[str],
    seconds: float,
    after_round: Callable[[dict[str, Tally]], None] = lambda tallies: None,
) -> dict[str, Tally]:
    """Cases of all kinds in turn until so many kills have hit, or the time is over."""
    crashes = Crashes(home, seed)
    began, done, number = time.monotonic(), 0, 0
    while done < kills and time.monotonic() - began < seconds:
        for kind in kinds:
            done += crashes.case(kind, number)
            if done >= kills or time.monotonic() - began >= seconds:
                break
        number += 1
        told = {name: tally.kills for name, tally in crashes.tallies.items()}
        print(f"{time.monotonic() - began:6.0f} s  {done} kills: {told}", flush=True)
        after_round(crashes.tallies)
    return crashes.tallies
