"""Parts of the profiler of a run; `profile_run.py` is its command."""
