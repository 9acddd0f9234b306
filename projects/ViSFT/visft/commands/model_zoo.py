"""`tools/model_zoo.py`: what the model zoo has, fetching and checking it, and the tables of MODEL_ZOO.md."""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from visft import model_zoo
from visft.errors import CheckpointError
from visft.model_zoo import places, tables
from visft.model_zoo.entries import entries, find
from visft.utils.cli import SAME, guard

ALONE = True


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The arguments; `work` is the function of the given subcommand."""
    parser = argparse.ArgumentParser(
        description="The model zoo: configs and weight files by name.",
        epilog="Downloads go to $VISFT_CACHE, come from $VISFT_ZOO_MIRROR when it is set, and are refused under "
        "$VISFT_OFFLINE=1.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    listing = commands.add_parser("list", help="names of configs and weights, and where these are")
    download = commands.add_parser("download", help="fetch weights into the cache; prints their paths")
    download.add_argument("names", nargs="+", metavar="NAME")
    download.add_argument("--again", action="store_true", help="also what is there already")
    verify = commands.add_parser("verify", help="hash what is here (or NAMEs), and compare")
    verify.add_argument("names", nargs="*", metavar="NAME")
    verify.add_argument(
        "--check", choices=("files", "tables"), default="files", help="or MODEL_ZOO.md's tables"
    )
    table = commands.add_parser("table", help="print MODEL_ZOO.md's tables, made from zoo.json")
    table.add_argument("--write", action="store_true", help="write them into MODEL_ZOO.md instead")
    table.add_argument(
        "--rehash",
        action="store_true",
        help="first put size, SHA-256 and figures of the package's files into zoo.json",
    )
    for command in (verify, table):
        command.add_argument("--document", type=Path, default=tables.DOCUMENT, help="default: MODEL_ZOO.md")
    for command, work in ((listing, _list), (download, _download), (verify, _verify), (table, _table)):
        command.set_defaults(work=work)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> int:
    """Do what the subcommand says."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return guard(arguments.work, arguments, again=SAME if arguments.work is _download else "")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    return run(parse(argv))


def _list(arguments: argparse.Namespace) -> None:
    print("Configs, for visft.model_zoo.get_config(NAME):")
    for name in model_zoo.list():
        print(f"  {name}")
    print(f"\nWeights, as visft://NAME; the cache is {places.folder()}:")
    width = max(map(len, entries()))
    for entry in entries().values():
        path = None if entry.package else places.present(entry)
        state = "in the cache" if path else entry.source
        print(f"  {entry.name:{width}}  {state}")


def _download(arguments: argparse.Namespace) -> None:
    from visft.model_zoo import cache

    for entry in [find(name) for name in arguments.names]:
        print(cache.fetch(entry, again=arguments.again))


def _verify(arguments: argparse.Namespace) -> None:
    if arguments.check == "tables":
        tables.check(arguments.document)
        print(f"{arguments.document}: its tables are those of zoo.json")
        return
    from visft.model_zoo import cache

    named = [find(name) for name in arguments.names]
    bad = []
    for entry in named or [entry for entry in entries().values() if entry.package or places.present(entry)]:
        try:
            print(f"ok   {entry.name}  {cache.verify(entry)}", flush=True)
        except CheckpointError as error:
            bad.append(entry.name)
            print(f"BAD  {entry.name}  {error}", flush=True)
    if bad:
        raise CheckpointError(f"{len(bad)} of the zoo's files are not as published: {', '.join(bad)}")


def _table(arguments: argparse.Namespace) -> None:
    if arguments.rehash:
        changed = tables.rehash()
        print(f"zoo.json: {', '.join(changed) or 'nothing'} changed")
    if arguments.write:
        done = "tables written" if tables.write(arguments.document) else "tables are up to date"
        print(f"{arguments.document}: {done}")
    elif not arguments.rehash:
        print("\n".join(f"{name}\n\n{tables.render(name)}" for name in tables.entries.table()["tables"]))
