"""The front door of every entry point: Hydra composes, a user's mistake becomes one clear line and exit code 2."""

from __future__ import annotations

import errno
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import hydra
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from infimed.config import nearest, shadowed
from infimed.contracts import DataFault, UserError

CONF = Path(__file__).resolve().parent.parent / "conf"


def main(task: Callable[[DictConfig], object], config_name: str) -> None:
    """Compose `conf/CONFIG_NAME.yaml` with the command line and run `task` on it.

    Exits 2 with the option, what was given, what was expected and the fix when the user can mend it; any other error keeps its trace.
    """
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra's own printing would hide the exception from us and exit 1
    _quieten()
    try:
        hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(_guarded(task))()
    except InstantiationException:
        raise  # a constructor failed for a reason that is ours
    except (HydraException, OmegaConfBaseException) as error:
        _exit(_explain(str(error), config_name))
    except BrokenPipeError:  # `| head`, or a pager that was left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except OSError as error:  # Hydra could not make the run's folder
        _exit(_mistake(error) or f"{error.strerror}: {error.filename}; set run_dir to a folder that can be written")


def _guarded(task: Callable[[DictConfig], object]) -> Callable[[DictConfig], object]:
    """Give the task the folder that Hydra made (in a sweep it is the sweep's), and end it by exit code 2 on a user's mistake."""

    def run(config: DictConfig) -> object:
        if "run_dir" in config:
            made, here = Path(HydraConfig.get().runtime.output_dir), Path.cwd()
            with open_dict(config):
                config.run_dir = str(made.relative_to(here) if made.is_relative_to(here) else made)
        try:
            if problems := shadowed(config, HydraConfig.get().overrides.task):
                raise UserError("\n".join(f"- {problem}" for problem in problems))
            return task(config)
        except Exception as error:  # inside the job: Hydra lets SystemExit pass without a word of its own
            mistake = _mistake(error)
            if mistake is None:
                raise
            if HydraConfig.get().mode == RunMode.MULTIRUN:
                mistake += f"\n- this was point {HydraConfig.get().job.num} of the sweep; the points after it were not run"
            return _exit(mistake)

    return run


def _mistake(error: BaseException | None) -> str | None:
    """Find what the user can mend in a chain of causes: Hydra wraps what a constructor raises."""
    while error is not None:
        if isinstance(error, (UserError, DataFault)):
            return str(error)
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            return f"{error.strerror}: {error.filename or 'while writing'}; free some space or set run_dir to a folder that can be written"
        error = error.__cause__
    return None


def _quieten() -> None:
    """Silence what libraries say about every run: device lists, advertisements, their own deprecations."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # advises to install what would load kernels, which is code, from the hub
    for message in (r".*isinstance\(treespec.*", r"Checkpoint directory .* exists and is not empty", r".*does not have many workers.*"):
        warnings.filterwarnings("ignore", message)


def best_device() -> str:
    """Name the device to answer on."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def use_threads(config: DictConfig) -> None:
    """Give torch the CPU threads that `cpu_threads` asks for."""
    if config.cpu_threads is not None:
        if not isinstance(config.cpu_threads, int) or config.cpu_threads < 1:
            raise UserError(f"cpu_threads={config.cpu_threads}: expected a positive number, or null for torch's own choice")
        torch.set_num_threads(config.cpu_threads)


def _exit(message: str) -> NoReturn:
    print(file=sys.stderr)  # off the progress bar's line
    print(f"error: {message}" if not message.startswith("- ") else f"error:\n{message}", file=sys.stderr)
    raise SystemExit(2)


def _explain(message: str, config_name: str) -> str:
    """Say Hydra's complaint in one line, with the nearest valid name."""
    if found := re.search(r"Could not find '([^']+)'", message):
        group, _, name = found[1].rpartition("/")
        return f"{group or 'config'}={name} does not exist{nearest(name, (p.stem for p in (CONF / group).glob('*.yaml')))}"
    if found := re.search(r"Could not override '([^']+)'", message):
        key = found[1]
        return f"there is no option `{key}`{nearest(key, _keys(config_name))} (a new key needs a leading +)"
    return message.splitlines()[0]


def _keys(config_name: str) -> list[str]:
    """Every dotted key of the default configuration."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(config_name)

    def walk(node: object, at: str) -> list[str]:
        inside = [k for key, value in node.items() for k in walk(value, f"{at}.{key}".lstrip("."))] if isinstance(node, dict) else []
        return [at, *inside] if at else inside

    return walk(OmegaConf.to_container(config, resolve=False), "")
