#!/bin/sh
# Start Claude Code against the shim; what stands after -- is for claude.
# Finds Python 3.9 or newer and passes every argument on; all else is in qwencode.py.
case $0 in
  */*) self=$0 ;;
  *) self=./$0 ;;
esac
while [ -L "$self" ]; do
  target=$(readlink "$self")
  case $target in
    /*) self=$target ;;
    *) self=${self%/*}/$target ;;
  esac
done
new_enough='import sys; sys.exit(sys.version_info < (3, 9))'
for python in python3 python python3.13 python3.12 python3.11 python3.10 python3.9; do
  if "$python" -c "$new_enough" </dev/null >/dev/null 2>&1; then
    exec "$python" "${self%/*}/qwencode.py" client "$@"
  fi
done
if py -3 -c "$new_enough" </dev/null >/dev/null 2>&1; then
  exec py -3 "${self%/*}/qwencode.py" client "$@"
fi
echo "${0##*/}: Python 3.9 or newer is needed, and python3, python and py are not that." >&2
echo "Install it from https://www.python.org/downloads/ or with your package manager" \
  "(apt install python3, brew install python), then try again." >&2
exit 127
