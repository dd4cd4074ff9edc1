"""The peer's side of `parity.py`, for an interpreter that has kvpress: what its presses keep of given prompts.

PYTHON parity_peer.py FOLDER reads FOLDER/job.json, FOLDER/network and FOLDER/prompts.safetensors, and writes
FOLDER/kept.safetensors: uint8 [L,K,S] named `prompt/case`, 1 where the entry stays.

Each prompt is prefilled once for all presses that want the same attention. A press gets what it would get alone, and
its own `compress` decides; only the cache is left whole behind it. Presses that prune head by head keep the entries in
memory and list what decoding must not see: the list is read instead.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import kvpress
import torch
import transformers
from kvpress.presses.base_press import BasePress
from parity_rows import held
from safetensors.torch import load_file, save_file


class Several(BasePress):
    """Asks every press at every layer, and compresses nothing."""

    def __init__(self, presses: dict[str, BasePress]):
        self.presses = presses
        self.kept: dict[str, list[torch.Tensor]] = {name: [] for name in presses}

    def post_init_from_model(self, model: Any) -> None:
        for press in self.presses.values():
            press.post_init_from_model(model)

    def compress(self, module, hidden_states, keys, values, attentions, kwargs):
        for name, press in self.presses.items():
            module.masked_key_indices = None
            left, _ = press.compress(module, hidden_states, keys, values, attentions, kwargs)
            mask = held(keys[0], left[0])
            if module.masked_key_indices is not None:
                _, head, place = module.masked_key_indices
                mask[head, place] = False
            self.kept[name].append(mask)
        module.masked_key_indices = None
        return keys, values


def built(case: dict[str, Any], statistics: dict[str, torch.Tensor]) -> BasePress:
    press = getattr(kvpress, case["name"])(compression_ratio=case["ratio"], **case["options"])
    if case["name"] == "ExpectedAttentionStatsPress":
        press.mu, press.cov = statistics["mean"], statistics["covariance"]
    if case["wrapper"] is None:
        return press
    return getattr(kvpress, case["wrapper"])(press, **case["wrapper_options"])


def main() -> None:
    transformers.logging.disable_progress_bar()
    folder = Path(sys.argv[1])
    cases = json.loads((folder / "job.json").read_text())
    prompts = load_file(folder / "prompts.safetensors")
    statistics = load_file(folder / "statistics.safetensors")
    network = transformers.AutoModelForCausalLM.from_pretrained(folder / "network", dtype=torch.float32).eval()
    out = {}
    for attention in ("sdpa", "eager"):
        wanted = {name: built(case, statistics) for name, case in cases.items() if case["attention"] == attention}
        network.set_attn_implementation(attention)
        for prompt, tokens in prompts.items():
            if not wanted:
                continue
            several = Several(wanted)
            with torch.no_grad(), several(network):
                network.model(input_ids=tokens[None], past_key_values=transformers.DynamicCache())
            for name, masks in several.kept.items():
                out[f"{prompt}/{name}"] = torch.stack(masks).to(torch.uint8)
            print(f"{prompt}, {attention}", file=sys.stderr, flush=True)
    save_file(out, folder / "kept.safetensors")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}")


if __name__ == "__main__":
    main()
