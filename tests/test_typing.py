"""The type checker sees the package as its users do: real types, every file, no silent Any."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NOT_CHECKED = {"tests", "docs", "build", "dist"}

PROBE = """
from quire import LLM, EngineConfig, SamplingParams
from quire.errors import invalid
from quire.kv.pages import PageAllocator
from quire.model.kernels.attention import ragged_paged_attention

reveal_type(LLM)
reveal_type(EngineConfig)
reveal_type(SamplingParams)
reveal_type(PageAllocator)
reveal_type(ragged_paged_attention)
invalid(1, "value", "limit")
EngineConfig(no_such_setting=1)
"""


def test_mypy_sees_the_whole_package_and_its_types(tmp_path: Path) -> None:
    # As `make typecheck` does it: the checkout may have any name, so mypy gets it through a link.
    # One link and one cache for both, or mypy would start over.
    link = ROOT / ".cache" / "typecheck" / "quire"
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(ROOT)
    (tmp_path / "probe.py").write_text(PROBE)
    command = [sys.executable, "-P", "-m", "mypy", "--verbose", "--no-error-summary"]
    command += ["--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache" / Path(sys.prefix).name)]
    command += ["--exclude", "^quire/(tests|build|docs)/", "-p", "quire", "-m", "probe"]
    done = subprocess.run(
        command,
        cwd=link.parent,
        env=os.environ | {"MYPYPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    said = [line for line in done.stdout.splitlines() if "probe.py:" in line]
    revealed = [re.sub(r'.*Revealed type is "(.*)"', r"\1", x) for x in said if "Revealed" in x]
    assert len(revealed) == 5, done.stdout + done.stderr[-2000:]
    whole = "\n".join(revealed)
    classes = ("serving.llm.LLM", "config.EngineConfig", "sched.sampling_params.SamplingParams")
    for shown, name in zip(revealed, (*classes, "kv.pages.PageAllocator"), strict=False):
        assert shown.endswith(f"-> quire.{name}"), whole
    assert "Overload(" in revealed[4] and "Array" in revealed[4], whole
    errors = [x for x in said if "error:" in x]
    assert any('Argument 1 to "invalid"' in x and 'expected "str"' in x for x in errors), said
    assert any('"no_such_setting"' in x for x in errors), said
    assert len(errors) == 2, said

    checked = set(
        re.findall(r"Found source: +BuildSource\(path='[^']*/quire/([^']+\.pyi?)'", done.stderr)
    )
    package = {
        str(path.relative_to(ROOT))
        for path in ROOT.rglob("*.py")
        if not (top := path.relative_to(ROOT).parts[0]).startswith(".") and top not in NOT_CHECKED
    }
    # mypy takes the generated stub where a module has one, and pyproject.toml leaves those out.
    assert checked == {p for p in package if not re.search(r"_pb2(_grpc)?\.py$", p)}
