"""What points support of a claim about slopes, and what they do not, in plain sentences."""

from __future__ import annotations

import math

from factorlm.report.scaling import between, chance, percent
from factorlm.report.tables import format_times
from factorlm.scaling import Comparison, PowerLawFit

SHOWN = 5e-5
"""Half of the last decimal that is printed of slopes."""
UNEQUAL = "they do not have as many seeds at each size"


def claim_sentences(comparison: Comparison, turning: float) -> list[str]:
    """On one family against another by straight lines; ``turning`` is the E where slopes swap."""
    return [
        _slope_sentence(comparison),
        *_split_sentence(comparison),
        _turning_sentence(comparison, turning),
        *_multiplier_sentence(comparison),
        f"{comparison.other} and {comparison.base}: {comparison.crossing}.",
    ]


def shared_sentences(comparison: Comparison) -> list[str]:
    """On one family against another by laws whose E is fitted with all other parameters."""
    slopes = comparison.slopes
    return [
        f"With E fitted, at loss {slopes.loss:.2f}: {_slope_sentence(comparison)}",
        f"{comparison.other} and {comparison.base}: {comparison.crossing}.",
    ]


def _slope_sentence(comparison: Comparison) -> str:
    slopes = comparison.slopes
    verdict = {
        True: "it is steeper",
        False: "it is flatter",
        None: "the points do not say which is steeper",
    }[slopes.is_steeper]
    interval = f"{percent(slopes.level)}: {between(slopes.low, slopes.high)}"
    return (
        f"{comparison.other} against {comparison.base}: slopes differ by "
        f"{slopes.difference:+.4f} ({interval}; {_p_text(slopes.p_value)}): {verdict}."
    )


def _p_text(p_value: float) -> str:
    """``p = 0.24`` or ``p < 0.001``."""
    text = chance(p_value)
    return f"p {text}" if text.startswith("<") else f"p = {text}"


def _split_sentence(comparison: Comparison) -> list[str]:
    split, slopes = comparison.split, comparison.slopes
    if split is None:
        return []
    interval = f"{percent(slopes.level)}: {between(split.gap_part_low, split.gap_part_high)}"
    whole = "Of that"
    if not _adds_up(comparison):
        whole = (
            f"With sizes weighed alike in both, as {UNEQUAL}, slopes differ by {split.total:+.4f}; "
            "of that"
        )
    return [
        f"{whole}, {split.flops_part:+.4f} is the ratio of FLOPs changing with size, which "
        f"{comparison.base}'s very losses would show too, and {split.gap_part:+.4f} the loss gap "
        f"changing ({interval}; {_p_text(split.gap_p_value)})."
    ]


def split_notes(comparison: Comparison) -> list[str]:
    """What the parts of a slope difference are parts of, where it is not the difference itself."""
    split = comparison.split
    if split is None or _adds_up(comparison):
        return []
    return [
        f"{comparison.other} less {comparison.base}: the parts by FLOPs and by loss gap are those "
        f"of {split.total:+.4f}, with sizes weighed alike in both: {UNEQUAL}."
    ]


def _adds_up(comparison: Comparison) -> bool:
    """False with other numbers of seeds in one family than in the other."""
    split = comparison.split
    return split is None or abs(split.total - comparison.slopes.difference) < SHOWN


def _turning_sentence(comparison: Comparison, turning: float) -> str:
    if math.isnan(turning):
        return "The order of the slopes is the same for every shared entropy E below the losses."
    return f"The order of the slopes turns at a shared entropy E of {turning:.2f} nats."


def _multiplier_sentence(comparison: Comparison) -> list[str]:
    found = comparison.multipliers
    if not found:
        return []
    ratios = [one.other_flops / one.base_flops for one in found]
    sure = sum(not one.multiplier_low <= 1 <= one.multiplier_high for one in found)
    return [
        f"For equal loss {comparison.other} needs {format_times(ratios[0])}x the FLOPs of "
        f"{comparison.base} at loss {found[0].loss:.2f} and {format_times(ratios[-1])}x at "
        f"{found[-1].loss:.2f}; "
        f"the interval leaves out 1 at {sure} of {len(found)} losses on the way."
    ]


def entropy_sentences(fit: PowerLawFit) -> list[str]:
    """On the entropy that families share, and what the points cannot tell of it."""
    return [entropy_sentence(fit), *(f"{text[0].upper()}{text[1:]}." for text in fit.warnings)]


def entropy_sentence(fit: PowerLawFit) -> str:
    """The entropy alone."""
    interval = f"{percent(fit.level)}: {fit.E_low:.2f} to {fit.E_high:.2f}"
    return f"A shared entropy E, fitted to all points: {fit.E:.2f} nats ({interval})."
