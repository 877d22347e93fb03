"""The scores of a training: of the base before it, of the model in it, of the published adapter after it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jobs import distributed
from jobs.batches import Features
from jobs.evaluate import evaluate, from_lines, to_lines
from jobs.failures import inputs_that_were_there
from jobs.fast.encoder_outputs import SplitOutputs
from jobs.model import Whisper
from jobs.score import Scorer, Utterance, summarise
from jobs.train.runtime import Runtime
from jobs.train.session import Session
from jobs.transcribe import Listener
from service.artifacts import BASE_LINES, TUNED_LINES
from service.spec.job import JobSpec
from service.storage import Storage


@dataclass(frozen=True)
class Scores:
    """Scores models on a run's validation set; each worker makes every call.

    Attributes:
        spec: the run's.
        session: who the other workers are.
        storage: the run's root.
        runtime: device and precision.
        rows: the validation set.
        features: makes features of its rows, whose encoder outputs may be kept.
    """

    spec: JobSpec
    session: Session
    storage: Storage
    runtime: Runtime
    rows: Any
    features: Callable[[SplitOutputs | None], Features]

    def base(self, whisper: Whisper, outputs: SplitOutputs | None) -> dict[str, Any]:
        """Of the untuned model: what an earlier attempt has left, or measured now."""
        # One worker looks: on a network file system another may not see the file yet, and would wait for us for ever.
        if distributed.gather([self.storage.exists(BASE_LINES)])[0]:
            utterances = from_lines(self.storage.read_bytes(BASE_LINES).decode())
            return summarise(utterances, bootstrap=self.spec.evaluation.bootstrap)
        return self._kept(whisper, whisper.model, "base", BASE_LINES, outputs)

    def tuned(self, whisper: Whisper, model: Any) -> dict[str, Any]:
        """Of a tuned model, computed anew: a proof takes nothing that was kept."""
        found = self._kept(whisper, model, "tuned", TUNED_LINES, None)
        distributed.barrier()
        return found

    def rates(
        self, whisper: Whisper, model: Any, outputs: SplitOutputs | None, listener: Listener | None
    ) -> dict[str, float]:
        """WER and CER of a model in training."""
        _, summary = self._heard(whisper, model, "validation", outputs, listener=listener, bootstrap=0)
        return {name: summary[name] for name in ("wer", "cer")}

    def _kept(
        self, whisper: Whisper, model: Any, what: str, lines: str, outputs: SplitOutputs | None
    ) -> dict[str, Any]:
        utterances, summary = self._heard(whisper, model, what, outputs)
        if self.session.rank == 0:
            self.storage.write_text(lines, to_lines(utterances))
        self.session.emit({"event": "evaluation", "what": what, "wer": summary["wer"], "cer": summary["cer"]})
        return summary

    def _heard(
        self,
        whisper: Whisper,
        model: Any,
        what: str,
        outputs: SplitOutputs | None,
        *,
        listener: Listener | None = None,
        bootstrap: int | None = None,
    ) -> tuple[list[Utterance], dict[str, Any]]:
        def progress(done: int, total: int) -> None:
            self.session.emit({"event": "transcribed", "what": what, "done": done, "total": total})

        with self.runtime.autocast(), inputs_that_were_there():
            return evaluate(
                model,
                whisper.processor,
                self.rows,
                self.spec.evaluation,
                scorer=Scorer.of(self.spec, whisper.processor),
                multilingual=whisper.multilingual,
                rank=self.session.rank,
                workers=self.session.workers,
                threads=self.spec.data.threads,
                bootstrap=bootstrap,
                progress=progress,
                stopping=self.session.stopping,
                outputs=outputs,
                features=self.features(outputs),
                listener=listener,
            )
