"""Who carries out a plan, other than the threads of this process."""
