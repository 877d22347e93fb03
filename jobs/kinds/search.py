"""`kind: search`: try settings, then do what a train job does with the best."""

from __future__ import annotations

from typing import Any

from jobs.job import Job
from jobs.kinds.evaluate import score_rows
from jobs.kinds.training import begin_training, finish_training
from jobs.progress import seconds_text
from service.artifacts import BASE_LINES, BaseModelRecord
from service.spec.counted import counted
from service.spec.job import JobSpec
from service.spec.space import planned_trials, words_of
from service.trials import ENDED, Search, Trial


def search_job(job: Job) -> dict[str, Any]:
    """Do it; returns the content of metrics.json."""
    from jobs.search.importance import importance_of
    from jobs.search.ledger import Ledger
    from jobs.search.winner import clean_up, final_job, ship, take_to_the_end, verdict_of

    data, base = begin_training(job)
    rows = data["train"]["rows"]
    untuned = job.stages.run("evaluate", "scoring the untuned model", lambda: _score_base(job, base))
    ledger = Ledger(job.root, job.spec, untuned, lambda trial, search: _tell(job, trial, search))
    found = job.stages.run("search", _plan_words(job), lambda: _explore(job, ledger, base, rows))
    if (settled := job.stages.kept("winner")) is None:
        winner, trained = take_to_the_end(job, ledger, rows, base.revision)
    else:
        winner = next(trial for trial in ledger.trials if trial.id == settled["winner"])
        trained = job.stages.kept(f"train-{winner.id}") or {}

    def settle() -> dict[str, Any]:
        ship(job, ledger, winner, rows)
        verdict = verdict_of(ledger, winner)
        job.events.emit({"event": "notice", "text": verdict})
        importance = importance_of(ledger.trials)
        table = ledger.publish(winner=winner.id, verdict=verdict, importance=importance, ended=found["ended"])
        return _summary(table, winner)

    summary = job.stages.run("winner", f"keeping the adapter of {winner.id}", settle)
    clean_up(job, ledger)
    return finish_training(job, trained, data, base, final_job(job, winner, rows), search=summary)


def _score_base(job: Job, base: BaseModelRecord) -> dict[str, Any]:
    model = {"base": base.name, "revision": base.revision, "adapter": None, "run": None}
    rates = score_rows(job, model, BASE_LINES)
    job.events.emit({"event": "evaluation", "what": "base", "wer": rates["wer"], "cer": rates["cer"]})
    if job.spec.evaluation.metric == "loss":
        from jobs.score_model import loss_of

        call = (job.spec.to_json(), job.root.path(), model)
        rates |= {"loss": job.run(loss_of, *call, cpus=job.resources.cpus, gpus=job.gpus)}
    return {name: rates[name] for name in ("wer", "cer", "loss") if name in rates}


def _explore(job: Job, ledger: Any, base: BaseModelRecord, rows: int) -> dict[str, Any]:
    from jobs.search.explore import explore, trials_at_once
    from jobs.search.trial import TrialPlan

    plan = TrialPlan(job.spec.to_json(), job.root.path(), base.revision, rows)
    return {"ended": explore(job, ledger, plan, trials_at_once(job))}


def _plan_words(job: Job) -> str:
    search = job.spec.search
    budgets = [f"{search.hours:g} h"] if search.hours else []
    budgets += [f"{search.gpu_hours:g} GPU-hours"] if search.gpu_hours else []
    within = f", within {' and '.join(budgets)}" if budgets else ""
    repeats = f", {search.repeats} seeds each" if search.repeats > 1 else ""
    return f"{counted(planned_trials(job.spec), 'trial')} by {search.sampler}, {search.scheduler}{repeats}{within}"


def _share(trial: Trial, spec: JobSpec) -> float:
    """How much of a trial is done, its repeats counted."""
    if not trial.evaluations:
        return 0.0
    repeats_done = len({each.seed for each in trial.evaluations}) - 1
    return (repeats_done + trial.evaluations[-1].number / spec.search.evaluations) / spec.search.repeats


def _tell(job: Job, trial: Trial, search: Search) -> None:
    """Tell of a trial's row, and of how far the search is."""
    scored = [each for each in search.trials[1:] if each.score is not None and each.status != "failed"]
    best = min(scored, key=lambda each: float(each.score or 0.0), default=None)
    done = sum(each.status in ENDED for each in search.trials[1:])
    job.events.emit(
        {
            "event": "trial",
            **trial.model_dump(mode="json", exclude={"evaluations", "scores"}),
            "share": _share(trial, job.spec),
            "metric": search.metric,
            "done": done,
            "planned": search.planned,
            "best": None if best is None else best.id,
            "best_score": None if best is None else best.score,
        }
    )


def _summary(table: Search, winner: Trial) -> dict[str, Any]:
    """What metrics.json and manifest.json say of the search."""
    shown = {"id", "origin", "settings", "status", "cause", "score", "step", "steps", "final"}
    return {
        "winner": winner.id,
        "settings": winner.settings,
        "settings_text": words_of(winner.settings),
        "verdict": table.verdict,
        "seed": table.seed,
        "metric": table.metric,
        "ended": table.ended,
        "seconds": table.seconds,
        "time": seconds_text(table.seconds),
        "gpu_hours": table.gpu_hours,
        "trials": [trial.model_dump(mode="json", include=shown) for trial in table.trials],
    }
