#!/usr/bin/env bash
# The whole road, offline, on two CPU cores: a small hybrid of Mamba and attention reads speeches and word problems, learns to answer
# problems with the steps that lead there (SFT), then to prefer right steps to plausible wrong ones (DPO). After each stage an exam:
# exact match on new stories of the training kind, and on stories whose sentences and sums no training row holds.
#
#   bash examples/road.sh [muon|adamw] [SEED] [DIR] [flags of muonlm train …]      defaults: muon 1 runs/road-muon-1
#   EXAM=n asks n problems of each kind (200). LOG.md has the results of three seeds of both optimizers.
set -euo pipefail
optimizer=${1:-muon} seed=${2:-1}
out=${3:-runs/road-$optimizer-$seed}
common=(--optim.name "$optimizer" --seed "$seed" "${@:4}")

exam() { # new stories of the training kind; then held-out sentences and sums
    for split in train held_out; do
        muonlm eval "$out/$1" --tasks word_problems --steps 1-2 --split $split --limit "${EXAM:-200}" | tee -a "$out/exams.txt"
    done
}

if [ ! -e "$out/data" ]; then
    muonlm prep sotu=0.2 word_problems:60000:1-2=0.8 --tokenizer bpe:1024:digits --num-tokens 2.5e6 --to "$out/data"
fi
muonlm train road/pretrain --data "$out/data" --out "$out/pretrain" "${common[@]}"
exam pretrain
muonlm train road/sft --init-from "$out/pretrain" --out "$out/sft" "${common[@]}"
exam sft
muonlm train road/dpo --init-from "$out/sft" --out "$out/dpo" --model.block_size 512 "${common[@]}"  # three pairs a row
exam dpo

echo
echo "Exact match after each stage ($optimizer, seed $seed):"
cat "$out/exams.txt"
echo "Talk to it: muonlm chat $out/dpo"
