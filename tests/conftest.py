"""Settings of the whole test run."""

import os

import hypothesis
import torch

if not torch.cuda.is_available():  # the Triton kernels then run in Triton's interpreter, which
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be said before anybody imports triton

# A busy machine is no fault of an example.
hypothesis.settings.register_profile("patient", hypothesis.settings(), deadline=None)
hypothesis.settings.load_profile("patient")
