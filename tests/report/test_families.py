from __future__ import annotations

from typing import Any

import pytest
from tests.run_records import run_record

from factorlm.records import RunRecord
from factorlm.report.families import family_labels


def run(**config: Any) -> RunRecord:
    return run_record("a", config)


LOW_RANK = {"structure": "low_rank", "param_ratio": 0.32}


def test_size_seed_and_data_make_no_family() -> None:
    runs = [
        run(structure=LOW_RANK, seed=seed, data={"path": str(seed)}, model={"preset": preset})
        for seed, preset in enumerate(["gpt_tiny", "gpt_mini"])
    ]
    assert family_labels(runs) == ["low_rank, 32%"] * 2


def test_a_trait_is_told_where_runs_differ_in_it() -> None:
    muon, adamw = {"kind": "muon"}, {"kind": "adamw", "factor_rates": "structure_aware"}
    runs = [
        run(structure=LOW_RANK, optimizer=muon, guide={"variant": "full"}),
        run(structure=LOW_RANK, optimizer=muon, guide={"variant": "none"}),
        run(optimizer=adamw),
        run(),
    ]
    assert family_labels(runs) == [
        "low_rank, 32%, full guide, muon",
        "low_rank, 32%, muon",
        "dense, adamw, structure_aware rates",
        "dense, adamw",
    ]
    assert family_labels(runs[1:2]) == ["low_rank, 32%"]


def test_a_stated_family_is_taken() -> None:
    def stated(family: str, ladder: str = "books") -> dict[str, Any]:
        return {"ladder": ladder, "family": family, "size": "s", "stage": "main"}

    runs = [run(labels=stated("best"), structure=LOW_RANK, optimizer={"kind": "muon"}), run()]
    assert family_labels(runs[:1]) == ["best"]
    assert family_labels([*runs, run(labels=stated("best", "code"))]) == [
        "best, ladder books",
        "dense",
        "best, ladder code",
    ]
    assert family_labels([run(labels="odd"), run(labels={})]) == ["dense", "dense"]


@pytest.mark.parametrize(("rank", "hidden_size"), [(16, 64), (64, 256)])
def test_a_rank_is_told_by_its_share_of_the_width(rank: int, hidden_size: int) -> None:
    found = run(
        structure={"structure": "low_rank", "rank": rank},
        model={"overrides": {"hidden_size": hidden_size}},
    )
    assert family_labels([found]) == ["low_rank, rank 25% of width"]


def test_narrow_attention_is_another_family() -> None:
    def wide(head_dim: int) -> RunRecord:
        sizes = {"hidden_size": 128, "num_attention_heads": 4, "head_dim": head_dim}
        return run(model={"overrides": sizes})

    assert family_labels([wide(32), wide(16)]) == ["dense", "dense, attention 50% wide"]
    assert family_labels([run(model={"overrides": None}), wide(16)])[0] == "dense"
