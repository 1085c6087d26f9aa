#!/usr/bin/env bash
# The whole road, offline, on two CPU cores: a small hybrid of Mamba and attention reads speeches and word problems, learns to answer
# problems with the steps that lead there (SFT), then to prefer right steps to plausible wrong ones (DPO). Held-out exact match, on
# stories, names and sums that no training row holds, is printed after each stage.
#
#   bash examples/road.sh [muon|adamw] [SEED] [DIR] [flags of muonlm train …]      defaults: muon 1 runs/road-muon-1
#   EXAM=n asks n problems (300). LOG.md has the results of three seeds of both optimizers.
set -euo pipefail
optimizer=${1:-muon} seed=${2:-1}
out=${3:-runs/road-$optimizer-$seed}
common=(--optim.name "$optimizer" --seed "$seed" "${@:4}")
examine=(--tasks word_problems --steps 1-3 --limit "${EXAM:-300}")

if [ ! -e "$out/data" ]; then
    muonlm prep sotu=0.3 word_problems:60000:1-3=0.7 --tokenizer bpe:1024:digits --num-tokens 3.2e6 --to "$out/data"
fi
muonlm train road/pretrain --data "$out/data" --out "$out/pretrain" "${common[@]}"
muonlm eval "$out/pretrain" "${examine[@]}" | tee "$out/pretrain.txt"
muonlm train road/sft --init-from "$out/pretrain" --out "$out/sft" "${common[@]}"
muonlm eval "$out/sft" "${examine[@]}" | tee "$out/sft.txt"
muonlm train road/dpo --init-from "$out/sft" --out "$out/dpo" "${common[@]}"
muonlm eval "$out/dpo" "${examine[@]}" | tee "$out/dpo.txt"

echo
echo "Held out, after each stage ($optimizer, seed $seed):"
for stage in pretrain sft dpo; do cat "$out/$stage.txt"; done
echo "Talk to it: muonlm chat $out/dpo"
