#!/usr/bin/env bash
# Fine-tunes a Marian checkpoint with LNGD on WMT data, from the Hub or from local files; pushes the model on request.
set -euo pipefail

usage() {
    cat <<'TEXT'
Usage: scripts/finetune_wmt.sh [options] [-- more arguments of run_translation.py]

Fine-tunes a Marian checkpoint on the Hub's WMT data set, or on local files, with --optim lngd.

  --model NAME          checkpoint, a name on the Hub or a folder   (MODEL, Helsinki-NLP/opus-mt-en-de)
  --source LANG         language to translate from                  (SOURCE_LANG, en)
  --target LANG         language to translate to                    (TARGET_LANG, de)
  --dataset NAME        data set on the Hub                         (DATASET, wmt/wmt16)
  --config NAME         its configuration                           (DATASET_CONFIG, de-en; else LANG-en)
  --train FILE          local JSON lines instead of a data set, gz too: {"translation": {"en": "…", "de": "…"}}
  --validation FILE     the same, to validate on; needed with --train
  --test FILE           the same, to translate in the end
  --output DIR          where the model goes                        (OUTPUT_DIR, runs/MODEL-wmt-SOURCE-TARGET)
  --samples N           use the first N training pairs              (MAX_TRAIN_SAMPLES, all)
  --epochs N            passes over the data                        (EPOCHS, 1)
  --steps N             steps, instead of passes                    (MAX_STEPS)
  --batch N             pairs a step                                (BATCH, 64)
  --accumulate N        micro-batches a step, which divide --batch  (ACCUMULATE, 1)
  --lr RATE             learning rate                               (LEARNING_RATE, 1e-4)
  --optim NAME          optimizer                                   (OPTIM, lngd)
  --optim-args TEXT     its settings                                (OPTIM_ARGS, for lngd
                        preset=fast)
  --beams N             beams in evaluation                         (NUM_BEAMS, 4)
  --seed N              of data order and dropout                   (SEED, 1)
  --push                push model and card to the Hub; log in first: hf auth login
  --hub-model-id NAME   under this name, e.g. you/opus-mt-en-de-wmt (HUB_MODEL_ID); implies --push
  --dry-run             print the command, run nothing
  --help                this text

In brackets: the environment variable that sets the same, and the default. PYTHON names the interpreter.
TEXT
}

fail() {
    printf 'error: %s: %s\n' "$1" "$2" >&2
    exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

model=${MODEL:-Helsinki-NLP/opus-mt-en-de}
source_lang=${SOURCE_LANG:-en}
target_lang=${TARGET_LANG:-de}
dataset=${DATASET:-}
config=${DATASET_CONFIG:-}
train='' validation='' test=''
output=${OUTPUT_DIR:-}
samples=${MAX_TRAIN_SAMPLES:-}
epochs=${EPOCHS:-1}
steps=${MAX_STEPS:-}
batch=${BATCH:-64}
accumulate=${ACCUMULATE:-1}
lr=${LEARNING_RATE:-1e-4}
optim=${OPTIM:-lngd}
optim_args=${OPTIM_ARGS:-}
beams=${NUM_BEAMS:-4}
seed=${SEED:-1}
push=no
hub_model_id=${HUB_MODEL_ID:-}
dry_run=no
more=()

while [ $# -gt 0 ]; do
    option=$1
    shift
    case $option in
        --help | -h) usage; exit 0 ;;
        --push) push=yes; continue ;;
        --dry-run) dry_run=yes; continue ;;
        --) more=("$@"); break ;;
        --model | --source | --target | --dataset | --config | --train | --validation | --test | --output | --samples \
            | --epochs | --steps | --batch | --accumulate | --lr | --optim | --optim-args | --beams | --seed \
            | --hub-model-id) ;;
        *) fail "${option#--}" "unknown option; see scripts/finetune_wmt.sh --help" ;;
    esac
    [ $# -gt 0 ] && [ -n "$1" ] || fail "${option#--}" "got no value, accepted: one value"
    value=$1
    shift
    case $option in
        --model) model=$value ;;
        --source) source_lang=$value ;;
        --target) target_lang=$value ;;
        --dataset) dataset=$value ;;
        --config) config=$value ;;
        --train) train=$value ;;
        --validation) validation=$value ;;
        --test) test=$value ;;
        --output) output=$value ;;
        --samples) samples=$value ;;
        --epochs) epochs=$value ;;
        --steps) steps=$value ;;
        --batch) batch=$value ;;
        --accumulate) accumulate=$value ;;
        --lr) lr=$value ;;
        --optim) optim=$value ;;
        --optim-args) optim_args=$value ;;
        --beams) beams=$value ;;
        --seed) seed=$value ;;
        --hub-model-id) hub_model_id=$value ;;
    esac
