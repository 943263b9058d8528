"""Tables of `bench_serving.py`."""

from __future__ import annotations

from made_tables.markdown import Report, block, cpu, header, line, released

_WAYS = {"alone": "a run for each", "batched": "batched"}


def serving_cpu(report: Report) -> str:
    """What a request costs beside the engine's own call, and twice the load that can be borne."""
    rows = [_row(way, report) for way in report["load"]]
    columns = (
        "",
        "engine",
        "encoded",
        "by HTTP",
        "offered, a second",
        "made",
        "refused",
        "of images",
        "RSS",
    )
    first = report["load"]["alone"]
    started, lora = report["start"], report["lora"]
    note = (
        "Milliseconds, p50 / p95: of calls one after the other (`engine`, the same and its "
        "image encoded, `by HTTP`), and of "
        f"answers with an image under load (`of images`). Load: {first['seconds'] / 60:.0f} min at "
        "twice the rate that the server reaches, a queue of eight; `refused` by 429 or 503. RSS: "
        "MiB after a warm-up by the same load, at most, and at the end. From the command to the "
        "first image: "
        f"{started['seconds']:.1f} s, of which importing the libraries alone takes "
        f"{started['import_seconds']:.1f} s. An image with a LoRA of {lora['layers']} layers: "
        f"{lora['first']:.0f} ms the first time ({lora['first_of_process']:.0f} ms where it is the "
        f"first LoRA of the process), {lora['next']:.0f} ms the next. "
        f"Demo model, {report['steps']} steps (4 of the calls one after the other), its dynamic "
        "policy; "
        f"{cpu(report)}; {released(report, 'torch', 'diffusers')}."
    )
    return block([*header(columns), *rows], [note])


def _row(way: str, report: Report) -> str:
    overhead, load = report["overhead"][way], report["load"][way]
    answers = load["answers"]
    refused = sum(answers[status]["count"] for status in ("429", "503") if status in answers)
    rss = load["rss_mib"]
    return line(
        (
            _WAYS[way],
            _both(overhead["engine"]),
            _both(overhead["encoded"]),
            _both(overhead["http"]),
            f"{load['offered_per_second']:.1f}",
            f"{load['images_per_second']:.1f}",
            f"{refused / load['seconds']:.1f}",
            _both(answers["200"]),
            f"{rss[0]:.0f} / {max(rss):.0f} / {rss[-1]:.0f}",
        )
    )


def _both(found: Report) -> str:
    return f"{found['p50']:.0f} / {found['p95']:.0f}"
