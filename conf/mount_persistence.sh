#!/bin/sh
# mount_persistence.sh: mounts the data volume that max_group moved to this instance (group option persistence_dev).
#
#   max_group attaches the volume of the interrupted instance to its replacement as /dev/sdz; mounting it is up to
#   the guest. Run this at every start, as root: from user data, /var/lib/cloud/scripts/per-boot, a systemd unit or
#   cron's @reboot. README.md, "Volumes that move", shows how.
#
# What it does:
#   - The data volume is there: mounts it at TARGET_DIR, in place of the empty disk that the template made, if that
#     is mounted there.
#   - It is still to come (the instance carries the tag spotmax:group): waits for it.
#   - Nothing was moved to this instance (no such tag): its own disk PERSISTENCE_DEV is the data. Mounts that.
#   - Mounted already: nothing. It may be run as often as you like.
# It makes no filesystem, stops no process and forces nothing.
#
# Options, as environment variables:
#   TARGET_DIR       /data      where the data is wanted
#   PERSISTENCE_DEV  /dev/sdf   the instance's own data disk, by any path (/dev/disk/by-label/data does as well);
#                               empty: an instance that nothing was moved to is left as it is
#   WAIT_SECONDS     900        how long to wait for the volume
#   BUSY_SECONDS     120        how long to try, once it is there, to get it mounted (TARGET_DIR may be busy)
#   POLL_SECONDS     1          between two looks
#   TAG_SECONDS      15         between two calls of `aws ec2 describe-tags`, where tags are read that way
#   UNTAGGED_SECONDS 30         how long not to believe that an instance has no tag at all: AWS may be late to show them
#   MOUNT_OPTIONS    none       for mount -o
#   ON_MOUNTED       none       a shell command to run after this script has mounted something ("systemctl start db")
#   IMDS_URL         http://169.254.169.254
# For tests: DEV_ROOT (/dev), MOUNTS (/proc/self/mounts), LOCK (/run/mount_persistence.lock).
#
# The tags come from the instance's metadata, where the launch template allows that (InstanceMetadataTags=enabled:
# free, and at once), else from `aws ec2 describe-tags`, which needs the aws command and ec2:DescribeTags.
#
# Exit codes: 0 mounted, or nothing to do; 1 given up or cannot be done. What it does is said on standard error and
# in the system log (tag mount_persistence).

set -u
# cron's PATH is short.
PATH=$PATH:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin:/snap/bin
export PATH AWS_PAGER=''

