"""``distcl shard``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from distcl.cli.common import Overrides, Quiet, complain, launch_rank, named_stream, say
from distcl.config.paths import expanded, reachable
from distcl.errors import DataError, UsageError

_SOURCE_HELP = (
    "An .npz, a folder of class folders of images, archives, a Hugging Face dataset on disk, a "
    "config (.toml), or the name of a source, configured with --set stream.KEY=VALUE."
)
_MOST_PROBLEMS = 20
_FEW = 5


def shard(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=_SOURCE_HELP)],
    dest: Annotated[
        Path | None,
        typer.Argument(
            metavar="DEST", help="The folder to write.", show_default=False, parser=expanded
        ),
    ] = None,
    per_shard: Annotated[int, typer.Option(min=1, help="Samples of a shard.")] = 10_000,
    max_mb: Annotated[
        float, typer.Option(min=0, help="Close a shard before it grows beyond; 0: no limit.")
    ] = 0.0,
    workers: Annotated[int, typer.Option(min=0, help="Processes; 0: this one.")] = 0,
    label: Annotated[
        str, typer.Option(help="Of archives: the member with the label, cls or json:FIELD.")
    ] = "cls",
    sets: Overrides = None,
    append: Annotated[
        bool, typer.Option("--append", help="Add to the shards of DEST, each when it is whole.")
    ] = False,
    index_only: Annotated[
        bool, typer.Option("--index-only", help="SOURCE has shards: write index and shards.json.")
    ] = False,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad samples out, name them, and go on.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="SOURCE has shards: read and check everything.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write WebDataset shards with an index; or index, or check, the shards of a folder."""
    if launch_rank() != 0:
        return
    if (dest is None) != (index_only or verify) or (index_only and verify):
        raise UsageError("give SOURCE and DEST, or one folder with --index-only or --verify")
    if skip_bad and verify:
        raise UsageError("--skip-bad does not go with --verify, which names all that is bad")
    from distcl.cli.display import counting
    from distcl.data.shards import index, inputs, writer
    from distcl.types import exact

    if dest is None:
        folder = reachable(source)
        with counting("checking" if verify else "indexing", quiet) as tell:
            if verify:
                manifest, problems = index.verify_folder(folder, tell)
            else:
                manifest, problems = index.index_folder(folder, label, skip_bad, tell)
    else:
        folder = dest
        made = inputs.open_samples(source, label, named_stream(source, sets or []), skip_bad)
        problems, skipped = list(made.problems), made.skipped
        bad = problems if skip_bad else None
        if skipped:
            shown = ", ".join([*map(repr, skipped[:_FEW]), *["…"] * (len(skipped) > _FEW)])
            complain(f"{len(skipped)} skipped in '{source}', no images of a class: {shown}")
        with counting("writing", quiet, sum(made.sizes.values())) as tell:
            size = int(exact(max_mb) * 1_000_000)
            if append:
                manifest = writer.append_shards(made, folder, per_shard, size, tell, bad)
            else:
                manifest = writer.write_shards(made, folder, per_shard, size, workers, tell, bad)
    for problem in problems[:_MOST_PROBLEMS]:
        complain(problem)
    if len(problems) > _MOST_PROBLEMS:
        complain(f"… and {len(problems) - _MOST_PROBLEMS} more")
    if problems and verify:
        raise DataError(f"{len(problems)} faults in '{folder}'")
    if not quiet:
        found = manifest.shards
        say(
            f"{folder}: {len(found)} shards, {sum(s.samples for s in found):,} samples, "
            f"{sum(s.bytes for s in found) / 1e6:,.1f} MB"
        )
