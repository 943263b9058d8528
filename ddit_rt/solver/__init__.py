"""The ODE solver of a run, as a table probed from the diffusers scheduler."""

from ddit_rt.solver.table import SolverTable, own_steps, probe_scheduler, replay, solver_of

__all__ = ["SolverTable", "own_steps", "probe_scheduler", "replay", "solver_of"]
