"""Fine-tune a BERT on GLUE: `python glue.py CONFIG [key=value ...]`, or `mosaicbert glue`."""

import sys

from mosaicbert.cli import run_command

if __name__ == "__main__":
    sys.exit(run_command("glue", sys.argv[1:]))
