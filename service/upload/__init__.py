"""What a spec reads on this machine sent to storage, where a cluster can read it: each content once.

plan.py    what has to go, and all faults at once; nothing is sent
csvs.py    the rows of a CSV, and the CSV that goes in its place
models.py  which files of a model's or a dataset's folder are sent
hashes.py  files by their content, in parallel
send.py    the way there, gone on with where it stopped
"""

from service.upload.plan import Item, UploadPlan, plan_uploads, uploads_uri
from service.upload.send import spec_there, upload

__all__ = ["Item", "UploadPlan", "plan_uploads", "spec_there", "upload", "uploads_uri"]
