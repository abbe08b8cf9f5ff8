"""The stubs and the promises of protos/v1: generated, and checked to be kept. For developers; needs
the `dev` extra. Run by `make protos`, `make protos-check` (a part of `make lint`) and
`make protos-accept`.

    python -P -m quire.tools.protos write    generate the stubs of every .proto anew
    python -P -m quire.tools.protos check    fail if stubs are stale, or a promise is broken
    python -P -m quire.tools.protos accept   take additions to the contract into its golden file

The golden file is the public contract as clients may know it: a FileDescriptorSet as text. Whatever
was added to the .proto must be accepted into it, or `check` fails, so that nothing goes unguarded.
Accepting refuses what breaks clients; `--breaking` accepts that too, for a new major version alone.
engine.proto makes no promises: both of its ends are of one build.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from google.protobuf import text_format
from google.protobuf.descriptor_pb2 import FileDescriptorSet

from .proto_changes import breaking_changes

ROOT = Path(__file__).resolve().parents[1]
"""Of the package, which is that of the repository."""

PUBLIC = ("protos/v1/generation.proto",)
GOLDEN = "protos/v1/golden.txtpb"

_HEADER = """\
# proto-file: google/protobuf/descriptor.proto
# proto-message: google.protobuf.FileDescriptorSet
#
# The public contract as clients may know it. Written by `make protos-accept`, not by hand.

"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -P -m quire.tools.protos", description=__doc__)
    parser.add_argument("action", choices=("write", "check", "accept"))
    parser.add_argument("--breaking", action="store_true", help="accept what breaks clients, too")
    parser.add_argument("--root", type=Path, default=ROOT, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    try:
        if args.action == "write":
            problems = _write(args.root)
        elif args.action == "check":
            problems = [*stale(args.root), *broken(args.root)]
        else:
            problems = _accept(args.root, breaking=args.breaking)
    except subprocess.CalledProcessError as error:
        problems = [error.stderr.strip()]
    sys.stderr.writelines(f"{problem}\n" for problem in problems)
    return 1 if problems else 0


def stale(root: Path = ROOT) -> list[str]:
    """What is wrong with the checked-in stubs: one line for each that is not what protoc makes."""
    made = _stubs(root)
    there = {str(p.relative_to(root)) for p in (root / "protos").rglob("*_pb2*.py*")}
    there = {name for name in there if "__pycache__" not in name}
    wrong = sorted(there - made.keys()) + [
        name for name, text in sorted(made.items()) if not _is(root / name, text)
    ]
    return [f"{name}: stale, missing or without a .proto; run `make protos`" for name in wrong]


def broken(root: Path = ROOT) -> list[str]:
    """How the public contract differs from its golden file: breaks, or else additions."""
    golden, present = _golden(root), describe(root, *PUBLIC)
    if found := breaking_changes(golden, present):
        return found
    if golden != present:
        return [f"{GOLDEN}: lacks what was added to the contract; run `make protos-accept`"]
    return []


def describe(root: Path, *files: str) -> FileDescriptorSet:
    """The descriptors of .proto files, given relative to the root."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "set"
        _protoc(root, f"--descriptor_set_out={out}", *files)
        return FileDescriptorSet.FromString(out.read_bytes())


def _write(root: Path) -> list[str]:
    for name, text in _stubs(root).items():
        (root / name).write_bytes(text)
    return []


def _accept(root: Path, *, breaking: bool) -> list[str]:
    present = describe(root, *PUBLIC)
    found = [] if breaking else breaking_changes(_golden(root), present)
    if not found:
        (root / GOLDEN).write_text(_HEADER + text_format.MessageToString(present))
    return found


def _golden(root: Path) -> FileDescriptorSet:
    return text_format.Parse((root / GOLDEN).read_text(), FileDescriptorSet())


def _stubs(root: Path) -> dict[str, bytes]:
    """What protoc makes of every .proto, by the path where it belongs."""
    files = sorted(str(p.relative_to(root)) for p in (root / "protos").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as scratch:
        kinds = ("python_out", "pyi_out", "grpc_python_out")
        _protoc(root, *(f"--{kind}={scratch}" for kind in kinds), *files)
        package = Path(scratch) / "quire"
        return {
            str(p.relative_to(package)): p.read_bytes() for p in package.rglob("*") if p.is_file()
        }


def _protoc(root: Path, *args: str) -> None:
    command = [sys.executable, "-P", "-m", "grpc_tools.protoc", "-I", "quire/protos=protos", *args]
    subprocess.run(command, cwd=root, check=True, capture_output=True, text=True)


def _is(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


if __name__ == "__main__":
    sys.exit(main())
