"""From the name a user types to a model directory."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Final

from skimp.errors import ModelNotFoundError, shown

# Never *.bin, *.py or the like: nothing that is downloaded can be code or a pickle.
HUB_FILES: Final = (
    "*.json",
    "*.safetensors",
    "*.jinja",
    "tokenizer.model",
    "merges.txt",
    "vocab.txt",
)
# Other exports of the same weights, and Mistral's own layout beside the Hugging Face one.
HUB_IGNORED: Final = ("*/*", "consolidated*")
HUB_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def embedded_models() -> dict[str, Path]:
    """The models that ship with the package, by name."""
    root = Path(str(resources.files("skimp"))) / "assets" / "models"
    if not root.is_dir():
        return {}
    return {entry.name: entry for entry in sorted(root.iterdir()) if entry.is_dir()}


def locate_model(name: str | Path) -> Path:
    """The directory of an embedded model, a local directory, or a downloaded Hub repository.

    A local directory wins over a Hub id of the same spelling, an embedded model over both unless
    the name is written as a path (``./tales``). Raises ModelNotFoundError with the reason.
    """
    text = str(name)
    embedded = embedded_models()
    if text in embedded:
        return embedded[text]
    if not text:
        raise ModelNotFoundError("the model name is empty")
    try:
        path = Path(text).expanduser()
        is_directory, exists = path.is_dir(), path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # too long, no such home, a NUL
        raise ModelNotFoundError(f"{shown(text)}: not a path: {error}") from error
    if is_directory:
        return path
    if exists:
        raise ModelNotFoundError(
            f"{text}: not a directory; name the directory that holds the model"
        )
    looks_local = isinstance(name, Path) or text.startswith((".", "/", "~")) or "\\" in text
    if looks_local or not HUB_ID.fullmatch(text):
        known = f" (embedded: {', '.join(embedded)})" if embedded and "/" not in text else ""
        raise ModelNotFoundError(f"{text}: no such directory{known}")
    return _download(text)


def _download(repository: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        found = snapshot_download(
            repository, allow_patterns=list(HUB_FILES), ignore_patterns=list(HUB_IGNORED)
        )
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repository}: the Hub asks you to accept its terms and log in first"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository}: no such local directory, and no such repository on the Hub"
        ) from error
    except LocalEntryNotFoundError as error:
        raise ModelNotFoundError(
            f"{repository}: no such local directory, not in the Hub cache, and the Hub cannot be "
            "reached"
        ) from error
    except HFValidationError as error:
        raise ModelNotFoundError(
            f"{repository}: no such local directory, and not a Hub repository's name"
        ) from error
    except (HfHubHTTPError, OSError) as error:
        raise ModelNotFoundError(f"{repository}: download failed: {error}") from error
    return Path(found)
