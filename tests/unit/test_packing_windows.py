"""Windows that utterances share: who is with whom, what is heard, and what is to be said."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from datasets import Dataset
from engine import job, prepared, tone
from hypothesis import given
from hypothesis import strategies as st

from jobs.augment import Augmenter
from jobs.batches import Loader, Schedule
from jobs.model import load_whisper
from jobs.packing import Entry, Joinable, Packing, entries, flat, make_packing
from jobs.tokens import Prompter
from jobs.windows import encode_window, join_clips
from service.spec.augment import AugmentConfig
from service.spec.checks import findings
from service.spec.languages import WITHOUT_SPACES

WINDOW, GAP, TOKENS = 480_000, 3_200, 444
CLIPS = st.lists(st.tuples(st.integers(-1, 3), st.integers(1, WINDOW), st.integers(1, TOKENS)), min_size=1, max_size=80)


def packing_of(clips: list[tuple[int, int, int]], single: float = 0.0, seed: int = 1) -> Packing:
    group, samples, tokens = (np.array(values, np.int64) for values in zip(*clips, strict=True))
    return Packing(Joinable(group, samples, tokens), WINDOW, GAP, TOKENS, single, seed)


@given(CLIPS, st.integers(0, 3), st.integers(1, 9), st.sampled_from([0.0, 0.3]))
def test_windows_hold_what_fits_of_one_group_and_each_row_once(
    clips: list[tuple[int, int, int]], epoch: int, size: int, single: float
) -> None:
    order, begins = packing_of(clips, single).plan(epoch, size)
    again = packing_of(clips, single).plan(epoch, size)
    assert (order == again[0]).all()
    assert (begins == again[1]).all()
    assert sorted(order.tolist()) == list(range(len(clips)))
    for start in range(0, len(clips), size):
        assert begins[start], "a window goes from one forward pass into the next"
    for entry in entries(order.tolist(), begins.tolist()):
        if isinstance(entry, int):
            continue
        assert len({clips[row][0] for row in entry}) == 1
        assert clips[entry[0]][0] >= 0
        assert sum(clips[row][1] for row in entry) + GAP * (len(entry) - 1) <= WINDOW
        assert sum(clips[row][2] for row in entry) <= TOKENS


def test_windows_are_filled_and_a_share_stays_alone() -> None:
    random = np.random.default_rng(0)
    clips = [(row % 3, int(samples), 20) for row, samples in enumerate(random.integers(32_000, 128_000, 3_000))]

    def windows(single: float) -> tuple[int, int]:
        found = entries(*(each.tolist() for each in packing_of(clips, single).plan(0, 60)))
        return len(found), sum(isinstance(entry, int) for entry in found)

    audio = sum(clip[1] for clip in clips) / WINDOW
    assert audio / windows(0.0)[0] > 0.9
    assert windows(0.0)[1] < 20
    assert windows(0.1)[1] == pytest.approx(300, abs=60)


def test_epochs_and_seeds_have_other_windows() -> None:
    clips = [(0, 100_000, 10)] * 100
    plans = [packing_of(clips, seed=seed).plan(epoch, 20)[0].tolist() for seed in (1, 2) for epoch in (0, 1)]
    assert len({tuple(plan) for plan in plans}) == 4


@given(CLIPS, st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(0, 12))
def test_any_number_of_workers_sees_the_same_windows(
    clips: list[tuple[int, int, int]], size: int, accum: int, workers: int, step: int
) -> None:
    def passes(accum: int, workers: int) -> list[Any]:
        schedule = Schedule(len(clips), size, accum, workers, seed=1, packing=packing_of(clips, 0.1))
        found = [schedule.passes(step, rank) for rank in range(workers)]
        return [found[rank][turn] for turn in range(accum) for rank in range(workers)]

    together = passes(accum, workers)
    assert together == passes(accum * workers, 1)
    assert all(len(flat(pass_)) <= size for pass_ in together)


@given(CLIPS, st.integers(1, 4), st.integers(1, 3))
def test_steps_and_epochs_are_those_of_single_clips(clips: list[tuple[int, int, int]], size: int, accum: int) -> None:
    packed = Schedule(len(clips), size, accum, 1, seed=1, packing=packing_of(clips))
    single = Schedule(len(clips), size, accum, 1, seed=1)
    assert packed.steps_per_epoch == single.steps_per_epoch
    for step in range(2 * single.steps_per_epoch):
        lengths = [[len(flat(pass_)) for pass_ in schedule.passes(step, 0)] for schedule in (packed, single)]
        assert lengths[0] == lengths[1]
    assert single.order(1).tolist() == np.random.default_rng([1, 1]).permutation(len(clips)).tolist()


def test_clips_follow_each_other_with_silence_between_them() -> None:
    one, two, three = tone(1.0), tone(0.5, 200), tone(0.25, 300)
    samples_S, spans = join_clips([one, two, three], 3_200)
    silence = np.zeros(3_200, np.float32)
    np.testing.assert_array_equal(samples_S, np.concatenate([one, silence, two, silence, three]))
    assert spans == [(0, 16_000), (19_200, 27_200), (30_400, 34_400)]


@pytest.fixture(scope="module")
def prompter(processor: Any) -> Prompter:
    return Prompter(processor.tokenizer, multilingual=True, max_tokens=448)


TEXT = st.text(st.characters(exclude_categories=("Cs", "Cc")), min_size=1).map(lambda text: " ".join(text.split()))


@given(st.lists(TEXT.filter(bool), min_size=1, max_size=4))
def test_without_timestamps_the_ids_are_those_of_the_joined_text(
    prompter: Prompter, processor: Any, texts: list[str]
) -> None:
    texts = [text for text in texts if not prompter.control_token(text)]
    expected = processor.tokenizer(" " + " ".join(texts), add_special_tokens=False).input_ids if texts else []
    assert prompter.encode_texts(texts, "en").inputs[4:] == expected


def record_of(text: str, language: str = "en", segments: str = "") -> dict[str, Any]:
    return {"text": text, "language": language, "segments": segments, "no_speech": False}


def said(processor: Any, prompter: Prompter, records: list[dict[str, Any]], *, timestamps: bool) -> str:
    spans = [(0, 16_000), (19_200, 27_200)]
    tokens = encode_window(prompter, records, spans, [1.0, 2.0], timestamps=timestamps)
    assert tokens.labels == [*tokens.inputs[1:], processor.tokenizer.eos_token_id]
    text: str = processor.tokenizer.decode(tokens.inputs, decode_with_timestamps=True)
    return text


@pytest.mark.setting("data.timestamps", "data.packing")
def test_a_windows_transcript_is_whispers_own_format(processor: Any, prompter: Prompter) -> None:
    plain = [record_of("Open it."), record_of("Thank you")]
    start = "<|startoftranscript|><|en|><|transcribe|>"
    assert said(processor, prompter, plain, timestamps=False) == f"{start}<|notimestamps|> Open it. Thank you"
    expected = f"{start}<|0.00|> Open it.<|1.00|><|1.20|> Thank you<|1.70|>"
    assert said(processor, prompter, plain, timestamps=True) == expected
    # A row's own segments, at twice the speed, from where it begins.
    plain[1] = record_of("Thank you", segments='[[0.1, 0.4, "Thank"], [0.5, 0.9, "you"]]')
    timed = f"{start}<|0.00|> Open it.<|1.00|><|1.24|> Thank<|1.40|><|1.44|> you<|1.64|>"
    assert said(processor, prompter, plain, timestamps=True) == timed


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_languages_without_spaces_get_none(processor: Any, prompter: Prompter, language: str) -> None:
    assert language in WITHOUT_SPACES
    records = [record_of("开门", language), record_of("谢谢", language)]
    start = f"<|startoftranscript|><|{language}|><|transcribe|>"
    assert said(processor, prompter, records, timestamps=False) == f"{start}<|notimestamps|>开门谢谢"
    assert said(processor, prompter, records, timestamps=True) == f"{start}<|0.00|>开门<|1.00|><|1.20|>谢谢<|1.70|>"


COLUMNS = ("path", "text", "language", "speaker", "no_speech", "segments")


@pytest.fixture(scope="module")
def spoken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.csv and val.csv of 24 clips of 0.3 to 0.76 s by two speakers in two languages, some silent, some timed."""
    folder: Path = tmp_path_factory.mktemp("spoken")
    rows = []
    for row in range(24):
        seconds = 0.3 + row / 50
        silent = row % 8 == 7
        samples = np.zeros(4_800, np.float32) if silent else tone(seconds, 200 + 40 * row)
        soundfile.write(folder / f"{row}.wav", samples, 16_000)
        segments = (
            f'[[0.0, {seconds / 2}, "one"], [{seconds / 2}, {seconds}, "{row}"]]' if row % 5 == 0 and not silent else ""
        )
        text = "" if silent else f"one {row}"
        rows.append((f"{row}.wav", text, "es" if row % 3 else "en", f"voice {row % 2}", silent or "", segments))
    for name in ("train", "val"):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([COLUMNS, *rows])
    return folder


