#!/bin/sh
# From raw text to a model that completes code, with the commands that a person would type.
set -eu
GROUNDUP="${BIN:-.venv/bin}/groundup"

show() {
    printf '\n\033[1m$ groundup'
    for word in "$@"; do
        case $word in *[!A-Za-z0-9_./^=-]*) printf " '%s'" "$word" ;; *) printf ' %s' "$word" ;; esac
    done
    printf '\033[0m\n'
    "$GROUNDUP" "$@"
}

echo "1. Train: Python's standard library (its tests left out) -> BPE tokenizer -> shards -> a small GPT-2."
show train python-stdlib --output-dir demo --model gpt2-micro --vocab-size 4096 --validation-fraction 0.05 \
    --n-positions 128 --total-batch-tokens 1024 --learning-rate 1e-3 --max-steps 1800 \
    --logging-steps 50 --eval-steps 300 --max-eval-tokens 65536 --sample-prompt "def "

echo
echo "2. Measure: every window of the validation files, which the model has not seen."
show evaluate demo

echo
echo "3. Complete three function headers that stand nowhere in the training text."
for header in 'def read_settings_file(path, default=None):' 'def count_words_in_line(line):' \
    'class TemperatureSensor:\n    def __init__(self, name, unit):'; do
    show generate demo --prompt "$(printf '%b' "$header")" --max-new-tokens 80 --temperature 0.5 --repetition-penalty 1.2 --min-p 0.05
done

echo
echo "4. See how it went, on one page."
show report demo

cat <<EOF

Open demo/report.html in a browser; the samples over time are on it, and in demo/samples.jsonl.
Next, try:
  $GROUNDUP doctor demo                                          is it sound? each check measured
  $GROUNDUP generate demo --prompt 'import '                     another prompt
  $GROUNDUP train python-stdlib --config demo/config.toml --output-dir demo --max-steps 3000   train on
  $GROUNDUP train YOUR_FOLDER --output-dir my-run                your own text or code
  $GROUNDUP train --help                                         everything that can be changed
EOF
