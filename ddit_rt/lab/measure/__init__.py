"""Timing, fidelity and the records that reports are made of."""
