"""Stand-ins for the profiler and the sanitizer in a dry run: they run the program that they would watch, and write a
log of the form that the real tools write."""

from __future__ import annotations

from pathlib import Path

TOOL = """#!/bin/sh
while [ $# -gt 0 ]; do
  case "$1" in
    --log-file) log=$2; shift 2;;
    --tool) kind=$2; shift 2;;
    --csv) shift;;
    --*) shift 2;;
    *) break;;
  esac
done
[ "$kind" = racecheck ] || "$@" || exit $?
cat > "$log" <<'END'
{log}
END
"""  # both kinds of the sanitizer watch the same program: the second only writes its log
KERNEL = '"0","1","python","h","void sslkern::cuda::moments<float, 4>(const T1 *)","1","7","(32, 1, 1)","(8, 1, 1)","0"'
PROFILE = f"""==PROF== Connected to process 1
"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device",\
"CC","Section Name","Metric Name","Metric Unit","Metric Value"
{KERNEL},"9.0","Command line profiler metrics","gpu__time_duration.sum","ns","1,234"
{KERNEL},"9.0","Command line profiler metrics","launch__registers_per_thread","register/thread","64" """
CLEAN = """========= ERROR SUMMARY: 0 errors
========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"""


def make(out: Path) -> Path:
    """Write both into a folder of `out`, and return the folder."""
    folder = out / "stand-ins"
    folder.mkdir(parents=True, exist_ok=True)
    for name, log in (("ncu", PROFILE), ("compute-sanitizer", CLEAN)):
        (folder / name).write_text(TOOL.replace("{log}", log))
        (folder / name).chmod(0o755)
    return folder
