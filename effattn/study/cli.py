"""`effattn study` as a command. Imports nothing but click: the command line loads it at its start."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

INTERRUPTED = 130


@click.command()
@click.argument("name")
@click.option(
    "--profile", default="smoke", show_default=True, metavar="PROFILE", help="Which grid: smoke, full, ..."
)
@click.option("--values", multiple=True, metavar="NAME", help="Input distributions, or real:smollm2/LAYER.")
@click.option("--method", "methods", multiple=True, metavar="NAME", help="These methods only; repeat it.")
@click.option("--size", "sizes", multiple=True, metavar="N,...", help="Ranks k or numbers of features m.")
@click.option("--n", "lengths", multiple=True, metavar="N,...", help="Sequence lengths.")
@click.option("--head-dim", "head_dims", multiple=True, metavar="N,...", help="Head dimensions.")
@click.option("--input-scale", "scales", multiple=True, metavar="X,...", help="q and k are multiplied by it.")
@click.option("--dtype", "dtypes", multiple=True, metavar="DTYPE,...", help="fp16, bf16 or fp32.")
@click.option("--causal", is_flag=True, help="Under a causal mask.")
@click.option("--draws", type=int, metavar="N", help="Independent draws of each point.")
@click.option("--seed", type=int, metavar="N", help="Of inputs and projections; 0 if not given.")
@click.option(
    "--target-error", type=float, metavar="X", help="Ask for the smallest size with this relative error."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder for draws, tables and charts. A study that it holds goes on where it stopped.",
)
def study(
    name: str,
    profile: str,
    values: tuple[str, ...],
    methods: tuple[str, ...],
    sizes: tuple[str, ...],
    lengths: tuple[str, ...],
    head_dims: tuple[str, ...],
    scales: tuple[str, ...],
    dtypes: tuple[str, ...],
    causal: bool,
    draws: int | None,
    seed: int | None,
    target_error: float | None,
    out: Path | None,
) -> int:
    """Measure approximations of attention, and what attention costs.

    NAME is performer or linformer (error against size, with intervals, theory, baselines and controls), complexity
    (time and memory against length), traffic (elements moved), or model (what it does to real models).
    """
    from effattn.study import command

    try:
        command.run(
            name,
            out=out,
            profile=profile,
            target_error=target_error,
            values=_words(values),
            methods=methods,
            sizes=_numbers("--size", sizes, int),
            n=_numbers("--n", lengths, int),
            head_dim=_numbers("--head-dim", head_dims, int),
            input_scale=_numbers("--input-scale", scales, float),
            dtype=_words(dtypes),
            causal=causal or None,
            draws=draws,
            seed=seed,
        )
    except KeyboardInterrupt:
        click.echo("effattn: interrupted; the same command goes on where this one stopped", err=True)
        raise click.exceptions.Exit(INTERRUPTED) from None
    return 0


def _words(given: Sequence[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(word.strip() for text in given for word in text.split(",") if word.strip()))


def _numbers(option: str, given: Sequence[str], kind: type) -> tuple:
    try:
        return tuple(dict.fromkeys(kind(word) for word in _words(given)))
    except ValueError:
        expected = "whole numbers" if kind is int else "numbers"
        raise click.UsageError(
            f"{option} {' '.join(given)!r}: expected {expected}, with commas between them."
        ) from None
