"""Models of the hub, from a fake one on this machine: downloads, and everything that goes wrong."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import huggingface_hub.file_download
import pytest
from fake_hub import FakeHub, Repo
from notes import Notes
from safetensors.numpy import load_file, save_file

from quire.checkpoints.convert import convert
from quire.checkpoints.folder import Checkpoint
from quire.checkpoints.locate import locate
from quire.checkpoints.shipped import resolve
from quire.environment import hub_settings
from quire.errors import CheckpointError, InvalidConfig
from quire.serving.progress import Silent
from quire.tools.cli import main

SMALL = ["--no-warmup", "--max-num-seqs=4", "--max-batched-tokens=32", "--page-size=16"]
GREEDY = ["--temperature=0", "--max-tokens=8", "--ignore-eos", "--prompt=hello world"]


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


@pytest.fixture
def model(folder: Path) -> dict[str, bytes]:
    """The files of a tiny model, and some that nobody needs."""
    others = {
        "README.md": b"read me",
        "pytorch_model.bin": b"a pickle",
        "consolidated.safetensors": b"the same again",
        "model.Q4.gguf": b"another form",
        "original/params.json": b"{}",
        ".gitattributes": b"",
    }
    return files_of(folder) | others


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: dict[str, bytes]) -> Any:
    """A hub with `org/tiny`, the only one this process knows, and an empty cache."""
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    # Its own clock alone: other servers of this process sleep, too.
    clock = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    monkeypatch.setattr(huggingface_hub.file_download, "time", clock)
    monkeypatch.chdir(tmp_path)
    with FakeHub() as fake:
        monkeypatch.setenv("HF_ENDPOINT", fake.endpoint + "/")
        monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
        fake.repos["org/tiny"] = Repo({"main": model})
        yield fake


def get(name: str = "org/tiny", revision: str | None = None, offline: bool = False) -> Path:
    return locate(name, Silent(), revision=revision, offline=offline)


def refused(pattern: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(CheckpointError, match=pattern):
        get(*args, **kwargs)


def shards(folder: Path) -> dict[str, bytes]:
    """The files of the model, its weights in two shards."""
    tensors = load_file(folder / "model.safetensors")
    names = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    weight_map = {tensor: names[i % 2] for i, tensor in enumerate(tensors)}
    files = {n: c for n, c in files_of(folder).items() if n != "model.safetensors"}
    out = folder.parent / "shard.safetensors"
    for name in names:
        save_file({t: a for t, a in tensors.items() if weight_map[t] == name}, out)
        files[name] = out.read_bytes()
    index = json.dumps({"weight_map": weight_map}).encode()
    return files | {"model.safetensors.index.json": index}


# Downloads


def test_a_hub_name_is_downloaded_once_and_only_what_is_needed(
    hub: FakeHub, tmp_path: Path, folder: Path
) -> None:
    found = get()
    assert found.is_relative_to(tmp_path / "hf" / "hub" / "models--org--tiny" / "snapshots")
    wanted = [*files_of(folder), "README.md"]
    assert sorted(hub.downloaded()) == sorted(wanted)
    assert hub.downloaded()[-1] == "model.safetensors"  # where it is, all is
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert Checkpoint.open(found).has_tokenizer
    hub.requests.clear()
    assert get() == found and hub.downloaded() == []


def test_commands_take_a_hub_name(hub: FakeHub, folder: Path, capsys: Any) -> None:
    assert main(["generate", str(folder), *GREEDY, *SMALL]) == 0
    wanted = capsys.readouterr().out
    assert main(["generate", "org/tiny@main", *GREEDY, *SMALL]) == 0
    said = capsys.readouterr()
    assert said.out == wanted and "org/tiny@main on cpu\n" in said.err
    assert main(["inspect", "org/tiny", "--revision=main", "--json", "--offline"]) == 0
    assert json.loads(capsys.readouterr().out)["architecture"]["layers"] == 2
    assert main(["convert", "org/tiny", "made"]) == 0
    assert main(["generate", "./made", *GREEDY, *SMALL]) == 0
    assert capsys.readouterr().out == wanted
    assert "org/tiny" in Path("made/quire_checkpoint.json").read_text()


def test_a_converted_folder_on_the_hub(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    convert(folder, tmp_path / "made", Silent())
    hub.repos["org/made"] = Repo({"main": files_of(tmp_path / "made") | {"x.bin": b""}})
    found = get("org/made")
    assert files_of(found) == files_of(tmp_path / "made")
    assert get("org/made", offline=True) == found


def test_shards_are_those_of_the_index(hub: FakeHub, folder: Path) -> None:
    files = shards(folder)
    hub.repos["org/tiny"] = Repo({"main": files | {"model-old.safetensors": b"?"}})
    assert files_of(get()) == files


def test_revisions(hub: FakeHub, model: dict[str, bytes]) -> None:
    repo = hub.repos["org/tiny"]
    repo.revisions["v2"] = model | {"README.md": b"the second"}
    second = get("org/tiny@v2")
    assert (second / "README.md").read_bytes() == b"the second"
    assert get(revision="v2") == second and get("org/tiny@v2", "v2") == second
    commit = repo.commit("v2")
    assert commit and get(revision=commit) == second and second.name == commit
    first = get()
    assert first != second and (first / "README.md").read_bytes() == b"read me"
    assert [n for n in hub.downloaded() if n == "model.safetensors"] == ["model.safetensors"]
    refused(r"org/tiny: has no revision 'v9'; http.*/org/tiny/tree/main lists", revision="v9")
    for argument, revision in (("org/tiny@v2", "v1"), ("demo", "v1"), ("./x", "v1")):
        with pytest.raises(InvalidConfig, match="revision: got 'v1', but"):
            get(argument, revision)


def test_a_cut_connection_goes_on_where_it_broke(
    hub: FakeHub, folder: Path, monkeypatch: Any
) -> None:
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.repos["org/tiny"].cut_after = [10_000, 20_000]
    found = get()
    ranges = [r for m, p, r in hub.requests if m == "GET" and p.endswith("model.safetensors")]
    assert ranges == [None, "bytes=10000-", "bytes=30000-"] and size > 40_000
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_failed_download_keeps_what_is_whole(hub: FakeHub, folder: Path) -> None:
    files = shards(folder)
    repo = hub.repos["org/tiny"] = Repo({"main": files}, broken=True)
    refused("org/tiny: cannot be downloaded from .*run it again to go on with the files that are")
    refused(r"offline, and the cache .* lacks model-00001-of-00002.safetensors, ", offline=True)
    repo.broken = False
    hub.requests.clear()
    assert files_of(get()) == files
    assert sorted(hub.downloaded()) == [n for n in sorted(files) if "-of-" in n]


def ranges(hub: FakeHub, name: str) -> list[str | None]:
    """The Range headers of the requests for a file's content."""
    return [r for method, path, r in hub.requests if method == "GET" and path.endswith(name)]


