"""The long forms: `python -m tests.faults crash --cases 500 --seed 0 [--record FILE.json]`.

`crash` kills commands at random moments; `stores` lets stores, disks, paths and clocks go wrong;
`inputs` feeds readers with random bad input, `guided` with input that coverage guides (by atheris).
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from mosaicbert.train.environment import describe_environment


def main() -> int:
    """Run one of the long forms; the exit code tells whether there was a fault."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "what", nargs="?", default="crash", choices=("crash", "stores", "inputs", "guided")
    )
    parser.add_argument(
        "--cases", type=int, default=500, help="kills, faults, or inputs for each reader"
    )
    parser.add_argument("--seed", type=int, default=0, help="of moments and inputs")
    parser.add_argument(
        "--only", nargs="+", metavar="KIND", help="some kinds of work, fault or reader"
    )
    parser.add_argument("--seconds", type=float, default=1e9, help="most time to take")
    parser.add_argument("--record", type=Path, help="JSON to write")
    args = parser.parse_args()
    began = time.monotonic()

    def write(rows: dict[str, Any]) -> None:
        record = {
            "claim": f"python -m tests.faults {args.what} --cases {args.cases} --seed {args.seed}",
            "seconds": round(time.monotonic() - began),
            "environment": describe_environment() | {"command": None},
            "rows": {name: vars(row) for name, row in rows.items()},
        }
        if args.record:
            args.record.write_text(json.dumps(record, indent=1) + "\n")

    if args.what == "crash":
        import crash
        import works

        with tempfile.TemporaryDirectory(prefix="faults-") as home:
            kinds = args.only or list(works.KINDS)
            rows: dict[str, Any] = dict(
                crash.run_cases(Path(home), args.seed, args.cases, kinds, args.seconds, write)
            )
    elif args.what == "stores":
        import stores

        with tempfile.TemporaryDirectory(prefix="faults-") as home:
            Path(home).chmod(0o755)
            rows = dict(
                stores.run(Path(home), args.seed, args.cases, args.only, args.seconds, write)
            )
    elif args.what == "guided":
        import guided

        rows = dict(guided.run(args.seed, args.cases, args.only, args.seconds, write))
    else:
        import inputs

        rows = dict(inputs.run(args.seed, args.cases, args.only, args.seconds, write))
    write(rows)
    faults = [f"{name}: {fault}" for name, row in rows.items() for fault in row.faults]
    print("\n".join([*faults, f"{len(faults)} faults"]))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
