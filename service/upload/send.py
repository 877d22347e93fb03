"""The way of local files to storage: several at a time, each read back, only those that are not there yet."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from service.errors import Fault, InputError, StorageError
from service.spec.job import JobSpec
from service.storage import Progress, Storage
from service.storage.names import changed
from service.storage.objects import PART
from service.storage.transfer import Meter, in_parallel
from service.upload.csvs import rewritten
from service.upload.hashes import LocalFile
from service.upload.plan import UploadPlan

_SMALL_AT_ONCE = 16
_BLOCK = 1_000


def upload(plan: UploadPlan, storage: Storage, progress: Progress | None = None) -> JobSpec:
    """Send what is not there yet. Cut off, the same command sends what is still missing, of large files the parts.

    Args:
        plan: what `plan_uploads` has made.
        storage: the root of the uploads, `plan.uri`.
        progress: takes (bytes sent, bytes in all).

    Returns:
        the spec with what was local replaced by where it is now.

    Raises:
        InputError: a file has changed since it was hashed, or has gone.
        StorageError: the store refuses, or fails for too long.
    """
    meter = Meter(plan.new_bytes, progress)
    try:
        _send(plan, storage, meter.advance)
    except OSError as error:  # of a local root; one on object storage has errors of its own
        raise StorageError(f"{storage.path()}: cannot be written ({error.strerror or error})") from error
    return spec_there(plan)


def spec_there(plan: UploadPlan) -> JobSpec:
    """The spec with what is local replaced by where it will be. Names come from contents: it is known beforehand."""
    return with_values(plan.spec, {item.setting: item.value for item in plan.items})


def _send(plan: UploadPlan, storage: Storage, advance: Callable[[int], None]) -> None:
    large = {name: file for name, file in plan.objects.items() if file.size > PART}
    small = [(name, file) for name, file in plan.objects.items() if name not in large]
    in_parallel(lambda name: _send_large(storage, name, large[name], advance), sorted(large))
    with ThreadPoolExecutor(_SMALL_AT_ONCE) as pool:
        for start in range(0, len(small), _BLOCK):
            calls = [pool.submit(_send_small, storage, *each, advance) for each in small[start : start + _BLOCK]]
            try:
                for call in calls:
                    call.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    # Last: a CSV that is there says that its clips are.
    for name, source in plan.csvs.items():
        _send_csv(plan, storage, name, source, advance)


def with_values(spec: JobSpec, values: dict[str, str]) -> JobSpec:
    """The spec with other values of some settings (`section.name`)."""
    changes: dict[str, dict[str, Any]] = {}
    for setting, value in values.items():
        section, name = setting.split(".")
        changes.setdefault(section, {})[name] = value
    return spec.model_copy(
        update={section: getattr(spec, section).model_copy(update=update) for section, update in changes.items()}
    )


def _send_large(storage: Storage, name: str, file: LocalFile, advance: Callable[[int], None]) -> None:
    try:
        storage.put_file(Path(file.path), name, sha256=file.sha256, advance=advance)
    except OSError as error:
        if error.filename != file.path:
            raise
        raise _gone(file.path, error) from error


def _send_small(storage: Storage, name: str, file: LocalFile, advance: Callable[[int], None]) -> None:
    try:
        content = Path(file.path).read_bytes()
    except OSError as error:
        raise _gone(file.path, error) from error
    if hashlib.sha256(content).hexdigest() != file.sha256:
        raise changed(Path(file.path))
    storage.write_bytes(name, content)
    advance(file.size)


def _send_csv(plan: UploadPlan, storage: Storage, name: str, source: str, advance: Callable[[int], None]) -> None:
    with tempfile.TemporaryDirectory(prefix="whisper-jobs-") as scratch:
        path, digest = Path(scratch, Path(name).name), hashlib.sha256()
        with open(path, "wb") as file:
            for line in rewritten(source, plan.local):
                file.write(line)
                digest.update(line)
        if digest.hexdigest() != path.stem:
            raise changed(Path(source))
        storage.put_file(path, name, sha256=path.stem, advance=advance)


def _gone(path: str, error: OSError) -> InputError:
    reason = (error.strerror or str(error)).lower()
    return InputError([Fault(path, f"could be read before, and now cannot ({reason}); the same command goes on")])
