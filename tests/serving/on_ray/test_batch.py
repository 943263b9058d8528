"""Large jobs: what a file asks for, and that a job which is killed goes on where it was."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from served import tiny_engine

from ddit_rt.cli.main import main
from ddit_rt.serving import batch
from ddit_rt.serving.batch import Item, Records, read_items
from ddit_rt.serving.ray_batch import Painter, kinds_of, start_ray
from ddit_rt.serving.ray_local import require_ray


def write(path: Path, lines: list[Any]) -> Path:
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(texts) + "\n", encoding="utf-8")
    return path


def records_of(out: Path) -> list[dict[str, Any]]:
    text = (out / batch.MANIFEST).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_job_that_is_done_is_not_begun_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a fox", "n": 2}, {"prompt": "a cat"}])
    items = read_items(prompts, 0, ".png")
    out.mkdir()
    for item in items:
        (out / item.file).touch()
    records = [{"file": item.file, "line": item.line} for item in reversed(items)]
    write(out / batch.MANIFEST, records)
    options = ["--artifact", "demo", "--out", str(out)]
    assert main(["batch", str(prompts), *options]) == 0
    assert "3 images, 0 made now" in capsys.readouterr().out
    files = [record["file"] for record in records_of(out)]
    assert files == [item.file for item in items]
    assert main(["batch", str(prompts), *options, "--seed", "7"]) == 2
    assert "has a job with other prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON"),
        ("[1]", "dictionary"),
        ({"num_inference_steps": 4}, "prompt: Field required"),
        ({"prompt": "a fox", "steps": 4}, "steps: Extra inputs"),
        ({"prompt": "a fox", "seed": -1}, "seed"),
        ({"prompt": "a fox", "seed": 2**63 - 1, "n": 2}, "last seed"),
        ({"prompt": "a fox", "id": "../../etc"}, "id: String should match"),
        ({"prompt": "a fox", "lora": "ink"}, "lora: a line has no such field"),
        ({"prompt": "a fox", "id": "000001", "seed": 0}, "which line 1 makes"),
    ],
    ids=str,
)
def test_a_bad_line_is_refused_by_its_number_before_anything_runs(
    line: Any, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "prompts.jsonl", [{"prompt": "a fox"}, "", line])
    options = ["--artifact", "demo", "--out", str(tmp_path / "out")]
    assert main(["batch", str(path), *options]) == 2
    told = capsys.readouterr().err
    assert f"{path}, line 3: " in told
    assert said in told
    assert not (tmp_path / "out").exists()


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / ".job").mkdir()
    return tmp_path


def rows(out: Path, *lines: dict[str, Any]) -> list[Item]:
    return read_items(write(out / ".job" / "prompts", list(lines)), 0, ".png")


def painter(out: Path, items: list[Item]) -> Painter:
    return Painter(tiny_engine, out, kinds_of(items), {})


def call(one: Painter, item: Item) -> dict[str, Any]:
    return one({name: getattr(item, name) for name in ("line", "file", "seed", "fields")})


def test_a_line_that_the_engine_cannot_run_is_refused_before_any_image(out: Path) -> None:
    from ray import cloudpickle

    fox = {"prompt": "a fox", "num_inference_steps": 2}
    items = rows(out, fox, {**fox, "patch_policy": "nonsense"})
    told = call(painter(out, items), items[0])
    error = cloudpickle.loads(told["refused"])
    assert isinstance(error, ValueError)
    assert str(error).startswith("line 2: got patch_policy='nonsense'")
    assert not list(out.glob("*.png"))
    assert not batch.done(out, items)


def test_an_image_that_fails_leaves_the_others(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    items = rows(out, *({"prompt": text, "num_inference_steps": 2} for text in ("one", "two")))
    one = painter(out, items)
    own = one._engine.__class__.__call__

    def failing(engine: Any, prompt: str, **given: Any) -> Any:
        if prompt == "one":
            raise RuntimeError("not this one")
        return own(engine, prompt, **given)

    monkeypatch.setattr(type(one._engine), "__call__", failing)
    assert [call(one, item)["error"] for item in items] == ["RuntimeError: not this one", ""]
    assert list(batch.done(out, items)) == [items[1].file]
    assert batch.write_manifest(out, items) == 1


def test_an_image_that_ends_its_workers_is_given_up(out: Path) -> None:
    (item,) = rows(out, {"prompt": "a fox", "num_inference_steps": 2})
    for before in range(3):
        assert Records(out).begin(item) == before
    assert call(painter(out, [item]), item)["error"] == "3 workers ended while they made it"
    with batch.opened(out, {}):  # the next run tries again
        assert call(painter(out, [item]), item)["error"] == ""


@pytest.mark.parametrize("cut", ["before its name", "within its record"])
def test_an_image_is_done_with_its_name_and_its_record(out: Path, cut: str) -> None:
    items = rows(out, *({"prompt": text, "num_inference_steps": 2} for text in ("one", "two")))
    one = painter(out, items)
    for item in items:
        call(one, item)
    last = out / items[1].file
    if cut == "before its name":
        last.unlink()
    else:
        (part,) = [path for path in (out / ".job").glob("*.part") if path.stat().st_size]
        part.write_bytes(part.read_bytes()[:-40])
        last.unlink()  # it has its name only after its record is whole
    assert list(batch.done(out, items)) == [items[0].file]
    call(painter(out, items), items[1])
    assert batch.write_manifest(out, items) == 2
    assert batch.done(out, items).keys() == {item.file for item in items}


def test_two_jobs_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        batch.opened(out, {"prompts": "one"}),
        pytest.raises(ValueError, match="a job is running in"),
        batch.opened(out, {"prompts": "one"}),
    ):
        pass
    with batch.opened(out, {"prompts": "another"}):  # the first made nothing
        write(out / batch.MANIFEST, [{"file": "a.png"}])
    with (
        pytest.raises(ValueError, match="other prompts and artifact"),
        batch.opened(out, {"prompts": "one", "artifact": "b"}),
    ):
        pass


def test_the_extra_is_named_where_it_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("ddit_rt.serving.ray_local._NEEDED", ("ray", "not_there"))
    prompts = write(tmp_path / "prompts.jsonl", [{"prompt": "a fox"}])
    options = ["--artifact", "demo", "--out", str(tmp_path / "out")]
    assert main(["batch", str(prompts), *options]) == 2
    assert "pip install 'ddit_rt[ray]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("workers", "gpus", "expected"),
    [
        (3, 0, (3, {"num_cpus": 2})),
        (None, 0, (1, {"num_cpus": 8})),
        (20, 0, (20, {"num_cpus": 1})),
        (None, 4, (4, {"num_cpus": 1, "num_gpus": 1})),
        (2, 4, (2, {"num_cpus": 1, "num_gpus": 1})),
    ],
)
def test_ray_begins_small_quiet_and_with_a_worker_a_gpu(
    workers: int | None, gpus: int, expected: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    begun: list[dict[str, Any]] = []
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(ray, "init", lambda *address, **given: begun.append((address, given)))
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"GPU": float(gpus)})
    require_ray("a test")
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
    assert start_ray(workers, gpu=bool(gpus)) == expected
    cpus = max(8, workers or 1)
    small = {"include_dashboard": False, "object_store_memory": 256 * 2**20}
    assert begun == [(("local",), {"num_cpus": cpus, **small})]
    monkeypatch.setenv("RAY_ADDRESS", "first:6379")
    start_ray(workers, gpu=bool(gpus))
    assert begun[1:] == [((), {})]


def test_a_cluster_without_the_gpus_that_an_artifact_needs_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import ray

    monkeypatch.setattr(ray, "init", lambda *_, **__: None)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0})
    with pytest.raises(ValueError, match="Ray finds no GPU"):
        start_ray(None, gpu=True)
