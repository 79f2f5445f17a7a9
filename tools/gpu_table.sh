#!/bin/sh
# Measures the native engine on a fast GPU, and prints a table that compares it with its targets.
#
#   tools/gpu_table.sh [FOLDER]
#
# Random weights of Qwen-2.5-7B's shape, bf16 and GPTQ int4, contexts 2048 and 16384; no network.
# FOLDER (default: gpu_table) gets results.json, report.md, report.html and the plots; an
# interrupted run resumes from there. It takes at most 9 minutes (BUDGET_S).
# PHYSAI_DECODE_CAPABILITY=8.9 measures the code path of an L4.
# PEAK_GB_S is the peak bandwidth: 4800 for an H200, by its data sheet; 0 asks the driver.
set -eu
exec "${PYTHON:-python3}" -m physai_decode.bench --synthetic qwen2.5-7b --targets \
  --contexts 2048 16384 --peak-gb-s "${PEAK_GB_S:-4800}" --budget-s "${BUDGET_S:-540}" \
  --out "${1:-gpu_table}"
