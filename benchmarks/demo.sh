#!/bin/sh
# The main job on the demo model: profile, analyze, calibrate, replay. Writes into demo/; about five minutes on two cores.
set -eu
cd "$(dirname "$0")/.."
rm -rf demo && mkdir demo

say() { printf '\n\033[1m%s\033[0m\n' "\$ $*" >&2; "$@" >/dev/null; }

say kvtool profile smollm2 --stat retrieval --stat induction --stat attention --stat maps --tokens 1024 --samples 1 \
    --set needle.lengths=600 --set needle.depths=0.2,0.8 --set repeat.samples=1 -o demo/smollm2.trace.safetensors
say kvtool analyze demo/smollm2.trace.safetensors heads --figures demo/figures
say kvtool calibrate demo/smollm2.trace.safetensors --method duo --set steps=40 --set lr=0.08 --set lengths=384 -o demo/smollm2.duo.plan.safetensors
say kvtool inspect demo/smollm2.duo.plan.safetensors
say kvtool replay smollm2 --plan demo/smollm2.duo.plan.safetensors --strict --lengths 1000 --keys 1 \
    --set text.prompt=500 --set text.tokens=32 --set text.samples=2 --set generation.prompt=500 -o demo/verdict.json
