"""The commands by name, and the options that come before them."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from mbf import __version__
from mbf.cli import adapters, bench, compare, install, runs
from mbf.cli.errors import Commands


def _examples(*lines: str) -> str:
    return "\n\n".join(["Examples:", *map(escape, lines)])


app = typer.Typer(
    name="mbf",
    cls=Commands,
    help="One LoRA that learns task after task without forgetting, on fused kernels.",
    epilog=_examples(
        "mbf run quickstart --method slao,seqlora",
        "mbf run real-5 --method slao --order 1,2,3 --seed 0,1",
        "mbf merge adapters/agnews adapters/yahoo --out merged",
    ),
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"mbf {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", envvar="MBF_DEBUG", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


app.command(
    "run",
    epilog=_examples(
        "mbf run quickstart --method slao,seqlora",
        "mbf run real-5 --method slao,olora --order 1,2 --seed 0,1,2 --output runs/real-5",
        "mbf run experiment.yaml --epochs 3 --set train.lr=5e-4 --set 'lora.target_modules=[q_proj, k_proj]'",
    ),
)(runs.run)
app.command("resume", epilog=_examples("mbf resume runs/real-5"))(runs.resume)
app.command(
    "compare",
    epilog=_examples(
        "mbf compare real-5 --methods slao,seqlora,olora --orders 1,2,3 --seeds 0,1",
        "mbf compare real-5 --methods magmax,opcm",
        "mbf compare real-5 --methods 'slao,last-merge={name: slao, start: last_merge}' --out runs/ablation --list",
        "mbf compare --config experiment.yaml --out runs/mine --budget 110",
    ),
)(compare.compare)
app.command("report", epilog=_examples("mbf report runs/real-5 runs/mine --out comparison"))(runs.report)
app.command(
    "merge",
    epilog=_examples(
        "mbf merge adapters/agnews adapters/yahoo adapters/amazon --out merged",
        "mbf merge adapters/* --out merged --option schedule=1/i",
        "mbf merge adapters/* --out merged --method inclora --rank 8",
    ),
)(adapters.merge)
app.command("methods", epilog=_examples("mbf methods", "mbf methods --json | jq '.slao.options'"))(adapters.methods)
app.command("fetch", epilog=_examples("mbf fetch", "mbf fetch real-14 smollm2-135m-instruct"))(install.fetch)
app.command("doctor", epilog=_examples("mbf doctor", "mbf doctor --json > doctor.json"))(install.doctor)
app.command(
    "bench",
    epilog=_examples(
        "mbf bench",
        "mbf bench --shape 2048x2048 --shape 2048x8192 --rank 32 --p 0 --dtype bf16 --threads 1",
    ),
)(bench.bench)
