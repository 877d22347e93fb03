#!/usr/bin/env bash
# Within a build: a user, the folders that are written to, and a base that gives no rights away.
set -euo pipefail

groupadd --gid 1000 ray
useradd --uid 1000 --gid 1000 --home-dir /home/ray --shell /bin/bash --no-create-home ray
# Group 0 may write too: that is the group of a user that Kubernetes draws by chance.
install -d -o 1000 -g 0 -m 0775 /home/ray /cache
# A login shell sets PATH anew.
# shellcheck disable=SC2016  # it is for the login shell to expand
echo 'export PATH=/opt/whisper-jobs/venv/bin:/opt/whisper-jobs/bin:$PATH' >/etc/profile.d/whisper-jobs.sh

find / -xdev -type f -perm /6000 -exec chmod a-s {} +
find / -xdev -type d -perm -0002 ! -path /tmp ! -path /var/tmp -exec chmod o-w {} +
rm -rf /var/lib/apt/lists/* /var/cache/* /var/log/* /root/.cache /etc/passwd- /etc/group- /etc/shadow- /etc/gshadow-
