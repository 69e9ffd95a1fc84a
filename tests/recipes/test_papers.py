"""The papers' runs as recipes give every count that arXiv 2407.09835 and 2406.16450 print.

Numbers are written here as they are printed; a computed one must round to the same digits.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from factorlm.train.describe import describe
from factorlm.train.recipe import load_recipe

FOLDER = Path(__file__).parents[2] / "recipes" / "papers"

# recipe: parameters in millions / FFN parameters in millions / training FLOPs.
# s, m, l: weights only, computed by the papers' formula; xl: all parameters, printed.
WEIGHTS_ONLY = {
    "s_dense": ("109.5", "56.6", "1.695e18"),
    "s_low_rank_63": ("90.05", "37.2", "1.438e18"),
    "s_low_rank_32": ("73.8", "20.9", "1.224e18"),
    "m_dense": ("334.8", "201.3", "1.548e19"),
    "m_low_rank_63": ("262.4", "129.0", "1.257e19"),
    "m_block_dense_63": ("254.9", "121.4", "1.227e19"),
    "m_low_rank_32": ("202.1", "68.7", "1.015e19"),
    "m_block_dense_32": ("198.3", "64.9", "1.000e19"),
    "l_dense": ("728.6", "453.0", "7.034e19"),
    "l_low_rank_63": ("565.8", "290.2", "5.610e19"),
    "l_low_rank_32": ("430.2", "154.5", "4.424e19"),
}
ALL_PARAMETERS = {
    "xl_dense": ("1274", "805", "2.10e20"),
    "xl_low_rank_63": ("985", "516", "1.66e20"),
    "xl_block_dense_63": ("955", "486", "1.61e20"),
    "xl_block_shuffle_63": ("985", "516", "1.66e20"),
    "xl_low_rank_32": ("744", "275", "1.29e20"),
    "xl_block_dense_32": ("728", "260", "1.27e20"),
    "xl_block_shuffle_32": ("744", "275", "1.29e20"),
}
WIDE = {
    "m_dense": ("335", "1.55e19"),
    "m_gqa": ("335", "1.55e19"),
    "wide_m": ("219", "1.55e19"),
    "l_dense": ("729", "7.03e19"),
    "l_gqa": ("729", "7.03e19"),
}
# A structure with the same share has the counts of low_rank.
SAME_AS_LOW_RANK = [
    f"{size}_{kind}_{share}"
    for size in ("s", "m", "l", "xl")
    for kind in ("block_dense", "block_shuffle")
    for share in ("63", "32")
    if kind == "block_shuffle" or size in ("s", "l")
]


@cache
def described(name):
    return describe(load_recipe(FOLDER / f"{name}.yaml"))


def millions(value, printed):
    decimals = len(printed.partition(".")[2])
    return f"{value / 1e6:.{decimals}f}"


def scientific(value, printed):
    digits, _, exponent = printed.partition("e")
    decimals = len(digits.partition(".")[2])
    return f"{value / 10 ** int(exponent):.{decimals}f}e{exponent}"


@pytest.mark.parametrize("name", WEIGHTS_ONLY)
def test_main_table_in_weights(name):
    params, ffn, flops = WEIGHTS_ONLY[name]
    description = described(name)
    assert millions(description.params.weights, params) == params
    assert millions(description.params.ffn, ffn) == ffn
    assert scientific(description.training.model_flops, flops) == flops


@pytest.mark.parametrize("name", ALL_PARAMETERS)
def test_main_table_in_all_parameters(name):
    params, ffn, flops = ALL_PARAMETERS[name]
    description = described(name)
    assert millions(description.params.total, params) == params
    assert millions(description.params.ffn, ffn) == ffn
    assert scientific(description.training.model_flops, flops) == flops


@pytest.mark.parametrize("name", WIDE)
def test_wide_networks(name):
    params, flops = WIDE[name]
    assert millions(described(name).params.total, params) == params
    assert scientific(described(name).training.model_flops, flops) == flops


def test_wide_l():
    """The papers print 7.03e19; their formula gives 7.044e19."""
    description = described("wide_l")
    assert millions(description.params.total, "464") == "464"
    assert scientific(description.training.model_flops, "7.044e19") == "7.044e19"
    assert description.training.model_flops == pytest.approx(7.03e19, rel=0.003)


@pytest.mark.parametrize("name", SAME_AS_LOW_RANK)
def test_equal_shares_cost_the_same(name):
    size, share = name.split("_")[0], name.split("_")[-1]
    other = described(f"{size}_low_rank_{share}")
    assert described(name).params == other.params
    assert described(name).training == other.training


def test_every_paper_recipe_is_compared_with_a_printed_number():
    """Here, or in ``test_guided.py`` if its name says that it is self-guided or its control."""
    compared = {*WEIGHTS_ONLY, *ALL_PARAMETERS, *WIDE, *SAME_AS_LOW_RANK, "wide_l"}
    recipes = {path.stem for path in FOLDER.glob("*.yaml") if not path.name.startswith("_")}
    elsewhere = {name for name in recipes if name.endswith(("_guided", "_control"))}
    assert recipes - elsewhere == compared


@pytest.mark.parametrize(
    ("name", "built"),
    [
        ("s_dense", "109.63"),
        ("m_dense", "335.08"),
        ("l_dense", "729.11"),
        ("xl_dense", "1274.14"),
        ("xl_low_rank_63", "984.73"),
        ("xl_low_rank_32", "743.56"),
        ("wide_m", "219.44"),
        ("wide_l", "464.43"),
    ],
)
def test_built_models_with_biases_and_norms(name, built):
    assert millions(described(name).params.total, built) == built


@pytest.mark.parametrize(
    ("size", "steps"), [("s", 4196), ("m", 12779), ("l", 27809), ("xl", 48637)]
)
def test_steps(size, steps):
    for path in FOLDER.glob(f"{size}_*.yaml"):
        assert load_recipe(path).num_steps == steps


@pytest.mark.parametrize(
    ("name", "hidden", "width", "kv_width", "layers"),
    [
        ("s_dense", 768, 768, 768, 12),
        ("m_gqa", 1024, 1024, 256, 24),
        ("l_gqa", 1536, 1536, 256, 24),
        ("xl_low_rank_32", 2048, 2048, 2048, 24),
        ("wide_m", 1024, 512, 256, 24),
        ("wide_l", 1536, 768, 256, 24),
    ],
)
def test_training_flops_equal_the_papers_formula(name, hidden, width, kv_width, layers):
    """3 x steps x 512 x [2L(2SaH + 2S(a/n_q)n_kv H + 2S²a) + 2 P_ffn S + 2SVH]."""
    S, V = 1024, 32000
    description = described(name)
    attention = 2 * S * width * hidden + 2 * S * kv_width * hidden + 2 * S * S * width
    sequence = 2 * layers * attention + 2 * description.params.ffn * S + 2 * S * V * hidden
    expected = 3 * description.config.num_steps * 512 * sequence
    assert description.training.model_flops == expected


@pytest.mark.parametrize("path", sorted(FOLDER.glob("[!_]*.yaml")), ids=lambda path: path.stem)
def test_training_settings_are_the_papers(path):
    config = load_recipe(path)
    optimizer, schedule = config.optimizer, config.schedule
    rate = {"s": 6e-4, "m": 3e-4, "l": 2.5e-4, "xl": 2e-4}
    assert optimizer.learning_rate == rate[config.model.preset.split("_")[-1]]
    assert (optimizer.betas, optimizer.weight_decay, optimizer.decay) == ((0.9, 0.999), 0.1, "all")
    assert optimizer.clip_grad_norm == 1.0
    assert (schedule.kind, schedule.warmup_ratio, schedule.final_ratio) == ("cosine", 0.1, 0.1)
    assert config.tokens_per_step == 512 * 1024
    assert config.parallel.precision == "bf16"
    assert config.model.vocab_size == 32000
