"""Published systems to compare with, one file each; they import model_script, which knows none of them."""

from __future__ import annotations

import importlib
from typing import Any

SYSTEMS = {  # the name in a checkpoint: module, model, config, recipe for two cores
    "ConditionalFlow": ("model_script", "ConditionalFlow", "Config", "cpu_train_config.json"),
    "RetinexNet": ("baselines.retinexnet", "RetinexNet", "RetinexConfig", "baselines/retinexnet.json"),
    "UPTFlow": ("baselines.upt_flow", "UPTFlow", "UPTFlowConfig", "baselines/upt_flow.json"),
    "AnlightenDiff": ("baselines.anlightendiff", "AnlightenDiff", "AnlightenConfig", "baselines/anlightendiff.json"),
}


def classes(system: str) -> tuple[type[Any], type[Any]]:
    """The model's and the config's class of one of SYSTEMS; its module is imported only now."""
    module, model, config, _ = SYSTEMS[system]
    found = importlib.import_module(module)
    return getattr(found, model), getattr(found, config)
