"""make_speech writes the folder that it promises."""

import re
from pathlib import Path

import pytest
import soundfile

from jobs.demo import make_speech, training_data
from jobs.demo.sentences import all_sentences
from jobs.demo.speech import Voice, synthesise

STEM = re.compile(r"^(?P<id>[^_]+)__(?P<language>[a-z]{2})__(?P<text>.+)$")
CLIPS = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("speech")
    make_speech.make_speech(directory, CLIPS, seed=1)
    return directory


def test_file_names_carry_unique_sentences(folder: Path) -> None:
    matches = [STEM.match(path.stem) for path in sorted(folder.iterdir())]
    assert len(matches) == CLIPS
    assert [match["id"] for match in matches if match] == [f"{number:04d}" for number in range(1, CLIPS + 1)]
    spoken = [(match["language"], match["text"].replace("_", " ")) for match in matches if match]
    assert len(set(spoken)) == CLIPS
    assert all(text in all_sentences(language) for language, text in spoken)
    assert sum(language == "es" for language, _ in spoken) == CLIPS * make_speech.SPANISH_SHARE


def test_formats_rates_and_channels_are_mixed(folder: Path) -> None:
    infos = [soundfile.info(path) for path in folder.iterdir()]
    assert {info.format for info in infos} == {"WAV", "FLAC"}
    assert {info.samplerate for info in infos} == set(make_speech.SAMPLE_RATES_HZ)
    assert {info.channels for info in infos} == {1, 2}
    assert all(0.8 < info.duration < 6 for info in infos)


def test_a_seed_writes_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_speech.make_speech(tmp_path, CLIPS, seed=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {
        path.name: path.read_bytes() for path in folder.iterdir()
    }


def test_no_voice_is_one_that_nano_was_trained_on() -> None:
    for names in make_speech.VOICES.values():
        for name in names:
            _accent, variant = name.split("+")
            assert variant not in training_data.VARIANTS
            assert synthesise("radio", Voice(name))[0].any()
