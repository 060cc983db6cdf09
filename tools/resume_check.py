"""Kill a training run again and again, start it anew with other workers and ranks, and certify that nothing has changed.

python tools/resume_check.py                                   # the tiny model on bundled samples: two minutes on two cores
python tools/resume_check.py --kills 5 --ranks 1,2 --out certificate.json
python tools/resume_check.py experiment=sft_stage1 max_steps=40 --kills 2     # one stage of your own, in its own configuration

A run to the end is compared with the same run killed by SIGKILL at random moments: the samples of every optimizer step (also their order
where the ranks are as many), the losses (bit for bit while the ranks are as many, else to 1e-5), and whether each sample of the epoch came
exactly once. Exit 1 when anything differs. With several --ranks the global batch must be a multiple of each.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import chain
from pathlib import Path

from infimed.models.checkpoints import find_checkpoint, read_checkpoint

ROOT = Path(__file__).resolve().parent.parent
TRAIN = (sys.executable, "-m", "infimed.train")
TINY = (
    *("model=tiny", "data=samples", "trainer=cpu", "tokenizer=samples/tokenizer", "cpu_threads=1", "global_batch=4", "system.lr=1e-3"),
    *("resolution.visual_grid=2", "data.max_tokens=512", "data.val=[]"),
    "data.train=[samples/train/shard-000003.tar,samples/train/shard-000004.tar]",
)
"""The run that is checked when none is named: 1,260 samples, about 50 optimizer steps."""

TOLERANCE = 1e-5  # relative, of a loss, once a leg had another number of ranks: sums have another order
POLL = 0.005  # seconds
PATIENCE = 600.0  # seconds without a new step before a run counts as hanging


@dataclass(frozen=True)
class Leg:
    """One start of the killed run."""

    ranks: int
    workers: int
    prefetch: int
    kill_step: int | None  # killed after this optimizer step; None: left to end


@dataclass(frozen=True)
class Outcome:
    """What became of a leg."""

    restored_step: int  # of the checkpoint that it went on from; 0: from nothing
    last_step: int  # seen before it ended or was killed
    killed: bool
    delay_s: float  # between the step seen and the signal
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    """Return 0 when the killed run is the unbroken one, else 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="the run, as given to infimed.train; none: tiny, bundled samples")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--ranks", default="1", help="ranks of the legs in turn, e.g. 1,2; the unbroken run has the first")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of the kills and of the numbers of workers")
    parser.add_argument("--out", type=Path, help="where the certificate is written (JSON)")
    args = parser.parse_intermixed_args(argv)
    named = any(override.split("=")[0] in ("experiment", "model") for override in args.overrides)
    overrides = [*(() if named else TINY), *args.overrides]
    if not all(count.isdecimal() and int(count) for count in args.ranks.split(",")):
        parser.error(f"--ranks {args.ranks}: expected numbers of 1 or more, such as 1,2")
    if args.kills < 1:
        parser.error(f"--kills {args.kills}: expected 1 or more")
    if args.out and not args.out.absolute().parent.is_dir():  # said now, not when all runs have ended
        parser.error(f"--out {args.out}: its folder is not there; make it first")
    given = {"ranks": [int(count) for count in args.ranks.split(",")], "kills": args.kills, "seed": args.seed}
    with tempfile.TemporaryDirectory() as folder:
        certificate = check(TRAIN, overrides, folder=Path(folder), **given, expected=samples_of_an_epoch)
    command = ["tools/resume_check.py", *(sys.argv[1:] if argv is None else argv)]
    certificate = {"command": command, "versions": versions(), **certificate}
    if args.out:
        args.out.write_text(json.dumps(certificate, indent=1) + "\n")
    print(table(certificate))
    return 0 if certificate["passed"] else 1


def check(
    train: Sequence[str],
    overrides: Sequence[str],
    *,
    folder: Path,
    ranks: Sequence[int],
    kills: int,
    seed: int,
    expected: Callable[[Path], int | None],
) -> dict[str, object]:
    """Run both, compare them, and return the certificate.

    train: the command that overrides are appended to. expected: a finished run's folder -> samples that it must have shown, all of them
    equally often; None: not known.
    """
    rng = random.Random(seed)
    began = time.monotonic()
    whole = Leg(ranks[0], workers=0, prefetch=2, kill_step=None)
    run_leg(train, overrides, whole, folder=folder / "unbroken", delay_s=0.0)
    reference = read_run(folder / "unbroken")
    seconds_a_step = (time.monotonic() - began) / max(1, len(reference))  # the start included: a kill may come some steps late
    legs = draw_legs(rng, steps=len(reference), ranks=ranks, kills=kills)
    outcomes = [
        run_leg(train, overrides, leg, folder=folder / "killed", delay_s=rng.uniform(0, seconds_a_step) if leg.kill_step else 0.0)
        for leg in legs
    ]
    killed = read_run(folder / "killed")
    exact_until = next((o.restored_step for leg, o in zip(legs, outcomes, strict=True) if leg.ranks != ranks[0]), len(reference))
    comparisons = compare(reference, killed, exact_until=exact_until)
    comparisons["each sample once"] = shown_evenly(killed, expected(folder / "killed"))
    done = sum(outcome.killed for outcome in outcomes)
    comparisons["kills"] = {"same": done == kills, "done": done, "asked": kills}
    return {
        "overrides": list(overrides),
        "signal": "SIGKILL",
        "unbroken": {**asdict(whole), "steps": len(reference)},
        "legs": [{**asdict(leg), **asdict(outcome)} for leg, outcome in zip(legs, outcomes, strict=True)],
        "exact_until_step": exact_until,
        "comparisons": comparisons,
        "passed": all(comparison["same"] is not False for comparison in comparisons.values()),
    }


