"""`tools/model_zoo.py`: what the model zoo has, fetching and checking it, and the tables of MODEL_ZOO.md."""

import argparse
from pathlib import Path

from visft import model_zoo
from visft.commands.tool import tool
from visft.errors import CheckpointError
from visft.model_zoo import places, tables
from visft.model_zoo.entries import entries, find
from visft.utils.cli import SAME

ALONE = True


def listing(arguments: argparse.Namespace) -> None:
    """Print the names of configs and weights."""
    print("Configs, for visft.model_zoo.get_config(NAME):")
    for name in model_zoo.list():
        print(f"  {name}")
    print(f"\nWeights, as visft://NAME; the cache is {places.folder()}:")
    width = max(map(len, entries()))
    for entry in entries().values():
        path = None if entry.package else places.present(entry)
        state = "in the cache" if path else entry.source
        print(f"  {entry.name:{width}}  {state}")


def download(arguments: argparse.Namespace) -> None:
    """Fetch weights, and print their paths."""
    from visft.model_zoo import cache

    for entry in [find(name) for name in arguments.names]:
        print(cache.fetch(entry, again=arguments.again))


def verify(arguments: argparse.Namespace) -> None:
    """Check files, or the tables of the document."""
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


def table(arguments: argparse.Namespace) -> None:
    """Print or write the tables of the document."""
    if arguments.rehash:
        changed = tables.rehash()
        print(f"zoo.json: {', '.join(changed) or 'nothing'} changed")
    if arguments.write:
        done = "tables written" if tables.write(arguments.document) else "tables are up to date"
        print(f"{arguments.document}: {done}")
    elif not arguments.rehash:
        print("\n".join(f"{name}\n\n{tables.render(name)}" for name in tables.entries.table()["tables"]))


parser = argparse.ArgumentParser(
    description="The model zoo: configs and weight files by name.",
    epilog="Downloads go to $VISFT_CACHE, come from $VISFT_ZOO_MIRROR when it is set, and are refused under "
    "$VISFT_OFFLINE=1.",
)
_commands = parser.add_subparsers(metavar="COMMAND", required=True)

_list = _commands.add_parser("list", help="names of configs and weights, and where these are")
_list.set_defaults(work=listing)

_download = _commands.add_parser("download", help="fetch weights into the cache; prints their paths")
_download.set_defaults(work=download)
_download.add_argument("names", nargs="+", metavar="NAME")
_download.add_argument("--again", action="store_true", help="also what is there already")

_verify = _commands.add_parser("verify", help="hash what is here (or NAMEs), and compare")
_verify.set_defaults(work=verify)
_verify.add_argument("names", nargs="*", metavar="NAME")
_verify.add_argument("--check", choices=("files", "tables"), default="files", help="or MODEL_ZOO.md's tables")

_table = _commands.add_parser("table", help="print MODEL_ZOO.md's tables, made from zoo.json")
_table.set_defaults(work=table)
_table.add_argument("--write", action="store_true", help="write them into MODEL_ZOO.md instead")
_table.add_argument(
    "--rehash",
    action="store_true",
    help="first put size, SHA-256 and figures of the package's files into zoo.json",
)
for _command in (_verify, _table):
    _command.add_argument("--document", type=Path, default=tables.DOCUMENT, help="default: MODEL_ZOO.md")

parse = parser.parse_args
run, main = tool(parse, lambda arguments: arguments.work(arguments), again=SAME)
