"""The Hugging Face boundary: build, initialise, load and save causal language models."""

from typing import TYPE_CHECKING

from factorlm.lazy import lazy_exports

if TYPE_CHECKING:
    from factorlm.hf.auto import FactorlmConfig, FactorlmQuantizer, register
    from factorlm.hf.budget import PlannedDataset, TrainerPlan, plan_for_budget
    from factorlm.hf.checkpoint import load, model_folder
    from factorlm.hf.initialize import initialize_, materialize_
    from factorlm.hf.models import build_causal_lm, model_config
    from factorlm.hf.presets import PRESETS, SIZES, preset_config
    from factorlm.hf.self_guided import SelfGuidedTraining

__all__ = [
    "PRESETS",
    "SIZES",
    "FactorlmConfig",
    "FactorlmQuantizer",
    "PlannedDataset",
    "SelfGuidedTraining",
    "TrainerPlan",
    "build_causal_lm",
    "initialize_",
    "load",
    "materialize_",
    "model_config",
    "model_folder",
    "plan_for_budget",
    "preset_config",
    "register",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "PRESETS": "presets",
        "SIZES": "presets",
        "FactorlmConfig": "auto",
        "FactorlmQuantizer": "auto",
        "PlannedDataset": "budget",
        "SelfGuidedTraining": "self_guided",
        "TrainerPlan": "budget",
        "build_causal_lm": "models",
        "initialize_": "initialize",
        "load": "checkpoint",
        "materialize_": "initialize",
        "model_config": "models",
        "model_folder": "checkpoint",
        "plan_for_budget": "budget",
        "preset_config": "presets",
        "register": "auto",
    },
)
