"""Records and summary of the GPU battery; `gpu_battery_report.py` is their command."""
