"""Many processes: on this machine, on several, and files for clusters that start them."""

from mosaicbert.launch.processes import add_launch_arguments, launch

__all__ = ["add_launch_arguments", "launch"]
