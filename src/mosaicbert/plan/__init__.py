"""What a run will need, before it runs: `mosaicbert plan`."""

from mosaicbert.plan.command import add_arguments, main, plan, read_plan

__all__ = ["add_arguments", "main", "plan", "read_plan"]