TARGET_DIR=${TARGET_DIR:-/data}
PERSISTENCE_DEV=${PERSISTENCE_DEV-/dev/sdf}
WAIT_SECONDS=${WAIT_SECONDS:-900}
BUSY_SECONDS=${BUSY_SECONDS:-120}
POLL_SECONDS=${POLL_SECONDS:-1}
TAG_SECONDS=${TAG_SECONDS:-15}
UNTAGGED_SECONDS=${UNTAGGED_SECONDS:-30}
MOUNT_OPTIONS=${MOUNT_OPTIONS:-}
ON_MOUNTED=${ON_MOUNTED:-}
IMDS_URL=${IMDS_URL:-http://169.254.169.254}
DEV_ROOT=${DEV_ROOT:-/dev}
MOUNTS=${MOUNTS:-/proc/self/mounts}
LOCK=${LOCK:-/run/mount_persistence.lock}

# ---- Speaking, and the time ------------------------------------------------------------------------------

log() {
  printf 'mount_persistence: %s\n' "$*" >&2
  logger -t mount_persistence -- "$*" 2>/dev/null || :
}

die() {
  log "error: $*"
  exit 1
}

# What is looked at every second is said once, until it changes.
last_said=
say_once() {
  [ "$*" = "$last_said" ] || log "$*"
  last_said=$*
}

# Seconds since the start of the machine: at boot the clock may still be set.
now() {
  read -r up _ </proc/uptime
  printf '%s\n' "${up%%.*}"
}

# ---- Metadata and tags -----------------------------------------------------------------------------------

if command -v curl >/dev/null; then
  request() { # METHOD HEADER PATH
    curl -fs --noproxy '*' --max-time 5 -X "$1" -H "$2" "$IMDS_URL/latest/$3"
  }
else
  request() {
    wget -q -O - --no-proxy --timeout=5 --tries=1 --method="$1" --header="$2" "$IMDS_URL/latest/$3"
  }
fi

# IMDSv2: nothing is read without a token.
imds() { # PATH
  token=$(request PUT 'X-aws-ec2-metadata-token-ttl-seconds: 60' api/token) && [ -n "$token" ] || return 2
  request GET "X-aws-ec2-metadata-token: $token" "$1"
}

# Both ways set tags (how many there are), group and volume (the values of spotmax:group and spotmax:volume), or
# leave them as they are.
tags_from_imds() {
  keys=$(imds meta-data/tags/instance/) || return
  new_group=
  new_volume=
  if printf '%s\n' "$keys" | grep -qx 'spotmax:group'; then
    new_group=$(imds meta-data/tags/instance/spotmax:group) || return
  fi
  if printf '%s\n' "$keys" | grep -qx 'spotmax:volume'; then
    new_volume=$(imds meta-data/tags/instance/spotmax:volume) || return
  fi
  tags=$(printf '%s\n' "$keys" | grep -c .)
  group=$new_group
  volume=$new_volume
}

# Sets aws_why where they cannot be had.
tags_from_aws() {
  command -v aws >/dev/null || {
    aws_why="they are not allowed in its metadata (InstanceMetadataTags), and there is no aws command"
    return
  }
  if ! region=$(imds meta-data/placement/region) || ! instance=$(imds meta-data/instance-id); then
    aws_why="$IMDS_URL does not answer"
    return
  fi
  found=$(aws ec2 describe-tags --region "$region" --filters "Name=resource-id,Values=$instance" \
    --query 'Tags[].[Key,Value]' --output text --cli-connect-timeout 5 --cli-read-timeout 15 2>&1) || {
    aws_why="aws ec2 describe-tags: $(printf '%s' "$found" | tr -s '\n' ' ')"
    return
  }
  tags=$(printf '%s\n' "$found" | awk -F '\t' 'NF > 1' | grep -c .)
  group=$(printf '%s\n' "$found" | awk -F '\t' '$1 == "spotmax:group" { print $2 }')
  volume=$(printf '%s\n' "$found" | awk -F '\t' '$1 == "spotmax:volume" { print $2 }')
}

# True where they are known; else why says what is in the way.
asked=
aws_why=
read_tags() {
  why=
  tags_from_imds
  case $? in
    0) return 0 ;;
    2) why="no IMDSv2 token from $IMDS_URL" ;;
    *)
      # A call to AWS, of which the whole account has only so many: not at every look.
      if [ -z "$asked" ] || [ $(($(now) - asked)) -ge "$TAG_SECONDS" ]; then
        asked=$(now)
        aws_why=
        tags_from_aws
      fi
      why=$aws_why
      ;;
  esac
  [ -z "$why" ]
}

# ---- Disks -----------------------------------------------------------------------------------------------

has_filesystem() { # DEVICE
  # blkid asks the disk itself; where it finds nothing, lsblk has what udev knows.
  [ -n "$(blkid -p -u filesystem -o value -s TYPE "$1" 2>/dev/null)" ] ||
    lsblk -dnro FSTYPE "$1" 2>/dev/null | grep -q .
}

# Sets disk, and device if the whole disk or its first partition holds a filesystem. False: no such disk.
look_at() { # DISK
  disk=
  device=
  [ -e "$1" ] || return 1
  disk=$1
  for part in "$1" "${1}1" "${1}p1" "$1-part1"; do
    if [ -e "$part" ] && has_filesystem "$part"; then
      device=$(readlink -f "$part")
      return
    fi
  done
}

# On Nitro the disk is known by the volume's ID, so only with its tag. On Xen, and where udev has rules for it (Amazon
# Linux), it has the name that max_group attached it by. Then the tag need not be there: nothing else is ever attached
# as /dev/sdz.
find_data() {
  case $volume in
    vol-*[!0-9a-z]*) ;;
    vol-?*) look_at "$DEV_ROOT/disk/by-id/nvme-Amazon_Elastic_Block_Store_vol${volume#vol-}" && return ;;
    *) ;;
  esac
  look_at "$DEV_ROOT/xvdz" || look_at "$DEV_ROOT/sdz"
}

