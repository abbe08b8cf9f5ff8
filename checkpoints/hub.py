"""A model of the Hugging Face hub -> its folder in the hub's cache. Used by locate.py.

huggingface_hub does the downloading: files that are whole stay, a connection that breaks goes on
from where it broke, and every program on the machine shares the cache; hub_resume.py makes a
download that was ended go on too. Decided here: which files are needed (never a pickle), whether
they fit the disk, and what to tell people when it fails.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..environment import HubSettings, without_secrets
from ..errors import CheckpointError
from ..model.memory import human_bytes
from .disk import require_space
from .hub_resume import LargeFile, bring
from .json_fields import read_json
from .manifest import MANIFEST
from .reporting import Reporter, Update
from .safetensors_files import INDEX, SINGLE

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

_SMALL = (".json", ".jinja", ".txt", ".model", ".tiktoken")
_SMALL_NAMES = ("README", "LICENSE", "NOTICE", "USE_POLICY")
_LOOK_EVERY = 0.2
"""Seconds between looks at how much has arrived."""


def fetch(
    name: str,
    revision: str | None,
    settings: HubSettings,
    reporter: Reporter,
    *,
    offline: bool = False,
    not_found_hint: str = "",
) -> Path:
    """The folder of a hub model, downloaded where it is not in the cache.

    Args:
      name: "org/name".
      revision: branch, tag or commit; None is the main branch.
      settings: where from and where to.
      reporter: hears of the download.
      offline: use the cache alone.
      not_found_hint: what to add when the hub has no such model.

    Raises:
      CheckpointError: it cannot be had; says why and what to do.
    """
    if offline or settings.offline:
        return _cached(name, revision, settings)
    from huggingface_hub import HfApi

    try:
        api = HfApi(endpoint=settings.endpoint, token=settings.token)
        info = api.model_info(name, revision=revision, files_metadata=True)
    except Exception as error:  # of huggingface_hub, and of whichever HTTP package it uses
        if (_status(error) or 500) >= 500:  # no answer, or one of a hub that is down
            return _cached_instead(name, revision, settings, reporter, error)
        raise _explained(error, name, revision, settings, not_found_hint) from error
    files = {file.rfilename: file for file in info.siblings or ()}
    try:
        # The small files come first: where there are weights, there is all that is needed.
        folder = _download(name, revision, settings, reporter, _small(files), files)
        wanted = _weights(name, folder, files)
        return _download(name, folder.name, settings, reporter, wanted, files)
    except CheckpointError:
        raise
    except Exception as error:
        raise _explained(error, name, revision, settings, not_found_hint) from error


# Which files.


def _small(files: Mapping[str, RepoSibling]) -> list[str]:
    """Everything beside the weights that a model may need, or its users."""
    top = [name for name in files if "/" not in name and not name.startswith(".")]
    return [n for n in top if n.endswith(_SMALL) or n.startswith(_SMALL_NAMES)] + [
        name for name in files if name.startswith("additional_chat_templates/")
    ]


def _weights(name: str, folder: Path, files: Mapping[str, RepoSibling]) -> list[str]:
    """The files of weights that loading reads: those, and no copy in another form."""
    if MANIFEST in files:
        return [file for file in read_json(folder / MANIFEST).get("files", {}) if file in files]
    if SINGLE in files:
        return [SINGLE]
    if INDEX in files:
        return _shards(folder)
    pickles = [file for file in files if file.endswith((".bin", ".pth", ".pt"))]
    others = [file for file in files if file.endswith((".gguf", ".safetensors"))]
    found = f"; found {', '.join([*pickles, *others][:3])}" if pickles or others else ""
    reason = ". A pickle can run any code, so Quire downloads none" if pickles else ""
    raise CheckpointError(f"{name}: has no weights, must have {SINGLE} or {INDEX}{found}{reason}")


def _shards(folder: Path) -> list[str]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    return sorted(set(weight_map.values())) if isinstance(weight_map, dict) else []


# Downloading.


def _storage(name: str, settings: HubSettings) -> Path:
    """Where the cache keeps a model: blobs/, refs/ and snapshots/."""
    return settings.cache / f"models--{name.replace('/', '--')}"


def _download(
    name: str,
    revision: str | None,
    settings: HubSettings,
    reporter: Reporter,
    wanted: list[str],
    files: Mapping[str, RepoSibling],
) -> Path:
    """Downloads the files that the cache lacks; returns the folder of the revision's commit."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

    blobs = _storage(name, settings) / "blobs"
    large = _large(name, revision, settings, [files[n] for n in wanted if n in files])
    others = [files[n] for n in wanted if n in files and n not in large]
    needed = sum(file.missing for file in large.values())
    needed += sum(file.size or 0 for file in others if not _has(blobs, file))
    if needed:
        require_space(settings.cache, needed, f"downloading {name}")
    with _progress(name, blobs, needed, reporter), _no_bars():
        bring(list(large.values()), build_hf_headers(token=settings.token))
        folder = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[_literally(name) for name in wanted],
            cache_dir=settings.cache,
            endpoint=settings.endpoint,
            token=settings.token,
        )
    lacking = [name for name in wanted if not (Path(folder) / name).exists()]
    if lacking:
        raise CheckpointError(f"{name}: the hub does not have {', '.join(lacking[:3])}")
    return Path(folder)


