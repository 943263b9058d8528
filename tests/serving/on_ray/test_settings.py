"""How an application on Ray Serve is told what to run."""

from __future__ import annotations

import importlib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from ddit_rt.serving import ray_app
from ddit_rt.serving.ray_app import Placed, app, read_settings
from ddit_rt.serving.ray_replica import Replica

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({}, "got no artifact"),
        ({"artifact": "flux.ddit"}, "without --model"),
        ({"artifact": "demo", "replicas": 2}, "did you mean 'min_replicas'"),
        ({"artifact": "demo", "max_batch": "many"}, "got max_batch='many'"),
        ({"artifact": "demo", "min_replicas": 0}, "min_replicas"),
        ({"artifact": "demo", "min_replicas": 3, "max_replicas": 2}, "max_replicas"),
    ],
    ids=str,
)
def test_settings_that_are_none_are_refused(args: dict[str, Any], said: str) -> None:
    with pytest.raises((ValueError, TypeError), match=said):
        read_settings(args)


def test_settings_are_read_as_the_command_line_and_a_yaml_file_give_them(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("secret\n", encoding="utf-8")
    text = {"artifact": "demo", "max_batch": "2", "max_replicas": "4", "trust_code": "true"}
    placed, config = read_settings({**text, "api_key_file": str(keys), "limits": {"steps": 9}})
    assert placed == Placed(artifact="demo", max_replicas=4, trust_code=True, api_key_file=keys)
    assert placed.gpus == 0
    assert (config.model, config.keys, config.max_batch) == ("demo", ("secret",), 2)
    assert config.limits.steps == 9
    assert config.call == {"max_sequence_length": 16}


def test_the_example_of_a_cluster_holds_settings_that_there_are() -> None:
    text = (ROOT / "examples/serving/ray.yaml").read_text(encoding="utf-8")
    (application,) = yaml.safe_load(text)["applications"]
    placed, config = read_settings(application["args"])
    assert application["import_path"] == f"{app.__module__}:{app.__name__}"
    assert [one["name"] for one in application["deployments"]] == [Replica.__name__]
    assert (placed.gpus, placed.max_replicas, config.model) == (1, 8, "flux")


def test_the_page_names_every_setting_that_is_rays_own() -> None:
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    section = page.split("## Beyond one machine: Ray")[1].split("\n## ")[0]
    assert all(f"`{one.name}`" in section for one in fields(Placed))


def test_the_extra_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddit_rt.serving.ray_local._NEEDED", ("ray", "not_there"))
    with pytest.raises(ModuleNotFoundError, match=r"no not_there.*pip install 'ddit_rt\[ray\]'"):
        importlib.reload(ray_app)
