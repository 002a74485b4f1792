"""Side-by-side measurements, each one command; every ratio is of medians taken in turns within one run."""

from pplr.apps.options import wait_passively

wait_passively()  # as the commands do, before torch is imported
