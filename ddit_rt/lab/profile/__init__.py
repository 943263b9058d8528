"""Where the time of a run goes, by patch size and phase, against what the machine can do."""
