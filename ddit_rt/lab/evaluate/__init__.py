"""Side-by-side measurements of plans: quality, speed, and how sure they are."""

from ddit_rt.lab.evaluate.frechet import frechet_distance, gaussian
from ddit_rt.lab.evaluate.intervals import Interval, mean_interval, share_interval

__all__ = ["Interval", "frechet_distance", "gaussian", "mean_interval", "share_interval"]
