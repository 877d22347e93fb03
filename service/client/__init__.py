"""The client of a Ray cluster, over its Jobs API alone: HTTP and a WebSocket, no Ray on this machine.

address.py   which cluster, with which token
api.py       one method per call, and what each answer means
record.py    a job as the cluster knows it
package.py   our code and the spec as the working directory of a job
check.py     what the cluster itself says of a job before it is submitted
submit.py    attach, refuse or submit
follow.py    a job's log to its end, whatever happens to the connection
progress.py  what the lines of a log say of stage, step, loss, WER and time left
stop.py      a checkpoint first, then the end
doctor.py    all that a job needs of this machine and the cluster, one line each
"""
