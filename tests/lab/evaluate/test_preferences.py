"""The blind comparison, over real HTTP."""

from __future__ import annotations

import json
import shutil
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

from ddit_rt.lab.evaluate.preferences import Study, summary_text
from ddit_rt.lab.evaluate.server import StudyServer
from ddit_rt.lab.measure.statistics import share_interval


@pytest.fixture
def folder(evaluation: Path, tmp_path: Path) -> Path:
    path = tmp_path / "study"
    shutil.copytree(evaluation, path)
    return path


@pytest.fixture
def server(folder: Path) -> Iterator[StudyServer]:
    with StudyServer(Study(folder)) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


def get(server: StudyServer, path: str, **query: Any) -> bytes:
    address = server.url + path + ("?" + urlencode(query) if query else "")
    with urllib.request.urlopen(address, timeout=10) as reply:
        return bytes(reply.read())


def state(server: StudyServer, rater: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads(get(server, "state", rater=rater))
    return data


def post(server: StudyServer, body: bytes, **headers: str) -> dict[str, Any]:
    fields = {"Content-Type": "application/json", **headers}
    request = urllib.request.Request(server.url + "answer", body, fields)
    with urllib.request.urlopen(request, timeout=10) as reply:
        data: dict[str, Any] = json.loads(reply.read())
    return data


def answer(server: StudyServer, rater: str, pair: int, choice: str) -> dict[str, Any]:
    return post(server, json.dumps({"rater": rater, "pair": pair, "choice": choice}).encode())


def written(folder: Path) -> list[dict[str, Any]]:
    file = folder / "preferences.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def test_page_is_served_on_this_machine_only_and_names_no_plan(server: StudyServer) -> None:
    assert server.server_address[0] == "127.0.0.1"
    page = get(server, "").decode()
    assert "<title>Which image is better?</title>" in page
    pair = state(server, "ada")["pair"]
    assert set(pair) == {"number", "prompt"}
    assert "equal-steps" not in page


def test_images_are_the_two_plans_in_the_raters_order(server: StudyServer, folder: Path) -> None:
    for pair in Study(folder).pairs("ada"):
        for side, plan in zip(("left", "right"), pair.plans, strict=True):
            shown = get(server, "picture", rater="ada", pair=pair.number, side=side)
            file = f"{pair.number // 2:05d}-{pair.number % 2}.png"
            assert shown == (folder / "pictures" / plan / file).read_bytes()


def test_order_is_the_same_again_and_another_for_others(folder: Path) -> None:
    study = Study(folder)
    assert study.pairs("ada") == Study(folder).pairs("ada")
    orders = {tuple(p.number for p in study.pairs(f"rater {i}")) for i in range(10)}
    sides = {p.plans[0] for i in range(10) for p in study.pairs(f"rater {i}")}
    assert len(orders) > 1
    assert sides == {"default", "fine"}


def test_answers_are_kept_and_a_rater_goes_on(server: StudyServer, folder: Path) -> None:
    order = [pair.number for pair in Study(folder).pairs("ada")]
    first = state(server, "ada")
    assert (first["done"], first["total"], first["pair"]["number"]) == (0, 6, order[0])
    reply = answer(server, "ada", order[0], "left")
    assert (reply["done"], reply["pair"]["number"]) == (1, order[1])
    # Another server on the same folder knows it; another rater starts at the beginning.
    assert Study(folder).state("ada")["pair"]["number"] == order[1]
    assert state(server, "bob")["done"] == 0
    (row,) = written(folder)
    pair = Study(folder).pairs("ada")[0]
    assert row["preferred"] == pair.plans[0]
    assert (row["left"], row["right"]) == pair.plans
    assert row["prompt"] == pair.prompt


def test_last_answer_brings_the_shares(server: StudyServer, folder: Path) -> None:
    study = Study(folder)
    wanted = dict.fromkeys(range(6), "worse") | {0: "better", 1: "better", 2: "equal"}
    for pair in study.pairs("ada"):
        liked = "default" if wanted[pair.number] == "better" else "fine"
        side = (
            "equal"
            if wanted[pair.number] == "equal"
            else ("left", "right")[pair.plans.index(liked)]
        )
        reply = answer(server, "ada", pair.number, side)
    summary = reply["summary"]
    assert summary["counts"] == {"better": 2, "equal": 1, "worse": 3, "as_good": 3}
    wilson = share_interval(3, 6)
    assert summary["shares"]["as_good"] == {
        "value": 0.5,
        "low": pytest.approx(wilson.low),
        "high": pytest.approx(wilson.high),
    }
    assert "as good or better   50%" in summary_text(summary)
    assert study.summary() == summary


MALFORMED = (
    b"",
    b"not json",
    b"\xff\xfe",
    b"[]",
    b'{"rater": "ada", "pair": 0}',
    b'{"rater": "ada", "pair": 0, "choice": "left", "plan": "fine"}',
    b'{"rater": "ada", "pair": 0, "choice": "best"}',
    b'{"rater": "ada", "pair": 0, "choice": ["left"]}',
    b'{"rater": "ada", "pair": 6, "choice": "left"}',
    b'{"rater": "ada", "pair": -1, "choice": "left"}',
    b'{"rater": "ada", "pair": "0", "choice": "left"}',
    b'{"rater": "ada", "pair": true, "choice": "left"}',
    b'{"rater": "  ", "pair": 0, "choice": "left"}',
    b'{"rater": 7, "pair": 0, "choice": "left"}',
    b'{"rater": "%s", "pair": 0, "choice": "left"}' % (b"a" * 65),
    b'{"rater": "ada", "pair": 0, "choice": "left"}' + b" " * 5000,
)
GOOD = b'{"rater": "ada", "pair": 0, "choice": "left"}'


def test_what_is_no_answer_or_of_another_site_is_400_and_loses_nothing(
    server: StudyServer, folder: Path
) -> None:
    answer(server, "ada", 0, "equal")
    before = written(folder)
    cases: list[tuple[bytes, dict[str, str]]] = [(body, {}) for body in MALFORMED]
    cases += [(GOOD, {"Host": "evil.example"}), (GOOD, {"Content-Type": "text/plain"})]
    for body, headers in cases:
        with pytest.raises(urllib.error.HTTPError) as caught:
            post(server, body, **headers)
        with caught.value as error:
            assert error.code == 400, (body, headers)
            assert json.loads(error.read())["error"]
        assert written(folder) == before
    assert answer(server, "ada", 1, "equal")["done"] == 2


def test_other_addresses_are_refused(server: StudyServer) -> None:
    picture = {"rater": "ada", "pair": "0", "side": "left"}
    for path, query, code in (
        ("state", {}, 400),
        ("picture", {**picture, "pair": "x"}, 400),
        ("picture", {**picture, "pair": "99"}, 400),
        ("picture", {**picture, "side": "../../settings.json"}, 400),
        ("settings.json", {}, 404),
        ("../report.json", {}, 404),
    ):
        with pytest.raises(urllib.error.HTTPError) as caught:
            get(server, path, **query)
        with caught.value as error:
            assert error.code == code, (path, query)


def test_same_answer_twice_is_one_and_another_is_refused(server: StudyServer, folder: Path) -> None:
    assert answer(server, "ada", 3, "left") == answer(server, "ada", 3, "left")
    with pytest.raises(urllib.error.HTTPError) as caught:
        answer(server, "ada", 3, "right")
    with caught.value as error:
        assert "was answered before, with 'left'" in json.loads(error.read())["error"]
    assert len(written(folder)) == 1


def test_answers_at_once_are_all_kept(server: StudyServer, folder: Path) -> None:
    threads = [
        threading.Thread(target=answer, args=(server, f"rater {i}", i % 6, "equal"))
        for i in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(written(folder)) == 12


def test_line_that_was_cut_off_does_not_hide_the_next(folder: Path) -> None:
    (folder / "preferences.jsonl").write_text('{"rater": "ada", "pa')
    study = Study(folder)
    study.record({"rater": "ada", "pair": 0, "choice": "left"})
    assert [row["pair"] for row in study.answers()] == [0]


def test_answers_about_other_plans_do_not_count(folder: Path) -> None:
    Study(folder, "equal-steps").record({"rater": "ada", "pair": 0, "choice": "left"})
    assert Study(folder).summary()["answers"] == 0
    assert summary_text(Study(folder).summary()) == "default against fine: no answers yet"
    assert Study(folder, "equal-steps").summary()["answers"] == 1


@pytest.mark.parametrize("plans", [("nonsense", None), ("fine", "fine"), (None, "default")])
def test_unknown_or_equal_plans_are_refused(folder: Path, plans: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="choose two different ones of fine, default"):
        Study(folder, *plans)


def test_folder_without_a_report_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="run ddit-rt eval into it first"):
        Study(tmp_path)