def _large(
    name: str, revision: str | None, settings: HubSettings, wanted: list[RepoSibling]
) -> dict[str, LargeFile]:
    """The files that go on where they stopped, by name: those that the hub serves in one piece and
    tells the SHA-256 of."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.constants import MAX_HTTP_DOWNLOAD_SIZE

    storage = _storage(name, settings)
    return {
        file.rfilename: LargeFile(
            url=hf_hub_url(name, file.rfilename, revision=revision, endpoint=settings.endpoint),
            blob=storage / "blobs" / file.lfs.sha256,
            lock=settings.cache / ".locks" / storage.name / f"{file.lfs.sha256}.lock",
            size=file.lfs.size,
        )
        for file in wanted
        if file.lfs is not None and file.lfs.size <= MAX_HTTP_DOWNLOAD_SIZE
    }


def _literally(file: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in file)


def _has(blobs: Path, file: RepoSibling) -> bool:
    blob = file.lfs.sha256 if file.lfs else file.blob_id
    return blob is not None and (blobs / blob).exists()


@contextmanager
def _progress(name: str, blobs: Path, needed: int, reporter: Reporter) -> Iterator[None]:
    """Shows what arrives in the cache, by looking there: whoever downloads it, and however."""
    if needed < 1 << 20:
        yield
        return
    reporter.note(f"downloading {name}: {human_bytes(needed)} to {blobs.parent.parent}")
    before, done = _bytes_in(blobs), threading.Event()

    def watch(update: Update) -> None:
        while not done.wait(_LOOK_EVERY):
            update(min(needed, max(0, _bytes_in(blobs) - before)), needed)

    with reporter.phase("downloading") as update:
        thread = threading.Thread(target=watch, args=(update,), daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()


def _bytes_in(folder: Path) -> int:
    total = 0
    for file in folder.glob("*"):
        try:
            total += file.stat().st_size
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


@contextmanager
def _no_bars() -> Iterator[None]:
    """One bar is enough."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    if are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# Without the hub.


def _cached(name: str, revision: str | None, settings: HubSettings) -> Path:
    """The folder in the cache, if all of it is there."""
    storage = _storage(name, settings)
    ref = storage / "refs" / (revision or "main")
    commit = ref.read_text().strip() if ref.is_file() else revision or ""
    folder = storage / "snapshots" / commit
    asked = f"{name}@{revision}" if revision else name
    if not commit or not folder.is_dir():
        raise CheckpointError(
            f"{asked}: offline, and not in the cache ({settings.cache}); once without --offline "
            "(and HF_HUB_OFFLINE) downloads it"
        )
    if (folder / MANIFEST).is_file():
        wanted = list(read_json(folder / MANIFEST).get("files", {}))
    else:
        wanted = _shards(folder) if (folder / INDEX).is_file() else [SINGLE]
        wanted = [SINGLE] if (folder / SINGLE).is_file() else wanted
    lacking = [file for file in ("config.json", *wanted) if not (folder / file).exists()]
    if lacking:
        more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
        raise CheckpointError(
            f"{asked}: offline, and the cache ({settings.cache}) lacks {', '.join(lacking[:3])}"
            f"{more}; once without --offline (and HF_HUB_OFFLINE) downloads the rest"
        )
    return folder


def _cached_instead(
    name: str, revision: str | None, settings: HubSettings, reporter: Reporter, error: Exception
) -> Path:
    """What the cache has, where the hub does not answer."""
    try:
        folder = _cached(name, revision, settings)
    except CheckpointError:
        raise CheckpointError(
            f"{name}: {settings.shown_endpoint} cannot be reached ({_first_line(error)}), and the "
            f"cache ({settings.cache}) does not have all of it"
        ) from error
    reporter.note(f"{settings.shown_endpoint} cannot be reached: {name} is taken from the cache")
    return folder


# What went wrong.


def _status(error: Exception) -> int | None:
    """The hub's answer as an HTTP status; None where it did not answer."""
    response: Any = getattr(error, "response", None)
    return getattr(response, "status_code", None)


def _first_line(error: Exception) -> str:
    """What huggingface_hub says first; it quotes URLs as they are."""
    first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return without_secrets(first)


def _explained(
    error: Exception, name: str, revision: str | None, settings: HubSettings, hint: str
) -> CheckpointError:
    from huggingface_hub import errors

    hub = settings.shown_endpoint
    page = f"{hub}/{name}"
    has_token = settings.token is not None
    mend = (
        "the token in HF_TOKEN has no access"
        if has_token
        else f"set HF_TOKEN to a token of an account that has access ({hub}/settings/tokens)"
    )
    if isinstance(error, errors.GatedRepoError):
        text = f"gated: ask for access at {page}; {mend}"
    elif isinstance(error, errors.RevisionNotFoundError):
        text = f"has no revision {revision or 'main'!r}; {page}/tree/main lists what it has"
    elif isinstance(error, errors.RepositoryNotFoundError):
        text = f"neither a folder here nor a model at {hub}{hint}. If it is private, {mend}"
    elif _status(error) == 401:
        text = f"{hub} does not accept the token in HF_TOKEN"
    elif _status(error) == 403:
        text = f"{hub} forbids it ({_first_line(error)}); {mend}"
    else:
        text = (
            f"cannot be downloaded from {hub}: {_first_line(error)}; run it again to "
            "go on with the files that are missing"
        )
    return CheckpointError(f"{name}: {text}")