# The instance's own disk, as it is called, or as Xen calls it (/dev/sdf is /dev/xvdf).
find_own() {
  own=$DEV_ROOT${PERSISTENCE_DEV#/dev}
  look_at "$own" || look_at "$DEV_ROOT/xvd${own##*/sd}"
}

# ---- Mounting --------------------------------------------------------------------------------------------

# What is mounted at TARGET_DIR, the uppermost; nothing if nothing is.
mounted() {
  source=$(awk -v dir="$TARGET_DIR" '$2 == dir { source = $1 } END { print source }' "$MOUNTS")
  case $source in
    /*) readlink -f "$source" ;;
    *) printf '%s\n' "$source" ;;
  esac
}

users() {
  command -v fuser >/dev/null || return 0
  printf ', used by: '
  fuser -vm "$TARGET_DIR" 2>&1 | awk 'NR > 1 { $1 = $1; printf "%s; ", $0 }'
}

# Descriptor 9 is the lock, which nothing that outlives this script may hold.
mount_once() {
  while current=$(mounted) && [ -n "$current" ] && [ "$current" != "$device" ]; do
    if ! why=$(umount "$TARGET_DIR" 2>&1); then
      say_once "cannot unmount $current from $TARGET_DIR: $why$(users)"
      return 1
    fi
    log "unmounted $current from $TARGET_DIR"
  done
  [ -z "$current" ] || return 0
  mkdir -p "$TARGET_DIR" || return
  options=$MOUNT_OPTIONS
  # The empty disk and the data were made from the same snapshot, so they have the same UUID, and XFS mounts only
  # one of them without this.
  [ "$(blkid -p -o value -s TYPE "$device" 2>/dev/null)" != xfs ] || options=${options:+$options,}nouuid
  if ! why=$(mount ${options:+-o "$options"} "$device" "$TARGET_DIR" 2>&1 9>&-); then
    say_once "cannot mount $device at $TARGET_DIR: $why"
    return 1
  fi
}

# Mounts device and ends the script.
mount_device() { # WHAT
  if [ "$(mounted)" = "$device" ]; then
    log "$1 ($device) is mounted at $TARGET_DIR already"
    exit 0
  fi
  give_up=$(($(now) + BUSY_SECONDS))
  until mount_once; do
    [ "$(now)" -lt "$give_up" ] || die "$1 ($device) could not be mounted at $TARGET_DIR within $BUSY_SECONDS s: $why"
    sleep "$POLL_SECONDS"
  done
  log "mounted $1 ($device) at $TARGET_DIR"
  if [ -n "$ON_MOUNTED" ]; then
    sh -c "$ON_MOUNTED" 9>&- || die "the data is mounted, but this failed with $?: $ON_MOUNTED"
  fi
  exit 0
}

mount_own() {
  if [ -z "$PERSISTENCE_DEV" ]; then
    log 'nothing was moved to this instance'
  elif current=$(mounted) && [ -n "$current" ]; then
    log "nothing was moved to this instance; $current is mounted at $TARGET_DIR already"
  elif ! find_own; then
    log "nothing was moved to this instance, and it has no $PERSISTENCE_DEV: nothing mounted"
  elif [ -z "$device" ]; then
    log "nothing was moved to this instance, and its own $PERSISTENCE_DEV holds no filesystem: nothing mounted"
  else
    mount_device 'its own disk'
  fi
  exit 0
}

# ---- Main ------------------------------------------------------------------------------------------------

for seconds in "$WAIT_SECONDS" "$BUSY_SECONDS" "$TAG_SECONDS" "$UNTAGGED_SECONDS"; do
  case $seconds in
    '' | *[!0-9]*) die "seconds must be a whole number, not $seconds" ;;
    *) ;;
  esac
done
[ "$(id -u)" = 0 ] || die 'must be run as root'
case $TARGET_DIR in
  / | *[[:space:]]*) die "TARGET_DIR=$TARGET_DIR: must be a folder of its own, without blanks" ;;
  /*) TARGET_DIR=$(readlink -f "$TARGET_DIR") || die "TARGET_DIR=$TARGET_DIR: its parent folder is not there" ;;
  *) die "TARGET_DIR=$TARGET_DIR: must be an absolute path" ;;
esac

# User data and @reboot both run at the first start: the second one waits, and finds all done.
true >>"$LOCK" || die "cannot write $LOCK"
exec 9>>"$LOCK"
flock 9 || die "cannot lock $LOCK"

started=$(now)
group=
volume=
tags=0
known=
while :; do
  if read_tags; then known=yes; fi
  waited=$(($(now) - started))

  if find_data; then
    [ -z "$device" ] || mount_device "the data volume${volume:+ $volume}"
    state="$disk is here, but neither it nor its first partition holds a filesystem"
  elif [ -n "$group$volume" ]; then
    state="waiting for the data volume${volume:+ $volume}${group:+ of group $group}"
  elif [ -z "$known" ]; then
    state="cannot read this instance's tags"
  # The tags of a launch show together.
  elif [ "$tags" -gt 0 ] || [ "$waited" -ge "$UNTAGGED_SECONDS" ]; then
    mount_own
  else
    state='no tags yet'
  fi
  say_once "$state${why:+: $why}"

  [ "$waited" -lt "$WAIT_SECONDS" ] || break
  sleep "$POLL_SECONDS"
done
die "gave up after $WAIT_SECONDS s: $last_said"
