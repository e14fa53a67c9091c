"""Pre-train a BERT: `python main.py CONFIG [key=value ...]`, or `mosaicbert pretrain`."""

import sys

from mosaicbert.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("pretrain", sys.argv[1:]))