class Spoken:
    """The prepared rows of `spoken`, a loader of them, and their plan."""

    def __init__(
        self, base: Path, folder: Path, root: Path, timestamps: float = 0.5, augment: dict[str, Any] | None = None
    ) -> None:
        data = {"packing": True, "packing_gap_s": 0.1, "timestamps": timestamps}
        self.spec = job(base, folder, root, {"data": data, "augment": augment or {}}, per_dev_batch=6)
        self.rows = Dataset.from_file(prepared(self.spec).train)
        self.whisper = load_whisper(str(base))
        self.extractor = self.whisper.processor.feature_extractor
        seed = self.spec.training.seed
        self.loader = Loader(
            self.rows, self.extractor, self.whisper.prompter(), threads=2, prefetch=3,
            augmenter=Augmenter(self.spec.augment, seed), timestamps=timestamps, gap_s=0.1,
        )  # fmt: skip
        self.schedule = Schedule(len(self.rows), 6, 1, 1, seed, make_packing(self.spec, self.rows, self.whisper))

    def passes(self, epoch: int) -> list[list[Entry]]:
        """An epoch's four forward passes."""
        return [self.schedule.passes(4 * epoch + step, 0)[0] for step in range(4)]


@pytest.mark.setting("data.packing")
def test_the_manifests_speakers_and_languages_stay_apart(tiny: Path, spoken: Path, tmp_path: Path) -> None:
    found = Spoken(tiny, spoken, tmp_path)
    assert found.rows["speaker"][:2] == ["voice 0", "voice 1"]
    windows = [entry for epoch in range(6) for pass_ in found.passes(epoch) for entry in pass_]
    joined = [entry for entry in windows if isinstance(entry, tuple)]
    assert len(joined) > 20
    for entry in joined:
        rows = [found.rows[row] for row in entry]
        assert len({(row["language"], row["speaker"]) for row in rows}) == 1
        assert not any(row["no_speech"] for row in rows)
        assert sum(row["duration_s"] for row in rows) + 0.1 * (len(rows) - 1) <= 2.0


