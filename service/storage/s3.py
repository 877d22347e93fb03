"""S3 through s3fs: its calls with one retry, ours, and large uploads that go on where they were cut off."""

from __future__ import annotations

import base64
import hashlib
import os
from collections.abc import Callable, Iterable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import sync

from service.storage.objects import PART, Found
from service.storage.retry import TIMEOUT_S, Caller, code_of, passes
from service.storage.transfer import in_parallel, pieces

MOST_PARTS = 10_000
ABANDONED_S = 86_400.0
"""An upload that is older is nobody's work any more."""
SHA256 = "sha256"
"""Under this name an object's metadata has the hash of its content."""


@lru_cache(maxsize=4)
def _file_system(environment: tuple[tuple[str, str], ...], process: int) -> Any:
    """s3fs with the credentials and addresses of this environment; botocore reads them when it begins."""
    config = {
        "connect_timeout": min(10.0, TIMEOUT_S),
        "read_timeout": TIMEOUT_S,
        "retries": {"total_max_attempts": 1},
        "max_pool_connections": 64,
        # Stores that are not Amazon's know only some of the newer checksums; ours are MD5 on the way, SHA-256 after it.
        "request_checksum_calculation": "when_required",
        "response_checksum_validation": "when_required",
    }
    found = fsspec.filesystem("s3", config_kwargs=config, use_listings_cache=False, skip_instance_cache=True)
    found.retries = 1
    return found