def draw_legs(rng: random.Random, *, steps: int, ranks: Sequence[int], kills: int) -> list[Leg]:
    """Choose when to kill, and what each start has other than the one before."""
    last = max(2, int(steps * 0.9))  # a kill must not come too late
    moments = sorted(rng.sample(range(1, last), min(kills, last - 1)))
    legs, workers, prefetch = [], 0, 2
    for number, moment in enumerate([*moments, None]):
        workers = rng.choice([count for count in (0, 1, 2) if count != workers])
        prefetch = rng.choice([count for count in (1, 2, 3, 4) if count != prefetch])
        legs.append(Leg(ranks[number % len(ranks)], workers, prefetch, moment))
    return legs


def run_leg(train: Sequence[str], overrides: Sequence[str], leg: Leg, *, folder: Path, delay_s: float) -> Outcome:
    """Start a run, and kill it with all its processes a moment after its step was seen, unless it is to end.

    Raises:
        RuntimeError: it failed, or took no step for too long.
    """
    settings = [
        *(f"run_dir={folder}", "++callbacks.record.keys=true", "callbacks.checkpoint.every_n_train_steps=2"),
        *("callbacks.progress.refresh_rate=0", f"data.num_workers={leg.workers}", f"++data.prefetch={leg.prefetch}"),
        *(f"trainer.devices={leg.ranks}", *(["++trainer.strategy=ddp"] if leg.ranks > 1 else [])),
    ]
    folder.mkdir(parents=True, exist_ok=True)
    restored, began = saved_step(folder), time.monotonic()
    with (folder / "log.txt").open("a") as log:
        environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
        command = [*train, *overrides, *settings]
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            killed = watch(process, folder / "steps.jsonl", after=leg.kill_step, restored=restored, delay_s=delay_s)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if not killed and process.returncode:
        tail = "\n".join((folder / "log.txt").read_text().splitlines()[-15:])
        raise RuntimeError(f"a run ended with exit code {process.returncode}:\n{tail}")
    return Outcome(restored, last_step(folder / "steps.jsonl"), killed, round(delay_s, 4), round(time.monotonic() - began, 2))


def watch(process: subprocess.Popen, steps: Path, *, after: int | None, restored: int, delay_s: float) -> bool:
    """Wait for the end, or for a step of this start to be taken and the moment to come; say whether it is to be killed now.

    Raises:
        RuntimeError: no step for too long.
    """
    size, moved, began = -1, time.monotonic(), time.time()
    while process.poll() is None:
        stat = steps.stat() if steps.exists() else None
        if stat is not None and stat.st_size != size:
            size, moved = stat.st_size, time.monotonic()
        fresh = stat is not None and stat.st_mtime > began  # not what the start before left there
        if after is not None and fresh and last_step(steps) >= max(after, restored + 1):
            time.sleep(delay_s)
            return process.poll() is None
        if time.monotonic() - moved > PATIENCE:
            raise RuntimeError(f"no optimizer step for {PATIENCE:.0f} s: the run hangs")
        time.sleep(POLL)
    return False


def read_run(folder: Path) -> dict[int, dict[str, object]]:
    """Return step -> loss and the keys of each rank.

    Raises:
        RuntimeError: the run wrote none: it was a chain of stages, or another program.
    """
    if not (folder / "keys.jsonl").exists():
        raise RuntimeError(f"no keys.jsonl in {folder}: name one stage, not a chain of them")
    losses = {line["step"]: line["loss"] for line in lines_of(folder / "steps.jsonl")}
    return {line["step"]: {"loss": losses.get(line["step"]), "keys": line["keys"]} for line in lines_of(folder / "keys.jsonl")}


