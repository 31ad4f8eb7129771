#!/bin/sh
# The demo's predictor and its table, from prompts on: about half an hour on two CPU cores.
#
#   scripts/make_predictor.sh WORK TRAIN_PROMPTS
#
# TRAIN_PROMPTS: made by `python scripts/make_prompts.py --train FILE` of the documents that the demo was trained on. WORK: a folder for
# traces (2 GB) and the predictors that do not ship. Held out are the prompts in benchmarks/prompts; apache2-doc is a document
# set that neither the demo nor a predictor was trained on.
set -eu
work=$1 prompts=$2
mkdir -p "$work"

duoserve trace --prompts "$prompts" -o "$work/train" --hidden --new-tokens 24 --batch 6 --ctx 4k --seed 1
duoserve trace --prompts benchmarks/prompts -o "$work/held" --hidden --new-tokens 64

duoserve train "$work/train" -o duoserve/demo/predictor --kind head --epochs 4
duoserve train "$work/train" -o "$work/pre-attention" --kind pre-attention --epochs 4
duoserve train "$work/train" -o "$work/mlp" --kind mlp --epochs 4 --tokens 60000
duoserve train "$work/train" -o "$work/matching" --kind matching
duoserve train "$work/train" -o "$work/popularity" --kind popularity
# By token instead of by prompt, to show what that hides: see the test figures that both print. Both learn from about 60,000 tokens.
duoserve train "$work/train" -o "$work/mlp-by-token" --kind mlp --epochs 4 --tokens 60000 --split token

set -- duoserve/demo/predictor "$work/pre-attention" "$work/mlp" "$work/matching" "$work/popularity"
duoserve evaluate "$work/held" "$@" --by-layer --plots docs/plots
duoserve evaluate "$work/held" "$@" --json >benchmarks/results/predictor_demo.jsonl
