"""Side-by-side measurements of plans: quality, speed, and how sure they are."""

from ddit_rt.evaluation.intervals import Interval, mean_interval, share_interval

__all__ = ["Interval", "mean_interval", "share_interval"]
