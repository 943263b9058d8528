"""The ODE solver of a run, as a table probed from the diffusers scheduler."""

from ddit_rt.solver.table import Replacement, SolverTable, probe_scheduler, replay

__all__ = ["Replacement", "SolverTable", "probe_scheduler", "replay"]
