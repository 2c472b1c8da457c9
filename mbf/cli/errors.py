"""Every error of a command as a clear line and an exit code: 2 for what the user can mend, 1 for a failed run."""

from __future__ import annotations

import os
from typing import Any

import typer
from pydantic import ValidationError
from typer.core import TyperGroup

from mbf.cli.console import err

USER, FAILURE, INTERRUPTED = 2, 1, 130

# Raised where a user's value enters. What goes wrong later (a diverging task, a broken download) is a RuntimeError.
_USER_ERRORS = (ValueError, OSError, ImportError)


class Commands(TyperGroup):
    """The commands, with their errors reported here and nowhere else."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except KeyboardInterrupt as error:
            _report(["interrupted"], error)
            raise typer.Exit(INTERRUPTED) from None
        except (*_USER_ERRORS, RuntimeError) as error:
            if ctx.params.get("debug"):
                raise
            _report(messages(error), error)
            raise typer.Exit(USER if isinstance(error, _USER_ERRORS) else FAILURE) from None
        except (ArithmeticError, AssertionError, AttributeError, LookupError, TypeError) as error:
            if ctx.params.get("debug"):
                raise
            _report([f"unexpected {type(error).__name__}: {error}; mbf --debug shows where"], error)
            raise typer.Exit(FAILURE) from None


def _report(lines: list[str], error: BaseException) -> None:
    rank = os.environ.get("RANK", "0")
    who = "mbf" if rank == "0" else f"mbf (process {rank})"
    for line in [*lines, *getattr(error, "__notes__", [])]:
        err(f"{who}: {line}")


def messages(error: BaseException) -> list[str]:
    """The error in lines, each of which says one thing."""
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] != "mbf" and error.name:
        return [f'the package {error.name} is missing: pip install "mbf[run]"']
    if isinstance(error, ValidationError):
        from mbf.run.explain import explain  # late, as it brings peft, for which --help does not wait

        return explain(error)
    if isinstance(error, OSError) and error.filename is not None:
        return [f"{error.filename}: {error.strerror}"]
    return str(error).splitlines() or [type(error).__name__]