@pytest.mark.setting("data.packing", "data.packing_gap_s")
def test_a_batch_of_windows_is_what_transformers_makes_of_the_joined_clips(
    tiny: Path, spoken: Path, tmp_path: Path
) -> None:
    found = Spoken(tiny, spoken, tmp_path, timestamps=0.0)
    tokenizer, gap = found.whisper.processor.tokenizer, np.zeros(1_600, np.float32)
    silent = tokenizer.convert_tokens_to_ids(["<|nospeech|>", "<|endoftext|>"])
    for (batch,), pass_ in zip(found.loader.steps(found.schedule, 0, 0, 4), found.passes(0), strict=True):
        assert batch.rows == flat(pass_)
        assert len(batch.features_BMF) == len(batch.inputs_BT) == len(pass_) < 6
        for entry, features_MF, labels_T in zip(pass_, batch.features_BMF, batch.labels_BT, strict=True):
            rows = [found.rows[row] for row in flat([entry])]
            pieces = [piece for row in rows for piece in (soundfile.read(row["path"], dtype="float32")[0], gap)]
            samples_S = np.concatenate(pieces[:-1])
            expected = found.extractor([samples_S], sampling_rate=16_000, return_tensors="pt").input_features[0]
            np.testing.assert_allclose(features_MF, expected, atol=1e-6)
            tokenizer.set_prefix_tokens(language=rows[0]["language"], task="transcribe", predict_timestamps=False)
            labels = tokenizer(" " + " ".join(row["text"] for row in rows)).input_ids[1:]
            got = [label for label in labels_T.tolist() if label >= 0]
            assert got == (silent if rows[0]["no_speech"] else labels)


def test_varied_clips_fit_and_are_those_of_single_windows(tiny: Path, spoken: Path, tmp_path: Path) -> None:
    augment = {"speed": [0.8, 1.25], "gain_db": [-6, 6]}
    found = Spoken(tiny, spoken, tmp_path, timestamps=1.0, augment=augment)
    augmenter = Augmenter(AugmentConfig(**augment), found.spec.training.seed)
    first = found.whisper.processor.tokenizer.convert_tokens_to_ids("<|0.00|>")
    for epoch in range(3):
        for pass_ in found.passes(epoch):
            batch = found.loader.make(pass_, epoch)
            for entry, features_MF, labels_T in zip(pass_, batch.features_BMF, batch.labels_BT, strict=True):
                rows = flat([entry])
                clips = [
                    augmenter.audio(soundfile.read(found.rows[row]["path"], dtype="float32")[0], epoch, row)[0]
                    for row in rows
                ]
                samples_S, spans = join_clips(clips, 1_600)
                assert len(samples_S) <= 32_000 or len(rows) == 1
                expected = found.extractor([samples_S], sampling_rate=16_000, return_tensors="pt").input_features[0]
                np.testing.assert_allclose(features_MF, expected, atol=1e-6)
                times = [(label - first) * 320 for label in labels_T.tolist() if label >= first]
                if len(rows) > 1:
                    assert times == sorted(times)
                    assert abs(times[0] - spans[0][0]) <= 160
                    assert abs(times[-1] - spans[-1][1]) <= 200


@pytest.mark.setting("data.packing", "data.packing_single", "data.packing_gap_s")
def test_settings_that_do_nothing_are_told(tiny: Path, spoken: Path, tmp_path: Path) -> None:
    def said_of(data: dict[str, Any], **training: Any) -> list[tuple[bool, str]]:
        spec = job(tiny, spoken, tmp_path, {"data": data}, **training)
        found = [each for each in findings(spec) if any("packing" in name for name in each.settings)]
        return [(each.fatal, str(each.fault(each.settings[0]))) for each in found]

    assert said_of({"packing": True}) == []
    assert said_of({}, per_dev_batch=1) == []
    ((fatal, text),) = said_of({"packing": True}, per_dev_batch=1)
    assert fatal
    assert text.startswith("data.packing: true joins nothing: training.per_dev_batch, which counts utterances, is 1")
    told = said_of({"packing_single": 0.2, "packing_gap_s": 1.0})
    assert [fatal for fatal, _ in told] == [False, False]
    assert all("has no effect without data.packing" in text for _, text in told)
