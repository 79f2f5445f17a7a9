#!/bin/sh
# Measures what the native engine has to reach on a fast GPU and prints it as one table.
#
#   tools/gpu_table.sh [FOLDER]
#
# Random weights of Qwen-2.5-7B's shape, bf16 and GPTQ int4, contexts 2048 and 16384; no network.
# FOLDER (default: gpu_table) gets results.json, report.md, report.html and the plots; a run that
# was broken off goes on from there. It takes at most 9 minutes (BUDGET_S).
# PHYSAI_DECODE_CAPABILITY=8.9 has it measure the path that an L4 takes.
# PEAK_GB_S is the memory's peak: 4800 is an H200's by its data sheet; 0 asks the driver.
set -eu
exec "${PYTHON:-python3}" -m physai_decode.bench --synthetic qwen2.5-7b --targets \
  --contexts 2048 16384 --peak-gb-s "${PEAK_GB_S:-4800}" --budget-s "${BUDGET_S:-540}" \
  --out "${1:-gpu_table}"
