"""The demo: an embedded model, and a run that compares ways to generate with it."""