def compare(reference: Mapping[int, Mapping], killed: Mapping[int, Mapping], *, exact_until: int) -> dict[str, dict[str, object]]:
    """Compare two runs step by step; up to `exact_until` losses must agree bit for bit."""
    shared = sorted(reference.keys() & killed.keys())
    other_samples = [step for step in shared if sorted(chain(*reference[step]["keys"])) != sorted(chain(*killed[step]["keys"]))]
    same_ranks = [step for step in shared if len(reference[step]["keys"]) == len(killed[step]["keys"])]
    other_order = [step for step in same_ranks if reference[step]["keys"] != killed[step]["keys"]]
    gaps = {step: gap(reference[step]["loss"], killed[step]["loss"]) for step in shared}
    other_loss = [step for step, relative in gaps.items() if relative > (0.0 if step <= exact_until else TOLERANCE)]
    missing = sorted(reference.keys() ^ killed.keys())
    return {
        "steps": {"same": not missing and shared == list(range(1, len(shared) + 1)), "compared": len(shared), "differ": missing[:20]},
        "samples": {"same": not other_samples, "compared": len(shared), "differ": other_samples[:20]},
        "order": {"same": not other_order, "compared": len(same_ranks), "differ": other_order[:20]},
        "losses": {"same": not other_loss, "compared": len(shared), "differ": other_loss[:20], "worst": max(gaps.values(), default=0.0)},
    }


def gap(one: float | None, other: float | None) -> float:
    """Return the relative difference of two losses."""
    if one is None or other is None:
        return float("inf")
    return abs(one - other) / max(abs(one), 1e-12)


def shown_evenly(run: Mapping[int, Mapping], expected: int | None) -> dict[str, object]:
    """Check that every sample came as often as any other, and that none of an epoch is missing. same: None where this is not known."""
    times = Counter(chain.from_iterable(keys for step in run.values() for keys in step["keys"]))
    often = sorted(set(times.values()))
    same = None if expected is None else len(times) == expected and len(often) == 1
    return {"same": same, "shown": len(times), "expected": expected, "times": often}


def samples_of_an_epoch(folder: Path) -> int | None:
    """Count the samples in the tars of a finished run, less those that it says were left out; None where it did not show whole epochs.

    The tars are read as any program would read them: what is checked here must not be asked.
    """
    config = read_checkpoint(find_checkpoint(folder), mmap=True)["infimed"]["config"]
    data = config["data"]
    chosen = [name for name in ("select", "only", "mixture", "shares", "temperature", "curriculum") if data.get(name)]
    paths = [path if (path := Path(place)).is_absolute() else ROOT / path for place in data["train"]]
    if chosen or config["max_steps"] is not None or data["epochs"] is None or not all(path.exists() for path in paths):
        return None
    tars = [tar for path in paths for tar in (sorted(path.glob("*.tar")) if path.is_dir() else [path])]
    count = 0
    for tar in tars:
        with tarfile.open(tar) as file:
            count += sum(name.endswith(".json") for name in file.getnames())
    left_out = [line for line in (folder / "log.txt").read_text().splitlines() if line.startswith("left out: ")]
    return count - sum(int(part.split()[-1].replace(",", "")) for part in left_out[-1][10:].split(", ")) if left_out else count


def lines_of(path: Path) -> list[dict]:
    """Read the whole lines of a JSON lines file that may still be written."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def last_step(steps: Path) -> int:
    """Return the last optimizer step that a run noted."""
    lines = lines_of(steps)
    return lines[-1]["step"] if lines else 0


def saved_step(folder: Path) -> int:
    """Return the optimizer step of the checkpoint that a run would go on from."""
    position = folder / "last.data.json"
    return json.loads(position.read_text())["step"] if position.exists() else 0


def versions() -> dict[str, str]:
    """Name what ran."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("infimed", "torch", "lightning", "transformers")}}


def table(certificate: Mapping) -> str:
    """Lay the certificate out for the terminal."""
    rows = [f"{'leg':>3} {'ranks':>5} {'workers':>7} {'prefetch':>8} {'from step':>9} {'to step':>7}  end"]
    for number, leg in enumerate(certificate["legs"], 1):
        end = f"SIGKILL {leg['delay_s']:.3f} s later" if leg["killed"] else "ended"
        rows.append(
            f"{number:>3} {leg['ranks']:>5} {leg['workers']:>7} {leg['prefetch']:>8} {leg['restored_step']:>9} {leg['last_step']:>7}  {end}"
        )
    rows.append("")
    for name, found in certificate["comparisons"].items():
        verdict = {True: "same", False: "DIFFERENT", None: "not known"}[found["same"]]
        details = ", ".join(f"{key} {value}" for key, value in found.items() if key != "same" and value != [])
        rows.append(f"{name:<17} {verdict:<9}  {details}")
    rows.append(f"\n{'PASSED' if certificate['passed'] else 'FAILED'}: losses bit for bit up to step {certificate['exact_until_step']}")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
