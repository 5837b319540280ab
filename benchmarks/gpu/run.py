"""All that is measured on a GPU, in one command: set-up, correctness, then the parts, each in ten minutes at most.

    python benchmarks/gpu/run.py [--parts steps,latency] [--wheels FOLDER]

needs a machine with a GPU, PyTorch and this repository. Rows go to benchmarks/results/gpu_*.csv as soon as they are
measured. A part that is stopped, by its limit or by hand, goes on where it was when the command is given again. With
--small the parts run in a small form on a machine without a GPU, and write elsewhere.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if not __package__:  # run by its file's name, so that its own folder would be looked into for everybody's modules
    sys.path[0] = str(ROOT)

from benchmarks.gpu.install import environment  # noqa: E402

WORK = ROOT / "out" / "gpu"
PARTS = ("kernels", "steps", "latency", "pixels", "memory")
_UNFINISHED = 1000  # no exit code of a process
# The window that the targets speak of comes first.
_WINDOWS, _CONTESTANTS = (0, 32, 16, 64), ("plain", "sjd", "stock")


def main() -> int:
    """Run the parts asked for; 1 if one failed, 2 if one is not finished."""
    args = _parse_args()
    # as after Ctrl-C, what runs is ended with us
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    args.work.mkdir(parents=True, exist_ok=True)
    site = args.work / "site"
    setup = ["install", "--site", str(site), *(["--wheels", *map(str, args.wheels)] if args.wheels else [])]
    if not args.no_setup and _run_part("setup", [setup], args) != 0:
        return 1
    # It measures nothing a second time, so it can be asked for always.
    if (code := _run_part("correctness", [["correctness", *_common(args)]], args)) != 0:
        found = "the checks are not finished" if code == _UNFINISHED else "the engine is not right on this device"
        print(f"{found}, so nothing is measured", file=sys.stderr)
        return 1
    codes = {part: _run_part(part, commands(part, args), args) for part in args.parts.split(",")}
    if not args.small:  # the targets are about the large shape
        subprocess.run(
            [sys.executable, "-m", "benchmarks.gpu.targets", *_common(args)], cwd=ROOT, env=environment(site)
        )
    unfinished = [part for part, code in codes.items() if code == _UNFINISHED]
    failed = [part for part, code in codes.items() if code not in (0, _UNFINISHED)]
    if unfinished:
        print(f"not finished: {', '.join(unfinished)}; the same command goes on with them")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return 1 if failed else 2 if unfinished else 0


def commands(part: str, args: argparse.Namespace) -> list[list[str]]:
    """Module and flags of each process of a part. Engines have one each: a GPU's memory is free when it ends."""
    small = args.small
    if part == "kernels":
        cells = [["--requests", "2", "--slots", "3", "--columns", "37", "--repeats", "2"]] if small else [[]]
    elif part == "steps":
        batches = ["--batches", "1,2"] if small else []
        cells = [["--window", str(window), *batches] for window in (_WINDOWS[:2] if small else _WINDOWS)]
    elif part == "latency":
        concurrency = ["--concurrency", "1,2"] if small else []
        cells = [["--contestant", name, *concurrency] for name in _CONTESTANTS]
    elif part == "memory":
        cells = [["--pictures", "1,2"] if small else []]
    else:
        cells = [["--batches", "1", "--repeats", "2"] if small else []]
    return [[part, *_common(args), *flags] for flags in cells]


def _run_part(part: str, processes: list[list[str]], args: argparse.Namespace) -> int:
    """0, an exit code, or _UNFINISHED where the time was up."""
    print(f"== {part}", flush=True)
    until = time.monotonic() + 60 * args.minutes
    log = args.work / f"{part}.log"
    env = environment(args.work / "site")
    if part == "kernels" and args.small and not _add_triton(env):
        print("not run: the kernels need triton, which is not installed here")
        return 0
    worst = 0
    for module, *flags in processes:
        with log.open("w") as errors:
            code = _run([sys.executable, "-m", f"benchmarks.gpu.{module}", *flags], env, errors, until)
        if code == _UNFINISHED:
            print(f"stopped after {args.minutes:g} minutes")
            return worst or code
        if code:  # the part's other processes may do better
            shown = "\n".join(log.read_text().splitlines()[-15:])
            print(f"failed: {' '.join([module, *flags])}; the end of {log}:\n{shown}", file=sys.stderr)
            worst = worst or code
    return worst


def _run(command: list[str], env: dict[str, str], errors: object, until: float) -> int:
    # a session of its own, so that all that it has started can be ended with it
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=errors, start_new_session=True)  # type: ignore[call-overload]
    try:
        return int(process.wait(max(1.0, until - time.monotonic())))
    except subprocess.TimeoutExpired:
        return _UNFINISHED
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _add_triton(env: dict[str, str]) -> bool:
    """Let a process find Triton, and interpret its kernels where there is no GPU; False if there is no Triton."""
    beside = Path(sys.prefix) / "triton"  # where requirements/install.sh puts it
    if beside.is_dir():
        env["PYTHONPATH"] += os.pathsep + str(beside)
    elif find_spec("triton") is None:
        return False
    if not Path("/dev/nvidiactl").exists():
        env["TRITON_INTERPRET"] = "1"
    return True


def _common(args: argparse.Namespace) -> list[str]:
    flags = ["--work", str(args.work)] + (["--small"] if args.small else [])
    flags += ["--output", str(args.output)] if args.output else []
    return flags + (["--commit", args.commit] if args.commit else [])


def _parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help=f"some of {','.join(PARTS)} (all)")
    parser.add_argument("--minutes", type=float, default=10, help="for each part (10)")
    parser.add_argument("--wheels", type=Path, nargs="+", help="folders of wheels to set up from, without network")
    parser.add_argument("--no-setup", action="store_true", help="everything is installed")
    parser.add_argument("--small", action="store_true", help="small forms of the parts, on a CPU too")
    parser.add_argument("--output", type=Path, help="folder of the rows (benchmarks/results; out/gpu-small if small)")
    parser.add_argument("--commit", default="", help="of the files, where they are a copy without git")
    parser.add_argument("--work", type=Path, default=WORK, help="folder for the rest (out/gpu)")
    args = parser.parse_args()
    for part in args.parts.split(","):
        if part not in PARTS:
            parser.error(f"--parts must be some of {','.join(PARTS)}; got {part!r}")
    args.wheels = [folder.resolve() for folder in args.wheels or ()]
    args.output, args.work = args.output and args.output.resolve(), args.work.resolve()
    return args


if __name__ == "__main__":
    sys.exit(main())