def test_a_download_that_failed_goes_on_where_it_stopped(
    hub: FakeHub, folder: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    repo = hub.repos["org/tiny"]
    repo.broken, repo.cut_after = True, [30_000]
    refused("org/tiny: cannot be downloaded from .*run it again to go on")
    repo.broken = False
    hub.requests.clear()
    found = get()
    assert ranges(hub, "model.safetensors") == ["bytes=30000-"]
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert not list(found.parent.parent.rglob("*.incomplete"))


KILLED = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # who runs tests may have it ignored
import huggingface_hub.constants
huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE = 20_000
from quire.checkpoints import hub_resume
from quire.checkpoints.locate import locate
from quire.serving.progress import Silent
count, write = [], hub_resume._Partial.write
def third(self, data):
    count.append(data)
    if len(count) == 3:
        os.kill(os.getpid(), int(sys.argv[1]))
        self._stop.wait(30)  # until the main thread has heard of it
    return write(self, data)
hub_resume._Partial.write = third
locate("org/tiny", Silent(), revision=None, offline=False)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_download_that_was_killed_goes_on_where_it_stopped(
    hub: FakeHub, folder: Path, number: signal.Signals
) -> None:
    argv = [sys.executable, "-P", "-c", KILLED, str(int(number))]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == -number, done.stderr
    (left,) = Path("hf").rglob("*.incomplete")
    there = left.stat().st_size
    assert there >= 40_000
    hub.requests.clear()
    found, reporter = get(), Notes()
    assert ranges(hub, "model.safetensors") == [f"bytes={there}-"]
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert locate("org/tiny", reporter, revision=None, offline=True) == found


def test_what_was_left_is_not_trusted(hub: FakeHub, folder: Path, monkeypatch: Any) -> None:
    repo = hub.repos["org/tiny"]
    repo.broken, repo.cut_after = True, [30_000]
    refused("cannot be downloaded")
    (left,) = Path("hf").rglob("*.incomplete")
    left.write_bytes(bytes(30_000))
    repo.broken = False
    host = hub.endpoint.removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:hush@{host}")
    refused(rf"^http://\*\*\*@{host}/org/tiny/.*model.safetensors: what came has another checksum")
    left.write_bytes(bytes(10_000_000))  # longer than the file
    found = get()
    assert (found / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


def test_progress(hub: FakeHub, model: dict[str, bytes], monkeypatch: Any) -> None:
    from quire.checkpoints import hub as module

    monkeypatch.setattr(module, "_LOOK_EVERY", 0.001)
    model["README.md"] = bytes(8 << 20)
    reporter = Notes()
    locate("org/tiny", reporter, revision=None, offline=False)
    assert reporter.said[0].startswith("downloading org/tiny: 8.")
    assert reporter.progress
    assert all(n == "downloading" and done <= total for n, done, total in reporter.progress)


# Offline


def test_offline_takes_only_what_is_cached(hub: FakeHub, monkeypatch: Any, tmp_path: Path) -> None:
    refused(r"org/tiny: offline, and not in the cache \(.*hf/hub\); once without", offline=True)
    found = get()
    hub.requests.clear()
    assert get(offline=True) == found and get(revision=found.name, offline=True) == found
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert get() == found
    refused("org/tiny@v2: offline, and not in the cache", "org/tiny@v2")
    assert hub.requests == []
    (found / "model.safetensors").unlink()
    refused("offline, and the cache .* lacks model.safetensors; once without --offline")


def test_an_unreachable_hub_is_said_and_the_cache_used(hub: FakeHub, monkeypatch: Any) -> None:
    found, reporter = get(), Notes()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert locate("org/tiny", reporter, revision=None, offline=False) == found
    assert reporter.said == [
        "http://127.0.0.1:1 cannot be reached: org/tiny is taken from the cache"
    ]
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    hub.repos["org/tiny"].down = True
    assert get() == found
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    refused("org/else: http://127.0.0.1:1 cannot be reached .*does not have all of it", "org/else")


# Refusals


def test_a_password_in_the_endpoint_is_in_no_message(hub: FakeHub, monkeypatch: Any) -> None:
    """Nor in those that huggingface_hub words."""
    host = hub.endpoint.removeprefix("http://")
    monkeypatch.setenv("HF_ENDPOINT", f"http://me:hush%2F@{host}")
    hub.repos["org/broken"] = Repo(hub.repos["org/tiny"].revisions, broken=True)
    said = []
    for name in ("org/none", "org/broken"):
        with pytest.raises(CheckpointError, match=rf"http://\*\*\*@{host}") as caught:
            get(name)
        said.append(str(caught.value))
    get("org/tiny")
    reporter = Notes()
    hub.repos["org/tiny"].down = True
    assert locate("org/tiny", reporter, revision=None, offline=False)
    assert reporter.said == [
        f"http://***@{host} cannot be reached: org/tiny is taken from the cache"
    ]
    with pytest.raises(CheckpointError, match=r"cannot be reached \(.*\*\*\*@") as caught:
        get("org/tiny", revision="v9")
    assert not any("hush" in text for text in (*said, str(caught.value), repr(hub_settings())))


def test_a_gated_model_is_explained(hub: FakeHub, monkeypatch: Any) -> None:
    hub.repos["org/tiny"].gated = True
    refused(r"org/tiny: gated: ask for access at http.*/org/tiny; set HF_TOKEN to a token of an")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    refused("org/tiny: gated: .*the token in HF_TOKEN has no access")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert (get() / "model.safetensors").exists()


def test_a_private_model_and_one_that_is_not_there(
    hub: FakeHub, monkeypatch: Any, tmp_path: Path
) -> None:
    hub.repos["org/hidden"] = Repo(hub.repos["org/tiny"].revisions, private=True)
    (tmp_path / "org" / "hiden").mkdir(parents=True)
    get("org/tiny")
    refused(
        r"org/hidden: neither a folder here nor a model at http.*; near it: org/hiden.*If it is "
        "private, set HF_TOKEN",
        "org/hidden",
    )
    refused("org/tinny: neither a folder .*; near it: org/tiny", "org/tinny")
    monkeypatch.setenv("HF_TOKEN", "right")
    assert (get("org/hidden") / "config.json").exists()


def test_no_pickle_is_downloaded(hub: FakeHub, model: dict[str, bytes]) -> None:
    for name in ("model.safetensors", "consolidated.safetensors"):
        del model[name]
    refused("has no weights, must have .*found pytorch_model.bin.*A pickle can run any code")
    assert "pytorch_model.bin" not in hub.downloaded()


def test_a_disk_too_small_is_known_before(hub: FakeHub, monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 20))
    refused(rf"downloading org/tiny needs 64\..* MiB of disk, 1 MiB free at {tmp_path}/hf/hub")
    assert hub.downloaded() == []


# Which is which


def test_what_a_name_means(hub: FakeHub, folder: Path, tmp_path: Path) -> None:
    local = tmp_path / "org" / "tiny"
    shutil.copytree(folder, local)
    assert get("org/tiny") == Path("org/tiny")  # a folder that is there wins
    assert get("./org/tiny") == Path("org/tiny") and get(str(local)) == local
    assert hub.requests == []
    assert get("demo") == resolve("demo")
    for path in ("./org/none", "../none", "/none/at/all", "~/none"):
        assert get(path) == Path(path).expanduser()  # opening it says that it is not there
    with pytest.raises(CheckpointError, match="does not exist, must be a model folder"):
        Checkpoint.open(get("./org/none"))
    refused(r"dem: does not exist, must be a model folder, a shipped name \(demo, demo-draft\) or "
            r"a hub name such as org/name; near it: demo", "dem")  # fmt: skip
    refused("gpt2: does not exist, must be", "gpt2")
    refused("a/b/c: does not exist", "a/b/c")


def test_settings_come_from_the_environment(monkeypatch: Any, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = hub_settings()
    assert (
        plain.endpoint == "https://huggingface.co" and plain.cache == tmp_path / "huggingface/hub"
    )
    assert plain.token is None and not plain.offline
    monkeypatch.setenv("HF_TOKEN", " secret\n")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "c"))
    told = hub_settings()
    assert (told.token, told.cache) == ("secret", tmp_path / "c")
    assert "secret" not in repr(told)


def test_a_path_loads_no_hub_package(folder: Path) -> None:
    script = (
        "import sys\n"
        "from quire.checkpoints.locate import locate\n"
        "from quire.checkpoints.folder import Checkpoint\n"
        "Checkpoint.open(locate(sys.argv[1], None, revision=None, offline=False))\n"
        "sys.exit(bool({'huggingface_hub', 'orbax', 'tensorstore', 'jax'} & set(sys.modules)))\n"
    )
    argv = [sys.executable, "-P", "-c", script, str(folder)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