class S3Objects:
    """See Objects.

    Args:
        place: bucket and prefix, `bucket/some/folder`.
        call: makes calls until they succeed.
    """

    def __init__(self, place: str, call: Caller) -> None:
        variables = sorted((key, value) for key, value in os.environ.items() if key.startswith(("AWS_", "FSSPEC_")))
        self._fs = _file_system(tuple(variables), os.getpid())
        self._bucket, _, prefix = place.partition("/")
        self._prefix = f"{prefix}/" if prefix else ""
        self._call = call

    def _s3(self, method: str, **parameters: Any) -> dict[str, Any]:
        action = "".join(word.capitalize() for word in method.split("_"))
        found: dict[str, Any] = self._call(action, lambda: self._fs.call_s3(method, Bucket=self._bucket, **parameters))
        return found

    def _all(self, method: str, entries: str, marks: dict[str, str], **parameters: Any) -> list[dict[str, Any]]:
        """The entries of a list that comes in pages; `marks` are parameters by the field that they continue from."""
        found: list[dict[str, Any]] = []
        while True:
            page = self._s3(method, **parameters)
            found += page.get(entries) or []
            if not page.get("IsTruncated"):
                return found
            parameters |= {parameter: page[field] for parameter, field in marks.items()}

    def listed(self, below: str = "") -> dict[str, Found]:
        prefix = f"{self._prefix}{below}/" if below else self._prefix
        found = self._all("list_objects_v2", "Contents", {"ContinuationToken": "NextContinuationToken"}, Prefix=prefix)
        return {
            entry["Key"][len(self._prefix) :]: Found(int(entry["Size"]), entry["ETag"])
            for entry in sorted(found, key=lambda entry: str(entry["Key"]))
            if not entry["Key"].endswith("/")  # what consoles make to show an empty folder
        }

    def folders(self, below: str) -> list[str]:
        prefix = f"{self._prefix}{below}/" if below else self._prefix
        marks = {"ContinuationToken": "NextContinuationToken"}
        found = self._all("list_objects_v2", "CommonPrefixes", marks, Prefix=prefix, Delimiter="/")
        return [entry["Prefix"][len(prefix) :].rstrip("/") for entry in found]

    def look(self, name: str) -> Found | None:
        try:
            found = self._s3("head_object", Key=self._prefix + name)
        except FileNotFoundError:
            return None
        answered = found["ResponseMetadata"]["HTTPHeaders"].get("date")
        now = parsedate_to_datetime(answered) if answered else datetime.now(UTC)
        age_s = (now - found["LastModified"]).total_seconds()
        return Found(int(found["ContentLength"]), found["ETag"], found["Metadata"].get(SHA256), age_s)

    def read(self, name: str, start: int = 0, length: int | None = None, etag: str | None = None) -> bytes:
        if length == 0:
            return b""
        conditions = {"IfMatch": etag} if etag else {}
        if length is not None or start:
            conditions["Range"] = f"bytes={start}-{'' if length is None else start + length - 1}"

        async def get() -> bytes:
            found = await self._fs._call_s3("get_object", Bucket=self._bucket, Key=self._prefix + name, **conditions)
            async with found["Body"] as body:
                content: bytes = await body.read()
            if len(content) != found["ContentLength"]:
                raise ConnectionError(f"{len(content)} bytes came, {found['ContentLength']} were announced")
            return content

        content: bytes = self._call("GetObject", lambda: sync(self._fs.loop, get))
        return content

    def put(self, name: str, content: bytes, sha256: str, *, only_new: bool = False, instead_of: str = "") -> str:
        conditions = ({"IfNoneMatch": "*"} if only_new else {}) | ({"IfMatch": instead_of} if instead_of else {})
        parameters = {"Body": content, "ContentMD5": _base64(_md5(content)), "Metadata": {SHA256: sha256}} | conditions
        try:
            return str(self._s3("put_object", Key=self._prefix + name, **parameters)["ETag"])
        except FileExistsError:
            # The answer to a call of ours that did succeed may have been lost on its way.
            present = self.look(name)
            if present is None or present.sha256 != sha256:
                raise
            return present.etag

    def upload(self, name: str, path: Path, sha256: str, advance: Callable[[int], None]) -> None:
        key, size = self._prefix + name, path.stat().st_size
        parts = list(enumerate(pieces(size, max(PART, -(-size // MOST_PARTS))), 1))
        upload, sent = self._begun(key, path, parts)
        if upload is None:
            upload = str(self._s3("create_multipart_upload", Key=key, Metadata={SHA256: sha256})["UploadId"])

        place = {"Key": key, "UploadId": upload}

        def send(part: tuple[int, tuple[int, int]]) -> dict[str, Any]:
            number, (start, length) = part
            if number not in sent:
                content = _piece(path, start, length)
                part_of = {"PartNumber": number, "Body": content, "ContentMD5": _base64(_md5(content))}
                sent[number] = str(self._in_upload("upload_part", place, **part_of)["ETag"])
            advance(length)
            return {"PartNumber": number, "ETag": sent[number]}

        complete = {"Parts": in_parallel(send, parts)}
        try:
            self._in_upload("complete_multipart_upload", place, MultipartUpload=complete)
        except FileNotFoundError:
            # NoSuchUpload: it was completed by a call of ours whose answer was lost; the read-back tells.
            if self.look(name) is None:
                raise

    def _in_upload(self, method: str, place: dict[str, str], **parameters: Any) -> dict[str, Any]:
        """A call that is part of a large upload.

        Raises:
            FileNotFoundError: there is no such upload any more: another process has completed it or given it up.
        """
        action = "".join(word.capitalize() for word in method.split("_"))

        def call() -> dict[str, Any]:
            try:
                found: dict[str, Any] = self._fs.call_s3(method, Bucket=self._bucket, **place, **parameters)
                return found
            except Exception as error:
                if not passes(error) or not self._is_over(place):
                    raise
            # Some stores have no better answer to it than 500, which would be tried again and again.
            raise FileNotFoundError(place["Key"])

        answer: dict[str, Any] = self._call(action, call)
        return answer

    def _is_over(self, place: dict[str, str]) -> bool:
        try:
            self._fs.call_s3("list_parts", Bucket=self._bucket, MaxParts=1, **place)
        except Exception as error:  # noqa: BLE001  # whatever else it is, the call before is made again
            return isinstance(error, FileNotFoundError) or code_of(error)[1] == 404
        return False

    def _begun(
        self, key: str, path: Path, parts: list[tuple[int, tuple[int, int]]]
    ) -> tuple[str | None, dict[int, str]]:
        """An upload of this very file that was cut off, or is still at work, with its parts' etags.

        Those of other content are deleted, and fitting ones too once they are so old that nobody is at work on them.
        """
        found: tuple[str | None, dict[int, str]] = (None, {})
        for upload in self._uploads(key):
            if upload["Key"] != key:
                continue
            place = {"Key": key, "UploadId": upload["UploadId"]}
            marks = {"PartNumberMarker": "NextPartNumberMarker"}
            there = {int(part["PartNumber"]): part for part in self._all("list_parts", "Parts", marks, **place)}
            fits = there.keys() <= dict(parts).keys() and all(
                int(there[number]["Size"]) == length
                and there[number]["ETag"].strip('"')
                == hashlib.md5(_piece(path, start, length), usedforsecurity=False).hexdigest()
                for number, (start, length) in parts
                if number in there
            )
            if fits and len(there) > len(found[1]):
                found = (upload["UploadId"], {number: part["ETag"] for number, part in there.items()})
            elif not fits or _age_s(upload) > ABANDONED_S:
                self._abort(key, upload["UploadId"])
        return found

    def _uploads(self, prefix: str) -> list[dict[str, Any]]:
        marks = {"KeyMarker": "NextKeyMarker", "UploadIdMarker": "NextUploadIdMarker"}
        return self._all("list_multipart_uploads", "Uploads", marks, Prefix=prefix)

    def _abort(self, key: str, upload: str | None) -> None:
        if upload is not None:
            try:
                self._s3("abort_multipart_upload", Key=key, UploadId=upload)
            except FileNotFoundError:
                return  # it has gone already

    def remove(self, names: Iterable[str]) -> None:
        in_parallel(lambda name: self._s3("delete_object", Key=self._prefix + name), list(names))

    def abandon(self, below: str = "") -> None:
        for upload in self._uploads(self._prefix + below):
            if not below or (upload["Key"] + "/").startswith(f"{self._prefix}{below}/"):
                self._abort(upload["Key"], upload["UploadId"])


def _age_s(upload: dict[str, Any]) -> float:
    return float((datetime.now(UTC) - upload["Initiated"]).total_seconds())


def _piece(path: Path, start: int, length: int) -> bytes:
    with open(path, "rb") as file:
        file.seek(start)
        return file.read(length)


def _md5(content: bytes) -> bytes:
    return hashlib.md5(content, usedforsecurity=False).digest()


def _base64(content: bytes) -> str:
    return base64.b64encode(content).decode()
