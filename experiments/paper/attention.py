"""Attention maps, and how much of the attention goes to the sinks (Fig. 2), by the model's own attention weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch

from experiments.kept import Found
from experiments.paper.setting import Experiment, Piece, Setting
from personal_adapters.neox_flash import unwrap_attention
from streaming_llm import StreamingLLMWrapper

SENTENCE = 16  # tokens, as in the paper
RECENT = 16
STEPS = 32  # queries of a stream whose attention is taken
MAPS = 6  # layers that are shown


@contextmanager
def _writing_weights(setting: Setting) -> Iterator[torch.nn.Module]:
    """The model with the attention that Transformers writes out, which gives its weights."""
    model = setting.loaded.model
    unwrap_attention(model)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


class Attention(Experiment):
    """Average maps over short texts, and shares of attention in a stream, layer by layer."""

    name, title, reference = "attention", "Where attention goes", "Fig. 2"

    def pieces(self, setting: Setting) -> list[Piece]:
        common = {"data": setting.text.sha256, "bos": list(setting.beginning.ids)}
        n, cache = setting.lengths.sentences, setting.lengths.cache
        config = common | {"what": "maps", "sentences": n}
        pieces = [Piece("maps", config, lambda: self._maps(setting), (setting.source.name, "maps"), n * SENTENCE)]
        for name, n_sink in (("streaming", setting.n_sink), ("window", 0)):
            config = common | {"what": "shares", "n_sink": n_sink, "cache": cache, "first": setting.n_sink}
            compute = partial(self._shares, setting, n_sink, cache)
            pieces.append(Piece(name, config, compute, (setting.source.name, "shares", name), 4 * cache))
        return pieces

    @torch.no_grad()
    def _maps(self, setting: Setting) -> Found:
        front = list(setting.beginning.ids)
        ids = setting.ids(setting.lengths.sentences * SENTENCE + len(front))[0, len(front) :]
        rows = ids[: len(ids) // SENTENCE * SENTENCE].view(-1, SENTENCE)[:, : SENTENCE - len(front)]
        rows = torch.cat((torch.tensor(front, dtype=torch.int64).expand(len(rows), -1), rows), dim=1)
        rows, totals = rows.to(setting.loaded.device), []
        with _writing_weights(setting) as model:
            for part in rows.split(64):
                maps = model(part, output_attentions=True, use_cache=False).attentions
                sums = [of_layer.float().sum(0).mean(0).cpu().numpy() for of_layer in maps]
                totals = [a + b for a, b in zip(totals or [0.0] * len(sums), sums, strict=True)]
        return Found({"sentences": len(rows)}, {"maps": np.stack(totals) / len(rows)})

    @torch.no_grad()
    def _shares(self, setting: Setting, n_sink: int, cache: int) -> Found:
        """Shares ``[layers, heads]`` of attention that go to the first kept tokens, the recent ones and the rest."""
        sizes, first = setting.sizes(cache, n_sink), setting.n_sink
        ids = setting.ids(4 * cache + STEPS).to(setting.loaded.device)
        if ids.shape[1] <= cache + STEPS + 1:
            raise ValueError(f"the text has {ids.shape[1]} tokens, too few to fill a cache of {cache}")
        n_before, to_first, to_recent = ids.shape[1] - STEPS, [], []
        with _writing_weights(setting) as model, StreamingLLMWrapper(model, config=sizes, engine="eager") as stream:
            past = stream.new_cache()
            stream.prefill(ids[:, :n_before], past)
            ring = past.layers[0].layout
            for token in range(n_before, ids.shape[1]):
                weights = stream(ids[:, token : token + 1], past_key_values=past, output_attentions=True).attentions
                # The oldest of the kept tokens are the sinks, or without sinks those that leave the window next.
                kept = [*range(n_sink), *range(max(n_sink, token - sizes.window_size), token + 1)]
                slots = torch.tensor([ring.slot(number) for number in kept], device=ids.device)
                of_layers = torch.stack([w[0, :, 0].float()[:, slots.to(w.device)].cpu() for w in weights])
                to_first.append(of_layers[..., :first].sum(-1).numpy())
                to_recent.append(of_layers[..., -RECENT:].sum(-1).numpy())
        shares = {"first": np.mean(to_first, axis=0), "recent": np.mean(to_recent, axis=0)}
        return Found({"token": n_before, "queries": STEPS}, shares)

    def result(self, setting: Setting, found: dict[str, Found]) -> dict:
        rows, heads, maps = [], {}, {}
        for name, one in found.items():
            if name == "maps":
                all_maps = one.arrays["maps"]
                layers = np.unique(np.linspace(0, len(all_maps) - 1, MAPS).astype(int))
                maps = {str(layer): np.round(all_maps[layer], 5).tolist() for layer in layers}
                continue
            first, recent = one.arrays["first"], one.arrays["recent"]
            heads[name] = np.round(first, 5).tolist()
            for layer in range(len(first)):
                row = {"method": name, "layer": layer, "to_first": float(first[layer].mean())}
                rows.append(row | {"to_recent": float(recent[layer].mean())})
        streams = {name: one.values for name, one in found.items() if name != "maps"}
        return {"cache_size": setting.lengths.cache, "n_sink": setting.n_sink, "recent": RECENT, "rows": rows,
                "heads": heads, "maps": maps, "streams": streams}  # fmt: skip
