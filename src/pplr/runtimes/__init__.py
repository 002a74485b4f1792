"""Where a run happens: everything in this process, or across machines."""
