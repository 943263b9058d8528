"""Parts of the profiler of a run; `profile.py` is its command."""
