"""Side-by-side measurements, each one command; every ratio is of medians taken in turns within one run."""

from pplr.apps.command_group import wait_briefly

wait_briefly()  # as the commands do, before torch is imported
