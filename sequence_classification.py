"""Fine-tune a BERT on one task: `python sequence_classification.py CONFIG [key=value ...]`.

Name your files in the YAML's `data` section (CSV, TSV, JSONL, parquet), or edit `build_my_data`
below, which is asked wherever the YAML has no such section. `mosaicbert classify` is the same
command with the bundled task in place of this function.
"""

import sys

from mosaicbert.data.examples import Examples, sample_examples
from mosaicbert.finetuning import command


# ----------------------------------------------------------------------------------------------
# Edit this function to train on your own data.
# ----------------------------------------------------------------------------------------------
def build_my_data(split: str) -> Examples:
    """The examples of `split`, the name that `train_loader.split` or `eval_loader.split` gives.

    Return `Examples.from_texts(texts, labels, names=["no", "yes"])`: texts as strings (or pairs of
    strings), labels as names or numbers, and the classes there are. Floats without `names` make it
    a regression, lists of names multi-label data. This default is the bundled task: what kind of
    source a passage comes from.
    """
    return sample_examples(split)


if __name__ == "__main__":
    sys.exit(command(sys.argv[1:], build_my_data))