done

whole() { # field value: a whole number above zero
    case $2 in '' | *[!0-9]* | 0*) fail "$1" "got '$2', accepted: a whole number, at least 1" ;; esac
}

whole batch "$batch"
whole accumulate "$accumulate"
whole beams "$beams"
[ -z "$samples" ] || whole samples "$samples"
[ -z "$steps" ] || whole steps "$steps"
[ $((batch % accumulate)) -eq 0 ] || fail accumulate "got $accumulate, accepted: a divisor of --batch $batch"
[ "$source_lang" != "$target_lang" ] || fail target "got '$target_lang', which is the source, accepted: another language"

arguments=(--do_train --do_eval --predict_with_generate)
if [ -n "$train$validation$test" ]; then
    [ -n "$train" ] || fail train "got none, accepted: a file, as --validation or --test is one"
    [ -n "$validation" ] || fail validation "got none, accepted: a file, as --train is one"
    [ -z "$dataset$config" ] || fail dataset "got '${dataset:-$config}' and files, accepted: one of the two"
    for part in train validation test; do
        [ -z "${!part}" ] || [ -f "${!part}" ] || fail "$part" "got '${!part}', which is no file, accepted: JSON lines"
    done
    arguments+=(--train_file "$train" --validation_file "$validation")
    if [ -n "$test" ]; then
        arguments+=(--do_predict --test_file "$test")
    fi
else
    if [ -z "$config" ]; then # the Hub's WMT names the other language first
        other=$source_lang
        [ "$source_lang" != en ] || other=$target_lang
        config=$other-en
    fi
    arguments+=(--do_predict --dataset_name "${dataset:-wmt/wmt16}" --dataset_config_name "$config")
fi

if [ -z "$output" ]; then
    output=runs/$(basename "$model")-wmt-$source_lang-$target_lang
fi
if [ -z "$optim_args" ] && [ "$optim" = lngd ]; then
    optim_args=preset=fast
fi
arguments+=(
    --model_name_or_path "$model" --source_lang "$source_lang" --target_lang "$target_lang" --output_dir "$output"
    --max_source_length 128 --max_target_length 128 --num_beams "$beams"
    --per_device_train_batch_size $((batch / accumulate)) --gradient_accumulation_steps "$accumulate"
    --learning_rate "$lr" --lr_scheduler_type linear --warmup_steps 0.05 --label_smoothing_factor 0.1
    --optim "$optim" --train_sampling_strategy group_by_length --save_strategy epoch --save_total_limit 2 --seed "$seed"
)
[ -z "$optim_args" ] || arguments+=(--optim_args "$optim_args")
[ -z "$samples" ] || arguments+=(--max_train_samples "$samples")
if [ -n "$steps" ]; then
    arguments+=(--max_steps "$steps")
else
    arguments+=(--num_train_epochs "$epochs")
fi
if [ "$push" = yes ] || [ -n "$hub_model_id" ]; then
    arguments+=(--push_to_hub)
    [ -z "$hub_model_id" ] || arguments+=(--hub_model_id "$hub_model_id")
fi

python=${PYTHON:-}
if [ -z "$python" ]; then
    python=python3
    [ ! -x "$root/.venv/bin/python" ] || python=$root/.venv/bin/python
fi
command -v "$python" >/dev/null || fail PYTHON "got '$python', which cannot be run, accepted: a Python with hf_lngd"

command=("$python" "$root/scripts/run_translation.py" "${arguments[@]}" ${more[@]+"${more[@]}"})
if [ "$dry_run" = yes ]; then
    printf '%q ' "${command[@]}"
    printf '\n'
    exit 0
fi
exec "${command[@]}"
