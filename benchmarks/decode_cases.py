"""The rows of `decode_step.py`: what each group asks, and the methods and options that answer it.

What a step costs does not depend on how good its tables are: what is trained or measured takes few samples and steps.
"""

from __future__ import annotations

from typing import Any

TENTH = {"budget": 0.1, "slow": False}

GROUPS: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "codes": {
        "kivi, 4 bits": ("kivi", {"bits": 4}),
        "kivi, 3 bits": ("kivi", {"bits": 3}),
        "kivi, 2 bits": ("kivi", {"bits": 2}),
        "saq": ("saq", {}),
        "zipcache": ("zipcache", {}),
        "mikv": ("mikv", {"when": "prefill"}),
        "vidkv": ("vidkv", {}),
        "rotatekv": ("rotatekv", {}),
        "gear": ("gear", {}),
        "gear, fixed errors": ("gear", {"mode": "calibrated", "samples": 1}),
        "cachegen": ("cachegen", {}),
        "cachegen, deltas": ("cachegen", {"delta": True}),
    },
    "tables and sketches": {
        "kvquant, 4 bits": ("kvquant", {"bits": 4, "weights": "none"}),
        "kvquant, 4 bits, no outliers": ("kvquant", {"bits": 4, "weights": "none", "outliers": 0.0}),
        "turboquant, 4 bits": ("turboquant", {}),
        "turboquant, 3 bits, turned": ("turboquant", {"keys": 3, "values": 3, "coding": "rotated"}),
        "qjl": ("qjl", {}),
        "polarquant": ("polarquant", {"values": 4}),
        "polarquant, nested": ("polarquant", {"form": "nested"}),
    },
    "channels and rank": {
        "think": ("think", {}),
        "diffqkv": ("diffqkv", {"samples": 1, "tokens": 256, "steps": 16, "draws": 1}),
        "diffqkv, channels": ("diffqkv", {"cut": "channels", "samples": 1, "tokens": 256, "steps": 16, "draws": 1}),
        "palu, half the rank": ("palu", {"budget": 0.5, "ranks": "energy"}),
        "palu, half the rank, 4 bits": ("palu", {"budget": 0.125, "bits": 4, "ranks": "energy"}),
        "eigen, half the rank": ("eigen", {"budget": 0.5}),
        "kv-heads, 2 of 3": ("kv-heads", {}),
        "cskv, half the rank": ("cskv", {"samples": 1, "steps": 1}),
        "transmla": ("transmla", {"samples": 2}),
        "transmla, roped": ("transmla", {"form": "roped", "samples": 2}),
    },
    "layers": {
        "xkv": ("xkv", {}),
        "minicache": ("minicache", {}),
        "llm-drop, a quarter": ("llm-drop", {}),
    },
    "reads": {
        "quest": ("quest", {}),
        "double-sparsity": ("double-sparsity", {"budget": 0.1}),
        "sparf": ("sparf", {"budget": 0.1}),
        "shadowkv": ("shadowkv", {"mode": "calibrated", **TENTH}),
        "retroinfer": ("retroinfer", {"slow": False}),
        "tidal": ("tidal", {"mode": "published"}),
        "mpcache, dynamic": ("mpcache", {"part": "dynamic"}),
        "sentencekv": ("sentencekv", {}),
    },
    "reads of one choice, and by an index": {
        "louiskv": ("louiskv", TENTH),
        "rekv": ("rekv", TENTH),
        "actqkv": ("actqkv", {"mode": "prompt", **TENTH}),
        "retrieval-attention, flat": ("retrieval-attention", {"index": "flat", "evidence": False, **TENTH}),
        "retrieval-attention, cluster": ("retrieval-attention", {"index": "cluster", "evidence": False, **TENTH}),
        "retrieval-attention, graph": ("retrieval-attention", {"evidence": False, **TENTH}),
    },
}
