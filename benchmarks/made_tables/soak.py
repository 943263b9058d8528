"""The table of `bench_soak.py`."""

from __future__ import annotations

from made_tables.markdown import Report, block, cpu, header, line, released

_MEBI = 2**20
_ROWS = {
    "rss_bytes": "resident memory, MiB",
    "live_bytes": "allocated from glibc, MiB",
    "objects": "objects that Python's collector knows",
    "blocks": "blocks of Python's allocator",
    "descriptors": "open file descriptors",
    "threads": "threads",
}


def soak(report: Report) -> str:
    """What grew, how runs ended, and whether they can be made again."""
    rows = [_row(name, report["growth"][name]) for name in _ROWS]
    columns = ("", "after the warm-up", "at the end", "end over start", "trend")
    settings, drawn = report["settings"], report["drawn"]
    endings = "; ".join(f"{count} {how}" for how, count in sorted(report["endings"].items()))
    spots = report["spots"]
    equal = sum(spot["equal"] for spot in spots)
    styled = sum(any(spot["loras"].values()) for spot in spots)
    runs = (
        f"{settings['runs']} runs of seed {settings['seed']}, the first {settings['warm_up']} of "
        f"them to warm up: {endings}. Of those that are done {drawn['with LoRAs']} had LoRAs that "
        f"act, {drawn['guided']} were guided, and the pipeline's own loop drove "
        f"{drawn['pipeline-driven']}. Made again in fresh processes, {styled} with LoRAs among "
        f"them, {equal} of {len(spots)} were the same to the bit."
    )
    looks = (
        f"Medians of the first and the last fifth of the looks, one every {settings['cadence']} "
        "runs; `trend`: rise of the least-squares line from the first look to the last."
        f"{_latency(report)} {cpu(report)}; {released(report, 'torch', 'diffusers')}."
        f"{' ' * bool(report['notes'])}{report['notes']}"
    )
    return block([*header(columns), *rows], [runs], [looks])


def _row(name: str, entry: Report) -> str:
    scale, digits = (_MEBI, 1) if name.endswith("_bytes") else (1, 0)
    counts = (f"{entry[end] / scale:.{digits}f}" for end in ("start", "end"))
    shares = (f"{entry[way]:+.2%}" for way in ("by_windows", "by_trend"))
    return line((_ROWS[name], *counts, *shares))


def _latency(report: Report) -> str:
    """The last quarter over the first, where runs of a kind were in both."""
    ratio, cpu_ratio = report["latency"]["ratio"], report["latency"]["cpu_ratio"]
    if ratio is None:
        return ""
    both = " and ".join(
        f"{one['median']:.2f}x (quartiles {one['lower_quartile']:.2f} to "
        f"{one['upper_quartile']:.2f}) in {what}"
        for one, what in ((ratio, "wall time"), (cpu_ratio, "CPU time"))
    )
    return (
        f" Runs of the last quarter after the warm-up took, over those of the first, {both}: "
        f"median over {ratio['count']} kinds of runs."
    )
