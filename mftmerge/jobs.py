"""Work handed to an engine (submitit): processes of this machine or jobs of a cluster; killed ones start again."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from mftmerge.errors import BadInput, MftmergeError
from mftmerge.settings import Flag, Settings

POLL = 0.5  # seconds between looks at the jobs


class RunnerSettings(Settings):
    """Where jobs run."""

    runner: Literal["here", "local", "slurm"] = Field(
        "here", description="here: one after the other; local: processes of this machine; slurm: a cluster's jobs"
    )
    at_once: int = Field(2, ge=1, description="jobs that run or wait in the engine's queue at one time")
    attempts: int = Field(3, ge=1, description="how often a job that was killed is started before the run is given up")
    timeout: int = Field(24 * 60, ge=1, description="minutes after which the engine ends a job")
    options: Annotated[dict[str, Any], Flag(names=("--runner-option",))] = Field(
        default_factory=dict,
        description="passed to the engine as it is, such as slurm_partition=long or gpus_per_node=1; may be repeated",
    )

    @field_validator("options")
    @classmethod
    def _numbers(cls, options: dict[str, object]) -> dict[str, object]:
        """What was typed on a command line is text; the engine wants numbers where they are meant."""
        return {k: int(v) if isinstance(v, str) and v.isdecimal() else v for k, v in options.items()}


def run_jobs(
    function: Callable[..., dict[str, object]],
    arguments: Mapping[str, tuple[object, ...]],
    folder: Path,
    settings: RunnerSettings,
    say: Callable[[str], None],
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Call `function` once for each of `arguments` in jobs of their own; give (key, what it returned) as they end.

    function: found again by its name in another process, so a function of a module. folder: where the engine keeps its
    logs, seen by all machines. Jobs that are killed or lost are started again, up to `attempts` times; when this
    process is interrupted its jobs are cancelled.

    Raises BadInput for options that the engine does not know and where a job raised it, MftmergeError where a job
    raised anything else or was killed too often.
    """
    import submitit

    executor = submitit.AutoExecutor(folder=folder, cluster=settings.runner)
    try:
        executor.update_parameters(timeout_min=settings.timeout, **settings.options)
    except (TypeError, ValueError, NameError) as e:
        raise BadInput(f"runner options: {str(e).splitlines()[0]}") from None
    waiting, running, started = list(arguments), dict[str, Any](), dict.fromkeys(arguments, 0)
    try:
        while waiting or running:
            while waiting and len(running) < settings.at_once:
                key = waiting.pop(0)
                started[key] += 1
                running[key] = executor.submit(_said, function, arguments[key])
            for key in [k for k, job in running.items() if job.done()]:
                job = running.pop(key)
                try:
                    result, error, bad = job.result()
                except submitit.core.utils.UncompletedJobError:
                    if started[key] >= settings.attempts:
                        where = f"its log is {job.paths.stderr}"
                        raise MftmergeError(f"job {job.job_id} was killed {started[key]} times; {where}") from None
                    say(f"job {job.job_id} was killed; starting it again")
                    waiting.append(key)
                    continue
                if error:
                    raise (BadInput if bad else MftmergeError)(f"{error} (job {job.job_id})")
                yield key, result
            time.sleep(POLL if running else 0)
    finally:
        for job in running.values():
            with suppress(Exception):  # it may have ended, or the cluster may not answer
                job.cancel()


def _said(
    function: Callable[..., dict[str, object]], arguments: tuple[object, ...]
) -> tuple[dict[str, object], str, bool]:
    """In the job: what the function returned, else its error as a line and whether the user's input is to blame."""
    try:
        return function(*arguments), "", False
    except MftmergeError as e:
        return {}, str(e), isinstance(e, BadInput)
    except Exception as e:
        traceback.print_exc()  # into the engine's log
        return {}, f"unexpected {type(e).__name__}: {e}", False
