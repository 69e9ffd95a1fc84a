from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

from factorlm.errors import ConfigError, StorageError
from factorlm.report import ScalingCurve, ScalingFits, gather, read_run, write_page
from factorlm.report.compare import METRICS
from factorlm.report.facts import recipe_yaml
from factorlm.report.page import render_page

HOSTILE = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'&%{x}"""


@dataclass
class Node:
    tag: str
    attributes: dict[str, str | None]
    text: str = ""
    children: list[Node] = field(default_factory=list)

    def all(self, tag: str) -> list[Node]:
        below = [found for child in self.children for found in child.all(tag)]
        return [*([self] if self.tag == tag else []), *below]


class Tree(HTMLParser):
    """The elements of a page as an HTML parser sees them."""

    void = ("meta", "link", "input", "br", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = Node("root", {})
        self.open = [self.root]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        node = Node(tag, dict(attrs))
        self.open[-1].children.append(node)
        if tag not in self.void:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        for node in self.open:
            node.text += data


def tree(page: str) -> Node:
    parsed = Tree(page)
    assert parsed.open == [parsed.root], "an element is not closed"
    return parsed.root


def by_id(root: Node, name: str) -> Node:
    def below(node: Node) -> list[Node]:
        here = [node] if node.attributes.get("id") == name else []
        return [*here, *(found for child in node.children for found in below(child))]

    (found,) = below(root)
    return found


@pytest.fixture
def page(study: Path) -> Node:
    return tree(render_page(gather([study])))


def test_nothing_is_asked_of_the_network(page: Node) -> None:
    for tag in ("script", "img", "iframe", "link", "a", "form"):
        for node in page.all(tag):
            assert "src" not in node.attributes
            assert re.match("#|data:,$", node.attributes.get("href") or "#")
    (style,) = page.all("style")
    assert "url(" not in style.text
    assert "@import" not in style.text


def test_the_policy_allows_our_scripts_and_no_other(page: Node) -> None:
    policy = next(m.attributes["content"] for m in page.all("meta") if "content" in m.attributes)
    data, *scripts = page.all("script")
    assert data.attributes["type"] == "application/json"
    digests = (hashlib.sha256(script.text.encode()).digest() for script in scripts)
    expected = [f"sha256-{base64.b64encode(digest).decode()}" for digest in digests]
    assert policy is not None
    assert re.findall(r"'(sha256-[^']+)'", policy) == expected
    assert "default-src 'none'" in policy
    assert "\r" not in "".join(script.text for script in scripts), "a browser would drop it"


def test_numbers_of_the_table_are_those_of_the_records(page: Node, study: Path) -> None:
    table = by_id(page, "run-table")
    keys = [th.attributes.get("data-key") for th in table.all("thead")[0].all("th")]
    rows = table.all("tbody")[0].all("tr")
    assert [row.all("th")[0].text for row in rows] == ["blocks", "dense-0", "dense-1", "low"]
    for row in rows:
        run = read_run(study / row.all("th")[0].text)
        cells = dict(zip(keys[1:], row.all("td"), strict=True))
        for metric in METRICS:
            value = metric.value(run)
            if metric.key not in cells:
                assert value is None
                continue
            assert value is not None
            assert json.loads(str(cells[metric.key].attributes["data-value"])) == value
            assert cells[metric.key].text == metric.write(value)
            assert cells[metric.key].attributes["title"] == json.dumps(value)
    assert rows[0].all("td")[-2].text == "40 of 40"
    assert rows[0].all("td")[-1].text == "Abacus, 2 threads"


def test_what_differs_and_how_to_make_each_again(page: Node, study: Path) -> None:
    section = by_id(page, "differences")
    heads = [th.text for th in section.all("thead")[0].all("th")]
    assert heads == ["run", "seed", "structure.structure", "structure.param_ratio"]
    low = section.all("tbody")[0].all("tr")[3]
    assert [cell.text for cell in [*low.all("th"), *low.all("td")]] == [
        "low", "0", "low_rank", "0.32",
    ]  # fmt: skip
    details = by_id(page, "reproduce").all("details")
    runs = gather([study]).runs
    for node, run in zip(details, runs, strict=True):
        commands, recipe = node.all("pre")
        assert commands.text == f"git checkout c0ffee\nfactorlm train {run.label}.yaml"
        assert recipe.text == recipe_yaml(run.summary.run)


def test_notes_and_files_left_out_are_on_the_page(study: Path, write_run) -> None:
    write_run("else", data={"path": "other"})
    (study / "x.jsonl").write_text("{}\n\n")
    page = tree(render_page(gather([study])))
    notes = [p.text for p in page.all("p") if p.attributes.get("class") == "note"]
    assert notes == [
        "data.path differs, so losses cannot be compared between all runs: None, other",
        "Loss spikes: low (1)",
    ]
    assert any("x.jsonl:1: not a record" in li.text for li in page.all("li"))


def test_names_and_configs_are_text_and_nothing_else(write_run) -> None:
    write = {"structure": {"structure": HOSTILE}, HOSTILE: HOSTILE}
    environment = {"cpu": HOSTILE, "commit": HOSTILE}
    paths = [write_run(HOSTILE, **write, environment=environment, is_monitored=True)]
    paths.append(write_run("tame"))
    text = render_page(gather(paths))
    page = tree(text)
    assert len(page.all("script")) == 3
    assert page.all("img") == []
    row = by_id(page, "run-table").all("tbody")[0].all("tr")[0]
    assert row.all("th")[0].text == HOSTILE
    assert HOSTILE in row.all("td")[-1].text
    data = json.loads(page.all("script")[0].text)
    assert data["runs"][0]["label"] == HOSTILE
    assert HOSTILE not in text


def test_equal_records_give_equal_pages_without_runs_or_benchmarks_too(
    study: Path, tmp_path: Path
) -> None:
    assert render_page(gather([study])) == render_page(gather([study]))
    only_runs = tree(render_page(gather([study / "dense-0"])))
    assert [h.text for h in only_runs.all("h1")] == ["1 training run, 1 family"]
    assert "there is one run" in by_id(only_runs, "differences").text
    only_speed = tree(render_page(gather([study / "speed.jsonl"])))
    assert [h.text for h in only_speed.all("h1")] == ["2 benchmarks"]


def test_laws_are_in_the_data_of_the_page(study: Path) -> None:
    law = ScalingCurve(family="dense", compute=[1e9, 1e10], loss=[3.0, 2.5])
    page = tree(render_page(gather([study]), ScalingFits(curves=[law])))
    data = json.loads(page.all("script")[0].text)
    assert data["laws"] == [
        {
            "family": "dense",
            "compute": [1e9, 1e10],
            "loss": [3.0, 2.5],
            "low": [],
            "high": [],
            "law": "fit",
        }
    ]


def test_refusals_keep_what_is_there(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = gather([study])
    records = study / "dense-0" / "records.jsonl"
    before = records.read_bytes()
    with pytest.raises(ConfigError, match=r"records\.jsonl: the name of a page must end in \.html"):
        write_page(report, records)
    assert records.read_bytes() == before
    with pytest.raises(StorageError, match="missing"):
        write_page(report, tmp_path / "missing" / "report.html")
    page = tmp_path / "report.html"
    page.write_text("before")
    for module, name in (("jinja2", "Jinja2"), ("plotly.offline", "Plotly")):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(ConfigError, match=rf"{name}: pip install 'factorlm\[plots\]'"):
                write_page(report, page)
    assert page.read_text() == "before"
    assert write_page(report, page).read_text(encoding="utf-8").startswith("<!doctype html>")
