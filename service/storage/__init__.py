"""The one seam to where artifacts are kept: a root given by a local path or a URI, through fsspec.

root.py     Storage, what everyone uses
local.py    a folder: files are written aside and renamed
remote.py   object storage: uploads read back by hash, downloads kept in a cache of the node
s3.py       S3's calls; generic.py those of any other fsspec file system
retry.py    which errors pass by themselves, and what the others mean
transfer.py pieces in parallel, gone on with where they stopped; cache.py copies on this machine
near.py     single objects that are read again and again, such as clips
"""

from service.storage.names import CHUNK, LOCK, PRIVATE_PREFIX, Progress, sha256_of
from service.storage.root import Storage

__all__ = ["CHUNK", "LOCK", "PRIVATE_PREFIX", "Progress", "Storage", "sha256_of"]
