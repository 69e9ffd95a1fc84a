"""Structure maps, parameter shares, the block in ``config.json`` and the recipe's section."""

from __future__ import annotations

import pytest

from factorlm.errors import ConfigError
from factorlm.layers import BlockDenseConfig, LowRankConfig
from factorlm.surgery import (
    StructureMap,
    default_multiple,
    densify_,
    factorize_,
    read_block,
    read_structure,
    write_block,
)
from factorlm.testing.models import tiny_model

TWO, FOUR = LowRankConfig(rank=2), LowRankConfig(rank=4)


class TestStructureMap:
    def test_exact_name_before_pattern_and_first_pattern_wins(self) -> None:
        rules = StructureMap({"a.*": TWO, "*.up": FOUR, "a.up": None, "*": FOUR})
        assert rules.config_for("a.up") is None
        assert rules.config_for("a.b.up") is TWO
        assert rules.config_for("b.up") is FOUR
        assert StructureMap({"a.*": TWO}).config_for("b") is None

    def test_case_matters(self) -> None:
        assert StructureMap({"MLP*": TWO}).config_for("mlp.up") is None

    def test_a_rule_is_a_config(self) -> None:
        with pytest.raises(ConfigError, match=r"'a' must be a StructureConfig or None.*from_targ"):
            StructureMap({"a": {"structure": "low_rank", "rank": 2}})  # type: ignore[dict-item]

    def test_in_a_model_it_decides_alone(self) -> None:
        model = tiny_model("llama", device="meta")
        rules = {"model.layers.0.mlp.up_proj": FOUR, "*.1.mlp.*": TWO, "*.q_proj": FOUR}
        report = factorize_(model, StructureMap(rules), weights="empty")
        ranks = {row.name: model.get_submodule(row.name).config.rank for row in report.rows}
        assert ranks == {
            "model.layers.0.self_attn.q_proj": 4,
            "model.layers.0.mlp.up_proj": 4,
            "model.layers.1.self_attn.q_proj": 4,
            "model.layers.1.mlp.gate_proj": 2,
            "model.layers.1.mlp.up_proj": 2,
            "model.layers.1.mlp.down_proj": 2,
            "model.layers.2.self_attn.q_proj": 4,
        }

    @pytest.mark.parametrize("rule", ["model.layers.1.mlp.up_prj", "*.7.mlp.*"])
    def test_a_rule_that_matches_nothing_is_a_mistake(self, rule: str) -> None:
        rules = StructureMap({"*.up_proj": TWO, rule: FOUR})
        with pytest.raises(ConfigError, match="matches no linear layer") as error:
            factorize_(tiny_model("llama", device="meta"), rules)
        assert ("Did you mean 'model.layers.1.mlp.up_proj'?" in str(error.value)) == ("prj" in rule)

    def test_a_tied_head_by_name_is_refused(self) -> None:
        with pytest.raises(ConfigError, match="'lm_head' has a weight that is tied"):
            factorize_(tiny_model("starcoder2"), StructureMap({"lm_head": TWO}))

    def test_round_trip(self) -> None:
        rules = StructureMap({"a": TWO, "b.*": BlockDenseConfig(num_blocks=2, rank=8), "c": None})
        assert StructureMap.from_targets(rules.to_targets()) == rules

    @pytest.mark.parametrize(
        ("target", "message"),
        [
            ({"structure": "low_rnk"}, "'a': unknown structure 'low_rnk'.*'low_rank'"),
            ({"structure": "low_rank", "rnk": 4}, "'a': unknown key 'rnk'.*'rank'"),
            ({"structure": "low_rank", "version": 9}, "'a': version=9"),
            ({"rank": 4}, "'a': structure=None"),
            ("low_rank", "'a' must be a mapping"),
        ],
    )
    def test_bad_targets_name_the_rule(self, target: object, message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            StructureMap.from_targets({"a": target})


class TestParamRatio:
    @pytest.mark.parametrize(
        ("hidden", "ratio", "rank"),
        [
            *((768, 0.32, 192), (1024, 0.32, 256), (1536, 0.32, 384), (2048, 0.32, 512)),
            *((768, 0.63, 384), (1024, 0.63, 512), (1536, 0.63, 768), (2048, 0.63, 1024)),
            *((128, 0.32, 32), (64, 0.32, 16), (16, 0.32, 4)),
        ],
    )
    def test_default_multiple_gives_the_papers_ranks(
        self, hidden: int, ratio: float, rank: int
    ) -> None:
        sizes = (hidden, 4 * hidden)
        multiple = default_multiple(*sizes)
        assert LowRankConfig().for_param_ratio(*sizes, ratio, multiple_of=multiple).rank == rank

    @pytest.mark.parametrize("width", [1, 2, 31, 33, 100, 768, 5000])
    def test_default_multiple_is_a_power_of_two_within_a_32nd_of_the_width(
        self, width: int
    ) -> None:
        multiple = default_multiple(width, 10**6)
        assert multiple in {1, 2, 4, 8, 16, 32, 64}
        assert multiple == 1 or multiple <= width / 32
        assert multiple == 64 or 2 * multiple > width / 32

    def test_every_layer_solves_for_itself(self) -> None:
        model = tiny_model("phi3", device="meta", hidden_size=64, intermediate_size=160)
        report = factorize_(model, LowRankConfig(), weights="empty", param_ratio=0.5)
        ranks = {
            row.name.split(".")[-1]: model.get_submodule(row.name).config.rank
            for row in report.rows
        }
        # 0.5 I O / (I + O), to a multiple of 2: 64 -> 320 gives 26.7, 160 -> 64 gives 22.9.
        assert ranks == {"gate_up_proj": 26, "down_proj": 22}
        assert report.param_ratio == pytest.approx(0.5, abs=0.02)

    def test_a_multiple_of_ones_own(self) -> None:
        model = tiny_model("llama", device="meta")
        factorize_(model, LowRankConfig(), weights="empty", param_ratio=0.5, multiple_of=8)
        assert {t["rank"] for t in model.config.quantization_config["targets"].values()} == {8}

    @pytest.mark.parametrize("ratio", [0, -1])
    def test_a_share_must_be_above_zero(self, ratio: float) -> None:
        with pytest.raises(ConfigError, match="ratio"):
            factorize_(tiny_model("llama"), LowRankConfig(), param_ratio=ratio)


class TestBlock:
    def test_round_trip(self) -> None:
        assert read_block(write_block({"a": TWO, "b": FOUR})).rules == {"a": TWO, "b": FOUR}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"format_version": 2}, "format_version=2 is not readable here"),
            ({"format_version": None}, "format_version=None"),
            ({"targets": ["a"]}, "targets=.* must be a mapping"),
            ({"target": {}}, "unknown key 'target'.*'targets'"),
        ],
    )
    def test_refusals(self, change: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_block(write_block({"a": TWO}) | change)

    def test_densify_and_factorize_keep_it_in_step(self) -> None:
        model = tiny_model("llama", device="cpu")
        factorize_(model, StructureMap({"*.0.mlp.*": TWO}))
        factorize_(model, FOUR)
        targets = model.config.quantization_config["targets"]
        assert [target["rank"] for target in targets.values()] == [2, 2, 2, 4, 4, 4, 4, 4, 4]
        densify_(model)
        assert "quantization_config" not in model.config.to_dict()


class TestRecipeSection:
    def test_empty_is_a_dense_model(self) -> None:
        assert read_structure({}) == {"structure": None}

    def test_one_structure_with_options(self) -> None:
        section = {"structure": "low_rank", "param_ratio": 0.32, "keep_first_dense": False}
        assert read_structure(section) == {
            "structure": LowRankConfig(),
            "param_ratio": 0.32,
            "keep_first_dense": False,
        }

    def test_null_leaves_an_option_out(self) -> None:
        """As ``--structure.param_ratio null`` over a recipe that has one."""
        section = {"structure": "low_rank", "rank": 4, "param_ratio": None, "layers": None}
        assert read_structure(section) == {"structure": FOUR}

    def test_layers(self) -> None:
        layers = {"*.up_proj": {"structure": "low_rank", "rank": 4}, "lm_head": None}
        assert read_structure({"layers": layers}) == {
            "structure": StructureMap({"*.up_proj": FOUR, "lm_head": None})
        }

    @pytest.mark.parametrize(
        ("section", "message"),
        [
            ({"param_ratio": 0.3}, "structure.structure must be named beside param_ratio"),
            ({"layers": {}, "rank": 3}, "stands alone, without rank"),
            ({"layers": [1]}, "must be a mapping"),
            ({"rank": 3}, "structure=None"),
        ],
    )
    def test_refusals(self, section: dict[str, object], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            read_structure(section)
