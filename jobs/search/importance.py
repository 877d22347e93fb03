"""How much each setting of a search has to do with the scores, by Optuna's PED-ANOVA, which bears few trials."""

from __future__ import annotations

import json
import warnings
from typing import Any

import optuna

from service.trials import Trial

LEAST_TRIALS = 4
"""Fewer scores say nothing."""


def importance_of(trials: list[Trial]) -> dict[str, float]:
    """Share of each setting in what tells good trials from the others; sums to 1.

    Args:
        trials: those with a score count. A setting that a trial has not is `training`'s own there, and its trial is
            left out of the comparison of that setting.

    Returns:
        by setting, the most important first; {} where there are too few trials or all scores are equal.
    """
    scored = [trial for trial in trials if trial.score is not None and trial.status != "failed"]
    names = sorted(set.intersection(*(set(trial.settings) for trial in scored))) if scored else []
    spaces = {name: space for name in names if (space := _distribution([t.settings[name] for t in scored]))}
    if len(scored) < LEAST_TRIALS or len({trial.score for trial in scored}) < 2 or not spaces:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the evaluator is called experimental
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(direction="minimize")
        for trial in scored:
            params = {name: _plain(trial.settings[name]) for name in spaces}
            study.add_trial(optuna.trial.create_trial(params=params, distributions=spaces, value=trial.score))
        found = optuna.importance.get_param_importances(
            study, evaluator=optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25)
        )
    total = sum(found.values())
    return {name: round(float(value / total), 4) for name, value in found.items()} if total > 0 else {}


def _distribution(values: list[Any]) -> Any:
    """A distribution that the values may have come from; None: they are all equal."""
    plain = [_plain(value) for value in values]
    if len(set(plain)) < 2:
        return None
    if all(isinstance(value, float | int) and not isinstance(value, bool) for value in plain):
        low, high = float(min(plain)), float(max(plain))
        return optuna.distributions.FloatDistribution(low, high, log=low > 0 and high / low > 20)
    return optuna.distributions.CategoricalDistribution(sorted(set(plain), key=str))


def _plain(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) or value is None else json.dumps(value)
